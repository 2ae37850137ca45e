"""Metrics, probes, samplers and files of the downstream room."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import linregress, ttest_ind, ttest_rel
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from weightspace.config import (
    AutoencoderConfig,
    FinetuneConfig,
    GenerateConfig,
    LossConfig,
    PretrainConfig,
    ReconstructConfig,
    ZooConfig,
)
from weightspace.downstream import metrics
from weightspace.downstream.baselines import ANCHORS, SCRATCH, fit_pca
from weightspace.downstream.finetune import finetune, for_task
from weightspace.downstream.generate import choose_anchors, generate, load_network, load_networks, save_networks
from weightspace.downstream.probe import ridge_probe, weight_statistics
from weightspace.downstream.reconstruct import compare, reconstruct, summarize
from weightspace.downstream.samplers import SAMPLERS, kde
from weightspace.hyperrep.pretrain import pretrain
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError
from weightspace.tasks.images import ImageSplit, ImageTask, load_task
from weightspace.tokens.normalize import standardize
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.zoo.model_zoo import ModelZoo
from weightspace.zoo.population import Recipe, train, train_population

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def representation(tiny_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> HyperRepresentation:
    config = PretrainConfig(epochs=(1, 2), steps=4, batch_size=4, validate_every=2)
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, components=2)
    folder = tmp_path_factory.mktemp("representation")
    return pretrain(tiny_zoo, folder, config, LossConfig(queries=16), size, 0, torch.device("cpu"))


# metrics, each against a plain loop or a library


def test_floor_is_the_mean_agreement_with_the_others() -> None:
    predictions = torch.randint(3, (5, 40), generator=torch.Generator().manual_seed(0))
    found = metrics.floor(predictions, 3)
    for i in range(5):
        pairs = [float((predictions[i] == predictions[j]).float().mean()) for j in range(5) if j != i]
        assert float(found[i]) == pytest.approx(np.mean(pairs), rel=1e-6)
    disagreement = [float((a != b).float().mean()) for a, b in itertools.combinations(predictions, 2)]
    pairs = 1 - metrics.pairwise_agreement(predictions, 3).double().numpy()
    assert metrics.pair_mean(pairs, np.ones(5)) == pytest.approx(np.mean(disagreement), rel=1e-5)
    twice = metrics.pair_mean(pairs, np.array([2.0, 1, 1, 1, 0]))  # network 0 twice, network 4 left out
    weights = {(0, 1): 2, (0, 2): 2, (0, 3): 2, (1, 2): 1, (1, 3): 1, (2, 3): 1}
    expected = sum(weight * pairs[pair] for pair, weight in weights.items()) / sum(weights.values())
    assert twice == pytest.approx(expected)


def test_identity_needs_the_own_original_to_be_nearest() -> None:
    logits = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(0))
    own = logits.softmax(-1)
    assert metrics.identified(own, own).all()
    assert metrics.identified(own.roll(1, 0), own).sum() == 0
    assert metrics.identified(0.9 * own + 0.1 * own.roll(1, 0), own).all()


def test_skill_is_zero_at_the_floor_and_one_at_full_agreement() -> None:
    floor, count = 0.8 * 5, 5.0
    assert metrics.skill(np.array([floor, floor, count])) == pytest.approx(0)
    assert metrics.skill(np.array([count, floor, count])) == pytest.approx(1)
    assert metrics.skill(np.array([4.5, floor, count])) == pytest.approx(0.5)


def test_slope_and_pearson_agree_with_scipy() -> None:
    x = RNG.random(50)
    y = 0.7 * x + 0.1 * RNG.random(50)
    sums = metrics.moments(x, y).sum(0)
    expected = linregress(x, y)
    assert metrics.slope(sums) == pytest.approx(expected.slope)
    assert metrics.pearson(sums) == pytest.approx(expected.rvalue)


def test_interval_draws_members_not_rows() -> None:
    members = np.repeat(np.arange(20), 5)
    values = np.repeat(RNG.normal(size=20), 5)  # five equal rows per member carry no more than one
    many = metrics.summarize("s", "r", "test", "m", metrics.mean_of(values), members)
    few = metrics.summarize("s", "r", "test", "m", metrics.mean_of(values[::5]), members[::5])
    keys = ("mean", "low", "high")
    assert [many[key] for key in keys] == pytest.approx([few[key] for key in keys])
    assert many["n"] == 20
    deviation = values[::5].std() / np.sqrt(20)
    assert many["high"] - many["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.2)
    naive = metrics.summarize("s", "r", "test", "m", metrics.mean_of(values), np.arange(100))
    assert naive["high"] - naive["low"] < many["high"] - many["low"]


def test_an_ensemble_averages_probabilities_and_its_interval_draws_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (80,), generator=generator)
    right = torch.nn.functional.one_hot(labels, 3)
    outputs = behavior.Outputs(right + 1.5 * torch.randn(12, 80, 3, generator=generator), labels)
    whole = metrics.ensemble(outputs)
    mean = outputs.logits.softmax(-1).mean(0)
    torch.testing.assert_close(whole.probabilities[0], mean)
    found = metrics.summarize_ensemble("generate", "r", "test", outputs)
    assert found["mean"] == pytest.approx(float((mean.argmax(-1) == labels).float().mean()))
    assert found["mean"] > float(outputs.accuracy.max()) and found["n"] == 12
    drawn = torch.randint(12, (1000, 12), generator=generator)
    each = [float(metrics.ensemble(behavior.Outputs(outputs.logits[rows], labels)).accuracy) for rows in drawn]
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])), abs=0.015)
    copies = behavior.Outputs(outputs.logits[:1].expand(5, -1, -1), labels)
    alone = metrics.summarize_ensemble("generate", "r", "test", copies)
    assert alone["low"] == alone["mean"] == alone["high"] == pytest.approx(float(copies.accuracy[0]))


def test_novelty_ignores_the_own_member() -> None:
    flat = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    assert metrics.typical_nearest_distance(flat, np.array([0, 0, 1, 1])) == pytest.approx(0.9)
    assert metrics.nearest_distance(torch.tensor([[0.3]]), flat).item() == pytest.approx(0.2)


# reconstruction


def test_perfect_reconstruction_scores_perfectly(tiny_zoo: ModelZoo) -> None:
    tasks = {"digits": load_task("digits")}
    originals = tiny_zoo.select(split=["test", "val"], epoch=2)
    tokenizer = Tokenizer(originals.architecture)
    normalizer = standardize(tokenizer, tokenizer.tokenize(originals.weights).x)

    def tokens(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return normalizer.normalize(tokenizer.tokenize(weights).x)

    records = {r["metric"]: r["mean"] for r in summarize(compare(originals, originals, tasks, tokens), "r", "test")}
    for name in ("agreement", "skill", "identity", "agreement on errors", "structural R2", "accuracy fidelity: slope"):
        assert records[name] == pytest.approx(1), name
    assert records["weight distance"] == 0
    mean = {name: w.mean(0, keepdim=True).expand_as(w) for name, w in originals.weights.items()}
    collapsed = Checkpoints(originals.architecture, mean, originals.frame)
    found = {r["metric"]: r["mean"] for r in summarize(compare(originals, collapsed, tasks, tokens), "r", "test")}
    assert found["structural R2"] == pytest.approx(0, abs=1e-5)
    assert found["identity"] == pytest.approx(1 / len(originals))  # one network for all is nearest to one of them
    assert found["reconstructed accuracy"] != records["reconstructed accuracy"]


def test_accuracies_are_tested_over_members_not_checkpoints(
    representation: HyperRepresentation, tiny_zoo: ModelZoo
) -> None:
    originals = tiny_zoo.select(split="test", epoch=[1, 2])
    again = representation.reconstruct(originals)
    rows = compare(originals, again, {"digits": load_task("digits")}, representation.cpu_tokens)
    records = {r["metric"]: r for r in summarize(rows, "r", "test")}
    means = rows.groupby("member")[["original_acc", "reconstructed_acc"]].mean()
    assert 2 < len(means) < len(rows)
    welch = ttest_ind(means["original_acc"], means["reconstructed_acc"], equal_var=False).pvalue
    assert records["accuracy: t-test p"]["mean"] == pytest.approx(welch)
    related = ttest_rel(means["original_acc"], means["reconstructed_acc"]).pvalue
    assert records["accuracy: paired t-test p"]["mean"] == pytest.approx(related)
    assert records["accuracy: paired t-test p"]["n"] == len(means)
    assert records["best reconstructed accuracy"]["mean"] == rows["reconstructed_acc"].max()
    twice = {r["metric"]: r for r in summarize(pd.concat([rows, rows], ignore_index=True), "r", "test")}
    assert twice["accuracy: KS p"]["mean"] == records["accuracy: KS p"]["mean"]  # equal rows add no evidence


def test_pca_equals_sklearn() -> None:
    x = RNG.normal(size=(30, 12)).astype(np.float32)
    ours = fit_pca(torch.from_numpy(x), 5)
    theirs = PCA(5).fit(x)
    back = ours.decode(ours.encode(torch.from_numpy(x))).numpy()
    np.testing.assert_allclose(back, theirs.inverse_transform(theirs.transform(x)), atol=1e-4)
    assert len(fit_pca(torch.from_numpy(x), 100).components) == 12
    assert len(fit_pca(torch.from_numpy(x[:4]), 100).components) == 3


# probes


def test_ridge_probe_chooses_its_penalty_on_validation() -> None:
    x = {split: RNG.normal(size=(n, 5)) for split, n in {"train": 60, "val": 40, "test": 50}.items()}
    weight = RNG.normal(size=5)
    y = {split: values @ weight for split, values in x.items()}
    predicted = ridge_probe([x], y, (1e-6, 10.0))
    assert r2_score(y["test"], predicted["test"]) > 0.999
    mean, std = x["train"].mean(0), x["train"].std(0)
    alone = Ridge(10.0 * 60).fit((x["train"] - mean) / std, y["train"])
    np.testing.assert_allclose(ridge_probe([x], y, (10.0,))["test"], alone.predict((x["test"] - mean) / std), rtol=1e-6)


def test_weight_statistics_by_hand(tiny_zoo: ModelZoo) -> None:
    checkpoints = tiny_zoo.select(split="test", epoch=2)
    found = weight_statistics(checkpoints)
    assert found.shape == (len(checkpoints), 7 * len(checkpoints.weights))
    first = checkpoints.weights["conv1.weight"][1].flatten().double().numpy()
    expected = [first.mean(), first.std(), *np.quantile(first, [0, 0.25, 0.5, 0.75, 1])]
    np.testing.assert_allclose(found[1, :7], expected)


# generation


def test_kde_without_bandwidth_gives_the_anchors_back(representation: HyperRepresentation, tiny_zoo: ModelZoo) -> None:
    anchors = tiny_zoo.select(split="train", epoch=2)
    made = representation.generate(5, kde(0.0), anchors, seed=3)
    expected = representation.reconstruct(anchors).flat()
    assert torch.cdist(made.flat(), expected).min(1).values.max() < 1e-4


def test_anchors_are_the_best_by_validation_one_per_member(tiny_zoo: ModelZoo) -> None:
    anchors = choose_anchors(tiny_zoo.select(split="train", epoch=[1, 2]), 4).frame
    frame = tiny_zoo.frame[(tiny_zoo.frame["split"] == "train") & tiny_zoo.frame["epoch"].isin([1, 2])]
    best = frame.groupby("member")["val_acc"].max().nlargest(4)
    assert sorted(anchors["val_acc"]) == sorted(best)
    assert anchors["member"].is_unique


def test_generated_networks_come_back_as_modules(
    representation: HyperRepresentation, tiny_zoo: ModelZoo, tmp_path: Path
) -> None:
    made = representation.generate(3, kde(0.1), tiny_zoo.select(split="train", epoch=2))
    table = pd.DataFrame(
        {"representation": ["r"] * 3, "network": range(3), "task": "digits", "test_acc": [0.1, 0.2, 0.3]}
    )
    save_networks(tmp_path, "r", made, table)
    again = load_networks(tmp_path / "r.safetensors")
    assert torch.equal(again.flat(), made.flat())
    assert again.frame["test_acc"].tolist() == [0.1, 0.2, 0.3]
    images = load_task("digits").test.images[:7]
    network = load_network(tmp_path / "r.json", 1)
    assert isinstance(network, torch.nn.Module)
    torch.testing.assert_close(network(images), behavior.outputs(made, images).logits[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="has no network 3; it has networks 0 to 2"):
        load_network(tmp_path / "r", 3)
    (tmp_path / "r.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_networks(tmp_path / "r")


def test_every_sampler_makes_networks_that_are_scored(representation: HyperRepresentation, tiny_zoo: ModelZoo) -> None:
    config = GenerateConfig(anchors=5, networks=3, samplers=tuple(SAMPLERS), bandwidths=(0.1, 0.3))
    made = generate(tiny_zoo, {"r": representation}, {"digits": load_task("digits")}, config, seed=0)
    assert {f"r, {sampler}" for sampler in SAMPLERS} < set(made.networks)
    for name, networks in made.networks.items():
        scored = made.table[made.table["representation"] == name]
        images = load_task("digits").test
        accuracy = behavior.outputs(networks, images.images, images.labels).accuracy
        np.testing.assert_allclose(scored["test_acc"], accuracy, atol=1e-6)
    unit = {r["metric"]: r["mean"] for r in made.records if r["representation"] == ANCHORS}
    assert unit["diversity in structure"] == pytest.approx(1) and unit["diversity in behavior"] == pytest.approx(1)
    assert unit["novelty"] == pytest.approx(0)
    with pytest.raises(UserError, match="unknown sampler 'kdee'; the samplers are kde, "):
        bad = GenerateConfig(anchors=5, networks=3, samplers=("kdee",))
        generate(tiny_zoo, {"r": representation}, {"digits": load_task("digits")}, bad, seed=0)


def test_members_of_several_tasks_are_scored_on_their_own(tmp_path: Path, tiny_config: ZooConfig) -> None:
    names = ("digits", "street@1x8x8")
    zoo = train_population(dataclasses.replace(tiny_config, tasks=names), tmp_path / "zoo", 0, torch.device("cpu"))
    config = PretrainConfig(epochs=(1, 2), steps=4, batch_size=4, validate_every=2)
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, components=2)
    loss = LossConfig(queries=16)
    two = pretrain(zoo, tmp_path / "two", config, loss, size, 0, torch.device("cpu"))
    tasks = {name: load_task(name) for name in names}
    _, rows = reconstruct(zoo, {"two": two}, tasks, ReconstructConfig(("test",)))
    known = zoo.frame.set_index(["member", "epoch"])["test_acc"]
    for row in rows.itertuples():
        assert row.original_acc == pytest.approx(known[row.member, row.epoch], abs=1e-6)
    made = generate(zoo, {"two": two}, tasks, GenerateConfig(anchors=4, networks=3, bandwidths=(0.1,)), seed=0)
    assert {record["split"] for record in made.records} == {"test digits", "test street@1x8x8"}
    assert made.networks["two"].frame["task"].tolist() == ["digits"] * 3 + ["street@1x8x8"] * 3
    records, curves = finetune(made.networks, tasks, FinetuneConfig(networks=2, epochs=(0,)), seed=0)
    assert {record["split"] for record in records} == {"test digits", "test street@1x8x8"}
    own = made.table[(made.table["representation"] == "two") & (made.table["network"] != 1)]  # first and last of three
    start = curves[curves["representation"] == "two"].sort_values(["task", "network"])["test_acc"]
    np.testing.assert_allclose(start, own.sort_values(["task", "network"])["test_acc"], atol=1e-6)


# fine-tuning


def test_another_number_of_classes_gets_a_new_classifier(tiny_zoo: ModelZoo) -> None:
    networks = tiny_zoo.select(split="test", epoch=1)
    digits = load_task("digits")
    few = {name: ImageSplit(s.images[s.labels < 4], s.labels[s.labels < 4]) for name, s in
           (("train", digits.train), ("val", digits.val), ("test", digits.test))}  # fmt: skip
    task = ImageTask("few", 4, **few)
    adapted = for_task(networks, task, "kaiming_uniform", 0)
    assert adapted.weights["fc2.weight"].shape[1:] == (4, 20)
    assert torch.equal(adapted.weights["fc1.weight"], networks.weights["fc1.weight"])
    assert not torch.equal(adapted.weights["fc2.weight"][0], adapted.weights["fc2.weight"][1])
    assert for_task(networks, digits, "kaiming_uniform", 0) is networks
    config = FinetuneConfig(networks=4, epochs=(0, 1), task="few")
    records, _ = finetune({"r": networks}, {"few": task}, config, seed=0)
    found = {(r["representation"], r["metric"]): r["mean"] for r in records}
    assert found["r", "accuracy after 1 epoch"] > max(0.5, found[SCRATCH, "accuracy after 1 epoch"])
    with pytest.raises(UserError, match=r"take images of shape \(1, 8, 8\).*street@1x8x8"):
        for_task(networks, load_task("street"), "kaiming_uniform", 0)


def test_finetuning_is_population_training(tiny_zoo: ModelZoo) -> None:
    task = load_task("digits")
    networks = tiny_zoo.select(split="test", epoch=1)
    config = FinetuneConfig(networks=2, epochs=(0, 1))
    records, curves = finetune({"r": networks}, {"digits": task}, config, seed=0)
    assert set(curves["representation"]) == {"r", SCRATCH}
    at_zero = curves[(curves["representation"] == "r") & (curves["epoch"] == 0)]["test_acc"].to_numpy()
    np.testing.assert_allclose(at_zero, networks.frame["test_acc"].iloc[[0, -1]], atol=0.005)
    ones = Recipe(torch.full((2,), 1e-3), torch.zeros(2), (0, 1))
    *_, (epoch, _) = train(networks.architecture, networks.rows(slice(0, 2)).weights, task, ones, 1, 1)
    assert epoch == 1
    metric = {(r["representation"], r["metric"]): r["mean"] for r in records}
    assert metric["r", "accuracy after 1 epoch"] > metric["r", "accuracy after 0 epochs"]
    assert metric["r", "accuracy after 0 epochs"] == pytest.approx(at_zero.mean())


def test_finetuning_takes_networks_of_every_rank(tiny_zoo: ModelZoo) -> None:
    networks = tiny_zoo.select(epoch=2)
    best_first = networks.rows(networks.frame["test_acc"].to_numpy().argsort()[::-1])
    config = FinetuneConfig(networks=4, epochs=(0,))
    _, curves = finetune({"sorted": best_first}, {"digits": load_task("digits")}, config, seed=0)
    found = curves.loc[curves["representation"] == "sorted", "test_acc"].to_numpy()
    ranks = [0, 6, 11, 17]  # of 18 members: the first 4 would be the best 4
    np.testing.assert_allclose(found, best_first.frame["test_acc"].iloc[ranks], atol=1e-6)
