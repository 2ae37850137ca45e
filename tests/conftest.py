"""Fixtures: a private cache for calibration, tiny populations in memory, and one tiny trained zoo on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy starts its threads

import numpy as np
import pandas as pd
import pytest
import torch

_CACHE = tempfile.TemporaryDirectory(prefix="weightspace-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # set before any test runs, so that the user's cache is never touched
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

from weightspace.config import ZooConfig  # noqa: E402
from weightspace.networks.architectures import Architecture  # noqa: E402
from weightspace.networks.checkpoints import Checkpoints  # noqa: E402
from weightspace.tasks.images import ImageSplit, ImageTask  # noqa: E402
from weightspace.zoo import population as population_module  # noqa: E402
from weightspace.zoo.model_zoo import ModelZoo  # noqa: E402
from weightspace.zoo.population import train_population  # noqa: E402

TINY_ZOO = ZooConfig(
    seeds=3,
    unseen_seeds=1,
    inits=("kaiming_uniform",),
    learning_rates=(1e-3, 3e-3),
    weight_decays=(1e-4, 1e-3, 1e-2),
    epochs=2,
    save_epochs=(0, 1, 2),
    val_share=0.25,
    test_share=0.25,
    workers=1,
    group=8,
)


def random_checkpoints(architecture: Architecture, count: int, seed: int = 0, scale: float = 0.2) -> Checkpoints:
    """`count` untrained checkpoints with Gaussian weights; two rows per member, two members per initialization."""
    generator = torch.Generator().manual_seed(seed)
    shapes = architecture.shapes.items()
    weights = {name: scale * torch.randn(count, *shape, generator=generator) for name, shape in shapes}
    weights |= {name: weight.abs() + 0.1 for name, weight in weights.items() if name.endswith("_var")}
    member = np.arange(count) // 2
    frame = pd.DataFrame(
        {
            "member": member,
            "epoch": np.arange(count) % 2,
            "init": "kaiming_uniform",
            "seed": member // 2,
            "split": np.where(member % 2 == 0, "train", "test"),
            "task": "digits",
            "val_acc": np.linspace(0.1, 0.9, count),
        }
    )
    return Checkpoints(architecture, weights, frame)


@pytest.fixture
def make_checkpoints() -> Callable[..., Checkpoints]:
    """`random_checkpoints`, for tests of several architectures."""
    return random_checkpoints


@pytest.fixture
def population() -> Checkpoints:
    """Eight untrained CNN8 checkpoints in memory."""
    return random_checkpoints(Architecture("CNN8"), 8)


@pytest.fixture
def small_task() -> ImageTask:
    """A task of 70 random 4x4 images in 3 classes: 50 train (not a multiple of the batch), 10 val, 10 test."""
    generator = torch.Generator().manual_seed(5)

    def split(count: int) -> ImageSplit:
        images = torch.randn(count, 1, 4, 4, generator=generator)
        return ImageSplit(images, torch.randint(3, (count,), generator=generator))

    return ImageTask("small", 3, split(50), split(10), split(10))


@pytest.fixture(scope="session")
def tiny_config() -> ZooConfig:
    """The config of the tiny zoo: 18 members, 54 checkpoints."""
    return TINY_ZOO


@pytest.fixture(scope="session")
def tiny_zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    """A tiny zoo of two shards, trained once per test process. Tests that damage it copy its folder first."""
    folder: Path = tmp_path_factory.mktemp("tiny") / "zoo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 9)
        return train_population(TINY_ZOO, folder, 0, torch.device("cpu"))
