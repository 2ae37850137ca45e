"""Image tasks: images, labels and their fixed splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from weightspace.runs import UserError


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split."""

    images: Tensor
    """[N, channels, height, width], float32, normalized with the training images' mean and standard deviation."""
    labels: Tensor
    """[N], int64 class indices."""

    def to(self, device: torch.device | str) -> ImageSplit:
        """The same split on another device."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageTask:
    """A classification task with fixed train, val and test splits."""

    name: str
    classes: int
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def split(self, name: str) -> ImageSplit:
        """The split called `name`.

        Raises:
            UserError: there is no such split.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise UserError(f"task {self.name!r} has no split {name!r}; it has {', '.join(splits)}")
        return splits[name]

    def to(self, device: torch.device | str) -> ImageTask:
        """The same task on another device."""
        return ImageTask(self.name, self.classes, self.train.to(device), self.val.to(device), self.test.to(device))


def digits() -> ImageTask:
    """The 1,797 real handwritten digits, 8x8 gray, that scikit-learn ships (UCI optical digits).

    A fixed stratified split: 1,077 train, 270 val, 450 test.
    """
    data: Any = load_digits()
    images, labels = data.images[:, None].astype(np.float32), data.target
    rest, test = train_test_split(np.arange(len(labels)), test_size=450, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=270, random_state=0, stratify=labels[rest])
    mean, std = images[train].mean(), images[train].std()

    def split(rows: Any) -> ImageSplit:
        return ImageSplit(torch.from_numpy((images[rows] - mean) / std), torch.from_numpy(labels[rows]).long())

    return ImageTask("digits", 10, split(train), split(val), split(test))


TASKS: dict[str, Callable[[], ImageTask]] = {"digits": digits}


def load_task(name: str) -> ImageTask:
    """Load a task by name.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; the tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]()
