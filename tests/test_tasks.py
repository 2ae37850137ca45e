"""Image tasks and query sets, against scikit-learn's own copy of the digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from weightspace.runs import UserError
from weightspace.tasks.images import ImageTask, load_task
from weightspace.tasks.queries import draw, query_set

SIZES = {"train": 1077, "val": 270, "test": 450}


@pytest.fixture(scope="module")
def digits() -> ImageTask:
    return load_task("digits")


def test_sizes_and_types(digits: ImageTask) -> None:
    assert {name: len(digits.split(name).labels) for name in SIZES} == SIZES
    assert digits.image_shape == (1, 8, 8)
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
    again = load_task("digits")
    for name in SIZES:
        assert torch.equal(digits.split(name).images, again.split(name).images)
        assert torch.equal(digits.split(name).labels, again.split(name).labels)


def test_unknown_names_are_answered_with_the_known_ones(digits: ImageTask) -> None:
    with pytest.raises(UserError, match=r"unknown task 'minst'; the tasks are .*digits"):
        load_task("minst")
    with pytest.raises(UserError, match=r"task 'digits' has no split 'unseen'; it has train, val, test"):
        digits.split("unseen")
    with pytest.raises(UserError, match=r"unknown query set 'svhn'; the query sets are noise, own, union"):
        query_set("svhn", digits, torch.Generator())


def test_query_sets(digits: ImageTask) -> None:
    train = digits.train.images
    assert torch.equal(query_set("own", digits, torch.Generator().manual_seed(1)), train)
    noise = query_set("noise", digits, torch.Generator().manual_seed(1))
    assert noise.shape == train.shape
    low, high = train.min(), train.max()
    assert noise.min() >= low and noise.max() <= high
    quarters = torch.histc(noise, 4, min=low.item(), max=high.item()) / noise.numel()
    assert (quarters - 0.25).abs().max() < 0.01  # uniform over the whole range
    both = query_set("union", digits, torch.Generator().manual_seed(1))
    assert torch.equal(both, torch.cat([train, noise]))
    assert not torch.equal(noise, query_set("noise", digits, torch.Generator().manual_seed(2)))


def test_draw_gives_different_rows() -> None:
    queries = torch.arange(20.0).view(20, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    first, second = draw(queries, 8, generator), draw(queries, 8, generator)
    assert first.shape == (8, 1, 1, 1)
    assert first.unique().numel() == second.unique().numel() == 8
    assert not torch.equal(first, second)
    assert torch.equal(first, draw(queries, 8, torch.Generator().manual_seed(0)))
    everything = draw(queries, 50, generator)
    assert torch.equal(everything.flatten().sort().values, torch.arange(20.0))
    seen = torch.cat([draw(queries, 8, generator).flatten() for _ in range(30)])
    assert seen.unique().numel() == 20  # no row is out of reach
