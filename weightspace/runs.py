"""A run's folders on disk: claimed for one config, written atomically, resumed, stamped; seeds by name; progress.

Nothing here imports torch, so that ``weightspace --help`` answers at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STAGE_FILE = "stage.json"
LOCK_FILE = ".lock"
CLAIM_FILES = {STAGE_FILE, LOCK_FILE, "config.json", "environment.json"}
"""Files of a folder in which nothing was made yet."""


class UserError(Exception):
    """Something the user gave is wrong; the message names the value, what was expected and the remedy (exit code 2)."""


class RunFailed(Exception):
    """The input was fine but the run could not go on; the message says where it stopped and why (exit code 1)."""


def derive_seed(*names: object) -> int:
    """A 63-bit seed from a path of names, so that every random stream is independent and has a stable name.

    >>> derive_seed(0, "zoo", "order", 3) == derive_seed(0, "zoo", "order", 3)
    True
    """
    text = "/".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)  # as any file the user makes; some writers make theirs private
        os.replace(partial, path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, sort: bool = True) -> None:
    """Write JSON atomically, sorted by key or as it is; NaN and infinity, for which JSON has no word, become null."""
    write_text(path, json.dumps(finite(content), indent=1, sort_keys=sort, allow_nan=False) + "\n")


def finite(content: Any) -> Any:
    """The same nested content with every non-finite float replaced by None."""
    if isinstance(content, float) and not math.isfinite(content):
        return None
    if isinstance(content, dict):
        return {str(key): finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write named tensors as safetensors, atomically; returns the file's size and checksum."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic(path) as partial:
        partial.write_bytes(content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from a copy or make it again") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """Short digest of JSON-like content: equal content, equal fingerprint."""
    return hashlib.sha256(json.dumps(finite(content), sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def stage(folder: Path, name: str, config: dict[str, Any], quiet: bool = False) -> Iterator[bool]:
    """Claim `folder` for one stage with one config; yields whether there is (still) work to do.

    The folder is locked while the block runs and marked finished when it ends without an error. Work that was
    interrupted is entered again with the same config; the stage itself continues from what it finds in the folder. If
    the block finds that the user has to mend something before anything was made, the claim is withdrawn. That there is
    nothing to do is told unless `quiet`.

    Raises:
        UserError: the folder holds something else (another stage, another config, foreign files), cannot be
            written, or another process is at work in it.
    """
    claim = {"stage": name, "config": json.loads(json.dumps(finite(config)))}
    record = folder / STAGE_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder with --out")
    if record.exists():
        _check_claim(folder, record, claim)
    elif folder.exists() and any(not _litter(entry) for entry in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a weightspace {name}; choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with locked(folder):
        if record.exists() and _check_claim(folder, record, claim):  # again, now that nobody else can write
            if not quiet:
                notice(f"{folder}: already done")
            yield False
            return
        for litter in folder.glob(".*.partial"):  # of a process that was killed while writing
            litter.unlink()
        fresh = not record.exists()
        write_json(record, {**claim, "finished": False})
        try:
            yield True
        except UserError:
            if fresh and {path.name for path in folder.rglob("*") if path.is_file()} <= CLAIM_FILES:
                shutil.rmtree(folder)
            raise
        write_json(record, {**claim, "finished": True})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder while the block runs.

    Raises:
        UserError: another process is at work in it, or it cannot be written.
    """
    try:
        lock = open(folder / LOCK_FILE, "w")  # noqa: SIM115 - held until the block ends
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}; wait for it or choose another --out") from None
        yield


def _litter(path: Path) -> bool:
    """Whether a file is what a process leaves behind that was killed before its claim was written."""
    return path.name == LOCK_FILE or (path.name.startswith(".") and path.name.endswith(".partial"))


def _check_claim(folder: Path, record: Path, claim: dict[str, Any]) -> bool:
    """Whether the stage in this folder is finished; raises a UserError if it is not the claimed one."""
    found = read_json(record)
    if not isinstance(found, dict) or not {"stage", "config", "finished"} <= found.keys():
        raise UserError(f"{record} is damaged: it lacks stage, config or finished; delete the folder to make it again")
    if found["stage"] != claim["stage"]:
        raise UserError(f"{folder} holds a {found['stage']!r}, not a {claim['stage']!r}; choose another --out")
    if found["config"] != claim["config"]:
        raise UserError(
            f"{folder} holds another config ({differences(found['config'], claim['config'])}); "
            "choose another --out, or delete the folder to make it again"
        )
    return found["finished"]


def differences(found: Any, wanted: Any, path: str = "") -> str:
    """The fields in which two configs differ, as 'a.b: 1 there, 2 asked for'; at most three are named."""

    def walk(left: Any, right: Any, path: str) -> Iterator[str]:
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted(left.keys() | right.keys()):
                yield from walk(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        elif left != right:
            yield f"{path}: {left!r} there, {right!r} asked for"

    rows = list(walk(found, wanted, path))
    return "; ".join(rows[:3]) + (f"; and {len(rows) - 3} more" if len(rows) > 3 else "")


def environment() -> dict[str, Any]:
    """What a result depends on besides its config: versions and machine."""
    packages = ["weightspace", "torch", "numpy", "scipy", "scikit-learn", "pandas", "safetensors"]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "packages": {package: metadata.version(package) for package in packages},
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def notice(text: str) -> None:
    """Tell the user something that does not stop the work, on standard error; of several processes one does."""
    if os.environ.get("RANK", "0") == "0":
        print(f"weightspace: {text}", file=sys.stderr)


def processor() -> str:
    """The processor's model name where the system tells it, else the machine type."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def progress(description: str, total: float, done: float = 0) -> Iterator[Any]:
    """A progress bar with rate and time left on standard error; yields ``advance(steps=1, note="")``.

    Without a terminal it prints one line when the work ends, so that logs stay readable.
    """
    from rich import progress as bars
    from rich.console import Console

    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeElapsedColumn(),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{description:<34}", total=total, completed=int(done), note="", rate="")
        shown = ""

        def advance(steps: float = 1, note: str = "") -> None:
            nonlocal shown
            shown = note or shown
            speed = bar.tasks[0].speed
            rate = f"{speed:.1f}/s" if speed else ""
            bar.update(task, advance=steps, note=shown, rate=rate)

        yield advance
    if not console.is_terminal:
        console.print(f"{description}: done", highlight=False, soft_wrap=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines file; none where the file does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as JSON Lines, atomically."""
    write_text(path, "".join(json.dumps(finite(record), sort_keys=True) + "\n" for record in records))
