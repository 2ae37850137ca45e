"""The spectrum of a zoo: against scikit-learn's PCA, exact with all components, and what networks do with some."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import random_checkpoints
from sklearn.decomposition import PCA
from torch import Tensor

from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints, concatenate, unflatten
from weightspace.runs import UserError
from weightspace.zoo.model_zoo import ModelZoo
from weightspace.zoo.spectrum import Spectrum, choose, components, kept, spectrum_study, variance_along

CNN8 = Architecture("CNN8", {})
SMALL = Architecture("MLP", {"size": 2, "hidden": 2, "classes": 2})


def stretched(architecture: Architecture, count: int, seed: int = 0) -> Checkpoints:
    """Checkpoints whose weights vary far more along some axes than along others, around a mean that is not 0."""
    made = random_checkpoints(architecture, count, seed)
    scales = torch.logspace(0, -3, made.flat().shape[1])
    return dataclasses.replace(made, weights=unflatten(architecture.shapes, made.flat() * scales + 0.5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def train() -> Checkpoints:
    return stretched(CNN8, 24)


@pytest.fixture(scope="module")
def spectrum(train: Checkpoints) -> Spectrum:
    return components(train)


def error(checkpoints: Checkpoints, spectrum: Spectrum, chosen: Tensor) -> Tensor:
    """Squared error of the weights of each reduced network [n]."""
    return (kept(checkpoints, spectrum, chosen).flat() - checkpoints.flat()).square().sum(1)


@pytest.mark.parametrize(("architecture", "count"), [(CNN8, 24), (SMALL, 200)], ids=["n < P", "n > P"])
def test_top_components_are_those_of_scikit_learn(architecture: Architecture, count: int) -> None:
    train, new = stretched(architecture, count), stretched(architecture, 5, seed=1)
    spectrum = components(train)
    assert len(spectrum) == min(count - 1, architecture.parameter_count)
    for k in (1, 4, len(spectrum)):
        pca = PCA(k, svd_solver="full").fit(train.flat().double().numpy())
        expected = pca.inverse_transform(pca.transform(new.flat().double().numpy()))
        found = kept(new, spectrum, choose(spectrum, "top", k, generator()))
        np.testing.assert_allclose(found.flat().numpy(), expected, atol=2e-6)
        np.testing.assert_allclose(spectrum.variance[:k], pca.explained_variance_, rtol=1e-4)
        np.testing.assert_allclose(spectrum.share[:k], pca.explained_variance_ratio_, rtol=1e-4)
    pca = PCA(len(spectrum), svd_solver="full").fit(train.flat().double().numpy())
    expected = np.square(pca.transform(new.flat().double().numpy())).mean(0)
    np.testing.assert_allclose(variance_along(new, spectrum), expected, rtol=1e-3, atol=1e-9)


def test_directions_are_orthonormal_and_variance_falls(spectrum: Spectrum) -> None:
    directions = spectrum.directions.double()
    torch.testing.assert_close(directions @ directions.T, torch.eye(23, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (spectrum.variance.diff() <= 0).all() and (spectrum.variance > 0).all()
    assert float(spectrum.share.sum()) == pytest.approx(1)


def test_all_components_are_exact_on_the_training_checkpoints_only(train: Checkpoints, spectrum: Spectrum) -> None:
    everything = torch.arange(len(spectrum))
    for which in ("top", "bottom", "mixed"):
        assert choose(spectrum, which, len(spectrum), generator()).sort().values.equal(everything)
    torch.testing.assert_close(kept(train, spectrum, everything).flat(), train.flat(), atol=1e-6, rtol=0)
    assert kept(train, spectrum, everything).frame.equals(train.frame)
    assert error(stretched(CNN8, 4, seed=9), spectrum, everything).min() > 1


def test_without_components_every_network_is_the_mean(train: Checkpoints, spectrum: Spectrum) -> None:
    nothing = kept(train, spectrum, torch.arange(0)).flat()
    torch.testing.assert_close(nothing, train.flat().mean(0).expand_as(nothing))


def test_every_further_component_lowers_the_error_of_every_network(train: Checkpoints, spectrum: Spectrum) -> None:
    for checkpoints in (train, stretched(CNN8, 6, seed=3)):
        for which in ("top", "bottom"):
            chosen = [choose(spectrum, which, count, generator()) for count in range(1, 24)]
            errors = torch.stack([error(checkpoints, spectrum, each) for each in chosen])
            assert (errors.diff(dim=0) <= 1e-6).all()
    of_three = {
        which: error(train, spectrum, choose(spectrum, which, 3, generator())).mean()
        for which in ("top", "mixed", "bottom")
    }
    assert of_three["top"] < of_three["mixed"] < of_three["bottom"]


def test_choices(spectrum: Spectrum) -> None:
    assert choose(spectrum, "top", 3, generator()).tolist() == [0, 1, 2]
    assert sorted(choose(spectrum, "bottom", 3, generator()).tolist()) == [20, 21, 22]
    mixed = choose(spectrum, "mixed", 8, generator())
    assert len(set(mixed.tolist())) == 8
    assert mixed.equal(choose(spectrum, "mixed", 8, generator()))
    assert not mixed.equal(choose(spectrum, "mixed", 8, generator(1)))
    with pytest.raises(UserError, match="unknown choice of components 'best'; the choices are top, bottom, mixed"):
        choose(spectrum, "best", 3, generator())
    for count in (0, 24):
        with pytest.raises(UserError, match=f"cannot keep {count} components of 23; keep 1 to 23"):
            choose(spectrum, "top", count, generator())


def test_repeated_checkpoints_add_no_component(train: Checkpoints, spectrum: Spectrum) -> None:
    twice = components(concatenate([train, train]))
    assert len(twice) == len(spectrum) == 23
    torch.testing.assert_close(twice.variance * 47, spectrum.variance * 23 * 2, rtol=1e-4, atol=0)


def test_the_spectrum_of_a_set_is_its_variance_on_its_own_components(train: Checkpoints, spectrum: Spectrum) -> None:
    torch.testing.assert_close(variance_along(train, spectrum), spectrum.variance * 23 / 24, rtol=1e-3, atol=0)
    halved = dataclasses.replace(train, weights=unflatten(CNN8.shapes, (train.flat() + spectrum.mean) / 2))
    torch.testing.assert_close(variance_along(halved, spectrum), spectrum.variance * 23 / 96, rtol=1e-3, atol=0)
    lost = variance_along(kept(train, spectrum, torch.arange(5)), spectrum)
    assert lost[5:].max() < 1e-6 * lost[:5].min()


def test_what_has_no_components(train: Checkpoints, spectrum: Spectrum) -> None:
    with pytest.raises(UserError, match="need checkpoints that differ; given 1 without"):
        components(train.rows([0]))
    with pytest.raises(UserError, match="need checkpoints that differ; given 3 without"):
        components(train.rows([2, 2, 2]))
    weights = {name: weight.clone() for name, weight in train.weights.items()}
    next(iter(weights.values()))[4] = float("nan")
    with pytest.raises(UserError, match="1 of 24 checkpoints have weights that are not finite"):
        components(dataclasses.replace(train, weights=weights))
    with pytest.raises(UserError, match="of networks with 2758 weights, but a MLP has 22; take"):
        kept(stretched(SMALL, 3), spectrum, torch.arange(2))


def test_the_study_of_a_trained_zoo(tiny_zoo: ModelZoo) -> None:
    train, checkpoints = tiny_zoo.select(split="train", epoch=[1, 2]), tiny_zoo.select(split="test", epoch=2)
    images = torch.randn(60, 1, 8, 8, generator=generator())
    labels = torch.arange(60) % 10
    k = len(components(train))
    frame = spectrum_study(train, checkpoints, images, labels, (1, 3, 10**6), generator())
    assert len(frame) == 3 * 3 * len(checkpoints)
    assert sorted(frame["count"].unique()) == [1, 3, k]
    whole = behavior.outputs(checkpoints, images, labels)
    everything = kept(checkpoints, components(train), torch.arange(k))
    again = behavior.outputs(everything, images, labels)
    for which in ("top", "bottom", "mixed"):
        rows = frame[(frame["which"] == which) & (frame["count"] == k)]
        assert rows["share"].to_numpy() == pytest.approx(1)
        assert rows["member"].tolist() == checkpoints.frame["member"].tolist()
        assert rows["test_acc"].to_numpy() == pytest.approx(again.accuracy.numpy(), abs=0.02)
        same = (again.predictions == whole.predictions).float().mean(1)
        assert rows["agreement"].to_numpy() == pytest.approx(same.numpy(), abs=0.02)
    share = frame.groupby(["which", "count"])["share"].first()
    assert share["top", 3] > share["mixed", 3] > share["bottom", 3]
    repeated = spectrum_study(train, checkpoints, images, labels, (1, 3, 10**6), generator())
    assert repeated.equals(frame)


def test_the_study_is_exact_where_the_components_span_the_networks(tiny_zoo: ModelZoo) -> None:
    train = tiny_zoo.select(split="train", epoch=2)
    images, labels = torch.randn(40, 1, 8, 8, generator=generator()), torch.arange(40) % 10
    frame = spectrum_study(train, train, images, labels, (len(train) - 1,), generator())
    expected = behavior.outputs(train, images, labels).accuracy.double().numpy()
    top = frame[frame["which"] == "top"]
    assert top["agreement"].to_numpy() == pytest.approx(1)
    assert top["test_acc"].to_numpy() == pytest.approx(expected)
