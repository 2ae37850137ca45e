"""Pretraining on zoos of any size: peak memory and waiting for data with 100 and with many checkpoints; how the cost
of a step grows with tokens, checkpoints and queries.

    python benchmarks/pretrain_scale.py [--checkpoints 10000] [--steps 20] [--rounds 3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pretrain_step import checkpoints_of, ours, setting_of

from weightspace.config import AutoencoderConfig, LossConfig
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

SIZE = AutoencoderConfig(latent=64, components=1)
SHARD = 500
TRIED = {"tokens": (289, 145, 73, 37), "checkpoints": (4, 8, 16, 32), "queries": (32, 64, 128, 256)}
"""Sizes whose cost is measured; of tokens, entries per token."""
TRAIN = """
import resource, sys, time; from pathlib import Path
import torch; torch.set_num_threads(1)
from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig
from weightspace.hyperrep import pretrain as module
from weightspace.tokens.stream import Stream
from weightspace.zoo.model_zoo import ModelZoo
streams = []
class Watched(Stream):
    spent = float("inf")
    def __init__(self, *given): super().__init__(*given); streams.append(self)
    def batches(self, *given):
        start = time.perf_counter()
        for batch in super().batches(*given):
            yield batch
            self.spent = time.perf_counter() - start  # of all steps but the last, and of waiting for their batches
module.Stream = Watched
steps = int(sys.argv[3])
config = PretrainConfig(epochs=(1,), steps=steps, validate_every=steps)
module.pretrain(ModelZoo.open(sys.argv[1]), Path(sys.argv[2]), config, LossConfig(), AutoencoderConfig(latent=64,
    components=1), 0, torch.device("cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, streams[0].waited / streams[0].spent)
"""


def write_zoo(folder: Path, count: int) -> ModelZoo:
    """Random checkpoints of CNN3, 32 of them for validation."""
    architecture = Architecture("CNN3")
    writer = ZooWriter(folder, architecture, {})
    generator = torch.Generator().manual_seed(0)
    shards = range(math.ceil(count / SHARD))
    for shard in shards:
        members = np.arange(shard * SHARD, min((shard + 1) * SHARD, count))
        shapes = architecture.shapes.items()
        weights = {name: 0.1 * torch.randn(len(members), *shape, generator=generator) for name, shape in shapes}
        split = np.where(members < 32, "val", "train")
        frame = pd.DataFrame({"member": members, "epoch": 1, "split": split, "task": "street"})
        writer.write(shard, Checkpoints(architecture, weights, frame))
    return writer.finish(shards)


def trained(zoo: Path, out: Path, steps: int) -> tuple[float, float]:
    """Peak memory (MiB) of a training in a process of its own, and the share of its steps' time spent waiting."""
    command = [sys.executable, "-c", TRAIN, str(zoo), str(out), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory, waited = map(float, done.stdout.split())
    return memory, waited


def seconds_of(token_size: int, count: int, queries: int, rounds: int) -> tuple[int, float]:
    """Tokens of a checkpoint and the median seconds of a step."""
    architecture, size = Architecture("CNN3"), AutoencoderConfig(latent=16, components=0, token_size=token_size)
    setting = setting_of(checkpoints_of(architecture, count), size, LossConfig(), queries, torch.device("cpu"))
    inputs = torch.randn(queries, 3, 32, 32)
    step = ours(setting, checkpoints_of(architecture, count).weights, inputs)
    seconds = [_timed(step) for _ in range(rounds + 1)][1:]
    return setting.representation.tokenizer.count, statistics.median(seconds)


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10_000, help="checkpoints of the large zoo")
    parser.add_argument("--steps", type=int, default=20, help="training steps for memory and waiting")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps after one warm-up; the median is printed")
    arguments = parser.parse_args()
    peak = {}
    with tempfile.TemporaryDirectory() as name:
        for count in (100, arguments.checkpoints):
            write_zoo(Path(name) / f"zoo{count}", count)
        trained(Path(name) / "zoo100", Path(name) / "warm-up", 1)  # what is measured once per machine
        for count in (100, arguments.checkpoints):
            peak[count], waited = trained(Path(name) / f"zoo{count}", Path(name) / f"out{count}", arguments.steps)
            told = f"peak memory {peak[count]:.0f} MiB, {100 * waited:.2f} % of the steps' time waited for data"
            print(f"{count:>7,} checkpoints: {told}")
    grown: dict[str, tuple[list[int], list[float]]] = {}
    for label, sizes in TRIED.items():
        found = []
        for size in sizes:
            token_size = size if label == "tokens" else 289
            checkpoints, queries = size if label == "checkpoints" else 8, size if label == "queries" else 64
            tokens, seconds = seconds_of(token_size, checkpoints, queries, arguments.rounds)
            found.append((tokens if label == "tokens" else size, seconds))
        grown[label] = [size for size, _ in found], [seconds for _, seconds in found]
        told = ", ".join(f"{size}: {seconds:.3f} s" for size, seconds in found)
        print(f"a step by {label:<12}{told}; grows with exponent {exponent(*grown[label]):.2f}")
    print(f"ratio memory_of_{arguments.checkpoints}_checkpoints {peak[arguments.checkpoints] / peak[100]:.3f}")


if __name__ == "__main__":
    main()
