"""L_S, L_C, L_B, L_cycle and their weighted sum: pure functions.

Legend: B checkpoints, T tokens, D token size, Q queries, C classes, H contrastive features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.config import LossConfig, Schedule


def structural(x_hat: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """L_S = sum(m (x_hat - x)^2) / sum(m) over tokens [B, T, D]; padding never counts."""
    return ((x_hat - x).square() * mask).sum() / (mask.sum() * len(x))


def contrastive(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent between two views' features [B, H] (Chen et al. 2020, arXiv 2002.05709, equation 1)."""
    features = F.normalize(torch.cat([first, second]), dim=1)  # [2B, H]
    similarity = features @ features.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(features), device=features.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def positive(first: Tensor, second: Tensor) -> Tensor:
    """One minus the cosine similarity of the two views' features [B, H]: contrast without other checkpoints."""
    return 1 - F.cosine_similarity(first, second, dim=1).mean()


def norm_penalty(z: Tensor) -> Tensor:
    """Mean squared latent value of embeddings [B, T, Z]."""
    return z.square().mean()


def variance_penalty(z: Tensor) -> Tensor:
    """What the deviation of each latent value over the batch [B, T, Z] lacks to 1 (VICReg, arXiv 2105.04906)."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def probabilities(logits_hat: Tensor, logits: Tensor) -> Tensor:
    """Squared error of softmax probabilities, summed over classes: the published distance. [B, Q, C] -> [B, Q]"""
    return (logits_hat.softmax(-1) - logits.softmax(-1)).square().sum(-1)


def logits_distance(logits_hat: Tensor, logits: Tensor) -> Tensor:
    """Squared error of logits, each network's logits centered over classes first, since softmax ignores their sum."""
    centered = logits - logits.mean(-1, keepdim=True)
    return (logits_hat - logits_hat.mean(-1, keepdim=True) - centered).square().mean(-1)


def kl(logits_hat: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(original || reconstructed) at a temperature, times its square to keep gradients comparable. -> [B, Q]"""
    target = (logits / temperature).log_softmax(-1)
    found = (logits_hat / temperature).log_softmax(-1)
    return (target.exp() * (target - found)).sum(-1) * temperature**2


def cross_entropy(logits_hat: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the original's probabilities: KL plus a constant, so with the same gradients. -> [B, Q]"""
    target = (logits / temperature).softmax(-1)
    return -(target * (logits_hat / temperature).log_softmax(-1)).sum(-1) * temperature**2


def values(outputs_hat: Tensor, outputs: Tensor) -> Tensor:
    """Squared error of real-valued outputs. [B, Q, C] -> [B, Q]"""
    return (outputs_hat - outputs).square().mean(-1)


Distance = Callable[[Tensor, Tensor], Tensor]
"""(reconstructed logits, original logits) [B, Q, C] twice -> [B, Q]."""


def distance_of(config: LossConfig, real: bool = False) -> Distance:
    """The behavioral distance that a config names; of real-valued outputs it is always that of `values`."""
    if real:
        return values
    if config.distance in ("kl", "cross-entropy"):
        return partial(kl if config.distance == "kl" else cross_entropy, temperature=config.temperature)
    return probabilities if config.distance == "probabilities" else logits_distance


def behavioral(logits_hat: Tensor, logits: Tensor, distance: Distance) -> Tensor:
    """L_B: mean over checkpoints and queries of a distance between outputs [B, Q, C]."""
    return distance(logits_hat, logits).mean()


def cycle(z: Tensor, z_again: Tensor) -> Tensor:
    """Mean squared difference between an embedding and the embedding of its reconstruction."""
    return (z_again - z).square().mean()


def scheduled(weight: Schedule, share: float) -> float:
    """Value of a loss weight after this share of training (0 to 1).

    Piecewise linear through the points, constant outside; of two points at the same share the later one holds.
    """
    if isinstance(weight, int | float):
        return float(weight)
    points = list(weight)
    if share < points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if left <= share < right:
            return low + (high - low) * (share - left) / (right - left)
    return points[-1][1]
