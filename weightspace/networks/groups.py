"""Permutation groups: hidden units that can be reordered, and every axis of every weight that has to follow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of one parameter that a permutation group acts on."""

    parameter: str
    dim: int
    repeat: int = 1
    """Consecutive entries that belong to one unit, as after flattening a feature map."""
    blocks: int = 1
    """How often all units follow one another along the axis, as queries, keys and values do in attention."""


@dataclass(frozen=True)
class PermutationGroup:
    """Hidden units that can be reordered without changing the function, and every axis that has to follow."""

    size: int
    axes: tuple[Axis, ...]
