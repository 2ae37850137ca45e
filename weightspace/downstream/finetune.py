"""What training does to generated networks, beside training from scratch and training the anchors on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from weightspace.config import FinetuneConfig
from weightspace.downstream import metrics
from weightspace.downstream.baselines import SCRATCH
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture, initialize
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, derive_seed, progress
from weightspace.tasks.images import ImageTask
from weightspace.zoo.population import Recipe, train

STAGE = "finetune"


def finetune(
    networks: Mapping[str, Checkpoints], tasks: Mapping[str, ImageTask], config: FinetuneConfig, seed: int
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Train networks of every method, and as many fresh ones, with the same data order.

    Where a method has more than config.networks, those at even distances are taken: some files are sorted by accuracy.

    Every network is trained on its own task, or all on config.task: with a new classifier where that has another number
    of classes. Where there are several tasks, the split in the records is "test TASK".

    Returns:
        Records ("accuracy after N epochs" on test, intervals over networks) and curves (a row per method, network
        and epoch).

    Raises:
        UserError: the task's images are of another shape than the networks take.
    """
    records, curves = [], []
    total = sum(max(config.epochs) * -(-len(task.train.labels) // config.batch_size) for task in tasks.values())
    with progress("finetune", total * (len(networks) + 1)) as advance:
        for name, task in tasks.items():
            split = "test" if len(tasks) == 1 else f"test {name}"
            starts = {}
            for method, checkpoints in networks.items():
                own = checkpoints if config.task else checkpoints.rows((checkpoints.frame["task"] == name).to_numpy())
                chosen = np.linspace(0, len(own) - 1, min(len(own), config.networks)).round().astype(int)
                starts[method] = for_task(own.rows(chosen), task, config.init, seed)
            starts[SCRATCH] = fresh(next(iter(starts.values())).architecture, config, seed)
            for method, start in starts.items():
                count = len(start)
                recipe = Recipe(
                    torch.full((count,), config.learning_rate),
                    torch.zeros(count),
                    tuple(derive_seed(seed, "finetune", network) for network in range(count)),
                    config.optimizer,
                    config.batch_size,
                )
                group = behavior.calibrate(
                    start.architecture, task.train.images.device, config.batch_size, count, shared=False, training=True
                )
                states = train(start.architecture, start.weights, task, recipe, max(config.epochs), group, advance)
                for epoch, weights in states:
                    if epoch in config.epochs:
                        now = Checkpoints(start.architecture, weights, start.frame)
                        outputs = behavior.outputs(now, task.test.images, task.test.labels)
                        accuracy = outputs.accuracy.double().cpu().numpy()
                        metric = f"accuracy after {epoch} epoch{'s' * (epoch != 1)}"
                        sums, each = metrics.mean_of(accuracy), np.arange(count)
                        records.append(metrics.summarize(STAGE, method, split, metric, sums, each))
                        row = {"representation": method, "task": name, "network": each, "epoch": epoch}
                        curves.append(pd.DataFrame({**row, "test_acc": accuracy}))
    return records, pd.concat(curves, ignore_index=True)


def for_task(networks: Checkpoints, task: ImageTask, init: str, seed: int) -> Checkpoints:
    """The same networks for a task; where it has another number of classes, each with a new classifier.

    The parameters whose shape depends on the number of classes are initialized anew, the others kept.

    Raises:
        UserError: the task's images are of another shape than the networks take.
    """
    takes = behavior.input_shape_of(networks.architecture.build())
    if len(takes) != len(task.input_shape):
        raise UserError(f"these networks take inputs of shape {takes}, those of {task.name!r} have {task.input_shape}")
    if takes != task.input_shape:
        fitting = f"{task.name.partition('@')[0]}@{'x'.join(map(str, takes))}"
        raise UserError(
            f"these networks take images of shape {takes}, but those of {task.name!r} have {task.input_shape}; "
            f"resize them with {fitting}"
        )
    arguments = {**networks.architecture.arguments, "classes": task.classes}
    if networks.architecture.arguments.get("classes", task.classes) == task.classes:
        return networks
    architecture = Architecture(networks.architecture.name, arguments)
    new = _fresh_weights(architecture, len(networks), init, seed, "classifier")
    weights = {
        name: networks.weights[name] if networks.weights[name].shape[1:] == shape else new[name]
        for name, shape in architecture.shapes.items()
    }
    return Checkpoints(architecture, weights, networks.frame)


def fresh(architecture: Architecture, config: FinetuneConfig, seed: int) -> Checkpoints:
    """Untrained networks, each with its own initialization."""
    weights = _fresh_weights(architecture, config.networks, config.init, seed, "init")
    return Checkpoints(architecture, weights, pd.DataFrame({"network": range(config.networks)}))


def _fresh_weights(
    architecture: Architecture, count: int, init: str, seed: int, purpose: str
) -> dict[str, torch.Tensor]:
    each = []
    for network in range(count):
        generator = torch.Generator().manual_seed(derive_seed(seed, "finetune", purpose, network))
        each.append(initialize(architecture, init, generator))
    return {name: torch.stack([one[name] for one in each]) for name in architecture.shapes}
