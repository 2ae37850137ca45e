"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from weightspace.runs import UserError

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


def activation_named(name: str) -> Activation:
    """The activation function called `name`.

    Raises:
        UserError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; the activations are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]
