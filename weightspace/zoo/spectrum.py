"""The spectrum of a zoo's weights: what networks still do when only some principal components are kept.

Legend: n checkpoints, P weights of one, k components, Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints, unflatten
from weightspace.runs import UserError

CHOICES = ("top", "bottom", "mixed")
"""Which components can be kept: those of most variance, those of least, or a random selection."""
NEGLIGIBLE = 1e-10
"""Components with less than this share of the first one's variance are rounding errors of the weights."""
COLUMNS = 8192
"""Weights per block of the Gram matrix, so that no copy of all weights in float64 is needed."""


@dataclass(frozen=True)
class Spectrum:
    """Principal components of the flat weights of training checkpoints, largest first."""

    mean: Tensor
    """[P]"""
    directions: Tensor
    """[k, P], orthonormal rows."""
    variance: Tensor
    """[k], of the training checkpoints along each direction."""

    def __len__(self) -> int:
        return len(self.variance)

    @property
    def share(self) -> Tensor:
        """Share of the variance of the training checkpoints along each direction [k]; sums to 1."""
        return self.variance / self.variance.sum()


def components(train: Checkpoints) -> Spectrum:
    """All principal components of training checkpoints: k is the rank of their centered weights, at most n - 1.

    From the eigenvectors of the Gram matrix [n, n] or the covariance [P, P] in float64, whichever is smaller.

    Raises:
        UserError: all checkpoints are equal (or there is only one), or some weights are not finite.
    """
    flat = train.flat()
    n, size = flat.shape
    finite = flat.isfinite().all(1)
    if not finite.all():
        raise UserError(
            f"{int((~finite).sum())} of {n} checkpoints have weights that are not finite, so they have no principal "
            "components; select checkpoints that did not diverge"
        )
    if not (flat != flat[:1]).any():
        raise UserError(f"principal components need checkpoints that differ; given {n} without a difference")
    mean = flat.double().mean(0)

    def blocks() -> Iterator[Tensor]:
        for part, middle in zip(flat.split(COLUMNS, dim=1), mean.split(COLUMNS), strict=True):
            yield part.double() - middle  # [n, COLUMNS]

    few = n <= size
    square = sum(part @ part.T for part in blocks()) if few else (flat - mean).T @ (flat - mean)
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(square))
    k = int((values > NEGLIGIBLE * values[0]).sum())
    values, vectors = values[:k], vectors[:, :k]
    if few:
        combined = (vectors / values.sqrt()).T  # [k, n]
        directions = torch.cat([(combined @ part).float() for part in blocks()], dim=1)
    else:
        directions = vectors.T.float()
    return Spectrum(mean.float(), directions, (values / (n - 1)).float())


def choose(spectrum: Spectrum, which: str, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count` components [count].

    Args:
        spectrum: of k components.
        which: one of CHOICES.
        count: from 1 to k.
        generator: draws the mixed ones; the others leave it as it is.

    Raises:
        UserError: another choice, or another count.
    """
    k = len(spectrum)
    if which not in CHOICES:
        raise UserError(f"unknown choice of components {which!r}; the choices are {', '.join(CHOICES)}")
    if not 1 <= count <= k:
        raise UserError(f"cannot keep {count} components of {k}; keep 1 to {k}")
    if which == "mixed":
        return torch.randperm(k, generator=generator)[:count]
    return torch.arange(count) if which == "top" else torch.arange(k - count, k)


def kept(checkpoints: Checkpoints, spectrum: Spectrum, chosen: Tensor) -> Checkpoints:
    """Every network reduced to the chosen components [any number, as indices] around the mean of the zoo.

    Raises:
        UserError: the checkpoints are of another network than the spectrum.
    """
    directions = spectrum.directions[chosen]
    flat = spectrum.mean + _deviations(checkpoints, spectrum) @ directions.T @ directions
    return Checkpoints(checkpoints.architecture, unflatten(checkpoints.architecture.shapes, flat), checkpoints.frame)


def variance_along(checkpoints: Checkpoints, spectrum: Spectrum) -> Tensor:
    """Mean squared deviation from the zoo's mean along every component [k]: the spectrum of any set of networks.

    Raises:
        UserError: the checkpoints are of another network than the spectrum.
    """
    return (_deviations(checkpoints, spectrum) @ spectrum.directions.T).square().mean(0)


def _deviations(checkpoints: Checkpoints, spectrum: Spectrum) -> Tensor:
    """Flat weights minus the zoo's mean [n, P]."""
    flat = checkpoints.flat()
    if flat.shape[1] != len(spectrum.mean):
        raise UserError(
            f"the spectrum is of networks with {len(spectrum.mean)} weights, but a {checkpoints.architecture.name} has "
            f"{flat.shape[1]}; take the components of a zoo of the same network"
        )
    return flat - spectrum.mean


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
        counts: how many components are kept; more than there are means all of them.
        generator: draws the mixed components, anew for every count.

    Returns:
        A row per checkpoint, choice ("top", "bottom", "mixed") and count: member, epoch, which, count, share (of the
        training variance that is kept), test_acc, agreement (with the whole network).

    Raises:
        UserError: a count below 1, or what `components` and `kept` raise.
    """
    spectrum = components(train)
    whole = behavior.outputs(checkpoints, images, labels).predictions
    frames = []
    for which in CHOICES:
        for count in sorted({min(count, len(spectrum)) for count in counts}):
            chosen = choose(spectrum, which, count, generator)
            outputs = behavior.outputs(kept(checkpoints, spectrum, chosen), images, labels)
            frames.append(
                checkpoints.frame[["member", "epoch"]].assign(
                    which=which,
                    count=count,
                    share=float(spectrum.share[chosen].sum()),
                    test_acc=outputs.accuracy.double().cpu().numpy(),
                    agreement=behavior.agreement(outputs.predictions, whole).double().cpu().numpy(),
                )
            )
    return pd.concat(frames, ignore_index=True)
