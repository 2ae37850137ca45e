"""ModelZoo on disk: open, select, read, verify; the writer that fills one shard by shard.

A zoo is a folder: zoo.json (schema version, architecture, task, provenance, size and checksum of every file),
checkpoints.parquet (a row per checkpoint) and weights-00000.safetensors ... (each parameter stacked over the shard's
checkpoints). Nothing in it is executable. docs/format.md describes it for others.

torch is imported where weights are read, so that a zoo of any size is shown at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pyarrow import parquet
from safetensors import SafetensorError, safe_open

from weightspace import hub
from weightspace.runs import (
    UserError,
    atomic,
    checksum,
    environment,
    fingerprint,
    notice,
    read_json,
    write_json,
    write_tensors,
)
from weightspace.zoo.tables import read_parquet

if TYPE_CHECKING:
    from torch import Tensor

    from weightspace.networks.architectures import Architecture
    from weightspace.networks.checkpoints import Checkpoints

SCHEMA_VERSION = 1
ZOO_FILE = "zoo.json"
TABLE_FILE = "checkpoints.parquet"
REQUIRED_COLUMNS = ("member", "epoch", "split", "task", "shard", "row", "digest")
SHARED_FILES = (ZOO_FILE, TABLE_FILE, "weights-*.safetensors")
"""What a zoo consists of."""
PLACE_COLUMNS = ["shard", "row", "digest"]
"""Where the weights of a row are, and what they are; no property of a network."""
SPLITS = ("train", "val", "test", "unseen")
"""What a member is for."""
ROWS_AT_ONCE = 256
"""Checkpoints of which digests are computed at a time."""
LARGEST_WEIGHT = 10_000
"""A checkpoint with a greater weight is left out (filter of the field)."""


class ModelZoo:
    """A zoo opened for reading. Weights are read only when asked for, and only the rows asked for."""

    def __init__(self, folder: Path, description: dict[str, Any], frame: pd.DataFrame) -> None:
        self.folder = folder
        self.description = description
        self.frame = frame
        """A row per checkpoint: member, epoch, split, task, shard, row and the properties."""
        self.tasks: tuple[str, ...] = tuple(description["tasks"])
        """Names of the tasks that its members were trained on."""

    def __repr__(self) -> str:
        name = self.description["architecture"]["name"]
        return f"ModelZoo({self.folder}: {len(self):,} checkpoints of {name} on {', '.join(self.tasks)})"

    @classmethod
    def open(cls, folder: str | Path) -> ModelZoo:
        """Open a zoo folder; sizes are checked, contents as they are read, and all of them by `verify`.

        Raises:
            UserError: the folder is not a zoo, is of another schema version, or a file is missing or of wrong size.
        """
        folder = Path(folder)
        if not (folder / ZOO_FILE).is_file():
            hint = "; its training was interrupted, run the same command again" if list(folder.glob("part-*")) else ""
            reason = f"it has no finished {ZOO_FILE}{hint}" if folder.exists() else "it does not exist"
            raise UserError(f"{folder} is not a zoo: {reason}")
        description = read_json(folder / ZOO_FILE)
        problems = list(_problems_of_description(folder, description))
        if problems:
            raise UserError(f"the zoo {folder} is damaged: {problems[0]}; `weightspace zoo verify` lists all problems")
        try:
            count = parquet.read_metadata(folder / TABLE_FILE).num_rows  # before memory is taken
            one = 4 * sum(math.prod(shape) for shape in description["parameters"].values())
            if one * count > sum(file["bytes"] for file in description["files"].values()):
                raise UserError(f"the zoo {folder} is damaged: {count:,} checkpoints of {one:,} bytes are not in it")
            frame = read_parquet(folder / TABLE_FILE)
        except (OSError, ValueError) as error:
            raise UserError(f"the zoo {folder} is damaged: {TABLE_FILE} cannot be read ({error})") from None
        missing = [column for column in REQUIRED_COLUMNS if column not in frame]
        if missing:
            raise UserError(f"the zoo {folder} is damaged: {TABLE_FILE} lacks {', '.join(missing)}")
        return cls(folder, description, frame)

    @classmethod
    def from_hub(cls, repository: str, revision: str | None = None) -> ModelZoo:
        """Open a zoo of the hub ("owner/name", downloaded once) or of a local folder; every checksum is checked.

        Raises:
            UserError: no such repository, or what it holds is not an intact zoo.
        """
        folder = hub.fetch(repository, "dataset", SHARED_FILES, revision)
        problems = verify(folder)
        if problems:
            raise UserError(f"the zoo {repository} is damaged: {problems[0]}")
        return cls.open(folder)

    def push_to_hub(self, repository: str | Path, private: bool = False) -> str:
        """Share the zoo as a data set of the hub, with a card; see `hub.push`. Returns where it is."""
        return hub.push(self.folder, repository, "dataset", SHARED_FILES, card(self, str(repository)), private)

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def architecture(self) -> Architecture:
        """The base network."""
        from weightspace.networks.architectures import Architecture

        return Architecture(**self.description["architecture"])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by name, as the zoo says it; reading checks the base network against it."""
        return {name: tuple(shape) for name, shape in self.description["parameters"].items()}

    @property
    def fingerprint(self) -> str:
        """Digest of the content: two zoos with equal checkpoints have equal fingerprints."""
        return self.description["fingerprint"]

    def splits(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Those of some splits that the zoo has; says which it lacks (imported zoos often have no 'unseen').

        Raises:
            UserError: it has none of them, or one is no split at all.
        """
        there = set(self.frame["split"])
        if unknown := [split for split in wanted if split not in there and split not in SPLITS]:
            raise UserError(f"there is no split {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
        found, absent = (tuple(s for s in wanted if (s in there) is present) for present in (True, False))
        if not found:
            raise UserError(f"{self.folder} has no split {', '.join(wanted)}, but {', '.join(sorted(there))}")
        if absent:
            notice(f"{self.folder} has no split {', '.join(absent)}: left out")
        return found

    def select(self, query: str | None = None, **conditions: Any) -> Checkpoints:
        """Read the checkpoints that fulfil every condition; see `rows`."""
        return self.read(self.rows(query, **conditions))

    def rows(self, query: str | None = None, **conditions: Any) -> pd.DataFrame:
        """The rows of `frame` that fulfil every condition; nothing is read.

        Args:
            query: a pandas query, such as "val_acc > 0.8 and epoch == 25".
            conditions: a column with its value or list of values (split="test", epoch=[20, 25]); or min_ / max_ and
                a column (min_val_acc=0.9), both inclusive.

        Raises:
            UserError: an unknown column, an invalid query, or nothing selected.
        """
        frame = self.frame
        if query is not None:
            try:
                chosen = frame.eval(query)
            except Exception as error:
                raise UserError(f"invalid query {query!r}: {error}; columns: {', '.join(self.frame.columns)}") from None
            if not isinstance(chosen, pd.Series) or chosen.dtype != bool:
                raise UserError(f"the query {query!r} is no condition; write one such as 'val_acc > 0.8'")
            frame = frame[chosen]
        for name, value in conditions.items():
            bound, column = name.split("_", 1) if name.startswith(("min_", "max_")) else ("", name)
            if column not in frame:
                raise UserError(f"the zoo has no column {column!r}; its columns are {', '.join(self.frame.columns)}")
            try:
                if bound:
                    frame = frame[frame[column] >= value] if bound == "min" else frame[frame[column] <= value]
                else:
                    several = isinstance(value, Iterable) and not isinstance(value, str)
                    frame = frame[frame[column].isin(list(value) if several else [value])]
            except TypeError as error:
                raise UserError(f"{name}={value!r} cannot be compared with column {column!r}: {error}") from None
        if frame.empty:
            asked = [query] if query else []
            asked += [f"{name}={value!r}" for name, value in conditions.items()]
            splits = ", ".join(f"{name} {count}" for name, count in self.frame["split"].value_counts().items())
            raise UserError(f"no checkpoint of {self.folder} fulfils {' and '.join(asked)}; its splits: {splits}")
        return frame

    def read(self, frame: pd.DataFrame) -> Checkpoints:
        """Read the checkpoints of the given rows of `frame`, in their order.

        Raises:
            UserError: the base network is not what the zoo was written with, or a shard is damaged.
        """
        from weightspace.networks.checkpoints import Checkpoints

        weights = self.weights(frame["shard"].to_numpy(), frame["row"].to_numpy())
        return Checkpoints(self.architecture, weights, frame.reset_index(drop=True).drop(columns=PLACE_COLUMNS))

    def weights(self, shards: np.ndarray, rows: np.ndarray) -> dict[str, Tensor]:
        """Read the weights {name: [n, *shape]} in some rows of some shards, n of each; `read` without a data frame.

        Raises:
            UserError: as `read`.
        """
        import torch

        shapes = self.architecture.shapes
        if shapes != self.shapes:
            raise UserError(
                f"the zoo {self.folder} holds {self.shapes}, but {self.architecture} has {shapes}; "
                "give the base network as it was"
            )
        weights = {name: torch.empty(len(rows), *shape) for name, shape in shapes.items()}
        for shard in np.unique(shards):
            target = torch.from_numpy(np.flatnonzero(shards == shard))
            source = torch.from_numpy(rows[shards == shard])
            stacked = open_shard(self.folder / shard_name(int(shard)), shapes)
            _check_bytes(self.folder / shard_name(int(shard)), self.description["files"])
            for name, weight in stacked.items():
                weights[name][target] = weight[source]
        return weights


_intact: set[tuple[str, int, int]] = set()
"""Shards whose checksum was right: path, size and time of the last change."""


def _check_bytes(path: Path, files: dict[str, Any]) -> None:
    """Raise a UserError unless a shard is as it was written; looked at once per process."""
    found = path.stat()
    key = str(path.absolute()), found.st_size, found.st_mtime_ns
    if key in _intact:
        return
    if checksum(path) != files.get(path.name, {}).get("sha256"):
        raise UserError(
            f"{path} has changed since it was written (its checksum differs); `weightspace zoo verify "
            f"{path.parent} --repair` keeps every intact checkpoint"
        )
    _intact.add(key)


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"weights-{shard:05d}.safetensors"


def open_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Memory-mapped parameters of one shard {name: [n, *shape]}; nothing is read until it is used.

    Raises:
        UserError: the file is damaged or does not hold these parameters.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            names = set(shard.keys())
            if names != set(shapes):
                raise UserError(f"{path} holds {sorted(names)}, expected {sorted(shapes)}")
            for name, shape in shapes.items():
                piece = shard.get_slice(name)
                found = tuple(piece.get_shape())
                if piece.get_dtype() != "F32":
                    raise UserError(f"{path}: {name} is of type {piece.get_dtype()}, expected F32")
                if found[1:] != shape:
                    raise UserError(f"{path}: {name} has shape {found}, expected (n, {', '.join(map(str, shape))})")
            return {name: shard.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy or make the zoo again") from None


def _problems_of_description(folder: Path, description: Any) -> Iterator[str]:
    if not isinstance(description, dict):
        yield f"{ZOO_FILE} is not a JSON object"
        return
    version = description.get("schema_version")
    if version != SCHEMA_VERSION:
        yield f"{ZOO_FILE} has schema version {version!r}, this weightspace reads version {SCHEMA_VERSION}"
        return
    missing = [key for key in ("architecture", "parameters", "tasks", "files", "fingerprint") if key not in description]
    if missing:
        yield f"{ZOO_FILE} lacks {', '.join(missing)}"
        return
    tasks = description["tasks"]
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, str) for task in tasks):
        yield f"{ZOO_FILE} has a malformed list of tasks: {tasks!r}"
        return
    files = description["files"]
    entries = list(files.values()) if isinstance(files, dict) and TABLE_FILE in files else [None]
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        yield f"{ZOO_FILE} has a malformed list of files"
        return
    architecture = description["architecture"]
    if not isinstance(architecture, dict) or architecture.keys() != {"name", "arguments"}:
        yield f"{ZOO_FILE} has a malformed architecture, expected name and arguments, given {architecture!r}"
        return
    parameters = description["parameters"]
    shapes = list(parameters.values()) if isinstance(parameters, dict) else [None]
    if not all(isinstance(shape, list) and all(isinstance(size, int) for size in shape) for shape in shapes):
        yield f"{ZOO_FILE} has malformed parameters, expected the shape of each by name"
        return
    for name, file in files.items():
        path = folder / name
        if Path(name).name != name:
            yield f"{ZOO_FILE} names {name!r}, which is not a file of the zoo's own folder"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != file["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes, {file['bytes']} were written"


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a zoo folder, one sentence each; empty when it is intact.

    Raises:
        UserError: the folder is not a zoo.
    """
    folder = Path(folder)
    if not (folder / ZOO_FILE).is_file():
        raise UserError(f"{folder} is not a zoo: it has no {ZOO_FILE}")
    description = read_json(folder / ZOO_FILE)
    problems = list(_problems_of_description(folder, description))
    readable = isinstance(description, dict) and isinstance(description.get("files"), dict)
    if not readable or any(problem.startswith((f"{ZOO_FILE} has", f"{ZOO_FILE} lacks")) for problem in problems):
        return problems  # what it says of the files cannot be relied on
    for name, file in description["files"].items():
        path = folder / Path(name).name
        whole = path.is_file() and path.stat().st_size == file["bytes"]
        if whole and checksum(path) != file["sha256"]:
            problems.append(f"{name} has changed since it was written (its checksum differs)")
    if problems:
        return problems
    try:
        frame = read_parquet(folder / TABLE_FILE)
    except (OSError, ValueError) as error:
        return [f"{TABLE_FILE} cannot be read ({error})"]
    problems = list(_problems_of_table(frame, description))
    if problems:
        return problems
    shapes = {name: tuple(shape) for name, shape in description["parameters"].items()}
    for shard, rows in frame.groupby("shard"):
        problems += _problems_of_shard(folder / shard_name(int(str(shard))), shapes, rows.sort_values("row"))
    return problems


def _problems_of_table(frame: pd.DataFrame, description: dict[str, Any]) -> Iterator[str]:
    missing = [column for column in REQUIRED_COLUMNS if column not in frame]
    if missing:
        yield f"{TABLE_FILE} lacks {', '.join(missing)}"
        return
    for name in ("member", "epoch", "shard", "row"):
        if frame[name].dtype.kind not in "iu" or (frame[name] < 0).any():
            yield f"{TABLE_FILE}: {name} holds other values than whole numbers from 0"
    for name, known in (("split", SPLITS), ("task", description["tasks"])):
        wrong = sorted({str(value) for value in frame[name]} - set(known))
        if wrong:
            yield f"{TABLE_FILE}: {name} holds {', '.join(wrong[:5])}, expected {', '.join(known)}"
    named = {shard_name(int(shard)) for shard in frame["shard"].unique() if isinstance(shard, int | np.integer)}
    if lost := sorted(named - set(description["files"])):
        yield f"{TABLE_FILE} names {', '.join(lost[:5])}, which {ZOO_FILE} does not list"


def _problems_of_shard(path: Path, shapes: dict[str, tuple[int, ...]], rows: pd.DataFrame) -> Iterator[str]:
    import torch

    try:
        stacked = open_shard(path, shapes)
    except UserError as error:
        yield str(error)
        return
    sizes = {len(weight) for weight in stacked.values()}
    if sizes != {len(rows)} or rows["row"].tolist() != list(range(len(rows))):
        yield f"{path.name} holds {sizes} rows, {TABLE_FILE} lists {len(rows)}"
        return
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = [weight[start : start + ROWS_AT_ONCE].flatten(1) for weight in stacked.values()]
        for row, values in enumerate(torch.cat(some, 1).numpy(), start):
            if digest(values) != rows["digest"].iloc[row]:
                yield f"{path.name}, row {row}: the weights have another digest than {TABLE_FILE} says"
                return


def described(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as zoo.json lists them."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def digest(values: np.ndarray) -> str:
    """Digest of the weights of one checkpoint [P]: SHA-256 of its float32 values, parameters in order; 32 digits."""
    return hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()[:32]


class ZooWriter:
    """Fills a zoo folder shard by shard; a shard that was written is kept when the writer is interrupted."""

    def __init__(self, folder: Path, architecture: Architecture, provenance: dict[str, Any]) -> None:
        self.folder = folder
        self.architecture = architecture
        self.provenance = provenance

    def has(self, shard: int) -> bool:
        """Whether a shard was written completely (its table of rows is written last)."""
        return self._part(shard).exists()

    def write(self, shard: int, checkpoints: Checkpoints, digests: Sequence[str] | None = None) -> None:
        """Write one shard: weights first, then its rows (and their digests, where they are known)."""
        if digests is None:
            digests = list(map(digest, checkpoints.flat().cpu().numpy()))
        file = write_tensors(self.folder / shard_name(shard), checkpoints.weights)
        frame = checkpoints.frame.assign(shard=shard, row=np.arange(len(checkpoints)), digest=digests)
        frame.attrs = {"file": file}
        with atomic(self._part(shard)) as path:
            frame.to_parquet(path, index=False)

    def finish(
        self, shards: Sequence[int], amend: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
    ) -> ModelZoo:
        """Join the rows of all shards, describe the zoo, and open it.

        Args:
            shards: the shards that were written.
            amend: what is still to be done to the joined rows.
        """
        parts = [self._part(shard) for shard in shards]
        if (self.folder / ZOO_FILE).exists():  # killed after the last write
            for part in parts:
                part.unlink(missing_ok=True)
            return ModelZoo.open(self.folder)
        each = [pd.read_parquet(part) for part in parts]
        frame = amend(pd.concat(each, ignore_index=True))
        with atomic(self.folder / TABLE_FILE) as path:
            frame.to_parquet(path, index=False)
        files = {TABLE_FILE: described(self.folder / TABLE_FILE)}
        files |= {shard_name(shard): rows.attrs["file"] for shard, rows in zip(shards, each, strict=True)}
        description = {
            "schema_version": SCHEMA_VERSION,
            "architecture": self.architecture.to_json(),
            "parameters": {name: list(shape) for name, shape in self.architecture.shapes.items()},
            "tasks": frame["task"].unique().tolist(),
            "provenance": {**self.provenance, "environment": environment()},
            "files": files,
            "fingerprint": fingerprint({name: file["sha256"] for name, file in files.items()}),
        }
        write_json(self.folder / ZOO_FILE, description, sort=False)  # digests follow the order of the parameters
        for part in parts:
            part.unlink()
        return ModelZoo.open(self.folder)

    def _part(self, shard: int) -> Path:
        return self.folder / f"part-{shard:05d}.parquet"


def overview(zoo: ModelZoo) -> pd.DataFrame:
    """Per epoch (and task, where there are several): number of checkpoints and quartiles of the test accuracy."""
    accuracy = zoo.frame.groupby(["task", "epoch"] if len(zoo.tasks) > 1 else "epoch")["test_acc"]
    return accuracy.describe()[["count", "mean", "min", "25%", "50%", "75%", "max"]]


def summary(zoo: ModelZoo) -> str:
    """What `weightspace zoo show` prints."""
    frame, network = zoo.frame, zoo.description["architecture"]
    count = sum(math.prod(shape) for shape in zoo.shapes.values())
    splits = ", ".join(f"{name} {rows['member'].nunique()}" for name, rows in frame.groupby("split"))
    lines = [
        f"zoo           {zoo.folder}",
        f"base network  {network['name']} {json.dumps(network['arguments'])}, {count:,} parameters",
        f"task          {', '.join(zoo.tasks)}",
        f"members       {frame['member'].nunique():,} ({splits})",
        f"checkpoints   {len(zoo):,}",
    ]
    for column in frame.columns.difference(list(REQUIRED_COLUMNS), sort=False):
        values = frame[column]
        if values.nunique() <= 8:
            words = [
                f"{value:.6g}" if isinstance(value, float) else f"{value}" for value in sorted(values.dropna().unique())
            ]
            lines.append(f"{column:<14}{', '.join(words)}")
        elif pd.api.types.is_numeric_dtype(values):
            lines.append(f"{column:<14}{values.min():.4g} to {values.max():.4g}, median {values.median():.4g}")
    if "test_acc" in frame:
        lines += ["", "test accuracy by epoch", overview(zoo).round(4).to_string()]
    return "\n".join(lines)


def card(zoo: ModelZoo, repository: str) -> str:
    """README.md of a shared zoo: what it holds, how to load it."""
    network = zoo.description["architecture"]["name"]
    _, shown = summary(zoo).split("\n", 1)  # without the folder that it had
    allowed = f'\nws.register_network("{network}")  # code of another package' if ":" in network else ""
    return f"""---
library_name: weightspace
tags: [model-zoo, weight-space-learning]
---
# Model zoo of {network} on {", ".join(zoo.tasks)}

```
{shown}
```

```python
import weightspace as ws{allowed}
zoo = ws.ModelZoo.from_hub("{repository}")
```

A row per checkpoint in `{TABLE_FILE}`, weights in `{SHARED_FILES[2]}`; nothing in it is executable.
"""


def usable(checkpoints: Checkpoints, limit: float = LARGEST_WEIGHT) -> np.ndarray:
    """Which checkpoints have only finite weights below `limit` in magnitude (REFERENCE filter of the field) [n]."""
    flat = checkpoints.flat()
    return (flat.isfinite().all(1) & (flat.abs() <= limit).all(1)).numpy()


def check_numeric(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise a UserError unless the frame has all these columns and they hold numbers."""
    numeric = frame.select_dtypes("number").columns
    wrong = [name for name in names if name not in numeric]
    if wrong:
        raise UserError(f"no numeric property {', '.join(wrong)}; the zoo has {', '.join(numeric)}")
