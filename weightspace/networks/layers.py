"""Which numbers of a layer belong to which of its units: the rows that become tokens.

A layer is a module that holds weights of its own. Its rows are its output units: what a unit is multiplied with, its
bias, and for a normalization also the running statistics of its channel. Layers of another kind are declared, see
`register_layer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from weightspace.runs import UserError

BY_UNIT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.Conv1d: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.Embedding: ("weight",),
}
"""Layers whose tensors have the units as their first axis, and these tensors."""
NORMALIZATIONS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")
"""What a normalization holds of every channel."""
DECLARED: dict[type[nn.Module], tuple[str, ...]] = {}
"""Layers that `register_layer` added."""


@dataclass(frozen=True)
class Block:
    """Rows of one layer that have the same length."""

    index: dict[str, Tensor]
    """tensor of the layer -> [units, entries of a unit], places in the flattened tensor; a row is all of them joined"""
    apart: bool = False
    """whether each tensor is normalized apart, because they are of different kinds (scales, means, variances)"""


def register_layer(kind: type[nn.Module], *tensors: str) -> None:
    """Declare a kind of layer: entry u along the first axis of each of these tensors belongs to unit u.

    Args:
        kind: the class of the layer, such as a layer of your own.
        tensors: names of its parameters and buffers; all that it holds.

    Raises:
        UserError: no tensors are named.
    """
    if not tensors:
        raise UserError(f"register_layer({kind.__name__}, ...) needs the names of the layer's tensors")
    DECLARED[kind] = tensors


def blocks_of(name: str, module: nn.Module) -> list[Block]:
    """The rows of one layer.

    What a module of another package holds itself beside its parts (class tokens, positions, scales) are free
    parameters: every vector along their last axis is a row.

    Args:
        name: the layer's name, for the error.
        module: the layer.

    Raises:
        UserError: a layer of torch whose rows are not known, or one that was declared with other tensors.
    """
    own = held(module)
    if not own:
        return []
    declared = next((tensors for kind, tensors in DECLARED.items() if isinstance(module, kind)), None)
    known = declared or next((tensors for kind, tensors in BY_UNIT.items() if isinstance(module, kind)), None)
    if known is not None:
        if extra := sorted(set(own) - set(known)):
            advice = (
                "take the weight norm away (torch.nn.utils.remove_weight_norm) and save the state_dict anew"
                if "weight_g" in extra
                else f"name them all: weightspace.register_layer({type(module).__name__}, {', '.join(map(repr, own))})"
            )
            raise UserError(
                f"layer {name!r}, a {type(module).__name__}, holds {', '.join(extra)} beside its rows; {advice}"
            )
        return [Block(_joined({key: own[key] for key in known if key in own}, by_unit=True))]
    if isinstance(module, NORMALIZATIONS):
        return [Block(_joined({key: own[key] for key in OF_CHANNELS if key in own}, by_unit=False), apart=True)]
    if isinstance(module, nn.MultiheadAttention):
        pairs = {key: own[key] for key in ("in_proj_weight", "in_proj_bias") if key in own}
        joined = [Block(_joined(pairs, by_unit=True))] if "in_proj_weight" in pairs else []
        return joined + [Block(_vectors({key: own[key]})) for key in own if not joined or key not in pairs]
    if isinstance(module, ParametrizationList):
        layer, _, tensor = name.partition(".parametrizations.")
        raise UserError(
            f"the {tensor} of layer {layer!r} is computed from other tensors, whose rows are not known; put it in "
            f"place (torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})) and save the state_dict "
            "anew, or, where the first axis of these tensors is the layer's units, declare them: "
            "weightspace.register_layer(torch.nn.utils.parametrize.ParametrizationList, "
            f"{', '.join(map(repr, own))})"
        )
    if type(module).__module__.startswith("torch.nn."):
        raise UserError(
            f"layer {name!r} is a {type(module).__name__}, whose rows are not known; where the first axis of its "
            f"tensors is its units, declare it: weightspace.register_layer(torch.nn.{type(module).__name__}, "
            f"{', '.join(map(repr, own))})"
        )
    return [Block(_vectors({key: tensor})) for key, tensor in own.items()]


def held(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of real numbers that a module holds itself and keeps in its state_dict."""
    kept = {key: value for key, value in module.named_parameters(recurse=False)}
    passing = module._non_persistent_buffers_set
    kept |= {key: value for key, value in module.named_buffers(recurse=False) if key not in passing}
    return {key: value for key, value in kept.items() if value.is_floating_point()}


def _joined(tensors: dict[str, Tensor], by_unit: bool) -> dict[str, Tensor]:
    """Tensors side by side: by their first axis, or (by_unit False) entry by entry."""
    index = {key: torch.arange(tensor.numel()) for key, tensor in tensors.items()}
    return {key: each.view(len(tensors[key]) if by_unit else len(each), -1) for key, each in index.items()}


def _vectors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The vectors along the last axis."""
    return {
        key: torch.arange(tensor.numel()).view(-1, tensor.shape[-1] if tensor.ndim else 1)
        for key, tensor in tensors.items()
    }


def variances_of(network: nn.Module) -> list[str]:
    """Names of the weights that are variances, which no network works with where they are below zero."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    layers = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    return [f"{name}.running_var".lstrip(".") for name in layers]


def rows_of(network: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, list[Block]]]:
    """Every layer of a network with its rows, as places in the flat weights.

    Args:
        network: the network.
        shapes: {name: shape} of its weights, each once: of tied weights only the first name.

    Raises:
        UserError: a layer whose rows are not known.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    start = dict(zip(shapes, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        blocks = []
        for block in blocks_of(name or type(network).__name__, module):
            own = {k: start[prefix + k] + index for k, index in block.index.items() if prefix + k in start}
            if own:
                blocks.append(Block(own, block.apart))
        if blocks:
            yield name, blocks
