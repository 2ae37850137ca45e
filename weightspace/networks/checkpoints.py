"""The record of n checkpoints of one base network: stacked weights and a data frame of the same n rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from weightspace.networks.architectures import Architecture
from weightspace.runs import UserError


@dataclass(frozen=True)
class Checkpoints:
    """n checkpoints of one base network."""

    architecture: Architecture
    weights: dict[str, Tensor]
    """{parameter name: [n, *shape]}, float32, in the order of the state_dict."""
    frame: pd.DataFrame
    """n rows (member, epoch, split, properties), row i belongs to weights[:, i]; the index is 0..n-1."""

    def __post_init__(self) -> None:
        shapes = self.architecture.shapes
        if list(self.weights) != list(shapes):
            name, given = self.architecture.name, list(self.weights)
            raise UserError(f"these weights are not of a {name}: it has {list(shapes)}, given {given}")
        for name, weight in self.weights.items():
            if tuple(weight.shape) != (len(self.frame), *shapes[name]):
                raise UserError(
                    f"{name} has shape {tuple(weight.shape)}, but {len(self.frame)} checkpoints of a "
                    f"{self.architecture.name} need {(len(self.frame), *shapes[name])}"
                )

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        return f"Checkpoints({len(self)} of {self.architecture.name}, columns {', '.join(self.frame.columns)})"

    def rows(self, rows: Any) -> Checkpoints:
        """The chosen rows: a boolean mask, positions or a slice."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows if rows.size else rows.astype(int)
        index = np.arange(len(self))[rows]
        chosen = torch.from_numpy(index)
        weights = {name: weight[chosen.to(weight.device)] for name, weight in self.weights.items()}
        return Checkpoints(self.architecture, weights, self.frame.iloc[index].reset_index(drop=True))

    def to(self, device: torch.device | str) -> Checkpoints:
        """The same checkpoints on another device."""
        weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return Checkpoints(self.architecture, weights, self.frame)

    def network(self, row: int) -> nn.Module:
        """Checkpoint `row` as an ordinary module in evaluation mode, independent of this record."""
        network = self.architecture.build()
        network.load_state_dict(self.state(row))
        return network

    def state(self, row: int) -> dict[str, Tensor]:
        """Checkpoint `row` as the state_dict of an ordinary module, on the CPU, in memory of its own.

        Tied weights stand under each of their names; counters are those of a fresh network.
        """
        state = {name: weight[row].detach().cpu().clone() for name, weight in self.weights.items()}
        tied = {name: state[other].clone() for name, other in self.architecture.tied.items()}
        return {**state, **tied, **{name: value.clone() for name, value in self.architecture.counters.items()}}

    def flat(self) -> Tensor:
        """Each checkpoint as one vector [n, P], parameters in the order of the state_dict."""
        return flatten(self.weights)


def flatten(weights: dict[str, Tensor]) -> Tensor:
    """Stacked weights {name: [n, *shape]} as vectors [n, P]; the inverse is `unflatten`."""
    return torch.cat([weight.reshape(len(weight), -1) for weight in weights.values()], dim=1)


def unflatten(shapes: Mapping[str, tuple[int, ...]], flat: Tensor) -> dict[str, Tensor]:
    """Vectors [n, P] as stacked weights {name: [n, *shape]}; the inverse is `flatten`."""
    parts = flat.split([int(np.prod(shape)) for shape in shapes.values()], dim=1)
    return {name: part.reshape(len(part), *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def concatenate(parts: Iterable[Checkpoints]) -> Checkpoints:
    """Checkpoints of one base network, one after another."""
    parts = list(parts)
    weights = {name: torch.cat([part.weights[name] for part in parts]) for name in parts[0].weights}
    frame = pd.concat([part.frame for part in parts], ignore_index=True)
    return Checkpoints(parts[0].architecture, weights, frame)
