"""Figures: data frames in, matplotlib figures out; nothing here reads a file or touches pyplot's global state.

One color per representation in all figures (Okabe-Ito, safe for color blindness), grays for baselines and originals.
Every figure is 7 inches wide, which a page shows at 672 pixels.
"""

from __future__ import annotations

import functools
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
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from weightspace.report.tables import SPLITS, best_validation, bootstrap, in_order, label
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
    figure, grid = panels(len(names), height=2.2, columns=min(2, len(names)), sharey=True)
    for i, (axes, name) in enumerate(zip(grid, names, strict=True)):
        groups = sorted(last[name].unique())
        boxes(
            axes,
            [values(last[last[name] == g], "test_acc") for g in groups],
            range(len(groups)),
            [ORIGINAL] * len(groups),
        )
        words = [f"{g:g}" if isinstance(g, float | int) else str(g).replace("_", "\n") for g in groups]
        axes.set_xticks(range(len(groups)), words)
        axes.set_xlabel(name.replace("_", " "))
        if i % 2 == 0:
            axes.set_ylabel("test accuracy\n(share of images)")
    return figure


@styled
def study_panels(frame: pd.DataFrame, shown: Sequence[str], x_label: str = "") -> Figure:
    """One panel per metric over the variants of a study.

    Where the variants have an x, curves over it (one per group) with intervals, and baselines as horizontal lines; else
    a row per variant, baselines in gray.

    Args:
        frame: representation, metric, mean, low, high, x, group, baseline (bool).
        shown: the metrics, in order.
        x_label: what x is.
    """
    swept = frame.loc[~frame["baseline"], "x"].notna().any()
    names = in_order(frame["representation"], ())
    height = 2.1 if swept else 0.75 + 0.21 * len(names)
    figure, grid = panels(len(shown), height=height, columns=3 if swept else 2, sharey=not swept)
    for i, (axes, metric) in enumerate(zip(grid, shown, strict=True)):
        rows = frame[frame["metric"] == metric]
        if swept:
            _swept(axes, rows, x_label)
        else:
            _listed(axes, rows, names)
        axes.set_title(label(metric))
        if not swept and i % 2 == 0:
            axes.set_yticks(range(len(names)), names)
    groups = in_order(frame.loc[~frame["baseline"], "group"].dropna(), ()) if swept else []
    baselines = in_order(frame.loc[frame["baseline"], "representation"], ()) if swept else []
    if groups or baselines:
        handles = [Line2D([], [], color=COLORS[i % len(COLORS)], marker="o", markersize=4) for i in range(len(groups))]
        handles += [
            Line2D([], [], color=GRAYS[i % len(GRAYS)], linestyle=DASHES[i % len(DASHES)])
            for i in range(len(baselines))
        ]
        figure.legend(handles, [*groups, *baselines], loc="outside lower center", ncols=3)
    return figure


def _swept(axes: Axes, rows: pd.DataFrame, x_label: str) -> None:
    own = rows[~rows["baseline"] & rows["x"].notna()]
    groups = in_order(own["group"].dropna(), ()) or [None]
    for i, group in enumerate(groups):
        curve = (own if group is None else own[own["group"] == group]).sort_values(by="x")
        x, mean, low, high = (values(curve, column) for column in ("x", "mean", "low", "high"))
        axes.plot(x, mean, color=COLORS[i % len(COLORS)], marker="o", markersize=3.5)
        axes.fill_between(x, low, high, color=COLORS[i % len(COLORS)], alpha=0.15, linewidth=0)
    for i, name in enumerate(in_order(rows.loc[rows["baseline"], "representation"], ())):
        mean = values(rows[rows["representation"] == name], "mean")[0]
        axes.axhline(mean, color=GRAYS[i % len(GRAYS)], linestyle=DASHES[i % len(DASHES)], linewidth=1)
    x = values(own, "x")
    if len(x) and x.min() > 0 and x.max() / x.min() > 7:
        axes.set_xscale("log")
    axes.set_xlabel(x_label)


def _listed(axes: Axes, rows: pd.DataFrame, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        row = rows[rows["representation"] == name]
        if row.empty or not np.isfinite(values(row, "mean")[0]):
            continue
        color = ORIGINAL if row["baseline"].iloc[0] else COLORS[0]
        axes.hlines(place, values(row, "low"), values(row, "high"), color=color, linewidth=1.6)
        axes.plot(values(row, "mean"), [place], "o", color=color, markersize=4.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))


@styled
def spectrum_curves(frame: pd.DataFrame) -> Figure:
    """Accuracy and agreement (test_acc, agreement) against the number of components kept (count), per choice (which)."""
    figure, grid = panels(2, height=2.8, columns=2)
    choices = in_order(frame["which"], ("top", "mixed", "bottom"))
    for axes, (column, title) in zip(
        grid, {"test_acc": "test accuracy", "agreement": "agreement"}.items(), strict=True
    ):
        for i, which in enumerate(choices):
            groups = frame[frame["which"] == which].groupby("count")[column]
            quartiles = groups.quantile([0.25, 0.5, 0.75]).unstack()
            counts = np.asarray(quartiles.index, float)
            axes.plot(counts, quartiles[0.5], color=COLORS[i], marker="o", markersize=3.5)
            axes.fill_between(counts, quartiles[0.25], quartiles[0.75], color=COLORS[i], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("principal components kept")
        axes.set_ylabel(f"{title}\n(share of images)")
    handles = [Line2D([], [], color=COLORS[i], marker="o", markersize=4) for i in range(len(choices))]
    figure.legend(handles, choices, loc="outside lower center", ncols=len(choices))
    return figure


@styled
def spectrum_variance(frame: pd.DataFrame, looks: Styles) -> Figure:
    """Variance along the principal components of the zoo: a line per set of networks (name, component, variance)."""
    figure, (axes,) = panels(1, height=2.8)
    for name in in_order(frame["name"], ()):
        rows = frame[frame["name"] == name]
        axes.plot(
            rows["component"] + 1, rows["variance"], color=looks[name].color, linestyle=looks[name].dashes, label=name
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("principal component of the zoo's weights")
    axes.set_ylabel("variance along it")
    figure.legend(loc="outside right center")
    return figure


@styled
def training_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], looks: Styles) -> Figure:
    """Validation losses and agreement by step, a line per representation {name: lines of metrics.jsonl}.

    A dot marks the step of lowest validation total, whose weights are the representation.
    """
    keys = {
        "total": "total loss",
        "structural": "structural loss $L_S$",
        "behavioral": "behavioral loss $L_B$",
        "agreement": "agreement",
    }
    recorded = {key for lines in metrics.values() for line in lines for key in line.get("val") or {}}
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
        if key != "agreement" and drawn and min(drawn) > 0 and max(drawn) > 8 * min(drawn):
            log_scale(axes)
        if i + 2 >= len(shown):
            axes.set_xlabel("training steps")
        else:
            axes.tick_params(labelbottom=False)
        axes.set_ylabel("share of queries" if key == "agreement" else "validation loss")
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
        axes.xaxis.set_major_locator(MaxNLocator(4))
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


def log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log", subs=(2, 5))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter() if np.ptp(np.log10(axes.get_ylim())) < 2 else NullFormatter())


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
