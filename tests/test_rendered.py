"""The tasks that are made here: the same in every process, balanced, with splits that share no pixel."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from weightspace.runs import UserError
from weightspace.tasks import rendered as module
from weightspace.tasks.images import load_task
from weightspace.tasks.rendered import BLOCKS, PICTURES, SIZES, Rendered, block_split, patches, rendered, street

TASKS = {"street": street, "patches": patches}


def digest(made: Rendered) -> str:
    parts = [part.numpy().tobytes() for split in made.values() for part in split]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.fixture(scope="module")
def made() -> dict[str, Rendered]:
    return {"street": rendered(street), "patches": rendered(patches, "scikit-image")}


@pytest.mark.parametrize("name", TASKS)
def test_sizes_and_balance(made: dict[str, Rendered], name: str) -> None:
    for split, size in SIZES.items():
        images, labels = made[name][split]
        assert images.shape == (size, 3, 32, 32) and images.dtype == torch.uint8
        assert torch.equal(torch.bincount(labels), torch.full((10,), size // 10))
        assert labels[: size // 10].unique().numel() == 10  # shuffled


@pytest.mark.parametrize("name", TASKS)
def test_no_image_is_in_two_splits(made: dict[str, Rendered], name: str) -> None:
    images = [row.numpy().tobytes() for split in SIZES for row in made[name][split][0]]
    assert len(set(images)) == len(images) == sum(SIZES.values())


def small() -> str:
    """A digest of both tasks with few images."""
    module.SIZES.update(train=40, val=10, test=10)
    return " ".join(digest(render()) for render in TASKS.values())


def test_every_process_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one with another number of threads."""
    monkeypatch.setattr(module, "SIZES", dict(SIZES))
    threads = 3 - min(torch.get_num_threads(), 2)
    code = (
        f"import sys, torch; torch.set_num_threads({threads}); sys.path.insert(0, 'tests'); import test_rendered;"
        "print(test_rendered.small())"
    )
    root = Path(__file__).parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == small()


def test_a_cropped_pixel_belongs_to_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the blocks of one split bright and the rest dark: its crops are bright all over, the others dark."""
    monkeypatch.setattr(module, "_levels", lambda images: images)
    for label, (height, width) in enumerate([(300, 451), (436, 500), (600, 601)]):
        split = block_split(label)
        assert sorted(torch.cat(list(split.values())).tolist()) == list(range(BLOCKS**2))  # a partition
        for chosen in SIZES:
            picture = torch.zeros(3, height, width)
            for block in split[chosen].tolist():
                y, x = block // BLOCKS * (height // BLOCKS), block % BLOCKS * (width // BLOCKS)
                picture[:, y : y + height // BLOCKS, x : x + width // BLOCKS] = 1
            for other in SIZES:
                plain = crops(picture, split[other], monkeypatch)
                assert torch.allclose(plain, torch.full_like(plain, float(other == chosen)), atol=1e-5)


def crops(picture: Tensor, blocks: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The crops of 200 patches before they are recolored."""
    seen: list[Tensor] = []
    original: Callable[..., Tensor] = module._crops

    def keep(*args: object) -> Tensor:
        seen.append(original(*args))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_crops", keep)
        module._patches(picture, blocks, 200, torch.Generator().manual_seed(0))
    return seen[0]


def test_pictures_are_reduced_by_whole_squares() -> None:
    """So that no pixel of the original enters two blocks."""
    import skimage.data
    from PIL import Image

    with Image.open(Path(skimage.data.__file__).parent / "retina.jpg") as image:
        original = np.asarray(image.convert("RGB"), dtype=float)
    reduced = module._picture("retina.jpg").permute(1, 2, 0).numpy() * 255
    for y, x in [(100, 200), (333, 17)]:
        assert np.abs(reduced[y, x] - original[3 * y : 3 * y + 3, 3 * x : 3 * x + 3].mean((0, 1))).max() < 1


def test_color_does_not_give_the_class_away() -> None:
    """A linear rule on the mean color is far from what convolutional networks reach (more than .8, docs/tasks.md)."""
    from sklearn.linear_model import LogisticRegression

    for name, most in {"street": 0.15, "patches": 0.5}.items():
        task = load_task(name)
        train, test = task.train.images.mean((2, 3)), task.test.images.mean((2, 3))
        score = LogisticRegression(max_iter=500).fit(train, task.train.labels).score(test, task.test.labels)
        assert score < most


def test_the_cache_is_used_and_made_anew_where_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def tiny() -> Rendered:
        calls.append(1)
        return {split: (torch.full((1, 3, 2, 2), 7, dtype=torch.uint8), torch.zeros(1).long()) for split in SIZES}

    first, again = rendered(tiny), rendered(tiny)
    assert len(calls) == 1 and digest(first) == digest(again)
    (file,) = (tmp_path / "weightspace" / "tasks").iterdir()
    assert torch.__version__ in file.name and file.name.startswith("tiny-")
    file.write_bytes(file.read_bytes()[:40])
    assert digest(rendered(tiny)) == digest(first) and len(calls) == 2
    assert digest(rendered(tiny)) == digest(first) and len(calls) == 2
    blocked = tmp_path / "blocked"
    blocked.write_text("")  # a cache that cannot be written, for root too
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert digest(rendered(tiny)) == digest(first) and len(calls) == 3
    assert "made again next time" in capsys.readouterr().err


def test_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(UserError, match=r"'patches' needs scikit-image.*pip install 'weightspace\[data\]'"):
        patches()
    assert len(PICTURES) == 10
