"""Weights as sequences: `tokenize` and `detokenize`, exact inverses.

Every leaf module that holds weights is a layer; its rows are its output units; row u is [weight[u].flatten(), bias[u]],
zero-padded to a multiple of the token size and cut. Both directions are one gather over flat weights, so they are
batched and bit-exact for every base network.

Legend: n checkpoints, P weights of one, T tokens, D token size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import flatten, unflatten
from weightspace.runs import UserError

ROW_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


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
            UserError: a layer of an unknown kind, or a token size below 1.
        """
        self.architecture = architecture
        self.layers, rows = _rows(architecture)
        self.token_size = max(len(row) for _, _, row in rows) if token_size is None else token_size
        if self.token_size < 1:
            raise UserError(f"token_size must be at least 1, given {token_size}")
        tokens, positions = [], []
        for layer, unit, row in rows:
            for start in range(0, len(row), self.token_size):
                piece = row[start : start + self.token_size]
                tokens.append(piece + [-1] * (self.token_size - len(piece)))
                positions.append((len(positions), layer, unit))
        index = torch.tensor(tokens)  # [T, D], position in the flat weights or -1
        self.mask = index >= 0
        self.index = index.clamp(min=0)
        self.positions = torch.tensor(positions)
        self.inverse = torch.empty(architecture.parameter_count, dtype=torch.long)  # [P], position in the tokens
        self.inverse[index[self.mask]] = torch.arange(index.numel()).view_as(index)[self.mask]

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
        return unflatten(self.architecture, tokens.flatten(1)[:, self.inverse.to(tokens.device)])

    def check_architecture(self, architecture: Architecture) -> None:
        """Raise a UserError unless checkpoints of this base network can be tokenized."""
        if architecture != self.architecture:
            raise UserError(
                f"the representation is of {self.architecture}, the checkpoints are of {architecture}; "
                "pretrain a representation on such a zoo"
            )


def _rows(architecture: Architecture) -> tuple[list[str], list[tuple[int, int, list[int]]]]:
    """Names of the layers, and (layer, unit, positions in the flat weights) of every row."""
    start, offset = {}, 0
    for name, shape in architecture.shapes.items():
        start[name] = offset
        offset += int(torch.Size(shape).numel())
    layers, rows = [], []
    for name, module in architecture.build().named_modules():
        own = [key for key, _ in module.named_parameters(recurse=False)]
        own += [key for key, _ in module.named_buffers(recurse=False)]
        if not own:
            continue
        if not isinstance(module, ROW_LAYERS):
            raise UserError(
                f"layer {name!r} of {architecture.name} is a {type(module).__name__}, whose rows are not known; known "
                f"are {', '.join(kind.__name__ for kind in ROW_LAYERS)}"
            )
        length = module.weight[0].numel()
        for unit in range(len(module.weight)):
            first = start[f"{name}.weight"] + unit * length
            row = list(range(first, first + length))
            rows.append((len(layers), unit, row + ([start[f"{name}.bias"] + unit] if module.bias is not None else [])))
        layers.append(name)
    return layers, rows
