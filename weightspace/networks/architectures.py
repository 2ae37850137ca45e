"""Base networks; adding one is one class. Their symmetries are found by tracing them (`networks.tracing`)."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightspace.networks.activations import activation_named
from weightspace.networks.residual import MLPMixer, ResNet18, ViT
from weightspace.runs import UserError


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
        self.input_shape = (channels, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 8, 4, 4]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 16, 2, 2]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]


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
        self.input_shape = (channels, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 16, 15, 15]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 32, 6, 6]
        x = self.dropout(self.activation(F.max_pool2d(self.conv3(x), 2)))  # [B, 15, 2, 2]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]


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
        self.input_shape = (channels, 28, 28)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(F.max_pool2d(self.conv1(x), 2)))  # [B, 8, 12, 12]
        x = self.dropout(self.activation(F.max_pool2d(self.conv2(x), 2)))  # [B, 6, 4, 4]
        x = self.dropout(self.activation(self.conv3(x)))  # [B, 4, 3, 3]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 20]
        return self.fc2(x)  # [B, classes]


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
        self.input_shape = (channels, 32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.max_pool2d(self.activation(self.conv1(x)), 2))  # [B, 6, 14, 14]
        x = self.dropout(F.max_pool2d(self.activation(self.conv2(x)), 2))  # [B, 16, 5, 5]
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, 120]
        x = self.dropout(self.activation(self.fc2(x)))  # [B, 84]
        return self.fc3(x)  # [B, classes]


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
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(self.conv1(x)))  # [B, hidden, 13, 13]
        x = self.dropout(self.activation(self.conv2(x)))  # [B, hidden, 6, 6]
        x = self.dropout(self.activation(self.conv3(x)))  # [B, hidden, 2, 2]
        return self.fc(x.mean((2, 3)))  # [B, classes]


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
        self.input_shape = (channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(self.fc1(x.flatten(1))))  # [B, hidden]
        x = self.dropout(self.activation(self.fc2(x)))  # [B, hidden]
        return self.fc3(x)  # [B, classes]


class SIREN(nn.Module):
    """An image as a function of its coordinates, through sines (Sitzmann et al. 2020, arXiv 2006.09661).

    With the initialization "own" it starts as in section 3.2 there.
    """

    def __init__(
        self, inputs: int = 2, outputs: int = 1, width: int = 32, layers: int = 2, omega: float = 30.0
    ) -> None:
        super().__init__()
        sizes = [inputs, *[width] * layers]
        self.hidden = nn.ModuleList([nn.Linear(ins, outs) for ins, outs in pairwise(sizes)])
        self.last = nn.Linear(width, outputs)
        self.omega = omega
        self.input_shape = (inputs,)
        for i, layer in enumerate([*self.hidden, self.last]):
            bound = math.sqrt(6 / width) / omega if i else 1 / inputs
            nn.init.uniform_(cast(nn.Linear, layer).weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.sin(self.omega * layer(x))  # [B, width]
        return self.last(x)  # [B, outputs]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "CNN": CNN,
    "CNN3": CNN3,
    "CNN8": CNN8,
    "LeNet5": LeNet5,
    "MLP": MLP,
    "MLPMixer": MLPMixer,
    "ResNet18": ResNet18,
    "SIREN": SIREN,
    "SmallCNN": SmallCNN,
    "ViT": ViT,
}
"""The base networks by name; `register_network` adds others."""

TRUSTED = "WEIGHTSPACE_NETWORKS"
"""Environment variable: factories, package.module:factory separated by commas, that may be imported."""


INPUT_SHAPE = "input_shape"
"""Attribute of a base network: (channels, height, width), or (2,) for coordinates."""


def register_network(name: str) -> None:
    """Allow a base network of another package: from now on, in this process and its workers, its name can be used.

    The factory gives an `nn.Module`; the module says in `input_shape` (channels, height, width) what it takes, and
    where it cannot be traced, it may declare `permutation_groups()`. A zoo only names its base network: code is
    imported where the user names it too, here, with `zoo train --zoo.network` or `zoo import --network`, or in the
    environment variable WEIGHTSPACE_NETWORKS.

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


@dataclass(frozen=True, eq=False)
class Architecture:
    """A base network by name and arguments: all that is needed to build it again.

    Two are equal where the same weights behave alike: an argument that is left out is its default, and dropout of the
    shipped networks plays no part, since behavior is that of evaluation.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and (self.name, self._whole) == (other.name, other._whole)

    def __hash__(self) -> int:
        return hash((self.name, *sorted(self._whole)))  # the values may be lists

    @cached_property
    def _whole(self) -> dict[str, Any]:
        """The arguments that decide about behavior, defaults included where the factory may be asked for them."""
        try:
            parameters = inspect.signature(_factory(self.name)).parameters.values()
        except UserError:  # not allowed or not there
            return self.arguments
        whole = {each.name: each.default for each in parameters if each.default is not each.empty} | self.arguments
        inert = () if ":" in self.name else ("dropout",)
        return {name: value for name, value in whole.items() if name not in inert}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in sorted(self.arguments.items()))})"

    @property
    def takes(self) -> dict[str, inspect.Parameter] | None:
        """The arguments that the base network takes, by name; None where it takes any."""
        parameters = inspect.signature(_factory(self.name)).parameters
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return None if anything else dict(parameters)

    def build(self) -> nn.Module:
        """A fresh network in evaluation mode.

        The argument `input_shape` is for modules of others that do not say what they take: it becomes their attribute.

        Raises:
            UserError: unknown name or argument, a factory that is not allowed or does not give a module.
        """
        factory, takes = _factory(self.name), self.takes
        arguments, shape = self.arguments, None
        if takes is not None and INPUT_SHAPE not in takes and ":" in self.name:
            arguments = {name: value for name, value in arguments.items() if name != INPUT_SHAPE}
            shape = self.arguments.get(INPUT_SHAPE)
        for argument in arguments:
            if takes is not None and argument not in takes:
                raise UserError(f"{self.name} takes no argument {argument!r}; it takes {', '.join(takes)}")
        try:
            network = factory(**arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"{self} cannot be built: {error}") from None
        if not isinstance(network, nn.Module):
            raise UserError(f"{self.name} gives a {type(network).__name__}, not an nn.Module")
        if shape is not None:
            sizes = shape if isinstance(shape, list | tuple) else ()
            if len(sizes) not in (1, 3) or not all(isinstance(size, int) and size > 0 for size in sizes):
                raise UserError(f"{INPUT_SHAPE}={shape!r}: give [channels, height, width], such as [3,32,32], or [2]")
            network.__dict__[INPUT_SHAPE] = tuple(sizes)
        return network.eval()

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """Everything of real numbers in the state_dict, without memory; tied weights are one tensor of two names."""
        with torch.device("meta"):
            state = self.build().state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if value.is_floating_point()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Weights that are another name of an earlier one: {name: the earlier name}."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(value), name) for name, value in self._state.items()}
        return {name: other for name, other in names.items() if name != other}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and buffer of real numbers by name, in the order of the state_dict, each once."""
        return {name: tuple(value.shape) for name, value in self._state.items() if name not in self.tied}

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Which of `shapes` are not trained: running statistics, constants and frozen parameters."""
        return tuple(name for name in self.shapes if not self._state[name].requires_grad)

    @cached_property
    def counters(self) -> dict[str, Tensor]:
        """Everything else in the state_dict, as a fresh network has it: numbers of batches seen, tables of indices."""
        return {name: value for name, value in self.build().state_dict().items() if not value.is_floating_point()}

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


OWN_INIT = "own"
"""The init that leaves everything as the base network itself begins."""


def arguments_of(pairs: Sequence[str]) -> dict[str, Any]:
    """Arguments of a base network written as NAME=VALUE, their values read as JSON where they are.

    Raises:
        UserError: one without "=".
    """
    found: dict[str, Any] = {}
    for given in pairs:
        name, equals, value = given.partition("=")
        if not equals or not name:
            raise UserError(f"write arguments of the base network as NAME=VALUE, given {given!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def initialize(architecture: Architecture, init: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh weights of one network.

    The named scheme draws the weights of linear, convolutional and embedding layers; their biases start at 0.01, as in
    the published zoos. Everything else (normalizations, attention, free parameters), and everything with the scheme
    "own", starts as the network itself begins.

    Raises:
        UserError: there is no such scheme.
    """
    check_init(init)
    drawn = {} if init == OWN_INIT else _drawn_by_scheme(architecture)
    weights = {}
    if set(drawn) != set(architecture.shapes):
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            state = architecture.build().state_dict()
        weights = {name: state[name].clone() for name in architecture.shapes if name not in drawn}
    for name, shape in drawn.items():
        weights[name] = torch.full(shape, 0.01) if len(shape) < 2 else INITS[init](torch.empty(shape), generator)
    return {name: weights[name] for name in architecture.shapes}


def check_init(init: str) -> None:
    """Raise a UserError unless there is such a scheme."""
    if init not in INITS and init != OWN_INIT:
        raise UserError(f"unknown init {init!r}; the inits are {', '.join([*sorted(INITS), OWN_INIT])}")


def _drawn_by_scheme(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """What the schemes draw: weights and biases of linear, convolutional and embedding layers."""
    with torch.device("meta"):
        network = architecture.build()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
    layers = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    return {name: shape for name, shape in architecture.shapes.items() if name.rpartition(".")[0] in layers}
