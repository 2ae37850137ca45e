"""Details: what a sketch leaves out of a checkpoint, along the directions that the checkpoint's own outputs see.

A few latent values per token make a sketch of a network, and the sketch tells which of its weights matter: how much its
outputs on some queries move along every direction of every token. The remaining latent values are coordinates along the
directions where that is most. Encoder and decoder both see the sketch, so that no value has to say which they are.

Legend: n checkpoints, T tokens, D token size (and directions per token), Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from weightspace.hyperrep.directions import by_size, covariance, isotropic, nearest, principal_directions

QUERIES = 128
"""Inputs on which a sketch shows which of its weights matter."""
OWN, ALIKE = 0.9, 0.02
"""Of the spread expected of a token: the share seen at its own position, not at all of its layer; and how much is added
that is alike along all directions, relative to it."""


class Details(nn.Module):
    """Coordinates of what sketches leave out, of which each checkpoint has the T x `per_token` that matter most."""

    mask: Tensor
    """[T, D]"""
    basis: Tensor
    """[T, D, D]: orthonormal directions of each token, in columns, the most important on average first."""
    spread: Tensor
    """[T, D]: variance along them of what sketches leave out."""
    queries: Tensor
    """[Q, ...]"""
    real: Tensor
    """[]: whether the networks' outputs are values, not logits of classes."""

    def __init__(self, mask: Tensor, per_token: int, input_shape: Sequence[int]) -> None:
        """Build it for tokens with a mask [T, D] of networks that take inputs of a shape."""
        super().__init__()
        tokens, size = mask.shape
        self.per_token = per_token
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("basis", torch.zeros(tokens, size, size))
        self.register_buffer("spread", torch.zeros(tokens, size))
        self.register_buffer("queries", torch.zeros(QUERIES, *input_shape))
        self.register_buffer("real", torch.tensor(False))

    @torch.no_grad()
    def fit(self, left: Tensor, layers: Tensor, metric: Tensor, queries: Tensor, real: bool) -> None:
        """Find the directions that matter on average.

        Args:
            left: what sketches leave out of training tokens [n, T, D].
            layers: the layer of each token [T].
            metric: what errors cost on average, a quadratic form per position [T, D, D].
            queries: inputs on which sketches show which of their weights matter [Q, ...].
            real: whether the networks' outputs are values.
        """
        own = covariance(left)
        layer = torch.empty_like(own)
        for which in layers.unique():
            layer[layers == which] = own[layers == which].mean(0)
        expected = OWN * own + (1 - OWN) * layer * self.mask[:, None] * self.mask[:, :, None]
        expected = expected + ALIKE * isotropic(own, self.mask)
        basis = principal_directions(expected, left.shape[2], metric)
        self.queries.copy_(queries)
        self.real.fill_(real)
        self.basis.copy_(basis)
        self.spread.copy_(torch.einsum("tdr,tde,ter->tr", basis.double(), expected, basis.double()))

    def kept(self, matrices: Tensor) -> Tensor:
        """Which directions the details of sketches with some Gauss-Newton matrices [n, T, D, D] lie along: [n, T, D].

        Leaving out a direction b of spread s costs s b^T M b / 2; the T x `per_token` directions where that is most, of
        all tokens, are kept.
        """
        worth = matrices.new_zeros(matrices.shape[:3])  # [n, T, D]
        for tokens, size in by_size(self.mask):
            along = self.basis[tokens, :size, :size].mT
            worth[:, tokens, :size] = ((along @ matrices[:, tokens, :size, :size]) * along).sum(-1)
        worth *= self.spread
        count = len(self.basis) * self.per_token
        chosen = worth.flatten(1).topk(min(count, worth.shape[1] * worth.shape[2])).indices
        return torch.zeros_like(worth, dtype=torch.bool).flatten(1).scatter(1, chosen, True).view_as(worth)

    def directions(self, kept: Tensor) -> Tensor:
        """What one unit of each coordinate adds to its token, zero along directions that are not kept: [n, T, D, D]."""
        return self.basis.mT * kept[..., None]

    def code(self, left: Tensor, matrices: Tensor, kept: Tensor) -> Tensor:
        """Coordinates [n, T, D] of what is left out [n, T, D]: those of least cost along the kept directions."""
        return nearest(left, self.directions(kept), matrices, self.mask)

    def forward(self, coordinates: Tensor) -> Tensor:
        """What coordinates [n, T, D] add to a sketch: [n, T, D]."""
        return torch.einsum("ntr,tdr->ntd", coordinates, self.basis)
