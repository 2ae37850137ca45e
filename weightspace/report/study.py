"""The page of a study: its question, the paper's table and figure for it, and the figures of its stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from weightspace.report import figures, page, tables
from weightspace.report.page import Contents, Shown
from weightspace.runs import STAGE_FILE, UserError, read_json, write_text

STUDY_FILE = "study.json"
RECORDS_FILE = "records.json"
STAGES = ("zoo", "pretrain", "probe", "reconstruct", "generate", "finetune")
"""Whose figures (and further tables) a study's page repeats, where they have files."""
FURTHER_FIELDS = ("x", "group", "variant")
"""What a study's records have besides the fields of the schema."""
NOTE = (
    "What every variant of the study reaches, beside the baselines. The CSV files hold every number that was recorded, "
    "unrounded; a setting such as the learning rate belongs to every split."
)
PARTS = {
    "spectrum": ("spectrum.parquet", ("which", "count", "test_acc", "agreement")),
    "variance": ("variance.parquet", ("name", "component", "variance")),
    "probe_epochs": ("probe_epochs.parquet", ("representation", "epoch", "property", "mean", "low", "high")),
}
"""The tables that only some studies have: where each is and the columns it must have."""


def make_study_report(folder: Path) -> Path:
    """Write the page of a study with its tables and figures into folder/report; equal studies give equal bytes.

    Next to the page: table.csv (all records, unrounded), table.md and table.tex (the study's metrics, a row per variant
    and split), tables/NAME_SPLIT.csv, .md and .tex, figures/NAME.png and .svg.

    Args:
        folder: of the study: study.json (name, question, task, scale, command, metrics, x), records.json (tidy records
            with x, group and variant: False where it is of a baseline), and whatever its stages left: their tables as
            in a run, metrics.json or representations/NAME/metrics.jsonl, and those of PARTS.

    Returns:
        The path of index.html, which holds everything and asks for nothing from outside.

    Raises:
        UserError: the folder is no finished study, a part of it is damaged, or it cannot be written.
    """
    folder = Path(folder)
    about = read_about(folder)
    records = read_records(folder / RECORDS_FILE)
    contents = read_stages(folder, about, records)
    report = folder / "report"
    try:
        sections = [write_study(about, contents, report)]
        looks = page.looks_of(contents)
        for stage in STAGES:
            drawn = [page.write_figure(shown, report) for shown in page.FIGURES[stage](contents, looks)]
            further = page.further_tables(stage, contents, report)
            if drawn or further:
                named = {"stage": stage, "title": page.TITLES[stage], "note": page.NOTES[stage]}
                sections.append({**named, "tables": further, "figures": drawn})
        facts = [(term, str(about[term])) for term in ("question", "task", "scale", "command") if about.get(term)]
        write_text(report / "index.html", page.render(f"Study: {about['name']}", facts, contents, sections))
    except OSError as error:
        raise UserError(f"cannot write the report ({error}); choose a folder that can be written") from None
    return report / "index.html"


def read_about(folder: Path) -> dict[str, Any]:
    """What study.json says.

    Raises:
        UserError: there is none, or it lacks the name, the question or the metrics.
    """
    path = folder / STUDY_FILE
    if not path.exists():
        raise UserError(f"{folder} is not a finished study: it has no {STUDY_FILE}; run the study (again)")
    about = read_json(path)
    missing = [key for key in ("name", "question", "metrics") if not (isinstance(about, dict) and about.get(key))]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; run the study again")
    return about


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a study, each with its x, group and whether it is of a variant.

    Raises:
        UserError: it is missing or damaged.
    """
    records = read_json(path)
    tables.checked(records, str(path))
    for record in records:
        if not isinstance(record.get("x"), int | float | None):
            raise UserError(f"{path} has a record whose x is no number: {record}; run the study again")
    return [{"x": None, "group": None, "variant": True, **record} for record in records]


def read_stages(folder: Path, about: Mapping[str, Any], records: list[dict[str, Any]]) -> Contents:
    """What the stages of a study left in its folder.

    Raises:
        UserError: a part of it is damaged.
    """
    parts = {**page.PARTS, **PARTS}
    frames = {
        name: page.read_frame(folder / path, columns)
        for name, (path, columns) in parts.items()
        if (folder / path).exists()
    }
    metrics = page.optional_json(folder / "metrics.json")
    for path in sorted(folder.glob("representations/*/metrics.jsonl")):
        metrics[path.parent.name] = page.read_metrics(path)
    variants = [record["representation"] for record in records if record["variant"]]
    names = tables.in_order([*variants, *metrics], ())
    config = page.optional_json(folder / STAGE_FILE).get("config", {}).get("base", {"name": about.get("scale")})
    return Contents(config, {}, {}, frames, metrics, {name: {} for name in names}, records)


def write_study(about: Mapping[str, Any], contents: Contents, report: Path) -> dict[str, Any]:
    """The study's own section: tables of its metrics, its figures; all records as CSV.

    Raises:
        UserError: no record is of its metrics.
    """
    name, shown, records = about["name"], about["metrics"], contents.records
    chosen = [record for record in records if record["metric"] in shown]
    if not chosen:
        found = ", ".join(sorted({record["metric"] for record in records})) or "none"
        raise UserError(f"no record of the study {name} is of {', '.join(shown)}; the metrics it recorded: {found}")
    splits = tables.in_order([record["split"] for record in chosen if record["split"]], tables.SPLITS) or [""]
    by_split = {split: [{**r, "split": split} for r in chosen if r["split"] in (split, "")] for split in splits}
    whole = table_of([record for rows in by_split.values() for record in rows], shown)
    write_text(report / "table.csv", tables.to_csv(records, FURTHER_FIELDS))
    write_text(report / "table.md", tables.to_markdown(whole))
    write_text(report / "table.tex", tables.to_latex(whole))
    written, drawn = [], []
    for split, rows in by_split.items():
        file = re.sub(r"[^\w.+@-]+", "_", f"{name}_{split}".strip("_"))
        csv = tables.to_csv([record for record in records if record["split"] in (split, "")], FURTHER_FIELDS)
        caption = f"Split {split}." if split else "All variants."
        table = table_of([{**record, "split": ""} for record in rows], shown)
        written.append(page.write_table(file, table, caption, report, csv))
        drawn += [page.write_figure(each, report) for each in panels_of(about, rows, file, caption)]
    drawn += [page.write_figure(each, report) for each in further_figures(contents, page.looks_of(contents))]
    section = {"stage": "study", "title": "Variants", "note": NOTE, "tables": written, "figures": drawn}
    return {**section, "whole": "All splits in one table"}


def table_of(records: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """A table of text: a row per variant and split in the order of the records, a column per metric in that order."""
    order = list(dict.fromkeys((record["representation"], record["split"]) for record in records))
    rows = sorted(
        records,
        key=lambda record: (order.index((record["representation"], record["split"])), metrics.index(record["metric"])),
    )
    frame = tables.table(rows).rename(columns={"representation": "variant"})
    leading = [column for column in ("variant", "split") if column in frame]
    shown = [tables.label(metric) for metric in metrics if tables.label(metric) in frame]
    return frame[[*leading, *shown, *(["n"] if "n" in frame else [])]]


def panels_of(
    about: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str, caption: str
) -> Iterator[Shown]:
    """The metrics of a study over its variants, for the records of one split."""
    frame = pd.DataFrame(records).rename(columns={"representation": "variant", "variant": "own"})
    frame = frame.astype(dict.fromkeys(("mean", "low", "high", "x"), float))
    frame = frame[frame["mean"].notna()].assign(baseline=lambda rows: ~rows["own"].astype(bool))
    known = set(frame["metric"])
    shown = [metric for metric in about["metrics"] if metric in known and not metric.endswith(" p")]  # no p values
    if shown:
        arrows = f" An arrow: below {tables.MINUS}{-tables.WORST}." if (frame["mean"] < tables.WORST).any() else ""
        gray = " Gray: baselines." if frame["baseline"].any() else ""
        yield Shown(
            name,
            figures.study_panels(frame, shown, about.get("x") or ""),
            f"Panels of {page.listed(tables.label(metric) for metric in shown)} for every variant. {caption}",
            f"{caption} Lines and bands are 95 % intervals.{gray}{arrows}",
        )


def further_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """What only some studies have: the spectrum, and probes by epoch."""
    frames = contents.frames
    if "spectrum" in frames:
        yield Shown(
            "spectrum_curves",
            figures.spectrum_curves(frames["spectrum"]),
            "Accuracy and agreement against the number of principal components kept, for top, mixed and bottom ones.",
            "Networks of which only some principal components are kept: median and quartiles over checkpoints.",
        )
    if "variance" in frames:
        names = tables.in_order(frames["variance"]["name"], ())
        yield Shown(
            "variance_curves",
            figures.variance_curves(frames["variance"], figures.styles(names[1:], names[:1])),
            f"Variance along the principal components of the zoo for {page.listed(names)}.",
            "The spectrum of originals and reconstructions: where a line falls below the originals', detail is lost.",
        )
    if "probe_epochs" in frames:
        names = tables.in_order(frames["probe_epochs"]["representation"], ())
        known = [name for name in names if name in looks]
        styles = {**figures.styles(known, [name for name in names if name not in looks]), **looks}
        yield Shown(
            "probe_curves",
            figures.probe_curves(frames["probe_epochs"], styles),
            f"R² of linear probes by epoch of the probed checkpoints, for {page.listed(names)}.",
            "How well probes predict properties of checkpoints of each epoch, with 95 % intervals.",
        )
