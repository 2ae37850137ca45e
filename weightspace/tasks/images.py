"""Tasks: images with labels, or the values of one image at its coordinates, in fixed splits, by name.

Legend: N images, C channels, H, W height and width.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from weightspace.runs import UserError
from weightspace.tasks.rendered import patches, rendered, street

IMAGENET = 255 * torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
"""Mean and standard deviation per channel [2, 3, 1, 1], with which the published 32x32 RGB tasks are normalized."""
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
"""Weights of red, green and blue in gray (ITU-R BT.601)."""
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF")
"""What is decoded, whatever a file is called: PIL hands some other formats to foreign programs."""
SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
SHAPE = re.compile(r"[13]x[1-9]\d*x[1-9]\d*")
PIXELS = re.compile(r"pixels:(\d+):(.+)")
TIMEOUT = 5.0
"""Seconds after which the hub counts as out of reach."""

Shape = tuple[int, int, int]
"""(channels, height, width)"""
Labeled = tuple[Tensor, Tensor]
"""(pixels [N, C, H, W], labels [N] int64)"""


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split, or coordinates within one image."""

    images: Tensor
    """[N, channels, height, width], float32, normalized; or coordinates [N, 2], -1 to 1."""
    labels: Tensor
    """[N], int64 class indices; or the image's values there [N, channels], float32, normalized."""

    def to(self, device: torch.device | str) -> ImageSplit:
        """The same split on another device."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageTask:
    """A task with fixed train, val and test splits: to classify images, or to represent one by its coordinates."""

    name: str
    classes: int
    """outputs of a network: classes, or the channels of an image that is represented"""
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...] = ()
    """one per class, where the files tell them"""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image, or (2,) for coordinates."""
        return tuple(self.train.images.shape[1:])

    @property
    def real(self) -> bool:
        """Whether outputs are values, compared by their error, not classes."""
        return self.train.labels.is_floating_point()

    def split(self, name: str) -> ImageSplit:
        """The split called `name`.

        Raises:
            UserError: there is no such split.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise UserError(f"task {self.name!r} has no split {name!r}; it has {', '.join(splits)}")
        return splits[name]

    def to(self, device: torch.device | str) -> ImageTask:
        """The same task on another device."""
        moved = {name: self.split(name).to(device) for name in ("train", "val", "test")}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Pixels:
    """The images of a task before normalization."""

    splits: dict[str, Labeled]
    """train, val and test"""
    classes: int
    class_names: tuple[str, ...] = ()
    imagenet: bool = False
    """normalized, where RGB, with ImageNet's mean and standard deviation, not with those of the training images"""


def digits() -> Pixels:
    """The 1,797 real handwritten digits, 8x8 gray, that scikit-learn ships (UCI optical digits).

    A fixed stratified split: 1,077 train, 270 val, 450 test.
    """
    data: Any = load_digits()
    images, labels = torch.from_numpy(data.images[:, None]).float(), torch.from_numpy(data.target).long()
    return Pixels(_cut(images, labels, {"test": 450, "val": 270}), 10)


OFFLINE: dict[str, Callable[[], Pixels]] = {
    "digits": digits,
    "street": lambda: Pixels(rendered(street), 10),
    "patches": lambda: Pixels(rendered(patches, "scikit-image"), 10),
}
"""Tasks that need neither network nor files."""


@dataclass(frozen=True)
class Source:
    """A data set of the Hugging Face hub, with the published split and image size."""

    hub: str
    """repository"""
    config: str | None
    """its configuration; in a copy of the repository, the folder of its files"""
    label: str
    """column of the labels"""
    shape: Shape
    """to which its images are resized"""
    classes: int
    val: float = 0.1
    """share of the training images (of all, where they are pooled) that becomes split 'val'"""
    pooled_test: float = 0.0
    """share of all images that becomes split 'test', where the published split is not the hub's"""


RGB, GRAY = (3, 32, 32), (1, 28, 28)
SOURCES = {
    "svhn": Source("ufldl-stanford/svhn", "cropped_digits", "label", RGB, 10),
    "cifar10": Source("uoft-cs/cifar10", None, "label", RGB, 10),
    "cifar100": Source("uoft-cs/cifar100", None, "fine_label", RGB, 100),
    "eurosat": Source("blanchon/EuroSAT_RGB", None, "label", RGB, 10, val=0.05, pooled_test=0.15),
    "stl10": Source("tanganke/stl10", None, "label", RGB, 10),
    "mnist": Source("ylecun/mnist", None, "label", GRAY, 10),
    "fashion_mnist": Source("zalando-datasets/fashion_mnist", None, "label", GRAY, 10),
    "usps": Source("flwrlabs/usps", None, "label", GRAY, 10),
}
"""Tasks that are downloaded, or read from a folder."""


UNKNOWN_TASK = "unknown"
"""The task of an imported network where nobody names it."""


@cache
def load_task(name: str) -> ImageTask:
    """Load a task by name; once per process (docs/tasks.md).

    Args:
        name: one of

            - `NAME`, a task of OFFLINE or SOURCES: "street", "cifar10" (SOURCES are downloaded from the hub).
            - `NAME:FOLDER`, a task of SOURCES from local files: "cifar10:data/cifar10".
            - `folder:FOLDER`, one's own images, all of one size, with splits 'train', 'test' and, if there is one,
              'val' (else 10 % of 'train').
            - any of these and `@CxHxW`, resized to that shape: "street@1x8x8", "mnist@3x32x32".
            - `pixels:N:TASK`, training image N of any of these as a function of its coordinates: "pixels:3:digits".

            A folder holds, at any depth, Parquet files with a column of images and one of labels, or else image files
            as SPLIT/CLASS/FILE. The names of Parquet files start with the split. 'valid' and 'validation' mean 'val'.

    Raises:
        UserError: no such task; a package that is not installed; neither network nor files; files that are missing,
            corrupt or of differing sizes; labels out of range; classes without training images.
    """
    if found := PIXELS.fullmatch(name):
        return _pixels(name, int(found[1]), load_task(found[2]))
    base, _, ending = name.rpartition("@")
    shape: Shape | None = None
    if SHAPE.fullmatch(ending):
        channels, height, width = map(int, ending.split("x"))
        shape = channels, height, width
    else:
        base = name
    kind, colon, folder = base.partition(":")
    if base in OFFLINE:
        pixels = OFFLINE[base]()
        if shape:
            pixels = dataclasses.replace(
                pixels, splits={split: (resized(images, shape), y) for split, (images, y) in pixels.splits.items()}
            )
    elif kind in SOURCES and bool(colon) == bool(folder):
        pixels = _sourced(kind, Path(folder).expanduser() if folder else None, shape)
    elif kind == "folder" and folder:
        pixels = _own(Path(folder).expanduser(), shape)
    else:
        hint = "this zoo was imported without --task, so nothing can be run; " if name == UNKNOWN_TASK else ""
        known = ", ".join([*OFFLINE, *SOURCES])
        raise UserError(
            f"{hint}unknown task {name!r}; the tasks are {known}; from files, NAME:FOLDER for one of the latter or "
            "folder:FOLDER for your own images; @CxHxW resizes (1 or 3 channels), as in street@1x8x8; "
            "pixels:N:TASK is image N of a task by its coordinates"
        )
    images = pixels.splits["train"][0]
    mean, std = IMAGENET if pixels.imagenet and images.shape[1] == 3 else _moments(images)
    splits = {key: ImageSplit((images - mean) / std, labels) for key, (images, labels) in pixels.splits.items()}
    return ImageTask(
        name, pixels.classes, splits["train"], splits["val"], splits["test"], class_names=pixels.class_names
    )


def _pixels(name: str, number: int, task: ImageTask) -> ImageTask:
    """The values of one training image at its coordinates; 'val' and 'test' lie between its pixels.

    They are the pixels of the image resized to one and a half and twice its height and width.
    """
    if task.real:
        raise UserError(f"{name!r}: {task.name!r} has no images but the values of one; name a task of images")
    if number >= len(task.train.images):
        raise UserError(f"{name!r}: {task.name!r} has training images 0 to {len(task.train.images) - 1}")
    image = task.train.images[number : number + 1]
    channels, height, width = image.shape[1:]
    splits = {}
    for split, scale in {"train": 1.0, "val": 1.5, "test": 2.0}.items():
        larger = resized(image, (channels, round(scale * height), round(scale * width)))[0]
        along = [(torch.arange(size) + 0.5) * 2 / size - 1 for size in larger.shape[1:]]
        splits[split] = ImageSplit(torch.cartesian_prod(*along), larger.flatten(1).T.contiguous())
    return ImageTask(name, channels, **splits)


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of images [N, C, H, W], [C, 1, 1] each."""
    channels = [channel.float().numpy() for channel in images.unbind(1)]
    mean, std = torch.tensor([[channel.mean(), channel.std()] for channel in channels]).T[..., None, None]
    return mean, std.clamp(min=1e-6)


def resized(images: Tensor, shape: Shape) -> Tensor:
    """Images [N, C, H, W] with another shape, as float32.

    An axis that shrinks is averaged over the extent of each new pixel, one that grows is interpolated linearly. RGB
    becomes gray by luminance, gray becomes RGB by repeating.
    """
    channels, height, width = shape
    images = images.float()
    if channels < images.shape[1]:
        images = (images * LUMINANCE).sum(1, keepdim=True)
    images = _weights(images.shape[2], height) @ images @ _weights(images.shape[3], width).T
    return images.expand(-1, channels, -1, -1)


def _weights(size: int, wanted: int) -> Tensor:
    """Weight of each of `size` pixels in each of `wanted` new pixels along one axis [wanted, size]; rows sum to 1."""
    old, new, ratio = torch.arange(size), torch.arange(wanted)[:, None], size / wanted
    if wanted <= size:
        return (torch.minimum((new + 1) * ratio, old + 1) - torch.maximum(new * ratio, old)).clamp(min=0) / ratio
    center = ((new + 0.5) * ratio - 0.5).clamp(0, size - 1)
    return (1 - (center - old).abs()).clamp(min=0)


def pictures(task: ImageTask, per_class: int) -> Tensor:
    """The first training images of every class, to be looked at [classes, per_class, C, H, W], 0 to 1.

    The range of each channel becomes 0 to 1, which undoes the normalization where the images use their whole range.
    Classes with fewer training images start over. An image that is represented is shown alone [1, 1, C, H, W].
    """
    images, labels = task.train.images, task.train.labels
    if task.real:
        shown = labels.T.unflatten(1, [len(along.unique()) for along in images.T])[None, None]  # [1, 1, C, H, W]
        return (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-6)
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    rows = [torch.nonzero(labels == label).flatten() for label in range(task.classes)]
    chosen = torch.stack([own[torch.arange(per_class) % len(own)] for own in rows])  # [classes, per_class]
    return ((images[chosen.flatten()] - low) / (high - low)).unflatten(0, chosen.shape)


def _cut(images: Tensor, labels: Tensor, parts: dict[str, int]) -> dict[str, Labeled]:
    """Cut parts of these sizes out of images, one after another, stratified and fixed; the rest is 'train'.

    A part with fewer images than classes is drawn without regard to them.
    """
    rest = np.arange(len(labels))
    splits = {}
    for name, size in parts.items():
        counts = np.unique(labels[rest], return_counts=True)[1]
        stratify = labels[rest] if counts.min() > 1 and len(counts) <= min(size, len(rest) - size) else None
        rest, chosen = train_test_split(rest, test_size=size, random_state=0, stratify=stratify)
        splits[name] = images[chosen], labels[chosen]
    return {"train": (images[rest], labels[rest]), **splits}


def _sourced(name: str, folder: Path | None, shape: Shape | None) -> Pixels:
    """A data set of SOURCES, downloaded or from a folder, with the published split."""
    source = SOURCES[name]
    where = f"{name}:{folder}" if folder else f"{name} ({source.hub})"
    read = _read(folder, source.label, source.config) if folder else _downloaded(name, source)
    found = {split: _stacked(rows, shape or source.shape) for split, rows in read.rows.items()}
    shares = {"val": source.val}
    if source.pooled_test:
        images, labels = zip(*(found[split] for split in sorted(found)), strict=True)
        found = {"train": (torch.cat(images), torch.cat(labels))}
        shares = {"test": source.pooled_test, **shares}
    _check(where, found, source.classes, {"train", "test"} - shares.keys())
    cut = _cut(*found["train"], {key: max(round(share * len(found["train"][1])), 1) for key, share in shares.items()})
    return Pixels({**found, **cut}, source.classes, read.class_names, imagenet=source.shape[0] == 3)


def _own(folder: Path, shape: Shape | None) -> Pixels:
    """One's own images. Where there is no split 'val', 10 % of the training images become one."""
    read = _read(folder, None, None)
    first = next(iter(read.rows.values()))[0].picture()
    found = {
        split: _stacked(rows, shape or (len(first.getbands()), first.height, first.width), keep=shape is None)
        for split, rows in read.rows.items()
    }
    classes = len(read.class_names) or max(int(labels.max()) for _, labels in found.values()) + 1
    if classes < 2:
        raise UserError(f"{folder} holds images of one class; a task has at least two, as train/CLASS/FILE")
    _check(str(folder), found, classes, {"train", "test"}, read.class_names)
    if "val" not in found:
        found |= _cut(*found["train"], {"val": max(round(0.1 * len(found["train"][1])), 1)})
    return Pixels(found, classes, read.class_names)


def _check(
    where: str, found: dict[str, Labeled], classes: int, needed: set[str], class_names: tuple[str, ...] = ()
) -> None:
    """Check that every needed split is there and that the labels are right.

    Raises:
        UserError: a split is missing, a label is out of range, or a class has less than two training images.
    """
    for split in sorted(needed - found.keys()):
        raise UserError(f"{where} has no images of split {split!r}, only of {', '.join(found)}; add them")
    for split, (_, labels) in found.items():
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise UserError(f"{where}: split {split!r} has the label {int(wrong[0])}; labels are 0 to {classes - 1}")
    counts = torch.bincount(found["train"][1], minlength=classes)
    label = int(counts.argmin())
    if counts[label] < 2:
        name = f"{label} ({class_names[label]})" if class_names else label
        raise UserError(
            f"{where}: class {name} has {int(counts[label])} training images; each of the {classes} classes needs two"
        )


@dataclass(frozen=True)
class Row:
    """One labeled image, not decoded yet."""

    content: bytes | Path
    """an image file's, or the file"""
    label: int | str
    """class index, or name of the class"""
    where: str
    """what messages call it"""

    def picture(self) -> Any:
        """The decoded PIL image, gray (mode L) or RGB.

        Raises:
            UserError: it is corrupt, dangerously large or has more than 8 bits per channel.
        """
        from PIL import Image

        try:
            content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self.where} is not a readable image ({error}); restore or remove it") from None
        if image.mode.startswith(("I", "F")):
            raise UserError(f"{self.where} has pixels of mode {image.mode!r}; convert it to 8 bits per channel")
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


Part = tuple[str, list[Row], tuple[str, ...]]
"""(split, some of its rows, names of the classes where they are told)"""


@dataclass(frozen=True)
class Read:
    """What was found in files or on the hub."""

    rows: dict[str, list[Row]]
    """by split, labeled with class indices"""
    class_names: tuple[str, ...]
    """one per class; none where the labels are mere numbers"""


def _stacked(rows: Sequence[Row], shape: Shape, keep: bool = False) -> Labeled:
    """Decoded images of one shape, as uint8; with `keep`, another size is an error, else images are resized."""
    channels, height, width = shape
    images = torch.empty(len(rows), *shape, dtype=torch.uint8)
    for i, row in enumerate(rows):
        picture = row.picture()
        if keep and picture.size != (width, height):
            raise UserError(
                f"{row.where} is {picture.width} wide and {picture.height} high, the first image {width} and {height}; "
                f"name a common shape behind the folder, such as @{channels}x{height}x{width}"
            )
        image = torch.from_numpy(np.array(picture.convert("RGB" if channels == 3 else "L")))
        image = image[None] if channels == 1 else image.permute(2, 0, 1)
        images[i] = image if picture.size == (width, height) else resized(image[None], shape)[0].round()
    return images, torch.tensor([row.label for row in rows])


def _downloaded(name: str, source: Source) -> Read:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"downloading the task {name!r} needs the package datasets: pip install 'weightspace[data]'; "
            f"where its files are there already, name their folder, {name}:FOLDER"
        ) from None
    with _offline_where_unreachable():
        try:
            data: Any = datasets.load_dataset(source.hub, source.config)
        except Exception as error:  # whatever network and hub come up with
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the task {name!r} cannot be downloaded from {source.hub} ({reason}); connect to the network "
                f"(extra: pip install 'weightspace[data]'), or name a folder with its files, {name}:FOLDER"
            ) from None
    tables = {SPLIT_NAMES[key]: data[key].with_format("arrow")[:] for key in data if key in SPLIT_NAMES}
    parts = [(split, *_rows(table, source.label, f"{source.hub}, {split}")) for split, table in tables.items()]
    return _joined(parts)


@contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """Where the hub does not answer, use only what was downloaded before, instead of trying for half a minute."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=TIMEOUT).close()
    except OSError:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _read(folder: Path, label: str | None, config: str | None) -> Read:
    """What a folder holds as Parquet files, or else as image files."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; name one with train-*.parquet and test-*.parquet, or SPLIT/CLASS/FILE"
        )
    root = folder / config if config and (folder / config).is_dir() else folder
    parts: list[Part] = []
    for path in sorted(root.rglob("*.parquet")):
        if split := SPLIT_NAMES.get(re.split(r"[-_.]", path.name)[0].lower()):
            parts.append((split, *_parquet(path, label)))
    if not parts:
        for path in sorted(root.rglob("*")):
            split = SPLIT_NAMES.get(path.parent.parent.name.lower())
            if split and path.suffix.lower() in ENDINGS:
                parts.append((split, [Row(path, path.parent.name, str(path))], ()))
    if not any(rows for _, rows, _ in parts):
        raise UserError(
            f"{folder} holds no images, neither train-*.parquet nor train/CLASS/FILE ({', '.join(ENDINGS)}); add them"
        )
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> Read:
    """All rows of every split, with class indices; classes that have names only are numbered in alphabetical order."""
    rows: dict[str, list[Row]] = {}
    for split, some, _ in parts:
        if some:
            rows.setdefault(split, []).extend(some)
    labels = {row.label for own in rows.values() for row in own}
    if all(isinstance(label, int) for label in labels):
        return Read(rows, parts[0][2])
    names = tuple(sorted(map(str, labels), key=lambda name: name.zfill(9) if name.isdecimal() else name))
    index = {name: i for i, name in enumerate(names)}
    for split, own in rows.items():
        rows[split] = [dataclasses.replace(row, label=index[str(row.label)]) for row in own]
    return Read(rows, names)


def _parquet(path: Path, label: str | None) -> tuple[list[Row], tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return _rows(file.read(), label, str(path))
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:  # in data, names or metadata
        raise UserError(f"{path} is not a readable Parquet file ({error}); restore it") from None


def _rows(table: Any, label: str | None, where: str) -> tuple[list[Row], tuple[str, ...]]:
    """The rows of an Arrow table, and the names of the classes where its metadata tell them.

    Args:
        table: with a column of encoded images (bytes, or structs with bytes) and one of labels.
        label: column of the labels (None: 'label', or the only one of whole numbers or text).
        where: what messages call the table.
    """
    import pyarrow as pa

    kinds = {field.name: field.type for field in table.schema}
    images = [name for name, kind in kinds.items() if _holds_images(kind)]
    if not images:
        raise UserError(f"{where}: no column of images (bytes, or structs with bytes), only {', '.join(kinds)}")
    labels = [name for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_string(kind)]
    if label is None and len(labels) == 1:
        label = labels[0]
    label = label or "label"
    if label not in labels:
        raise UserError(f"{where}: no column {label!r} of whole numbers or text, only {', '.join(kinds)}; rename it")
    rows = []
    for i, (image, number) in enumerate(zip(table[images[0]].to_pylist(), table[label].to_pylist(), strict=True)):
        content = image.get("bytes") if isinstance(image, dict) else image
        if content is None or number is None:
            raise UserError(f"{where}, row {i} has no {'image' if content is None else 'label'}; restore or remove it")
        rows.append(Row(content, number, f"{where}, row {i}"))
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return rows, tuple(features.get(label, {}).get("names") or ())


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
