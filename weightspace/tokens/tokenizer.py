"""Weights as sequences: `tokenize` and `detokenize`, exact inverses.

Every module that holds weights is a layer; its rows are its output units (`networks.layers`): row u of a linear or
convolutional layer is [weight[u].flatten(), bias[u]]. Rows are zero-padded to a multiple of the token size and cut.
Both directions are one gather over flat weights, so they are batched and bit-exact for every base network.

Legend: n checkpoints, P weights of one, T tokens, D token size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import flatten, unflatten
from weightspace.networks.layers import rows_of, variances_of
from weightspace.runs import UserError


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of n checkpoints of one base network."""

    x: Tensor
    """[n, T, D]; zero where the mask is False."""
    mask: Tensor
    """[T, D] bool: which entries are weights."""
    positions: Tensor
    """[T, 3] int64: (index of the token, index of its layer, index of its unit in the layer)."""


class Tokenizer:
    """How the weights of one base network are cut into tokens."""

    def __init__(self, architecture: Architecture, token_size: int | None = None) -> None:
        """Lay out the tokens; the token size defaults to the longest row.

        Raises:
            UserError: a layer whose rows are not known, or a token size below 1.
        """
        self.architecture = architecture
        network = architecture.build()
        self.variances = [name for name in variances_of(network) if name in architecture.shapes]
        """Weights that are variances."""
        layers = dict(rows_of(network, architecture.shapes))
        self.layers = list(layers)
        joined = {name: [torch.cat(list(block.index.values()), 1) for block in own] for name, own in layers.items()}
        longest = max(rows.shape[1] for own in joined.values() for rows in own)
        self.token_size = longest if token_size is None else token_size
        if self.token_size < 1:
            raise UserError(f"token_size must be at least 1, given {token_size}")
        tokens, parts, positions, part = [], [], [], 0
        for number, (name, own) in enumerate(layers.items()):
            unit = 0
            for block, rows in zip(own, joined[name], strict=True):
                kind = [torch.full_like(each, i if block.apart else 0) for i, each in enumerate(block.index.values())]
                tokens.append(self._cut(rows))
                parts.append(self._cut(torch.cat(kind, 1) + part))
                part += len(kind) if block.apart else 1
                units = torch.arange(unit, unit + len(rows)).repeat_interleave(len(tokens[-1]) // len(rows))
                positions.append(torch.stack([torch.full_like(units, number), units], 1))
                unit += len(rows)
        index = torch.cat(tokens)  # [T, D], position in the flat weights or -1
        self.mask = index >= 0
        self.index = index.clamp(min=0)
        self.parts = torch.cat(parts)
        """[T, D]: which entries are normalized together, layer by layer; -1 at padding."""
        self.positions = torch.cat([torch.arange(len(index))[:, None], torch.cat(positions)], 1)
        self.inverse = torch.empty(architecture.parameter_count, dtype=torch.long)  # [P], position in the tokens
        self.inverse[index[self.mask]] = torch.arange(index.numel()).view_as(index)[self.mask]

    def _cut(self, rows: Tensor) -> Tensor:
        """Rows [units, length], padded with -1 and cut into tokens [units * pieces, D]."""
        return F.pad(rows, (0, -rows.shape[1] % self.token_size), value=-1).view(-1, self.token_size)

    @cached_property
    def count(self) -> int:
        """Number of tokens T."""
        return len(self.index)

    def tokenize(self, weights: dict[str, Tensor]) -> TokenBatch:
        """Stacked weights {name: [n, *shape]} as tokens."""
        flat = flatten(weights)
        mask = self.mask.to(flat.device)
        x = torch.where(mask, flat[:, self.index.to(flat.device)], 0.0)
        return TokenBatch(x, mask, self.positions.to(flat.device))

    def detokenize(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens [n, T, D] as stacked weights {name: [n, *shape]}; padding is ignored."""
        return unflatten(self.architecture.shapes, tokens.flatten(1)[:, self.inverse.to(tokens.device)])
