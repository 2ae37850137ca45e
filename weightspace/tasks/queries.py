"""Query sets: the inputs on which the behavior of networks is compared. Labels play no part.

A query set is named by its sources, joined with +: `own` (training images of the task that a checkpoint was trained
on), `tasks` (of all tasks of its zoo), `mixed` (own images overlaid two by two, twice as many), `noise` (uniform noise
over the range of the own images, as many), `invented` (made from networks without any image, in the same range, twice
as many), or any task by name (foreign images of the same shape): "own", "street", "own+stl10@3x32x32+noise".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightspace.runs import UserError
from weightspace.tasks.images import ImageTask, load_task

Invent = Callable[[torch.Size, Tensor, Tensor, torch.Generator], Tensor]
"""(shape of the inputs [N, ...], least and largest value, randomness) -> inputs that networks alone have made."""


@dataclass(frozen=True)
class QuerySet:
    """Queries from one or several sources, which every draw balances."""

    sources: tuple[Tensor, ...]
    """[N, C, H, W] each, on one device."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """A random batch [count, C, H, W] with equal shares of every source (to within one query), one after another.

        Queries of one source are different images; one with fewer images than its share gives all before any again.
        """
        shares = [count // len(self.sources) + (i < count % len(self.sources)) for i in range(len(self.sources))]
        drawn = []
        for source, share in zip(self.sources, shares, strict=True):
            rounds = max(-(-share // len(source)), 1)
            rows = torch.cat([torch.randperm(len(source), generator=generator) for _ in range(rounds)])[:share]
            drawn.append(source[rows.to(source.device)])
        return torch.cat(drawn)


def query_set(
    spec: str,
    task: ImageTask,
    tasks: Sequence[ImageTask],
    generator: torch.Generator,
    invent: Invent | None = None,
) -> QuerySet:
    """The query set of this name for checkpoints of one task, on the task's device.

    Args:
        spec: its sources, joined with +.
        task: the checkpoints' own task.
        tasks: all tasks of their zoo.
        generator: randomness of what is made here.
        invent: makes inputs from networks.

    Raises:
        UserError: a source that is no task, or whose images have another shape; `invented` where no networks are given.
    """
    own = task.train.images
    sources: list[Tensor] = []
    for name in spec.split("+"):
        if name == "own":
            sources.append(own)
        elif name == "tasks":
            sources += [each.train.images for each in tasks]
        elif name == "mixed":
            sources.append(_mixed(own, generator))
        elif name == "noise":
            sources.append(_noise(own, generator))
        elif name == "invented":
            if invent is None:
                raise UserError("invented queries are made from training checkpoints, and none are given")
            if task.real:
                raise UserError(f"invented queries lie between classes, and {task.name} has none; use own or noise")
            twice = torch.Size((2 * len(own), *own.shape[1:]))
            sources.append(invent(twice, own.min(), own.max(), generator))
        else:
            foreign = _foreign(spec, name)
            if foreign.shape[1:] != own.shape[1:]:
                takes = "x".join(map(str, own.shape[1:]))
                raise UserError(
                    f"the queries {name!r} have shape {tuple(foreign.shape[1:])}, the zoo's images "
                    f"{tuple(own.shape[1:])}; resize them with {name.partition('@')[0]}@{takes}"
                )
            sources.append(foreign.to(own.device))
    return QuerySet(tuple(sources))


def _foreign(spec: str, name: str) -> Tensor:
    try:
        return load_task(name).train.images
    except UserError as error:
        raise UserError(
            f"query set {spec!r} (own, tasks, mixed, noise, invented or a task's name, joined with +): {error}"
        ) from None


def _mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pairs of images overlaid in random shares, twice as many as there are images."""
    first, second = (torch.randint(len(images), (2 * len(images),), generator=generator) for _ in range(2))
    share = torch.rand(2 * len(images), *[1] * (images.ndim - 1), generator=generator).to(images)
    return share * images[first.to(images.device)] + (1 - share) * images[second.to(images.device)]


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    low, high = images.min(), images.max()
    return low + (high - low) * torch.rand(images.shape, generator=generator).to(images.device)
