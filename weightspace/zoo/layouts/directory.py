"""A directory of state_dicts (.pt, .pth, .bin, .safetensors), with a table of their properties where there is one."""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.fitting import natural
from weightspace.runs import write_tensors
from weightspace.zoo.layouts.found import Found, activation_of, column, scalar, split_of
from weightspace.zoo.untrusted import Unreadable, read_state, read_table

ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
TABLES = (".csv", ".csv.gz", ".jsonl", ".ndjson", ".parquet")
TABLE_FILE = "properties.parquet"
"""The table that `zoo export` writes."""
FILE_COLUMNS = ("file", "filename", "file_name", "path", "checkpoint", "name")
"""What the column that names the file may be called."""
EPOCH = re.compile(r"[._-]*(?:epochs?|ep|checkpoint|ckpt|step)[._=-]*(\d+)$", re.IGNORECASE)
"""What the end of a file's name says of its epoch: net3_epoch_12, ckpt-12."""


def files_of(root: Path) -> Iterator[str]:
    """The files of weights below a folder, relative to it; links are not followed."""
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        for name in names:
            if name.endswith(ENDINGS) and not os.path.islink(os.path.join(folder, name)):
                yield name if inside == "." else f"{inside}/{name}"


def detects(root: Path) -> bool:
    """Whether there is a file of weights below a folder."""
    return any(True for _ in files_of(root))


def read(root: Path) -> Iterator[Found]:
    """Every file of weights, with its row of the table.

    Member and epoch are columns of the table, or read off the file's name: net3_epoch_12.pt, net3/checkpoint-12.pt.

    Raises:
        Unreadable: several tables, one without a column that names the files, or one that names a file twice.
    """
    known, listed = _properties(root)
    files = sorted(files_of(root), key=natural)
    short = Counter(key for name in files for key in {os.path.basename(name), Path(name).stem})
    for name in files:
        keys = [name, *(key for key in (os.path.basename(name), Path(name).stem) if short[key] == 1)]
        said = next((known[key] for key in keys if key in known), {})
        member, epoch = _of_name(name, root.resolve().name)
        if isinstance(said.get("epoch"), int | float) and math.isfinite(said["epoch"]):
            epoch = int(said["epoch"])
        own = ("member", "epoch", "split", "network", "arguments")
        yield Found(
            member=str(said.get("member", member)),
            epoch=epoch,
            path=name,
            load=lambda name=name: read_state(root / name),
            properties={key: value for key, value in said.items() if key not in own},
            network=said["network"] if isinstance(said.get("network"), str) else None,
            arguments=activation_of(said.get("activation")) | _arguments(said.get("arguments")),
            split=split_of(said.get("split")),
            notes=(f"{listed} has no row for it",) if listed and not said else (),
        )


def _arguments(text: Any) -> dict[str, Any]:
    """The arguments of the base network, as `write` writes them."""
    try:
        content = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        content = {}
    return content if isinstance(content, dict) else {}


def _of_name(name: str, root: str) -> tuple[str, int | None]:
    """Member and epoch by a file's name; the epochs of one member may lie in the root, which has its name then."""
    whole, _ = os.path.splitext(name)
    said = EPOCH.search(whole)
    if said is None:
        return whole, None
    return whole[: said.start()].rstrip("/") or root, int(said.group(1))


def _properties(root: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """What the table says of each file {name: properties}, and the table's name ("" without one)."""
    tables = sorted(path for path in root.iterdir() if path.is_file() and path.name.endswith(TABLES))
    if not tables:
        return {}, ""
    if len(tables) > 1:
        raise Unreadable(
            f"several tables ({', '.join(path.name for path in tables)}); keep one of them beside the weights"
        )
    table = read_table(tables[0])
    table.columns = [str(name) for name in table.columns]
    key = next((name for name in FILE_COLUMNS if name in table), None)
    if key is None:
        raise Unreadable(f"{tables[0].name} has no column that names the files; call it {FILE_COLUMNS[0]!r}")
    found: dict[str, dict[str, Any]] = {}
    for row in table.to_dict("records"):
        cells = {column(str(name)): scalar(_plain(value)) for name, value in row.items() if name != key}
        file = posixpath.normpath(str(row[key]).replace("\\", "/"))
        if file in found:
            raise Unreadable(f"{tables[0].name} has several rows for {file}")
        found[file] = {name: value for name, value in cells.items() if value is not None}
    return found, tables[0].name


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def write(folder: Path, checkpoints: Checkpoints) -> pd.DataFrame:
    """Write every checkpoint as a safetensors file.

    Args:
        folder: where to.
        checkpoints: what.

    Returns:
        The table's rows: file, base network and all columns.
    """
    frame = checkpoints.frame
    files = [f"member-{m:05d}_epoch-{e:04d}.safetensors" for m, e in zip(frame["member"], frame["epoch"], strict=True)]
    for row, file in enumerate(files):
        write_tensors(folder / file, checkpoints.state(row))
    table = frame.copy()
    table.insert(0, "file", files)
    arguments = json.dumps(checkpoints.architecture.arguments, sort_keys=True)
    return table.assign(network=checkpoints.architecture.name, arguments=arguments)
