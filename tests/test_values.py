"""Networks that represent an image: real-valued outputs, scored by their error, from the task to generated networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from weightspace.cli import main
from weightspace.config import ZooConfig
from weightspace.downstream import metrics
from weightspace.hyperrep import losses
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.symmetry import groups_of
from weightspace.runs import UserError, read_json
from weightspace.tasks.images import load_task, pictures
from weightspace.zoo.model_zoo import ModelZoo
from weightspace.zoo.population import Recipe, architecture_of, train, train_population

CPU = torch.device("cpu")
TINY = ZooConfig(
    tasks=("pixels:0:digits", "pixels:1:digits"), network="SIREN", arguments=("width=8", "omega=5"), inits=("own",),
    seeds=7, unseen_seeds=1, learning_rates=(3e-3, 1e-2), weight_decays=(0.0,), epochs=20, save_epochs=(0, 5, 20),
    val_share=0.2, test_share=0.35, workers=1, group=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> ModelZoo:
    return train_population(TINY, tmp_path_factory.mktemp("values") / "zoo", 0, CPU)


def test_pixels_are_the_image() -> None:
    digits, task = load_task("digits"), load_task("pixels:7:digits")
    assert task.real and task.classes == 1 and task.input_shape == (2,)
    for (row, column), value in zip(task.train.images, task.train.labels, strict=True):
        i, j = (round(float((x + 1) * 8 / 2 - 0.5)) for x in (row, column))
        assert digits.train.images[7, 0, i, j] == value.item()
    assert len(task.val.labels) == 12 * 12 and len(task.test.labels) == 16 * 16
    assert task.test.images.abs().max() == pytest.approx(1 - 1 / 16)
    colors = load_task("pixels:0:digits@3x4x6")
    assert colors.train.labels.shape == (24, 3) and pictures(colors, 2).shape == (1, 1, 3, 4, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pixels:5000:digits", "'digits' has training images 0 to 1076"),
        ("pixels:0:nowhere", "unknown task 'nowhere'"),
        ("pixels:0:pixels:1:digits", "has no images but the values of one"),
        ("pixels:x:digits", "pixels:N:TASK is image N of a task by its coordinates"),
    ],
)
def test_wrong_pixels(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task(name)


def test_networks_and_tasks_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="CNN8 takes images, which 'pixels:0:digits' does not have"):
        architecture_of(ZooConfig(network="CNN8"), load_task("pixels:0:digits"))
    with pytest.raises(UserError, match="SIREN takes coordinates, which 'digits' does not have"):
        architecture_of(ZooConfig(network="SIREN"), load_task("digits"))
    with pytest.raises(UserError, match="has no classes to mistake"):
        train_population(dataclasses.replace(TINY, backdoor_share=0.5), Path("nowhere"), 0, CPU)


def test_siren_starts_as_published() -> None:
    """Sitzmann et al. 2020, theorem 1.8: with this start the arguments of later sines are standard normal."""
    network = Architecture("SIREN", {"width": 512, "layers": 3}).build()
    assert [parameter.shape[0] for parameter in network.parameters()][::2] == [512, 512, 512, 1]
    x = torch.rand(2000, 2) * 2 - 1
    hidden = network.get_submodule("hidden")
    assert isinstance(hidden, nn.ModuleList)
    for layer in hidden[:2]:
        x = torch.sin(30 * layer(x))
    arguments = 30 * (hidden[2](x) - hidden[2].get_parameter("bias"))
    assert arguments.std().item() == pytest.approx(1, abs=0.1)


def test_hidden_units_can_be_permuted() -> None:
    groups = groups_of(Architecture("SIREN", {"width": 6, "layers": 3}))
    assert [group.size for group in groups] == [6, 6, 6]


def test_training_is_that_of_one_network() -> None:
    """Two members by torch.optim and F.mse_loss, one after another, as the independent route."""
    task, architecture = load_task("pixels:3:digits@3x4x4"), Architecture("SIREN", {"outputs": 3, "width": 5})
    networks = [architecture.build() for _ in range(2)]
    start = {name: torch.stack([dict(n.named_parameters())[name] for n in networks]) for name in architecture.shapes}
    start = {name: weight.detach().clone() for name, weight in start.items()}
    recipe = Recipe(torch.tensor([1e-2, 1e-3]), torch.zeros(2), (0, 0), "adam", 16)
    states = dict(train(architecture, start, task, recipe, 3, 2))
    for row, (network, rate) in enumerate(zip(networks, (1e-2, 1e-3), strict=True)):
        optimizer = torch.optim.Adam(network.parameters(), rate)
        for _ in range(3):  # one batch holds all pixels
            optimizer.zero_grad()
            nn.functional.mse_loss(network(task.train.images), task.train.labels).backward()
            optimizer.step()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(states[3][name][row], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_scores_are_errors(zoo: ModelZoo) -> None:
    frame = zoo.frame[zoo.frame["epoch"] == 20]
    checkpoints = zoo.read(frame)
    for row, (task, stored) in enumerate(zip(frame["task"], frame["test_loss"], strict=True)):
        own = load_task(task).test
        error = float((checkpoints.network(row)(own.images) - own.labels).square().mean().detach())
        assert stored == pytest.approx(error, rel=1e-4)
    np.testing.assert_allclose(frame["test_acc"], 1 - frame["test_loss"], atol=1e-6)
    start = zoo.frame[zoo.frame["epoch"] == 0]
    assert (frame["train_loss"].to_numpy() < start["train_loss"].to_numpy()).all()


def test_metrics_of_values_by_hand() -> None:
    values = torch.tensor([[[0.0], [2.0]], [[1.0], [2.0]], [[0.0], [0.0]]])  # [3 networks, 2 queries, 1]
    np.testing.assert_allclose(behavior.agreement(values, values.roll(1, 0)), [-1.0, 0.5, -1.5])
    np.testing.assert_allclose(metrics.pairwise_agreement(values, 1), [[1, 0.5, -1], [0.5, 1, -1.5], [-1, -1.5, 1]])
    np.testing.assert_allclose(metrics.floor(values, 1), [-0.25, -0.5, -1.25])
    outputs = behavior.Outputs(values, torch.tensor([[0.0], [2.0]]))
    np.testing.assert_allclose(outputs.accuracy, [1, 0.5, -1])
    np.testing.assert_allclose(outputs.loss, [0, 0.5, 2])
    alike, wrong = metrics.agreement_on_errors(values, values, outputs.labels if outputs.labels is not None else values)
    assert alike.sum() == wrong.sum() == 0
    np.testing.assert_allclose(losses.values(values, values.roll(1, 0)), [[0, 4], [1, 0], [1, 4]])


@pytest.mark.slow
def test_from_the_zoo_to_new_networks(zoo: ModelZoo, tmp_path: Path) -> None:
    """The whole command line on two signals: every record but those of classes is a number."""
    folder, rep = str(zoo.folder), str(tmp_path / "rep")
    steps = "--pretrain.epochs 5 20 --pretrain.steps 60 --pretrain.batch_size 8 --pretrain.validate_every 30"
    tiny = f"{steps} --autoencoder.latent 4 --autoencoder.components 0"
    main(["pretrain", folder, "--out", rep, *tiny.split(), "--device", "cpu"])
    for command in ("reconstruct", "generate", "probe"):
        main([command, folder, rep, "--out", str(tmp_path / command), "--device", "cpu"])
    found = pd.DataFrame(read_json(tmp_path / "reconstruct" / "records.json"))
    own = found[(found["representation"] == "rep") & (found["split"] == "test")].set_index("metric")["mean"]
    undefined = {"agreement on errors", "KL", "JS"}
    assert set(own.index[own.isna()]) == undefined
    made = pd.DataFrame(read_json(tmp_path / "generate" / "records.json"))
    assert set(made["split"]) == {"test pixels:0:digits", "test pixels:1:digits"}
    assert made.loc[made["metric"] == "mean accuracy", "mean"].notna().all()
