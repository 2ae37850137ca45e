"""Two offline 32x32 RGB tasks that stand in for SVHN and EuroSAT where nothing can be downloaded.

Both are made here, deterministically, and kept in a cache that is safe to delete. Images are rounded to 256 levels, as
those of any other data set.

Legend: N images, H, W height and width of a picture, S size of a glyph's mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weightspace.runs import UserError, derive_seed, notice, write_tensors

VERSION = 1
"""Of what is rendered; part of the cache's file names."""
SIZES = {"train": 6000, "val": 1000, "test": 2000}
SIDE = 32
Rendered = dict[str, tuple[Tensor, Tensor]]
"""split -> (images [N, 3, 32, 32] of 0 to 255 as uint8, labels [N])."""

# street: house numbers

FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneral.ttf",
    "STIXGeneralBol.ttf", "cmr10.ttf", "cmss10.ttf", "cmb10.ttf",
)  # fmt: skip
"""Fonts that matplotlib ships."""
GLYPH = 48


def street() -> Rendered:
    """A digit in one of several fonts between distractor digits, over crops of photographs: the setting of SVHN.

    Font, color, contrast, size, rotation, shear, perspective, blur and noise are random; the label is the digit in the
    middle.
    """
    glyphs, pictures = _glyphs(), _photographs()
    return {split: _numbers(glyphs, pictures, count, _generator("street", split)) for split, count in SIZES.items()}


def _glyphs() -> Tensor:
    """Masks of the digits, 0 to 1, as high as two thirds of the mask [fonts, 10, S, S]."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    masks = torch.zeros(len(FONTS), 10, GLYPH, GLYPH)
    for i, name in enumerate(FONTS):
        font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), 64)
        for digit in range(10):
            left, top, right, bottom = font.getbbox(str(digit))
            drawn = Image.new("L", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(drawn).text((-left, -top), str(digit), fill=255, font=font)
            height = GLYPH * 2 // 3
            width = max(round(drawn.width * height / drawn.height), 1)
            drawn = drawn.resize((min(width, GLYPH), height), Image.Resampling.BILINEAR)
            x, y = (GLYPH - drawn.width) // 2, (GLYPH - height) // 2
            masks[i, digit, y : y + height, x : x + drawn.width] = torch.from_numpy(np.array(drawn)).float() / 255
    return masks


def _photographs() -> list[Tensor]:
    """The two photographs that scikit-learn ships [3, H, W], 0 to 1."""
    from sklearn.datasets import load_sample_image

    names = ("china.jpg", "flower.jpg")
    return [torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1).float() / 255 for name in names]


def _numbers(glyphs: Tensor, pictures: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    uniform = partial(_uniform, generator=generator)
    labels = torch.arange(count)[torch.randperm(count, generator=generator)] % 10  # balanced
    font = torch.randint(len(glyphs), (count,), generator=generator)
    # one placement for the whole number: the neighbors follow the digit in the middle
    scale, angle = uniform(count, 0.6, 0.95), uniform(count, -0.25, 0.25)
    shear, bend = uniform(count, -0.25, 0.25), uniform(count, -0.2, 0.2)
    x, y = uniform(count, -0.12, 0.12), uniform(count, -0.12, 0.12)
    ink = _placed(glyphs[font, labels], scale, angle, shear, bend, x, y)  # [N, 32, 32]
    for side in (-1, 1):
        digit = torch.randint(10, (count,), generator=generator)
        there = uniform(count, 0, 1) < 0.7
        distance = side * scale * uniform(count, 0.85, 1.05)
        ink = torch.maximum(
            ink, there[:, None, None] * _placed(glyphs[font, digit], scale, angle, shear, bend, x + distance, y)
        )
    ground = torch.empty(count, 3, SIDE, SIDE)
    which = torch.randint(len(pictures), (count,), generator=generator)
    for i, picture in enumerate(pictures):
        rows = which == i
        size = uniform(int(rows.sum()), 20, 120)
        height, width = picture.shape[1:]
        left = uniform(len(size), 0, 1) * (width - size)
        top = uniform(len(size), 0, 1) * (height - size)
        turns = torch.zeros(len(size), dtype=torch.long)
        ground[rows] = _crops(picture, left, top, size, turns, turns)
    mean = ground.mean(dim=(2, 3), keepdim=True)
    ground = mean + (ground - mean) * uniform(count, 0.3, 1.0)[:, None, None, None]
    direction = torch.where(mean.mean(1, keepdim=True) > uniform(count, 0.3, 0.7)[:, None, None, None], -1.0, 1.0)
    tint = uniform(count * 3, -0.15, 0.15).view(count, 3, 1, 1)
    color = (mean + direction * uniform(count, 0.15, 0.6)[:, None, None, None] + tint).clamp(0, 1)
    images = ground + ink[:, None] * (color - ground)
    images = _blurred(images, uniform(count, 0, 1))
    images = images + uniform(count, 0, 0.08)[:, None, None, None] * torch.randn(images.shape, generator=generator)
    return _levels(images), labels


def _placed(masks: Tensor, scale: Tensor, angle: Tensor, shear: Tensor, bend: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Masks [N, S, S] under a random perspective [N, 32, 32]; positions in half widths of the image from its center."""
    axis = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")  # [32, 32]
    u, v = u - x[:, None, None], v - y[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    across, down = cos * u + sin * v, cos * v - sin * u
    across = across + shear[:, None, None] * down
    depth = (1 + bend[:, None, None] * across) * scale[:, None, None]
    grid = torch.stack([across / depth, down / depth], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


# patches: photographs and micrographs

PICTURES = (
    "brick.png", "chelsea.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg",
)  # fmt: skip
"""Files that scikit-image ships; a class each."""
BLOCKS = 6
"""Every picture is cut into BLOCKS x BLOCKS blocks; a block belongs to one split."""
SHARES = {"train": 23, "val": 4, "test": 9}
"""Blocks per split."""


def patches() -> Rendered:
    """Crops of ten photographs and micrographs, a class each; the splits come from disjoint regions: EuroSAT's setting.

    Scale, orientation, saturation, color balance, brightness, contrast and noise are random.

    Raises:
        UserError: scikit-image is not installed.
    """
    pictures = [_picture(name) for name in PICTURES]
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {split: [] for split in SIZES}
    for label, picture in enumerate(pictures):
        for split, blocks in block_split(label).items():
            generator = _generator("patches", split, label)
            count = SIZES[split] // len(PICTURES)
            parts[split].append((_patches(picture, blocks, count, generator), torch.full((count,), label)))
    made = {}
    for split, part in parts.items():
        order = torch.randperm(SIZES[split], generator=_generator("patches", split, "order"))
        made[split] = torch.cat([images for images, _ in part])[order], torch.cat([labels for _, labels in part])[order]
    return made


def block_split(label: int) -> dict[str, Tensor]:
    """The blocks of each split in the picture of a class: {split: [blocks] numbers from 0 to BLOCKS^2 - 1}."""
    order = torch.randperm(BLOCKS**2, generator=_generator("patches", "blocks", label))
    return dict(zip(SHARES, order.split(list(SHARES.values())), strict=True))


def _picture(name: str) -> Tensor:
    """A picture of scikit-image [3, H, W], 0 to 1; large ones are reduced by averaging whole squares of pixels."""
    from PIL import Image

    try:
        import skimage.data

        opened = Image.open(Path(skimage.data.__file__).parent / name)
    except (ImportError, FileNotFoundError):
        raise UserError("the task 'patches' needs scikit-image >= 0.22: pip install 'weightspace[data]'") from None
    with opened as image:
        image = image.convert("RGB").reduce(max(min(image.size) // 400, 1))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _patches(picture: Tensor, blocks: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random crops, each from inside one of some blocks of a picture [count, 3, 32, 32] uint8."""
    uniform = partial(_uniform, generator=generator)
    height, width = picture.shape[1] // BLOCKS, picture.shape[2] // BLOCKS
    block = blocks[torch.randint(len(blocks), (count,), generator=generator)]
    size = uniform(count, 0.5, 1) * min(height, width)
    left = block % BLOCKS * width + uniform(count, 0, 1) * (width - size)
    top = block // BLOCKS * height + uniform(count, 0, 1) * (height - size)
    turns = torch.randint(4, (count,), generator=generator)
    images = _crops(picture, left, top, size, turns, torch.randint(2, (count,), generator=generator), 2 * SIDE)
    images = F.avg_pool2d(images, 2)  # crops are up to three times as large
    gray = images.mean(1, keepdim=True)
    images = gray + uniform(count, 0.3, 0.9)[:, None, None, None] * (images - gray)
    images = images * uniform(count * 3, 0.9, 1.1).view(count, 3, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    target = mean + 0.3 * (uniform(count, 0.3, 0.7)[:, None, None, None] - mean)
    images = target + (images - mean) * uniform(count, 0.7, 1.3)[:, None, None, None]
    images = images + uniform(count, 0, 0.03)[:, None, None, None] * torch.randn(images.shape, generator=generator)
    return _levels(images)


# both


def _crops(
    picture: Tensor, left: Tensor, top: Tensor, size: Tensor, turns: Tensor, mirrored: Tensor, side: int = SIDE
) -> Tensor:
    """Square crops of a picture [3, H, W], turned by quarter turns, mirrored, sampled to one side [N, 3, side, side].

    Pixels between left and left + size (top and top + size) are used, and no others.
    """
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    u = torch.where(mirrored[:, None, None] == 1, -u, u.expand(len(left), -1, -1))
    angle = turns * torch.pi / 2
    cos, sin = angle.cos().round()[:, None, None], angle.sin().round()[:, None, None]
    across, down = cos * u - sin * v, sin * u + cos * v  # -1 to 1 within the crop
    half = (size / 2)[:, None, None] - 0.5  # from center to the outermost pixel centers
    x = left[:, None, None] + size[:, None, None] / 2 + across * half
    y = top[:, None, None] + size[:, None, None] / 2 + down * half
    height, width = picture.shape[1:]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)
    return F.grid_sample(picture.expand(len(left), -1, -1, -1), grid, align_corners=False, padding_mode="border")


def _blurred(images: Tensor, amount: Tensor) -> Tensor:
    """Images between sharp (amount 0) and blurred with a 5x5 binomial kernel (amount 1)."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 5, 5)
    soft = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])
    return images + amount[:, None, None, None] * (soft - images)


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _levels(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _generator(*names: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed("rendered", VERSION, *names))


def rendered(render: Callable[[], Rendered], *packages: str) -> Rendered:
    """What `render` makes, from the cache where it is there and whole.

    Args:
        render: `street` or `patches`.
        packages: what it depends on besides torch, matplotlib, scikit-learn and pillow.
    """
    versions = "-".join(_version(name) for name in ("torch", "matplotlib", "scikit-learn", "pillow", *packages))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = home / "weightspace" / "tasks" / f"{render.__name__}-{VERSION}-{versions}.safetensors"
    try:
        found = load_file(file)
        return {split: (found[f"{split}.images"], found[f"{split}.labels"]) for split in SIZES}
    except (OSError, SafetensorError, KeyError):  # absent or damaged
        made = render()
    try:
        write_tensors(
            file, {f"{s}.{k}": v for s, pair in made.items() for k, v in zip(("images", "labels"), pair, strict=True)}
        )
    except OSError as error:
        notice(f"the rendered task cannot be kept in {file.parent} ({error.strerror}); it is made again next time")
    return made


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # `render` says who needs it
        return "none"
