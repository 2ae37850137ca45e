"""Details: what a sketch leaves out of a checkpoint, along the directions that the checkpoint's own outputs see.

A few latent values per token make a sketch of a network, and the sketch tells which of its weights matter: how much its
outputs on some queries move along every direction of every token. The remaining latent values are coordinates along the
directions where that is most. Encoder and decoder both see the sketch, so that no value has to say which they are. A
first lot of them makes a better sketch, which chooses the directions of the others.

Legend: n checkpoints, T tokens, D token size, R values per token at most, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightspace.hyperrep.directions import by_size, covariance, isotropic

LOTS = {1: (1.0,), 2: (0.25, 0.75)}
"""Shares of the values: those whose directions the sketch chooses, and those for which it knows the former."""
SMALLEST = 1e-6
"""Deviation of what is never left out."""
OWN, ALIKE = 0.9, 0.02
"""Of the spread expected of a token: the share seen at its own position, not at all of its layer; and how much is added
that is alike along all directions, relative to it."""


class Details(nn.Module):
    """What sketches leave out, of which each checkpoint has T x `per_token` values: those that matter most to it.

    Along the axes of a token what is left out is uncorrelated, and its deviation is known. They are the same for all
    checkpoints; the `Span` in which it is told differs.
    """

    mask: Tensor
    """[T, D]"""
    axes: Tensor
    """[T, D, D]: orthonormal axes of each token, in columns"""
    deviation: Tensor
    """[T, D]: how much sketches leave out along them"""
    queries: Tensor
    """[Q, ...]"""
    real: Tensor
    """[]: whether the networks' outputs are values, not logits of classes"""

    def __init__(self, mask: Tensor, per_token: int, lots: int, queries: int, input_shape: Sequence[int]) -> None:
        """Build it for tokens with a mask [T, D] of networks that take inputs of a shape."""
        super().__init__()
        tokens, size = mask.shape
        total = min(per_token * tokens, int(mask.sum()))
        ends = [max(round(share * total), 1) for share in accumulate(LOTS[lots if total > 1 else 1])]
        self.counts = [end - start for start, end in pairwise([0, *ends])]
        """how many values of a checkpoint each lot has"""
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("axes", torch.zeros(tokens, size, size))
        self.register_buffer("deviation", torch.zeros(tokens, size))
        self.register_buffer("queries", torch.zeros(queries, *input_shape))
        self.register_buffer("real", torch.tensor(False))

    @torch.no_grad()
    def fit(self, left: Tensor, layers: Tensor, queries: Tensor, real: bool) -> None:
        """Find the axes, and how much is left out along them.

        Args:
            left: what sketches leave out of training tokens [n, T, D].
            layers: the layer of each token [T].
            queries: inputs on which sketches show which of their weights matter [Q, ...].
            real: whether the networks' outputs are values.
        """
        own = covariance(left)
        layer = torch.empty_like(own)
        for which in layers.unique():
            layer[layers == which] = own[layers == which].mean(0)
        expected = OWN * own + (1 - OWN) * layer * self.mask[:, None] * self.mask[:, :, None]
        expected = expected + ALIKE * isotropic(own, self.mask)
        for tokens, size in by_size(self.mask):
            variance, axes = torch.linalg.eigh(expected[tokens, :size, :size])
            self.axes[tokens, :size, :size] = axes.flip(-1).to(self.axes)
            self.deviation[tokens, :size] = variance.flip(-1).clamp(min=SMALLEST**2).sqrt().to(self.deviation)
        self.queries.copy_(queries)
        self.real.fill_(real)

    def along_axes(self, left: Tensor) -> Tensor:
        """What is left out of tokens [n, T, D], given along the axes."""
        return torch.einsum("ntd,tde->nte", left, self.axes)

    def tokens(self, left: Tensor) -> Tensor:
        """What is given along the axes [n, T, D], as part of tokens."""
        return torch.einsum("nte,tde->ntd", left, self.axes)

    def span(self, matrices: Tensor, count: int, known: Span | None = None) -> Span:
        """Where another lot of `count` values lies, of networks with some Gauss-Newton matrices; with the lots before.

        In units of the deviation S along the axes, leaving out a direction v costs v^T A v / 2 on average, with
        A = S axes^T M axes S. Of what the known directions leave open, the eigenvectors of A whose eigenvalues are
        largest, among all tokens, are taken.

        Args:
            matrices: [n, T, D, D].
            count: how many values of each checkpoint.
            known: the lots before.
        """
        found, worth = [], torch.full_like(matrices[..., 0], -torch.inf)  # [n, T, D]
        for number, (tokens, size) in enumerate(by_size(self.mask)):
            scaled = self.axes[tokens, :size, :size] * self.deviation[tokens, None, :size]
            cost = scaled.mT @ matrices[:, tokens, :size, :size] @ scaled
            broken = ~cost.isfinite().flatten(2).all(2)  # of a network that is
            cost = torch.where(broken[..., None, None], torch.eye(size, device=cost.device), cost)
            if known is not None:
                taken = known.groups[number].rows.mT @ known.groups[number].rows
                left, level = torch.eye(size, device=cost.device) - taken, cost.diagonal(dim1=-2, dim2=-1).mean(-1)
                level = torch.where(level > 0, level, 1)[..., None, None]
                cost = left @ cost @ left - level * taken  # taken directions come last
            costs, vectors = torch.linalg.eigh(cost)
            worth[:, tokens, :size] = costs.flip(-1)
            found.append((tokens, vectors.flip(-1).mT))  # [n, t, d, d], a direction in each row
        chosen = worth.flatten(1).topk(count).indices
        kept = torch.zeros_like(worth, dtype=torch.bool).flatten(1).scatter(1, chosen, True).view_as(worth)
        lot = torch.where(kept, 1 if known is None else int(known.lot.max()) + 1, 0)
        return Span(self, [Group.of(tokens, rows, lot[:, tokens]) for tokens, rows in found]).beside(known)


@dataclass(frozen=True)
class Group:
    """Directions of t tokens of d entries."""

    tokens: Tensor
    """[t]"""
    rows: Tensor
    """[n, t, r, d]: a direction in each row, zero where there is none; the directions of a token come first"""
    lot: Tensor
    """[n, t, r]: to which lot each belongs, from 1 on; 0 where there is none"""

    @staticmethod
    def of(tokens: Tensor, rows: Tensor, lot: Tensor) -> Group:
        """The directions of which the lot is not 0, in their order."""
        order = (lot > 0).byte().argsort(dim=2, descending=True, stable=True)
        order = order[..., : int((lot > 0).sum(2).max())]
        lot = torch.take_along_dim(lot, order, 2)
        rows = torch.take_along_dim(rows, order[..., None], 2) * (lot > 0)[..., None]
        largest = torch.take_along_dim(rows, rows.abs().argmax(-1, keepdim=True), -1)
        return Group(tokens, torch.where(largest < 0, -rows, rows), lot)  # an eigenvector has no sign of its own


@dataclass(frozen=True)
class Span:
    """The directions along which the details of n checkpoints lie, orthonormal in units of the deviation."""

    details: Details
    groups: list[Group]

    @staticmethod
    def joined(spans: Sequence[Span]) -> Span:
        """Those of several parts of the checkpoints together."""
        groups = []
        for same in zip(*(span.groups for span in spans), strict=True):
            most = max(group.rows.shape[2] for group in same)
            rows = [F.pad(group.rows, (0, 0, 0, most - group.rows.shape[2])) for group in same]
            lots = [F.pad(group.lot, (0, most - group.lot.shape[2])) for group in same]
            groups.append(Group(same[0].tokens, torch.cat(rows), torch.cat(lots)))
        return Span(spans[0].details, groups)

    def beside(self, other: Span | None) -> Span:
        """Its directions after those of another span of the same checkpoints."""
        if other is None:
            return self
        pairs = zip(other.groups, self.groups, strict=True)
        both = [Group.of(a.tokens, torch.cat([a.rows, b.rows], 2), torch.cat([a.lot, b.lot], 2)) for a, b in pairs]
        return Span(self.details, both)

    def of(self, some: slice) -> Span:
        """That of some of the checkpoints."""
        return Span(self.details, [Group(group.tokens, group.rows[some], group.lot[some]) for group in self.groups])

    @cached_property
    def lot(self) -> Tensor:
        """To which lot each of the R values of every token belongs, from 1 on; 0 where there is none: [n, T, R]."""
        widest = max(group.lot.shape[2] for group in self.groups)
        found = self.groups[0].lot.new_zeros(len(self.groups[0].lot), len(self.details.mask), widest)
        for group in self.groups:
            found[:, group.tokens, : group.lot.shape[2]] = group.lot
        return found

    @property
    def lots(self) -> list[Tensor]:
        """Which values belong to each lot, the latest last: [n, T, R]."""
        return [self.lot == number for number in range(1, int(self.lot.max()) + 1)]

    def values(self, left: Tensor) -> Tensor:
        """The values [n, T, R] of what is left out, given along the axes [n, T, D]: those of least cost."""
        found = left.new_zeros(self.lot.shape)
        for group in self.groups:
            unit = left[:, group.tokens, : group.rows.shape[3]] / self._deviation(group)
            found[:, group.tokens, : group.rows.shape[2]] = (group.rows @ unit[..., None])[..., 0]
        return found

    def told(self, values: Tensor) -> Tensor:
        """What values [n, T, R] tell, along the axes: [n, T, D]."""
        found = values.new_zeros(*values.shape[:2], self.details.mask.shape[1])
        for group in self.groups:
            unit = (values[:, group.tokens, None, : group.rows.shape[2]] @ group.rows)[..., 0, :]
            found[:, group.tokens, : group.rows.shape[3]] = unit * self._deviation(group)
        return found

    def checksum(self) -> Tensor:
        """A number that tells the directions of each checkpoint from others: [n]."""
        total = torch.zeros(len(self.lot), dtype=torch.double, device=self.lot.device)
        for group in self.groups:
            place = torch.arange(1, group.rows[0, 0].numel() + 1, device=self.lot.device).view_as(group.rows[0, 0])
            pattern = (place * (group.tokens[:, None, None] + 1).double()).cos()  # [t, r, d]
            total += (group.rows * pattern).sum((1, 2, 3))
        return total

    def _deviation(self, group: Group) -> Tensor:
        """[t, d]"""
        return self.details.deviation[group.tokens, : group.rows.shape[3]]
