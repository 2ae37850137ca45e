"""Tables: tidy records in, data frames out; CSV, Markdown and LaTeX.

A tidy record is one number: {stage, representation, split, metric, mean, low, high, n}, where low and high bound a 95 %
interval over n units (members or networks); low, high and n are None where there is no interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from weightspace.runs import UserError, derive_seed

STAGES = ("zoo", "pretrain", "probe", "reconstruct", "generate", "finetune")
SPLITS = ("train", "val", "test", "unseen")
FIELDS = ("stage", "representation", "split", "metric", "mean", "low", "high", "n")
RESAMPLES = 2000
WORST = -10
"""Tables and figures say no more of a number below this, an R2 or a skill, than that it is."""

EN_DASH = "\u2013"
MINUS = "\u2212"
MISSING = EN_DASH
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "²": "$^2$",
        EN_DASH: "--",
        MINUS: "$-$",
    }
)
WORDS = {
    "R2": "R²",
    "train_acc": "training accuracy",
    "val_acc": "validation accuracy",
    "test_acc": "test accuracy",
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "test_loss": "test loss",
    "gap": "generalization gap",
}


def bootstrap(values: np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES) -> tuple[float, ...]:
    """Mean of `values` [n] with its 95 % percentile bootstrap interval: (mean, low, high).

    The interval of fewer than two values is NaN; a value that is not finite makes everything NaN.
    """
    mean = float(np.mean(values)) if len(values) else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan, math.nan
    means = values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return mean, float(low), float(high)


def zoo_records(checkpoints: pd.DataFrame) -> list[dict[str, Any]]:
    """Test accuracy of the members of each split at the zoo's last epoch; none where the zoo knows no accuracy."""
    if "test_acc" not in checkpoints:
        return []
    last = checkpoints[checkpoints["epoch"] == checkpoints["epoch"].max()]
    records = []
    for split in in_order(last["split"], SPLITS):
        accuracy = last.loc[last["split"] == split].sort_values("member")["test_acc"].to_numpy(float)
        generator = np.random.default_rng(derive_seed("report", "zoo", split))
        mean, low, high = bootstrap(accuracy, generator)
        numbers = {"mean": mean, "low": low, "high": high, "n": len(accuracy)}
        records.append({"stage": "zoo", "representation": "", "split": split, "metric": "test accuracy", **numbers})
    return records


def zoo_properties(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """Numeric properties of the members at the zoo's last epoch, unrounded.

    A row per property: its count (of members where it is known), mean, deviation, min, 25%, median, 75% and max.
    """
    last = checkpoints[checkpoints["epoch"] == checkpoints["epoch"].max()]
    known = last.select_dtypes("number").drop(columns=["member", "epoch", "seed", "shard", "row"], errors="ignore")
    rows = known.describe().T.astype({"count": int}).rename(columns={"std": "deviation", "50%": "median"})
    return rows.rename_axis("property").reset_index()


def property_records(properties: pd.DataFrame) -> list[dict[str, Any]]:
    """The numbers of `zoo_properties` as records, a metric "PROPERTY: STATISTIC" each; n is the count of members."""
    return [
        {"stage": "zoo", "representation": "", "split": "", "metric": f"{row['property']}: {statistic}"}
        | {"mean": number(row[statistic]), "low": None, "high": None, "n": int(row["count"])}
        for row in properties.to_dict("records")
        for statistic in properties.columns.drop(["property", "count"])
    ]


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of names and numbers as a table of text: names in words, four digits, whole counts."""

    def text(value: Any) -> str:
        if isinstance(value, str):
            return label(value).replace("_", " ")
        if isinstance(value, int):
            return f"{value}"
        return f"{value:.4g}" if math.isfinite(value) else MISSING

    return frame.astype(object).map(text)


def best_validation(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The line of lowest validation total, the earliest of equals; None where nothing was validated."""
    validated = [line for line in lines if (line.get("val") or {}).get("total") is not None]
    return min(validated, key=lambda line: line["val"]["total"], default=None)


def pretrain_records(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Validation agreement and structural loss of each representation {name: lines of metrics.jsonl}, best step."""
    records = []
    for name, lines in metrics.items():
        best = best_validation(lines)
        if best is None:
            continue
        structural = best["val"].get("structural")
        found = {
            "validation agreement": best["val"].get("agreement"),
            "validation structural loss": structural,
        }
        for metric, mean in found.items():
            if mean is not None:
                numbers = {"mean": float(mean), "low": None, "high": None, "n": None}
                records.append(
                    {"stage": "pretrain", "representation": name, "split": "val", "metric": metric, **numbers}
                )
    return records


def checked(records: Any, source: str) -> list[dict[str, Any]]:
    """The records with exactly the fields of the schema, in its order; `source` names them in errors.

    Raises:
        UserError: not a list of records, a missing field, text for a number, or two records for the same number.
    """
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{source} is not a list of records; run the stage again")
    seen = set()
    for record in records:
        missing = [field for field in FIELDS if field not in record]
        if missing:
            raise UserError(f"{source} has a record without {', '.join(missing)}: {record}; run the stage again")
        for field in ("mean", "low", "high", "n"):
            if not isinstance(record[field], int | float | None):
                raise UserError(f"{source} has a record whose {field} is no number: {record}; run the stage again")
        key = tuple(record[field] for field in FIELDS[:4])
        if key in seen:
            raise UserError(f"{source} has two records of {' / '.join(map(str, key))}; run the stage again")
        seen.add(key)
    return [{field: record[field] for field in FIELDS} for record in records]


def table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One stage's records as a table of text: a row per representation and split, a column per metric, and n.

    Cells are 'mean [low, high]', or the mean alone where there is no interval. Rows and metrics keep the order in
    which they first appear; a column of representations, splits or n that says nothing is left out.
    """
    rows = list(dict.fromkeys((record["representation"], record["split"]) for record in records))
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    cells = {(record["representation"], record["split"], record["metric"]): cell(record) for record in records}
    counts: dict[tuple[str, str], list[int]] = {row: [] for row in rows}
    for record in records:
        if record["n"]:
            counts[record["representation"], record["split"]].append(int(record["n"]))
    columns: dict[str, list[str]] = {}
    if any(representation for representation, _ in rows):
        columns["representation"] = [representation for representation, _ in rows]
    if any(split for _, split in rows):
        columns["split"] = [split for _, split in rows]
    for metric in metrics:
        columns[label(metric)] = [cells.get((*row, metric), MISSING) for row in rows]
    if any(counts.values()):
        columns["n"] = [span(counts[row]) for row in rows]
    return pd.DataFrame(columns, dtype=object)


def turned(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The same table on its side: a row per metric, a column 'representation, split' per row of `table`, and n."""
    rows = list(dict.fromkeys((record["representation"], record["split"]) for record in records))
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    cells = {(record["representation"], record["split"], record["metric"]): cell(record) for record in records}
    columns: dict[str, list[str]] = {"metric": [label(metric) for metric in metrics]}
    for row in rows:
        columns[", ".join(name for name in row if name)] = [cells.get((*row, metric), MISSING) for metric in metrics]
    counts = {metric: [int(r["n"]) for r in records if r["metric"] == metric and r["n"]] for metric in metrics}
    if any(counts.values()):
        columns["n"] = [span(counts[metric]) for metric in metrics]
    return pd.DataFrame(columns, dtype=object)


def readable(records: Sequence[Mapping[str, Any]], widest: int = 8) -> pd.DataFrame:
    """The table as it is shown: turned where it has more than `widest` metrics and fewer rows than metrics."""
    rows = {(record["representation"], record["split"]) for record in records}
    metrics = {record["metric"] for record in records}
    return turned(records) if len(metrics) > widest and len(rows) < len(metrics) else table(records)


def cell(record: Mapping[str, Any]) -> str:
    """'mean [low, high]', or the mean alone; as many decimals as the mean deserves, and nothing below WORST."""
    mean, low, high = (number(record[field]) for field in ("mean", "low", "high"))
    if mean is None:
        return MISSING
    if mean < WORST:
        return f"<{WORST}"
    decimals = 3 if abs(mean) < 10 else 2 if abs(mean) < 100 else 1 if abs(mean) < 1000 else 0
    text = f"{mean:.{decimals}f}" if abs(mean) >= 0.001 or low is not None or mean == 0 else f"{mean:.2g}"
    if low is None or high is None:
        return text
    bottom = f"<{WORST}" if low < WORST else f"{low:.{decimals}f}"
    return f"{text} [{bottom}, {high:.{decimals}f}]"


def number(value: Any) -> float | None:
    """The value as a float, or None where it is None or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def span(counts: Sequence[int]) -> str:
    """'40' where all counts agree, '38-40' (with an en dash) where they do not."""
    if not counts:
        return MISSING
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}{EN_DASH}{max(counts)}"


def label(name: str) -> str:
    """A metric or property in words: 'R2 gap' -> 'R² generalization gap'."""
    return re.sub(r"\w+", lambda match: WORDS.get(match[0], match[0]), name)


def in_order(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """The distinct names: the known ones in the known order, then the others as they first appear."""
    found = list(dict.fromkeys(names))
    return [name for name in known if name in found] + [name for name in found if name not in known]


def to_csv(records: Sequence[Mapping[str, Any]], further: Sequence[str] = ()) -> str:
    """The records in tidy form, one number a line, unrounded; `further` fields stand behind those of the schema."""
    frame = pd.DataFrame([dict(record) for record in records], columns=[*FIELDS, *further])
    frame["n"] = frame["n"].astype("Int64")
    return frame.to_csv(index=False, lineterminator="\n")


def to_markdown(frame: pd.DataFrame) -> str:
    """A table of text as a Markdown table, numbers to the right."""

    def line(values: Iterable[str]) -> str:
        return "| " + " | ".join(str(value).replace("|", r"\|").replace("\n", " ") for value in values) + " |\n"

    rules = ["---" if is_name(column) else "---:" for column in map(str, frame)]
    return line(frame.columns) + line(rules) + "".join(line(row) for row in frame.to_numpy())


def to_latex(frame: pd.DataFrame) -> str:
    r"""A table of text as a LaTeX tabular with booktabs rules (\usepackage{booktabs})."""

    def line(values: Iterable[str]) -> str:
        return " & ".join(values) + r" \\" + "\n"

    header = line(escape_latex(column) for column in map(str, frame))
    columns = list(frame.columns)
    body = "".join(
        line(
            escape_latex(value if is_name(column) else minus(value)) for column, value in zip(columns, row, strict=True)
        )
        for row in frame.to_numpy()
    )
    alignment = "".join("l" if is_name(column) else "r" for column in columns)
    return f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{header}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def is_name(column: str) -> bool:
    """Whether a column of a table holds names, not numbers."""
    return column in ("representation", "split", "metric", "variant", "property")


def escape_latex(text: str) -> str:
    """Text with everything that LaTeX would read as a command escaped."""
    return str(text).translate(LATEX)


def minus(text: str) -> str:
    """A cell's text with a minus sign for the hyphen of negative numbers."""
    return re.sub(r"(?<![^\s\[<])-(?=\d)", MINUS, text)
