"""Batches of training checkpoints: which rows each step sees, as a pure function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from weightspace.runs import derive_seed


def batch_rows(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The rows of one training step [batch_size]: every pass over the `count` rows is a fresh shuffle.

    A pure function of the step, so that a resumed run sees the same batches as an uninterrupted one. A batch that
    crosses the end of a pass is filled from the next.
    """
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    passes = positions // count
    rows = torch.empty(batch_size, dtype=torch.long)
    for number in passes.unique().tolist():
        generator = torch.Generator().manual_seed(derive_seed(seed, "pass", number))
        shuffled = torch.randperm(count, generator=generator)
        rows[passes == number] = shuffled[positions[passes == number] % count]
    return rows
