"""A zoo whose networks have their units in one order, and what lies between two members before and after.

Legend: n checkpoints, k points on the line between two networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightspace import runs
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.groups import PermutationGroup
from weightspace.networks.symmetry import align, align_features, features, groups_of, permute
from weightspace.runs import UserError, derive_seed, progress, read_json, write_json
from weightspace.tasks.images import ImageSplit, load_task
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter, usable

ALIGNMENT_FILE = "alignment.json"
ROWS = 256
"""Checkpoints that are aligned at a time, and most that a mean is taken of."""
ROUNDS = 10
"""Most repetitions of aligning to the mean and taking it again."""
IMAGES = 64
"""Images on which units are compared by what they put out, about."""
AT_ONCE = 16
"""Checkpoints whose units' outputs are held at a time."""
WAYS = ("weights", "activations")
"""By what networks are aligned."""
PAIRS = 32
"""Most pairs of members between which the barrier is measured."""
POINTS = 11
"""Networks on the line between two, ends included."""


@dataclass(frozen=True)
class Reference:
    """What networks are aligned to."""

    weights: dict[str, Tensor]
    """{name: [1, *shape]}"""
    outputs: list[Tensor] | None = None
    """what its units put out, per group [1, size, F] (`networks.symmetry.features`); None: aligned by weights"""


def align_zoo(
    zoo: ModelZoo, folder: Path, to: str, seed: int, device: torch.device, by: str = "weights"
) -> dict[str, Any]:
    """Write the zoo with every checkpoint's units reordered to lie closest to a common reference.

    The functions of the networks stay the same.

    Args:
        zoo: the zoo.
        folder: the aligned zoo.
        to: "mean" (of training members at their last epoch, found in turns with their alignment), or the number of a
            member, at its last epoch.
        seed: of the pairs of members that are compared.
        device: where networks are run.
        by: what lies closest: "weights" (`networks.symmetry.align`), or "activations", what units put out on validation
            images (`networks.symmetry.align_features`).

    Returns:
        Mean distance (L2) of pairs of members at the last epoch, and mean and largest loss barrier between them on
        validation images, before and after. They stand in alignment.json, too.

    Raises:
        UserError: a network without units that can be reordered, no such member, or a zoo without a known task.
    """
    groups = groups_of(zoo.architecture)
    if not groups:
        raise UserError(f"{zoo.architecture} has no units that can be reordered, so there is nothing to align")
    if by not in WAYS:
        raise UserError(f"networks are aligned by {' or '.join(WAYS)}, not by {by!r}")
    with runs.stage(folder, "aligned zoo", {"zoo": zoo.fingerprint, "to": to, "by": by, "seed": seed}) as todo:
        if todo:
            images = _images(zoo, device) if by == "activations" else None
            reference = _reference(zoo, to, groups, images)
            writer = ZooWriter(folder, zoo.architecture, {"zoo": zoo.fingerprint, "aligned to": to, "by": by})
            starts = range(0, len(zoo), ROWS)
            with progress("align: checkpoints", len(zoo)) as advance:
                for shard, start in enumerate(starts):
                    if not writer.has(shard):
                        part = zoo.read(zoo.frame.iloc[start : start + ROWS])
                        weights = _aligned(part, reference, groups, images).weights
                        writer.write(shard, Checkpoints(part.architecture, weights, part.frame))
                    advance(min(ROWS, len(zoo) - start))
            aligned = writer.finish(range(len(starts)))
            write_json(folder / ALIGNMENT_FILE, _compared(zoo, aligned, seed, device))
    return read_json(folder / ALIGNMENT_FILE)


def _last(zoo: ModelZoo) -> pd.DataFrame:
    """The rows of all members at their last epoch."""
    return zoo.frame.loc[zoo.frame.groupby("member")["epoch"].idxmax()]


def _images(zoo: ModelZoo, device: torch.device) -> Tensor:
    """Validation images of every task of the zoo [IMAGES, ...], about."""
    each = [load_task(name).val.images for name in zoo.tasks]
    return torch.cat([images[: max(IMAGES // len(each), 1)] for images in each]).to(device)


def _aligned(
    checkpoints: Checkpoints, reference: Reference, groups: Sequence[PermutationGroup], images: Tensor | None
) -> Reference:
    """The weights of checkpoints in the order of a reference {name: [n, *shape]}, and the mean of their outputs."""
    if reference.outputs is None or images is None:
        return Reference(align(checkpoints.weights, reference.weights, groups))
    architecture, parts = checkpoints.architecture, []
    hidden = [group for group, output in zip(groups, reference.outputs, strict=True) if not output.shape[2]]
    sums = [torch.zeros_like(output) for output in reference.outputs]
    for start in range(0, len(checkpoints), AT_ONCE):
        some = {name: weight[start : start + AT_ONCE].to(images.device) for name, weight in checkpoints.weights.items()}
        outputs = features(architecture, some, images, groups)
        orders = [order.to(images.device) for order in align_features(outputs, reference.outputs)]
        sums = [
            total + output.take_along_dim(order[..., None], 1).sum(0, keepdim=True)
            for total, output, order in zip(sums, outputs, orders, strict=True)
        ]
        moved = {name: weight.cpu() for name, weight in permute(some, groups, orders).items()}
        parts.append(align(moved, reference.weights, hidden) if hidden else moved)
    weights = {name: torch.cat([part[name] for part in parts]) for name in checkpoints.weights}
    return Reference(weights, [total / len(checkpoints) for total in sums])


def _reference(zoo: ModelZoo, to: str, groups: Sequence[PermutationGroup], images: Tensor | None) -> Reference:
    last = _last(zoo)

    def of(one: dict[str, Tensor]) -> Reference:
        if images is None:
            return Reference(one)
        moved = {name: weight.to(images.device) for name, weight in one.items()}
        return Reference(one, features(zoo.architecture, moved, images, groups))

    if to != "mean":
        chosen = last[last["member"].astype(str) == to]
        if chosen.empty:
            raise UserError(f"there is no member {to!r}; align to 'mean' or to a member's number")
        return of(zoo.read(chosen).weights)
    some = zoo.read(last[last["split"] == "train"].head(ROWS) if "train" in set(last["split"]) else last.head(ROWS))
    some = some.rows(usable(some))
    if not len(some):
        raise UserError(f"{zoo.folder} has no training members with finite weights of which a mean could be taken")
    reference, before = of({name: weight[:1] for name, weight in some.weights.items()}), float("inf")
    for _ in range(ROUNDS):
        found = _aligned(some, reference, groups, images)
        mean = {name: weight.mean(0, keepdim=True) for name, weight in found.weights.items()}
        reference = Reference(mean, found.outputs)
        distance = sum(float((weight - mean[name]).square().sum()) for name, weight in found.weights.items())
        if distance > 0.999 * before:
            break
        before = distance
    return reference


def _compared(zoo: ModelZoo, aligned: ModelZoo, seed: int, device: torch.device) -> dict[str, Any]:
    """Pairs of members at their last epoch, in both zoos."""
    last = _last(zoo).reset_index(drop=True)
    random = np.random.default_rng(derive_seed(seed, "align", "pairs"))
    rows = random.permutation(len(last))[: 2 * min(PAIRS, len(last) // 2)].reshape(2, -1)
    found: dict[str, Any] = {"pairs": rows.shape[1]}
    for when, each in (("before", zoo), ("after", aligned)):
        chosen = each.frame.merge(last[["member", "epoch"]])
        some = each.read(chosen.set_index("member").loc[last["member"]].reset_index())
        first, second = ({name: weight[side] for name, weight in some.weights.items()} for side in rows)
        gap = [(first[name] - second[name]).flatten(1).square().sum(1) for name in first]
        found[f"distance {when}"] = float(torch.stack(gap).sum(0).sqrt().mean())
        tasks = last.loc[rows[0], "task"].reset_index(drop=True)
        barriers = []
        for task, index in tasks.groupby(tasks).groups.items():
            own = torch.tensor(list(index))
            sides = [{name: weight[own] for name, weight in side.items()} for side in (first, second)]
            barriers.append(barrier(zoo.architecture, sides[0], sides[1], load_task(str(task)).to(device).val))
        found[f"mean barrier {when}"] = float(torch.cat(barriers).mean())
        found[f"largest barrier {when}"] = float(torch.cat(barriers).max())
    return found


def barrier(
    architecture: Architecture, first: dict[str, Tensor], second: dict[str, Tensor], images: ImageSplit
) -> Tensor:
    """Loss barriers between pairs of networks: how far the loss on the straight line between them rises above the line
    between their losses, at most (Frankle et al. 2020, arXiv 1912.05671).

    Args:
        architecture: their base network.
        first: {name: [n, *shape]}.
        second: {name: [n, *shape]}.
        images: images and labels on which the loss is taken.

    Returns:
        [n], 0 where the loss never rises above.
    """
    count = len(next(iter(first.values())))
    share = torch.linspace(0, 1, POINTS)
    weights = {
        name: torch.stack([torch.lerp(weight, second[name], float(s)) for s in share], 1).flatten(0, 1)  # [n * k, ...]
        for name, weight in first.items()
    }
    frame = pd.DataFrame({"member": np.repeat(np.arange(count), POINTS)})
    loss = behavior.outputs(Checkpoints(architecture, weights, frame), images.images, images.labels).loss
    loss = loss.cpu().view(count, POINTS)
    return (loss - torch.lerp(loss[:, :1], loss[:, -1:], share)).max(1).values
