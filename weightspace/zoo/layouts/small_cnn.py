"""The Small CNN Zoo (arXiv 2002.11448): weights.npy [n, P], metrics.csv(.gz), layout.csv (varname, start, shape)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightspace.zoo.layouts.found import Found, activation_of, column, scalar
from weightspace.zoo.untrusted import Unreadable, read_array, read_table

COLUMNS = {
    "test_accuracy": "test_acc",
    "train_accuracy": "train_acc",
    "l2reg": "weight_decay",
    "random_seed": "seed",
    "w_init": "init",
}
"""Their columns, without "config." -> ours."""


KINDS = ("bias", "weight")
"""Of one dimension, of more."""


def detects(root: Path) -> bool:
    """Whether a folder holds the array of weights."""
    return (root / "weights.npy").is_file()


def read(root: Path) -> Iterator[Found]:
    """Every row of the array.

    Raises:
        Unreadable: the array, the layout or the metrics cannot be read or do not belong together.
    """
    weights = read_array(root / "weights.npy")
    variables = _layout(read_table(root / "layout.csv"), weights.shape)
    tables = [root / name for name in ("metrics.csv", "metrics.csv.gz") if (root / name).is_file()]
    metrics = read_table(tables[0]) if tables else pd.DataFrame(index=range(len(weights)))
    if len(metrics) != len(weights):
        raise Unreadable(f"weights.npy has {len(weights)} rows, {tables[0].name} has {len(metrics)}; they must match")
    metrics.columns = [str(name).removeprefix("config.") for name in metrics.columns]
    for row, said in enumerate(metrics.to_dict("records")):
        known = {COLUMNS.get(str(key), column(str(key))): scalar(value) for key, value in said.items()}
        properties = {
            key: value for key, value in known.items() if value is not None and key not in ("modeldir", "step")
        }
        if {"train_acc", "test_acc"} <= properties.keys():
            properties["gap"] = properties["train_acc"] - properties["test_acc"]
        step = known.get("step")
        yield Found(
            member=str(known.get("modeldir", row)),
            epoch=int(step) if isinstance(step, int | float) and math.isfinite(step) else None,
            path=f"weights.npy row {row}",
            load=lambda row=row: _state(weights[row], variables),
            properties=properties,
            network="SmallCNN",
            arguments=activation_of(properties.pop("activation", None)),
        )


def _layout(table: pd.DataFrame, shape: tuple[int, ...]) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, start, shape) of every variable.

    Raises:
        Unreadable: it does not describe rows of this length.
    """
    names = next((table[key] for key in ("varname", "name", "variable") if key in table), None)
    starts = next((table[key] for key in ("start_idx", "offset", "start") if key in table), None)
    if names is None or starts is None or "shape" not in table:
        raise Unreadable(
            f"layout.csv has the columns {', '.join(map(str, table.columns))}; needed: varname, start_idx, shape"
        )
    found, end = [], 0
    for name, start, text in zip(names, starts, table["shape"], strict=True):
        dims = tuple(int(number) for number in re.findall(r"\d+", str(text)))
        if not isinstance(start, int | np.integer) or int(start) != end:
            raise Unreadable(f"layout.csv: {name} starts at {start}, the variable before ends at {end}")
        found.append((str(name), end, dims))
        end += math.prod(dims)
    if len(shape) != 2 or shape[1] != end:
        raise Unreadable(f"weights.npy has the shape {shape}, layout.csv describes rows of {end} values")
    return found


def _state(row: np.ndarray[Any, Any], variables: list[tuple[str, int, tuple[int, ...]]]) -> dict[str, Tensor]:
    """One row as a state_dict: kernels [H, W, in, out] become [out, in, H, W], matrices [in, out] become [out, in]."""
    flat = torch.from_numpy(np.array(row, dtype=np.float32))
    state = {}
    for name, start, shape in variables:
        value = flat[start : start + math.prod(shape)].view(shape)
        state[name] = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in state))  # in their order in the network
    numbered = {name: f"{layers.index(name.rpartition('/')[0])}.{KINDS[state[name].ndim > 1]}" for name in state}
    return {numbered[name]: value.contiguous() for name, value in state.items()}
