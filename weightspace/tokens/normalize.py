"""Per-layer standardization of tokens, fitted on training checkpoints and invertible."""

from __future__ import annotations

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
        """Tokens [n, T, D] with mean 0 and standard deviation 1 per layer over the checkpoints it was fitted on."""
        return (x - self.mean) / self.std * self.mask

    def denormalize(self, x: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        return (x * self.std + self.mean) * self.mask

    def to(self, device: torch.device | str) -> Normalizer:
        """The same normalizer on another device."""
        return Normalizer(self.mean.to(device), self.std.to(device), self.mask.to(device))


def standardize(tokenizer: Tokenizer, x: Tensor) -> Normalizer:
    """Fit mean and standard deviation per layer over the real entries of tokens [n, T, D]."""
    layer = tokenizer.positions[:, 1]
    mean, std = torch.zeros(len(layer), 1), torch.ones(len(layer), 1)
    for number in range(len(tokenizer.layers)):
        rows = layer == number
        values = x[:, rows][:, tokenizer.mask[rows]].double()
        mean[rows] = values.mean().float()
        spread = values.std(correction=0).float()
        std[rows] = spread if spread > 0 else torch.ones(())
    return Normalizer(mean, std, tokenizer.mask)


def none(tokenizer: Tokenizer, x: Tensor) -> Normalizer:
    """Raw weights, as the published method uses them."""
    return Normalizer(torch.zeros(tokenizer.count, 1), torch.ones(tokenizer.count, 1), tokenizer.mask)


NORMALIZERS = {"standardize": standardize, "none": none}
