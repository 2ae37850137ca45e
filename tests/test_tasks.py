"""Image tasks, against scikit-learn's copy of the digits and files written here as the hub writes them; query sets."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from weightspace.config import SCALES, ZooConfig
from weightspace.runs import UserError
from weightspace.studies import shaped
from weightspace.tasks import images as module
from weightspace.tasks.images import IMAGENET, SOURCES, ImageTask, Source, load_task, pictures, resized
from weightspace.tasks.queries import QuerySet, query_set
from weightspace.zoo.population import architecture_of

SIZES = {"train": 1077, "val": 270, "test": 450}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def digits() -> ImageTask:
    return load_task("digits")


# digits


def test_sizes_and_types(digits: ImageTask) -> None:
    assert {name: len(digits.split(name).labels) for name in SIZES} == SIZES
    assert digits.input_shape == (1, 8, 8)
    assert digits.classes == 10
    for name, size in SIZES.items():
        split = digits.split(name)
        assert split.images.shape == (size, 1, 8, 8) and split.images.dtype == torch.float32
        assert split.labels.shape == (size,) and split.labels.dtype == torch.int64


def test_splits_are_stratified(digits: ImageTask) -> None:
    _, labels = load_digits(return_X_y=True)
    shares = np.bincount(labels) / len(labels)
    for name, size in SIZES.items():
        counts = np.bincount(digits.split(name).labels.numpy(), minlength=10)
        assert np.abs(counts - shares * size).max() <= 1.5  # one image of rounding per cut


def test_splits_are_a_partition_of_the_digits(digits: ImageTask) -> None:
    """Undo the normalization: the splits hold every image of scikit-learn once, with its label."""
    original, labels = load_digits(return_X_y=True)
    images = torch.cat([digits.split(name).images for name in SIZES]).flatten(1).double().numpy()
    low, high = images.min(), images.max()  # pixels of the digits run from 0 to 16
    pixels = np.rint((images - low) / (high - low) * 16).astype(int)
    found = np.column_stack([pixels, torch.cat([digits.split(name).labels for name in SIZES]).numpy()])
    expected = np.column_stack([original.astype(int), labels])
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    assert len(set(map(tuple, expected))) == len(expected)  # no duplicates, so equality means disjoint splits


def test_normalized_by_the_training_images(digits: ImageTask) -> None:
    train = digits.train.images.double()
    assert abs(train.mean().item()) < 1e-5
    assert abs(train.std(correction=0).item() - 1) < 1e-5
    assert abs(digits.test.images.double().mean().item()) > 1e-4  # not by its own


def test_splits_are_fixed(digits: ImageTask) -> None:
    again = load_task.__wrapped__("digits")
    for name in SIZES:
        assert torch.equal(digits.split(name).images, again.split(name).images)
        assert torch.equal(digits.split(name).labels, again.split(name).labels)


@pytest.mark.parametrize(
    "name",
    ["minst", "", "digits@", "digits@2x8x8", "digits@1x8", "digits@1x0x8", "@1x8x8", "mnist:", "folder:", "street:x"],
)
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"unknown task '.*'; the tasks are digits, street, .*folder:FOLDER"):
        load_task(name)


def test_unknown_split(digits: ImageTask) -> None:
    with pytest.raises(UserError, match=r"task 'digits' has no split 'unseen'; it has train, val, test"):
        digits.split("unseen")


def test_pictures(digits: ImageTask) -> None:
    sheet = pictures(digits, 3)
    assert sheet.shape == (10, 3, 1, 8, 8) and sheet.min() == 0 and sheet.max() == 1
    original, labels = load_digits(return_X_y=True)
    for label in range(10):
        known = {tuple(row) for row in original[labels == label]}
        assert all(tuple(np.rint(16 * image.flatten().numpy())) in known for image in sheet[label])


# shapes


def test_resizing_averages_areas_down_and_interpolates_up() -> None:
    images = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resized(images, (3, 4, 6)), F.avg_pool2d(images, (3, 2)))
    larger = F.interpolate(images, (32, 17), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized(images, (3, 32, 17)), larger)
    assert torch.equal(resized(images, (3, 12, 12)), images)
    thirds = resized(torch.tensor([[[[0.0, 3.0, 9.0]]]]), (1, 1, 2))  # by hand: pixels of one and a half
    torch.testing.assert_close(thirds.flatten(), torch.tensor([(0 + 1.5) / 1.5, (1.5 + 9) / 1.5]))


def test_colors_become_gray_by_luminance_and_gray_is_repeated() -> None:
    image = torch.tensor([[[[100.0]], [[200.0]], [[50.0]]]])
    torch.testing.assert_close(resized(image, (1, 1, 1)).item(), 0.299 * 100 + 0.587 * 200 + 0.114 * 50)
    assert torch.equal(resized(image[:, :1], (3, 1, 1)).flatten(), torch.tensor([100.0, 100.0, 100.0]))


def test_tasks_of_another_shape_keep_split_and_normalization(digits: ImageTask) -> None:
    small = load_task("digits@1x4x4")
    assert small.input_shape == (1, 4, 4) and small.name == "digits@1x4x4"
    for name in SPLITS:
        assert torch.equal(small.split(name).labels, digits.split(name).labels)
        pooled = F.avg_pool2d(digits.split(name).images, 2)
        scale = F.avg_pool2d(digits.train.images, 2).std(correction=0)
        torch.testing.assert_close(small.split(name).images, pooled / scale, atol=1e-4, rtol=1e-4)
    wide = load_task("digits@3x32x32")
    assert wide.input_shape == (3, 32, 32) and torch.equal(wide.train.images[:, 0], wide.train.images[:, 2])
    assert abs(wide.train.images.std().item() - 1) < 1e-3


# files


def noise_images(count: int, shape: Sequence[int], seed: int) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def png(image: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes],
    labels: Sequence[Any],
    column: str = "label",
    image: str = "image",
    names: Any = (),
) -> None:
    """As the hub stores images: a struct of bytes and path, and the features in the metadata of the schema."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    coded = pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)], kind)
    table = pa.table({image: coded, column: pa.array(labels)})
    label: dict[str, Any] = (
        {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    )
    features = {"info": {"features": {image: {"_type": "Image"}, column: label}}}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def cifar(
    folder: Path, train: int = 100, test: int = 20
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """A small CIFAR-10 in the hub's layout: training images in two files."""
    first, second = noise_images(train, (32, 32, 3), 1), noise_images(test, (32, 32, 3), 2)
    labels = [i % 10 for i in range(train)]
    half = train // 2
    root = folder / "plain_text"
    write_parquet(root / "train-00000-of-00002.parquet", list(map(png, first[:half])), labels[:half], image="img")
    write_parquet(root / "train-00001-of-00002.parquet", list(map(png, first[half:])), labels[half:], image="img")
    write_parquet(root / "test-00000-of-00001.parquet", list(map(png, second)), labels[:test], image="img")
    return first, second


def levels(task: ImageTask, split: str) -> torch.Tensor:
    return (task.split(split).images * IMAGENET[1] + IMAGENET[0]).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_a_published_task_from_parquet_files(tmp_path: Path) -> None:
    first, second = cifar(tmp_path)
    task = load_task(f"cifar10:{tmp_path}")
    assert task.classes == 10 and task.input_shape == (3, 32, 32)
    assert [len(task.split(name).labels) for name in SPLITS] == [90, 10, 20]
    assert torch.equal(torch.bincount(task.val.labels), torch.ones(10).long())  # stratified
    assert np.array_equal(levels(task, "test").numpy(), np.stack(second))  # ImageNet's mean and deviation, undone
    found = {tuple(image.flatten().tolist()) for name in ("train", "val") for image in levels(task, name)}
    assert found == {tuple(image.flatten().tolist()) for image in first}
    where = {tuple(image.flatten().tolist()): i % 10 for i, image in enumerate(first)}
    for image, label in zip(levels(task, "train"), task.train.labels.tolist(), strict=True):
        assert where[tuple(image.flatten().tolist())] == label


def test_the_hub_gives_the_same_as_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own reader stands in for the network."""
    import datasets

    cifar(tmp_path)
    files = {split: [str(path) for path in sorted(tmp_path.rglob(f"{split}-*"))] for split in ("train", "test")}
    asked = []

    def load(*args: object) -> Any:
        asked.append(args)
        read = {
            k: datasets.Dataset.from_parquet(paths, cache_dir=str(tmp_path / "cache")) for k, paths in files.items()
        }
        return datasets.DatasetDict(read)  # pyright: ignore

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    there, here = load_task.__wrapped__("cifar10"), load_task(f"cifar10:{tmp_path}")
    assert asked == [("uoft-cs/cifar10", None)]
    for name in SPLITS:
        assert torch.equal(there.split(name).images, here.split(name).images)
        assert torch.equal(there.split(name).labels, here.split(name).labels)


@pytest.mark.parametrize("name", SOURCES)
def test_published_sizes(name: str) -> None:
    """Arithmetic of the split rules on the official counts, against the published ones."""
    official = {
        "svhn": (73257, 26032), "cifar10": (50000, 10000), "cifar100": (50000, 10000), "eurosat": (27000, 0),
        "stl10": (5000, 8000), "mnist": (60000, 10000), "fashion_mnist": (60000, 10000), "usps": (7291, 2007),
    }  # fmt: skip
    published = {
        "svhn": (65931, 7326, 26032), "cifar10": (45000, 5000, 10000), "cifar100": (45000, 5000, 10000),
        "eurosat": (21600, 1350, 4050), "stl10": (4500, 500, 8000), "mnist": (54000, 6000, 10000),
        "fashion_mnist": (54000, 6000, 10000), "usps": (6562, 729, 2007),
    }  # fmt: skip
    source: Source = SOURCES[name]
    train, test = official[name]
    val, pooled = round(source.val * train), round(source.pooled_test * train)
    assert (train - val - pooled, val, pooled or test) == published[name]


def test_a_pooled_task_is_split_anew(tmp_path: Path) -> None:
    """EuroSAT's 64x64 images, averaged to 32x32, in another split than the files'."""
    original = noise_images(200, (64, 64, 3), 3)
    for split, rows in {"train": range(120), "validation": range(120, 160), "test": range(160, 200)}.items():
        write_parquet(
            tmp_path / "data" / f"{split}-0.parquet", [png(original[i]) for i in rows], [i % 10 for i in rows]
        )
    task = load_task(f"eurosat:{tmp_path}")
    assert [len(task.split(name).labels) for name in SPLITS] == [160, 10, 30]
    assert torch.equal(torch.bincount(task.test.labels), torch.full((10,), 3))
    averaged = np.stack(original).reshape(200, 32, 2, 32, 2, 3).mean((2, 4))
    everything = torch.cat([levels(task, name) for name in SPLITS]).double().flatten(1)
    distance = torch.cdist(everything, torch.from_numpy(averaged).flatten(1), p=float("inf"))
    assert torch.equal(distance.argmin(1).sort().values, torch.arange(200)) and distance.min(1).values.max() <= 0.5


def test_gray_tasks_are_normalized_by_their_training_images(tmp_path: Path) -> None:
    for split, count in {"train": 100, "test": 20}.items():
        images = [png(image) for image in noise_images(count, (16, 16), 4)]
        write_parquet(tmp_path / f"{split}-0.parquet", images, [i % 10 for i in range(count)])
    task = load_task(f"usps:{tmp_path}")
    assert task.input_shape == (1, 28, 28)
    assert abs(task.train.images.mean().item()) < 1e-4 and abs(task.train.images.std(correction=0).item() - 1) < 1e-4
    assert load_task(f"usps:{tmp_path}@3x32x32").input_shape == (3, 32, 32)


def write_folder(
    root: Path, splits: dict[str, int], classes: Sequence[str] = ("cat", "dog"), shape: Any = (6, 5, 3)
) -> None:
    for split, count in splits.items():
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(noise_images(count, shape, number)):
                Image.fromarray(image // 2 + 100 * (number % 2)).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize(("size", "network"), [(8, "CNN8"), (28, "CNN"), (32, "CNN3")])
def test_a_study_of_own_images_takes_the_network_of_their_size(size: int, network: str, tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 20, "test": 3}, shape=(size, size, 3))
    name = shaped(f"folder:{tmp_path}")
    assert name == f"folder:{tmp_path}@3x{size}x{size}" and shaped(name) == name
    base = SCALES["small"](name)
    assert base.zoo.network == network
    assert architecture_of(base.zoo, load_task(name)).name == network  # it takes them
    with pytest.raises(UserError, match=rf"of a study: --task folder:{tmp_path}@3x5x5"):
        architecture_of(ZooConfig(network="MLP", arguments=("size=5",)), load_task(name))


def test_own_images_in_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 20, "test": 3})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    task = load_task(f"folder:{tmp_path}")
    assert task.class_names == ("cat", "dog") and task.classes == 2 and task.input_shape == (3, 6, 5)
    assert [len(task.split(name).labels) for name in SPLITS] == [36, 4, 6]  # val: 10 % of train
    assert task.val.labels.bincount().tolist() == [2, 2]
    bright = task.train.images.mean((1, 2, 3))
    assert bright[task.train.labels == 1].min() > bright[task.train.labels == 0].max()
    for channel in task.train.images.unbind(1):
        assert abs(channel.mean().item()) < 1e-5 and abs(channel.std(correction=0).item() - 1) < 1e-5
    for name in ("val", "valid", "validation"):
        other = tmp_path / f"own-{name}"
        write_folder(other, {"train": 20, name: 5, "test": 3})
        assert len(load_task(f"folder:{other}@1x4x4").val.labels) == 10


def test_own_images_in_parquet_files(tmp_path: Path) -> None:
    """Class names come from the label feature or from labels that are text; images may be gray."""
    images = [png(image) for image in noise_images(20, (5, 5), 0)]
    for split in ("train", "test"):
        write_parquet(tmp_path / "a" / f"{split}.parquet", images, [i % 2 for i in range(20)], names=("no", "yes"))
        write_parquet(tmp_path / "b" / f"{split}.parquet", images, ["9", "10"] * 10, column="kind")
    first, second = load_task(f"folder:{tmp_path / 'a'}"), load_task(f"folder:{tmp_path / 'b'}")
    assert first.class_names == ("no", "yes") and second.class_names == ("9", "10")
    assert torch.equal(first.train.labels, second.train.labels) and first.input_shape == (1, 5, 5)
    assert torch.equal(first.train.images, second.train.images)


def test_numbered_folders_keep_their_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 2, "test": 1}, classes=[str(i) for i in range(11)], shape=(4, 4))
    assert load_task(f"folder:{tmp_path}").class_names == tuple(str(i) for i in range(11))


# what is wrong with files


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        load_task(f"cifar10:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"holds no images"):
        load_task(f"folder:{tmp_path}")
    write_folder(tmp_path, {"train": 4})
    with pytest.raises(UserError, match=r"has no images of split 'test', only of train"):
        load_task(f"folder:{tmp_path}")
    write_folder(tmp_path, {"test": 1}, classes=("cat", "dog", "eel"))
    with pytest.raises(UserError, match=r"class 2 \(eel\) has 0 training images; each of the 3 classes needs two"):
        load_task(f"folder:{tmp_path}")
    cifar(tmp_path / "cifar")
    empty = pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
    pq.write_table(empty, tmp_path / "cifar" / "plain_text" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"has no images of split 'test', only of train"):
        load_task(f"cifar10:{tmp_path / 'cifar'}")


@pytest.mark.parametrize("kept", [0, 3, 200])
def test_corrupt_files_are_named(tmp_path: Path, kept: int) -> None:
    cifar(tmp_path)
    path = tmp_path / "plain_text" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"test-00000-of-00001.parquet is not a readable Parquet file"):
        load_task(f"cifar10:{tmp_path}")
    images = tmp_path / "images"
    write_folder(images, {"train": 4, "test": 2}, shape=(20, 20, 3))
    path = images / "test" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"dog/1.png is not a readable image"):
        load_task(f"folder:{images}")


def test_a_pickle_that_is_called_an_image_is_not_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    write_folder(tmp_path, {"train": 4, "test": 2})
    (tmp_path / "train" / "cat" / "0.png").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"cat/0.png is not a readable image"):
        load_task(f"folder:{tmp_path}")
    assert not (tmp_path / "ran").exists()


def test_wrong_columns_and_labels_are_named(tmp_path: Path) -> None:
    images = [png(image) for image in noise_images(40, (8, 8, 3), 0)]
    labels = [i % 10 for i in range(40)]

    def attempt(problem: str, train: Sequence[Any], expected: str, **options: Any) -> None:
        folder = tmp_path / problem
        write_parquet(folder / "train-0.parquet", options.pop("images", images), train, **options)
        write_parquet(folder / "test-0.parquet", images, labels)
        with pytest.raises(UserError, match=expected):
            load_task(f"cifar10:{folder}")

    attempt(
        "column",
        labels,
        r"train-0.parquet: no column 'label' of whole numbers or text, only image, kind",
        column="kind",
    )
    attempt("float", [float(i) for i in labels], r"no column 'label' of whole numbers")
    attempt("range", [*labels[:-1], 10], r"split 'train' has the label 10; labels are 0 to 9")
    attempt("negative", [*labels[:-1], -1], r"split 'train' has the label -1")
    attempt("absent", [i % 9 for i in range(40)], r"class 9 has 0 training images")
    attempt("null", [*labels[:-1], None], r"train-0.parquet, row 39 has no label")
    attempt("empty", labels, r"train-0.parquet, row 0 has no image", images=[None, *images[1:]])
    attempt("broken", labels, r"train-0.parquet, row 1 is not a readable image", images=[images[0], b"?", *images[2:]])
    folder = tmp_path / "numbers"
    folder.mkdir()
    pq.write_table(pa.table({"pixels": [1], "label": [0]}), folder / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet: no column of images .*only pixels, label"):
        load_task(f"cifar10:{folder}")


def test_images_of_differing_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, {"train": 4, "test": 2})
    Image.new("RGB", (9, 6)).save(tmp_path / "train" / "dog" / "2.png")
    with pytest.raises(UserError, match=r"dog/2.png is 9 wide and 6 high, the first image 5 and 6; .*@3x6x5"):
        load_task(f"folder:{tmp_path}")
    assert load_task(f"folder:{tmp_path}@3x6x5").input_shape == (3, 6, 5)


def test_one_class_and_deep_pixels(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", {"train": 4, "test": 2}, classes=("cat",))
    with pytest.raises(UserError, match=r"holds images of one class"):
        load_task(f"folder:{tmp_path / 'one'}")
    write_folder(tmp_path / "deep", {"train": 4, "test": 2})
    Image.fromarray(np.full((6, 5), 40_000, dtype=np.uint16)).save(tmp_path / "deep" / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"cat/0.png has pixels of mode 'I;16'; convert it to 8 bits"):
        load_task(f"folder:{tmp_path / 'deep'}")


def test_neither_network_nor_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    before = constants.HF_HUB_OFFLINE
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"'svhn' cannot be downloaded .*weightspace\[data\].*svhn:FOLDER"):
        load_task("svhn")
    assert time.perf_counter() - start < 15
    assert before == constants.HF_HUB_OFFLINE  # the next attempt asks again


def test_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'stl10' needs the package datasets: pip install 'weightspace\[data\]'"):
        load_task("stl10")


# query sets


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_query_sets(digits: ImageTask) -> None:
    train = digits.train.images
    (own,) = query_set("own", digits, [digits], seeded(1)).sources
    assert torch.equal(own, train)
    (noise,) = query_set("noise", digits, [digits], seeded(1)).sources
    assert noise.shape == train.shape
    low, high = train.min(), train.max()
    assert noise.min() >= low and noise.max() <= high
    quarters = torch.histc(noise, 4, min=low.item(), max=high.item()) / noise.numel()
    assert (quarters - 0.25).abs().max() < 0.01  # uniform over the whole range
    assert not torch.equal(noise, query_set("noise", digits, [digits], seeded(2)).sources[0])
    both = query_set("own+noise", digits, [digits], seeded(1)).sources
    assert torch.equal(both[0], train) and torch.equal(both[1], noise)
    cut = ImageTask("cut", 10, digits.val, digits.val, digits.test)
    several = query_set("tasks+digits@1x8x8+noise", digits, [digits, cut], seeded(1)).sources
    assert [len(source) for source in several] == [1077, 270, 1077, 1077]  # one per task of the zoo
    assert torch.equal(several[1], cut.train.images)
    assert torch.equal(several[2], load_task("digits@1x8x8").train.images)


def test_foreign_queries_must_fit(digits: ImageTask) -> None:
    with pytest.raises(UserError, match=r"shape \(3, 4, 4\), .*\(1, 8, 8\); resize .* digits@1x8x8"):
        query_set("own+digits@3x4x4", digits, [digits], seeded())
    with pytest.raises(
        UserError, match=r"query set 'own\+nois' \(own, tasks, mixed, noise, invented or a task's name, .*unknown task"
    ):
        query_set("own+nois", digits, [digits], seeded())


def numbered(*sizes: int) -> QuerySet:
    return QuerySet(tuple(100 * i + torch.arange(float(size)).view(size, 1, 1, 1) for i, size in enumerate(sizes)))


def test_draw_from_one_source_gives_different_rows() -> None:
    queries, generator = numbered(20), seeded()
    first, second = queries.draw(8, generator), queries.draw(8, generator)
    assert first.shape == (8, 1, 1, 1)
    assert first.unique().numel() == second.unique().numel() == 8
    assert not torch.equal(first, second)
    assert torch.equal(first, queries.sources[0][torch.randperm(20, generator=seeded())[:8]])
    seen = torch.cat([queries.draw(8, generator).flatten() for _ in range(30)])
    assert seen.unique().numel() == 20  # no row is out of reach


def test_draw_balances_sources() -> None:
    drawn = numbered(20, 30, 5).draw(11, seeded()).flatten()
    assert (drawn // 100).long().bincount().tolist() == [4, 4, 3]
    assert drawn.unique().numel() == 11
    scarce = numbered(20, 5).draw(26, seeded()).flatten()
    assert (scarce // 100).long().bincount().tolist() == [13, 13]
    counts = (scarce[13:] - 100).long().bincount(minlength=5)
    assert counts.tolist().count(3) == 3 and counts.tolist().count(2) == 2  # all of them before any again
