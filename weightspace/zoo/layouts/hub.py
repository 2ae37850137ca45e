"""Repositories of the Hugging Face hub: config.json, weights in one file or in shards, a model card.

A snapshot is such a folder; a source is a snapshot, or a folder of snapshots.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightspace.hub import fetch
from weightspace.runs import UserError
from weightspace.zoo.layouts.found import Found, activation_of, column, folders, scalar
from weightspace.zoo.untrusted import Unreadable, read_json, read_state, read_text

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WANTED = ("config.json", "README.md", *WEIGHTS, *INDICES, "model-*.safetensors", "pytorch_model-*.bin")
"""What is fetched of a repository: no code."""
LONGEST_HEADER = 2**20
"""Characters of the largest header of a model card."""
MOST_METRICS = 10_000
"""Metrics that are read of a model card."""
DEPTH = 2
"""Folders below a source in which snapshots are sought: owner/name."""


def detects(root: Path) -> bool:
    """Whether a folder is a snapshot or holds snapshots."""
    return bool(snapshots(root))


def snapshots(root: Path, depth: int = DEPTH) -> list[Path]:
    """The snapshots in a folder, itself included."""
    if (root / "config.json").is_file() and any((root / name).is_file() for name in (*WEIGHTS, *INDICES)):
        return [root]
    return [found for folder in folders(root) for found in snapshots(folder, depth - 1)] if depth else []


def read(root: Path) -> Iterator[Found]:
    """Every snapshot."""
    for folder in snapshots(root):
        notes = []
        try:
            config = read_json(folder / "config.json")
            config = config if isinstance(config, dict) else {}
        except Unreadable as error:
            config = {}
            notes.append(f"config.json: {error}")
        said = {column(str(key)): scalar(value) for key, value in config.items()}
        try:
            said |= card_metrics(folder)
        except Unreadable as error:
            notes.append(f"README.md: {error}")
        name = "." if folder == root else str(folder.relative_to(root))
        member = str(config.get("_name_or_path") or folder.name) if folder == root else name
        yield Found(
            member=member,
            epoch=None,
            path=name,
            load=lambda folder=folder: _state(folder),
            properties={key: value for key, value in said.items() if value is not None},
            arguments=activation_of(config.get("activation")),
            notes=tuple(notes),
        )


def _state(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a snapshot, from one file or from the shards that its index names."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_state(folder / name)
    index = next(folder / name for name in INDICES if (folder / name).is_file())
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise Unreadable(f"{index.name} has no weight_map")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values()), key=str):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise Unreadable(f"{index.name} names {shard!r}, which is no file of its own folder")
        state |= read_state(folder / shard)
    return state


def card_metrics(folder: Path) -> dict[str, Any]:
    """The metrics that a model card's model-index reports, by type or name: {"accuracy": .93}.

    Raises:
        Unreadable: the card cannot be parsed, or the extra is not installed.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    header = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", read_text(card), re.DOTALL)
    if header is None:
        return {}
    if len(header.group(1)) > LONGEST_HEADER:
        raise Unreadable(f"its header has {len(header.group(1)):,} characters; over {LONGEST_HEADER:,} are not read")
    try:
        import yaml
    except ImportError:
        raise Unreadable("its metrics are read with the extra 'hub': pip install 'weightspace[hub]'") from None
    try:
        content = yaml.safe_load(header.group(1))
        entries = content.get("model-index", []) if isinstance(content, dict) else []
        metrics = (
            metric for entry in entries for result in entry.get("results", []) for metric in result.get("metrics", [])
        )
        reported = list(itertools.islice(metrics, MOST_METRICS))  # an alias may repeat one of them without end
        found = {column(str(m.get("type") or m.get("name"))): scalar(m.get("value")) for m in reported}
    except (yaml.YAMLError, AttributeError, TypeError, RecursionError) as error:
        raise Unreadable(f"its header cannot be read ({type(error).__name__})") from None
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def fetch_all(repositories: list[str], folder: Path) -> Path:
    """Download snapshots (weights, config and card; no code) into a folder: folder/owner/name each.

    Raises:
        UserError: the extra is not installed, or a repository cannot be fetched.
    """
    for name in repositories:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
            raise UserError(f"{name!r} is no repository of the hub; write owner/name")
        there = fetch(name, "model", WANTED)
        for path in sorted(there.iterdir()):
            if path.is_file():
                target = folder / name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                target.symlink_to(path.resolve())
    return folder
