"""Make a damaged zoo whole: keep every checkpoint whose weights still have the digest that the table says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, locked, read_json
from weightspace.zoo.model_zoo import (
    PLACE_COLUMNS,
    SCHEMA_VERSION,
    TABLE_FILE,
    ZOO_FILE,
    ZooWriter,
    described,
    digest,
    shard_name,
    verify,
)
from weightspace.zoo.tables import read_parquet

Shapes = Mapping[str, tuple[int, ...]]


def repair(folder: Path) -> tuple[int, pd.DataFrame, Path]:
    """Replace a damaged zoo by one of its intact checkpoints; the damaged one is kept beside it.

    Shards are read byte by byte where the library refuses them, so that a flipped byte costs one checkpoint and a cut
    only those behind it.

    Args:
        folder: the zoo. Its zoo.json and its table have to be intact.

    Returns:
        How many checkpoints were kept, the rows of those that are lost, and where the damaged zoo is now.

    Raises:
        UserError: not a zoo, nothing to repair, another process at work, or damage that cannot be repaired.
    """
    made, aside = folder.with_name(f"{folder.name}.repaired"), _aside(folder)
    if not folder.exists() and (made / ZOO_FILE).exists():  # killed between the two renames
        made.rename(folder)
        return len(read_parquet(folder / TABLE_FILE)), pd.DataFrame(), folder
    if not verify(folder):
        raise UserError(f"the zoo {folder} is intact; there is nothing to repair")
    with locked(folder):
        description = read_json(folder / ZOO_FILE)
        frame = _table(folder, description)
        architecture = Architecture(**description["architecture"])
        if {name: list(shape) for name, shape in architecture.shapes.items()} != description["parameters"]:
            raise UserError(f"{folder} was written for another {architecture}; give the base network as it was")
        shutil.rmtree(made, ignore_errors=True)
        writer = ZooWriter(made, architecture, {**description.get("provenance", {}), "repaired": True})
        shards, lost = [], []
        for shard, rows in frame.groupby("shard"):
            rows = rows.sort_values("row")
            best, whole = None, np.zeros(len(rows), bool)
            for weights in salvaged(folder / shard_name(int(str(shard))), len(rows), architecture.shapes):
                read = Checkpoints(architecture, weights, rows.drop(columns=PLACE_COLUMNS).reset_index(drop=True))
                found = np.array([digest(values) for values in read.flat().numpy()]) == rows["digest"].to_numpy()
                if best is None or found.sum() > whole.sum():
                    best, whole = read, found
            lost.append(rows[~whole])
            if best is not None and whole.any():
                shards.append(int(str(shard)))
                writer.write(shards[-1], best.rows(whole))
        if not shards:
            shutil.rmtree(made, ignore_errors=True)
            raise UserError(f"no checkpoint of {folder} is intact; restore it from a copy or make the zoo again")
        kept = len(writer.finish(shards))
        for path in folder.iterdir():  # what else is there: the claim, a report
            if path.is_file() and not (made / path.name).exists() and path.name not in description["files"]:
                shutil.copy2(path, made / path.name)
        folder.rename(aside)
        made.rename(folder)
    return kept, pd.concat(lost), aside


def _aside(folder: Path) -> Path:
    """Where the damaged zoo goes: beside the folder, under a name that is free."""
    names = [f"{folder.name}.damaged", *(f"{folder.name}.damaged-{number}" for number in range(2, 1000))]
    return next(path for path in map(folder.with_name, names) if not path.exists())


def _table(folder: Path, description: Any) -> pd.DataFrame:
    """The rows; raises a UserError unless zoo.json is one, and the table is as it was written."""
    advice = "restore it from a copy, or make the zoo again"
    if not isinstance(description, dict) or not {"files", "architecture", "parameters"} <= description.keys():
        raise UserError(f"{folder / ZOO_FILE} is damaged, without it nothing can be repaired; {advice}")
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{folder} has schema version {version!r}, this weightspace repairs version {SCHEMA_VERSION}; use the "
            "version of weightspace that wrote it"
        )
    table = folder / TABLE_FILE
    if not table.is_file() or described(table) != description["files"].get(TABLE_FILE):
        raise UserError(f"{table} is damaged or missing, and it alone says which checkpoint is which; {advice}")
    try:
        return read_parquet(table)
    except (OSError, ValueError) as error:
        raise UserError(f"{table} cannot be read ({error}); {advice}") from None


def salvaged(path: Path, count: int, shapes: Shapes) -> Iterator[dict[str, torch.Tensor]]:
    """What is left of a shard: its bytes where a whole one has them, zeros where there are none.

    Cut once as its own header says, if that can be read, and once as `save` lays it out: other writers may order the
    parameters otherwise, and a header may be damaged.

    Args:
        path: of the shard; it may be damaged, cut or missing.
        count: checkpoints that were written to it.
        shapes: {parameter: shape}.
    """
    content = path.read_bytes() if path.is_file() else b""
    usual = save({name: torch.zeros(count, *shape) for name, shape in shapes.items()})
    for header in (content, usual):
        places = _places(header, count, shapes)
        if places is not None:
            found = {}
            for name, (start, end) in places.items():
                values = np.frombuffer(content[start:end].ljust(end - start, b"\0"), "<f4").copy()
                found[name] = torch.from_numpy(values).view(count, *shapes[name])
            yield found


def _places(content: bytes, count: int, shapes: Shapes) -> dict[str, tuple[int, int]] | None:
    """First and last byte of every parameter, by the header of a safetensors file; None where it cannot be so."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        places = {}
        for name, shape in shapes.items():
            start, end = header[name]["data_offsets"]
            if end - start != 4 * count * math.prod(shape) or not start >= 0 or header[name]["dtype"] != "F32":
                return None
            places[name] = (8 + length + start, 8 + length + end)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return places
