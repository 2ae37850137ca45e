"""What a reader finds in a source, checkpoint by checkpoint; weights are read when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.zoo.model_zoo import SPLITS


@dataclass(frozen=True)
class Found:
    """One checkpoint of a source."""

    member: str
    """what its training run is called there"""
    epoch: int | None
    """None where the source does not say"""
    path: str
    """where it is, relative to the source"""
    load: Callable[[], Mapping[str, Tensor]]
    """reads its tensors; raises Unreadable or Misfit"""
    properties: Mapping[str, Any] = field(default_factory=dict)
    """numbers and words that are known of it"""
    network: str | None = None
    """its base network, where the source says it"""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the base network, as far as the source says them"""
    split: str | None = None
    """its split, where the source says it"""
    notes: tuple[str, ...] = ()
    """what was wrong beside the weights"""


Reader = Callable[[Path], Iterator[Found]]


@dataclass(frozen=True)
class Layout:
    """One way of keeping networks in a folder."""

    name: str
    detects: Callable[[Path], bool]
    """whether a folder looks like one"""
    read: Reader


ACTIVATIONS = {"leakyrelu": "leaky_relu", "leaky-relu": "leaky_relu", "swish": "silu"}
"""What others call the activations."""


def activation_of(value: Any) -> dict[str, str]:
    """The argument `activation`, where a source says it."""
    return {"activation": ACTIVATIONS.get(value.lower(), value.lower())} if isinstance(value, str) and value else {}


def split_of(value: Any) -> str | None:
    """A split by what others call it: trainset, valid, validation, testset ..."""
    text = value.lower() if isinstance(value, str) else ""
    return next((split for split in SPLITS if text.startswith(split)), None)


def scalar(value: Any) -> Any:
    """A number, truth value or short text; None for everything else, which is no property."""
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 200):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return None


def column(name: str) -> str:
    """A property's name as a column that can stand in a query: letters, digits and underscores."""
    return re.sub(r"\W+", "_", name).strip("_") or "unnamed"


def folders(root: Path) -> list[Path]:
    """The folders in a folder in natural order, links left out."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
