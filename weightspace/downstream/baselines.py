"""The names of the baselines in tables and figures, and PCA in weight space at the same number of latent values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.networks.checkpoints import Checkpoints, unflatten

PCA = "PCA"
ANCHORS = "anchors"
NOISE = "anchors + noise"
AVERAGES = "weight averages"
SCRATCH = "from scratch"
STATISTICS = "weight statistics"
RAW = "raw weights"
MAJORITY = "majority class"
RESERVED = (PCA, ANCHORS, NOISE, AVERAGES, SCRATCH, STATISTICS, RAW, MAJORITY)
"""Names that no representation can have."""


@dataclass(frozen=True)
class WeightPCA:
    """Principal components of flat weights."""

    mean: Tensor
    """[P]"""
    components: Tensor
    """[k, P], orthonormal rows."""

    def encode(self, flat: Tensor) -> Tensor:
        """[n, P] -> scores [n, k]."""
        return (flat - self.mean) @ self.components.T

    def decode(self, scores: Tensor) -> Tensor:
        """Scores [n, k] -> [n, P]."""
        return scores @ self.components + self.mean

    def reconstruct(self, checkpoints: Checkpoints) -> Checkpoints:
        """Checkpoint -> scores -> checkpoint."""
        flat = self.decode(self.encode(checkpoints.flat()))
        return Checkpoints(
            checkpoints.architecture, unflatten(checkpoints.architecture.shapes, flat), checkpoints.frame
        )


def fit_pca(flat: Tensor, values: int) -> WeightPCA:
    """The first `values` components of training checkpoints [n, P] (fewer where n - 1 or P is smaller)."""
    mean = flat.mean(0)
    components = torch.linalg.svd(flat - mean, full_matrices=False).Vh
    return WeightPCA(mean, components[: min(values, len(flat) - 1)])
