"""Training a population: vectorized groups against one-at-a-time training in one-thread worker processes.

The alternative is the best one-at-a-time way on the same cores: as many worker processes as cores, one thread each,
every member trained by a plain torch.optim loop (channels-last where that is faster). Process start is not counted on
either side. On a GPU both run in one process: the alternative is the plain loop there.

    python benchmarks/population.py [--network CNN8|CNN3] [--members 128] [--steps 40] [--rounds 3] [--device auto]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed, parallel_config

from weightspace.config import ZooConfig
from weightspace.experiment import choose_device
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.tasks.images import ImageSplit, ImageTask
from weightspace.zoo.population import architecture_of, grid, plan, recipe_of, start_weights, train


def task_for(network: str, images: int) -> ImageTask:
    """Random images of the size that the network takes: the cost of a step does not depend on their content."""
    generator = torch.Generator().manual_seed(0)
    shape = Architecture(network).build().input_shape
    pixels = torch.randn(images, *shape, generator=generator)
    split = ImageSplit(pixels, torch.randint(10, (images,), generator=generator))
    return ImageTask("random", 10, split, split, split)


def alone(config: ZooConfig, task: ImageTask, checkpoints: Checkpoints, rows: list[int], channels_last: bool) -> float:
    """Seconds for some members, one after another, each by a plain loop over its batches on one thread."""
    torch.set_num_threads(1)
    images = task.train.images
    images = images.contiguous(memory_format=torch.channels_last) if channels_last else images
    start = time.perf_counter()
    for row in rows:
        network = checkpoints.network(row).to(images.device).train()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-4)
        for _ in range(config.epochs):
            for batch in torch.randperm(len(images), device=images.device).split(config.batch_size):
                loss = F.cross_entropy(network(images[batch]), task.train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finish(images.device)
    return time.perf_counter() - start


def ours(config: ZooConfig, task: ImageTask, members: pd.DataFrame, rows: list[int], group: int, threads: int) -> float:
    """Seconds for some members as `weightspace zoo train` trains them."""
    torch.set_num_threads(threads)
    some = members.iloc[rows]
    architecture = architecture_of(config, task)
    weights = start_weights(architecture, some, 0)
    start = time.perf_counter()
    for _ in train(architecture, weights, task, recipe_of(some, config, task, 0), config.epochs, group):
        pass
    finish(task.train.images.device)
    return time.perf_counter() - start


def finish(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="CNN8", help="CNN8 or CNN3")
    parser.add_argument("--members", type=int, default=128, help="members to train")
    parser.add_argument("--steps", type=int, default=40, help="training steps per member")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median is printed")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda ...")
    arguments = parser.parse_args()
    device, cores = choose_device(arguments.device), os.cpu_count() or 1
    workers = cores if device.type == "cpu" else 1
    config = ZooConfig(network=arguments.network, seeds=max(4, arguments.members // 8), epochs=1, save_epochs=(1,))
    task = task_for(arguments.network, config.batch_size * arguments.steps).to(device)
    members = grid(config, 0).head(arguments.members)
    architecture = architecture_of(config, task)
    checkpoints = Checkpoints(architecture, start_weights(architecture, members, 0), members)
    strategy = plan(config, task, 10**6, cores)  # as for a population so large that starting processes does not count
    print(f"{arguments.network}: {len(members)} members, {device}, {cores} cores, strategy {strategy}")
    parts = [list(range(worker, len(members), workers)) for worker in range(workers)]
    mine, plain = [], []
    with parallel_config("loky", n_jobs=workers, inner_max_num_threads=1), Parallel() as pool:
        warm = [[0]] * workers
        pool(delayed(alone)(config, task, checkpoints, rows, False) for rows in warm)
        for _ in range(arguments.rounds):
            each = []
            for channels_last in (False, True):
                start = time.perf_counter()
                pool(delayed(alone)(config, task, checkpoints, rows, channels_last) for rows in parts)
                each.append(time.perf_counter() - start)
            plain.append(min(each))
            start = time.perf_counter()
            if strategy.workers == 1:
                ours(config, task, members, list(range(len(members))), strategy.group, cores)
            else:
                pool(delayed(ours)(config, task, members, rows, strategy.group, 1) for rows in parts)
            mine.append(time.perf_counter() - start)
    scale = 1e3 / (len(members) * arguments.steps)
    print(f"one at a time  {statistics.median(plain) * scale:8.3f} ms per member and step")
    print(f"ours           {statistics.median(mine) * scale:8.3f} ms per member and step")
    ratios = [p / m for p, m in zip(plain, mine, strict=True)]
    print(f"ratio population_{arguments.network} {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
