"""Query sets: the inputs on which the behavior of networks is compared. Labels play no part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weightspace.runs import UserError
from weightspace.tasks.images import ImageTask


def own(task: ImageTask, generator: torch.Generator) -> Tensor:
    """The task's training images [Q, C, H, W]."""
    return task.train.images


def noise(task: ImageTask, generator: torch.Generator) -> Tensor:
    """Uniform noise over the range of the training images, as many as there are training images [Q, C, H, W]."""
    low, high = task.train.images.min(), task.train.images.max()
    uniform = torch.rand(task.train.images.shape, generator=generator).to(task.train.images.device)
    return low + (high - low) * uniform


def union(task: ImageTask, generator: torch.Generator) -> Tensor:
    """Training images and noise, in equal numbers [2Q, C, H, W]."""
    return torch.cat([own(task, generator), noise(task, generator)])


QUERY_SETS: dict[str, Callable[[ImageTask, torch.Generator], Tensor]] = {"own": own, "noise": noise, "union": union}


def query_set(name: str, task: ImageTask, generator: torch.Generator) -> Tensor:
    """All queries of the named set [Q, C, H, W], on the task's device.

    Raises:
        UserError: there is no such query set.
    """
    if name not in QUERY_SETS:
        raise UserError(f"unknown query set {name!r}; the query sets are {', '.join(sorted(QUERY_SETS))}")
    return QUERY_SETS[name](task, generator)


def draw(queries: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """A random batch of `count` different queries (all of them, shuffled, where there are fewer) [count, C, H, W]."""
    rows = torch.randperm(len(queries), generator=generator)[:count]
    return queries[rows.to(queries.device)]
