"""The page of a run: reads the run's folder, writes every table and figure and one HTML file that holds them all."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from weightspace.report import figures, tables
from weightspace.runs import UserError, read_json, read_lines, write_json, write_text

RESULTS_FILE = "results.json"
PARTS = {
    "zoo": ("zoo/checkpoints.parquet", ("member", "epoch", "split")),
    "predictions": (
        "probe/predictions.parquet",
        ("features", "property", "split", "member", "epoch", "true", "predicted"),
    ),
    "map": ("probe/map.parquet", ("representation", "split", "x", "y")),
    "reconstructed": (
        "reconstruct/checkpoints.parquet",
        ("representation", "split", "original_acc", "reconstructed_acc", "agreement", "distance"),
    ),
    "generated": ("generate/networks.parquet", ("representation", "network", "test_acc", "novelty")),
    "finetuned": ("finetune/curves.parquet", ("representation", "network", "epoch", "test_acc")),
}
"""The tables of a run folder: where each is and the columns it must have."""
RECORDED = ("probe", "reconstruct", "generate", "finetune")
"""Stages that write their own records.json."""
TITLES = {
    "zoo": "Zoo",
    "pretrain": "Representations",
    "probe": "Probes",
    "reconstruct": "Reconstruction",
    "generate": "Generation",
    "finetune": "Fine-tuning",
}
NOTES = {
    "zoo": "The networks whose weights are the data. A representation can only learn from the variety it sees here; "
    "the split unseen holds out whole initialization seeds.",
    "pretrain": "Each representation is the state of lowest validation loss. Total losses of representations that are "
    "trained with different losses cannot be compared with each other; structural loss and agreement can. With "
    "details, the losses in training are those of the sketch alone.",
    "probe": "Linear probes predict a property of a checkpoint from its embedding, beside probes on simple statistics "
    "of its weights and on the weights themselves: an embedding is worth its cost where it beats both.",
    "reconstruct": "Checkpoints go through the bottleneck and are compared with their originals. Read agreement "
    "together with its floor, which any two different members reach; skill combines both.",
    "generate": "New networks, scored as they come out of the decoder and without any training. A sampler must beat "
    "its baselines in accuracy without giving up diversity and novelty.",
    "finetune": "What ordinary training does to the generated networks, beside the same training from scratch.",
}
CAPTIONS = {
    "zoo": "Test accuracy of the members at the last epoch, by split.",
    "pretrain": "Validation scores of each representation at its best step.",
    "probe": "Linear probes: share of variance explained (R²) of each property, by features and split.",
    "reconstruct": "Reconstructions against their originals, by representation and split.",
    "generate": "Generated networks and baselines.",
    "finetune": "Test accuracy after fine-tuning.",
}
LEGEND = (
    (("agreement", "validation agreement"), "agreement", "Share of images to which two networks give the same class."),
    (("floor",), "floor", "Mean agreement of pairs of different original members: what comes for free."),
    (
        ("skill",),
        "skill",
        f"(agreement {tables.MINUS} floor) / (1 {tables.MINUS} floor): 0 is no better than another member, "
        "1 is the same behavior.",
    ),
    (
        ("identity",),
        "identity",
        "Share of reconstructions whose own original is the nearest of all members in its outputs.",
    ),
    (("weight distance",), "weight distance", "L2 distance between the weights of original and reconstruction."),
    (("agreement on errors",), "agreement on errors", "Agreement on the images that the original gets wrong."),
    (
        ("accuracy fidelity",),
        "accuracy fidelity",
        "How the accuracy of reconstructions follows that of the originals: slope and correlation (1 is perfect) "
        "and mean absolute difference (0 is perfect).",
    ),
    (
        ("structural R2",),
        "structural R²",
        "Share of the variance of the standardized weights around their mean over the split that is reconstructed: "
        "1 is exact, 0 is no better than the mean network.",
    ),
    (
        ("validation structural loss",),
        "structural loss",
        "Mean squared error of the standardized weights on validation checkpoints: 0 is exact, 1 is each layer's mean.",
    ),
    (
        ("skill above", "identity above"),
        "above",
        "Difference to the other representation on the same checkpoints; a paired bootstrap over members gives its "
        "interval.",
    ),
    (("R2 ",), "R² of a property", "Share of the property's variance that a probe explains: 1 is perfect, 0 is none."),
    (
        ("diversity",),
        "diversity",
        "How much the networks of a set differ from each other, in weights or in predictions, over the same for the "
        "anchors (1 is equally diverse).",
    ),
    (
        ("novelty",),
        "novelty",
        "Distance to the nearest training checkpoint, over the zoo's typical distance between nearest neighbors "
        "(0 is a copy).",
    ),
    (("ensemble accuracy",), "ensemble accuracy", "Accuracy of the average of all networks' predicted probabilities."),
)


@dataclass(frozen=True)
class Contents:
    """What a run folder holds; parts that are not there are empty or None."""

    config: dict[str, Any]
    environment: dict[str, Any]
    zoo_description: dict[str, Any]
    frames: dict[str, pd.DataFrame]
    """The tables of PARTS that are there."""
    metrics: dict[str, list[dict[str, Any]]]
    """Lines of metrics.jsonl per representation."""
    representations: dict[str, dict[str, Any]]
    """config.json per representation."""
    records: list[dict[str, Any]]
    """All tidy records, in the order of the stages, but the following."""
    properties: list[dict[str, Any]] = field(default_factory=list)
    """Records of the distribution of the zoo's properties, which have a table of their own."""


@dataclass(frozen=True)
class Shown:
    """A figure with its file name, the text for those who cannot see it, and its caption."""

    name: str
    figure: Figure
    alt: str
    caption: str


def make_report(run: Path, folder: Path) -> Path:
    """Write the page of a run, or of a zoo alone, with all its tables and figures; equal runs give equal bytes.

    Args:
        run: the run's folder, finished or not, or that of a zoo; receives results.json, every number of every table as
            a tidy record.
        folder: receives index.html, figures/NAME.png and .svg, tables/NAME.csv, .md and .tex.

    Returns:
        The path of index.html, which holds everything and asks for nothing from outside.

    Raises:
        UserError: `run` holds nothing that can be reported, a part of it is damaged, or a folder cannot be written.
    """
    run, folder = Path(run), Path(folder)
    contents = read_run(run)
    if (run / RESULTS_FILE).exists() and not (folder / "index.html").exists():
        raise UserError(f"{run / RESULTS_FILE} exists, but no report beside it; move it away to draw the report")
    try:
        sections = [write_section(stage, contents, folder) for stage in tables.STAGES]
        shown = [section for section in sections if section["tables"] or section["figures"]]
        absent = [title for stage, title in TITLES.items() if stage not in {section["stage"] for section in shown}]
        if zoo_folder(run) == run:
            absent = []
        name = str(contents.config.get("name") or run.resolve().name)
        page = render(name, facts_of(contents), contents, shown, absent)
        write_text(folder / "index.html", page)
        write_json(run / RESULTS_FILE, [*contents.properties, *contents.records])
    except OSError as error:
        raise UserError(f"cannot write the report ({error}); choose folders that can be written") from None
    return folder / "index.html"


def zoo_folder(run: Path) -> Path:
    """The folder of a run's zoo, or the folder itself where it is a zoo."""
    return run if (run / "checkpoints.parquet").exists() else run / "zoo"


def read_run(run: Path) -> Contents:
    """Read whatever is there of a run, or of a zoo alone.

    Raises:
        UserError: nothing that can be reported is there, or a part of it is damaged.
    """
    places = {name: (run / path, columns) for name, (path, columns) in PARTS.items()}
    places["zoo"] = zoo_folder(run) / "checkpoints.parquet", PARTS["zoo"][1]
    frames = {name: read_frame(path, columns) for name, (path, columns) in places.items() if path.exists()}
    folders = sorted(path for path in run.glob("representations/*") if path.is_dir())
    metrics = {path.name: lines for path in folders if (lines := read_metrics(path / "metrics.jsonl"))}
    records = tables.zoo_records(frames["zoo"]) if "zoo" in frames else []
    records += tables.pretrain_records(metrics)
    for stage in RECORDED:
        path = run / stage / "records.json"
        if path.exists():
            records += tables.checked(read_json(path), str(path))
    if not (records or frames or metrics):
        expected = [path for path, _ in PARTS.values()] + [f"{stage}/records.json" for stage in RECORDED]
        raise UserError(
            f"{run} is not a run that can be reported; expected a folder with at least one of "
            f"representations/NAME/metrics.jsonl, {', '.join(sorted(expected))}"
        )
    return Contents(
        config=optional_json(run / "config.json"),
        environment=optional_json(run / "environment.json"),
        zoo_description=optional_json(zoo_folder(run) / "zoo.json"),
        frames=frames,
        metrics=metrics,
        representations={path.name: optional_json(path / "config.json") for path in folders},
        records=records,
        properties=tables.property_records(tables.zoo_properties(frames["zoo"])) if "zoo" in frames else [],
    )


def read_frame(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a table.

    Raises:
        UserError: it cannot be read or lacks a column.
    """
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run the stage again") from None
    missing = [column for column in columns if column not in frame]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run the stage again")
    return frame


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none where it does not exist.

    Raises:
        UserError: a line is not JSON.
    """
    try:
        return read_lines(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON Lines ({error}); run the stage again") from None


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file does not exist."""
    return read_json(path) if path.exists() else {}


def write_section(stage: str, contents: Contents, folder: Path) -> dict[str, Any]:
    """Write a stage's tables and figures into `folder`; returns what the template shows of them."""
    records = [record for record in contents.records if record["stage"] == stage]
    shown = []
    if records:
        shown.append(write_table(stage, tables.readable(records), CAPTIONS[stage], folder, tables.to_csv(records)))
    shown += further_tables(stage, contents, folder)
    drawn = [write_figure(figure, folder) for figure in FIGURES[stage](contents, looks_of(contents))]
    return {"stage": stage, "title": TITLES[stage], "note": NOTES[stage], "tables": shown, "figures": drawn}


def further_tables(stage: str, contents: Contents, folder: Path) -> list[dict[str, Any]]:
    """Write a stage's tables besides its records; returns what the template shows of them."""
    found = FURTHER_TABLES[stage](contents) if stage in FURTHER_TABLES else ()
    return [
        write_table(name, tables.rounded(frame), caption, folder, frame.to_csv(index=False, lineterminator="\n"))
        for name, frame, caption in found
    ]


def write_table(name: str, frame: pd.DataFrame, caption: str, folder: Path, csv: str) -> dict[str, Any]:
    """Write a table of text as NAME.csv (given as text), NAME.md and NAME.tex; returns what the template shows."""
    write_text(folder / "tables" / f"{name}.csv", csv)
    write_text(folder / "tables" / f"{name}.md", tables.to_markdown(frame))
    write_text(folder / "tables" / f"{name}.tex", tables.to_latex(frame))
    rows = [
        [split_cell(column, value) for column, value in zip(frame.columns, row, strict=True)]
        for row in frame.to_numpy()
    ]
    columns = [(column, tables.is_name(column)) for column in frame.columns]
    return {"name": name, "columns": columns, "rows": rows, "caption": caption}


def write_figure(shown: Shown, folder: Path) -> dict[str, Any]:
    """Write a figure as NAME.png and NAME.svg; returns what the template shows of it."""
    figures.save(shown.figure, folder / "figures", shown.name)
    picture = base64.b64encode((folder / "figures" / f"{shown.name}.svg").read_bytes()).decode("ascii")
    return {"name": shown.name, "alt": shown.alt, "caption": shown.caption, "svg": picture}


def split_cell(column: str, text: str) -> tuple[str, str]:
    """A table's text as (name or mean, interval)."""
    if tables.is_name(column):
        return text, ""
    mean, _, interval = tables.minus(text).partition(" ")
    return mean, interval


def looks_of(contents: Contents) -> dict[str, figures.Style]:
    """A style for every name in the run.

    Representations are the folders of representations/, those that the config names, and those that were mapped; every
    other name stands for a baseline. A run that has none of the three draws no such distinction.
    """
    names = [*contents.representations, *(contents.config.get("representations") or ())]
    names += list(contents.frames["map"]["representation"]) if "map" in contents.frames else []
    columns = {"reconstructed": "representation", "predictions": "features"}
    columns |= {"generated": "representation", "finetuned": "representation"}
    others = [
        name for part, column in columns.items() if part in contents.frames for name in contents.frames[part][column]
    ]
    representations = list(dict.fromkeys(names or others))
    return figures.styles(representations, [name for name in dict.fromkeys(others) if name not in representations])


def zoo_tables(contents: Contents) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """The distribution of every property."""
    frame = contents.frames.get("zoo")
    if frame is not None:
        properties = tables.zoo_properties(frame)
        if len(properties):
            yield "zoo_properties", properties, "Properties of the members at the last epoch: mean, spread, quartiles."


FURTHER_TABLES = {"zoo": zoo_tables}
"""Tables of a stage's section besides its records: (name, unrounded table, caption) each."""


def zoo_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Accuracy by epoch and by hyperparameter."""
    frame = contents.frames.get("zoo")
    if frame is not None and "test_acc" in frame:
        yield Shown(
            "zoo_accuracy",
            figures.zoo_accuracy(frame),
            "Box plots of the test accuracy of the zoo's members, one box per training epoch.",
            "Test accuracy of all members by epoch: median, quartiles, whiskers of 1.5 box lengths, outliers.",
        )
        if varied := figures.varied(frame):
            yield Shown(
                "zoo_hyperparameters",
                figures.zoo_hyperparameters(frame),
                f"Box plots of the test accuracy at the last epoch by {listed(varied)}.",
                "Test accuracy at the last epoch by every hyperparameter that varies.",
            )


def pretrain_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Training curves and the map of embeddings."""
    if any(line.get("val") for lines in contents.metrics.values() for line in lines):
        yield Shown(
            "training_curves",
            figures.training_curves(contents.metrics, looks),
            f"Validation losses and agreement against training steps for {listed(contents.metrics)}.",
            "Validation losses and agreement during training; the dot marks the step that was kept.",
        )
    points = contents.frames.get("map")
    if points is not None and "test_acc" in points and len(points):
        yield Shown(
            "embedding_map",
            figures.embedding_map(points),
            f"Scatter plots of embeddings in two dimensions, colored by accuracy, for {names_in(points)}.",
            "Embeddings of checkpoints in two dimensions. Where color changes smoothly, the embedding orders "
            "checkpoints by accuracy; distances between far groups mean little.",
        )


def probe_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Predicted against true properties."""
    frame = contents.frames.get("predictions")
    if frame is not None and "test" in set(frame["split"]):
        yield Shown(
            "probe_scatter",
            figures.probe_scatter(frame, looks),
            f"Scatter plots of predicted against true test properties, from {names_in(frame, 'features')}.",
            "Predicted against true properties of test checkpoints; perfect predictions lie on the line. Predictions "
            "beyond a panel are drawn at its edge.",
        )


def reconstruct_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Reconstructed against original accuracy; distances and agreement."""
    frame = contents.frames.get("reconstructed")
    if frame is None or frame.empty:
        return
    names = names_in(frame)
    yield Shown(
        "reconstruction_accuracy",
        figures.reconstruction_scatter(frame, looks),
        f"Scatter plots of reconstructed against original test accuracy, one panel per split, for {names}.",
        "Accuracy of every reconstruction against its original's; a faithful reconstruction lies on the line.",
    )
    yield Shown(
        "reconstruction_distributions",
        figures.reconstruction_distributions(frame, looks),
        f"Box plots of structural distance and of agreement by split for {names}.",
        "Distance in weights (lower is closer) beside agreement in behavior (higher is closer): the two need not go "
        "together.",
    )
    if "generated" not in contents.frames:
        yield from accuracy_figures(contents, looks)


def generate_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Distributions of accuracy; accuracy against novelty."""
    frame = contents.frames.get("generated")
    if frame is None or frame.empty:
        return
    yield from accuracy_figures(contents, looks)
    yield Shown(
        "generation_novelty",
        figures.generation_scatter(frame, looks),
        f"Scatter plot of test accuracy against novelty of generated networks, for {names_in(frame)}.",
        "Accuracy against novelty of every generated network: up is better, right is farther from the training "
        "checkpoints.",
    )


def finetune_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """Accuracy by fine-tuning epoch."""
    frame = contents.frames.get("finetuned")
    if frame is not None and len(frame):
        yield Shown(
            "finetuning_curves",
            figures.finetuning_curves(frame, looks),
            f"Mean test accuracy by epoch of fine-tuning, for {names_in(frame)}.",
            "Mean test accuracy by epoch of fine-tuning, with 95 % bootstrap intervals over networks.",
        )


def accuracy_figures(contents: Contents, looks: figures.Styles) -> Iterator[Shown]:
    """The distributions of accuracy per representation, as boxes and as histograms."""
    parts = [contents.frames.get("reconstructed"), contents.frames.get("generated")]
    present = {name for frame in parts if frame is not None for name in frame["representation"]}
    names = [name for name in looks if name in present and looks[name].color in figures.COLORS] or sorted(present)
    yield Shown(
        "accuracy_distributions",
        figures.accuracy_distributions(*parts, names, looks),
        f"Box plots of the test accuracy of original, reconstructed and generated networks for {listed(names)}.",
        "Test accuracy of the originals, of their reconstructions, and of new networks from the same representation.",
    )
    yield Shown(
        "accuracy_histograms",
        figures.accuracy_histograms(*parts, names, looks),
        f"Histograms of the test accuracy of original, reconstructed and generated networks for {listed(names)}.",
        "The same as histograms, reconstructions of all splits together: what a box hides, such as two peaks.",
    )


FIGURES = {
    "zoo": zoo_figures,
    "pretrain": pretrain_figures,
    "probe": probe_figures,
    "reconstruct": reconstruct_figures,
    "generate": generate_figures,
    "finetune": finetune_figures,
}
"""What draws the figures of each stage's section."""


def listed(names: Any) -> str:
    """'a, b and c'."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def names_in(frame: pd.DataFrame, column: str = "representation") -> str:
    """The distinct names of a column, listed."""
    return listed(tables.in_order(frame[column], ()))


def facts_of(contents: Contents) -> list[tuple[str, str]]:
    """What was run, as (term, text); only what the run tells."""
    facts = []
    description, config = contents.zoo_description, contents.config
    tasks = description.get("tasks") or find(config, "tasks")
    if tasks:
        facts.append(("task", listed(tasks)))
    architecture = description.get("architecture") or {"name": find(config, "network")}
    sources = [description, config, *contents.representations.values()]
    parameters = next((found for source in sources if (found := find(source, "parameter_count"))), None)
    if architecture.get("name"):
        arguments = ", ".join(f"{key} {value}" for key, value in sorted((architecture.get("arguments") or {}).items()))
        text = architecture["name"] + (f" ({arguments})" if arguments else "")
        facts.append(("base network", text + (f", {parameters:,} parameters" if parameters else "")))
    zoo = contents.frames.get("zoo")
    if zoo is not None:
        members = zoo.groupby("split")["member"].nunique()
        splits = ", ".join(f"{members[split]:,} {split}" for split in tables.in_order(zoo["split"], tables.SPLITS))
        epochs = ", ".join(str(epoch) for epoch in sorted(zoo["epoch"].unique()))
        facts.append(("zoo", f"{members.sum():,} members ({splits}), {len(zoo):,} checkpoints at epochs {epochs}"))
    if contents.representations:
        facts.append(("representations", listed(contents.representations)))
    compression = compression_of(contents, parameters)
    if compression:
        facts.append(("compression", compression))
    budget = budget_of(contents)
    if budget:
        facts.append(("training budget", budget))
    if config.get("seed") is not None:
        facts.append(("seed", str(config["seed"])))
    return facts


def compression_of(contents: Contents, parameters: int | None) -> str:
    """Weights per latent value, where the number of latent values is recorded; else nothing."""
    found = {}
    for name, config in contents.representations.items():
        size = find(config, "latent_size") or find(contents.config, "latent_size")
        if size and parameters:
            found[name] = f"{parameters / size:.2f} weights per latent value ({size:,} latent values)"
    return per_name(found)


def budget_of(contents: Contents) -> str:
    """Training steps and batch size, of each representation where they differ."""
    found = {}
    for name, config in contents.representations.items() or [("", contents.config)]:
        settings = config.get("pretrain") or contents.config.get("pretrain") or {}
        if settings.get("steps"):
            batch = f" of {settings['batch_size']} checkpoints" if settings.get("batch_size") else ""
            found[name] = f"{settings['steps']:,} steps{batch}"
    return per_name(found)


def per_name(texts: Mapping[str, str]) -> str:
    """One text where all are equal, else 'text (name), text (name)'."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({name})" for name, text in texts.items())


def find(content: Any, key: str) -> Any:
    """The first value of `key` in nested objects, the outermost first; None where there is none."""
    level = [content]
    while level:
        objects = [entry for entry in level if isinstance(entry, dict)]
        for entry in objects:
            if entry.get(key) is not None:
                return entry[key]
        lists = [entry for entry in level if isinstance(entry, list)]
        level = [value for entry in objects for value in entry.values()] + [value for own in lists for value in own]
    return None


def legend_of(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The metrics that occur in the records, in plain words."""
    metrics = {record["metric"] for record in records}

    def occurs(keys: tuple[str, ...]) -> bool:
        exact = any(key in metrics for key in keys)
        families = [key for key in keys if key in ("accuracy fidelity", "diversity", "R2 ")]
        return exact or any(metric.startswith(family) for family in families for metric in metrics)

    return [(term, text) for keys, term, text in LEGEND if occurs(keys)]


def render(
    name: str,
    facts: Sequence[tuple[str, str]],
    contents: Contents,
    sections: Sequence[Mapping[str, Any]],
    absent: Sequence[str] = (),
) -> str:
    """The page as HTML.

    Args:
        name: its title.
        facts: (term, text) below the title.
        contents: of the run.
        sections: what `write_section` returns.
        absent: titles of the stages that are not there.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(
        name=name,
        facts=facts,
        toy=contents.config.get("name") == "smoke",
        numbers=bool(contents.records),
        legend=legend_of(contents.records),
        sections=sections,
        absent=listed(absent) if absent else "",
        details=[
            (title, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False))
            for title, content in (("Config", contents.config), ("Environment", contents.environment))
            if content
        ],
    )
