"""The field's zoos: folders of Ray Tune trials, a checkpoint per epoch.

ROOT/config.json                          the grid
ROOT/NN_tune_trainable_*/params.json      hyperparameters of a member
                         result.json      JSON Lines, an epoch each
                         checkpoint_50/checkpoints, or checkpoint_000050/checkpoints: what torch.save wrote
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import atomic, finite, write_json, write_text
from weightspace.zoo.layouts.found import Found, activation_of, column, folders, scalar, split_of
from weightspace.zoo.untrusted import Unreadable, read_json, read_json_lines, read_state

PARAMS_FILE = "params.json"
RESULT_FILE = "result.json"
LAST_EPOCH = 100_000
"""The greatest epoch that is written: result.json has a line for each."""
COLUMNS = {
    "seed": "seed",
    "model::init_type": "init",
    "model::dropout": "dropout",
    "optim::lr": "learning_rate",
    "optim::wd": "weight_decay",
    "optim::optimizer": "optimizer",
}
"""Hyperparameters: their names -> our columns."""
ARGUMENTS = "model::arguments"
"""Where `write` keeps all arguments of the base network, of which the field's own keys say only some."""
IGNORED = {"model::type", "model::nlin", "model::channels_in", "model::o_dim", ARGUMENTS, "split"}
"""What describes the base network, and the split."""
NETWORKS = {"cnn": "CNN", "cnn3": "CNN3", "lenet5": "LeNet5", "lenet": "LeNet5", "mlp": "MLP", "cnn8": "CNN8"}
"""model::type -> base network."""
LAYERS = {"CNN": (0, 3, 6, 9, 11), "CNN3": (0, 4, 8, 13, 16), "LeNet5": (0, 4, 9, 12, 15)}
"""Places of the layers with weights in the field's module lists."""


def detects(root: Path) -> bool:
    """Whether a folder holds trials."""
    return any((folder / PARAMS_FILE).is_file() for folder in folders(root))


def read(root: Path) -> Iterator[Found]:
    """Every checkpoint of every trial."""
    for trial in folders(root):
        if (trial / PARAMS_FILE).exists() or (trial / RESULT_FILE).exists():
            yield from _read_trial(root, trial)


def _read_trial(root: Path, trial: Path) -> Iterator[Found]:
    notes = []
    try:
        params = read_json(trial / PARAMS_FILE)
        params = params if isinstance(params, dict) else {}
    except Unreadable as error:
        params = {}
        notes.append(f"params.json: {error}")
    try:
        lines = read_json_lines(trial / RESULT_FILE)
    except Unreadable as error:
        lines = []
        notes.append(f"result.json: {error}")
    numbered = [
        (int(found[1]), path) for path in folders(trial) if (found := re.fullmatch(r"checkpoint_(\d+)", path.name))
    ]
    epochs = sorted(numbered)
    if not epochs:
        yield Found(trial.name, None, trial.name, _raises("it has no checkpoint folder"), notes=tuple(notes))
        return
    # epoch 0 was written, or there is a line more than epochs: line i is epoch i; else it is epoch i + 1
    first = 0 if epochs[0][0] == 0 or len(lines) > epochs[-1][0] else 1
    kind, said_of = params.get("model::type"), params.get(ARGUMENTS)
    said = {COLUMNS.get(key, column(key)): scalar(value) for key, value in params.items() if key not in IGNORED}
    properties = {key: value for key, value in said.items() if value is not None}
    for epoch, folder in epochs:
        line = lines[epoch - first] if 0 <= epoch - first < len(lines) else {}
        path = folder / "checkpoints"
        yield Found(
            member=trial.name,
            epoch=epoch,
            path=str(path.relative_to(root)),
            load=lambda path=path: read_state(path),
            properties={**properties, **measured(line)},
            network=NETWORKS.get(kind.lower(), kind) if isinstance(kind, str) else None,
            arguments=activation_of(params.get("model::nlin")) | (said_of if isinstance(said_of, dict) else {}),
            split=split_of(params.get("split")),
            notes=tuple(notes) + (() if line else (f"result.json has no line for epoch {epoch}",)),
        )


def _raises(reason: str) -> Any:
    def load() -> Any:
        raise Unreadable(reason)

    return load


def measured(line: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a line of result.json; the gap is train_acc - test_acc."""
    dropped = {"training_iteration", "config", "trial_id"}
    found = {column(k): v for k, v in line.items() if k not in dropped and isinstance(v, int | float)}
    if {"train_acc", "test_acc"} <= found.keys():
        found.setdefault("gap", found["train_acc"] - found["test_acc"])
    return found


def keys_of(architecture: Architecture) -> dict[str, str]:
    """Parameter -> its key in the field's state_dicts: module_list.<place>.weight; names stay for other networks."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in architecture.shapes))
    places = LAYERS.get(architecture.name, ())
    if len(places) != len(layers):
        return {name: name for name in architecture.shapes}
    place = dict(zip(layers, places, strict=True))
    split = {name: name.rpartition(".") for name in architecture.shapes}
    return {name: f"module_list.{place[layer]}.{kind}" for name, (layer, _, kind) in split.items()}


def folder_of(member: int) -> str:
    """Name of the folder of a member."""
    return f"NN_tune_trainable_{member:05d}"


def write(folder: Path, member: int, checkpoints: Checkpoints) -> None:
    """Write the checkpoints of one member as a trial.

    Args:
        folder: the zoo's folder.
        member: the member.
        checkpoints: its checkpoints.
    """
    trial = folder / folder_of(member)
    keys, architecture = keys_of(checkpoints.architecture), checkpoints.architecture
    frame = checkpoints.frame
    constant = [str(name) for name in frame if name not in ("member", "epoch") and not _varies(frame[name])]
    theirs = {ours: name for name, ours in COLUMNS.items()}
    last = list(architecture.shapes.values())[-1]
    params: dict[str, Any] = {
        "model::type": architecture.name,
        "model::nlin": architecture.arguments.get("activation"),
        "model::channels_in": architecture.arguments.get("channels"),
        "model::o_dim": architecture.arguments.get("classes", last[0]),
        ARGUMENTS: architecture.arguments,
    }
    params |= {theirs.get(name, name): plain(frame[name].iloc[0]) for name in constant}
    varying = [str(name) for name in frame if name not in (*constant, "member", "epoch")]
    rows = {int(row["epoch"]): {name: plain(row[name]) for name in varying} for row in frame.to_dict("records")}
    lines = [{"training_iteration": epoch, **rows.get(epoch, {})} for epoch in range(max(rows) + 1)]
    for row, epoch in enumerate(frame["epoch"]):
        content = io.BytesIO()  # torch's own writer of files does not say that the disk is full
        torch.save({keys.get(name, name): value for name, value in checkpoints.state(row).items()}, content)
        with atomic(trial / f"checkpoint_{epoch:06d}" / "checkpoints") as path:
            path.write_bytes(content.getbuffer())
    write_text(trial / RESULT_FILE, "".join(json.dumps(line) + "\n" for line in lines))
    write_json(trial / PARAMS_FILE, params)  # last: without it, a folder is no trial


def _varies(values: pd.Series) -> bool:
    return values.dtype.kind == "f" or values.nunique(dropna=False) > 1


def plain(value: Any) -> Any:
    """A cell of a data frame as JSON has it."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else finite(value)
