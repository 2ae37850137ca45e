"""Zoos from elsewhere: every layout as its owners write it, hostile files, and imports that are interrupted."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from torch import Tensor, nn

from weightspace.config import ImportConfig
from weightspace.networks import architectures
from weightspace.networks.architectures import Architecture, register_network
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.fitting import Misfit, fit, natural
from weightspace.runs import RunFailed, UserError, read_lines
from weightspace.zoo import importing, untrusted
from weightspace.zoo.exporting import export_zoo
from weightspace.zoo.importing import REPORT_FILE, import_zoo
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

ANY = ImportConfig()
FIELD_KEYS = {"CNN": (0, 3, 6, 9, 11), "CNN3": (0, 4, 8, 13, 16), "LeNet5": (0, 4, 9, 12, 15)}


def state_of(name: str, seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    """Random weights of a base network under its own names."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(*s, generator=generator) for k, s in Architecture(name, arguments).shapes.items()}


def field_state(name: str, seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    """The same under the names of the field's module lists."""
    values = list(state_of(name, seed, **arguments).values())
    keys = [f"module_list.{i}.{kind}" for i in FIELD_KEYS[name] for kind in ("weight", "bias")]
    return dict(zip(keys, values, strict=True))


def ray_trial(
    root: Path, number: int, epochs: tuple[int, ...], lines: int, name: str = "CNN", long: bool = True, **arguments: Any
) -> Path:
    """A trial as Ray Tune leaves it; line i says test_acc = i / 100, whatever its epoch."""
    trial = root / f"NN_tune_trainable_abc_{number:05d}_lr=0.001"
    trial.mkdir(parents=True)
    params = {
        "model::type": name,
        "model::channels_in": 1,
        "model::o_dim": 17,  # wrong: the weights say 10
        "model::nlin": "tanh",
        "model::init_type": "kaiming_uniform",
        "optim::lr": 0.001 * (number + 1),
        "optim::wd": 1e-4,
        "seed": number % 3,
        "callbacks": ["not", "a", "scalar"],
    }
    (trial / "params.json").write_text(json.dumps(params))
    results = [{"test_acc": i / 100, "train_acc": i / 50, "training_iteration": i + 1} for i in range(lines)]
    (trial / "result.json").write_text("".join(json.dumps(line) + "\n" for line in results))
    for epoch in epochs:
        folder = trial / (f"checkpoint_{epoch:06d}" if long else f"checkpoint_{epoch}")
        folder.mkdir()
        torch.save(field_state(name, 100 * number + epoch, **arguments), folder / "checkpoints")
        torch.save({"state": {}}, folder / "optimizer")
    return trial


def rewrite(trial: Path, change: Callable[[Any], Any]) -> None:
    """Save the last checkpoint of a trial again, changed."""
    path = sorted(trial.glob("checkpoint_*/checkpoints"))[-1]
    torch.save(change(torch.load(path, weights_only=True)), path)


def row(zoo: ModelZoo, **conditions: Any) -> pd.Series:
    """The one row that fulfils some conditions."""
    return zoo.rows(**conditions).squeeze()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def reasons(folder: Path) -> dict[str, str]:
    """Path -> why it was skipped."""
    lines = read_lines(folder / REPORT_FILE)
    return {line["path"]: line["reason"] for line in lines if line["status"] == "skipped"}


# layouts


@pytest.mark.parametrize("long", [True, False])
def test_ray_tune_epochs_and_lines_belong_together(tmp_path: Path, long: bool) -> None:
    ray_trial(tmp_path / "ray", 0, (0, 1, 2), 3, long=long)  # epoch 0 was written: line i is epoch i
    ray_trial(tmp_path / "ray", 1, (1, 2), 2, long=long)  # line i is epoch i + 1
    ray_trial(tmp_path / "ray", 2, (1, 2), 3, long=long)  # epoch 0 was scored, not kept
    (zoo,) = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)
    assert zoo.architecture == Architecture("CNN", {"activation": "tanh", "channels": 1, "classes": 10})
    assert len(zoo) == 7
    assert [row(zoo, member=m, epoch=2)["test_acc"] for m in range(3)] == [0.02, 0.01, 0.02]
    first = row(zoo, member=1, epoch=1)
    assert first["learning_rate"] == 0.002 and first["init"] == "kaiming_uniform" and first["seed"] == 1
    assert first["gap"] == pytest.approx(0.0) and first["source"].startswith("NN_tune_trainable_abc_00001")
    assert "callbacks" not in zoo.frame and "training_iteration" not in zoo.frame
    network = zoo.select(member=1, epoch=2).network(0)
    expected = field_state("CNN", 102)
    for (name, value), key in zip(network.state_dict().items(), expected, strict=True):
        assert torch.equal(value, expected[key]), name


def test_wrapped_and_prefixed_state_dicts(tmp_path: Path) -> None:
    def prefixed(state: Any, prefix: str) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in state.items()}

    changes = (
        lambda s: {"model_state_dict": s, "optimizer": {"lr": 1}},
        lambda s: {"state_dict": prefixed(s, "module."), "epoch": 3},
        lambda s: {"model": prefixed(s, "module.model.")},
        lambda s: dict(reversed(prefixed(s, "_orig_mod.").items())),
    )
    for number, change in enumerate(changes):
        rewrite(ray_trial(tmp_path / "ray", number, (1,), 1), change)
    (zoo,) = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)
    for member in range(4):
        found = zoo.select(member=member).flat()[0]
        assert torch.equal(found, torch.cat([v.flatten() for v in field_state("CNN", 100 * member + 1).values()]))


def test_samples_are_detokenized(tmp_path: Path) -> None:
    architecture = Architecture("CNN", {"activation": "gelu"})
    for split, number in (("trainset", 0), ("trainset", 1), ("valset", 2), ("testset", 3)):
        state, size, tokens = state_of("CNN", number), 64, []
        for layer in ("conv1", "conv2", "conv3", "fc1", "fc2"):  # row by row, as the field's preprocessing does
            for unit in range(len(state[f"{layer}.weight"])):
                values = [*state[f"{layer}.weight"][unit].flatten().tolist(), float(state[f"{layer}.bias"][unit])]
                for start in range(0, len(values), size):
                    tokens.append(values[start : start + size])
        w = torch.tensor([piece + [0.0] * (size - len(piece)) for piece in tokens])
        m = torch.tensor([[True] * len(piece) + [False] * (size - len(piece)) for piece in tokens])
        folder = tmp_path / "source" / f"dataset_torch.{split}"
        folder.mkdir(parents=True, exist_ok=True)
        props = {"test_acc": torch.tensor(0.1 * number), "epoch": 25, "path": f"trial-{number}"}
        torch.save({"w": w, "m": m, "p": torch.zeros(len(w), 3), "props": props}, folder / f"sample_{number}.pt")
    named = ImportConfig(network="CNN", arguments=("activation=gelu",))
    (zoo,) = import_zoo(str(tmp_path / "source"), tmp_path / "zoo", named)
    assert zoo.architecture.name == "CNN" and zoo.architecture.arguments["activation"] == "gelu"
    assert zoo.frame.set_index("source")["split"].to_dict() == {
        "trial-0": "train",
        "trial-1": "train",
        "trial-2": "val",
        "trial-3": "test",
    }
    third = zoo.select("source == 'trial-3'")
    assert torch.equal(third.flat()[0], torch.cat([value.flatten() for value in state_of("CNN", 3).values()]))
    assert third.frame["test_acc"].item() == pytest.approx(0.3) and third.frame["epoch"].item() == 25
    assert str(architecture) == "CNN(activation='gelu')"
    with pytest.raises(UserError, match="name it with --network"):
        import_zoo(str(tmp_path / "source"), tmp_path / "unnamed", ANY)
    with pytest.raises(UserError, match=r"2,464 weights, but LeNet5.* has 62,006"):
        import_zoo(str(tmp_path / "source"), tmp_path / "wrong", ImportConfig(network="LeNet5"))


def test_small_cnn_zoo_computes_what_its_kernels_say(tmp_path: Path) -> None:
    rng, source = np.random.default_rng(0), tmp_path / "source"
    source.mkdir()
    shapes = {"conv2d": (3, 3, 1, 16), "conv2d_1": (3, 3, 16, 16), "conv2d_2": (3, 3, 16, 16), "dense": (16, 10)}
    rows, start = [], 0
    for layer, shape in shapes.items():
        for kind, size in (("bias", shape[-1:]), ("kernel", shape)):
            end = start + int(np.prod(size))
            rows.append(
                {"varname": f"sequential/{layer}/{kind}:0", "start_idx": start, "end_idx": end, "shape": str(size)}
            )
            start = end
    pd.DataFrame(rows).to_csv(source / "layout.csv", index=False)
    weights = rng.normal(size=(3, start)).astype(np.float32) / 4
    np.save(source / "weights.npy", weights)
    metrics = {
        "config.activation": ["relu", "tanh", "relu"],
        "config.l2reg": [0.1, 0.2, 0.3],
        "modeldir": ["a", "b", "a"],
        "step": [86, 86, 60],
        "test_accuracy": [0.5, 0.25, 0.75],
        "train_accuracy": [0.75, 0.5, 1.0],
    }
    with gzip.open(source / "metrics.csv.gz", "wt") as file:
        pd.DataFrame(metrics).to_csv(file)
    zoos = import_zoo(str(source), tmp_path / "zoo", ANY)
    assert [zoo.architecture.arguments["activation"] for zoo in zoos] == ["relu", "tanh"]
    assert start == 4970 == zoos[0].architecture.parameter_count
    chosen = zoos[0].select(epoch=60)
    assert chosen.frame[["test_acc", "gap", "weight_decay"]].iloc[0].tolist() == [0.75, 0.25, 0.3]
    image = rng.normal(size=(7, 7, 1)).astype(np.float32)
    x, flat, at = image, weights[2], 0
    for shape in list(shapes.values())[:3]:  # "valid" convolution with stride 2, by its definition
        bias, at = flat[at : at + shape[-1]], at + shape[-1]
        kernel, at = flat[at : at + int(np.prod(shape))].reshape(shape), at + int(np.prod(shape))
        size = (x.shape[0] - 3) // 2 + 1
        if size < 1:
            x = np.pad(x, ((0, 3 - x.shape[0]), (0, 3 - x.shape[1]), (0, 0)))
            size = 1
        out = np.zeros((size, size, 16), np.float32)
        for i in range(size):
            for j in range(size):
                out[i, j] = np.einsum("hwc,hwco->o", x[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel) + bias
        x = np.maximum(out, 0)
    network = chosen.network(0)
    assert isinstance(network, architectures.SmallCNN)
    first = torch.relu(network.conv1(torch.from_numpy(image).permute(2, 0, 1)[None]))
    second = torch.relu(network.conv2(first))
    third = torch.relu(network.conv3(nn.functional.pad(second, (0, 2, 0, 2))))
    assert torch.allclose(third.flatten(), torch.from_numpy(x).flatten(), atol=1e-5)
    assert torch.equal(network.fc.weight, torch.from_numpy(flat[at + 10 :].reshape(16, 10).T.copy()))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_directory_with_a_table(tmp_path: Path, ending: str) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    torch.save(state_of("CNN8", 1), source / "a_epoch_2.pt")
    torch.save(state_of("CNN8", 2), source / "a_epoch_10.pth")
    torch.save(state_of("CNN8", 3), source / "deep" / "b.bin")
    save_file(state_of("CNN8", 4), source / "deep" / "c.safetensors")
    table = pd.DataFrame(
        {"file": ["a_epoch_2", "deep/b.bin", "c.safetensors"], "test acc": [0.5, 0.6, 0.7], "dog": ["x", "y", "z"]}
    )
    if ending == "csv":
        table.to_csv(source / "properties.csv", index=False)
    elif ending == "jsonl":
        table.to_json(source / "properties.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(source / "properties.parquet")
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", ImportConfig(task="digits"))
    assert zoo.architecture.name == "CNN8" and zoo.tasks == ("digits",)
    frame = zoo.frame.set_index(["source", "epoch"])
    assert set(frame.index) == {("a", 2), ("a", 10), ("deep/b", 0), ("deep/c", 0)}
    assert frame.loc[("deep/b", 0), "test_acc"] == 0.6 and frame.loc[("deep/c", 0), "dog"] == "z"
    assert frame.loc[("a", 10), ["test_acc", "dog"]].isna().all()
    assert frame["split"].value_counts().to_dict() == {"train": 2, "val": 1, "test": 1} or len(zoo) == 4
    notes = {line["path"]: line.get("notes") for line in read_lines(tmp_path / "zoo" / REPORT_FILE)}
    assert notes["a_epoch_10.pth"] == [f"properties.{ending} has no row for it"] and notes["a_epoch_2.pt"] is None


def test_hub_snapshots(tmp_path: Path) -> None:
    for number, owner in enumerate(("ada", "bob")):
        folder = tmp_path / "source" / owner / "net"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 3 + number, "activation": "tanh", "x": [1]}))
        state = state_of("MLP", number, size=4)
        if owner == "ada":
            save_file(state, folder / "model.safetensors")
        else:  # in two shards
            names = list(state)
            save_file({name: state[name] for name in names[:2]}, folder / "model-00001-of-00002.safetensors")
            save_file({name: state[name] for name in names[2:]}, folder / "model-00002-of-00002.safetensors")
            places = {name: f"model-0000{1 + (i >= 2)}-of-00002.safetensors" for i, name in enumerate(names)}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        metrics = [{"type": "accuracy", "value": 0.5 + 0.1 * number}, {"type": "words", "value": "many"}]
        card = {"model-index": [{"name": "n", "results": [{"task": {}, "metrics": metrics}]}]}
        (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n# A card\n")
    (zoo,) = import_zoo(str(tmp_path / "source"), tmp_path / "zoo", ANY)
    assert zoo.architecture == Architecture(
        "MLP", {"activation": "tanh", "channels": 1, "classes": 10, "hidden": 32, "size": 4}
    )
    assert zoo.frame["source"].tolist() == ["ada/net", "bob/net"]
    assert zoo.frame["accuracy"].tolist() == [0.5, 0.6] and zoo.frame["hidden_size"].tolist() == [3, 4]
    assert torch.equal(
        zoo.read(zoo.frame).flat()[1], torch.cat([v.flatten() for v in state_of("MLP", 1, size=4).values()])
    )
    (alone,) = import_zoo(str(tmp_path / "source" / "ada" / "net"), tmp_path / "alone", ANY)
    assert len(alone) == 1
    index = tmp_path / "source" / "bob" / "net" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc1.weight": "../../ada/net/model.safetensors"}}))
    (again,) = import_zoo(str(tmp_path / "source"), tmp_path / "again", ANY)
    assert len(again) == 1 and "no file of its own folder" in reasons(tmp_path / "again")["bob/net"]


@pytest.mark.parametrize("layout", ["ray-tune", "directory", "weightspace"])
def test_round_trips_are_exact(tiny_zoo: ModelZoo, tmp_path: Path, layout: str) -> None:
    export_zoo(tiny_zoo, tmp_path / "out", layout)
    if layout == "weightspace":
        back = ModelZoo.open(tmp_path / "out")
    else:
        (back,) = import_zoo(str(tmp_path / "out"), tmp_path / "back", ANY)
    assert back.architecture == tiny_zoo.architecture and back.tasks == tiny_zoo.tasks
    ours, theirs = tiny_zoo.read(tiny_zoo.frame), back.read(back.frame)
    assert torch.equal(ours.flat(), theirs.flat())
    pd.testing.assert_frame_equal(theirs.frame[ours.frame.columns], ours.frame)
    assert back.frame["digest"].tolist() == tiny_zoo.frame["digest"].tolist()


def test_the_fields_own_code_reads_an_export(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    architecture = Architecture("CNN3", {"classes": 7, "channels": 3})
    weights = {name: value[None] for name, value in state_of("CNN3", classes=7).items()}
    frame = pd.DataFrame({"member": [4], "epoch": [2], "split": ["train"], "task": ["street"], "test_acc": [0.25]})
    writer = ZooWriter(tmp_path / "zoo", architecture, {})
    writer.write(0, Checkpoints(architecture, weights, frame.assign(learning_rate=0.1, seed=3)))
    export_zoo(writer.finish([0]), tmp_path / "out", "ray-tune")
    trial = tmp_path / "out" / "NN_tune_trainable_00004"
    params = json.loads((trial / "params.json").read_text())
    assert params["model::type"] == "CNN3" and params["model::o_dim"] == 7 and params["seed"] == 3
    lines = [json.loads(line) for line in (trial / "result.json").read_text().splitlines()]
    assert len(lines) == 3 and lines[2]["test_acc"] == 0.25 and lines[2]["training_iteration"] == 2
    state = torch.load(trial / "checkpoint_000002" / "checkpoints", weights_only=True)
    assert list(state) == [f"module_list.{i}.{kind}" for i in FIELD_KEYS["CNN3"] for kind in ("weight", "bias")]


def test_export_chooses_and_refuses(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    export_zoo(tiny_zoo, tmp_path / "less", "weightspace", "epoch == 2 and learning_rate > 0.002")
    less = ModelZoo.open(tmp_path / "less")
    assert len(less) == 9 and set(less.frame["epoch"]) == {2}
    with pytest.raises(UserError, match=r"no checkpoint of .* fulfils epoch == 77"):
        export_zoo(tiny_zoo, tmp_path / "none", "weightspace", "epoch == 77")
    with pytest.raises(UserError, match="unknown layout 'zip'; zoos are written as weightspace, ray-tune, directory"):
        export_zoo(tiny_zoo, tmp_path / "none", "zip")
    assert not (tmp_path / "none").exists()


# what fits


def test_shapes_say_the_base_network() -> None:
    for name, arguments in (
        ("CNN", {"channels": 1, "classes": 10}),
        ("CNN3", {"channels": 3, "classes": 10}),
        ("CNN8", {"channels": 1, "classes": 26}),
        ("LeNet5", {"channels": 1, "classes": 100}),
        ("SmallCNN", {"channels": 1, "classes": 10, "hidden": 16}),
        ("MLP", {"channels": 3, "size": 8, "hidden": 20, "classes": 5}),
    ):
        shapes = Architecture(name, arguments).shapes
        keys = [f"features.{i}" for i in range(len(shapes))]  # 10 comes after 9
        renamed = dict(zip(keys, shapes.values(), strict=True))
        for order in (renamed, dict(sorted(renamed.items()))):
            found = fit(order, None, {})
            assert found.architecture == Architecture(name, arguments)
            assert list(found.names.values()) == sorted(keys, key=natural)


SMALL = {
    "ResNet18": {"width": 2},
    "ViT": {"width": 8, "heads": 2, "depth": 2, "size": 16},
    "MLPMixer": {"width": 8, "depth": 1, "patch": 8},
    "SIREN": {"outputs": 3},
}
"""Arguments of base networks whose own are too large, or tell less."""


@pytest.mark.parametrize("name", sorted(architectures.NETWORKS))
@pytest.mark.parametrize("layout", ["ray-tune", "directory", "safetensors"])
def test_every_network_comes_back(tmp_path: Path, layout: str, name: str) -> None:
    arguments = {"size": 3} if name == "MLP" else SMALL.get(name, {"classes": 7, "dropout": 0.5})
    architecture = Architecture(name, arguments)
    weights = {key: value[None] for key, value in state_of(name, **arguments).items()}
    frame = pd.DataFrame({"member": [0], "epoch": [1], "split": ["train"], "task": ["street"]})
    writer = ZooWriter(tmp_path / "zoo", architecture, {})
    writer.write(0, Checkpoints(architecture, weights, frame))
    export_zoo(writer.finish([0]), tmp_path / "out", "directory" if layout == "safetensors" else layout)
    config = ANY
    if layout == "safetensors":  # nothing says the base network or its arguments
        (tmp_path / "out" / "properties.parquet").unlink()
        unseen = [f"heads={arguments['heads']}"] if name == "ViT" else []
        config = ImportConfig(network=name, arguments=tuple(unseen))
    (back,) = import_zoo(str(tmp_path / "out"), tmp_path / "back", config)
    assert back.architecture.build().state_dict().keys() == architecture.build().state_dict().keys()
    assert back.architecture.shapes == architecture.shapes
    if layout != "safetensors":
        assert back.architecture == architecture and back.architecture.arguments.items() >= arguments.items()
    assert torch.equal(back.read(back.frame).flat(), torch.cat([value.flatten() for value in weights.values()])[None])


def test_what_is_said_of_a_network_is_not_overruled() -> None:
    shapes = Architecture("MLP", {"channels": 3, "size": 4}).shapes
    said = {"channels": 3, "size": 4, "activation": "tanh"}
    assert fit(shapes, "MLP", said).architecture.arguments.items() >= said.items()
    with pytest.raises(Misfit, match=r"not a MLP\(.*size=5.*fc1.weight is 32x48, needed 32x75"):
        fit(shapes, "MLP", {"channels": 3, "size": 5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"conv2.weight": (32, 8, 3, 3)}, "conv2.weight is 32x8x3x3, needed 32x16x3x3"),
        (lambda s: s | {"extra": (3,)}, "extra 3 is left over"),
        (
            lambda s: {k: v for k, v in s.items() if k != "fc2.bias"},
            "fc2.bias 10 is missing .10,843 values, needed 10,853",
        ),
    ],
)
def test_misfits_are_told_tensor_by_tensor(change: Callable[[Any], Any], message: str) -> None:
    shapes = change(Architecture("CNN3").shapes)
    with pytest.raises(Misfit, match=message):
        fit(shapes, "CNN3", {"channels": 3} if "extra" not in shapes else {})
    if "extra" in shapes:
        with pytest.raises(Misfit, match="fits none of the base networks"):
            fit(shapes, None, {})


def test_several_architectures_become_several_zoos(tmp_path: Path) -> None:
    for number in range(4):
        ray_trial(tmp_path / "ray", number, (1,), 1, name=("CNN", "CNN3")[number % 2])
    strict = ImportConfig(strict=True)
    with pytest.raises(RunFailed, match=r"2 architectures are there .CNN\(.*CNN3\("):
        import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", strict)
    zoos = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)  # goes on with what was read
    assert sorted(zoo.architecture.name for zoo in zoos) == ["CNN", "CNN3"]
    assert sorted(zoos[0].frame["member"]) == [0, 2] and sorted(zoos[1].frame["member"]) == [1, 3]


def test_a_network_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(width=4):\n"
        "    made = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(width, 10))\n"
        "    made.input_shape = (1, 8, 8)\n"
        "    return made\n"
        "shape = (1, 8, 8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(architectures, "NETWORKS", dict(architectures.NETWORKS))
    monkeypatch.delenv(architectures.TRUSTED, raising=False)
    named = ImportConfig(network="mine:net", arguments=("width=6",))
    source = tmp_path / "source"
    source.mkdir()
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10))
    torch.save(layers.state_dict(), source / "one.pt")
    with pytest.raises(UserError, match=r"'mine:net' is code of another package; .*WEIGHTSPACE_NETWORKS=mine:net"):
        import_zoo(str(source), tmp_path / "zoo", named)
    with pytest.raises(UserError, match="no base network 'mine:other'"):
        register_network("mine:other")
    with pytest.raises(UserError, match="mine:shape is no factory of networks but a tuple"):
        register_network("mine:shape")
    register_network("mine:net")
    assert os.environ[architectures.TRUSTED] == "mine:net"
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", named)
    network = zoo.read(zoo.frame).network(0)
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(network(images), layers.eval()(images))
    monkeypatch.delitem(architectures.NETWORKS, "mine:net")
    monkeypatch.delenv(architectures.TRUSTED)
    opened = ModelZoo.open(tmp_path / "zoo")  # its table can be read without running anything
    with pytest.raises(UserError, match="if you trust it"):
        opened.read(opened.frame)
    monkeypatch.setenv(architectures.TRUSTED, "other:net,mine:net")
    assert len(opened.read(opened.frame)) == 1


def test_a_network_of_the_user_that_does_not_say_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_zoo: ModelZoo
) -> None:
    (tmp_path / "yours.py").write_text(
        "from torch import nn\n"
        "def net(width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(architectures, "NETWORKS", dict(architectures.NETWORKS))
    monkeypatch.delenv(architectures.TRUSTED, raising=False)
    register_network("yours:net")
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 10))
        torch.save(network.state_dict(), source / f"net{number}.pt")
    with pytest.raises(
        UserError, match=r"does not say what it takes; .*argument of the network: input_shape=\[3,32,32"
    ):
        import_zoo(str(source), tmp_path / "zoo", ImportConfig(network="yours:net"))
    for wrong in ("input_shape=8", "input_shape=[1,8]", 'input_shape=["1",8,8]'):
        with pytest.raises(UserError, match=r"input_shape=.*: give \[channels, height, width\]"):
            import_zoo(str(source), tmp_path / "zoo", ImportConfig(network="yours:net", arguments=(wrong,)))
    with pytest.raises(UserError, match="CNN8 takes no argument 'input_shape'"):
        import_zoo(str(source), tmp_path / "zoo", ImportConfig(network="CNN8", arguments=("input_shape=[1,8,8]",)))
    assert not (tmp_path / "zoo").exists()
    named = ImportConfig(network="yours:net", arguments=("input_shape=[1,8,8]",), task="digits", score=True)
    import_zoo(str(source), tmp_path / "zoo", named)
    zoo = ModelZoo.open(tmp_path / "zoo")
    assert len(zoo) == 3 and zoo.frame["test_acc"].between(0, 1).all()
    assert zoo.architecture.build().input_shape == (1, 8, 8)


# hostile and damaged


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    source, touched = tmp_path / "source", tmp_path / "touched"
    source.mkdir()
    torch.save({"weights": Evil(touched)}, source / "evil.pt")
    (source / "old.pt").write_bytes(pickle.dumps(Evil(touched)))
    torch.save(nn.Linear(2, 2), source / "whole.pt")
    torch.save(state_of("CNN8"), source / "good.pt")
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", ANY)
    assert len(zoo) == 1 and not touched.exists()
    found = reasons(tmp_path / "zoo")
    assert "needs the class posix.system" in found["evil.pt"] and "posix.system" in found["old.pt"]
    assert "torch.nn.modules.linear.Linear" in found["whole.pt"] and "state_dict" in found["whole.pt"]
    (source / "dataset.pt").write_bytes(pickle.dumps(Evil(touched)))
    only = tmp_path / "only"
    only.mkdir()
    (only / "dataset.pkl").write_bytes(pickle.dumps(Evil(touched)))
    with pytest.raises(UserError, match=r"dataset.pkl is a pickled data set, which is never executed"):
        import_zoo(str(only), tmp_path / "zoo2", ANY)
    assert not touched.exists() and not (tmp_path / "zoo2").exists()


def rewritten(path: Path, kind: int = zipfile.ZIP_STORED, **changed: bytes) -> None:
    """Pack a file of torch.save again, with other records and another compression."""
    with zipfile.ZipFile(path) as plain:
        records = {entry.filename: plain.read(entry) for entry in plain.infolist()}
    with zipfile.ZipFile(path, "w", kind) as packed:
        for name, content in records.items():
            packed.writestr(name, changed.get(name.rpartition("/")[2], content))


ALIKE: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda x: {"a": x.clone(), "b": x[0].clone()},
    "wrapped": lambda x: {"epoch": 3, "state_dict": {"module.a": x.clone()}, "optimizer": {"step": x[1].clone()}},
    "parts of one tensor": lambda x: {"a": x[0], "b": x[2:, 1:2], "c": x[1, 1]},
    "tied": lambda x: {"a": x, "b": x},
    "transposed": lambda x: {"a": x.T.clone().T},
    "other types": lambda x: {"a": x.half(), "b": x.bfloat16(), "c": x.double(), "n": torch.arange(3)},
    "nothing": lambda x: {"a": x[:0].clone(), "b": x.clone()},
    "parameters": lambda x: nn.Linear(5, 4).requires_grad_(bool(x[0, 0] > -9)).state_dict(),
}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("packing", ["as saved", "old", "packed", "shifted", "big"])
def test_every_file_of_torch_is_read_as_torch_reads_it(tmp_path: Path, kind: str, packing: str) -> None:
    for seed in range(3):
        path = tmp_path / f"net{'x' * seed}.pt"  # its length moves the records
        content = ALIKE[kind](torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)))
        torch.save(content, path, _use_new_zipfile_serialization=packing != "old")
        if packing in ("packed", "shifted"):
            rewritten(path, zipfile.ZIP_DEFLATED if packing == "packed" else zipfile.ZIP_STORED)
        if packing == "big":
            rewritten(path, byteorder=b"big")
        expected = untrusted.unwrapped(torch.load(path, weights_only=True))
        found = untrusted.read_state(path)
        assert list(found) == list(expected)
        for name, tensor in expected.items():  # swapped bytes may be no numbers
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_odd_files_of_torch_are_no_others(tmp_path: Path) -> None:
    """What differs from what torch.save writes is read, or refused, as torch does it."""
    path, state = tmp_path / "net.pt", {"a": torch.arange(6.0), "b": -torch.arange(6.0)}
    torch.save(state, path)
    whole = path.read_bytes()
    assert untrusted._read_alike(path) is not None
    key = b"\x01\x00\x00\x00"  # of a text of one letter
    flipped = whole.replace(key + b"0q", key + b"1q", 1)  # the pickle names another record, its checksum is the old one
    assert flipped != whole
    for content in (
        flipped,
        b"front".ljust(64) + whole,
        whole[:-30],
        whole.replace(b"net/byteorder", b"net/ByteOrder"),
    ):
        path.write_bytes(content)
        assert untrusted._read_alike(path) is None
    path.write_bytes(pickle.dumps(bytearray(8)) + whole[-22:])  # an old file with the end of an archive behind it
    with pytest.raises(untrusted.Unreadable, match=r"builtins\.bytearray"):
        untrusted.read_state(path)


def test_one_pickle_of_many_checkpoints_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(untrusted.torch, "load", lambda *_, load=torch.load, **how: ran.append(1) or load(*_, **how))
    untrusted._places.cache_clear()
    for seed in range(4):
        torch.save(state_of("CNN8", seed), tmp_path / f"net{seed}.pt")
        assert torch.equal(
            untrusted.read_state(tmp_path / f"net{seed}.pt")["fc1.bias"], state_of("CNN8", seed)["fc1.bias"]
        )
    assert len(ran) == 1
    cut = tmp_path / "cut.pt"
    torch.save(state_of("CNN8", 5), cut)
    rewritten(cut, **{"2": b"short"})  # one record is not what the pickle needs
    with pytest.raises(untrusted.Unreadable, match="damaged"):
        untrusted.read_state(cut)


def test_unusable_and_double_checkpoints(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    good, huge, broken = state_of("CNN8", 1), state_of("CNN8", 2), state_of("CNN8", 3)
    huge["fc2.bias"][0] = 1e5
    broken["conv1.weight"][0, 0, 0] = torch.tensor([float("nan"), float("inf"), 0.0])
    for name, state in (("a", good), ("b", good), ("c", huge), ("d", broken), ("e", state_of("CNN8", 4))):
        torch.save(state, source / f"{name}.pt")
    (source / "f.pt").write_bytes((source / "e.pt").read_bytes()[:5000])
    (source / "g.safetensors").write_bytes(b"\xff" * 100)
    (source / "h.pt").symlink_to(source / "a.pt")
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", ANY)
    assert zoo.frame["source"].tolist() == ["a", "e"]
    found = reasons(tmp_path / "zoo")
    assert found["b.pt"] == "the same weights were read before"
    assert found["c.pt"] == "a weight is 1e+05, over 10,000"
    assert found["d.pt"] == "2 of 2,758 weights are not finite"
    assert "damaged" in found["f.pt"] and "damaged" in found["g.safetensors"] and "h.pt" not in found
    kept = ImportConfig(keep_unusable=True, keep_duplicates=True)
    (whole,) = import_zoo(str(source), tmp_path / "whole", kept)
    assert whole.frame["source"].tolist() == ["a", "b", "c", "d", "e"]


def test_members_may_start_alike(tmp_path: Path) -> None:
    for number in range(2):
        trial = ray_trial(tmp_path / "ray", number, (0, 1), 2)
        torch.save(field_state("CNN", 7), trial / "checkpoint_000000" / "checkpoints")
    (zoo,) = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)
    assert len(zoo) == 4 and zoo.frame["digest"].nunique() == 3


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save({"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, source / "claims.pt")
    content = io.BytesIO()
    torch.save(state_of("CNN8"), content)
    with zipfile.ZipFile(content) as plain, zipfile.ZipFile(source / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
        packed.writestr("archive/data/99", b"\0" * 10**8)
    with pytest.raises(UserError, match=r"claims the shape .1000000, 1000000.") as caught:
        import_zoo(str(source), tmp_path / "zoo", ANY)
    assert "its records unpack to 100," in str(caught.value)


def test_odd_tensors_cost_their_own_file_only(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state_of("CNN8", 1), source / "good.pt")
    odd = state_of("CNN8", 2)
    torch.save({**odd, "fc1.weight": odd["fc1.weight"].to("meta")}, source / "meta.pt")
    torch.save({**odd, "fc1.weight": odd["fc1.weight"].to_sparse()}, source / "sparse.pt")
    with warnings.catch_warnings(action="ignore"):
        nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)
    torch.save({**odd, "fc1.weight": nested}, source / "nested.pt")
    torch.save({"model_state_dict": state_of("CNN8", 3), "loss": torch.tensor(0.5)}, source / "wrapped.pt")
    torch.save({"x": "much", "y": bytearray(8)}, source / "room.pt")
    shared: list[Any] = [torch.zeros(1)]
    for _ in range(7):
        shared = [shared] * 100  # 10^14 ways to its end
    torch.save({"state_dict": state_of("CNN8", 4), "lists": shared}, source / "shared.pt")
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", ANY)
    assert sorted(zoo.frame["source"]) == ["good", "shared", "wrapped"]
    found = reasons(tmp_path / "zoo")
    assert set(found) == {"meta.pt", "sparse.pt", "nested.pt", "room.pt"}
    assert "builtins.bytearray" in found["room.pt"] and "fits none of the base networks" in found["meta.pt"]


def test_checkpoints_of_one_place_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name, seed in (("a/net.pt", 1), ("b/net.pt", 2), ("epoch_1.pt", 3), ("epoch_2.pt", 4)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state_of("CNN8", seed), source / name)
    pd.DataFrame({"file": ["./a/net.pt", "net.pt"], "test_acc": [0.1, 0.9]}).to_csv(source / "table.csv", index=False)
    (zoo,) = import_zoo(str(source), tmp_path / "zoo", ANY)
    said = zoo.frame.set_index(["source", "epoch"])["test_acc"]
    assert said["a/net", 0] == 0.1 and said.isna().sum() == 3  # "net.pt" may be either of two
    assert zoo.rows(source="source")["epoch"].tolist() == [1, 2]  # one member, named after the folder
    pd.DataFrame({"file": ["a/net.pt", "b/net.pt"], "member": [7, 7]}).to_csv(source / "table.csv", index=False)
    (zoo,) = import_zoo(str(source), tmp_path / "second", ANY)
    assert len(zoo) == 3
    assert "'7' has another checkpoint without an epoch; say the epochs" in reasons(tmp_path / "second")["b/net.pt"]
    pd.DataFrame({"file": ["a/net.pt", "a/net.pt"]}).to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match=r"several rows for a/net\.pt"):
        import_zoo(str(source), tmp_path / "third", ANY)


def test_an_export_never_writes_one_checkpoint_over_another(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    checkpoints = tiny_zoo.read(tiny_zoo.frame.iloc[[0, 1]])
    twice = checkpoints.frame.assign(member=3, epoch=[1, 1])
    writer = ZooWriter(tmp_path / "zoo", checkpoints.architecture, {})
    writer.write(0, Checkpoints(checkpoints.architecture, checkpoints.weights, twice))
    zoo = writer.finish([0])
    with pytest.raises(UserError, match="several checkpoints of member 3 at epoch 1"):
        export_zoo(zoo, tmp_path / "out", "directory")
    export_zoo(zoo, tmp_path / "whole", "weightspace")
    frame = twice.assign(epoch=[1, 10**9])
    writer = ZooWriter(tmp_path / "late", checkpoints.architecture, {})
    writer.write(0, Checkpoints(checkpoints.architecture, checkpoints.weights, frame))
    with pytest.raises(UserError, match="a line per epoch up to 1,000,000,000"):
        export_zoo(writer.finish([0]), tmp_path / "ray", "ray-tune")


def test_position_decides_only_beyond_doubt() -> None:
    norms = {f"body.{i}.{kind}": (8,) for i in (1, 4) for kind in ("bias", "running_mean", "running_var", "weight")}
    wanted = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    architectures.NETWORKS["Norms"] = lambda: wanted
    try:
        found = fit(norms, "Norms", {})
        assert found.names["0.weight"] == "body.1.weight" and found.names["1.running_var"] == "body.4.running_var"
        words = {name.replace("4", "last").replace("1", "first"): shape for name, shape in norms.items()}
        with pytest.raises(Misfit, match="not a Norms"):
            fit(words, "Norms", {})
    finally:
        del architectures.NETWORKS["Norms"]


def pack(path: Path, entries: dict[str, bytes | None], kind: bytes = tarfile.REGTYPE) -> Path:
    """A tar archive; an entry without content is a link of some kind."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries.items():
            item = tarfile.TarInfo(name)
            if content is None:
                item.type, item.linkname = kind, "/etc/passwd"
                archive.addfile(item)
            else:
                item.size = len(content)
                archive.addfile(item, io.BytesIO(content))
    return path


def saved(seed: int = 0) -> bytes:
    """A checkpoint as torch.save writes it."""
    content = io.BytesIO()
    torch.save(state_of("CNN8", seed), content)
    return content.getvalue()


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_archives_are_unpacked(tmp_path: Path, ending: str) -> None:
    names = {"zoo/a.pt": saved(1), "zoo/b.pt": saved(2)}
    if ending == ".zip":
        with zipfile.ZipFile(tmp_path / "zoo.zip", "w") as archive:
            for name, content in names.items():
                archive.writestr(name, content)
    else:
        pack(tmp_path / "zoo.tar.gz", names)
    (zoo,) = import_zoo(str(tmp_path / f"zoo{ending}"), tmp_path / "out", ANY)
    assert zoo.frame["source"].tolist() == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock") == [
        "checkpoints.parquet",
        "report.jsonl",
        "stage.json",
        "weights-00000.safetensors",
        "zoo.json",
    ]
    with pytest.raises(UserError, match="unpacks to over 1,000 bytes; raise --max-bytes"):
        import_zoo(str(tmp_path / f"zoo{ending}"), tmp_path / "small", ImportConfig(max_bytes=1000))


@pytest.mark.parametrize(
    "name", ["../out.pt", "/tmp/weightspace-escaped.pt", "a/../../out.pt", "C:/out.pt", "a\\..\\..\\o"]
)
def test_no_archive_leaves_its_folder(tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / "evil.tar.gz", {"good.pt": saved(), name: saved()})
    with pytest.raises(UserError, match=r"which leaves its folder|unpacks to over"):
        import_zoo(str(archive), tmp_path / "deep" / "zoo", ANY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "evil.tar.gz"]
    assert not Path("/tmp/weightspace-escaped.pt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out(tmp_path: Path, kind: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    archive = pack(tmp_path / "evil.tar.gz", {"zoo/good.pt": saved(), "zoo/link.pt": None}, kind)
    (zoo,) = import_zoo(str(archive), tmp_path / "zoo", ANY)
    assert len(zoo) == 1 and "zoo/link.pt: a link or device, left out" in capsys.readouterr().err


def test_damaged_archives_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"nothing"))
    for name in ("a.zip", "b.tar.gz"):
        with pytest.raises(UserError, match="damaged, or no archive"):
            import_zoo(str(tmp_path / name), tmp_path / "zoo", ANY)
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state_of("CNN8"), source / "a.pt")
    (source / "x.csv").write_text("other,columns\n1,2\n")
    with pytest.raises(UserError, match=r"x.csv has no column that names the files; call it 'file'"):
        import_zoo(str(source), tmp_path / "zoo", ANY)
    (source / "y.csv").write_text("file\na.pt\n")
    with pytest.raises(UserError, match=r"several tables .x.csv, y.csv."):
        import_zoo(str(source), tmp_path / "zoo", ANY)
    (source / "x.csv").unlink()
    assert len(import_zoo(str(source), tmp_path / "zoo", ANY)[0]) == 1


def test_damaged_notes_of_pandas_are_told(tmp_path: Path) -> None:
    """Found by fuzzing: pyarrow raises a KeyError."""
    table = pyarrow.Table.from_pandas(pd.DataFrame({"file": ["net"]}))
    notes = table.schema.metadata[b"pandas"].replace(b"numpy_type", b"numpy_tipe")
    parquet.write_table(table.replace_schema_metadata({b"pandas": notes}), tmp_path / "t.parquet")
    with pytest.raises(untrusted.Unreadable, match="what pandas noted in it is damaged"):
        untrusted.read_table(tmp_path / "t.parquet")


def test_bombs_in_tables_headers_and_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.pt").write_bytes(saved())
    columns = {f"c{i}": np.zeros(10**6, np.int8) for i in range(30)}
    pd.DataFrame({"file": "a.pt", **columns}).to_parquet(source / "t.parquet")
    with pytest.raises(UserError, match="1,000,000 rows and 31,000,000 cells"):
        import_zoo(str(source), tmp_path / "zoo", ANY)
    with tarfile.open(tmp_path / "long.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        item = tarfile.TarInfo("a.pt")
        item.pax_headers = {"comment": "x" * (untrusted.LARGEST_HEADER + 1)}
        archive.addfile(item)
    with pytest.raises(UserError, match=r"has a header of 16,\d"):
        import_zoo(str(tmp_path / "long.tar.gz"), tmp_path / "zoo", ANY)
    monkeypatch.setattr(untrusted, "MOST_ENTRIES", 1)
    with pytest.raises(UserError, match="holds more than 1 files"):
        import_zoo(str(pack(tmp_path / "many.tar.gz", {"a": b"", "b": b""})), tmp_path / "zoo", ANY)


def test_damaged_trials_are_reported(tmp_path: Path) -> None:
    ray_trial(tmp_path / "ray", 0, (1, 2), 2)
    second = ray_trial(tmp_path / "ray", 1, (1, 2), 1)
    (second / "params.json").write_text("{")
    third = ray_trial(tmp_path / "ray", 2, (1,), 2)
    (third / "result.json").write_text('{"test_acc": 0.5}\n{"test_ac')
    (third / "checkpoint_000001" / "checkpoints").unlink()
    ray_trial(tmp_path / "ray", 3, (), 1)
    (zoo,) = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ImportConfig(arguments=("activation=tanh",)))
    assert len(zoo) == 4
    lines = {line["path"]: line for line in read_lines(tmp_path / "zoo" / REPORT_FILE)}
    assert len(lines) == 6
    end = f"{second.name}/checkpoint_000002/checkpoints"
    assert "params.json: " in lines[end]["notes"][0] and lines[end]["notes"][1] == "result.json has no line for epoch 2"
    assert lines[f"{third.name}/checkpoint_000001/checkpoints"]["reason"] == "No such file or directory"
    assert any(line.get("reason") == "it has no checkpoint folder" for line in lines.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ImportConfig(layout="zip"),
            "unknown layout 'zip'; the layouts are ray-tune, samples, small-cnn, hub, directory",
        ),
        (ImportConfig(layout="small-cnn"), "cannot be read as small-cnn: "),
        (ImportConfig(epochs=(1, 7)), r"the source has no epochs \[7\], but \[1, 2\]"),
        (ImportConfig(arguments=("tanh",)), "write arguments of the base network as NAME=VALUE, given 'tanh'"),
        (ImportConfig(network="CNN9"), "unknown base network 'CNN9'"),
        (ImportConfig(hold_out_seeds=5), r"--hold-out-seeds 5 needs more seeds than that in the column `seed`"),
        (ImportConfig(score=True), "--score needs the task"),
        (ImportConfig(test_share=2.0), "import.test_share must lie between 0 and 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, config: ImportConfig, message: str) -> None:
    for number in range(3):
        ray_trial(tmp_path / "ray", number, (1, 2), 2)
    with pytest.raises(UserError, match=message):
        import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", config)
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        import_zoo(str(tmp_path / "nowhere"), tmp_path / "zoo2", ANY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no networks in a layout that is known"):
        import_zoo(str(tmp_path / "empty"), tmp_path / "zoo2", ANY)
    assert not (tmp_path / "zoo2").exists()


# splits, scores, and what follows


def test_members_are_divided_and_seeds_held_out(tmp_path: Path) -> None:
    for number in range(12):
        ray_trial(tmp_path / "ray", number, (1, 2), 2)
    (zoo,) = import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ImportConfig(hold_out_seeds=1))
    splits = zoo.frame.groupby("member")["split"].nunique()
    assert (splits == 1).all()
    assert set(zoo.frame.loc[zoo.frame["seed"] == 2, "split"]) == {"unseen"}
    assert zoo.frame.drop_duplicates("member")["split"].value_counts().to_dict() == {
        "train": 5,
        "unseen": 4,
        "test": 2,
        "val": 1,
    }
    (other,) = import_zoo(str(tmp_path / "ray"), tmp_path / "other", ImportConfig(hold_out_seeds=1), seed=1)
    assert (other.frame["split"] != zoo.frame["split"]).any()


def test_scores_are_those_of_the_networks(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    export_zoo(tiny_zoo, tmp_path / "out", "directory", "epoch == 2")
    (tmp_path / "out" / "properties.parquet").unlink()
    (zoo,) = import_zoo(str(tmp_path / "out"), tmp_path / "zoo", ImportConfig(task="digits", score=True))
    expected = tiny_zoo.rows(epoch=2)
    for name in ("test_acc", "val_loss", "gap"):
        np.testing.assert_allclose(zoo.frame[name], expected[name], atol=1e-6)
    assert set(zoo.frame["split"]) == {"train", "val", "test"}
    assert zoo.splits(("test", "unseen")) == ("test",)


# interrupted


def test_a_killed_import_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "UNIT_BYTES", 3 * 4 * 2464)  # three checkpoints of CNN
    for number in range(5):
        ray_trial(tmp_path / "ray", number, (1, 2), 2)
    broken = ray_trial(tmp_path / "ray", 5, (1,), 1)
    rewrite(broken, lambda state: {**state, "module_list.0.bias": torch.full((8,), float("nan"))})
    import_zoo(str(tmp_path / "ray"), tmp_path / "whole", ANY)
    whole = contents(tmp_path / "whole")
    replace, real = os.replace, random.Random(0)

    def dies(*paths: Any) -> None:
        if real.random() < 0.3:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", dies)
    deaths = 0
    for _ in range(200):
        try:
            import_zoo(str(tmp_path / "ray"), tmp_path / "parts", ANY)
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths > 2
    monkeypatch.setattr(os, "replace", replace)
    assert contents(tmp_path / "parts") == whole


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    for number in range(6):
        ray_trial(tmp_path / "ray", number, (1, 2, 3), 3)
    code = (
        "import sys; from weightspace.zoo import importing; from weightspace.config import ImportConfig\n"
        "importing.UNIT_BYTES = 2 * 4 * 2464\n"
        "print('ready', flush=True)\n"
        "importing.import_zoo(sys.argv[1], __import__('pathlib').Path(sys.argv[2]), ImportConfig())\n"
    )
    import_command = [sys.executable, "-c", code, str(tmp_path / "ray")]
    subprocess.run([*import_command, str(tmp_path / "whole")], check=True, capture_output=True)
    moments = random.Random(0)
    for _ in range(12):
        with subprocess.Popen(
            [*import_command, str(tmp_path / "parts")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(moments.random() * 0.2)
            process.send_signal(signal.SIGKILL)
    subprocess.run([*import_command, str(tmp_path / "parts")], check=True, capture_output=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_source_that_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_trial(tmp_path / "ray", 0, (1,), 1)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ZooWriter, "finish", dies)
        with pytest.raises(KeyboardInterrupt):
            import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)
    ray_trial(tmp_path / "ray", 1, (1,), 1)
    with pytest.raises(UserError, match="the source has changed since its import"):
        import_zoo(str(tmp_path / "ray"), tmp_path / "zoo", ANY)
