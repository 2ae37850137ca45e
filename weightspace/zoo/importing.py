"""Networks from elsewhere become zoos: read safely, fitted to a base network, checked, written shard by shard.

Every checkpoint of the source gets a line in report.jsonl: read, or skipped and why. An import that was killed goes on
after the shards that are there and ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightspace import runs
from weightspace.config import ImportConfig, check
from weightspace.networks.architectures import Architecture, arguments_of
from weightspace.networks.behavior import input_shape_of
from weightspace.networks.checkpoints import Checkpoints, unflatten
from weightspace.networks.fitting import Fit, Misfit, Shapes, fit
from weightspace.runs import (
    RunFailed,
    UserError,
    derive_seed,
    fingerprint,
    progress,
    read_lines,
    write_lines,
    write_text,
)
from weightspace.tasks.images import UNKNOWN_TASK, load_task
from weightspace.zoo.layouts import directory, hub, ray_tune, samples, small_cnn
from weightspace.zoo.layouts.found import Found, Layout
from weightspace.zoo.model_zoo import LARGEST_WEIGHT, REQUIRED_COLUMNS, ZOO_FILE, ModelZoo, ZooWriter, digest
from weightspace.zoo.population import score
from weightspace.zoo.untrusted import ARCHIVES, Unreadable, unpack

REPORT_FILE = "report.jsonl"
UNIT_BYTES = 32 * 2**20
"""Weights of one shard, about."""
LAST_EPOCH = 2**31
"""Greater numbers are no epochs."""
EPOCHS = (
    "of epoch {}",
    "without an epoch; say the epochs in a table (column `epoch`) or in the names: net_epoch_12.pt",
)
"""What is said of a checkpoint that is there twice: with an epoch, without."""
REMOTE = "hub:"
"""How a source on the hub begins: hub:owner/name,owner/name or hub:FILE with a name per line."""


def layouts(config: ImportConfig) -> dict[str, Layout]:
    """The readers by name, in the order in which they are tried."""
    named = Architecture(config.network, arguments_of(config.arguments)) if config.network else None
    each = (
        Layout("ray-tune", ray_tune.detects, ray_tune.read),
        Layout("samples", samples.detects, samples.reader(named)),
        Layout("small-cnn", small_cnn.detects, small_cnn.read),
        Layout("hub", hub.detects, hub.read),
        Layout("directory", directory.detects, directory.read),
    )
    return {layout.name: layout for layout in each}


def import_zoo(source: str, folder: Path, config: ImportConfig, seed: int = 0) -> list[ModelZoo]:
    """Turn networks from elsewhere into a zoo, or into one per architecture.

    Args:
        source: a folder, an archive of one, or hub:owner/name.
        folder: the zoo; where the source holds several architectures, the folder of the zoos.
        config: how it is read.
        seed: seed of the split.

    Returns:
        The zoos.

    Raises:
        UserError: no such source, nothing in it that can be read, or networks that do not fit.
        RunFailed: --strict, and something was skipped or there are several architectures.
    """
    check(config, "import")
    if config.network:
        with torch.device("meta"):  # later commands need to know what it takes
            input_shape_of(Architecture(config.network, arguments_of(config.arguments)).build())
    with runs.stage(folder, "import", {"source": source, "import": _settings(config), "seed": seed}) as todo:
        if todo:
            if not (folder / ZOO_FILE).exists():  # else it was killed after the last write
                try:
                    found = _listed(_local(source, folder, config), config)
                    _check_unchanged(folder, found)
                    with warnings.catch_warnings(action="ignore"):  # of torch, about files in old formats
                        _read(found, folder, config, seed, source)
                except UserError:
                    if not any(folder.glob("*/part-*")):  # nothing is lost: the folder is free for another try
                        _clear(folder)
                    raise
            _clear(folder, "source", "unpacked", "listing.json", "report-*")
    if (folder / ZOO_FILE).exists():
        return [ModelZoo.open(folder)]
    return [ModelZoo.open(path.parent) for path in sorted(folder.glob(f"*/{ZOO_FILE}"))]


def _clear(folder: Path, *patterns: str) -> None:
    """Remove what an import keeps until it is finished; without patterns, everything but the claim."""
    for path in [found for pattern in patterns or ("*",) for found in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in runs.CLAIM_FILES:
            path.unlink(missing_ok=True)


def _settings(config: ImportConfig) -> dict[str, Any]:
    """What decides about the zoo's content; --strict only decides whether there is one."""
    return {name: value for name, value in vars(config).items() if name != "strict"}


def _local(source: str, folder: Path, config: ImportConfig) -> Path:
    """The source as a folder of this machine: as it is, unpacked, or fetched."""
    if source.startswith(REMOTE):
        names = source.removeprefix(REMOTE)
        if Path(names).is_file():
            names = ",".join(Path(names).read_text(encoding="utf-8").split())
        return hub.fetch_all([name for name in names.split(",") if name], folder / "source")
    path = Path(source)
    if path.is_dir():
        return path
    if not path.exists():
        raise UserError(
            f"there is no {source}; give a folder, an archive ({', '.join(ARCHIVES)}) or {REMOTE}owner/name"
        )
    if not path.name.endswith(ARCHIVES):
        raise UserError(f"{source} is neither a folder nor an archive ({', '.join(ARCHIVES)}); give its folder")
    target = folder / "source"
    if not (folder / "unpacked").exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            skipped = unpack(path, target, config.max_bytes)
        except Unreadable as error:
            shutil.rmtree(target)
            raise UserError(f"{source}: {error}") from None
        for line in skipped:
            runs.notice(f"{source}: {line}")
        (folder / "unpacked").touch()
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _listed(root: Path, config: ImportConfig) -> list[Found]:
    """Everything that a source holds, at the epochs that are asked for."""
    known = layouts(config)
    if config.layout is not None and config.layout not in known:
        raise UserError(f"unknown layout {config.layout!r}; the layouts are {', '.join(known)}")
    if config.layout is not None:
        chosen = known[config.layout]
    else:
        chosen = next((layout for layout in known.values() if layout.detects(root)), None)
    pickles = [path.name for path in sorted(root.iterdir()) if path.name in ("dataset.pt", "dataset.pkl")]
    if chosen is None:
        reason = (
            f"; {pickles[0]} is a pickled data set, which is never executed: export its state_dicts" if pickles else ""
        )
        raise UserError(f"{root} holds no networks in a layout that is known ({', '.join(known)}){reason}")
    try:
        found = list(chosen.read(root))
    except Unreadable as error:
        raise UserError(f"{root} cannot be read as {chosen.name}: {error}") from None
    if not found:
        raise UserError(f"{root} holds no networks in the layout {chosen.name}; name another with --layout")
    if config.epochs:
        there = sorted({entry.epoch for entry in found if entry.epoch is not None})
        missing = sorted(set(config.epochs) - set(there))
        if missing:
            raise UserError(f"the source has no epochs {missing}, but {there}; name some of these with --epochs")
        found = [entry for entry in found if entry.epoch in config.epochs]
    runs.notice(f"{root}: {len(found):,} checkpoints in the layout {chosen.name}")
    return found


def _check_unchanged(folder: Path, found: Sequence[Found]) -> None:
    """Refuse to go on with a source that is not what the import began with."""
    now = fingerprint([[entry.member, entry.epoch, entry.path, dict(entry.properties)] for entry in found])
    file = folder / "listing.json"
    if file.exists() and runs.read_json(file) != now:
        raise UserError(f"the source has changed since its import to {folder} began; choose another --out")
    runs.write_json(file, now)


class _Zoos:
    """The zoos that are being written, one per architecture, each in a folder of its own name."""

    def __init__(self, folder: Path, config: ImportConfig, source: str) -> None:
        self.folder, self.config = folder, config
        self.provenance = {"source": source, "import": _settings(config)}
        self.writers: dict[str, ZooWriter] = {}
        self.seen: set[str] = set()
        """Digests of the checkpoints that were read."""
        self.places: set[tuple[str, int]] = set()
        """(member, epoch) of the checkpoints that were read."""

    def writer(self, name: str, architecture: Architecture) -> ZooWriter:
        if name not in self.writers:
            _clear(self.folder / name, ".*.partial")  # of a process that was killed while writing
            self.writers[name] = ZooWriter(self.folder / name, architecture, self.provenance)
        return self.writers[name]


def name_of(architecture: Architecture) -> str:
    """A folder's name for an architecture: CNN3-relu-10, and a digest of what else it says."""
    values = [str(architecture.arguments[key]) for key in ("activation", "classes") if key in architecture.arguments]
    short = architecture.name.rpartition(":")[2]
    return "-".join([short, *values, fingerprint(architecture.to_json())[:6]])


Fits = dict[Any, tuple[str, Fit] | str]
"""What tensors of some names and shapes were found to be: the name of their zoo and the fit, or why there is none."""


@dataclass(frozen=True)
class _Network:
    """One checkpoint of the source that fits a base network."""

    zoo: str
    architecture: Architecture
    flat: Tensor
    digest: str
    problem: str


@dataclass(frozen=True)
class _Shard:
    """What one shard of one zoo will hold."""

    architecture: Architecture
    networks: list[_Network] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def _read(found: list[Found], folder: Path, config: ImportConfig, seed: int, source: str) -> None:
    """Read everything, unit by unit, and finish the zoos."""
    members = {name: number for number, name in enumerate(dict.fromkeys(entry.member for entry in found))}
    zoos = _Zoos(folder, config, source)
    given, fits = arguments_of(config.arguments), {}
    shards: dict[str, list[int]] = {}
    reasons: Counter[str] = Counter()
    done = 0

    def report_of(unit: int) -> Path:
        return folder / f"report-{unit:05d}.jsonl"

    def add(unit: int, lines: list[dict[str, Any]]) -> None:
        nonlocal done
        done += len(lines)
        for line in lines:
            if line["status"] == "skipped":
                reasons[line["reason"]] += 1
            else:
                zoos.seen.add(line["digest"])
                zoos.places.add((line["member"], line["epoch"] or 0))
                if unit not in shards.setdefault(line["zoo"], []):
                    shards[line["zoo"]].append(unit)
                    zoos.writer(line["zoo"], Architecture(**line["architecture"]))
        advance(len(lines))

    def write(unit: int, lines: list[dict[str, Any]], kept: Mapping[str, _Shard]) -> None:
        for name, shard in kept.items():
            _write(shard, zoos.writers[name], unit, config)
        write_lines(report_of(unit), lines)

    with progress("import: checkpoints", len(found)) as advance, ThreadPoolExecutor(2) as pool:
        for unit in itertools.count():
            if not report_of(unit).exists():
                break
            add(unit, read_lines(report_of(unit)))  # of an import that was interrupted
        rest = found[done:]
        networks = _ahead(pool, lambda entry: _network(entry, config.network, given, fits), rest)
        pairs, writing = zip(rest, networks, strict=True), pool.submit(lambda: None)
        while done < len(found):
            lines, kept = _unit(pairs, zoos, members)
            add(unit, lines)
            writing.result()  # one shard is written while the next is read
            writing = pool.submit(write, unit, lines, kept)
            unit += 1
        writing.result()
    write_text(folder / REPORT_FILE, "".join(report_of(number).read_text(encoding="utf-8") for number in range(unit)))
    _finish(zoos, shards, reasons, seed)


def _ahead(
    pool: Executor, work: Callable[[Found], _Network | str], entries: Sequence[Found]
) -> Iterator[_Network | str]:
    """The results of some work in order; a few groups of at most an eighth of a shard are made ahead."""
    waiting = deque[Future[list[_Network | str]]]()
    start, size = 0, 1
    while start < len(entries) or waiting:
        while start < len(entries) and len(waiting) < 3:
            waiting.append(pool.submit(lambda group: [work(entry) for entry in group], entries[start : start + size]))
            start += size
        group = waiting.popleft().result()
        yield from group
        largest = max((network.flat.nbytes for network in group if isinstance(network, _Network)), default=0)
        size = min(max(UNIT_BYTES // (8 * largest), 1), 64) if largest else 1


def _unit(
    pairs: Iterator[tuple[Found, _Network | str]], zoos: _Zoos, members: Mapping[str, int]
) -> tuple[list[dict[str, Any]], dict[str, _Shard]]:
    """Take checkpoints until a shard is full: a line of the report each, and what is kept, by zoo."""
    config, lines, taken = zoos.config, [], 0
    kept: dict[str, _Shard] = {}
    for entry, network in pairs:
        line: dict[str, Any] = {"member": entry.member, "epoch": entry.epoch, "path": entry.path, "status": "skipped"}
        if entry.notes:
            line["notes"] = list(entry.notes)
        lines.append(line)
        place = entry.member, entry.epoch or 0
        if not 0 <= place[1] <= LAST_EPOCH:
            network = f"the epoch {entry.epoch} cannot be"
        elif place in zoos.places:
            network = f"member {entry.member!r} has another checkpoint {EPOCHS[entry.epoch is None].format(place[1])}"
        if isinstance(network, str):
            line["reason"] = network
            continue
        line["digest"] = network.digest
        if network.problem:
            line["reason" if not config.keep_unusable else "warning"] = network.problem
        if network.digest in zoos.seen and entry.epoch != 0:  # members that start alike are alike at epoch 0
            text = "the same weights were read before"
            line["reason" if not config.keep_duplicates else "warning"] = text
        if "reason" not in line:
            line |= {"status": "read", "zoo": network.zoo, "architecture": network.architecture.to_json()}
            zoos.seen.add(network.digest)
            zoos.places.add(place)
            shard = kept.setdefault(network.zoo, _Shard(network.architecture))
            shard.networks.append(network)
            shard.rows.append(_row(entry, members[entry.member], config.task))
        taken += network.flat.nbytes
        if taken >= UNIT_BYTES:
            break
    return lines, kept


def _write(shard: _Shard, writer: ZooWriter, unit: int, config: ImportConfig) -> None:
    """Write one shard of one zoo."""
    weights = unflatten(shard.architecture.shapes, torch.stack([network.flat for network in shard.networks]))
    checkpoints = Checkpoints(shard.architecture, weights, tidy(pd.DataFrame(shard.rows)))
    if config.score:
        checkpoints = _scored(checkpoints, config.task)
    writer.write(unit, checkpoints, [network.digest for network in shard.networks])


def _scored(checkpoints: Checkpoints, task: str | None) -> Checkpoints:
    """The same with loss and accuracy on the task, where the source does not tell them.

    Raises:
        UserError: no task is named.
    """
    if task is None:
        raise UserError("--score needs the task on which the networks were trained; name it with --task")
    measured = score(checkpoints, load_task(task)).frame
    missing = [name for name in measured if name not in checkpoints.frame or checkpoints.frame[name].isna().all()]
    return dataclasses.replace(checkpoints, frame=checkpoints.frame.assign(**{str(n): measured[n] for n in missing}))


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with one type per column, as Parquet wants it: numbers where all are numbers, else text."""
    mixed = [name for name in frame if frame[name].dtype == object]
    return frame.assign(**{str(name): _one_type(frame[name]) for name in mixed})


def _one_type(values: pd.Series) -> pd.Series:
    there = values.dropna()
    if len(there) and all(isinstance(value, bool | int | float) for value in there):
        return values.astype(float)
    return values.where(values.isna(), values.astype(str)).astype(object).where(values.notna(), None)


def _network(entry: Found, network: str | None, arguments: Mapping[str, Any], fits: Fits) -> _Network | str:
    """One checkpoint as float32 under the names of its base network; or why it cannot be read or does not fit."""
    try:
        state = entry.load()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        network, arguments = network or entry.network, {**entry.arguments, **arguments}
        key = (tuple(shapes.items()), network, repr(arguments))
        if key not in fits:
            fits[key] = _fitted(shapes, network, arguments)
        known = fits[key]
        if isinstance(known, str):
            return known
        name, fitted = known
        flat = torch.cat([state[theirs].detach().to(torch.float32).flatten() for theirs in fitted.names.values()])
        return _Network(name, fitted.architecture, flat, digest(flat.numpy()), _problem(flat))
    except (Unreadable, Misfit) as problem:
        return str(problem)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # one odd file among thousands does not end an import; a full disk is met in writing
        return f"cannot be used ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"


def _fitted(shapes: Shapes, network: str | None, arguments: Mapping[str, Any]) -> tuple[str, Fit] | str:
    """The name of the zoo and the fit of tensors of these shapes; or why they do not fit."""
    try:
        fitted = fit(shapes, network, arguments)
    except (Misfit, UserError) as problem:
        return str(problem)
    return name_of(fitted.architecture), fitted


def _problem(flat: Tensor) -> str:
    """What makes weights unusable ("" when nothing does)."""
    huge = float(flat.abs().max())  # NaN where there is one
    if huge <= LARGEST_WEIGHT:
        return ""
    bad = int((~flat.isfinite()).sum())
    return (
        f"{bad:,} of {len(flat):,} weights are not finite"
        if bad
        else f"a weight is {huge:.3g}, over {LARGEST_WEIGHT:,}"
    )


def _row(entry: Found, member: int, task: str | None) -> dict[str, Any]:
    """The row of one checkpoint; what the source calls our own columns gets the prefix source_."""
    said = entry.properties.get("task")
    if isinstance(said, str) and re.fullmatch(r"\w+(@\w+)?", said) and task in (None, said):
        entry = dataclasses.replace(entry, properties={k: v for k, v in entry.properties.items() if k != "task"})
        task = said
    own = {"member": member, "epoch": entry.epoch or 0, "split": entry.split or "", "task": task or UNKNOWN_TASK}
    taken = {*REQUIRED_COLUMNS, "digest", "source"}
    said = {f"source_{name}" if name in taken else name: value for name, value in entry.properties.items()}
    return {**own, "source": entry.member, **said}


def _finish(zoos: _Zoos, shards: Mapping[str, list[int]], reasons: Counter[str], seed: int) -> None:
    """Say what was read; divide the members; describe the zoos; where there is one, make it the folder itself."""
    folder, config = zoos.folder, zoos.config
    told = [f"{count:,} skipped: {reason}" for reason, count in reasons.most_common(5)]
    told += [f"... and for {len(reasons) - 5} more reasons"] if len(reasons) > 5 else []
    if not shards:
        raise UserError(
            f"none of {reasons.total():,} checkpoints can be used:\n" + "\n".join(f"  {text}" for text in told)
        )
    for text in told:
        runs.notice(f"{text} ({folder / REPORT_FILE})")
    several = [str(zoos.writers[name].architecture) for name in shards]
    if config.strict and (reasons or len(shards) > 1):
        raise RunFailed(
            f"--strict: {reasons.total():,} checkpoints were skipped, {len(shards)} architectures are there "
            f"({'; '.join(several)}); all of it is in {folder / REPORT_FILE}; without --strict the import goes on"
        )
    for name, numbers in shards.items():
        written = zoos.writers[name]
        if (written.folder / ZOO_FILE).exists() and not any(written.folder.glob("part-*")):
            continue  # of an import that was interrupted here
        written.finish(numbers, lambda frame: tidy(divided(frame, config, seed)))
    if len(shards) == 1:
        (name,) = shards
        inner = folder / name
        for path in sorted(inner.iterdir(), key=lambda path: path.name == ZOO_FILE):  # zoo.json is the last
            path.replace(folder / path.name)
        inner.rmdir()
    else:
        runs.notice(f"{len(shards)} architectures become {len(shards)} zoos: {'; '.join(several)}")


def divided(frame: pd.DataFrame, config: ImportConfig, seed: int) -> pd.DataFrame:
    """The same rows with a split for every member: the source's, else at random; some seeds whole as 'unseen'.

    Raises:
        UserError: unseen seeds are asked for, but the source tells no seeds or too few.
    """
    members = frame.drop_duplicates("member").set_index("member")
    split = members["split"].replace("", np.nan).astype(object)
    if config.hold_out_seeds:
        seeds = sorted(members["seed"].dropna().unique()) if "seed" in members else []
        if len(seeds) <= config.hold_out_seeds:
            asked = f"--hold-out-seeds {config.hold_out_seeds}"
            raise UserError(f"{asked} needs more seeds than that in the column `seed`, which has {seeds}")
        split[members["seed"].isin(seeds[-config.hold_out_seeds :])] = "unseen"
    open_ = split.index[split.isna()]
    generator = torch.Generator().manual_seed(derive_seed(seed, "import", "split"))
    shuffled = open_[torch.randperm(len(open_), generator=generator).numpy()]
    some = len(open_) >= 3  # with fewer there is nothing to divide
    val, test = (
        max(math.ceil(share * len(open_)), 1) if some and share else 0
        for share in (config.val_share, config.test_share)
    )
    split[shuffled] = "train"
    split[shuffled[:val]] = "val"
    split[shuffled[val : val + test]] = "test"
    return frame.assign(split=frame["member"].map(split))
