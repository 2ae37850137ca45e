"""Preprocessed zoos of the field: one file of tokens per checkpoint.

    ROOT/dataset_torch.<split>/sample_<i>.pt      {"w": tokens [T, D], "m": mask, "p": positions, "props": properties}
    ROOT/dataset_info_<split>.json

A token is a row of a layer, [weight of a unit, its bias], padded and cut to the token size; the mask says which entries
are weights. The base network is not in the files and has to be named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.networks.architectures import Architecture
from weightspace.networks.fitting import Misfit, natural
from weightspace.zoo.layouts.found import Found, column, folders, scalar, split_of
from weightspace.zoo.untrusted import Unreadable, is_plain, read_saved

START = "dataset_torch."


def detects(root: Path) -> bool:
    """Whether a folder holds folders of samples."""
    return any(folder.name.startswith(START) for folder in folders(root))


def reader(architecture: Architecture | None) -> Callable[[Path], Iterator[Found]]:
    """A reader for samples of one base network.

    Args:
        architecture: it; a sample does not say it.
    """

    def read(root: Path) -> Iterator[Found]:
        for folder in folders(root):
            if not folder.name.startswith(START):
                continue
            for path in sorted(folder.glob("sample_*.pt"), key=lambda path: natural(path.name)):
                yield _found(root, path, split_of(folder.name.removeprefix(START)), architecture)

    return read


def _found(root: Path, path: Path, split: str | None, architecture: Architecture | None) -> Found:
    name = str(path.relative_to(root))
    try:
        sample = read_saved(path)
        if not isinstance(sample, Mapping) or not is_plain(sample.get("w")):
            raise Unreadable("no sample: a mapping with w, m, p and props is expected")
    except Unreadable as error:
        return Found(name, None, name, _raises(error))
    said = sample.get("props")
    said = said if isinstance(said, Mapping) else {}
    known = {column(str(key)): scalar(value) for key, value in said.items()}
    properties = {key: value for key, value in known.items() if value is not None and key != "epoch"}
    epoch = known.get("epoch")

    def load() -> Mapping[str, Tensor]:
        if architecture is None:
            raise Misfit("samples do not say their base network; name it with --network")
        again = read_saved(path)
        return from_tokens(again["w"], again.get("m"), architecture)

    return Found(
        member=str(known.get("path", known.get("model_id", name))),
        epoch=int(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else None,
        path=name,
        load=load,
        properties=properties,
        network=architecture.name if architecture else None,
        arguments=architecture.arguments if architecture else {},
        split=split,
    )


def _raises(error: Exception) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


def from_tokens(tokens: Tensor, mask: Any, architecture: Architecture) -> dict[str, Tensor]:
    """The weights that some tokens hold.

    Args:
        tokens: [T, D], or [views, T, D], of which the first is taken.
        mask: of the same shape (or [T, D]); what is not 0 is a weight.
        architecture: its layers, weight and bias each, in their order.

    Returns:
        {parameter: tensor}.

    Raises:
        Misfit: another number of weights, or a network of other layers.
        Unreadable: a mask of another shape.
    """
    tokens = tokens[0] if tokens.ndim == 3 else tokens
    if not isinstance(mask, Tensor) or mask.shape[-2:] != tokens.shape or tokens.ndim != 2:
        raise Unreadable(f"tokens of shape {tuple(tokens.shape)} need a mask of that shape")
    values = tokens[(mask[0] if mask.ndim == 3 else mask) != 0]
    shapes = architecture.shapes
    if len(values) != architecture.parameter_count:
        raise Misfit(f"{len(values):,} weights, but {architecture} has {architecture.parameter_count:,}")
    weights: dict[str, Tensor] = {}
    start = 0
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        names = [name for name in shapes if name.rpartition(".")[0] == layer]
        if [name.rpartition(".")[2] for name in names] not in (["weight", "bias"], ["weight"]):
            raise Misfit(f"samples of layers other than weight and bias cannot be read: {', '.join(names)}")
        units = shapes[names[0]][0]
        widths = [math.prod(shapes[name][1:]) for name in names]
        rows = values[start : start + units * sum(widths)].view(units, sum(widths))  # [units, fan-in + 1]
        start += rows.numel()
        for name, part in zip(names, rows.split(widths, dim=1), strict=True):
            weights[name] = part.reshape(shapes[name])
    return weights
