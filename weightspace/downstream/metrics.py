"""What counts as good (DESIGN section 7): pure functions of outputs and weights, and bootstrap intervals over members.

Legend: n checkpoints, Q queries, C classes, m members, k sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightspace.networks.behavior import Outputs

Array = np.ndarray[Any, Any]
RESAMPLES = 1000
EXACT = "donot_use_mm_for_euclid_dist"
"""How distances are computed where equal networks must have distance zero."""


def pairwise_agreement(predictions: Tensor, classes: int) -> Tensor:
    """Agreement (`networks.behavior`) of every pair: [n, Q], or values [n, Q, C] -> [n, n]."""
    if predictions.is_floating_point():
        flat = predictions.flatten(1)
        return 1 - torch.cdist(flat, flat, compute_mode=EXACT).square() / flat.shape[1]
    chosen = torch.nn.functional.one_hot(predictions, classes).flatten(1).float()
    return chosen @ chosen.T / predictions.shape[1]


def floor(predictions: Tensor, classes: int) -> Tensor:
    """Mean agreement of each network with the others, one row per member: [n, Q] -> [n]; NaN for a single row."""
    pairs = pairwise_agreement(predictions, classes)
    return (pairs.sum(1) - pairs.diagonal()) / (len(pairs) - 1)


def identified(probabilities_hat: Tensor, probabilities: Tensor) -> Tensor:
    """Whether a reconstruction's own original is the nearest of all in probability space: [n, Q, C] twice -> [n]."""
    distance = torch.cdist(probabilities_hat.flatten(1), probabilities.flatten(1), compute_mode=EXACT)
    return distance.argmin(1) == torch.arange(len(distance), device=distance.device)


def agreement_on_errors(predictions_hat: Tensor, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(images that the original gets wrong and the reconstruction predicts alike, images it gets wrong), [n] each.

    Values are neither right nor wrong: (0, 0).
    """
    if predictions.is_floating_point():
        none = torch.zeros(len(predictions), device=predictions.device)
        return none, none
    wrong = predictions != labels
    return (wrong & (predictions_hat == predictions)).sum(1), wrong.sum(1)


def pair_mean(pairs: Array, weights: Array) -> Array:
    """Mean over pairs of different networks, network i counted weights[..., i] times.

    Args:
        pairs: a symmetric value per pair [n, n]; the diagonal is ignored.
        weights: [..., n].
    """
    different = 1 - np.eye(len(pairs))
    total = np.einsum("...i,ij,...j->...", weights, pairs * different, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.einsum("...i,ij,...j->...", weights, different, weights)


def nearest_distance(flat: Tensor, references: Tensor) -> Tensor:
    """L2 distance of each network [n, P] to the nearest reference [r, P] -> [n]."""
    return torch.cdist(flat, references, compute_mode=EXACT).min(1).values


def typical_nearest_distance(flat: Tensor, members: Array) -> float:
    """Median over checkpoints of the distance to the nearest checkpoint of another member [n, P] -> scalar."""
    distance = torch.cdist(flat, flat)
    same = torch.from_numpy(members[:, None] == members[None]).to(distance.device)
    return float(distance.masked_fill(same, torch.inf).min(1).values.median())


# Every summary below is a function of sums over members, so that the bootstrap is one matrix product.

Statistic = Callable[[Array], Array]
"""Sums [..., k] -> value [...]."""


def ratio(sums: Array) -> Array:
    """(sum of values, count) -> mean."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def skill(sums: Array) -> Array:
    """(sum of agreements, sum of floors, count) -> (A - floor) / (1 - floor)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 0] - sums[..., 1]) / (sums[..., 2] - sums[..., 1])


def one_minus_ratio(sums: Array) -> Array:
    """(sum of squared errors, sum of squared deviations) -> R^2."""
    return 1 - ratio(sums)


def moments(x: Array, y: Array) -> Array:
    """The sums that `slope` and `pearson` need, per row: [n] twice -> [n, 6]."""
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)


def slope(sums: Array) -> Array:
    """Slope of the least-squares line of y on x, from the sums of `moments`."""
    n, x, y, xx, xy, _ = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / (n * xx - x * x)


def pearson(sums: Array) -> Array:
    """Pearson correlation of x and y, from the sums of `moments`."""
    n, x, y, xx, xy, yy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))


def summarize(
    stage: str,
    representation: str,
    split: str,
    metric: str,
    sums: Array,
    members: Array,
    statistic: Statistic = ratio,
) -> dict[str, Any]:
    """One tidy record: the statistic over all rows with its 95 % bootstrap interval over members.

    Args:
        stage, representation, split, metric: the record's keys.
        sums: what each row adds to the statistic's sums [n, k].
        members: the member each row belongs to [n]; rows of one member are drawn together.
        statistic: sums [..., k] -> value [...].
    """
    _, index = np.unique(members, return_inverse=True)
    by_member = np.zeros((index.max() + 1, sums.shape[1]))
    np.add.at(by_member, index, sums.astype(float))
    count = len(by_member)
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drawn = statistic(weights @ by_member)  # [resamples]
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    value = float(statistic(by_member.sum(0)))
    return record(stage, representation, split, metric, value, float(low), float(high), count)


def summarize_pairs(
    stage: str, representation: str, split: str, metric: str, pairs: Array, scale: float
) -> dict[str, Any]:
    """One tidy record: the mean over pairs [n, n] divided by a scale, with its bootstrap interval over networks."""
    count = len(pairs)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    means = pair_mean(pairs, drawn.astype(float)) / scale
    low, high = np.nanquantile(means, [0.025, 0.975])
    mean = float(pair_mean(pairs, np.ones(count)) / scale)
    return record(stage, representation, split, metric, mean, float(low), float(high), count)


def ensemble(outputs: Outputs) -> Outputs:
    """The outputs of the ensemble of n networks, as of one network: the mean of their probabilities, or values."""
    mean = outputs.probabilities.mean(0, keepdim=True)  # [1, Q, C]
    return replace(outputs, logits=mean if outputs.real else mean.log())


def summarize_ensemble(stage: str, representation: str, split: str, outputs: Outputs) -> dict[str, Any]:
    """One tidy record: the accuracy of the ensemble of n networks with its bootstrap interval over networks."""
    flat, count = outputs.probabilities.flatten(1), len(outputs.logits)  # [n, QC]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    accuracies = []
    for weights in torch.from_numpy(drawn / count).to(flat).split(20):  # the mean of 20 ensembles at a time
        mean = (weights @ flat).unflatten(1, outputs.logits.shape[1:])
        accuracies.append(replace(outputs, logits=mean).accuracy)
    low, high = np.quantile(torch.cat(accuracies).double().cpu().numpy(), [0.025, 0.975])
    whole = float(ensemble(outputs).accuracy)
    return record(stage, representation, split, "ensemble accuracy", whole, float(low), float(high), count)


def mean_of(values: Array) -> Array:
    """The sums of a plain mean, per row: [n] -> [n, 2]."""
    return np.stack([values, np.ones_like(values)], axis=1)


def record(
    stage: str,
    representation: str,
    split: str,
    metric: str,
    mean: float | None,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    """A tidy record; low and high are None where no interval is defined."""
    return {
        "stage": stage,
        "representation": representation,
        "split": split,
        "metric": metric,
        "mean": mean,
        "low": low,
        "high": high,
        "n": n,
    }
