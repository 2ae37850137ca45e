"""Directions in token space that matter most where errors are measured in a metric.

Legend: n checkpoints, T tokens, D token size, R directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def covariance(rows: Tensor) -> Tensor:
    """Mean outer products per position of centered tokens [n, T, D], in double precision: [T, D, D]."""
    each = rows.transpose(0, 1).double()
    return each.transpose(1, 2) @ each / len(rows)


def isotropic(covariances: Tensor, mask: Tensor) -> Tensor:
    """The covariances [T, D, D] of the same traces that are alike along all entries of a mask [T, D]."""
    level = covariances.diagonal(dim1=1, dim2=2).sum(1) / mask.sum(1)
    return torch.diag_embed(level[:, None] * mask)


def principal_directions(covariances: Tensor, count: int, metric: Tensor | None = None) -> Tensor:
    """Orthonormal directions per position along which leaving tokens out would cost most, the dearest first.

    Zero-padded where there are fewer entries than directions.

    Args:
        covariances: of the tokens [T, D, D]; positive definite, but for padding, where there is a metric.
        count: how many directions.
        metric: quadratic form per position in which errors are measured [T, D, D] (default: their square).

    Returns:
        [T, D, count], of the metric's type or else in single precision. The first r of them span the r-dimensional
        space outside of which the tokens cost least.
    """
    if metric is None:
        directions = torch.linalg.eigh(covariances).eigenvectors.flip(-1)[..., :count]
    else:
        padding = covariances.diagonal(dim1=1, dim2=2) == 0
        root = torch.linalg.cholesky(covariances + torch.diag_embed(padding.to(covariances)))  # [T, D, D]
        costs, vectors = torch.linalg.eigh(root.transpose(1, 2) @ metric.to(root) @ root)
        spans = (root @ vectors).flip(-1)[..., :count]  # orthogonal in the metric
        real = costs.flip(-1)[..., None, :count] > 1e-12 * costs.amax(-1)[:, None, None]
        directions = torch.linalg.qr(spans).Q * real * ~padding[:, :, None]
    missing = max(count - directions.shape[-1], 0)
    return F.pad(directions, (0, missing)).to(torch.float32 if metric is None else metric.dtype)


def projection_onto(basis: Tensor, metric: Tensor | None) -> Tensor:
    """The map to the coordinates in a basis [T, D, R] at which the error is least in a metric [T, D, D]: [T, D, R]."""
    if metric is None:
        return basis
    weighted = metric.double() @ basis.double()  # [T, D, R]
    inner = basis.double().transpose(1, 2) @ weighted
    unused = torch.diag_embed((basis.square().sum(1) == 0).double())
    return torch.linalg.solve(inner + unused, weighted.transpose(1, 2)).transpose(1, 2).to(basis)


def by_size(mask: Tensor) -> list[tuple[Tensor, int]]:
    """The tokens of a mask [T, D] in groups of equally many entries, which are the first: [(indices, entries)].

    Work on the matrices of tokens grows with the cube of their size, so that padding would cost most of it.
    """
    sizes = mask.sum(1).long()
    return [((sizes == size).nonzero()[:, 0], size) for size in sizes.unique().tolist()]
