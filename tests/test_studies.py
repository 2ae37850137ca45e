"""Studies: every one runs at a tiny size, resumes, and leaves its table, figure and page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from weightspace import studies
from weightspace.config import PRESETS, SCALES, Experiment, GenerateConfig, StudyConfig, check, network_for
from weightspace.downstream import metrics
from weightspace.report.study import make_study_report
from weightspace.runs import UserError
from weightspace.studies import STUDIES, Lab, Variant, foreign_of, others, over_seeds, run_study

CPU = torch.device("cpu")


def tiny() -> Experiment:
    base = SCALES["smoke"]("digits")
    return dataclasses.replace(
        base,
        zoo=dataclasses.replace(base.zoo, epochs=1, save_epochs=(0, 1), workers=1, group=8),
        pretrain=dataclasses.replace(base.pretrain, steps=2, epochs=(1,), validate_every=1, batch_size=4),
        generate=GenerateConfig(anchors=3, networks=3, bandwidths=(0.1,)),
    )


@pytest.fixture(scope="module")
def lab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all studies, which share zoos and representations in it."""
    return tmp_path_factory.mktemp("lab")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STUDIES))
def test_every_study_leaves_its_table_figure_and_page(
    name: str, lab_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightspace.report.study.STAGES", ())  # their figures cost more than all else, and have tests
    page = run_study(name, tiny(), lab_folder, CPU, f"weightspace study {name}")
    records = json.loads((lab_folder / name / "records.json").read_text())
    found = {record["metric"] for record in records}
    wanted = set(STUDIES[name].metrics) - {"accuracy after 5 epochs", "accuracy init"}  # the tiny base has no such
    assert wanted <= found
    assert any(record["variant"] for record in records)
    assert (page.parent / "tables" / f"{name}_test.csv").is_file()
    assert (page.parent / "figures" / f"{name}_test.png").is_file()
    text = page.read_text()
    assert STUDIES[name].question.split("?")[0] in text and f"weightspace study {name}" in text
    shown = pd.read_csv(page.parent / "tables" / f"{name}_test.csv")
    first = next(record for record in records if record["split"] == "test" and record["mean"] is not None)
    row = shown[(shown["representation"] == first["representation"]) & (shown["metric"] == first["metric"])]
    assert row["mean"].iloc[0] == pytest.approx(first["mean"])


def test_an_interrupted_study_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_study("cycle", tiny(), tmp_path / "whole", CPU)
    original, calls = studies.pretrain_stage, 0

    def dies(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(*arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(studies, "pretrain_stage", dies)
        with pytest.raises(KeyboardInterrupt):
            run_study("cycle", tiny(), tmp_path / "parts", CPU)
    kept = {path.name for path in (tmp_path / "parts" / "representations").iterdir()}
    assert len(kept) == 2
    with pytest.raises(UserError, match="not a finished study"):
        make_study_report(tmp_path / "parts" / "cycle")
    run_study("cycle", tiny(), tmp_path / "parts", CPU)
    for name in ("records.json", "report/index.html", "report/tables/cycle_test.csv"):
        assert (tmp_path / "parts" / "cycle" / name).read_bytes() == (tmp_path / "whole" / "cycle" / name).read_bytes()
    stamp = page.parent.parent / "records.json"
    before = stamp.stat().st_mtime_ns
    assert run_study("cycle", tiny(), tmp_path / "whole", CPU) == page
    assert stamp.stat().st_mtime_ns == before


def test_another_base_is_not_mixed_in(lab_folder: Path) -> None:
    run_study("spectrum", tiny(), lab_folder, CPU)
    with pytest.raises(UserError, match=r"holds another config \(base.seed: 0 there, 1 asked for\)"):
        run_study("spectrum", dataclasses.replace(tiny(), seed=1), lab_folder, CPU)
    with pytest.raises(UserError, match="unknown study 'gama'; the studies are losses, "):
        run_study("gama", tiny(), lab_folder, CPU)


def test_variants_change_what_they_name(tmp_path: Path) -> None:
    lab = Lab(tiny(), tmp_path, "beta", CPU)
    variant = lab.variant(beta=0.3, latent=5, steps=7, x=0.3)
    assert (variant.loss.beta, variant.autoencoder.latent, variant.pretrain.steps, variant.x) == (0.3, 5, 7, 0.3)
    assert variant.loss.gamma == tiny().representations["structure+behavior"].gamma
    with pytest.raises(TypeError, match="nonsense"):
        lab.variant(nonsense=1)


@pytest.mark.parametrize("best", [3e-5, 1e-3, 3e-2])
def test_tuning_climbs_until_both_neighbors_are_worse(best: float, tmp_path: Path, monkeypatch: Any) -> None:
    tried = []

    def represent(lab: Lab, zoo: object, variant: Variant, title: str) -> SimpleNamespace:
        tried.append(variant.pretrain.learning_rate)
        return SimpleNamespace(info={"validation": {"agreement": -abs(np.log(tried[-1] / best))}})

    monkeypatch.setattr(Lab, "represent", represent)
    lab = Lab(tiny(), tmp_path, "losses", CPU)
    assert lab.tuned(None, lab.variant(), "r").pretrain.learning_rate == best  # type: ignore[arg-type]
    assert len(tried) == len(set(tried)) and {rate for rate in tried if rate < best} and max(tried) > best


def test_over_seeds_is_a_t_interval() -> None:
    values = np.array([0.7, 0.8, 0.75])
    record = over_seeds("reconstruct", "r", "test", "skill", values)
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert (record["mean"], record["low"], record["high"], record["n"]) == pytest.approx((0.75, low, high, 3))


def test_a_study_at_several_seeds_is_one_table_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(lab: Lab) -> list[dict[str, Any]]:
        values = {"skill": (0.5, 0.7, 0.9)[lab.base.seed - 4], "accuracy: KS p": 0.01}
        made = [metrics.record("reconstruct", "beta 0", "test", name, value) for name, value in values.items()]
        (lab.own / "mark").mkdir(parents=True)
        return [studies.placed(record, lab.variant(x=0.0, group="g")) for record in made]

    monkeypatch.setitem(STUDIES, "beta", dataclasses.replace(STUDIES["beta"], run=run, metrics=("skill",)))
    monkeypatch.setattr("weightspace.report.study.STAGES", ())
    base = dataclasses.replace(tiny(), seed=4)
    page = run_study("beta", base, tmp_path, CPU, seeds=3)
    assert page.parent.parent == tmp_path / "beta-3-seeds"
    assert sorted(path.parent.name for path in tmp_path.glob("*/*/mark")) == ["seed-4", "seed-5", "seed-6"]
    (record,) = json.loads((tmp_path / "beta-3-seeds" / "records.json").read_text())
    expected = over_seeds("reconstruct", "beta 0", "test", "skill", np.array([0.5, 0.7, 0.9]))
    assert record == {**expected, "x": 0.0, "group": "g", "variant": True}
    for name, seeds, least in (("beta", 0, 1), ("seeds", 1, 2)):
        with pytest.raises(UserError, match=f"the study {name} needs at least {least} seeds, given --seeds {seeds}"):
            run_study(name, base, tmp_path, CPU, seeds=seeds)


@pytest.mark.parametrize("scale", list(SCALES))
@pytest.mark.parametrize("task", ["digits", "street", "mnist", "cifar10:data", "street@1x8x8"])
def test_every_scale_fits_every_task(scale: str, task: str) -> None:
    experiment = SCALES[scale](task)
    check(experiment)
    assert set(experiment.pretrain.epochs) <= set(experiment.zoo.save_epochs)
    expected = {"digits": "CNN8", "street@1x8x8": "CNN8", "mnist": "CNN"}.get(task, "CNN3")
    assert experiment.zoo.network == network_for(task) == expected


def test_presets_are_complete() -> None:
    for name, preset in PRESETS.items():
        check(preset())
        assert set(preset().representations) == {"structure", "structure+behavior"}, name


@pytest.mark.parametrize("task", ["digits", "street", "patches"])
def test_other_tasks_have_the_same_shape(task: str) -> None:
    from weightspace.tasks.images import load_task

    base = SCALES["smoke"](task)
    shapes = {load_task(name).input_shape for name in (task, *others(base), foreign_of(base))}
    assert len(shapes) == 1 and len({task, *others(base)}) == 3


def test_published_tasks_have_the_published_others_unless_some_are_named() -> None:
    base = SCALES["paper"]("svhn")
    assert others(base) == ("cifar10", "eurosat") and foreign_of(base) == "stl10@3x32x32"
    named = dataclasses.replace(base, study=StudyConfig(foreign="stl10@3x32x32:mine", others=("cifar10:here",)))
    assert others(named) == ("cifar10:here",) and foreign_of(named) == "stl10@3x32x32:mine"


def variants_of(name: str, base: Experiment, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """(config of the zoo, variants) that a study compares, with nothing trained."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(Lab, "zoo", lambda lab, **changes: dataclasses.replace(lab.base.zoo, **changes))
    monkeypatch.setattr(Lab, "rate", lambda lab, name: 1e-3)
    monkeypatch.setattr(Lab, "compare", lambda lab, zoo, variants, **_: asked.update(zoo=zoo, variants=variants) or [])
    STUDIES[name].run(Lab(base, folder, name, CPU))
    return asked["zoo"], asked["variants"]


def test_the_published_recipe_is_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, variants = variants_of("attention", SCALES["paper"]("svhn"), tmp_path, monkeypatch)
    recipe = variants["published recipe, structure+behavior"]
    settings = recipe.pretrain
    assert (settings.normalize, settings.schedule, settings.warmup, settings.weight_decay) == (
        "none",
        "constant",
        0,
        3e-9,
    )
    assert (recipe.loss.distance, recipe.loss.permute, recipe.loss.queries) == ("probabilities", "all", 256)
    assert (recipe.loss.gamma, recipe.loss.beta, recipe.autoencoder.components) == (0.05, 0.1, 0)
    assert variants["published recipe, structure"].loss.beta == 1.0


def test_lenet5_is_studied_at_the_published_bottlenecks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, variants = variants_of("lenet5", SCALES["paper"]("street"), tmp_path, monkeypatch)
    assert zoo.network == "LeNet5" and len(zoo.learning_rates) == 5
    assert {(v.x, v.autoencoder.latent, v.autoencoder.token_size) for v in variants.values()} == {
        (32.0, 32, 256), (64.0, 64, 256), (128.0, 128, 256)
    }  # fmt: skip
    zoo, _ = variants_of("lenet5", SCALES["small"]("digits"), tmp_path, monkeypatch)
    assert zoo.tasks == ("digits@3x32x32",) and len(zoo.learning_rates) == 2


def test_the_multi_task_zoo_is_the_published_one_at_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo, variants = variants_of("multitask", SCALES["paper"]("svhn"), tmp_path, monkeypatch)
    grid = zoo.inits, range(zoo.seeds), zoo.learning_rates, zoo.weight_decays, zoo.tasks
    assert math.prod(map(len, grid)) == 1440 and zoo.network == "LeNet5"
    assert zoo == PRESETS["paper-multitask"]().zoo and zoo.tasks == ("svhn", "cifar10", "eurosat")
    assert [variant.loss.query_set for variant in variants.values()] == ["own", "own", "tasks"]
    small, _ = variants_of("multitask", SCALES["small"]("street"), tmp_path, monkeypatch)
    assert small.network == "CNN3" and small.tasks == ("street", "patches", "digits@3x32x32")


def test_published_presets_have_the_published_sizes() -> None:
    for name in ("paper", "paper-lenet5", "paper-mnist"):
        base = PRESETS[name]()
        grid = base.zoo.inits, range(base.zoo.seeds), base.zoo.learning_rates, base.zoo.weight_decays
        assert math.prod(map(len, grid)) == 1200 and base.zoo.save_epochs == tuple(range(51))
        assert (base.zoo.val_share, base.zoo.test_share, base.autoencoder.components) == (0.05, 0.15, 1)
    assert PRESETS["paper-lenet5"]().autoencoder.token_size == 256 and PRESETS["paper-mnist"]().zoo.network == "CNN"
