"""What training does to generated networks, beside training from scratch and training the anchors on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from weightspace.config import FinetuneConfig
from weightspace.downstream import metrics
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture, initialize
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import derive_seed, progress
from weightspace.tasks.images import ImageTask
from weightspace.zoo.population import Recipe, train

STAGE = "finetune"
SCRATCH = "from scratch"


def finetune(
    networks: Mapping[str, Checkpoints], task: ImageTask, config: FinetuneConfig, seed: int
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Train the first networks of every method, and as many fresh ones, with the same data order.

    Returns:
        Records ("accuracy after N epochs" on test, intervals over networks) and curves (a row per method, network
        and epoch).
    """
    architecture = next(iter(networks.values())).architecture
    starts = {name: c.rows(slice(0, config.networks)) for name, c in networks.items()}
    starts[SCRATCH] = fresh(architecture, config, seed)
    records, curves = [], []
    device = task.train.images.device
    batches = -(-len(task.train.labels) // config.batch_size)
    with progress("finetune", len(starts) * max(config.epochs) * batches) as advance:
        for name, start in starts.items():
            count = len(start)
            recipe = Recipe(
                torch.full((count,), config.learning_rate),
                torch.zeros(count),
                tuple(derive_seed(seed, "finetune", network) for network in range(count)),
                config.optimizer,
                config.batch_size,
            )
            group = behavior.calibrate(architecture, device, config.batch_size, count, shared=False, training=True)
            for epoch, weights in train(architecture, start.weights, task, recipe, max(config.epochs), group, advance):
                if epoch in config.epochs:
                    now = Checkpoints(architecture, weights, start.frame)
                    outputs = behavior.outputs(now, task.test.images, task.test.labels)
                    accuracy = outputs.accuracy.double().cpu().numpy()
                    metric = f"accuracy after {epoch} epochs"
                    sums, each = metrics.mean_of(accuracy), np.arange(count)
                    records.append(metrics.summarize(STAGE, name, "test", metric, sums, each))
                    row = {"representation": name, "network": each, "epoch": epoch, "test_acc": accuracy}
                    curves.append(pd.DataFrame(row))
    return records, pd.concat(curves, ignore_index=True)


def fresh(architecture: Architecture, config: FinetuneConfig, seed: int) -> Checkpoints:
    """Untrained networks, each with its own initialization."""
    each = []
    for network in range(config.networks):
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", "init", network))
        each.append(initialize(architecture, config.init, generator))
    weights = {name: torch.stack([one[name] for one in each]) for name in architecture.shapes}
    return Checkpoints(architecture, weights, pd.DataFrame({"network": range(config.networks)}))
