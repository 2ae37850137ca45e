"""The spectrum of a zoo's weights: what networks still do when only some principal components are kept.

Legend: n checkpoints, P weights of one, k components, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints, unflatten


@dataclass(frozen=True)
class Spectrum:
    """Principal components of the flat weights of training checkpoints, largest first."""

    mean: Tensor
    """[P]"""
    directions: Tensor
    """[k, P], orthonormal rows."""
    variance: Tensor
    """[k], of the training checkpoints along each direction."""


def components(train: Checkpoints) -> Spectrum:
    """All components of training checkpoints: k = min(n - 1, P)."""
    flat = train.flat()
    mean = flat.mean(0)
    _, scale, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    k = min(len(flat) - 1, flat.shape[1])
    return Spectrum(mean, directions[:k], scale[:k].square() / max(len(flat) - 1, 1))


def kept(checkpoints: Checkpoints, spectrum: Spectrum, chosen: Tensor) -> Checkpoints:
    """Every network reduced to the chosen components [any number, as indices] around the mean of the zoo."""
    directions = spectrum.directions[chosen]
    flat = spectrum.mean + (checkpoints.flat() - spectrum.mean) @ directions.T @ directions
    return Checkpoints(checkpoints.architecture, unflatten(checkpoints.architecture, flat), checkpoints.frame)


def variance_along(checkpoints: Checkpoints, spectrum: Spectrum) -> Tensor:
    """Mean squared deviation from the zoo's mean along every component [k]: the spectrum of any set of networks."""
    return ((checkpoints.flat() - spectrum.mean) @ spectrum.directions.T).square().mean(0)


def spectrum_study(
    train: Checkpoints,
    checkpoints: Checkpoints,
    images: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    generator: torch.Generator,
) -> pd.DataFrame:
    """What checkpoints do when the top, the bottom or randomly mixed components are kept (arXiv 2503.17138).

    Args:
        train: whose components are taken.
        checkpoints: n networks that are reduced.
        images: queries [Q, C, H, W].
        labels: [Q].
        counts: how many components are kept.
        generator: chooses the mixed components.

    Returns:
        A row per checkpoint, choice ("top", "bottom", "mixed") and count: member, epoch, which, count, share (of the
        training variance that is kept), test_acc, agreement (with the whole network).
    """
    spectrum = components(train)
    k = len(spectrum.directions)
    whole = behavior.outputs(checkpoints, images, labels).predictions
    shuffled = torch.randperm(k, generator=generator)
    orders = {"top": torch.arange(k), "bottom": torch.arange(k).flip(0), "mixed": shuffled}
    frames = []
    for which, order in orders.items():
        for count in counts:
            outputs = behavior.outputs(kept(checkpoints, spectrum, order[:count]), images, labels)
            frames.append(
                checkpoints.frame[["member", "epoch"]].assign(
                    which=which,
                    count=count,
                    share=float(spectrum.variance[order[:count]].sum() / spectrum.variance.sum()),
                    test_acc=outputs.accuracy.double().cpu().numpy(),
                    agreement=(outputs.predictions == whole).double().mean(1).cpu().numpy(),
                )
            )
    return pd.concat(frames, ignore_index=True)
