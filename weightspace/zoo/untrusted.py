"""Files from elsewhere, read without running what they contain and without taking more memory than they are large.

Every function raises `Unreadable` for a file that cannot be read, whatever is wrong with it; the message says what it
is and what to do.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import pickle
import pickletools
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from weightspace.networks.fitting import WRAPPERS, natural
from weightspace.zoo.tables import LARGEST_TEXT, TooLarge, read_parquet

LARGEST_FILE = 16 * 2**30
"""Bytes of the largest file that is read."""
LARGEST_HEADER = 16 * 2**20
"""Bytes of the largest header of a tar archive."""
MOST_ENTRIES = 2_000_000
"""Entries of the largest archive."""


class Unreadable(Exception):
    """A file from elsewhere that is not read; the message says why and what to do."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of real numbers of a state_dict, by name; wrappers are taken off, everything else is left out.

    safetensors by its ending, else what torch.save wrote.

    Raises:
        Unreadable: not such a file, a pickle that needs a class, or sizes that cannot be.
    """
    state = None if path.suffix == ".safetensors" else _read_alike(path)
    return unwrapped(read_saved(path)) if state is None else state


HEADER = struct.Struct("<4s22xHH")
"""Head of a record in a zip archive, before its name and more: its mark, ..., the lengths of these two."""
MARK = b"PK\3\4"
"""How a record begins, and so a zip archive."""
LARGEST_ALIKE = 64 * 2**20
"""Bytes of the largest file that is read by what was learned from another."""
LARGEST_PROGRAM = 2**20
"""Bytes of the largest pickle, and of the longest list of records, that are remembered."""
PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
"""What a pickle may call if it is remembered: nothing that makes a tensor of anything but a record."""


@dataclass(frozen=True)
class _Place:
    """Where the values of a tensor lie in a file of torch.save."""

    record: str
    start: int
    """bytes from the record's beginning"""
    dtype: torch.dtype
    shape: torch.Size

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize


def _read_alike(path: Path) -> dict[str, Tensor] | None:
    """The state_dict of a file of torch.save; of files with the same pickle, it is run for the first one only.

    That takes nearly all of the time of reading a small file, and the checkpoints of one network have the same: only
    the records beside it differ.

    Returns:
        None where it is not so simple; `read_saved` then reads the file, or says what is wrong with it.
    """
    content, records = _records(path)
    program, order = (content[records.get(name, slice(0))].tobytes() for name in ("data.pkl", "byteorder"))
    data = {name.removeprefix("data/"): at for name, at in records.items() if name.startswith("data/")}
    sizes = tuple((name, at.stop - at.start) for name, at in data.items())
    if not 0 < len(program) <= LARGEST_PROGRAM or b"bytearray" in program or order not in (b"", b"little"):
        return None
    places = _places(program, sizes) if sum(size for _, size in sizes) <= len(content) else None
    if places is None:
        return None
    values, state = torch.from_numpy(content), {}
    for name, place in places.items():
        start = data[place.record].start + place.start
        if start % place.dtype.itemsize:
            return None
        state[name] = values[start : start + place.bytes].view(place.dtype).view(place.shape)
    return state


def _records(path: Path) -> tuple[np.ndarray[Any, Any], dict[str, slice]]:
    """The bytes of a file of torch.save and where its records lie in them, by their names in the folder that it holds.

    Nothing where it is large or is not just what torch.save writes.
    """
    nothing: tuple[np.ndarray[Any, Any], dict[str, slice]] = np.empty(0, np.uint8), {}
    if _size(path, LARGEST_FILE) > LARGEST_ALIKE:
        return nothing
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            file.seek(0)
            content = np.fromfile(file, np.uint8)
        root, records = entries[0].filename.split("/")[0] + "/", {}
        for entry in entries:
            if entry.header_offset < 0:
                return nothing
            mark, *lengths = HEADER.unpack_from(content.data, entry.header_offset)
            start = entry.header_offset + HEADER.size + sum(lengths)
            at, name = slice(start, start + entry.file_size), entry.filename.removeprefix(root)
            plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 and mark == MARK
            if not plain or at.stop > len(content) or name != name.lower() or name in records:
                return nothing  # torch finds records whatever the case of their names
            records[name] = at
        intact = zlib.crc32(content[records["data.pkl"]].data) == archive.getinfo(f"{root}data.pkl").CRC
    except (zipfile.BadZipFile, struct.error, LookupError, OSError, OverflowError, ValueError, NotImplementedError):
        return nothing
    starts_as_zip = content[: len(MARK)].tobytes() == MARK
    return (content, records) if intact and starts_as_zip and sum(map(len, records)) <= LARGEST_PROGRAM else nothing


@lru_cache(maxsize=64)
def _places(program: bytes, sizes: tuple[tuple[str, int], ...]) -> dict[str, _Place] | None:
    """Where a pickle finds the tensors of its state_dict in records of some sizes.

    It is run, as safely as ever, beside records that hold nothing but their own number.

    Returns:
        None where it cannot be run so, or makes tensors that are not plainly the values of one record.
    """
    stand_in = io.BytesIO()
    try:
        for operation, argument, _ in pickletools.genops(program):
            called = operation.name in ("GLOBAL", "INST", "STACK_GLOBAL") or operation.name.startswith("EXT")
            if called and not PLAIN.fullmatch(str(argument)):
                return None
        with zipfile.ZipFile(stand_in, "w") as archive:
            archive.writestr("alike/data.pkl", program)
            archive.writestr("alike/version", "3\n")
            for number, (name, size) in enumerate(sizes, start=1):
                archive.writestr(f"alike/data/{name}", number.to_bytes(size, "little"))
        stand_in.seek(0)
        saved = torch.load(stand_in, map_location="cpu", weights_only=True)
        _check_sizes(saved, stand_in.getbuffer().nbytes, set())
        places, numbered = {}, dict(enumerate(sizes, start=1))
        for name, tensor in unwrapped(saved).items():
            storage = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
            record, size = numbered[int.from_bytes(storage[:8].tolist(), "little")]
            start = int(tensor.storage_offset()) * tensor.element_size()
            place = _Place(record, start, tensor.dtype, tensor.shape)
            inside = len(storage) == size and 0 < place.bytes <= size - start
            if not inside or not tensor.is_contiguous() or tensor.is_neg():
                return None
            places[name] = place
    except Exception:  # whatever the libraries raise; `read_saved` says what is wrong
        return None
    return places


def read_saved(path: Path) -> Any:
    """What torch.save or safetensors wrote: nested containers of tensors, numbers and text.

    Raises:
        Unreadable: not such a file, a pickle that needs a class, or sizes that cannot be.
    """
    size = _size(path, LARGEST_FILE)
    try:
        if path.suffix == ".safetensors":
            content = load_safetensors(path.read_bytes())
            return {name: content[name] for name in sorted(content, key=natural)}  # the format has no order
        _check_records(path, size)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_sizes(content, size, set())
    except Unreadable:
        raise
    except Exception as error:  # a damaged file makes the libraries raise anything
        needed = _class_of(path, error)
        raise Unreadable(REFUSED.format(needed) if needed else _reason(error)) from None
    return content


def _check_sizes(content: Any, size: int, met: set[int], depth: int = 0) -> None:
    """Refuse tensors that claim more values than their file can hold, as views of one value may.

    Args:
        content: what was read.
        size: bytes of the file.
        met: containers that were looked at; a pickle may hold one of them a billion times.
        depth: of this one.
    """
    if isinstance(content, Tensor) and content.numel() * content.element_size() > size:
        shape = tuple(content.shape)
        raise Unreadable(f"a tensor claims the shape {shape}, more than the file of {size:,} bytes can hold")
    if depth < 8 and isinstance(content, Mapping | list | tuple) and id(content) not in met:
        met.add(id(content))
        for value in content.values() if isinstance(content, Mapping) else content:
            _check_sizes(value, size, met, depth + 1)


def _size(path: Path, most: int) -> int:
    try:
        found = path.stat()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("not an ordinary file")
    if found.st_size > most:
        raise Unreadable(f"{found.st_size:,} bytes; files of over {most:,} are not read")
    return found.st_size


def _check_records(path: Path, size: int) -> None:
    """Refuse what torch.save never writes: records larger than the file (a bomb), room that is only asked for."""
    with open(path, "rb") as file:
        zipped = file.read(len(MARK)) == MARK  # as torch tells the formats apart
    if zipped:
        with zipfile.ZipFile(path) as archive:
            records = sum(record.file_size for record in archive.infolist())
            if records > size:
                raise Unreadable(f"its records unpack to {records:,} bytes, more than the file's {size:,}")
            names = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
            programs = [archive.read(name) for name in names]
    else:
        programs = [path.read_bytes()]  # the older format, a bare pickle
    if any(b"bytearray" in program for program in programs):  # torch lets bytearray(10**12) through
        raise Unreadable(REFUSED.format("builtins.bytearray"))


REFUSED = (
    "a pickle that needs the class {}: reading it could run code, so it is refused; where you trust it, load it with "
    "the code that wrote it and save the plain state_dict: torch.save(model.state_dict(), path)"
)


def _class_of(path: Path, error: Exception) -> str:
    """The class that a refused pickle needs, from torch's message or else from the pickle's instructions."""
    said = re.search(r"GLOBAL ([\w.]+)", str(error))
    if said:
        return said.group(1)
    if not isinstance(error, pickle.UnpicklingError) or zipfile.is_zipfile(path):
        return ""
    words: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()[:LARGEST_TEXT]):
            if operation.name in ("GLOBAL", "INST"):
                return str(argument).replace(" ", ".")
            if operation.name == "STACK_GLOBAL":
                return ".".join(words[-2:])
            if isinstance(argument, str):
                words.append(argument)
    except Exception:  # no pickle at all
        pass
    return ""


def _reason(error: Exception) -> str:
    """What is wrong with a file, in a line, from the error of the library that read it."""
    line = text.splitlines()[0] if (text := str(error).strip()) else ""
    return f"damaged, or not a file of weights ({type(error).__name__}{': ' if line else ''}{line[:200]})"


def unwrapped(content: Any) -> dict[str, Tensor]:
    """The state_dict in what a training script saved, without tensors that hold no real numbers.

    Raises:
        Unreadable: there is none.
    """
    for _ in range(4):  # wrappers may be nested, and have tensors (a loss, a step) beside the state_dict
        inner = [content[key] for key in WRAPPERS if isinstance(content, Mapping) and key in content]
        content = next((mapping for mapping in inner if isinstance(mapping, Mapping)), content)
    if isinstance(content, Mapping):
        state = {str(name): value for name, value in content.items() if is_plain(value)}
        if state:
            return state
    kind = f"a mapping with {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else ""
    raise Unreadable(f"holds no state_dict but {kind or 'a ' + type(content).__name__}")


def is_plain(value: Any) -> bool:
    """Whether something is a tensor of real numbers in memory: not sparse, nested, quantized or without storage."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_nested
    )


def read_json(path: Path) -> Any:
    """A JSON document.

    Raises:
        Unreadable: too large, or not JSON.
    """
    return _parsed(path, lambda: json.loads(read_text(path)))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a last line that was cut off is left out.

    Raises:
        Unreadable: too large, or not JSON Lines.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    found = []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) - 1:
                break
            raise Unreadable(f"line {number + 1} is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise Unreadable(f"line {number + 1} is not a JSON object")
        found.append(record)
    return found


def _parsed(path: Path, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except (Unreadable, TooLarge):
        raise
    except Exception as error:  # as above
        raise Unreadable(_reason(error).replace("a file of weights", f"a {path.suffix or 'readable'} file")) from None


def read_text(path: Path) -> str:
    """A whole text, unpacked where its name ends in .gz.

    Raises:
        Unreadable: too large, or damaged.
    """
    return _bytes(path).decode("utf-8", errors="replace")


def _bytes(path: Path) -> bytes:
    """A whole small file, unpacked where its name ends in .gz."""
    _size(path, LARGEST_TEXT)
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            content = file.read(LARGEST_TEXT + 1)
    except (OSError, EOFError, ValueError) as error:
        raise Unreadable(_reason(error)) from None
    if len(content) > LARGEST_TEXT:
        raise Unreadable(f"unpacks to over {LARGEST_TEXT:,} bytes")
    return content


def read_table(path: Path) -> pd.DataFrame:
    """A table: CSV (also .csv.gz), JSON Lines or Parquet by its ending.

    Raises:
        Unreadable: another ending, too large, or damaged.
    """
    endings = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if endings == "csv":
        return _parsed(path, lambda: pd.read_csv(io.BytesIO(_bytes(path))))
    if endings in ("jsonl", "ndjson"):
        return _parsed(path, lambda: pd.DataFrame(read_json_lines(path)))
    if endings == "parquet":
        _size(path, LARGEST_FILE)
        try:
            return _parsed(path, lambda: read_parquet(path))
        except TooLarge as error:
            raise Unreadable(str(error)) from None
    raise Unreadable("no table that can be read: name it .csv, .csv.gz, .jsonl or .parquet")


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """An array of numpy's format, mapped and not read, without pickled objects.

    Raises:
        Unreadable: damaged, of objects, or larger than the file says.
    """
    _size(path, LARGEST_FILE)
    array = _parsed(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
    if not isinstance(array, np.ndarray):
        array.close()
        raise Unreadable("several arrays in one file; one is expected")
    if array.dtype.kind != "f":
        raise Unreadable(f"an array of {array.dtype}, not of real numbers")
    return array


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors that are not an archive's fault."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def unpack(archive: Path, folder: Path, most: int) -> list[str]:
    """Unpack the ordinary files of a zip or tar archive into a folder.

    Args:
        archive: the archive.
        folder: where its files go; it must be empty.
        most: bytes that it may take.

    Returns:
        What was left out, a line each: links and devices.

    Raises:
        Unreadable: damaged, larger than allowed, or with a path that leaves the folder.
    """
    too_much = f"unpacks to over {most:,} bytes; raise --max-bytes if you trust it"
    if archive.stat().st_size > most:
        raise Unreadable(too_much)
    skipped, taken = [], 0
    try:
        for number, (name, size, ordinary, read) in enumerate(_entries(archive)):
            if number >= MOST_ENTRIES:
                raise Unreadable(f"holds more than {MOST_ENTRIES:,} files")
            where = PurePosixPath(name.replace("\\", "/"))
            if where.is_absolute() or ".." in where.parts or ":" in name.split("/")[0] or "\0" in name:
                raise Unreadable(f"holds the path {name!r}, which leaves its folder; do not use this archive")
            if not ordinary:
                skipped.append(f"{name}: a link or device, left out")
                continue
            taken += size
            if taken > most:
                raise Unreadable(too_much)
            target = folder / where
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as out:
                while block := read(2**20):
                    size -= len(block)
                    if size < 0:
                        raise Unreadable(f"{name} is larger than the archive says")
                    out.write(block)
    except Unreadable:
        raise
    except FileExistsError as error:
        raise Unreadable(f"holds {error.filename} twice") from None
    except Exception as error:  # a damaged archive makes the libraries raise anything
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise Unreadable(f"damaged, or no archive ({type(error).__name__}: {error})") from None
    return skipped


class _Headers:
    """A tar archive of which files are read in blocks: what is read in one piece and large is a header."""

    def __init__(self, file: Any) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise Unreadable(f"has a header of {size:,} bytes; none has over {LARGEST_HEADER:,}")
        return self.file.read(size)


def _entries(archive: Path) -> Iterator[tuple[str, int, bool, Callable[[int], bytes]]]:
    """Name, size, whether it is an ordinary file, and how to read it, of everything but folders."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for entry in packed.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if not entry.is_dir():
                    with packed.open(entry) as file:
                        yield entry.filename, entry.file_size, kind in (0, stat.S_IFREG), file.read
        return
    endings = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    unpacked = endings.get(archive.suffix, open)
    with unpacked(archive, "rb") as plain, tarfile.open(fileobj=_Headers(plain), mode="r:") as packed:  # type: ignore
        for item in packed:
            file = packed.extractfile(item) if item.isreg() else None
            if not item.isdir():
                yield item.name, item.size, file is not None, file.read if file else (lambda _: b"")
