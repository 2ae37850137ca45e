"""Distances between networks, each against scipy or hand-worked values; symmetry and invariance."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from weightspace.downstream import distances
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.behavior import Outputs
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.symmetry import groups_of, permute, random_permutations

SYMMETRIC = ("L2 of weights", "L2 of probabilities", "worst case", "JS", "CKA")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def first() -> Tensor:
    """Logits of 4 networks on 30 queries in 5 classes."""
    return 2 * torch.randn(4, 30, 5, generator=generator(1))


@pytest.fixture
def second(first: Tensor) -> Tensor:
    """Of others that agree in part."""
    return first + torch.randn(4, 30, 5, generator=generator(2))


def test_divergences_are_scipys(first: Tensor, second: Tensor) -> None:
    p, q = first.double().softmax(-1).numpy(), second.double().softmax(-1).numpy()
    np.testing.assert_allclose(distances.kl(first, second), stats.entropy(p, q, axis=-1).mean(1), rtol=1e-5)
    np.testing.assert_allclose(
        distances.jensen_shannon(first, second), np.square(jensenshannon(p, q, axis=-1)).mean(1), rtol=1e-5
    )
    backward = distances.kl(second, first)
    assert not torch.allclose(distances.kl(first, second), backward, rtol=1e-3)


def test_divergences_by_hand() -> None:
    half, quarter = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    assert distances.kl(half, quarter).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert distances.kl(quarter, half).item() == pytest.approx(math.log(2) - stats.entropy([0.25, 0.75]))
    sure, other = torch.tensor([[[1e3, 0.0]]]), torch.tensor([[[0.0, 1e3]]])
    assert distances.jensen_shannon(sure, other).item() == pytest.approx(math.log(2))  # its largest value
    assert distances.kl(sure, other).item() == pytest.approx(1e3)


def test_divergences_are_never_negative() -> None:
    logits = 10 * torch.randn(200, 20, 10, generator=generator())
    close = logits + 1e-6 * torch.randn(200, 20, 10, generator=generator(1))
    assert (distances.kl(logits, close) >= 0).all()
    assert (distances.jensen_shannon(logits, close) >= 0).all()
    assert distances.kl(logits, logits).max() == 0
    assert distances.jensen_shannon(logits, logits).max() < 1e-12


def test_cka_is_the_alignment_of_centered_kernels(first: Tensor, second: Tensor) -> None:
    centering = np.eye(30) - 1 / 30
    for x, y, found in zip(
        first.double().numpy(), second.double().numpy(), distances.cka(first, second).tolist(), strict=True
    ):
        k, l = (centering @ a @ a.T @ centering for a in (x, y))  # noqa: E741
        assert found == pytest.approx((k * l).sum() / math.sqrt((k * k).sum() * (l * l).sum()), rel=1e-5)


def test_cka_ignores_rotation_scale_and_shift_only(first: Tensor, second: Tensor) -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator())).Q
    expected = distances.cka(first, second)
    torch.testing.assert_close(distances.cka(first, 3 * second @ rotation + torch.arange(5.0)), expected)
    torch.testing.assert_close(distances.cka(first, 3 * first @ rotation + 1), torch.ones(4))
    stretched = second * torch.tensor([9.0, 1, 1, 1, 1])
    assert (distances.cka(first, stretched) - expected).abs().min() > 0.01
    assert (expected < 1).all()


def test_cka_of_a_network_that_ignores_its_input_is_zero(first: Tensor) -> None:
    constant = torch.tensor([0.1, 0.2, 0.3, -0.4, 0.7]).expand_as(first)
    assert distances.cka(first, constant).max() < 1e-6
    assert distances.cka(constant, constant).isfinite().all()


@pytest.fixture
def pair(population: Checkpoints) -> tuple[Checkpoints, Checkpoints, Tensor]:
    """Eight networks, each with a permuted copy of itself, and queries."""
    groups = groups_of(population.architecture)
    permutations = random_permutations(groups, len(population), generator())
    copies = Checkpoints(population.architecture, permute(population.weights, groups, permutations), population.frame)
    return population, copies, torch.randn(20, *behavior.input_shape_of(population.network(0)), generator=generator())


def test_a_permuted_copy_is_far_in_weights_and_near_in_all_else(pair: tuple[Checkpoints, Checkpoints, Tensor]) -> None:
    population, copies, queries = pair
    outputs, others = (behavior.outputs(c, queries) for c in (population, copies))
    found = distances.model_distances(population, copies, outputs, others)
    assert tuple(found.columns) == distances.COLUMNS
    assert len(found) == len(population)
    expected = np.sqrt(np.square(population.flat().double().numpy() - copies.flat().double().numpy()).sum(1))
    np.testing.assert_allclose(found["L2 of weights"], expected, rtol=1e-5)
    assert found["L2 of weights"].min() > 1
    assert found["L2 of weights, aligned"].max() == 0
    assert found[["L2 of probabilities", "worst case", "KL", "JS"]].to_numpy().max() < 1e-5
    np.testing.assert_allclose(found["CKA"], 1, atol=1e-5)


def test_of_networks_that_differ(pair: tuple[Checkpoints, Checkpoints, Tensor]) -> None:
    population, copies, queries = pair
    shifted = copies.rows(np.roll(np.arange(len(copies)), 1))
    outputs, others = (behavior.outputs(c, queries) for c in (population, shifted))
    forth = distances.model_distances(population, shifted, outputs, others)
    back = distances.model_distances(shifted, population, others, outputs)
    for column in SYMMETRIC:
        np.testing.assert_allclose(forth[column], back[column], rtol=1e-5, err_msg=column)
    assert (forth["L2 of weights, aligned"] < forth["L2 of weights"]).all()
    gaps = np.linalg.norm(outputs.probabilities.numpy() - others.probabilities.numpy(), axis=-1)  # [n, Q]
    np.testing.assert_allclose(forth["L2 of probabilities"], gaps.mean(1), rtol=1e-5)
    np.testing.assert_allclose(forth["worst case"], gaps.max(1), rtol=1e-5)
    assert (forth["worst case"] > forth["L2 of probabilities"]).all()


def test_rows_do_not_depend_on_each_other(pair: tuple[Checkpoints, Checkpoints, Tensor]) -> None:
    population, _, queries = pair
    others = population.rows(np.roll(np.arange(len(population)), 3))
    some = np.array([5, 2])

    def of(a: Checkpoints, b: Checkpoints) -> np.ndarray:
        return distances.model_distances(a, b, behavior.outputs(a, queries), behavior.outputs(b, queries)).to_numpy()

    np.testing.assert_allclose(
        of(population, others)[some], of(population.rows(some), others.rows(some)), rtol=1e-4, atol=1e-6
    )


@pytest.fixture
def networks() -> Checkpoints:
    """Two of them, without a zoo."""
    architecture = Architecture("CNN8")
    weights = {name: torch.randn(2, *shape, generator=generator()) for name, shape in architecture.shapes.items()}
    return Checkpoints(architecture, weights, pd.DataFrame(index=range(2)))


def test_distances_of_probabilities_by_hand(networks: Checkpoints) -> None:
    outputs = torch.tensor([[[1e3, 0], [0, 1e3]], [[0.5, 0.5], [1, 1]]])
    others = torch.tensor([[[0, 1e3], [0, 1e3]], [[0, math.log(3)], [2, 2]]])  # of which: (1/4, 3/4)
    found = distances.model_distances(networks, networks, Outputs(outputs), Outputs(others))
    np.testing.assert_allclose(found["L2 of probabilities"], [math.sqrt(2) / 2, math.sqrt(2) / 8], rtol=1e-6)
    np.testing.assert_allclose(found["worst case"], [math.sqrt(2), math.sqrt(2) / 4], rtol=1e-6)


def test_equal_networks_have_no_distance(networks: Checkpoints) -> None:
    logits = Outputs(torch.randn(2, 3, 4, generator=generator()))
    found = distances.model_distances(networks, networks, logits, logits)
    assert found.drop(columns="CKA").to_numpy().max() < 1e-12
    np.testing.assert_allclose(found["CKA"], 1, rtol=1e-6)


def test_two_samples() -> None:
    rng = np.random.default_rng(0)
    x, shifted, wider = rng.normal(size=60), rng.normal(0.8, 1, size=40), rng.normal(0, 4, size=80)
    difference = x.mean() - shifted.mean()
    variances = x.var(ddof=1) / 60, shifted.var(ddof=1) / 40
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 59 + variances[1] ** 2 / 39)  # Welch and Satterthwaite
    t_test, ks = distances.two_sample(x, shifted)
    assert t_test == pytest.approx(2 * stats.t.sf(abs(difference) / math.sqrt(sum(variances)), freedom))
    assert ks == pytest.approx(stats.kstest(x, shifted, method="asymp").pvalue)
    assert t_test < 0.01 and ks < 0.05
    t_test, ks = distances.two_sample(x, wider)
    assert t_test > 0.05 and ks < 0.01  # equal means, another distribution
    assert distances.two_sample(x, x) == (1, 1)


def test_the_paired_test_is_scipys_and_sees_what_spread_hides() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=30)
    second = first + rng.normal(0.1, 0.1, size=30)
    assert distances.paired(second - first) == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert distances.paired(second - first) < 0.001 < 0.5 < distances.two_sample(first, second)[0]
    assert math.isnan(distances.paired(np.zeros(5))) and math.isnan(distances.paired(np.ones(1)))


def test_two_constant_samples_have_no_t_test() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t_test, ks = distances.two_sample(np.full(5, 0.1), np.full(5, 0.1))
    assert math.isnan(t_test) and ks == 1
