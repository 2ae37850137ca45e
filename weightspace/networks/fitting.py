"""Which base network do the tensors of a foreign state_dict belong to, and which tensor is which parameter?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mode
from typing import Any

from weightspace.networks.architectures import NETWORKS, Architecture
from weightspace.runs import UserError

Shapes = Mapping[str, tuple[int, ...]]

PREFIXES = ("module.", "model.", "_orig_mod.", "network.", "net.")
"""What wrappers put before every name of a state_dict."""
WRAPPERS = ("model_state_dict", "state_dict", "model", "weights")
"""Keys under which training scripts keep the state_dict, beside the optimizer's."""
SHIPPED = tuple(NETWORKS)
"""The base networks of this package, which are recognized by their shapes."""
LARGEST_INPUT = 4096
"""Greatest side of an image that is tried when the arguments of an MLP are sought."""


class Misfit(Exception):
    """Tensors that do not belong to a base network; the message says which, and by how much."""


@dataclass(frozen=True)
class Fit:
    """A base network and where its parameters are found."""

    architecture: Architecture
    names: dict[str, str]
    """parameter -> name of its tensor in the state_dict"""


@lru_cache(maxsize=4096)
def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Sort key by which module_list.10 comes after module_list.9.

    >>> sorted(["b.10", "b.9", "a"], key=natural)
    ['a', 'b.9', 'b.10']
    """
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)


def bare(names: Sequence[str]) -> dict[str, str]:
    """Every name without the prefixes that all of them share -> the name as it was."""
    found = {name: name for name in names}
    while prefix := next((p for p in PREFIXES if found and all(name.startswith(p) for name in found)), None):
        found = {name.removeprefix(prefix): whole for name, whole in found.items()}
    return found


def match(shapes: Shapes, architecture: Architecture) -> Fit:
    """Find every parameter of a base network in a state_dict.

    By name, without the prefixes of wrappers; else by position: layers in their order or in the natural order of their
    names, with the same kinds (weight, bias, ...) and shapes all along; else by shape, where every shape is there once.

    Raises:
        Misfit: no such assignment; the message names every tensor that is missing, of another shape or left over.
    """
    wanted, found = architecture.shapes, bare(list(shapes))
    again = {found.pop(name) for name in architecture.tied if name in found}  # the same numbers under a second name
    shapes = {name: shape for name, shape in shapes.items() if name not in again}
    if set(wanted) == set(found) and all(tuple(shapes[found[name]]) == wanted[name] for name in wanted):
        return Fit(architecture, {name: found[name] for name in wanted})
    for order in (list(shapes), sorted(shapes, key=_layered)):
        if not set(wanted) & set(found) and _alike(shapes, order, wanted):
            return Fit(architecture, dict(zip(wanted, order, strict=True)))
    by_shape = {tuple(shape): name for name, shape in shapes.items()}
    if len(by_shape) == len(shapes) == len(wanted) and set(by_shape) == set(wanted.values()):
        return Fit(architecture, {name: by_shape[shape] for name, shape in wanted.items()})
    raise Misfit(f"not a {architecture}: {_difference(shapes, wanted, found)}")


KINDS = ("weight", "bias", "running_mean", "running_var")
"""The tensors of a layer in the order in which modules register them."""


def _layered(name: str) -> tuple[Any, ...]:
    """Sort key: layers in natural order, their tensors as modules register them."""
    layer, _, kind = name.rpartition(".")
    return natural(layer), KINDS.index(kind) if kind in KINDS else len(KINDS), kind


def _alike(shapes: Shapes, order: Sequence[str], wanted: Shapes) -> bool:
    """Whether tensors in some order are the parameters one after another, beyond doubt.

    Shapes and kinds agree all along, and tensors that could be taken for each other differ in a number only, which
    says their order: `hidden.weight` and `last.weight` do not say which comes first. Plain numbers say it too.
    """
    if [tuple(shapes[name]) for name in order] != list(wanted.values()):
        return False
    patterns: dict[Any, set[str]] = {}
    for name in order:
        patterns.setdefault((tuple(shapes[name]), _kind(name)), set()).add(re.sub(r"\d+", "#", name))
    if len(set().union(*patterns.values())) == 1:
        return True
    return [_kind(name) for name in order] == list(map(_kind, wanted)) and all(len(p) == 1 for p in patterns.values())


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _difference(shapes: Shapes, wanted: Shapes, found: Mapping[str, str]) -> str:
    """Which tensors differ, by name where names are shared, else one after another; and the sums."""
    order = list(shapes)
    if set(wanted) & set(found):
        pairs = {name: found[name] for name in wanted if name in found}
    else:
        pairs = dict(zip(wanted, order, strict=False))
    lines = [
        f"{theirs}{'' if theirs == name else f', as {name},'} is {_size(shapes[theirs])}, needed {_size(wanted[name])}"
        for name, theirs in pairs.items()
        if tuple(shapes[theirs]) != wanted[name]
    ]
    lines += [f"{name} {_size(wanted[name])} is missing" for name in wanted if name not in pairs]
    lines += [f"{name} {_size(shapes[name])} is left over" for name in order if name not in pairs.values()]
    lines = lines or ["its tensors have other names, which do not say which is which"]
    there, needed = (sum(math.prod(shape) for shape in each.values()) for each in (shapes, wanted))
    more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
    return f"{'; '.join(lines[:6])}{more} ({there:,} values, needed {needed:,})"


def recognize(shapes: Shapes, arguments: Mapping[str, Any] | None = None) -> Fit:
    """The base network of the package that these tensors belong to; its arguments are read off the shapes.

    Args:
        shapes: {name: shape} of a state_dict, in its order.
        arguments: what cannot be read off (activation), passed on.

    Raises:
        Misfit: none of them fits, or several do.
    """
    fits = []
    for name in SHIPPED:
        for candidate in sized(name, shapes):
            try:
                fits.append(match(shapes, _sorted(name, candidate, arguments or {})))
            except (Misfit, UserError):
                continue
    if len(fits) > 1:
        names = ", ".join(str(fit.architecture) for fit in fits)
        raise Misfit(f"fits several base networks ({names}); name one with --network")
    if not fits:
        listed = ", ".join(f"{name} {_size(shapes[name])}" for name in sorted(shapes, key=natural)[:8])
        raise Misfit(
            f"fits none of the base networks {', '.join(sorted(SHIPPED))}: {listed}"
            f"{' ...' if len(shapes) > 8 else ''}; name one with --network, or yours as package.module:factory"
        )
    return fits[0]


def sized(name: str, shapes: Shapes) -> list[dict[str, Any]]:
    """Arguments with which a shipped base network may have these shapes, as far as shapes tell them."""
    matrices = {key: tuple(shape) for key, shape in shapes.items() if len(shape) in (2, 4)}
    if not matrices:
        return []
    own = [key for key, shape in Architecture(name).shapes.items() if len(shape) in (2, 4)]
    named, ends = bare(list(shapes)), [own[0], own[-1]]
    orders = [[named[key] for key in ends]] if set(ends) <= set(named) else []
    orders += [list(matrices), sorted(matrices, key=natural)]
    found: list[dict[str, Any]] = []
    for order in orders:
        found += _arguments(name, matrices[order[0]], matrices[order[-1]], list(map(tuple, shapes.values())))
    return [candidate for i, candidate in enumerate(found) if candidate not in found[:i]]


def _arguments(
    name: str, first: tuple[int, ...], last: tuple[int, ...], each: list[tuple[int, ...]]
) -> Iterator[dict[str, Any]]:
    """What the first and the last matrix of a base network and the shapes of all its tensors say; nothing where they
    cannot be its own.
    """
    width, inputs, classes = first[0], first[1], last[0]
    if name == "MLP" and len(first) == 2:
        for channels in (1, 3):
            size = math.isqrt(inputs // channels)
            if channels * size * size == inputs and size <= LARGEST_INPUT:
                yield {"channels": channels, "size": size, "hidden": width, "classes": classes}
    elif name == "SIREN" and (len(first), inputs) == (2, 2):
        layers = sum(len(shape) == 2 for shape in each) - 1
        yield {"inputs": inputs, "outputs": classes, "width": width, "layers": layers}
    elif name in ("ViT", "MLPMixer") and len(first) == 4:
        depth = each.count((width, 2 * width))  # the last matrix of every block
        # positions are the only tensor of three axes; a mixer has two square matrices over patches in every block
        over = [shape[1] for shape in each if (len(shape) == 3 if name == "ViT" else shape == shape[:1] * 2)]
        side = math.isqrt(mode(over)) if over else 0
        if depth and side:
            size = {"size": first[2] * side, "patch": first[2], "width": width, "depth": depth}
            yield {"channels": inputs, "classes": classes, **size}
    elif name not in ("MLP", "SIREN", "ViT", "MLPMixer") and len(first) == 4:
        inner = {"SmallCNN": {"hidden": width}, "ResNet18": {"width": width}}
        yield {"channels": inputs, "classes": classes, **inner.get(name, {})}


def _sorted(name: str, seen: Mapping[str, Any], said: Mapping[str, Any]) -> Architecture:
    """A base network with what was seen in the shapes and what was said of it, which counts more.

    In the order of their names: an import that goes on reads them back so, and ends in the same bytes.
    """
    return Architecture(name, dict(sorted({**seen, **said}.items())))


def fit(shapes: Shapes, name: str | None, arguments: Mapping[str, Any]) -> Fit:
    """The base network that is said, or the one that is recognized; what arguments do not say is read off the shapes.

    Args:
        shapes: {name: shape} of a state_dict.
        name: what the source or the user says; None where nothing is said.
        arguments: its arguments, as far as they are said.

    Raises:
        Misfit: the tensors do not belong to it.
        UserError: no such base network or argument.
    """
    if name is None:
        return recognize(shapes, arguments)
    sizes = sized(name, shapes) if name in SHIPPED else []
    problem: Misfit | None = None
    for size in sizes or [{}]:
        try:
            return match(shapes, _sorted(name, size, arguments))
        except Misfit as misfit:
            problem = problem or misfit
    assert problem is not None
    raise problem
