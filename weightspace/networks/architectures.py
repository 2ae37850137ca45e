"""Base networks. Each declares its permutation groups beside its layers; adding one is one class here."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightspace.runs import UserError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
}


@dataclass(frozen=True)
class Axis:
    """One axis of one parameter that a permutation group acts on."""

    parameter: str
    dim: int
    repeat: int = 1
    """Consecutive entries that belong to one unit, as after flattening a feature map."""


@dataclass(frozen=True)
class PermutationGroup:
    """Hidden units that can be reordered without changing the function, and every axis that has to follow."""

    size: int
    axes: tuple[Axis, ...]


def chain(network: nn.Module, *layers: str) -> tuple[PermutationGroup, ...]:
    """The groups of a sequential network: the output units of each layer are the input units of the next."""
    groups = []
    for name, after in pairwise(layers):
        size = network.get_parameter(f"{name}.weight").shape[0]
        inputs = network.get_parameter(f"{after}.weight").shape[1]
        axes = (Axis(f"{name}.weight", 0), Axis(f"{name}.bias", 0), Axis(f"{after}.weight", 1, inputs // size))
        groups.append(PermutationGroup(size, axes))
    return tuple(groups)


def activation_named(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function called `name`.

    Raises:
        UserError: there is no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"unknown activation {name!r}; the activations are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


class CNN8(nn.Module):
    """The network for 8x8 images: conv 8, conv 16 (k3, pad 1, max-pool 2), linear 20; 2,758 parameters at 1 channel."""

    def __init__(self, channels: int = 1, classes: int = 10, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc1 = nn.Linear(64, 20)
        self.fc2 = nn.Linear(20, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 8, 4, 4]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 16, 2, 2]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "conv1", "conv2", "fc1", "fc2")


class CNN3(nn.Module):
    """The published network for 32x32 images (arXiv 2503.17138): 10,853 parameters at 3 channels."""

    def __init__(self, channels: int = 3, classes: int = 10, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.conv3 = nn.Conv2d(32, 15, 3)
        self.fc1 = nn.Linear(60, 20)
        self.fc2 = nn.Linear(20, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 16, 15, 15]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 32, 6, 6]
        x = self.dropout(self.activation(F.max_pool2d(self.conv3(x), 2)))  # [B, 15, 2, 2]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "conv1", "conv2", "conv3", "fc1", "fc2")


class CNN(nn.Module):
    """The network of the field's older zoos (MNIST, Fashion-MNIST, USPS) for 28x28 images: 2,464 parameters, gray."""

    def __init__(self, channels: int = 1, classes: int = 10, activation: str = "tanh", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 5)
        self.conv2 = nn.Conv2d(8, 6, 5)
        self.conv3 = nn.Conv2d(6, 4, 2)
        self.fc1 = nn.Linear(36, 20)
        self.fc2 = nn.Linear(20, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, 28, 28)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 8, 12, 12]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 6, 4, 4]
        x = self.dropout(self.activation(self.conv3(x)))  # [B, 4, 3, 3]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "conv1", "conv2", "conv3", "fc1", "fc2")


class LeNet5(nn.Module):
    """LeNet-5 for 32x32 images, with max-pooling (arXiv 2503.17138): 62,006 parameters at 3 channels."""

    def __init__(self, channels: int = 3, classes: int = 10, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.max_pool2d(self.activation(self.conv1(x)), 2))  # [B, 6, 14, 14]
        x = self.dropout(F.max_pool2d(self.activation(self.conv2(x)), 2))  # [B, 16, 5, 5]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 120]
        x = self.dropout(self.activation(self.fc2(x)))  # [B, 84]
        return self.fc3(x)  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "conv1", "conv2", "fc1", "fc2", "fc3")


class SmallCNN(nn.Module):
    """The network of the Small CNN Zoo (arXiv 2002.11448): 3 conv k3, stride 2, averaged; 4,970 parameters, gray."""

    def __init__(
        self,
        channels: int = 1,
        hidden: int = 16,
        classes: int = 10,
        size: int = 28,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, stride=2)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride=2)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, stride=2)
        self.fc = nn.Linear(hidden, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(self.conv1(x)))  # [B, hidden, 13, 13]
        x = self.dropout(self.activation(self.conv2(x)))  # [B, hidden, 6, 6]
        x = self.dropout(self.activation(self.conv3(x)))  # [B, hidden, 2, 2]
        return self.fc(x.mean((2, 3)))  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "conv1", "conv2", "conv3", "fc")


class MLP(nn.Module):
    """Two hidden layers on flattened images."""

    def __init__(
        self,
        channels: int = 1,
        size: int = 8,
        hidden: int = 32,
        classes: int = 10,
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels * size * size, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)
        self.activation = activation_named(activation)
        self.dropout = nn.Dropout(dropout)
        self.image_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, hidden]
        x = self.dropout(self.activation(self.fc2(x)))  # [B, hidden]
        return self.fc3(x)  # [B, classes]

    def permutation_groups(self) -> tuple[PermutationGroup, ...]:
        return chain(self, "fc1", "fc2", "fc3")


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "CNN": CNN,
    "CNN3": CNN3,
    "CNN8": CNN8,
    "LeNet5": LeNet5,
    "MLP": MLP,
    "SmallCNN": SmallCNN,
}
"""The base networks by name; `register_network` adds others."""

TRUSTED = "WEIGHTSPACE_NETWORKS"
"""Environment variable: factories, package.module:factory separated by commas, that may be imported."""


def register_network(name: str) -> None:
    """Allow a base network of another package: from now on, in this process and its workers, its name can be used.

    The factory gives an `nn.Module`; the module says in `image_shape` (channels, height, width) what it takes, and may
    declare `permutation_groups()`. A zoo only names its base network: code is imported where the user names it too,
    here, with `zoo import --network`, or in the environment variable WEIGHTSPACE_NETWORKS.

    Args:
        name: "package.module:factory".

    Raises:
        UserError: there is no such factory.
    """
    if name in NETWORKS:
        return
    module, _, factory = name.partition(":")
    try:
        made = getattr(import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"no base network {name!r} ({error}); write it as package.module:factory, and where the module is not "
            "installed, name its folder in PYTHONPATH (PYTHONPATH=. for the present one)"
        ) from None
    if not callable(made):
        raise UserError(f"{name} is no factory of networks but a {type(made).__name__}")
    NETWORKS[name] = cast(Callable[..., nn.Module], made)
    trusted = os.environ.get(TRUSTED, "")
    if name not in trusted.split(","):
        os.environ[TRUSTED] = f"{trusted},{name}".strip(",")


def _factory(name: str) -> Callable[..., nn.Module]:
    if name not in NETWORKS and name in os.environ.get(TRUSTED, "").split(","):
        register_network(name)
    if name not in NETWORKS and ":" in name:
        raise UserError(
            f"the base network {name!r} is code of another package; if you trust it, allow it with the environment "
            f"variable {TRUSTED}={name} or with weightspace.register_network({name!r})"
        )
    if name not in NETWORKS:
        raise UserError(f"unknown base network {name!r}; the base networks are {', '.join(sorted(NETWORKS))}")
    return NETWORKS[name]


@dataclass(frozen=True)
class Architecture:
    """A base network by name and arguments: all that is needed to build it again."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"

    def build(self) -> nn.Module:
        """A fresh network in evaluation mode.

        Raises:
            UserError: unknown name or argument, a factory that is not allowed or does not give a module.
        """
        factory = _factory(self.name)
        parameters = inspect.signature(factory).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            for argument in self.arguments:
                if argument not in parameters:
                    raise UserError(f"{self.name} takes no argument {argument!r}; it takes {', '.join(parameters)}")
        try:
            network = factory(**self.arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self} cannot be built: {error}") from None
        if not isinstance(network, nn.Module):
            raise UserError(f"{self.name} gives a {type(network).__name__}, not an nn.Module")
        return network.eval()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer of real numbers by name, in the order of the state_dict."""
        with torch.device("meta"):
            state = self.build().state_dict()
        return {name: tuple(value.shape) for name, value in state.items() if value.is_floating_point()}

    @property
    def parameter_count(self) -> int:
        """Number of weights of one checkpoint."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def to_json(self) -> dict[str, Any]:
        """Name and arguments, for config files."""
        return {"name": self.name, "arguments": self.arguments}


INITS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "uniform": lambda weight, generator: nn.init.uniform_(weight, 0, 1, generator=generator),
    "normal": lambda weight, generator: nn.init.normal_(weight, 0, 1, generator=generator),
    "kaiming_uniform": lambda weight, generator: nn.init.kaiming_uniform_(weight, generator=generator),
    "kaiming_normal": lambda weight, generator: nn.init.kaiming_normal_(weight, generator=generator),
}


def initialize(architecture: Architecture, init: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh weights of one network by the named scheme; vectors (biases) start at 0.01, as in the published zoos.

    Raises:
        UserError: there is no such scheme.
    """
    if init not in INITS:
        raise UserError(f"unknown init {init!r}; the inits are {', '.join(sorted(INITS))}")
    weights = {}
    for name, shape in architecture.shapes.items():
        weights[name] = torch.full(shape, 0.01) if len(shape) < 2 else INITS[init](torch.empty(shape), generator)
    return weights
