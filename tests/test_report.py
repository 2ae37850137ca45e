"""Reports of a small synthetic run and of small studies: complete, exact, repeatable, and closed to outside."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from weightspace.report import figures, tables
from weightspace.report.page import looks_of, make_report, read_run, split_cell
from weightspace.report.study import make_study_report
from weightspace.runs import UserError, read_lines, write_json, write_lines

REPRESENTATIONS = ("structure", "structure+behavior")
BASELINES = ("anchors", "anchors + noise", "weight averages", "PCA")
FIGURES = (
    "zoo_accuracy",
    "zoo_hyperparameters",
    "training_curves",
    "embedding_map",
    "probe_scatter",
    "reconstruction_accuracy",
    "reconstruction_distributions",
    "accuracy_distributions",
    "accuracy_histograms",
    "generation_novelty",
    "finetuning_curves",
)
KINDS = ("csv", "md", "tex")
RECORDED = ("probe", "reconstruct", "generate", "finetune")


def record(
    stage: str, representation: str, split: str, metric: str, mean: float, half: float | None, n: int | None
) -> dict[str, Any]:
    """A tidy record with a symmetric interval."""
    bounds = {"low": None if half is None else mean - half, "high": None if half is None else mean + half}
    return {"stage": stage, "representation": representation, "split": split, "metric": metric, "mean": mean} | {
        **bounds,
        "n": n,
    }


def write_zoo(run: Path, rng: np.random.Generator) -> pd.DataFrame:
    """A zoo of 40 members at 6 epochs, without its weights."""
    splits = ["train"] * 22 + ["val"] * 4 + ["test"] * 8 + ["unseen"] * 6
    skill = rng.beta(6, 1.5, len(splits))
    rows = []
    for member, split in enumerate(splits):
        for epoch in (0, 1, 2, 5, 10, 25):
            test = 0.1 + (0.88 * skill[member]) * (1 - np.exp(-epoch / 3)) + rng.normal(0, 0.01)
            row = {"member": member, "epoch": epoch, "split": split, "test_acc": test, "gap": rng.normal(0.02, 0.01)}
            rows.append(row | {"init": ("normal", "uniform")[member % 2], "learning_rate": (1e-3, 3e-3)[member % 2]})
    frame = pd.DataFrame(rows)
    (run / "zoo").mkdir(parents=True)
    frame.to_parquet(run / "zoo" / "checkpoints.parquet")
    architecture = {"name": "CNN8", "arguments": {"channels": 1, "classes": 10}}
    write_json(run / "zoo" / "zoo.json", {"architecture": architecture, "task": "digits", "provenance": {}})
    return frame


def write_representations(run: Path, rng: np.random.Generator) -> None:
    """Two metrics.jsonl with a minimum before the end; one representation never saw behavior."""
    for name in REPRESENTATIONS:
        lines: list[dict[str, Any]] = [{"step": 1, "train": {"total": 9.0}}]
        for step in range(0, 1001, 100):
            fall = np.exp(-step / 250) + (0.0004 * (step - 800) if step > 800 else 0)
            val = {"contrastive": 1 + fall, "structural": 0.08 + 0.9 * fall, "agreement": 0.9 - 0.7 * fall}
            if "behavior" in name:
                val["behavioral"] = 0.03 + fall + rng.uniform(0, 0.01)
            val["total"] = 0.1 + fall
            lines.append({"step": step, "train": {"total": 0.1 + fall}, "val": val})
        folder = run / "representations" / name
        write_lines(folder / "metrics.jsonl", lines)
        write_json(folder / "config.json", {"pretrain": {"steps": 1000, "batch_size": 32}, "latent_size": 1500})


def write_probe(run: Path, rng: np.random.Generator) -> None:
    """Probes of three properties from four kinds of features, and a map."""
    features = (*REPRESENTATIONS, "weight statistics", "raw weights")
    records, predictions = [], []
    for i, name in enumerate(features):
        for split in ("test", "unseen"):
            for j, target in enumerate(("test_acc", "gap", "epoch")):
                records.append(record("probe", name, split, f"R2 {target}", 0.95 - 0.1 * i - 0.2 * j, 0.03, 32))
                for member in range(32):
                    true = (rng.beta(6, 1.5), rng.normal(0.02, 0.01), rng.choice([5, 10, 25]))[j]
                    scale = (0.05, 0.004, 3.0)[j] * (1 + i)
                    row = {"features": name, "property": target, "split": split, "member": member, "epoch": 25}
                    predictions.append(row | {"true": float(true), "predicted": true + rng.normal(0, scale)})
    write_json(run / "probe" / "records.json", records)
    pd.DataFrame(predictions).to_parquet(run / "probe" / "predictions.parquet")
    points = []
    for name in REPRESENTATIONS:
        for split in ("train", "test", "unseen"):
            for accuracy in rng.beta(6, 1.5, 60):
                x, y = accuracy * 4 + rng.normal(0, 0.3), rng.normal(0, 1)
                points.append({"representation": name, "split": split, "x": x, "y": y, "test_acc": accuracy})
    pd.DataFrame(points).to_parquet(run / "probe" / "map.parquet")


def write_reconstruct(run: Path, rng: np.random.Generator) -> None:
    """Reconstructions of two representations; one number is not finite."""
    records, rows = [], []
    for name, quality in zip((*REPRESENTATIONS, "PCA"), (0.5, 0.95, 0.7), strict=True):
        for split in ("test", "unseen"):
            for metric, mean in {
                "agreement": quality,
                "floor": 0.45,
                "skill": (quality - 0.45) / 0.55,
                "identity": quality - 0.1,
                "agreement on errors": quality - 0.2,
                "accuracy fidelity: slope": quality,
                "accuracy fidelity: Pearson r": float("nan") if name == "structure" else 0.9,
                "accuracy fidelity: mean absolute difference": 1 - quality,
                "structural R2": 0.9,
                "weight distance": 3.0,
                "original accuracy": 0.8,
                "reconstructed accuracy": 0.8 * quality,
            }.items():
                records.append(record("reconstruct", name, split, metric, mean, 0.0213, 8 if metric != "floor" else 28))
            for member in range(24):
                original = rng.beta(6, 1.5)
                row = {"representation": name, "split": split, "member": member, "epoch": 25, "original_acc": original}
                row |= {"reconstructed_acc": original * quality * rng.uniform(0.9, 1), "identified": member % 2 == 0}
                rows.append(row | {"agreement": quality * rng.uniform(0.9, 1), "distance": 3 + rng.normal(0, 0.4)})
    write_json(run / "reconstruct" / "records.json", records)
    pd.DataFrame(rows).to_parquet(run / "reconstruct" / "checkpoints.parquet")


def write_generate(run: Path, rng: np.random.Generator) -> None:
    """Generated networks of two representations and four baselines."""
    records, rows = [], []
    for i, name in enumerate((*REPRESENTATIONS, *BASELINES)):
        accuracy = np.clip(rng.normal((0.4, 0.85, 0.95, 0.6, 0.7, 0.3)[i], 0.08, 40), 0, 1)
        novelty = np.abs(rng.normal((1.4, 1.2, 0.0, 1.1, 0.9, 1.6)[i], 0.1 if i != 2 else 0, 40))
        for metric, mean in {
            "mean accuracy": accuracy.mean(),
            "median accuracy": np.median(accuracy),
            "best accuracy": accuracy.max(),
            "diversity in structure": 0.9,
            "diversity in behavior": 1.1,
            "novelty": novelty.mean(),
            "ensemble accuracy": 0.9,
        }.items():
            half = 0.02 if metric != "ensemble accuracy" else None
            records.append(record("generate", name, "", metric, float(mean), half, 40 if half else None))
        for network in range(40):
            row = {"representation": name, "network": network, "test_acc": accuracy[network]}
            rows.append(row | {"novelty": novelty[network]})
    write_json(run / "generate" / "records.json", records)
    pd.DataFrame(rows).to_parquet(run / "generate" / "networks.parquet")


def write_finetune(run: Path, rng: np.random.Generator) -> None:
    """Fine-tuning of everything that was generated, beside training from scratch."""
    records, rows = [], []
    for i, name in enumerate((*REPRESENTATIONS, *BASELINES, "from scratch")):
        for epoch in (0, 1, 5):
            start = (0.4, 0.85, 0.95, 0.6, 0.7, 0.3, 0.1)[i]
            accuracy = 0.96 - (0.96 - start) * np.exp(-epoch / 2) + rng.normal(0, 0.02, 12)
            metric = f"accuracy after {epoch} epoch{'s' * (epoch != 1)}"
            records.append(record("finetune", name, "", metric, float(accuracy.mean()), 0.01, 12))
            row = {"representation": name, "epoch": epoch}
            rows += [row | {"network": network, "test_acc": value} for network, value in enumerate(accuracy)]
    write_json(run / "finetune" / "records.json", records)
    pd.DataFrame(rows).to_parquet(run / "finetune" / "curves.parquet")


def write_run(run: Path) -> Path:
    """A whole run, equal at every call."""
    rng = np.random.default_rng(7)
    write_zoo(run, rng)
    for write in (write_representations, write_probe, write_reconstruct, write_generate, write_finetune):
        write(run, rng)
    config = {"name": "digits <small> & co", "seed": 3, "zoo": {"task": "digits"}, "parameter_count": 2758}
    write_json(run / "config.json", config)
    write_json(run / "environment.json", {"python": "3.11", "packages": {"torch": "2.6"}})
    return run


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole run and the folder of its report."""
    run = write_run(tmp_path_factory.mktemp("report") / "run")
    make_report(run, run / "report")
    return run, run / "report"


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_table_and_figure_is_written_and_shown(reported: tuple[Path, Path]) -> None:
    _, folder = reported
    page = (folder / "index.html").read_text()
    expected = {f"figures/{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    expected |= {f"tables/{stage}.{kind}" for stage in (*tables.STAGES, "zoo_properties") for kind in KINDS}
    assert set(contents_of(folder)) == expected | {"index.html"}
    assert page.count("<img") == len(FIGURES)
    assert all(len(alt) > 20 for alt in re.findall(r'<img alt="([^"]*)"', page))
    for path in expected:
        assert f'href="{path}"' in page
    for path in folder.rglob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_results_are_exactly_the_records(reported: tuple[Path, Path]) -> None:
    run, folder = reported
    text = (run / "results.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    results = json.loads(text)
    assert all(set(entry) == set(tables.FIELDS) for entry in results)
    stages = [entry["stage"] for entry in results]
    assert stages == sorted(stages, key=tables.STAGES.index)
    for stage in RECORDED:
        written = json.loads((run / stage / "records.json").read_text())
        assert [entry for entry in results if entry["stage"] == stage] == written
        assert len(pd.read_csv(folder / "tables" / f"{stage}.csv")) == len(written)

    frame = pd.read_parquet(run / "zoo" / "checkpoints.parquet")
    test = frame[(frame["split"] == "test") & (frame["epoch"] == 25)]["test_acc"]
    found = next(entry for entry in results if entry["stage"] == "zoo" and entry["split"] == "test")
    assert found["n"] == 8
    assert found["mean"] == pytest.approx(test.mean())
    assert found["low"] < found["mean"] < found["high"]
    spread = 2 * 1.96 * test.std(ddof=0) / 8**0.5  # width of the normal interval, which the bootstrap approaches
    assert found["high"] - found["low"] == pytest.approx(spread, rel=0.15)

    pretrain = {
        (entry["representation"], entry["metric"]): entry["mean"] for entry in results if entry["stage"] == "pretrain"
    }
    best = np.exp(-800 / 250)  # the validation total is lowest at step 800, not at the end
    for name in REPRESENTATIONS:
        assert pretrain[name, "validation structural loss"] == pytest.approx(0.08 + 0.9 * best)
        assert pretrain[name, "validation agreement"] == pytest.approx(0.9 - 0.7 * best)


def test_equal_runs_give_equal_bytes(reported: tuple[Path, Path], tmp_path: Path) -> None:
    run, folder = reported
    again = write_run(tmp_path / "elsewhere")
    make_report(again, tmp_path / "other name")
    first, second = contents_of(folder), contents_of(tmp_path / "other name")
    assert [name for name in first if first[name] != second.get(name)] == []
    assert (run / "results.json").read_bytes() == (again / "results.json").read_bytes()


def test_a_changed_number_changes_page_and_figure(reported: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = reported
    again = write_run(tmp_path / "run")
    frame = pd.read_parquet(again / "zoo" / "checkpoints.parquet")
    frame.loc[frame["epoch"] == 25, "test_acc"] *= 0.9
    frame.to_parquet(again / "zoo" / "checkpoints.parquet")
    for part in ("representations", "probe", "reconstruct", "generate", "finetune"):
        shutil.rmtree(again / part)
    make_report(again, tmp_path / "report")
    for name in ("index.html", "tables/zoo.csv", "figures/zoo_accuracy.svg", "figures/zoo_accuracy.png"):
        assert (folder / name).read_bytes() != (tmp_path / "report" / name).read_bytes()


@pytest.mark.parametrize("write", [write_zoo, write_representations, write_reconstruct, write_finetune])
def test_a_partial_run_gives_a_page_with_what_is_there(write: Any, tmp_path: Path) -> None:
    write(tmp_path / "run", np.random.default_rng(0))
    page = make_report(tmp_path / "run", tmp_path / "report").read_text()
    assert "<table" in page and "<img" in page and "Not in this run" in page


def test_a_run_whose_training_has_not_validated_yet(tmp_path: Path) -> None:
    write_zoo(tmp_path, np.random.default_rng(0))
    write_lines(tmp_path / "representations" / "structure" / "metrics.jsonl", [{"step": 1, "train": {"total": 2.0}}])
    page = make_report(tmp_path, tmp_path / "report").read_text()
    assert 'id="zoo"' in page and 'id="pretrain"' not in page


def test_a_zoo_without_accuracy_is_no_error(tmp_path: Path) -> None:
    frame = write_zoo(tmp_path, np.random.default_rng(0))
    frame.drop(columns=["test_acc"]).to_parquet(tmp_path / "zoo" / "checkpoints.parquet")
    assert "40 members" in make_report(tmp_path, tmp_path / "report").read_text()


def test_a_folder_with_nothing_to_report(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=re.escape(str(folder)) + ".*expected.*zoo/checkpoints.parquet"):
            make_report(folder, tmp_path / "report")
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "report").exists()


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_finetune(tmp_path, rng)
    curves, records = tmp_path / "finetune" / "curves.parquet", tmp_path / "finetune" / "records.json"
    good = pd.read_parquet(curves)
    good.drop(columns=["network"]).to_parquet(curves)
    with pytest.raises(UserError, match=r"curves\.parquet lacks the columns network"):
        make_report(tmp_path, tmp_path / "report")
    curves.write_bytes(b"not a table")
    with pytest.raises(UserError, match=r"curves\.parquet cannot be read"):
        make_report(tmp_path, tmp_path / "report")
    good.to_parquet(curves)
    found = json.loads(records.read_text())
    write_json(records, [*found, found[0]])
    with pytest.raises(UserError, match="two records of finetune / structure"):
        make_report(tmp_path, tmp_path / "report")
    write_json(records, [{key: value for key, value in found[0].items() if key != "low"}])
    with pytest.raises(UserError, match="a record without low"):
        make_report(tmp_path, tmp_path / "report")


def test_the_page_asks_for_nothing_from_outside(reported: tuple[Path, Path]) -> None:
    page = (reported[1] / "index.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert "@import" not in page and "url(" not in page and "<script" not in page
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.startswith(("data:", "#", "figures/", "tables/")), target


def test_names_are_escaped_and_facts_are_told(reported: tuple[Path, Path]) -> None:
    page = (reported[1] / "index.html").read_text()
    assert "<small> &" not in page and "digits &lt;small&gt; &amp; co" in page
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for fact in (
        "40 members (22 train, 4 val, 8 test, 6 unseen), 240 checkpoints at epochs 0, 1, 2, 5, 10, 25",
        "CNN8 (channels 1, classes 10), 2,758 parameters",
        "1.84 weights per latent value (1,500 latent values)",
        "1,000 steps of 32 checkpoints",
    ):
        assert fact in text


def test_every_name_looks_its_own_and_only_representations_have_color(reported: tuple[Path, Path]) -> None:
    looks = looks_of(read_run(reported[0]))
    names = (*REPRESENTATIONS, *BASELINES, "weight statistics", "raw weights", "from scratch")
    assert set(looks) == set(names)
    assert len({(look.color, look.marker) for look in looks.values()}) == len(names)
    colored = {name for name, look in looks.items() if len({look.color[i : i + 2] for i in (1, 3, 5)}) > 1}
    assert colored == set(REPRESENTATIONS)


def test_cells() -> None:
    def text(mean: float | None, low: float | None, high: float | None) -> str:
        return tables.cell({"mean": mean, "low": low, "high": high})

    assert text(0.91234, 0.9, 0.9249) == "0.912 [0.900, 0.925]"
    assert text(-9.3444, -9.9, -1.0) == "-9.344 [-9.900, -1.000]"
    assert text(-97120273.3, -1e9, -1.0) == text(-10.01, None, None) == "<-10"
    assert text(-8.0, -1e9, 0.5) == "-8.000 [<-10, 0.500]"
    assert text(0.5, None, None) == text(0.5, float("nan"), float("nan")) == "0.500"
    assert text(None, None, None) == text(float("nan"), 0.1, 0.2) == tables.EN_DASH


def test_tables_pivot_in_order_of_appearance() -> None:
    records = [
        record("probe", "z first", "test", "R2 gap", 0.5, 0.1, 8),
        record("probe", "z first", "test", "A later", 0.25, None, None),
        record("probe", "a second", "test", "R2 gap", -0.5, 0.1, 6),
        record("probe", "a second", "test", "more", 0.5, 0.1, 9),
    ]
    frame = tables.table(records)
    assert list(frame.columns) == ["representation", "split", "R² generalization gap", "A later", "more", "n"]
    assert frame.to_numpy().tolist() == [
        ["z first", "test", "0.500 [0.400, 0.600]", "0.250", "\u2013", "8"],
        ["a second", "test", "-0.500 [-0.600, -0.400]", "\u2013", "0.500 [0.400, 0.600]", "6\u20139"],
    ]
    only_splits = tables.table([record("zoo", "", "test", "test accuracy", 0.5, None, None)])
    assert list(only_splits.columns) == ["split", "test accuracy"]


def test_wide_tables_are_turned() -> None:
    records = [
        record("reconstruct", name, split, f"metric {i}", i / 10, None, 8 if i else 28)
        for name in REPRESENTATIONS
        for split in ("test", "")
        for i in range(9)
    ]
    frame, turned = tables.table(records), tables.readable(records)
    both = ("structure, test", "structure", "structure+behavior, test", "structure+behavior")
    assert tuple(turned.columns) == ("metric", *both, "n")
    assert turned["metric"].tolist() == [f"metric {i}" for i in range(9)]
    assert (turned.iloc[:, 1:-1].to_numpy() == frame.iloc[:, 2:-1].to_numpy().T).all()
    assert turned["n"].tolist() == ["28"] + ["8"] * 8 and frame["n"].tolist() == ["8\u201328"] * 4
    assert tables.readable(records, widest=9).equals(frame)


def test_latex_is_escaped() -> None:
    frame = tables.table([record("probe", r"a_b & 50% #1 {x} ~ ^ \n $", "", "R2 my_metric", -0.5, 0.1, 8)])
    assert tables.to_latex(frame) == (
        "\\begin{tabular}{lrr}\n\\toprule\n"
        "representation & R$^2$ my\\_metric & n \\\\\n\\midrule\n"
        r"a\_b \& 50\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}n \$"
        " & $-$0.500 [$-$0.600, $-$0.400] & 8 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_markdown() -> None:
    frame = tables.table([record("probe", "a|b", "", "R2 gap", 0.5, None, 8)])
    assert tables.to_markdown(frame) == (
        "| representation | R² generalization gap | n |\n| --- | ---: | ---: |\n| a\\|b | 0.500 | 8 |\n"
    )


def test_numbers_below_the_worst_are_short_in_tables_and_whole_in_the_csv() -> None:
    low = {**record("probe", "raw weights", "test", "R2 gap", -97120273.3, None, 8), "low": -1e9, "high": 0.5}
    frame = tables.table([low, record("probe", "embeddings", "test", "R2 gap", -0.5, 0.1, 8)])
    assert frame["R² generalization gap"].tolist() == ["<-10", "-0.500 [-0.600, -0.400]"]
    assert split_cell("gap", "<-10") == ("<\u221210", "")
    assert split_cell("gap", "-0.500 [<-10, -0.400]") == ("\u22120.500", "[<\u221210, \u22120.400]")
    assert r"\textless{}$-$10" in tables.to_latex(frame)
    assert "-97120273.3,-1000000000.0,0.5,8" in tables.to_csv([low])


def test_zoo_properties_are_those_of_pandas(reported: tuple[Path, Path]) -> None:
    run, folder = reported
    shown = pd.read_csv(folder / "tables" / "zoo_properties.csv", index_col="property")
    assert list(shown.index) == ["test_acc", "gap", "learning_rate"]
    assert list(shown.columns) == ["count", "mean", "deviation", "min", "25%", "median", "75%", "max"]
    zoo = pd.read_parquet(run / "zoo" / "checkpoints.parquet")
    gap = zoo.loc[zoo["epoch"] == 25, "gap"]
    expected = [40, gap.mean(), gap.std(ddof=1), *np.quantile(gap, (0, 0.25, 0.5, 0.75, 1))]
    assert shown.loc[["gap"]].to_numpy()[0] == pytest.approx(expected)
    text = (folder / "tables" / "zoo_properties.md").read_text()
    assert f"| test accuracy | 40 | {zoo.loc[zoo['epoch'] == 25, 'test_acc'].mean():.4g} |" in text


def test_results_hold_the_properties_of_the_zoo(reported: tuple[Path, Path]) -> None:
    run, folder = reported
    shown = pd.read_csv(folder / "tables" / "zoo_properties.csv", index_col="property")
    results = json.loads((run / "results.json").read_text())
    found = {entry["metric"]: entry for entry in results if entry["stage"] == "zoo"}
    for name in shown.index:
        assert found[f"{name}: mean"]["n"] == shown.loc[name, "count"]
        for statistic in ("mean", "deviation", "min", "25%", "median", "75%", "max"):
            assert found[f"{name}: {statistic}"]["mean"] == pytest.approx(shown.loc[name, statistic])
    assert "deviation" not in (folder / "tables" / "zoo.csv").read_text()  # they have a table of their own


def test_a_zoo_alone_has_a_page(tmp_path: Path) -> None:
    write_zoo(tmp_path, np.random.default_rng(0))
    zoo = (tmp_path / "zoo").rename(tmp_path / "my zoo")
    page = make_report(zoo, zoo / "report").read_text()
    assert "my zoo" in page and "40 members" in page and "Not in this run" not in page
    assert {path.stem for path in (zoo / "report" / "figures").glob("*.svg")} == {"zoo_accuracy", "zoo_hyperparameters"}
    assert {path.stem for path in (zoo / "report" / "tables").glob("*.csv")} == {"zoo", "zoo_properties"}
    assert {entry["stage"] for entry in json.loads((zoo / "results.json").read_text())} == {"zoo"}


def test_only_a_smoke_run_is_told_to_mean_nothing(tmp_path: Path) -> None:
    write_zoo(tmp_path, np.random.default_rng(0))
    for name, told in (("smoke", True), ("digits", False)):
        write_json(tmp_path / "config.json", {"name": name})
        page = make_report(tmp_path, tmp_path / "report").read_text()
        assert ("Its numbers mean nothing." in page) is told


def test_bootstrap() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 2, 400)
    mean, low, high = tables.bootstrap(values, generator)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * 0.1, mean + 1.96 * 0.1), abs=0.03)
    assert np.isnan(tables.bootstrap(values[:1], generator)[1:]).all()
    assert np.isnan(tables.bootstrap(np.array([1.0, np.nan]), generator)).all()


ABOUT: dict[str, Any] = {
    "name": "beta",
    "question": "How much structure & <behavior>?",
    "task": "digits",
    "scale": "small",
    "command": "weightspace study beta",
    "metrics": ["skill", "agreement", "learning rate"],
    "x": "beta",
}


def study_records() -> list[dict[str, Any]]:
    """Two variants on two splits with a setting each, and a baseline."""
    records = []
    for i, name in enumerate(("beta 0.1", "beta 1")):
        place = {"x": (0.1, 1.0)[i], "group": None, "variant": True}
        for split in ("test", "unseen"):
            skill = -97120273.3 if split == "unseen" and i else 0.5 + i / 4
            records.append(record("reconstruct", name, split, "agreement", 0.8 + i / 10, 0.01, 8) | place)
            records.append(record("reconstruct", name, split, "skill", skill, 0.02, 8) | place)
            records.append(record("reconstruct", name, split, "weight distance", 3.0, 0.1, 8) | place)
        records.append(record("pretrain", name, "", "learning rate", 0.001 + i, None, None) | place)
    baseline = {"x": None, "group": None, "variant": False}
    return [*records, record("reconstruct", "PCA", "test", "skill", 0.7123456789, 0.02, 8) | baseline]


def write_small_study(folder: Path) -> Path:
    """A study of which no stage left anything."""
    write_json(folder / "study.json", ABOUT)
    write_json(folder / "records.json", study_records())
    return folder


def write_study(folder: Path) -> Path:
    """A study with every further table, equal at every call."""
    rng = np.random.default_rng(3)
    write_small_study(folder)
    write_representations(folder, rng)
    write_reconstruct(folder, rng)
    write_generate(folder, rng)
    counts = [(which, count) for which in ("top", "bottom", "mixed") for count in (1, 10, 100) for _ in range(6)]
    spectrum = pd.DataFrame(counts, columns=["which", "count"])
    spectrum = spectrum.assign(test_acc=rng.random(len(counts)), agreement=rng.random(len(counts)))
    spectrum.to_parquet(folder / "spectrum.parquet")
    curves = [{"name": n, "component": k, "variance": 0.5**k} for n in ("original", "beta 1") for k in range(9)]
    pd.DataFrame(curves).to_parquet(folder / "variance.parquet")
    probes = [
        {"representation": n, "epoch": e, "property": p, "mean": 0.5, "low": 0.4, "high": 0.6}
        for n in (*REPRESENTATIONS, "weight statistics")
        for e in (0, 5, 25)
        for p in ("test_acc", "gap")
    ]
    pd.DataFrame(probes).to_parquet(folder / "probe_epochs.parquet")
    return folder


@pytest.fixture(scope="module")
def study_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with every further table."""
    return make_study_report(write_study(tmp_path_factory.mktemp("study"))).parent


def test_the_tables_of_a_study_have_its_numbers(tmp_path: Path) -> None:
    folder = write_small_study(tmp_path)
    page = make_study_report(folder)
    report = folder / "report"
    assert page == report / "index.html"
    assert (report / "table.md").read_text() == (
        "| variant | split | skill | agreement | learning rate | n |\n| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| beta 0.1 | test | 0.500 [0.480, 0.520] | 0.800 [0.790, 0.810] | 0.001 | 8 |\n"
        "| beta 1 | test | 0.750 [0.730, 0.770] | 0.900 [0.890, 0.910] | 1.001 | 8 |\n"
        "| PCA | test | 0.712 [0.692, 0.732] | \u2013 | \u2013 | 8 |\n"
        "| beta 0.1 | unseen | 0.500 [0.480, 0.520] | 0.800 [0.790, 0.810] | 0.001 | 8 |\n"
        "| beta 1 | unseen | <-10 | 0.900 [0.890, 0.910] | 1.001 | 8 |\n"
    )
    latex = (report / "table.tex").read_text()
    assert r"PCA & test & 0.712 [0.692, 0.732] & -- & -- & 8 \\" in latex and latex.count(r"\\") == 6
    unrounded = pd.read_csv(report / "table.csv")
    assert list(unrounded.columns) == [*tables.FIELDS, "x", "group", "variant"]
    assert unrounded["mean"].tolist() == [entry["mean"] for entry in study_records()]
    of_test = pd.read_csv(report / "tables" / "beta_test.csv")
    assert len(of_test) == 9 and set(of_test["split"].fillna("")) == {"test", ""}
    text = page.read_text()
    assert "How much structure &amp; &lt;behavior&gt;?" in text and "weightspace study beta" in text
    assert "Its numbers mean nothing." not in text


def test_a_study_shows_what_its_stages_left(study_report: Path) -> None:
    page = (study_report / "index.html").read_text()
    drawn = {"beta_test", "beta_unseen", "spectrum_curves", "variance_curves", "probe_curves", "training_curves"}
    drawn |= {"reconstruction_accuracy", "reconstruction_distributions", "accuracy_distributions"}
    drawn |= {"accuracy_histograms", "generation_novelty"}
    assert {path.stem for path in (study_report / "figures").glob("*.svg")} == drawn
    assert page.count("<img") == len(drawn)
    assert not re.search(r"https?://|@import|url\(|<script", page)
    for target in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert target.startswith(("data:", "#")) or (study_report / target).is_file(), target


def test_p_values_stand_in_the_table_of_a_study_not_in_its_figure(tmp_path: Path) -> None:
    write_small_study(tmp_path)
    metric = "skill: paired t-test p"
    write_json(tmp_path / "study.json", {**ABOUT, "metrics": ["skill", metric]})
    test = record("reconstruct", "beta 1", "test", metric, 0.009, None, 3) | {"x": 1.0, "group": None, "variant": True}
    write_json(tmp_path / "records.json", [*study_records(), test])
    report = make_study_report(tmp_path).parent
    assert "| 0.750 [0.730, 0.770] | 0.009 |" in (report / "table.md").read_text()
    page = (report / "index.html").read_text()
    assert "Panels of skill for every variant" in page and "Panels of skill and" not in page


def test_a_study_shows_the_zoo_that_it_scored(tmp_path: Path) -> None:
    write_zoo(write_small_study(tmp_path), np.random.default_rng(0))
    report = make_study_report(tmp_path).parent
    drawn = {path.stem for path in (report / "figures").glob("*.svg")}
    assert {"zoo_accuracy", "zoo_hyperparameters"} < drawn
    assert (report / "tables" / "zoo_properties.csv").is_file()
    assert 'href="tables/zoo_properties.csv"' in (report / "index.html").read_text()


def test_metrics_of_a_study_may_lie_in_one_file(tmp_path: Path) -> None:
    apart, together = write_small_study(tmp_path / "apart"), write_small_study(tmp_path / "together")
    write_representations(apart, np.random.default_rng(0))
    lines = {name: read_lines(apart / "representations" / name / "metrics.jsonl") for name in REPRESENTATIONS}
    write_json(together / "metrics.json", lines)
    curves = [make_study_report(each).parent / "figures" / "training_curves.svg" for each in (apart, together)]
    assert curves[0].read_bytes() == curves[1].read_bytes()


def test_equal_studies_give_equal_bytes(study_report: Path, tmp_path: Path) -> None:
    again = write_study(tmp_path)
    assert contents_of(make_study_report(again).parent) == contents_of(study_report)


def test_a_changed_number_changes_the_page_of_a_study(tmp_path: Path) -> None:
    found = []
    for factor in (1.0, 0.9):
        write_small_study(tmp_path)
        write_json(tmp_path / "records.json", [{**entry, "mean": factor * entry["mean"]} for entry in study_records()])
        found.append(contents_of(make_study_report(tmp_path).parent))
    for name in ("index.html", "table.csv", "table.md", "table.tex", "figures/beta_test.svg"):
        assert found[0][name] != found[1][name], name


@pytest.mark.parametrize("base", [{"name": "smoke"}, None])
def test_a_smoke_study_is_told_to_mean_nothing(base: dict[str, Any] | None, tmp_path: Path) -> None:
    write_json(tmp_path / "study.json", {**ABOUT, "scale": "smoke"})
    write_json(tmp_path / "records.json", study_records())
    if base:
        write_json(tmp_path / "study.json", {key: value for key, value in ABOUT.items() if key != "scale"})
        write_json(tmp_path / "stage.json", {"stage": "study", "config": {"base": base}, "finished": True})
    assert "Its numbers mean nothing." in make_study_report(tmp_path).read_text()


def test_what_is_no_study_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} is not a finished study: it has no study.json")):
        make_study_report(tmp_path)
    write_json(tmp_path / "study.json", {"name": "beta", "metrics": []})
    with pytest.raises(UserError, match=r"study\.json lacks question, metrics; run the study again"):
        make_study_report(tmp_path)
    write_json(tmp_path / "study.json", ABOUT)
    with pytest.raises(UserError, match=r"records\.json does not exist"):
        make_study_report(tmp_path)
    good = study_records()
    for damage, message in (
        ({"mean": "much"}, "whose mean is no number"),
        ({"x": "far"}, "whose x is no number"),
        ({"metric": "agreement"}, "has two records of reconstruct / beta 0.1 / test / agreement"),
    ):
        write_json(tmp_path / "records.json", [good[0], {**good[1], **damage}])
        with pytest.raises(UserError, match=message):
            make_study_report(tmp_path)
    write_json(tmp_path / "records.json", {"mean": 1})
    with pytest.raises(UserError, match="is not a list of records"):
        make_study_report(tmp_path)
    write_json(tmp_path / "records.json", [good[2]])
    with pytest.raises(
        UserError, match="no record of the study beta is of skill, agreement, learning rate; the metrics"
    ):
        make_study_report(tmp_path)
    write_json(tmp_path / "records.json", good)
    pd.DataFrame({"which": ["top"]}).to_parquet(tmp_path / "spectrum.parquet")
    with pytest.raises(UserError, match=r"spectrum\.parquet lacks the columns count, test_acc, agreement"):
        make_study_report(tmp_path)
    assert not (tmp_path / "report").exists()


def variants(count: int, x: tuple[float, ...] | None, splits: tuple[str, ...], group: bool = False) -> pd.DataFrame:
    """Numbers of one metric for several variants and one baseline."""
    rows = [
        {"variant": f"a variant with a really rather long name, number {i}", "split": split, "mean": i / count}
        | {"low": (i - 1) / count, "high": (i + 1) / count, "x": x[i] if x else None, "baseline": False}
        | {"group": f"group {i % 2}" if group else None}
        for i in range(count)
        for split in splits
    ]
    baseline = {"variant": "PCA", "split": "test", "metric": "skill", "mean": 0.5, "low": 0.4, "high": 0.6}
    frame = pd.DataFrame([*rows, baseline | {"baseline": True}]).astype({"x": float})
    return frame.assign(metric="skill")


def points(line: Line2D) -> np.ndarray:
    """What a line goes through [n, 2]."""
    return np.asarray(line.get_xydata())


def test_panels_are_curves_where_every_variant_has_an_x() -> None:
    frame = variants(4, (1.0, 10.0, 30.0, 100.0), ("test", "unseen"))
    drawn = figures.study_panels(frame, ["skill"], "queries")
    axes = drawn.axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "queries"
    curves = [line for line in axes.lines if len(points(line)) == 4]
    assert len(curves) == 2
    for line in curves:
        np.testing.assert_allclose(points(line), [[1, 0], [10, 0.25], [30, 0.5], [100, 0.75]])
    assert [text.get_text() for text in drawn.legends[0].texts] == ["test", "unseen", "PCA"]
    near = figures.study_panels(variants(4, (1.0, 2.0, 5.0, 20.0), ("test",)), ["skill"])
    assert near.axes[0].get_xscale() == "linear"
    grouped = figures.study_panels(variants(4, (1.0, 2.0, 1.0, 2.0), ("test",), group=True), ["skill"])
    assert [text.get_text() for text in grouped.legends[0].texts] == ["group 0", "group 1", "PCA"]


def test_panels_are_rows_where_a_variant_has_no_x() -> None:
    for frame in (variants(3, None, ("test", "unseen")), variants(3, (1.0, float("nan"), 3.0), ("test", "unseen"))):
        drawn = figures.study_panels(frame, ["skill"])
        axes = drawn.axes[0]
        names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
        assert names == [*(f"a variant with a really rather long name, number {i}" for i in range(3)), "PCA"]
        dots = {tuple(np.round(points(line)[0], 6)) for line in axes.lines if len(points(line))}
        assert {x for x, _ in dots} == {0.0, 0.333333, 0.666667, 0.5} and len(dots) == 7


def test_a_number_far_below_does_not_stretch_a_panel() -> None:
    for x in (None, (1.0, 2.0, 3.0)):
        frame = variants(3, x, ("test",))
        frame.loc[1, ["mean", "low", "high"]] = -97120273.3
        axes = figures.study_panels(frame, ["skill"]).axes[0]
        low, _ = axes.get_xlim() if x is None else axes.get_ylim()
        assert low > -1
        assert len([line for line in axes.lines if str(line.get_marker()) in "<v" and len(points(line))]) == 1


def test_training_curves_show_every_loss_and_probe() -> None:
    values = {"total": 1.0, "contrastive": 0.9, "cycle": 0.3, "agreement": 0.5, "R2 test_acc": -0.2, "R2 gap": -80.0}
    lines = [{"step": step, "val": {key: value / (step + 1) for key, value in values.items()}} for step in (0, 1, 2)]
    drawn = figures.training_curves({"r": lines}, figures.styles(["r"], []))
    titles = [axes.get_title() for axes in drawn.axes]
    expected = ["total loss", "contrastive loss $L_C$", "cycle loss $L_{cycle}$", "agreement"]
    assert titles == [*expected, "R² test accuracy", "R² generalization gap"]
    for axes, value in zip(drawn.axes, values.values(), strict=True):
        np.testing.assert_allclose(points(axes.lines[0])[:, 1], [value, value / 2, value / 3])
    assert drawn.axes[4].get_ylim()[0] > -1.1 and drawn.axes[4].get_ylabel() == "share of variance"


def test_histograms_hold_every_network_once() -> None:
    rng = np.random.default_rng(0)
    original, generated = rng.beta(9, 2, 200), rng.beta(4, 2, 50)
    reconstructed = pd.DataFrame({"representation": "r", "original_acc": original, "reconstructed_acc": original / 2})
    new = pd.DataFrame({"representation": "r", "test_acc": generated})
    axes = figures.accuracy_histograms(reconstructed, new, ["r"], figures.styles(["r"], [])).axes[0]
    for patch, found in zip(axes.patches, (original, original / 2, generated), strict=True):
        shares, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        assert shares.sum() == pytest.approx(1)
        assert (edges[:-1] + edges[1:]) @ shares / 2 == pytest.approx(found.mean(), abs=np.diff(edges).max() / 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [3, 14])
@pytest.mark.parametrize(("swept", "shown", "columns"), [(False, 4, 2), (False, 6, 3), (True, 6, 3)])
def test_panels_fit_their_page(count: int, swept: bool, shown: int, columns: int) -> None:
    frame = variants(count, tuple(range(1, count + 1)) if swept else None, ("test", "unseen"))
    metrics = [f"metric {i}" for i in range(shown)]
    drawn = figures.study_panels(pd.concat([frame.assign(metric=metric) for metric in metrics]), metrics)
    with matplotlib.rc_context(figures.RC):
        drawn.draw_without_rendering()
    assert min(axes.get_position().width for axes in drawn.axes) > 0.7 / columns
    boxes = [axes.get_tightbbox() for axes in drawn.axes]
    for i, box in enumerate(boxes):
        assert box is not None and drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1 + 1
        assert not any(other is not None and box.overlaps(other) for other in boxes[:i])


def browser() -> str | None:
    """A Chromium on this machine."""
    names: Iterable[str] = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


CHECK = """<script>addEventListener("load", () => {
  const loaded = [...document.images].filter(image => image.complete && image.naturalWidth > 0);
  document.body.dataset.loaded = loaded.length;
  document.body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const requests = performance.getEntriesByType("resource");
  document.body.dataset.requests = requests.map(entry => entry.name.slice(0, 40)).join(" ");
});</script></body>"""


@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_in_a_browser_every_figure_shows_and_nothing_is_requested(
    reported: tuple[Path, Path], tmp_path: Path, size: str
) -> None:
    program = browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    page = (reported[1] / "index.html").read_text()
    wrapped = tmp_path / "page.html"
    wrapped.write_text(page.replace("</body>", CHECK))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=5000 --dump-dom"
    command = [program, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", wrapped.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = dict(re.findall(r'data-(loaded|overflow|requests)="([^"]*)"', done.stdout))
    assert found.get("loaded") == str(len(FIGURES)), done.stderr[-2000:]
    assert all(name.startswith(("data:", "file:")) for name in found["requests"].split())
    assert int(found["overflow"]) <= 0  # wide tables scroll by themselves, the page does not
