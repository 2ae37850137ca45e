"""Figures: data frames in, matplotlib figures out; nothing here reads a file or touches pyplot's global state.

One color per representation in all figures (Okabe-Ito, safe for color blindness), grays for baselines and originals.
Every figure is 7 inches wide, which a page shows at 672 pixels.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from weightspace.report.tables import SPLITS, WORST, best_validation, bootstrap, in_order, label
from weightspace.runs import atomic, derive_seed

WIDTH = 7.0
"""Width of every figure in inches."""
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAYS = ("#2b2b2b", "#6f6f6f", "#9b9b9b", "#bcbcbc")
ORIGINAL = "#7d7d7d"
DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))
MARKERS = ("s", "^", "D", "v", "P", "X", "<", "p")
SPLIT_MARKERS = {"train": "o", "val": "o", "test": "s", "unseen": "^"}
HYPERPARAMETERS = ("task", "init", "learning_rate", "weight_decay", "backdoor")
"""Columns of a zoo's table that tell how a member was trained."""
WIDE = 20
"""An x that spans more than this factor has a logarithmic axis."""
RATES = ("learning rate",)
"""Metrics of a study whose axis is always logarithmic."""
BINS = 30
"""Bars of a histogram."""
HISTOGRAMS: dict[str, dict[str, Any]] = {
    "original": {"color": "#c4c4c4", "fill": True},
    "reconstructed": {"linewidth": 1.4},
    "generated": {"linewidth": 1.2, "linestyle": (0, (2, 1))},
}
"""How each set of networks is drawn in a histogram; without a color in that of its representation."""
RASTER = 1500
"""More points than this are drawn as pixels in the SVG, so that it stays small."""
RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlepad": 5,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Style:
    """How one representation or baseline looks in every figure."""

    color: str
    marker: str = "o"
    dashes: Any = "-"


Styles = Mapping[str, Style]


def styles(representations: Sequence[str], baselines: Sequence[str]) -> dict[str, Style]:
    """A style per name: colors and circles for representations, grays and other markers for baselines."""
    found = {}
    for i, name in enumerate(representations):
        found[name] = Style(COLORS[i % len(COLORS)], "o", "-" if i < len(COLORS) else DASHES[i // len(COLORS) % 3])
    for i, name in enumerate(baselines):
        found[name] = Style(GRAYS[i % len(GRAYS)], MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)])
    return found


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a figure's function under the settings of this file, whatever the caller's are."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapped


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/NAME.png and folder/NAME.svg; equal figures give equal bytes."""
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        with atomic(folder / f"{name}.png") as path:
            figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
        with atomic(folder / f"{name}.svg") as path:
            figure.savefig(path, format="svg", dpi=200, metadata={"Date": None, "Creator": None})


@styled
def zoo_accuracy(checkpoints: pd.DataFrame) -> Figure:
    """Test accuracy of all members (test_acc), a box per epoch."""
    figure, (axes,) = panels(1, height=2.6)
    epochs = sorted(checkpoints["epoch"].unique())
    groups = [values(checkpoints[checkpoints["epoch"] == epoch], "test_acc") for epoch in epochs]
    boxes(axes, groups, range(len(epochs)), [ORIGINAL] * len(epochs))
    axes.set_xticks(range(len(epochs)), [f"{epoch}" for epoch in epochs])
    axes.set_xlabel("training epochs of the member")
    axes.set_ylabel("test accuracy\n(share of images)")
    return figure


def varied(checkpoints: pd.DataFrame) -> list[str]:
    """The hyperparameters of a zoo's table that vary, with at most twelve values each."""
    known = [name for name in HYPERPARAMETERS if name in checkpoints]
    return [name for name in known if 1 < checkpoints[name].nunique() <= 12]


@styled
def zoo_hyperparameters(checkpoints: pd.DataFrame) -> Figure:
    """Test accuracy at the last epoch, a panel per hyperparameter that varies and a box per value."""
    last = checkpoints[checkpoints["epoch"] == checkpoints["epoch"].max()]
    names = varied(checkpoints)
    columns = min(2, len(names))
    figure, grid = panels(len(names), height=2.2, columns=columns, sharey=True)
    for i, (axes, name) in enumerate(zip(grid, names, strict=True)):
        groups = sorted(last[name].dropna().unique())
        accuracy = [values(last[last[name] == group], "test_acc") for group in groups]
        boxes(axes, accuracy, range(len(groups)), [ORIGINAL] * len(groups))
        words = [f"{group:g}" if isinstance(group, float | int) else str(group) for group in groups]
        broken = [re.sub(r"[_ @]", "\n", word) if len(word) > 40 / columns / len(groups) else word for word in words]
        axes.set_xticks(range(len(groups)), broken)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xlabel(name.replace("_", " "))
        if i % columns == 0:
            axes.set_ylabel("test accuracy\n(share of images)")
    return figure


@styled
def study_panels(frame: pd.DataFrame, metrics: Sequence[str], x_label: str = "") -> Figure:
    """What the variants of a study reach, a panel per metric.

    Where every variant has an x, curves over it with bands for their intervals, one per group (or per split, where
    there are no groups), and baselines as horizontal lines. Else a row per variant with dots and intervals, one color
    per group (or split), baselines in gray. Numbers below tables.WORST are arrows at the edge.

    Args:
        frame: variant, split, metric, mean, low, high (NaN where there is none), x, group (None where there is none),
            baseline (bool).
        metrics: which are shown, in order.
        x_label: what x is.
    """
    own = frame[~frame["baseline"]]
    swept = len(own) > 0 and bool(own["x"].notna().all())
    grouped = bool(own["group"].notna().any())
    frame = frame.assign(series=frame["group"].fillna("") if grouped else frame["split"])
    series = in_order(frame.loc[~frame["baseline"], "series"], () if grouped else SPLITS)
    colors = {name: Style(COLORS[i % len(COLORS)], (*"os^Dv", *MARKERS)[i % 12]) for i, name in enumerate(series)}
    baselines = in_order(frame.loc[frame["baseline"], "variant"], ())
    grays = {name: Style(GRAYS[i % len(GRAYS)], "", DASHES[i % len(DASHES)]) for i, name in enumerate(baselines)}
    names = in_order(frame["variant"], ())
    columns = min(3 if swept or len(metrics) > 4 else 2, len(metrics))
    wrapped = ["\n".join(textwrap.wrap(name, 24)) for name in names]
    lines = max(name.count("\n") + 1 for name in wrapped)
    height = 2.1 if swept else 0.6 + max(0.08 + 0.13 * lines, 0.1 + 0.1 * (1 if grouped else len(series))) * len(names)
    figure, grid = panels(len(metrics), height=height, columns=columns, sharey=not swept)
    for i, (axes, metric) in enumerate(zip(grid, metrics, strict=True)):
        rows = frame[frame["metric"] == metric]
        if swept:
            _curves(axes, rows, colors, grays)
            if i + columns >= len(metrics):
                axes.set_xlabel(x_label)
        else:
            _rows(axes, rows, names, colors, 0.0 if grouped else 0.26)
            axes.set_yticks(range(len(names)), wrapped, linespacing=0.95)
            if metric in RATES:
                axes.set_xscale("log", subs=())
        axes.set_title("\n".join(textwrap.wrap(label(metric), 30 if swept else 60 // columns)))
    look = {**(colors if len(colors) > 1 else {}), **(grays if swept else {})}
    handles = [
        Line2D([], [], color=each.color, marker=each.marker, linestyle=each.dashes if swept else "", markersize=4)
        for each in look.values()
    ]
    if look:
        columns = max(1, min(len(look), int(90 / (8 + max(map(len, look))))))
        figure.legend(handles, [name or "all" for name in look], loc="outside lower center", ncols=columns)
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, colors: Styles, grays: Styles) -> None:
    """One metric over x: a curve with a band per series, a horizontal line per baseline."""
    own = rows[~rows["baseline"]]
    for name, look in colors.items():
        curve = own[own["series"] == name].sort_values(by="x")
        x, mean, low, high = (values(curve, column) for column in ("x", "mean", "low", "high"))
        mean_shown = np.where(mean < WORST, np.nan, mean)
        known = np.isfinite(mean_shown)
        axes.fill_between(x, low.clip(WORST), high, where=known.tolist(), color=look.color, alpha=0.15, linewidth=0)
        axes.plot(x, mean_shown, color=look.color, marker=look.marker, markersize=3.5)
        _arrows(axes, x[mean < WORST], "v", look.color)
    for name, look in grays.items():
        for mean in values(rows[rows["variant"] == name], "mean"):
            if mean >= WORST:
                axes.axhline(mean, color=look.color, linestyle=look.dashes, linewidth=1, zorder=1)
    x = values(own, "x")
    if len(x) and x.min() > 0 and x.max() / x.min() > WIDE:
        log_scale(axes, x=True)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _rows(axes: Axes, rows: pd.DataFrame, names: Sequence[str], colors: Styles, step: float) -> None:
    """One metric in rows: a dot with its interval per variant and series, the series `step` apart."""
    for place, name in enumerate(names):
        for j, (series, look) in enumerate(colors.items()):
            row = rows[(rows["variant"] == name) & (rows["baseline"] | (rows["series"] == series))]
            row = row[row["mean"].notna()].head(1) if not step else row[row["series"] == series]
            if row.empty:
                continue
            y = np.full(len(row), place + (j - (len(colors) - 1) / 2) * step)
            color = ORIGINAL if row["baseline"].iloc[0] else look.color
            mean, low, high = (values(row, column) for column in ("mean", "low", "high"))
            known = mean >= WORST
            axes.hlines(y[known], low[known].clip(WORST), high[known], color=color, linewidth=1.6)
            axes.plot(mean[known], y[known], look.marker, color=color, markersize=4.2, linestyle="")
            _arrows(axes, y[mean < WORST], "<", color)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _arrows(axes: Axes, places: np.ndarray, marker: str, color: str) -> None:
    """Arrows at the lower edge of an axis, for numbers beyond it; the layout does not look at them."""
    down, edge = marker == "v", np.full(len(places), 0.03)
    transform = axes.get_xaxis_transform() if down else axes.get_yaxis_transform()
    x, y = (places, edge) if down else (edge, places)
    axes.plot(x, y, marker, color=color, markersize=4.5, transform=transform, linestyle="", in_layout=False)


@styled
def spectrum_curves(frame: pd.DataFrame) -> Figure:
    """Accuracy and agreement (test_acc, agreement) against the number of components kept (count), per choice (which).

    Lines are medians over checkpoints, bands their quartiles.
    """
    columns = {"test_acc": "test accuracy", "agreement": "agreement with the whole network"}
    figure, grid = panels(2, height=2.8, columns=2, sharey=True)
    choices = in_order(frame["which"], ())
    for axes, (column, title) in zip(grid, columns.items(), strict=True):
        for i, which in enumerate(choices):
            groups = frame[frame["which"] == which].groupby("count")[column]
            low, middle, high = (groups.quantile(q) for q in (0.25, 0.5, 0.75))
            counts = np.asarray(middle.index, float)
            axes.fill_between(counts, low, high, color=COLORS[i], alpha=0.15, linewidth=0)
            axes.plot(counts, middle, color=COLORS[i], marker="os^"[i % 3], markersize=3.5)
        log_scale(axes, x=True)
        axes.set_xlabel("principal components kept")
        axes.set_title(title)
    grid[0].set_ylabel("share of images")
    handles = [Line2D([], [], color=COLORS[i], marker="os^"[i % 3], markersize=4) for i in range(len(choices))]
    figure.legend(handles, choices, loc="outside lower center", ncols=len(choices))
    return figure


@styled
def variance_curves(frame: pd.DataFrame, looks: Styles) -> Figure:
    """Variance along the principal components of the zoo: a line per set of networks (name, component, variance)."""
    names = in_order(frame["name"], ())
    figure, (axes,) = panels(1, height=2.8)
    for name in names:
        rows = frame[frame["name"] == name]
        axes.plot(rows["component"] + 1, rows["variance"], color=looks[name].color, linestyle=looks[name].dashes)
    log_scale(axes, x=True)
    axes.set_yscale("log")
    variance = values(frame, "variance")
    largest = float(np.nanmax(variance))
    axes.set_ylim(max(float(np.nanmin(variance)), 1e-9 * largest) / 2, 2 * largest)  # exact zeros have no logarithm
    axes.set_xlabel("principal component of the zoo's weights")
    axes.set_ylabel("variance along it")
    lined_legend(figure, names, looks, lambda name: {"linestyle": looks[name].dashes})
    return figure


@styled
def probe_curves(frame: pd.DataFrame, looks: Styles) -> Figure:
    """R2 of probes by the epoch of the probed checkpoints, a panel per property and a line per representation.

    An R2 below -1 is beyond the panel.

    Args:
        frame: representation, epoch, property, mean, low, high (R2; NaN where there is none).
        looks: the style of every representation.
    """
    properties, names = in_order(frame["property"], ()), in_order(frame["representation"], ())
    columns = min(3, max(2, len(properties)))
    figure, grid = panels(len(properties), height=2.3, columns=columns)
    for i, (axes, target) in enumerate(zip(grid, properties, strict=True)):
        for name in names:
            chosen = (frame["property"] == target) & (frame["representation"] == name)
            curve, look = frame[chosen].sort_values(by="epoch"), looks[name]
            epochs, mean, low, high = (values(curve, column) for column in ("epoch", "mean", "low", "high"))
            axes.fill_between(epochs, low, high, color=look.color, alpha=0.12, linewidth=0)
            axes.plot(epochs, mean, color=look.color, linestyle=look.dashes, marker=look.marker, markersize=3.5)
        shown = values(frame[frame["property"] == target], "mean") >= -1
        rows = frame[frame["property"] == target][shown]
        axes.set_ylim(*limits(values(rows, "mean"), values(rows, "low").clip(-1), values(rows, "high")))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_title(label(target))
        axes.set_xlabel("training epochs of the member")
        if i % columns == 0:
            axes.set_ylabel("share of variance\nexplained (R\u00b2)")
    lined_legend(figure, names, looks, lambda name: {"linestyle": looks[name].dashes, "marker": looks[name].marker})
    return figure


@styled
def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], looks: Styles) -> Figure:
    """Validation losses, agreement and probes by step, a line per representation {name: lines of metrics.jsonl}.

    A dot marks the step of lowest validation total, whose weights are the representation.
    """
    keys = {
        "total": "total loss",
        "structural": "structural loss $L_S$",
        "behavioral": "behavioral loss $L_B$",
        "contrastive": "contrastive loss $L_C$",
        "cycle": "cycle loss $L_{cycle}$",
        "agreement": "agreement",
    }
    recorded = {key: None for lines in metrics.values() for line in lines for key in line.get("val") or {}}
    keys |= {key: label(key) for key in recorded if key.startswith("R2 ")}
    shown = [key for key in keys if key in recorded]
    figure, grid = panels(len(shown), height=2.15, columns=2)
    for i, (axes, key) in enumerate(zip(grid, shown, strict=True)):
        drawn: list[float] = []
        for name, lines in metrics.items():
            points = [
                (line["step"], line["val"][key]) for line in lines if (line.get("val") or {}).get(key) is not None
            ]
            if not points:
                continue
            steps, found = zip(*points, strict=True)
            axes.plot(steps, found, color=looks[name].color, linestyle=looks[name].dashes, label=name)
            best = best_validation(lines)
            if best is not None and best["val"].get(key) is not None:
                axes.plot(best["step"], best["val"][key], "o", color=looks[name].color, markersize=4)
            drawn += found
        axes.set_title(keys[key])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        unit = (
            "share of queries"
            if key == "agreement"
            else "share of variance"
            if key.startswith("R2 ")
            else "validation loss"
        )
        if unit == "validation loss" and drawn and min(drawn) > 0 and max(drawn) > 8 * min(drawn):
            log_scale(axes)
        if key.startswith("R2 ") and drawn and max(drawn) > -1:  # one far below -1 does not stretch the panel
            axes.set_ylim(bottom=max(axes.get_ylim()[0], -1.05))
        if i + 2 >= len(shown):
            axes.set_xlabel("training steps")
        else:
            axes.tick_params(labelbottom=False)
        axes.set_ylabel(unit)
    lined_legend(figure, metrics, looks, lambda name: {"linestyle": looks[name].dashes})
    return figure


@styled
def embedding_map(points: pd.DataFrame) -> Figure:
    """Embeddings in two dimensions (representation, split, x, y, test_acc), a panel per representation."""
    names = in_order(points["representation"], ())
    figure, grid = panels(len(names), height=3.1 if len(names) < 3 else 2.4, columns=min(3, max(2, len(names))))
    accuracy = values(points, "test_acc")
    low, high = np.nanquantile(accuracy, (0.05, 1.0))
    low = low if low < high else high - 0.01
    image = None
    splits = in_order(points["split"], SPLITS)
    for axes, name in zip(grid, names, strict=True):
        chosen = points[points["representation"] == name]
        for split in splits:
            rows = chosen[chosen["split"] == split]
            image = axes.scatter(
                rows["x"],
                rows["y"],
                c=rows["test_acc"],
                cmap="viridis",
                vmin=low,
                vmax=high,
                s=11,
                marker=SPLIT_MARKERS.get(split, "D"),
                linewidths=0,
                alpha=0.9,
                rasterized=len(chosen) > RASTER,
            )
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first map coordinate")
    for axes in grid[:: min(3, max(2, len(names)))]:
        axes.set_ylabel("second map coordinate")
    if image is not None:
        bar = figure.colorbar(image, ax=grid, extend="min", shrink=0.85, aspect=22, pad=0.02)
        bar.set_label("test accuracy (share of images)")
        bar.outline.set_visible(False)  # type: ignore[operator]
    marks: dict[str, list[str]] = {}
    for split in splits:
        marks.setdefault(SPLIT_MARKERS.get(split, "D"), []).append(split)
    if len(marks) > 1:
        handles = [point_handle("#777777", mark) for mark in marks]
        names_of = [", ".join(group) for group in marks.values()]
        figure.legend(handles, names_of, loc="outside lower center", ncols=len(marks), handletextpad=0.2)
    return figure


@styled
def probe_scatter(predictions: pd.DataFrame, looks: Styles, split: str = "test") -> Figure:
    """Predicted against true property of one split's checkpoints: a row per features, a column per property."""
    rows = predictions[predictions["split"] == split]
    features, properties = in_order(rows["features"], ()), in_order(rows["property"], ())
    figure, grid = panels(len(features) * len(properties), height=1.65, columns=len(properties))
    for i, (axes, (name, target)) in enumerate(
        zip(grid, ((name, target) for name in features for target in properties), strict=True)
    ):
        of_target = rows[rows["property"] == target]
        chosen = of_target[of_target["features"] == name]
        true, low_high = values(of_target, "true"), widened(values(of_target, "true"))
        across, up = limits(true), limits(true, values(of_target, "predicted").clip(*low_high))
        identity(axes, up)
        axes.scatter(
            values(chosen, "true"),
            values(chosen, "predicted").clip(*low_high),
            s=7,
            color=looks[name].color,
            alpha=0.55,
            linewidths=0,
            rasterized=len(chosen) > RASTER,
        )
        axes.set(xlim=across, ylim=up)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        if i < len(properties):
            axes.set_title(label(target))
        if i % len(properties) == 0:
            axes.set_ylabel(f"{name}\n\npredicted", linespacing=0.9)
        if i >= len(properties) * (len(features) - 1):
            axes.set_xlabel("true")
        else:
            axes.tick_params(labelbottom=False)
    return figure


@styled
def reconstruction_scatter(reconstructed: pd.DataFrame, looks: Styles) -> Figure:
    """Test accuracy of the reconstruction against that of its original, a panel per split."""
    splits = in_order(reconstructed["split"], SPLITS)
    figure, grid = panels(len(splits), height=3.6, columns=max(2, len(splits)))
    ends = limits(values(reconstructed, "original_acc"), values(reconstructed, "reconstructed_acc"))
    names = in_order(reconstructed["representation"], ())
    for axes, split in zip(grid, splits, strict=True):
        identity(axes, ends)
        for name in names:
            rows = reconstructed[(reconstructed["split"] == split) & (reconstructed["representation"] == name)]
            axes.scatter(
                rows["original_acc"],
                rows["reconstructed_acc"],
                s=9,
                color=looks[name].color,
                marker=looks[name].marker,
                alpha=0.5,
                linewidths=0,
                rasterized=len(rows) > RASTER,
            )
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(split)
        axes.set_xlabel("test accuracy of the original")
    grid[0].set_ylabel("test accuracy of the reconstruction")
    lined_legend(figure, names, looks)
    return figure


@styled
def reconstruction_distributions(reconstructed: pd.DataFrame, looks: Styles) -> Figure:
    """Structural distance and agreement between originals and reconstructions, boxes by split and representation."""
    splits = in_order(reconstructed["split"], SPLITS)
    names = in_order(reconstructed["representation"], ())
    figure, grid = panels(2, height=2.6, columns=2)
    titles = {"distance": "structural distance\n(L2 of weights)", "agreement": "agreement\n(share of images)"}
    step = 0.8 / len(names)
    for axes, (column, title) in zip(grid, titles.items(), strict=True):
        for j, name in enumerate(names):
            of_name = reconstructed[reconstructed["representation"] == name]
            groups = [values(of_name[of_name["split"] == split], column) for split in splits]
            places = [i + (j - (len(names) - 1) / 2) * step for i in range(len(splits))]
            boxes(axes, groups, places, [looks[name].color] * len(splits), width=step * 0.72)
        axes.set_xticks(range(len(splits)), splits)
        axes.set_xlim(-0.55, len(splits) - 0.45)
        axes.set_xlabel("split")
        axes.set_ylabel(title)
    lined_legend(figure, names, looks, lambda name: {"marker": "s"})
    return figure


@styled
def accuracy_distributions(
    reconstructed: pd.DataFrame | None, generated: pd.DataFrame | None, names: Sequence[str], looks: Styles
) -> Figure:
    """Test accuracy of original, reconstructed (by split) and generated networks, a panel per representation."""
    figure, grid = panels(len(names), height=2.6, columns=min(3, max(2, len(names))), sharey=True)
    for axes, name in zip(grid, names, strict=True):
        groups: dict[str, tuple[np.ndarray, str]] = {}
        if reconstructed is not None:
            own = reconstructed[reconstructed["representation"] == name]
            groups["original"] = values(own, "original_acc"), ORIGINAL
            for split in in_order(own["split"], ()):
                rows = own[own["split"] == split]
                groups[f"reconstructed\n({split})"] = values(rows, "reconstructed_acc"), looks[name].color
        if generated is not None:
            rows = generated[generated["representation"] == name]
            groups["generated"] = values(rows, "test_acc"), looks[name].color
        for place, (accuracy, color) in enumerate(groups.values()):
            spread = (np.arange(len(accuracy)) * 0.6180339887 % 1 - 0.5) * 0.5  # golden ratio: even, without a seed
            axes.scatter(
                place + spread, accuracy, s=4, color=color, alpha=0.3, linewidths=0, rasterized=len(accuracy) > RASTER
            )
        colors = [color for _, color in groups.values()]
        boxes(axes, [accuracy for accuracy, _ in groups.values()], range(len(groups)), colors, width=0.6, points=False)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_title(name)
    grid[0].set_ylabel("test accuracy\n(share of images)")
    return figure


@styled
def accuracy_histograms(
    reconstructed: pd.DataFrame | None, generated: pd.DataFrame | None, names: Sequence[str], looks: Styles
) -> Figure:
    """Histograms of the test accuracy of original, reconstructed and generated networks, a panel per representation.

    Reconstructions of all splits count together. Heights are shares of each set, so that sets of all sizes compare.
    """
    parts = {"original": (reconstructed, "original_acc"), "reconstructed": (reconstructed, "reconstructed_acc")}
    parts["generated"] = (generated, "test_acc")
    sets = {
        (name, part): values(frame[frame["representation"] == name], column)
        for name in names
        for part, (frame, column) in parts.items()
        if frame is not None
    }
    bins = np.linspace(*limits(*sets.values()), BINS + 1)
    columns = min(3, max(2, len(names)))
    figure, grid = panels(len(names), height=2.2, columns=columns, sharey=True)
    for i, (axes, name) in enumerate(zip(grid, names, strict=True)):
        for part, look in HISTOGRAMS.items():
            accuracy = sets.get((name, part), np.empty(0))
            accuracy = accuracy[np.isfinite(accuracy)]
            if len(accuracy):
                color = look.get("color", looks[name].color)
                shares = np.histogram(accuracy, bins)[0] / len(accuracy)
                axes.stairs(shares, bins, **{**look, "color": color})
        axes.set_title(name)
        axes.set_xlabel("test accuracy (share of images)")
        if i % columns == 0:
            axes.set_ylabel("share of networks")
    shown = [part for part in HISTOGRAMS if any(part == of for _, of in sets)]
    handles = [Patch(**{"color": "#555555", "fill": False, **HISTOGRAMS[part]}) for part in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=3)
    return figure


@styled
def generation_scatter(networks: pd.DataFrame, looks: Styles) -> Figure:
    """Test accuracy against novelty of every generated network, representations in color before baselines in gray."""
    names = in_order(networks["representation"], ())
    figure, (axes,) = panels(1, height=3.2)
    for name in sorted(names, key=lambda name: looks[name].color in COLORS):  # baselines first, below
        rows = networks[networks["representation"] == name]
        axes.scatter(
            rows["novelty"],
            rows["test_acc"],
            s=16,
            color=looks[name].color,
            marker=looks[name].marker,
            alpha=0.6,
            linewidths=0,
            rasterized=len(rows) > RASTER,
        )
    axes.set_xlabel("novelty (distance to the nearest training checkpoint / the zoo's typical one)")
    axes.set_ylabel("test accuracy (share of images)")
    handles = [point_handle(looks[name].color, looks[name].marker) for name in names]
    figure.legend(handles, names, loc="outside right center", handletextpad=0.2)
    return figure


@styled
def finetuning_curves(curves: pd.DataFrame, looks: Styles) -> Figure:
    """Mean test accuracy by fine-tuning epoch, with 95 % bootstrap intervals over networks."""
    names = in_order(curves["representation"], ())
    epochs = sorted(curves["epoch"].unique())
    figure, (axes,) = panels(1, height=3.0)
    for j, name in enumerate(names):
        found = []
        for epoch in epochs:
            rows = curves.loc[(curves["representation"] == name) & (curves["epoch"] == epoch), ["network", "test_acc"]]
            rows = rows.sort_values(by="network")
            generator = np.random.default_rng(derive_seed("report", "finetune", name, epoch))
            found.append(bootstrap(values(rows, "test_acc"), generator))
        mean, low, high = np.array(found).T
        places = np.arange(len(epochs)) + (j - (len(names) - 1) / 2) * 0.03
        known = np.isfinite(mean)
        color, look = looks[name].color, looks[name]
        axes.plot(
            places[known], mean[known], color=color, linestyle=look.dashes, marker=look.marker, markersize=4, label=name
        )
        axes.vlines(places, low, high, color=color, linewidth=1.2)
    axes.set_xticks(range(len(epochs)), [f"{epoch}" for epoch in epochs])
    axes.set_xlabel("epochs of fine-tuning")
    axes.set_ylabel("test accuracy (share of images)")
    handles = [
        Line2D([], [], color=looks[n].color, linestyle=looks[n].dashes, marker=looks[n].marker, markersize=4)
        for n in names
    ]
    figure.legend(handles, names, loc="outside right center")
    return figure


def panels(count: int, height: float, columns: int = 1, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `columns` abreast, each row `height` inches high."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def boxes(
    axes: Axes,
    groups: Sequence[np.ndarray],
    places: Iterable[float],
    colors: Sequence[str],
    width: float = 0.55,
    points: bool = True,
) -> None:
    """A box per group at its place: median and quartiles, whiskers of 1.5 box lengths, points beyond them."""
    for group, place, color in zip(groups, places, colors, strict=True):
        finite = group[np.isfinite(group)]
        if not len(finite):
            continue
        line = {"color": color, "linewidth": 1.0}
        axes.boxplot(
            [finite],
            positions=[place],
            widths=width,
            manage_ticks=False,
            patch_artist=True,
            showfliers=points,
            boxprops={"facecolor": to_rgba(color, 0.22), "edgecolor": color, "linewidth": 1.0},
            whiskerprops=line,
            capprops={"linewidth": 0},
            medianprops={"color": color, "linewidth": 2.0, "solid_capstyle": "butt"},
            flierprops={
                "marker": "o",
                "markersize": 2.2,
                "markerfacecolor": color,
                "markeredgewidth": 0,
                "alpha": 0.45,
                "rasterized": len(finite) > RASTER,
            },
        )


def identity(axes: Axes, ends: tuple[float, float]) -> None:
    """The line on which both axes agree."""
    axes.plot(ends, ends, color="#b0b0b0", linewidth=0.8, zorder=0)


def values(frame: Any, column: str) -> np.ndarray:
    """A column of n rows as floats [n]."""
    return np.asarray(frame[column], float)


def limits(*columns: np.ndarray) -> tuple[float, float]:
    """The ends of an axis that shows all finite values of all columns, with a margin of 4 %."""
    finite = np.concatenate(columns)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = 0.04 * (high - low) or 0.04
    return low - margin, high + margin


def widened(column: np.ndarray) -> tuple[float, float]:
    """The range of the values, widened by half of itself on both sides: where predictions are shown."""
    low, high = float(column.min()), float(column.max())
    return low - (high - low) / 2, high + (high - low) / 2


def log_scale(axes: Axes, x: bool = False) -> None:
    """A logarithmic axis (vertical, or x) with plain numbers at 1, 10, 100, and at 2 and 5 where there is room."""
    axis = axes.xaxis if x else axes.yaxis
    (axes.set_xscale if x else axes.set_yscale)("log", subs=(2, 5))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(ScalarFormatter() if np.ptp(np.log10(axis.get_view_interval())) < 2 else NullFormatter())


def point_handle(color: str, marker: str) -> Line2D:
    """A legend entry for points."""
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=5, markeredgewidth=0)


def lined_legend(
    figure: Figure,
    names: Iterable[str],
    looks: Styles,
    shape: Callable[[str], dict[str, Any]] | None = None,
) -> None:
    """One legend below all panels; `shape` tells how a name is drawn (default: its marker)."""
    shapes = {"linestyle": "", "markersize": 5, "markeredgewidth": 0}
    names = list(names)
    handles = [
        Line2D(
            [], [], color=looks[name].color, **{**shapes, **(shape(name) if shape else {"marker": looks[name].marker})}
        )
        for name in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
