"""Directions in token space and coordinates along them, where errors are measured in a metric.

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


def nearest(left: Tensor, directions: Tensor, metric: Tensor) -> Tensor:
    """The coordinates a at which (left - a directions) is least in a metric, zero along directions that are zero.

    Args:
        left: [..., D].
        directions: [..., R, D].
        metric: quadratic forms [..., D, D].

    Returns:
        [..., R]
    """
    weighted = directions @ metric  # [..., R, D]
    unused = torch.diag_embed((directions.square().sum(-1) == 0).to(metric))
    inner = weighted @ directions.mT + unused  # [..., R, R]
    level = inner.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    inner = inner + 1e-5 * level * torch.eye(inner.shape[-1], device=inner.device)  # of single precision
    return torch.linalg.solve(inner, weighted @ left[..., None])[..., 0]
