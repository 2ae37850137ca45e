"""Symmetries of base networks: reorder hidden units without changing the function; align checkpoints to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightspace.networks.architectures import Architecture, Axis, PermutationGroup


def groups_of(architecture: Architecture) -> tuple[PermutationGroup, ...]:
    """The permutation groups that the base network declares; none where it declares nothing."""
    declare = getattr(architecture.build(), "permutation_groups", None)
    return declare() if declare else ()


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
            shape = [len(entries)] + [1] * (weight.ndim - 1)
            shape[axis.dim + 1] = -1
            permuted[axis.parameter] = torch.take_along_dim(weight, entries.view(shape), dim=axis.dim + 1)
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
    assignment itself is solved checkpoint by checkpoint, on the CPU.

    Args:
        weights: {name: [n, *shape]}.
        reference: {name: [1, *shape]} for one common reference or {name: [n, *shape]} for one each.
        groups: the groups of the base network.
        sweeps: upper bound on the visits to each group.
    """
    aligned = dict(weights)
    count = len(next(iter(weights.values())))
    for _ in range(sweeps):
        moved = False
        for position, group in enumerate(groups):
            similarity = cast(Tensor, sum(_unit_similarity(aligned, reference, axis) for axis in group.axes))
            similarity = similarity.expand(count, -1, -1).double().cpu().numpy()
            order = np.stack([linear_sum_assignment(matrix, maximize=True)[1] for matrix in similarity])
            if (order != np.arange(group.size)).any():
                moved = True
                permutation = torch.from_numpy(order).to(next(iter(aligned.values())).device)
                aligned = permute(aligned, groups[position : position + 1], [permutation])
        if not moved:
            break
    return aligned


def _unit_similarity(weights: dict[str, Tensor], reference: dict[str, Tensor], axis: Axis) -> Tensor:
    """Inner products of the units along one axis: [n, reference unit, unit]."""

    def units(weight: Tensor) -> Tensor:
        moved = weight.movedim(axis.dim + 1, 1)  # [n, size * repeat, ...]
        return moved.reshape(len(moved), moved.shape[1] // axis.repeat, -1)  # [n, size, features]

    return units(reference[axis.parameter]) @ units(weights[axis.parameter]).transpose(1, 2)
