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
    """[T, D], the same for all entries of a part: a layer, or one tensor of a normalization."""
    std: Tensor
    """[T, D], positive."""
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
"""The real entries of one part [n, N] -> what is subtracted and what it is divided by, scalars."""


def per_layer(fit: Fit) -> Callable[[Tokenizer, Tensor], Normalizer]:
    """A normalizer whose offset and scale are fitted to each part of tokens [n, T, D]; a scale of 0 becomes 1."""

    def normalizer(tokenizer: Tokenizer, x: Tensor) -> Normalizer:
        mean, std = torch.zeros(tokenizer.mask.shape), torch.ones(tokenizer.mask.shape)
        for part in range(int(tokenizer.parts.max()) + 1):
            own = tokenizer.parts == part
            offset, scale = fit(x[:, own].double())
            mean[own] = offset.float()
            std[own] = scale.float() if scale.float() > 0 else torch.ones(())
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
    shape = tokenizer.mask.shape
    return Normalizer(torch.zeros(shape), torch.ones(shape), tokenizer.mask)


NORMALIZERS = {"standardize": standardize, "min-max": min_max, "l2": l2, "none": none}
