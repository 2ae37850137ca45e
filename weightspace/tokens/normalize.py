"""Per-layer normalization of tokens, fitted on training checkpoints and invertible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Normalizer:
    """x -> (x - mean) / std on real entries; padding stays zero."""

    mean: Tensor
    """[T, 1], the same for all tokens of a layer."""
    std: Tensor
    """[T, 1], positive."""
    mask: Tensor
    """[T, D] bool."""

    def normalize(self, x: Tensor) -> Tensor:
        """Normalized tokens [n, T, D]."""
        return (x - self.mean) / self.std * self.mask

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return (x * self.std + self.mean) * self.mask

    def to(self, device: torch.device | str) -> Normalizer:
        """The same normalizer on another device."""
        return Normalizer(self.mean.to(device), self.std.to(device), self.mask.to(device))


Fit = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The real entries of one layer [n, N] -> what is subtracted and what it is divided by, scalars."""


def per_layer(fit: Fit) -> Callable[[Tokenizer, Tensor], Normalizer]:
    """A normalizer whose offset and scale are fitted to each layer of tokens [n, T, D]; a scale of 0 becomes 1."""

    def normalizer(tokenizer: Tokenizer, x: Tensor) -> Normalizer:
        layer = tokenizer.positions[:, 1]
        mean, std = torch.zeros(len(layer), 1), torch.ones(len(layer), 1)
        for number in range(len(tokenizer.layers)):
            rows = layer == number
            offset, scale = fit(x[:, rows][:, tokenizer.mask[rows]].double())
            mean[rows] = offset.float()
            std[rows] = scale.float() if scale.float() > 0 else torch.ones(())
        return Normalizer(mean, std, tokenizer.mask)

    return normalizer


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean(), values.std(correction=0)


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    low, high = values.min(), values.max()
    return (low + high) / 2, (high - low) / 2


def _norm(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_zeros(()), values.norm(dim=1).mean()


standardize = per_layer(_standard)
"""To mean 0 and standard deviation 1 per layer over the checkpoints it was fitted on."""
min_max = per_layer(_range)
"""To -1 ... 1 per layer."""
l2 = per_layer(_norm)
"""To a mean L2 norm of 1 of a checkpoint's layer."""


def none(tokenizer: Tokenizer, x: Tensor) -> Normalizer:
    """Raw weights, as the published method uses them."""
    return Normalizer(torch.zeros(tokenizer.count, 1), torch.ones(tokenizer.count, 1), tokenizer.mask)


NORMALIZERS = {"standardize": standardize, "min-max": min_max, "l2": l2, "none": none}
