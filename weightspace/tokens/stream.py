"""Batches of training checkpoints from a zoo on disk: memory does not grow with the zoo, and no step waits for data.

Which rows a step sees is a pure function of the step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import torch
from torch import Tensor

from weightspace.runs import derive_seed
from weightspace.zoo.model_zoo import ModelZoo

SAMPLE_BYTES = 64 * 2**20
"""Memory that a sample of checkpoints takes, about."""
SAMPLE_LEAST = 32
"""Checkpoints of the smallest sample."""


def sample(frame: pd.DataFrame, size: int, seed: int) -> pd.DataFrame:
    """The rows themselves, or as many at random, in their order, as SAMPLE_BYTES hold of `size` values each."""
    most = max(SAMPLE_BYTES // (4 * size), SAMPLE_LEAST)
    if len(frame) <= most:
        return frame
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    return frame.iloc[torch.randperm(len(frame), generator=generator)[:most].sort().values.numpy()]


class Stream:
    """Reads the checkpoints of each step while the step before is computed."""

    def __init__(self, zoo: ModelZoo, frame: pd.DataFrame, batch_size: int, seed: int) -> None:
        """Batches of `batch_size` of these rows of the zoo."""
        self.zoo, self.batch_size, self.seed = zoo, batch_size, seed
        self.shards, self.rows = frame["shard"].to_numpy(), frame["row"].to_numpy()
        self.waited = 0.0
        """Seconds for which steps had to wait."""

    def batches(self, steps: Sequence[int], share: slice = slice(None)) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """For each of some steps: which rows of the frame, and their weights {name: [n, *shape]} on the CPU.

        Args:
            steps: their numbers.
            share: which part of every batch is read, where several processes share it.
        """
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._read, step, share) for step in steps[:2]]
            for number in range(len(steps)):
                started = time.perf_counter()
                batch = coming.pop(0).result()
                self.waited += time.perf_counter() - started
                if number + 2 < len(steps):
                    coming.append(reader.submit(self._read, steps[number + 2], share))
                yield batch

    def _read(self, step: int, share: slice) -> tuple[Tensor, dict[str, Tensor]]:
        rows = batch_rows(len(self.rows), self.batch_size, step, self.seed)[share]
        return rows, self.zoo.weights(self.shards[rows.numpy()], self.rows[rows.numpy()])


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
