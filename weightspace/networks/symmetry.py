"""Symmetries of base networks: reorder hidden units without changing the function; align checkpoints to a reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from weightspace.networks.architectures import NETWORKS, Architecture
from weightspace.networks.behavior import activations, input_shape_of, logits, runner, vectorized
from weightspace.networks.groups import Axis, PermutationGroup
from weightspace.networks.tracing import UntraceableNetwork, derive_groups
from weightspace.runs import notice

TOLERANCE = 1e-3
"""Largest relative change of the outputs that rounding may make when a group is checked."""
_found: dict[tuple[str, Any], tuple[PermutationGroup, ...]] = {}


def groups_of(architecture: Architecture) -> tuple[PermutationGroup, ...]:
    """The permutation groups of a base network: those that its class declares, else those found by tracing it.

    Every group is checked by running a permuted network; one that changes the outputs is dropped with a warning. Where
    nothing is declared and tracing fails, there are none, and that is told.
    """
    key = (str(architecture), NETWORKS.get(architecture.name))
    if key not in _found:
        network = runner(architecture)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, *input_shape_of(network), generator=generator)
        declare = getattr(network, "permutation_groups", None)
        try:
            groups = declare() if declare else derive_groups(architecture.build(), inputs)
        except UntraceableNetwork as error:
            notice(
                f"the units of {architecture} are not permuted, since it cannot be traced ({error}); its class may "
                "declare permutation_groups()"
            )
            groups = ()
        _found[key] = tuple(group for group in groups if _holds(architecture, network, group, inputs, generator))
    return _found[key]


def _holds(
    architecture: Architecture, network: nn.Module, group: PermutationGroup, inputs: Tensor, generator: torch.Generator
) -> bool:
    """Whether random weights give the same outputs when their units are reordered."""
    weights = {}
    for name, shape in architecture.shapes.items():
        drawn = torch.randn(1, *shape, generator=generator)
        inputs_of_a_unit = math.prod(shape[1:]) if len(shape) > 1 else 1
        weights[name] = drawn.abs() if name.endswith("_var") else drawn / math.sqrt(inputs_of_a_unit)
    try:
        moved = permute(weights, (group,), [torch.arange(group.size).roll(1)[None]])
        with torch.no_grad():
            before, after = (logits(network, each, inputs, 1) for each in (weights, moved))
        error = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
        problem = f"changes its outputs by {error:.1%}" if not error <= TOLERANCE else ""
    except (RuntimeError, KeyError, IndexError) as failure:
        problem = f"cannot be applied ({str(failure).splitlines()[0]})"
    if problem:
        axes = ", ".join(f"{axis.parameter}[{axis.dim}]" for axis in group.axes)
        notice(f"a group of {group.size} units of {architecture} {problem} and is not used: {axes}")
    return not problem


def permute(
    weights: dict[str, Tensor], groups: Sequence[PermutationGroup], permutations: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Reorder the units of every group, each checkpoint by its own permutation.

    Args:
        weights: {name: [n, *shape]}.
        groups: the groups of the base network.
        permutations: per group [n, size]; new unit i of checkpoint b is its old unit permutations[g][b, i].
    """
    permuted = dict(weights)
    for group, permutation in zip(groups, permutations, strict=True):
        for axis in group.axes:
            weight = permuted[axis.parameter]
            offsets = torch.arange(axis.repeat, device=permutation.device)
            entries = (permutation[..., None] * axis.repeat + offsets).flatten(1)  # [n, size * repeat]
            blocks = torch.arange(axis.blocks, device=permutation.device) * entries.shape[1]
            entries = (blocks[:, None] + entries[:, None]).flatten(1)  # [n, blocks * size * repeat]
            rows = torch.arange(len(entries), device=permutation.device)[:, None]
            permuted[axis.parameter] = weight.movedim(axis.dim + 1, 1)[rows, entries].movedim(1, axis.dim + 1)
    return permuted


def random_permutations(groups: Sequence[PermutationGroup], count: int, generator: torch.Generator) -> list[Tensor]:
    """Independent uniform permutations, per group [count, size]."""
    return [torch.rand(count, group.size, generator=generator).argsort(dim=1) for group in groups]


def align(
    weights: dict[str, Tensor],
    reference: dict[str, Tensor],
    groups: Sequence[PermutationGroup],
    sweeps: int = 20,
) -> dict[str, Tensor]:
    """Reorder each checkpoint's units so that its weights lie closest to the reference (L2).

    Weight matching (Ainsworth et al. 2023, arXiv 2209.04836, algorithm 1): one assignment problem per group, the
    groups visited in turn until nothing moves. The similarity matrices are computed for all checkpoints at once; the
    assignment itself is solved checkpoint by checkpoint on the CPU, where it is not plain.

    Args:
        weights: {name: [n, *shape]}.
        reference: {name: [1, *shape]} for one common reference or {name: [n, *shape]} for one each.
        groups: the groups of the base network.
        sweeps: upper bound on the visits to each group.
    """
    aligned = {name: weight.clone() for name, weight in weights.items()}
    active = torch.arange(len(next(iter(weights.values()))), device=next(iter(weights.values())).device)
    for _ in range(sweeps):
        part = {name: weight[active] for name, weight in aligned.items()}
        target = {name: weight[active] if len(weight) > 1 else weight for name, weight in reference.items()}
        moved = np.zeros(len(active), dtype=bool)
        for position, group in enumerate(groups):
            similarity = cast(Tensor, sum(_unit_similarity(part, target, axis) for axis in group.axes))
            order = _assigned(similarity.expand(len(active), -1, -1).double().cpu().numpy())
            moves = (order != np.arange(group.size)).any(1)
            if moves.any():
                part = permute(part, groups[position : position + 1], [torch.from_numpy(order).to(active.device)])
                moved |= moves
        for name, weight in part.items():
            aligned[name][active] = weight
        active = active[torch.from_numpy(moved).to(active.device)]  # the others are where they stay
        if not len(active):
            break
    return aligned


CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)
"""Layers whose units stand behind the batch in their output."""
UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
"""Layers whose units stand last."""


def shown_by(architecture: Architecture, group: PermutationGroup) -> dict[str, Axis]:
    """The layers whose outputs are the units of a group, and the axis of each.

    None for heads of attention, which act within a layer.
    """
    network = architecture.build()
    found = {}
    for axis in group.axes:
        layer, _, kind = axis.parameter.rpartition(".")
        module, vector = network.get_submodule(layer), len(architecture.shapes[axis.parameter]) == 1
        several = isinstance(module, nn.LayerNorm | nn.RMSNorm) and not vector  # its first axis is not its last
        if kind == "weight" and axis.dim == 0 and isinstance(module, CHANNELS_FIRST + UNITS_LAST) and not several:
            found[layer] = axis
    return found


def features(
    architecture: Architecture, weights: dict[str, Tensor], inputs: Tensor, groups: Sequence[PermutationGroup]
) -> list[Tensor]:
    """What the units of every group put out on some inputs, per group [n, size, F]; F is 0 where no layer shows them.

    Each value is centered over inputs and positions, as for a covariance.
    """
    network = runner(architecture, inputs.device)
    shown = [shown_by(architecture, group) for group in groups]
    layers = sorted({layer for layers in shown for layer in layers})
    out = activations(network, weights, inputs, layers, vectorized(architecture))
    found = []
    for group, layers in zip(groups, shown, strict=True):
        parts = [next(iter(weights.values())).new_empty(len(next(iter(weights.values()))), group.size, 0)]
        for layer, axis in ((layer, axis) for layer, axis in layers.items() if layer in out):
            place = 2 if isinstance(network.get_submodule(layer), CHANNELS_FIRST) else -1
            units = _units(out[layer].movedim(place, 1).flatten(2), axis)  # [n, size, F]
            parts.append(units - units.mean(2, keepdim=True))
        found.append(torch.cat(parts, 2))
    return found


def align_features(features: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
    """The permutations that bring the units' outputs closest to those of a reference (L2), per group [n, size].

    Activation matching (Ainsworth et al. 2023, arXiv 2209.04836, section 3.1): as the outputs of a layer's units do not
    depend on the order of the units before, one assignment problem per group is all.

    Args:
        features: of `features`, per group [n, size, F].
        reference: the same of one network or of a mean, per group [1, size, F].
    """
    return [
        torch.from_numpy(_assigned((theirs @ own.transpose(1, 2)).double().cpu().numpy()))
        for own, theirs in zip(features, reference, strict=True)
    ]


def _assigned(similarity: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The best one-to-one assignment per checkpoint [n, size] of similarities [n, reference unit, unit].

    Where the most similar units of all reference units differ, they are the answer; only the others are solved.
    """
    order = similarity.argmax(2)
    units = np.arange(order.shape[1])
    for row in np.flatnonzero((np.sort(order, 1) != units).any(1)):
        order[row] = linear_sum_assignment(similarity[row], maximize=True)[1]
    return order


def _unit_similarity(weights: dict[str, Tensor], reference: dict[str, Tensor], axis: Axis) -> Tensor:
    """Inner products of the units along one axis: [n, reference unit, unit]."""
    own, theirs = (each[axis.parameter].movedim(axis.dim + 1, 1) for each in (weights, reference))
    return _units(theirs, axis) @ _units(own, axis).transpose(1, 2)


def _units(x: Tensor, axis: Axis) -> Tensor:
    """What belongs to each unit along an axis: [n, blocks * size * repeat, ...] -> [n, size, features]."""
    size = x.shape[1] // axis.repeat // axis.blocks
    return x.reshape(len(x), axis.blocks, size, -1).transpose(1, 2).flatten(2)
