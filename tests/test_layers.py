"""Layers beyond linear and convolutional ones: their rows, their training, and the way through a representation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import weightspace as ws
from weightspace.config import (
    AutoencoderConfig,
    GenerateConfig,
    ImportConfig,
    LossConfig,
    PretrainConfig,
    ReconstructConfig,
    ZooConfig,
)
from weightspace.downstream.generate import generate
from weightspace.downstream.reconstruct import reconstruct
from weightspace.hyperrep.pretrain import pretrain
from weightspace.networks import layers
from weightspace.networks.architectures import NETWORKS, Architecture, initialize
from weightspace.networks.behavior import conditioned, logits, outputs
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.layers import register_layer
from weightspace.runs import UserError
from weightspace.tasks.images import ImageTask
from weightspace.tokens.normalize import standardize
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.zoo.exporting import export_zoo
from weightspace.zoo.importing import import_zoo
from weightspace.zoo.population import Recipe, train, train_population

CPU = torch.device("cpu")
SMALL = {
    "ResNet18": {"channels": 1, "size": 8, "width": 2},
    "ViT": {"channels": 1, "size": 8, "width": 8, "depth": 1, "heads": 2},
    "MLPMixer": {"channels": 1, "size": 8, "width": 8, "depth": 1},
    "Rows": {"size": 8},
}


class Rows(nn.Module):
    """The rows of an image as channels of a sequence: the layers that the other networks do not have."""

    def __init__(self, classes: int = 10, size: int = 8) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(size, size, 3, padding=1, groups=size)
        self.group = nn.GroupNorm(2, size)
        self.pointwise = nn.Conv1d(size, 6, 1)
        self.places = nn.Embedding(size, 6)
        self.rms = nn.RMSNorm(6)
        self.fc = nn.Linear(6, classes)
        self.input_shape = (1, size, size)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.group(self.depthwise(x.flatten(1, 2))))  # [B, rows, columns]
        h = self.pointwise(h).transpose(1, 2) + self.places(torch.arange(h.shape[2]))  # [B, columns, 6]
        return self.fc(self.rms(torch.relu(h)).mean(1))  # [B, classes]


@pytest.fixture(autouse=True)
def rows_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "Rows", Rows)


class Everything(nn.Module):
    """A layer of every kind that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.token = nn.Parameter(torch.randn(1, 2, 4))
        self.embedding = nn.Embedding(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4, bias=False)
        self.batch = nn.BatchNorm2d(4)
        self.layer = nn.LayerNorm([2, 3])
        self.group = nn.GroupNorm(2, 4)
        self.rms = nn.RMSNorm(4)
        self.first = nn.Linear(4, 3)
        self.again = nn.Linear(4, 3)
        self.again.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("passing", torch.zeros(7), persistent=False)
        self.input_shape = (4,)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.again(x)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    monkeypatch.setitem(NETWORKS, "Everything", Everything)
    return Architecture("Everything")


def random_weights(architecture: Architecture, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in architecture.shapes.items()}


def rows(tokenizer: Tokenizer, weights: dict[str, Tensor], layer: str) -> list[list[float]]:
    """The real entries of every row of one layer of the first checkpoint."""
    tokens = tokenizer.tokenize(weights)
    own = tokens.positions[:, 1] == tokenizer.layers.index(layer)
    return [x[mask].tolist() for x, mask in zip(tokens.x[0, own], tokens.mask[own], strict=True)]


def test_every_kind_of_layer_has_its_rows(everything: Architecture) -> None:
    weights = random_weights(everything, 2)
    tokenizer = Tokenizer(everything)
    again = tokenizer.detokenize(tokenizer.tokenize(weights).x)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    one = {name: weight[0] for name, weight in weights.items()}

    def by_unit(*names: str) -> list[list[float]]:
        return torch.cat(
            [one[name].flatten(1) if one[name].ndim > 1 else one[name][:, None] for name in names], 1
        ).tolist()

    assert rows(tokenizer, weights, "grouped") == by_unit("grouped.weight", "grouped.bias")
    assert rows(tokenizer, weights, "depthwise") == by_unit("depthwise.weight")
    assert rows(tokenizer, weights, "embedding") == by_unit("embedding.weight")
    names = ("weight", "bias", "running_mean", "running_var")
    assert rows(tokenizer, weights, "batch") == by_unit(*(f"batch.{name}" for name in names))
    assert (
        rows(tokenizer, weights, "layer")
        == torch.stack([one["layer.weight"], one["layer.bias"]], -1).flatten(0, 1).tolist()
    )
    assert rows(tokenizer, weights, "rms") == one["rms.weight"][:, None].tolist()
    attention = rows(tokenizer, weights, "attention")
    assert attention[:12] == by_unit("attention.in_proj_weight", "attention.in_proj_bias")
    assert attention[12:] == [one["attention.bias_k"].flatten().tolist(), one["attention.bias_v"].flatten().tolist()]
    assert rows(tokenizer, weights, "cross")[:4] == one["cross.q_proj_weight"].tolist()
    free = [[one["scale"].item()], *one["token"][0].tolist(), one["table"].tolist()]
    assert rows(tokenizer, weights, "") == free


def test_tied_weights_are_one(everything: Architecture) -> None:
    assert everything.tied == {"again.weight": "first.weight"}
    assert "again.weight" not in everything.shapes and "again.bias" in everything.shapes
    checkpoints = Checkpoints(everything, random_weights(everything, 2), pd.DataFrame({"member": [0, 1]}))
    network = checkpoints.network(1)
    assert isinstance(network, Everything) and network.again.weight is network.first.weight
    x = torch.randn(5, 4)
    for group in (1, 2):
        together = logits(everything.build(), checkpoints.weights, x, group)
        assert torch.allclose(together[1], network(x), atol=1e-6)


def test_tied_weights_are_read_once(everything: Architecture, tmp_path: Path) -> None:
    network = Everything()
    torch.save({"model": network.state_dict()}, tmp_path / "net.pt")
    (zoo,) = import_zoo(str(tmp_path), tmp_path / "zoo", ImportConfig(network="Everything"))
    export_zoo(zoo, tmp_path / "files", "directory")
    export_zoo(zoo, tmp_path / "tune", "ray-tune")
    (file,), (checkpoint,) = (tmp_path / "files").glob("*.safetensors"), (tmp_path / "tune").glob("*/*/checkpoints")
    for again in (
        zoo.read(zoo.frame).network(0).state_dict(),
        load_file(file),
        torch.load(checkpoint, weights_only=True),
    ):
        other = Everything()
        other.load_state_dict(again)  # strictly: whoever reads an export needs no package
        for name, value in network.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_statistics_are_normalized_apart(everything: Architecture) -> None:
    weights = random_weights(everything, 50)
    weights["batch.running_var"] = 100 + weights["batch.running_var"]
    tokenizer = Tokenizer(everything)
    tokens = tokenizer.tokenize(weights)
    x = standardize(tokenizer, tokens.x).normalize(tokens.x)
    again = tokenizer.detokenize(x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert again[f"batch.{name}"].mean().abs() < 1e-5 and abs(again[f"batch.{name}"].std(correction=0) - 1) < 1e-5


def test_unknown_layers_can_be_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    class Upward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.LSTM(2, 3)

    monkeypatch.setitem(NETWORKS, "Upward", Upward)
    monkeypatch.setattr(layers, "DECLARED", {})
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    with pytest.raises(UserError, match=r"register_layer\(torch.nn.LSTM, 'weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0'"):
        Tokenizer(Architecture("Upward"))
    register_layer(nn.LSTM, *names[:3])
    with pytest.raises(UserError, match="layer 'recurrent', a LSTM, holds bias_hh_l0 beside its rows"):
        Tokenizer(Architecture("Upward"))
    register_layer(nn.LSTM, *names)
    assert Tokenizer(Architecture("Upward")).mask.sum(1).tolist() == [2 + 3 + 1 + 1] * 12
    with pytest.raises(UserError, match="needs the names of the layer's tensors"):
        register_layer(nn.LSTM)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_that_are_computed_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(nn.Module):
        def __init__(self, old: bool = False) -> None:
            super().__init__()
            norm = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
            self.first = norm(nn.Linear(2, 3))

    monkeypatch.setitem(NETWORKS, "Normed", Normed)
    monkeypatch.setattr(layers, "DECLARED", {})
    with pytest.raises(
        UserError, match=r"layer 'first', a Linear, holds weight_g, weight_v beside .*remove_weight_norm\) and save"
    ):
        Tokenizer(Architecture("Normed", {"old": True}))
    with pytest.raises(
        UserError, match=r"the weight of layer 'first' is computed .*remove_parametrizations\(layer, 'weight'\)"
    ) as told:
        Tokenizer(Architecture("Normed"))
    exec(str(told.value).rpartition("declare them: ")[2], {"weightspace": ws, "torch": torch})  # as it advises
    tokenizer = Tokenizer(Architecture("Normed"))
    assert tokenizer.mask.sum().item() == 3 + 3 + 2 * 3  # biases, norms, directions


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("group", [1, 2])
def test_populations_learn_as_single_networks(name: str, group: int, small_images: ImageTask) -> None:
    """An ordinary training loop with torch's own modules and optimizer ends in the same weights and statistics."""
    architecture = Architecture(name, SMALL[name] | {"classes": 3})
    starts = [initialize(architecture, "own", torch.Generator().manual_seed(seed)) for seed in range(2)]
    weights = {key: torch.stack([start[key] for start in starts]) for key in architecture.shapes}
    recipe = Recipe(torch.tensor([1e-2, 3e-3]), torch.tensor([0.0, 1e-2]), (5, 6), "sgd", 16)
    *_, (epoch, found) = train(architecture, weights, small_images, recipe, 2, group)
    assert epoch == 2
    for row in range(2):
        network = Checkpoints(architecture, weights, pd.DataFrame({"member": [0, 1]})).network(row).train()
        decay = recipe.weight_decay[row].item()
        rate = recipe.learning_rate[row].item()
        optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
        for batch in batches(recipe.orders[row], len(small_images.train.labels)):
            loss = F.cross_entropy(network(small_images.train.images[batch]), small_images.train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = network.state_dict()
        for key, weight in found.items():
            assert torch.allclose(weight[row], state[key], atol=1e-5), key
        for key in architecture.buffers:
            assert not torch.allclose(found[key][row], weights[key][row])


def batches(order: int, count: int) -> Iterator[Tensor]:
    """The batches of two epochs of one member, as documented: fresh permutation per epoch."""
    from weightspace.zoo.population import data_order

    for epoch in (1, 2):
        yield from data_order(order, epoch, count).split(16)


@pytest.fixture
def small_images() -> ImageTask:
    """40 images of 8x8 in 3 classes."""
    from weightspace.tasks.images import ImageSplit

    generator = torch.Generator().manual_seed(0)
    splits = [
        ImageSplit(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in (32, 4, 4)
    ]
    return ImageTask("small", 3, *splits)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_from_zoo_to_networks(name: str, tmp_path: Path) -> None:
    pairs = tuple(f"{key}={value}" for key, value in SMALL[name].items() if key not in ("channels", "size"))
    config = ZooConfig(
        network=name, arguments=pairs, inits=("own",), seeds=3, unseen_seeds=1, learning_rates=(1e-3, 3e-3),
        weight_decays=(0.0, 1e-4), epochs=1, save_epochs=(0, 1), test_share=0.25, val_share=0.25, workers=1, group=4,
    )  # fmt: skip
    zoo = train_population(config, tmp_path / "zoo", 0, CPU)
    assert zoo.frame["test_acc"].between(0, 1).all() and zoo.shapes == zoo.architecture.shapes
    settings = PretrainConfig(epochs=(0, 1), steps=3, batch_size=4)
    size = AutoencoderConfig(width=8, layers=1, heads=2, feedforward=8, latent=4, components=1)
    made = pretrain(zoo, tmp_path / "rep", settings, LossConfig(queries=8), size, 0, CPU)
    test = zoo.select(split="test")
    again = made.reconstruct(test)
    for key in made.tokenizer.variances:
        assert (again.weights[key] >= 0).all()
    task = ws.load_task("digits")
    assert outputs(again, task.test.images[:32]).logits.isfinite().all()
    records, _ = reconstruct(zoo, {"made": made}, {"digits": task}, ReconstructConfig(("test",), condition=32))
    agreement = next(r["mean"] for r in records if r["metric"] == "agreement" and r["representation"] == "made")
    assert 0 <= agreement <= 1
    config = GenerateConfig(anchors=2, networks=3, bandwidths=(0.1,), condition=32)
    scores = generate(zoo, {"made": made}, {"digits": task}, config, 0).records
    # members that start alike are at no distance from one another: novelty has no scale here
    assert all(np.isfinite(record["mean"]) for record in scores if record["metric"] != "novelty")
    new = made.generate(3, ws.kde(bandwidth=0.1), zoo.select(split="train"))
    assert outputs(new, task.test.images[:32]).logits.isfinite().all()
    assert isinstance(new.network(0), type(zoo.architecture.build()))


def test_variances_do_not_fall_below_zero() -> None:
    assert len(Tokenizer(Architecture("ResNet18", SMALL["ResNet18"])).variances) == 20


def test_statistics_are_measured_on_images(
    make_checkpoints: Callable[..., Checkpoints], small_images: ImageTask
) -> None:
    """As an ordinary module in training mode measures them; conditioned networks are those that were conditioned."""
    architecture = Architecture("ResNet18", SMALL["ResNet18"] | {"classes": 3})
    checkpoints = make_checkpoints(architecture, 2)
    images = small_images.train.images
    found = conditioned(checkpoints, images)
    network = checkpoints.network(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.reset_running_stats()
            module.momentum = 1.0  # one batch: its statistics
    network(images)
    for key, value in network.state_dict().items():
        if key in found.weights:
            torch.testing.assert_close(found.weights[key][1], value)
    torch.testing.assert_close(conditioned(found, images).flat(), found.flat())
    plain = make_checkpoints(Architecture("CNN8"), 2)
    assert conditioned(plain, images) is plain
