"""Probes of properties and categories, on held-out members and on other zoos, against planted truths and sklearn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score

from weightspace.config import AutoencoderConfig, ProbeConfig
from weightspace.downstream.baselines import MAJORITY, RAW, STATISTICS
from weightspace.downstream.probe import by_epoch, logistic_probe, numeric_properties, probe, ridge_probe
from weightspace.hyperrep.autoencoder import Autoencoder
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError
from weightspace.tokens.normalize import standardize
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

CONFIG = ProbeConfig(properties=("test_acc",), penalties=(1e-4, 1e-2, 1.0), components=8)
MakeZoo = Callable[..., ModelZoo]


def planted(count: int, seed: int, shift: float, classes: tuple[str, ...]) -> Checkpoints:
    """Two checkpoints per member; the deviation of the first convolution tells the accuracy, its mean the init."""
    architecture, generator = Architecture("CNN8"), torch.Generator().manual_seed(seed)
    weights = {
        name: 0.1 * torch.randn(count, *shape, generator=generator) for name, shape in architecture.shapes.items()
    }
    member = np.arange(count) // 2
    accuracy = torch.rand(count, generator=generator) * 0.5
    kind = torch.from_numpy(member % len(classes))
    first = weights["conv1.weight"]
    first = (first - first.mean((1, 2, 3, 4), keepdim=True)) / first.flatten(1).std(1).view(-1, 1, 1, 1, 1)
    weights["conv1.weight"] = first * (0.5 + accuracy).view(-1, 1, 1, 1, 1) + kind.view(-1, 1, 1, 1, 1)
    frame = pd.DataFrame(
        {
            "member": member,
            "epoch": np.arange(count) % 2,
            "split": np.array(["train", "train", "train", "val", "test", "unseen"])[member // 2 % 6],
            "task": "digits",
            "init": np.array(classes)[member % len(classes)],
            "optimizer": "adam",
            "test_acc": accuracy.double().numpy() + shift,
            "luck": torch.rand(count, generator=generator).double().numpy(),
            "constant": 3.0,
        }
    )
    return Checkpoints(architecture, weights, frame)


@pytest.fixture(scope="module")
def make_zoo(tmp_path_factory: pytest.TempPathFactory) -> MakeZoo:
    def make(
        count: int = 240, seed: int = 0, shift: float = 0.0, classes: tuple[str, ...] = ("a", "b"), **columns: Any
    ) -> ModelZoo:
        checkpoints = planted(count, seed, shift, classes)
        made = dataclasses.replace(checkpoints, frame=checkpoints.frame.assign(**columns))
        writer = ZooWriter(tmp_path_factory.mktemp("planted") / "zoo", made.architecture, {})
        writer.write(0, made)
        return writer.finish([0])

    return make


@pytest.fixture(scope="module")
def zoo(make_zoo: MakeZoo) -> ModelZoo:
    return make_zoo()


@pytest.fixture(scope="module")
def representations(zoo: ModelZoo) -> dict[str, HyperRepresentation]:
    """An untrained representation."""
    tokenizer = Tokenizer(zoo.architecture)
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=16, latent=8, components=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = Autoencoder(size, tokenizer.mask, tokenizer.positions).eval()
    normalizer = standardize(tokenizer, tokenizer.tokenize(zoo.select(split="train").weights).x)
    return {"r": HyperRepresentation(tokenizer, size, autoencoder, normalizer, {})}


@pytest.fixture(scope="module")
def away(make_zoo: MakeZoo) -> ModelZoo:
    """Another zoo: its accuracies are shifted, and it has an init that the first zoo has not."""
    return make_zoo(count=90, seed=1, shift=0.7, classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def probed(
    zoo: ModelZoo, away: ModelZoo, representations: dict[str, HyperRepresentation]
) -> tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame]:
    return probe(zoo, representations, CONFIG, {"away": away})


def found(records: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(r["representation"], r["split"], r["metric"]): r for r in records}


def test_records_are_complete(probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame]) -> None:
    records = probed[0]
    assert {tuple(r) for r in records} == {("stage", "representation", "split", "metric", "mean", "low", "high", "n")}
    splits = ("test", "unseen", "away")
    expected = {
        (name, split, metric)
        for name in ("r", STATISTICS, RAW)
        for split in splits
        for metric in ("R2 test_acc", "rank correlation test_acc", "accuracy init")
    } | {(MAJORITY, split, "accuracy init") for split in splits}
    assert found(records).keys() == expected and len(records) == len(expected)
    assert all(r["low"] <= r["mean"] <= r["high"] for r in records)


def test_planted_truths_are_found(probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame]) -> None:
    value = {key: record["mean"] for key, record in found(probed[0]).items()}
    for split in ("test", "unseen"):
        assert value[STATISTICS, split, "R2 test_acc"] > 0.99
        for name in ("r", STATISTICS, RAW):
            assert value[name, split, "accuracy init"] > 0.9 > value[MAJORITY, split, "accuracy init"]


def test_scores_are_those_of_the_predictions(
    probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame], zoo: ModelZoo
) -> None:
    records, predictions, _ = probed
    value = {key: record["mean"] for key, record in found(records).items()}
    assert set(predictions.columns) == {"split", "member", "epoch", "features", "property", "true", "predicted"}
    assert set(predictions["split"]) == {"test", "unseen"}
    assert set(predictions["property"]) == {"test_acc"}
    for (name, split), rows in predictions.groupby(["features", "split"]):
        assert len(rows) == (zoo.frame["split"] == split).sum()
        true, guess = rows["true"], rows["predicted"]
        assert value[str(name), str(split), "R2 test_acc"] == pytest.approx(r2_score(true, guess))
        ranks = spearmanr(true, guess).statistic
        assert value[str(name), str(split), "rank correlation test_acc"] == pytest.approx(ranks)


def test_on_another_zoo_ranks_survive_the_shift(
    probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame],
) -> None:
    by_key = found(probed[0])
    assert by_key[STATISTICS, "away", "R2 test_acc"]["mean"] < 0
    assert by_key[STATISTICS, "away", "rank correlation test_acc"]["mean"] > 0.98
    assert by_key[STATISTICS, "away", "rank correlation test_acc"]["n"] == 45  # all its members, whatever their split


def test_classes_that_training_lacks_count_as_wrong(
    probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame], away: ModelZoo
) -> None:
    known = (away.frame["init"] != "c").mean()
    by_key = found(probed[0])
    assert by_key[STATISTICS, "away", "accuracy init"]["mean"] == pytest.approx(known)


def test_majority_class_is_that_of_training(make_zoo: MakeZoo, representations: dict[str, HyperRepresentation]) -> None:
    fourth = np.arange(240) // 2 % 4
    zoo = make_zoo(kind=np.where(fourth == 3, "rare", "common"), number=np.where(fourth == 2, 1, 0))
    config = dataclasses.replace(CONFIG, categories=("kind", "number"))
    value = {key: r["mean"] for key, r in found(probe(zoo, representations, config)[0]).items()}
    for split in ("test", "unseen"):
        rows = zoo.frame[zoo.frame["split"] == split]
        assert value[MAJORITY, split, "accuracy kind"] == pytest.approx((rows["kind"] == "common").mean())
        assert value[MAJORITY, split, "accuracy number"] == pytest.approx((rows["number"] == 0).mean())


def test_all_categories_come_beside_those_that_are_named(
    make_zoo: MakeZoo, representations: dict[str, HyperRepresentation]
) -> None:
    zoo = make_zoo(backdoor=np.arange(240) // 2 % 2, number=np.arange(240) // 2 % 3)
    for asked, expected in (
        (("all",), {"init", "backdoor"}),
        (("all", "number"), {"init", "backdoor", "number"}),
        (("backdoor",), {"backdoor"}),
    ):
        records, predictions, _ = probe(zoo, representations, dataclasses.replace(CONFIG, categories=asked))
        classified = {r["metric"].removeprefix("accuracy ") for r in records if r["metric"].startswith("accuracy ")}
        assert classified == expected
    config = dataclasses.replace(CONFIG, properties=("all", "backdoor"), categories=("init",))
    predictions = probe(make_zoo(backdoor=1), representations, config)[1]
    assert {"test_acc", "luck", "backdoor"} <= set(predictions["property"])  # the constant one since it is named


def test_the_map_shows_the_zoo_itself(
    probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame], zoo: ModelZoo
) -> None:
    plane = probed[2]
    assert len(plane) == len(zoo)
    assert plane["split"].value_counts().to_dict() == zoo.frame["split"].value_counts().to_dict()


def test_a_category_of_one_class_is_told_and_skipped(
    zoo: ModelZoo, representations: dict[str, HyperRepresentation], capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(CONFIG, categories=("optimizer",))
    records, *_ = probe(zoo, representations, config)
    assert not [r for r in records if r["metric"].startswith("accuracy")]
    assert "optimizer" in capsys.readouterr().err


def test_all_numeric_properties(
    zoo: ModelZoo, make_zoo: MakeZoo, representations: dict[str, HyperRepresentation]
) -> None:
    config = dataclasses.replace(CONFIG, properties=("all",), categories=("init",))
    predictions = probe(zoo, representations, config)[1]
    assert set(predictions["property"]) == {"epoch", "test_acc", "luck"}  # neither numbers of rows nor constants
    last = dataclasses.replace(config, epochs=(1,))
    assert set(probe(zoo, representations, last)[1]["property"]) == {"test_acc", "luck"}
    gaps = make_zoo(count=48, luck=np.where(np.arange(48) == 5, np.nan, np.arange(48)), test_acc=np.arange(48) / 48)
    assert numeric_properties([gaps.frame]) == ("epoch", "test_acc")
    assert numeric_properties([zoo.frame, gaps.frame]) == ("epoch", "test_acc")
    assert numeric_properties([zoo.frame, zoo.frame.drop(columns="test_acc")]) == ("epoch", "luck")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": ("activation",)}, "no category activation; .* has member, .*init"),
        ({"properties": ("speed",)}, "no numeric property speed"),
        ({"properties": ("init",)}, "no numeric property init"),
    ],
)
def test_unknown_columns_are_named(
    zoo: ModelZoo, representations: dict[str, HyperRepresentation], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        probe(zoo, representations, dataclasses.replace(CONFIG, **change))


def test_other_zoos_are_checked_too(
    zoo: ModelZoo, away: ModelZoo, make_zoo: MakeZoo, representations: dict[str, HyperRepresentation]
) -> None:
    gaps = make_zoo(count=48, test_acc=np.where(np.arange(48) == 5, np.nan, 0.5))
    with pytest.raises(UserError, match="test_acc is missing or infinite"):
        probe(zoo, representations, CONFIG, {"gaps": gaps})
    with pytest.raises(UserError, match="'test', which is a split"):
        probe(zoo, representations, CONFIG, {"test": away})


def test_logistic_probe_chooses_its_penalty_on_validation() -> None:
    rng = np.random.default_rng(0)
    sizes = {"train": 90, "val": 60, "test": 300}
    x = {split: rng.normal(size=(n, 20)) * 3 + 1 for split, n in sizes.items()}
    y = {
        split: np.array(["a", "b", "c"])[np.argmax(v[:, :3] + rng.gumbel(size=(len(v), 3)), 1)]
        for split, v in x.items()
    }
    mean, std = x["train"].mean(0), x["train"].std(0)

    def alone(penalty: float) -> LogisticRegression:
        return LogisticRegression(C=1 / (90 * penalty), max_iter=5000).fit((x["train"] - mean) / std, y["train"])

    def accuracy(model: LogisticRegression, split: str) -> float:
        return float(np.mean(model.predict((x[split] - mean) / std) == y[split]))

    penalties = (1e-4, 0.05, 5.0)
    models = {penalty: alone(penalty) for penalty in penalties}
    best = max(penalties, key=lambda penalty: accuracy(models[penalty], "val"))
    assert len({accuracy(model, "val") for model in models.values()}) == 3  # there is something to choose
    predicted = logistic_probe([x], y, penalties)
    assert np.mean(predicted["test"] == models[best].predict((x["test"] - mean) / std)) > 0.99
    for penalty in penalties:
        expected = models[penalty].predict((x["test"] - mean) / std)
        assert np.mean(logistic_probe([x], y, (penalty,))["test"] == expected) > 0.99


def test_of_equally_accurate_penalties_the_largest_is_used() -> None:
    rng = np.random.default_rng(1)
    kind = {split: np.arange(n) % 2 for split, n in {"train": 40, "val": 10, "test": 200}.items()}
    x = {split: rng.normal(size=(len(k), 30)) + np.outer(k, np.r_[8, np.zeros(29)]) for split, k in kind.items()}
    y = {split: np.array(["a", "b"])[k] for split, k in kind.items()}
    y["train"][:2] = y["train"][1::-1]  # two wrong labels, which only a small penalty believes
    both = logistic_probe([x], y, (1e-6, 0.1))
    small, large = (logistic_probe([x], y, (penalty,)) for penalty in (1e-6, 0.1))
    assert (large["val"] == y["val"]).all()
    assert (both["test"] == large["test"]).all()
    assert (small["test"] != large["test"]).any()


def test_probing_is_deterministic(
    zoo: ModelZoo,
    away: ModelZoo,
    representations: dict[str, HyperRepresentation],
    probed: tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame],
    tmp_path: Path,
) -> None:
    records, predictions, plane = probe(zoo, representations, CONFIG, {"away": away})
    pd.testing.assert_frame_equal(pd.DataFrame(records), pd.DataFrame(probed[0]))
    pd.testing.assert_frame_equal(predictions, probed[1])
    pd.testing.assert_frame_equal(plane, probed[2])


def test_by_epoch_is_r2_within_each_epoch() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"features": "r", "property": "acc", "split": "test", "member": np.tile(np.arange(20), 2)})
    frame["epoch"] = np.repeat([1, 5], 20)
    frame["true"] = rng.normal(size=40) + frame["epoch"]
    frame["predicted"] = frame["true"] + rng.normal(scale=0.5, size=40)
    constant = frame[frame["epoch"] == 1].assign(epoch=0, true=0.1)
    found = by_epoch(pd.concat([frame, constant, frame.assign(split="unseen", predicted=0.0)])).set_index("epoch")
    assert list(found.index) == [1, 5]
    for epoch, rows in frame.groupby("epoch"):
        assert found.loc[epoch, "mean"] == pytest.approx(r2_score(rows["true"], rows["predicted"]))
        assert found.loc[epoch, "low"] < found.loc[epoch, "mean"] < found.loc[epoch, "high"]


@pytest.mark.parametrize("order", [1, -1])
def test_features_are_chosen_on_validation(order: int) -> None:
    """Of noise and of what the target is made of, in either order, the latter is used."""
    rng = np.random.default_rng(0)
    sizes = {"train": 60, "val": 30, "test": 30}
    signal = {split: rng.normal(size=(n, 3)) for split, n in sizes.items()}
    noise = {split: rng.normal(size=(n, 3)) for split, n in sizes.items()}
    candidates = [noise, signal][::order]
    value = {split: x @ [1.0, -2.0, 0.5] for split, x in signal.items()}
    np.testing.assert_allclose(ridge_probe(candidates, value, (1e-6,))["test"], value["test"], atol=1e-3)
    label = {split: np.where(v > 0, "high", "low") for split, v in value.items()}
    assert np.mean(logistic_probe(candidates, label, (1e-4,))["test"] == label["test"]) > 0.9
