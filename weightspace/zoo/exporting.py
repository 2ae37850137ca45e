"""Write a zoo, or some of its checkpoints, in a layout that other code reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from weightspace import runs
from weightspace.runs import UserError, atomic, progress, write_json
from weightspace.zoo.layouts import directory, ray_tune
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

ROWS = 512
"""Checkpoints that are read at a time."""


def to_zoo(zoo: ModelZoo, frame: pd.DataFrame, folder: Path, advance: Callable[[int], None]) -> None:
    """Our own layout: a smaller zoo of the chosen rows."""
    writer = ZooWriter(folder, zoo.architecture, {"zoo": zoo.fingerprint})
    shards = range(-(-len(frame) // ROWS))
    for shard in shards:
        rows = frame.iloc[shard * ROWS : (shard + 1) * ROWS]
        if not writer.has(shard):
            writer.write(shard, zoo.read(rows))
        advance(len(rows))
    writer.finish(shards)


def to_ray_tune(zoo: ModelZoo, frame: pd.DataFrame, folder: Path, advance: Callable[[int], None]) -> None:
    """The field's layout, which its existing code reads: a folder per member, a state_dict per epoch."""
    for member, rows in frame.groupby("member", sort=True):
        number = int(str(member))
        if not (folder / ray_tune.folder_of(number) / ray_tune.PARAMS_FILE).exists():
            ray_tune.write(folder, number, zoo.read(rows.sort_values("epoch")))
        advance(len(rows))
    write_json(folder / "config.json", {"weightspace": zoo.fingerprint, "task": ", ".join(zoo.tasks)})


def to_directory(zoo: ModelZoo, frame: pd.DataFrame, folder: Path, advance: Callable[[int], None]) -> None:
    """A directory of safetensors with a table of their properties."""
    tables = []
    for start in range(0, len(frame), ROWS):
        rows = frame.iloc[start : start + ROWS]
        tables.append(directory.write(folder, zoo.read(rows)))
        advance(len(rows))
    with atomic(folder / directory.TABLE_FILE) as path:
        pd.concat(tables, ignore_index=True).to_parquet(path, index=False)


LAYOUTS = {"weightspace": to_zoo, "ray-tune": to_ray_tune, "directory": to_directory}
"""The writers by name."""


def export_zoo(zoo: ModelZoo, folder: Path, layout: str, query: str | None = None) -> None:
    """Write the checkpoints of a zoo in some layout; what was interrupted goes on.

    Args:
        zoo: the zoo.
        folder: where to.
        layout: one of LAYOUTS.
        query: a condition on the rows, such as "val_acc > 0.8 and epoch == 25" (default: all).

    Raises:
        UserError: no such layout, an invalid query, nothing that fulfils it, or checkpoints that the layout cannot
            tell apart.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown layout {layout!r}; zoos are written as {', '.join(LAYOUTS)}")
    frame = zoo.rows(query)
    twice = frame.duplicated(["member", "epoch"])
    if layout != "weightspace" and twice.any():
        member, epoch = frame.loc[twice, ["member", "epoch"]].iloc[0]
        raise UserError(
            f"{zoo.folder} has several checkpoints of member {member} at epoch {epoch}, which {layout} keeps under one "
            "name; choose among them with --query, or export as weightspace"
        )
    last = int(frame["epoch"].max())
    if layout == "ray-tune" and last > ray_tune.LAST_EPOCH:
        raise UserError(f"ray-tune keeps a line per epoch up to {last:,}, which is no epoch; export as directory")
    claim = {"zoo": zoo.fingerprint, "layout": layout, "query": query}
    with runs.stage(folder, "export", claim) as todo:
        if todo:
            with progress(f"export: {layout}", len(frame)) as advance:
                LAYOUTS[layout](zoo, frame, folder, advance)
