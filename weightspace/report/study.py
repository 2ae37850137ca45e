"""The page of a study: its question, the paper's table and figure for it, and the figures of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from weightspace.report import figures, page, tables
from weightspace.report.page import Contents, Shown
from weightspace.runs import UserError, read_json, write_text

STUDY_FILE = "study.json"
STAGES = ("pretrain", "probe", "reconstruct", "generate", "finetune")
"""Whose figures a study's page repeats, where they have files."""


def make_study_report(folder: Path) -> Path:
    """Write the page of a study with its tables and figures into folder/report; equal studies give equal bytes.

    Args:
        folder: of the study: study.json (name, question, task, scale, command, metrics, x), records.json (tidy records
            with x, group and variant), and whatever its stages left.

    Returns:
        The path of index.html.

    Raises:
        UserError: the folder is no finished study, a part of it is damaged, or it cannot be written.
    """
    if not (folder / STUDY_FILE).exists():
        raise UserError(f"{folder} is not a finished study: it has no {STUDY_FILE}; run the study (again)")
    about, records = read_json(folder / STUDY_FILE), read_json(folder / "records.json")
    tables.checked(records, str(folder / "records.json"))
    contents = stages_of(folder, records)
    report = folder / "report"
    try:
        shown = [write_study(about, records, contents, report)]
        for stage in STAGES:
            drawn = [page.write_figure(each, report) for each in page.FIGURES[stage](contents, page.looks_of(contents))]
            if drawn:
                section = {"title": page.TITLES[stage], "note": page.NOTES[stage], "tables": []}
                shown.append({"stage": stage, "figures": drawn, **section})
        facts = [(term, str(about[term])) for term in ("question", "task", "scale", "command") if about.get(term)]
        write_text(report / "index.html", page.render(f"Study: {about['name']}", facts, contents, shown))
    except OSError as error:
        raise UserError(f"cannot write the report ({error}); choose a folder that can be written") from None
    return report / "index.html"


def stages_of(folder: Path, records: list[dict[str, Any]]) -> Contents:
    """What the stages of a study left in its folder."""
    found = {
        name: page.read_frame(folder / path, columns)
        for name, (path, columns) in page.PARTS.items()
        if (folder / path).exists()
    }
    metrics = page.optional_json(folder / "metrics.json")
    variants = {name: {} for name in metrics}
    return Contents({}, {}, {}, found, metrics, variants, records)


def write_study(
    about: dict[str, Any], records: Sequence[dict[str, Any]], contents: Contents, report: Path
) -> dict[str, Any]:
    """The study's own section: a table of its chosen metrics per split, all records as CSV, its figures."""
    chosen = [record for record in records if record["metric"] in about["metrics"]]
    splits = tables.in_order([record["split"] for record in chosen if record["split"]], tables.SPLITS)
    shown, drawn = [], []
    for split in splits:
        rows = [{**record, "split": ""} for record in chosen if record["split"] in (split, "")]
        rows.sort(key=lambda record: about["metrics"].index(record["metric"]))
        order = list(dict.fromkeys(record["representation"] for record in chosen if record["split"] in (split, "")))
        rows.sort(key=lambda record: order.index(record["representation"]))
        frame = tables.table(rows).rename(columns={"representation": "variant"})
        name, caption = f"{about['name']}_{split.replace(' ', '_')}", f"Split {split}."
        csv = pd.DataFrame([record for record in records if record["split"] in (split, "")]).to_csv(index=False)
        shown.append(page.write_table(name, frame, caption, report, csv))
        drawn += [page.write_figure(each, report) for each in panels_of(about, chosen, split)]
    for each in more_figures(contents, report.parent):
        drawn.append(page.write_figure(each, report))
    section = {"title": about["name"], "note": about["question"], "tables": shown, "figures": drawn}
    return {"stage": "study", **section}


def panels_of(about: dict[str, Any], records: Sequence[dict[str, Any]], split: str) -> Iterator[Shown]:
    """The metrics of a study over its variants, for one split."""
    frame = pd.DataFrame([record for record in records if record["split"] == split])
    frame = frame[pd.to_numeric(frame["mean"], errors="coerce").notna()].astype(
        {"mean": float, "low": float, "high": float}
    )
    frame["x"] = pd.to_numeric(frame["x"], errors="coerce")
    frame["baseline"] = ~frame["variant"].astype(bool)
    metrics = [metric for metric in about["metrics"] if metric in set(frame["metric"])]
    if metrics:
        yield Shown(
            f"{about['name']}_{split.replace(' ', '_')}",
            figures.study_panels(frame, metrics, about.get("x") or ""),
            f"Panels of {page.listed(tables.label(metric) for metric in metrics)} on split {split} for every variant.",
            f"Split {split}; 95 % intervals. Gray: baselines.",
        )


def more_figures(contents: Contents, folder: Path) -> Iterator[Shown]:
    """What only some studies have: the spectrum."""
    if (folder / "spectrum.parquet").exists():
        frame = page.read_frame(folder / "spectrum.parquet", ("which", "count", "test_acc", "agreement"))
        yield Shown(
            "spectrum",
            figures.spectrum_curves(frame),
            "Accuracy and agreement against the number of principal components kept, for top, mixed and bottom ones.",
            "Networks of which only some principal components are kept: median and quartiles over checkpoints.",
        )
    if (folder / "variance.parquet").exists():
        frame = page.read_frame(folder / "variance.parquet", ("name", "component", "variance"))
        names = tables.in_order(frame["name"], ())
        yield Shown(
            "spectrum_variance",
            figures.spectrum_variance(frame, figures.styles(names[1:], names[:1])),
            f"Variance along the principal components of the zoo for {page.listed(names)}.",
            "The spectrum of originals and reconstructions: where a line falls below the originals', detail is lost.",
        )
