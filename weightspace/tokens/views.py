"""Views: augmented copies of checkpoints, made on the fly for a whole batch; nothing is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from weightspace.networks.groups import PermutationGroup
from weightspace.networks.symmetry import permute, random_permutations


def permuted(
    weights: dict[str, Tensor], groups: tuple[PermutationGroup, ...], generator: torch.Generator
) -> dict[str, Tensor]:
    """Every checkpoint with the units of each group in a fresh random order; the function stays the same."""
    count = len(next(iter(weights.values())))
    device = next(iter(weights.values())).device
    permutations = random_permutations(groups, count, generator)
    return permute(weights, groups, [permutation.to(device) for permutation in permutations])


def noisy(x: Tensor, mask: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Normalized tokens [n, T, D] with Gaussian noise of standard deviation `scale` on the real entries."""
    return x + scale * torch.randn(x.shape, generator=generator).to(x) * mask


def scaled(x: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Normalized tokens [n, T, D], each entry times a Gaussian factor of mean 1 and standard deviation `scale`."""
    return x * (1 + scale * torch.randn(x.shape, generator=generator).to(x))


def erased(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Normalized tokens [n, T, D] with each token set to zero with probability `share`."""
    keep = torch.rand(x.shape[:2], generator=generator) >= share
    return x * keep[..., None].to(x)
