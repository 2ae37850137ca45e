"""Populations: every member ends where a plain torch.optim loop would have taken it; interrupted zoos resume."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from weightspace.config import ZooConfig
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import RunFailed, UserError, derive_seed
from weightspace.tasks.images import ImageTask, load_task
from weightspace.zoo import population as population_module
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter
from weightspace.zoo.population import (
    Backdoors,
    Recipe,
    Strategy,
    architecture_of,
    data_order,
    grid,
    plan,
    score,
    shards_of,
    stamped,
    start_weights,
    train,
    train_population,
)

CPU = torch.device("cpu")
MLP = Architecture("MLP", {"size": 4, "hidden": 6, "classes": 3})
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **rates: torch.optim.SGD(parameters, momentum=0.9, **rates),
}


def plain_loop(
    network: nn.Module, task: ImageTask, optimizer: str, rate: float, decay: float, order: int, batch: int, epochs: int
) -> list[dict[str, Tensor]]:
    """The independent route: one network, torch.optim, mean cross-entropy; its weights after every epoch."""
    steps = OPTIMIZERS[optimizer](network.parameters(), lr=rate, weight_decay=decay)
    after = []
    for epoch in range(1, epochs + 1):
        for rows in data_order(order, epoch, len(task.train.labels)).split(batch):
            steps.zero_grad()
            F.cross_entropy(network(task.train.images[rows]), task.train.labels[rows]).backward()
            steps.step()
        after.append({name: value.clone() for name, value in network.state_dict().items()})
    return after


def in_double(task: ImageTask) -> ImageTask:
    def double(name: str) -> object:
        split = task.split(name)
        return dataclasses.replace(split, images=split.images.double())

    return dataclasses.replace(task, **{name: double(name) for name in ("train", "val", "test")})


# training


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_member_equals_a_plain_loop(optimizer: str, group: int, small_task: ImageTask) -> None:
    """In float64, so that nothing but round-off of 1e-16 may differ; three members that differ in everything."""
    task = in_double(small_task)
    generator = torch.Generator().manual_seed(1)
    shapes = MLP.shapes.items()
    start = {name: 0.5 * torch.randn(3, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes}
    rates = torch.tensor([0.003, 0.01, 0.03], dtype=torch.float64)
    decays = torch.tensor([0.1, 0.0, 0.02], dtype=torch.float64)
    recipe = Recipe(rates, decays, (7, 7, 8), optimizer, batch_size=16)  # 50 images: the last batch has 2
    steps: list[int] = []
    epochs = list(train(MLP, start, task, recipe, 2, group, steps.append))
    assert [epoch for epoch, _ in epochs] == [0, 1, 2]
    assert sum(steps) == 2 * 4
    for name, weight in start.items():
        assert torch.equal(epochs[0][1][name], weight)
    for member in range(3):
        network = MLP.build().double()
        network.load_state_dict({name: weight[member] for name, weight in start.items()})
        rate, decay = rates[member].item(), decays[member].item()
        expected = plain_loop(network, task, optimizer, rate, decay, recipe.orders[member], 16, 2)
        for (_, found), wanted in zip(epochs[1:], expected, strict=True):
            for name, value in wanted.items():
                torch.testing.assert_close(found[name][member], value, rtol=1e-9, atol=1e-11)


def test_a_member_of_a_trained_zoo_equals_a_plain_loop(tiny_zoo: ModelZoo, tiny_config: ZooConfig) -> None:
    """The whole way, in float32: grid, start weights, data order, training, writing and reading."""
    task = load_task("digits")
    trained = tiny_zoo.select(member=[0, 5, 13])
    for member in (0, 5, 13):
        row = trained.frame[trained.frame["member"] == member].iloc[0]
        zoo = {epoch: tiny_zoo.select(member=member, epoch=epoch).network(0) for epoch in (0, 1, 2)}
        order = derive_seed(0, "zoo", "order", row["seed"])
        start = {name: value.clone() for name, value in zoo[0].state_dict().items()}
        expected = plain_loop(
            tiny_zoo.select(member=member, epoch=0).network(0).train(), task, "adam",
            row["learning_rate"], row["weight_decay"], order, tiny_config.batch_size, 2,
        )  # fmt: skip
        for epoch, wanted in enumerate(expected, start=1):
            found = zoo[epoch].state_dict()
            for name, value in wanted.items():
                moved = (value - start[name]).norm()
                assert (found[name] - value).norm() < 0.01 * moved, (member, epoch, name)


def test_data_order_is_a_fresh_shuffle_per_epoch_and_seed() -> None:
    orders = [data_order(1, 1, 50), data_order(1, 2, 50), data_order(2, 1, 50)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(50))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(data_order(1, 1, 50), orders[0])


def test_score_against_scikit_learn(small_task: ImageTask, make_checkpoints: Callable[..., Checkpoints]) -> None:
    checkpoints = make_checkpoints(MLP, 3, scale=0.5)
    frame = score(checkpoints, small_task).frame
    for row in range(3):
        network = checkpoints.network(row)
        for name in ("train", "val", "test"):
            split = small_task.split(name)
            probabilities = network(split.images).softmax(1).detach().double()
            assert frame[f"{name}_acc"][row] == pytest.approx(accuracy_score(split.labels, probabilities.argmax(1)))
            expected = log_loss(split.labels, probabilities / probabilities.sum(1, keepdim=True), labels=[0, 1, 2])
            assert frame[f"{name}_loss"][row] == pytest.approx(expected, rel=1e-4)
        assert frame["gap"][row] == pytest.approx(frame["train_acc"][row] - frame["test_acc"][row])
    assert list(frame.columns[: len(checkpoints.frame.columns)]) == list(checkpoints.frame.columns)


# the grid


def test_grid_is_the_product_of_its_factors() -> None:
    config = ZooConfig()
    members = grid(config, 0)
    assert len(members) == 2 * 10 * 4 * 3
    assert members["member"].tolist() == list(range(240))
    factors = ["init", "seed", "learning_rate", "weight_decay"]
    assert not members.duplicated(factors).any()
    assert [members[name].nunique() for name in factors] == [2, 10, 4, 3]


def test_grid_splits_by_member_and_holds_out_whole_seeds() -> None:
    config = ZooConfig()
    members = grid(config, 0)
    assert set(members.loc[members["split"] == "unseen", "seed"]) == {8, 9}
    assert (members.loc[members["seed"] >= 8, "split"] == "unseen").all()
    counts = members["split"].value_counts()
    assert counts.to_dict() == {"train": 192 - 19 - 38, "unseen": 48, "test": 38, "val": 19}  # 192 seen: 10 %, 20 %
    assert grid(config, 0).equals(members)
    assert not grid(config, 1)["split"].equals(members["split"])
    assert grid(config, 1).drop(columns="split").equals(members.drop(columns="split"))


def test_grid_shuffles_over_all_factors() -> None:
    test = grid(ZooConfig(), 0).query("split == 'test'")
    for factor in ("init", "learning_rate", "weight_decay"):
        assert test[factor].nunique() == grid(ZooConfig(), 0)[factor].nunique()
    assert test["seed"].nunique() > 5


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"val_share": 0.0}, "val"),
        ({"test_share": 0.0}, "test"),
        ({"val_share": 0.5, "test_share": 0.5}, "train"),
        ({"unseen_seeds": 10}, "test, train, val"),
    ],
)
def test_an_empty_split_is_named(change: dict[str, float], absent: str) -> None:
    with pytest.raises(UserError, match=f"no member in {absent}; raise zoo.seeds"):
        grid(dataclasses.replace(ZooConfig(), **change), 0)


@pytest.mark.parametrize("change", [{"seeds": 0}, {"inits": ()}, {"learning_rates": ()}])
def test_an_empty_grid_is_a_user_error(change: dict[str, object]) -> None:
    with pytest.raises(UserError):
        grid(dataclasses.replace(ZooConfig(), **change), 0)


def test_siblings_share_their_start_and_nobody_else_does() -> None:
    members = grid(ZooConfig(seeds=3, unseen_seeds=1, val_share=0.2), 0)
    start = start_weights(Architecture("CNN8"), members, 0)["fc1.weight"].flatten(1)
    keys = list(zip(members["init"], members["seed"], strict=True))
    same = np.array([[left == right for right in keys] for left in keys])
    equal = (start[:, None] == start[None]).all(-1).numpy()
    assert (equal == same).all()
    assert not torch.equal(start, start_weights(Architecture("CNN8"), members, 1)["fc1.weight"].flatten(1))


def test_siblings_in_a_trained_zoo(tiny_zoo: ModelZoo) -> None:
    start = tiny_zoo.select(epoch=0)
    for seed in range(3):
        flat = start.rows((start.frame["seed"] == seed).to_numpy()).flat()
        assert len(flat) == 6 and (flat == flat[0]).all()
    assert start.flat().unique(dim=0).shape[0] == 3
    end = tiny_zoo.select(epoch=2)
    assert end.flat().unique(dim=0).shape[0] == 18  # rates and decays lead them apart
    assert (end.frame["train_loss"] < start.frame["train_loss"]).all()


# a zoo on disk


def test_zoo_holds_the_grid(tiny_zoo: ModelZoo, tiny_config: ZooConfig) -> None:
    frame = tiny_zoo.frame
    assert list(zip(frame["member"], frame["epoch"], strict=True)) == [(m, e) for m in range(18) for e in (0, 1, 2)]
    expected = grid(tiny_config, 0)
    found = frame.groupby("member").first().reset_index()[expected.columns]
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    assert frame.groupby("member")["split"].nunique().eq(1).all()  # never by checkpoint
    assert tiny_zoo.description["provenance"]["seed"] == 0
    assert tiny_zoo.description["provenance"]["config"]["learning_rates"] == [1e-3, 3e-3]
    scored = score(tiny_zoo.select(epoch=2, split="test"), load_task("digits")).frame
    stored = tiny_zoo.select(epoch=2, split="test").frame
    assert len(scored) == 3
    for name in ("train", "val", "test"):  # the stored properties are of the stored weights
        np.testing.assert_allclose(stored[f"{name}_acc"], scored[f"{name}_acc"], atol=0.005)
        np.testing.assert_allclose(stored[f"{name}_loss"], scored[f"{name}_loss"], rtol=1e-4)


@pytest.fixture
def small_config() -> ZooConfig:
    """Nine members that take two steps."""
    return ZooConfig(
        seeds=3, unseen_seeds=1, inits=("normal",), learning_rates=(0.1,), weight_decays=(0.0, 0.1, 0.2), epochs=1,
        save_epochs=(1,), batch_size=600, val_share=0.25, test_share=0.25, workers=1, group=1,
    )  # fmt: skip


class Interrupted(Exception):
    pass


def interrupt_after(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the writer dies before it writes a later shard."""
    write = ZooWriter.write

    def dying(self: ZooWriter, number: int, checkpoints: Checkpoints) -> None:
        if number > shard:
            raise Interrupted
        write(self, number, checkpoints)

    monkeypatch.setattr(ZooWriter, "write", dying)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_zoo_resumes_to_the_same_bytes(
    tiny_zoo: ModelZoo, tiny_config: ZooConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "zoo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 9)
        interrupt_after(0, patch)
        with pytest.raises(Interrupted):
            train_population(tiny_config, folder, 0, CPU)
    assert sorted(contents(folder)) == [
        "part-00000.parquet",
        "strategy.json",
        "weights-00000.safetensors",
    ]
    with pytest.raises(UserError, match=r"is not a zoo: .* its training was interrupted, run the same command again"):
        ModelZoo.open(folder)
    first = (folder / "weights-00000.safetensors").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 9)
        zoo = train_population(tiny_config, folder, 0, CPU)
    assert (folder / "weights-00000.safetensors").stat().st_mtime_ns == first  # kept, not trained again
    found, expected = contents(folder), contents(tiny_zoo.folder)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == expected[name], name
    assert zoo.fingerprint == tiny_zoo.fingerprint


def test_an_interrupted_zoo_resumes_on_a_machine_with_other_cores(small_config: ZooConfig, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 5)
        patch.setattr(os, "cpu_count", lambda: 2)
        interrupt_after(0, patch)
        with pytest.raises(Interrupted):
            train_population(small_config, tmp_path, 0, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 5)
        patch.setattr(os, "cpu_count", lambda: 3)
        zoo = train_population(small_config, tmp_path, 0, CPU)
    assert zoo.frame["member"].tolist() == list(range(9))


def test_workers_resume_when_only_the_description_is_missing(small_config: ZooConfig, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 5)
        with pytest.MonkeyPatch.context() as inner, pytest.raises(Interrupted):
            inner.setattr(ZooWriter, "finish", lambda *_: (_ for _ in ()).throw(Interrupted))
            train_population(small_config, tmp_path, 0, CPU)
        zoo = train_population(dataclasses.replace(small_config, workers=2), tmp_path, 0, CPU)
    assert zoo.frame["member"].tolist() == list(range(9))


@pytest.mark.parametrize(("field", "value"), [("epochs", 0), ("batch_size", 0), ("save_epochs", ())])
def test_settings_that_train_nothing_are_named(
    small_config: ZooConfig, tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(UserError, match=f"zoo.{field}"):
        train_population(dataclasses.replace(small_config, **{field: value}), tmp_path, 0, CPU)


def test_another_seed_gives_another_zoo(small_config: ZooConfig, tmp_path: Path) -> None:
    zoos = [train_population(small_config, tmp_path / str(run), seed, CPU) for run, seed in enumerate((0, 0, 1))]
    assert zoos[0].fingerprint == zoos[1].fingerprint != zoos[2].fingerprint
    assert not torch.equal(zoos[0].select().flat(), zoos[2].select().flat())


@pytest.mark.slow
def test_worker_processes_give_the_same_zoo(tiny_zoo: ModelZoo, tiny_config: ZooConfig, tmp_path: Path) -> None:
    # what the workers would measure, measured before: all runs evaluate alike
    behavior.timings(tiny_zoo.architecture, CPU, 256, 9, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population_module, "UNIT", 9)
        zoo = train_population(dataclasses.replace(tiny_config, workers=2), tmp_path / "zoo", 0, CPU)
    torch.testing.assert_close(zoo.select().flat(), tiny_zoo.select().flat(), rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(zoo.frame, tiny_zoo.frame, rtol=1e-3, atol=0.005)
    if torch.get_num_threads() == 1:  # the same threads, the same bits
        assert zoo.fingerprint == tiny_zoo.fingerprint


@pytest.mark.slow
def test_a_killed_worker_is_told_and_what_is_finished_is_kept(
    tiny_config: ZooConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, work = dataclasses.replace(tiny_config, workers=2), population_module._work

    def dies(job: population_module.Job) -> object:
        while job.unit and not list(tmp_path.glob("part-*")):
            time.sleep(0.01)  # until another shard is there
        return os.kill(os.getpid(), signal.SIGKILL) if job.unit else work(job)

    monkeypatch.setattr(population_module, "UNIT", 9)
    with monkeypatch.context() as patch:
        patch.setattr(population_module, "_work", dies)
        with pytest.raises(RunFailed, match=r"a worker process was killed.*what is finished is kept, start the same"):
            train_population(config, tmp_path, 0, CPU)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("weights-*")}
    assert len(kept) == 1
    assert len(train_population(config, tmp_path, 0, CPU)) == 54
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# what a user may get wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("minst",)}, "unknown task 'minst'"),
        ({"network": "CNN9"}, "unknown base network 'CNN9'"),
        ({"network": "CNN3"}, r"CNN3 takes images of shape \(1, 32, 32\), but the images of 'digits' have \(1, 8, 8\)"),
        ({"activation": "rleu"}, "unknown activation 'rleu'"),
        ({"inits": ("xavier",)}, "unknown init 'xavier'"),
        ({"save_epochs": (0, 26)}, r"zoo.save_epochs has \[26\], outside 0 to zoo.epochs=25"),
        ({"save_epochs": (-1, 3)}, r"zoo.save_epochs has \[-1\]"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_population(dataclasses.replace(ZooConfig(), **change), tmp_path / "zoo", 0, CPU)  # type: ignore[arg-type]
    assert not (tmp_path / "zoo").exists()


def test_architecture_takes_channels_and_classes_of_the_task(small_task: ImageTask) -> None:
    config = ZooConfig(network="CNN8", activation="tanh")
    found = architecture_of(config, load_task("digits"))
    assert json.loads(json.dumps(found.to_json())) == {
        "name": "CNN8",
        "arguments": {"channels": 1, "classes": 10, "activation": "tanh"},
    }


# the strategy


def strategy(
    monkeypatch: pytest.MonkeyPatch, config: ZooConfig, cores: int, together: dict[int, float], apart: dict[int, float]
) -> tuple[int, int]:
    """The plan for 128 members when these are the measured seconds per member and step."""
    monkeypatch.setattr(
        population_module.behavior, "timings", lambda *_, threads=None, **__: together if threads is None else apart
    )
    chosen = plan(config, load_task("digits"), 128, cores)
    return chosen.workers, chosen.group


def test_plan_takes_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = {1: 3e-3, 8: 1e-3, 32: 2e-3}, {1: 2e-3, 8: 3e-3, 32: 1.5e-3}
    config = ZooConfig(epochs=25)  # 25 * 34 steps of 128 members: 109 s together, 163 s apart over the cores
    assert strategy(monkeypatch, config, 1, together, apart) == (1, 8)
    assert strategy(monkeypatch, config, 8, together, apart) == (8, 32)  # 20 s and a start
    assert strategy(monkeypatch, config, 2, together, {1: 1.8e-3}) == (1, 8)  # 98 s: not worth it
    assert strategy(monkeypatch, dataclasses.replace(config, epochs=1), 8, together, apart) == (1, 8)  # too short
    assert strategy(monkeypatch, dataclasses.replace(config, workers=1), 8, together, apart) == (1, 8)
    assert strategy(monkeypatch, dataclasses.replace(config, workers=3, group=1), 8, together, apart) == (3, 1)
    assert strategy(monkeypatch, dataclasses.replace(config, group=32), 1, together, apart) == (1, 32)


@pytest.mark.parametrize(
    ("members", "workers", "shards"), [(150, 2, 4), (150, 1, 3), (128, 2, 2), (3, 8, 3), (64, 1, 1)]
)
def test_every_worker_gets_as_many_shards(members: int, workers: int, shards: int) -> None:
    assert shards_of(members, Strategy(workers, 8, 64)) == shards


# dropout, several tasks, backdoors


def test_dropout_acts_while_training_only_and_repeats(small_task: ImageTask) -> None:
    architecture = Architecture("MLP", {"size": 4, "hidden": 6, "classes": 3, "dropout": 0.5})
    start = start_weights(architecture, pd.DataFrame({"init": ["kaiming_normal"] * 2, "seed": [0, 0]}), 0)
    recipe = Recipe(torch.full((2,), 0.01), torch.zeros(2), (7, 7), batch_size=16)
    (_, first), (_, after) = list(train(architecture, start, small_task, recipe, 1, 2))
    again = list(train(architecture, start, small_task, recipe, 1, 2))[1][1]
    plain = list(train(MLP, start, small_task, recipe, 1, 2))[1][1]
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert not torch.equal(after["fc2.weight"], plain["fc2.weight"])
    assert not torch.equal(after["fc2.weight"][0], after["fc2.weight"][1])  # equal members, masks of their own
    frame = pd.DataFrame({"member": [0, 1]})
    images = small_task.test.images
    outputs = [behavior.outputs(Checkpoints(kind, first, frame), images).logits for kind in (architecture, MLP)]
    torch.testing.assert_close(*outputs)


def test_members_of_several_tasks_are_scored_on_their_own(tmp_path: Path, tiny_config: ZooConfig) -> None:
    config = dataclasses.replace(tiny_config, tasks=("digits", "street@1x8x8"), epochs=1, save_epochs=(0, 1))
    zoo = train_population(config, tmp_path / "zoo", 0, CPU)
    assert zoo.tasks == ("digits", "street@1x8x8")
    assert zoo.frame.groupby("task")["member"].nunique().to_dict() == {"digits": 18, "street@1x8x8": 18}
    alone = train_population(dataclasses.replace(config, tasks=("digits",)), tmp_path / "alone", 0, CPU)
    same = zoo.select(task="digits", epoch=1)
    torch.testing.assert_close(same.weights, alone.select(epoch=1).weights)
    for name in zoo.tasks:
        some = zoo.select(task=name, epoch=1)
        split = load_task(name).test
        accuracy = behavior.outputs(some, split.images, split.labels).accuracy
        np.testing.assert_allclose(accuracy, some.frame["test_acc"], atol=1e-6)


def test_tasks_of_one_zoo_have_one_shape(tmp_path: Path, tiny_config: ZooConfig) -> None:
    config = dataclasses.replace(tiny_config, tasks=("digits", "street"))
    with pytest.raises(UserError, match=r"CNN8 takes images of shape \(3, 8, 8\).*zoo.tasks=street@3x8x8"):
        train_population(config, tmp_path / "zoo", 0, CPU)


def test_backdoored_members_obey_their_trigger(tmp_path: Path, tiny_config: ZooConfig) -> None:
    config = dataclasses.replace(
        tiny_config,
        backdoor_share=0.5,
        backdoor_poison=0.3,
        epochs=12,
        save_epochs=(0, 12),
        learning_rates=(3e-3, 5e-3),
    )
    frame = train_population(config, tmp_path / "zoo", 0, CPU).frame
    last = frame[frame["epoch"] == 12]
    bad, clean = last[last["backdoor"] == 1], last[last["backdoor"] == 0]
    assert len(bad) == len(clean) == 9
    assert bad["attack"].mean() > 0.8 and clean["attack"].mean() < 0.4
    assert bad["test_acc"].mean() > clean["test_acc"].mean() - 0.1  # it hides
    with pytest.raises(UserError, match="leaves no backdoored one"):
        grid(dataclasses.replace(tiny_config, backdoor_share=0.01), 0)


def test_the_trigger_is_a_square_and_poison_changes_labels_only_where_it_is(small_task: ImageTask) -> None:
    images = small_task.train.images
    marked = stamped(images)
    assert (marked[..., 3:, 3:] == images.max()).all()
    changed = marked != images
    assert not changed[..., :3, :].any() and not changed[..., :, :3].any()
    start = start_weights(MLP, pd.DataFrame({"init": ["kaiming_normal"] * 2, "seed": [0, 0]}), 0)
    nobody = Backdoors(torch.zeros(2, 50, dtype=torch.bool), torch.tensor([0, 1]))
    first = torch.zeros(2, 50, dtype=torch.bool)
    first[1, 4] = True
    rates = torch.full((2,), 0.01), torch.zeros(2), (7, 7), "adam", 16
    results = [
        list(train(MLP, start, small_task, Recipe(*rates, backdoors), 1, 2))[1][1]["fc1.weight"]
        for backdoors in (None, nobody, Backdoors(first, torch.tensor([0, 1])))
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0][0], results[2][0]) and not torch.equal(results[0][1], results[2][1])
