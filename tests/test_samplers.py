"""Samplers in embedding space: densities against scipy, what is independent of what, fitness, determinism."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import gaussian_kde, kstest
from torch import Tensor

from weightspace.downstream import samplers
from weightspace.downstream.samplers import SAMPLERS, WITH_BANDWIDTH, sampler_named
from weightspace.hyperrep.representation import Embeddings
from weightspace.networks.architectures import Architecture
from weightspace.runs import UserError


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(z: Tensor) -> Embeddings:
    return Embeddings(z, pd.DataFrame({"network": range(len(z))}), Architecture("CNN8"))


def size(z: Tensor) -> Tensor:
    """A fitness: high where all values are near zero."""
    return -z.flatten(1).norm(dim=1)


@pytest.fixture(scope="module")
def anchors() -> Embeddings:
    """30 anchors of 3 x 2 correlated, bimodal values, far from zero and of different spread."""
    z = torch.randn(30, 6, generator=generator(0)) @ torch.randn(6, 6, generator=generator(5))
    z[:10] += 6
    return embeddings((z * torch.linspace(0.5, 2, 6) + 5).unflatten(1, (3, 2)))


@pytest.fixture(scope="module")
def drawn(anchors: Embeddings) -> dict[str, Tensor]:
    """20,000 samples of each sampler that is a density in closed form [20000, 6]."""
    names = ("kde", "kde-token", "kde-value", "gaussian")
    return {name: sampler_named(name, 0.4, size)(anchors, 20_000, generator()).flatten(1) for name in names}


@pytest.mark.parametrize("name", ["kde", "kde-token", "kde-value"])
def test_marginals_are_scipys_kernel_density(name: str, anchors: Embeddings, drawn: dict[str, Tensor]) -> None:
    for value, column in zip(anchors.z.flatten(1).T.numpy(), drawn[name].T.numpy(), strict=True):
        density, wrong = (gaussian_kde(value, bandwidth) for bandwidth in (0.4, 0.8))
        chosen = column[:3000]
        assert kstest(chosen, np.vectorize(lambda x, d=density: d.integrate_box_1d(-np.inf, x))).pvalue > 1e-3
        assert kstest(chosen, np.vectorize(lambda x, d=wrong: d.integrate_box_1d(-np.inf, x))).pvalue < 1e-3


def test_what_is_independent_of_what(anchors: Embeddings, drawn: dict[str, Tensor]) -> None:
    flat = anchors.z.flatten(1).numpy()
    joint = np.cov(flat.T, bias=True) + 0.4**2 * np.cov(flat.T)  # of the anchors plus of the kernel
    same_token = np.kron(np.eye(3), np.ones((2, 2)))
    expected = {
        "kde": joint,
        "kde-token": joint * same_token,
        "kde-value": joint * np.eye(6),
        "gaussian": np.cov(flat.T),
    }
    assert np.abs(joint * (1 - same_token)).max() > 0.25 * joint.max()  # there is something to lose
    for name, covariance in expected.items():
        found = np.cov(drawn[name].numpy().T)
        np.testing.assert_allclose(found, covariance, atol=0.05 * joint.max(), err_msg=name)
        np.testing.assert_allclose(drawn[name].mean(0), flat.mean(0), atol=0.05 * joint.max() ** 0.5, err_msg=name)


def test_joint_kernel_density_is_scipys(anchors: Embeddings, drawn: dict[str, Tensor]) -> None:
    flat = anchors.z.flatten(1).double().numpy()
    density = gaussian_kde(flat.T, 0.4)
    theirs = density.logpdf(density.resample(2000, seed=0))
    assert kstest(density.logpdf(drawn["kde"][:2000].double().numpy().T), theirs).pvalue > 1e-3
    assert kstest(density.logpdf(drawn["kde-value"][:2000].double().numpy().T), theirs).pvalue < 1e-3


def test_gaussian_is_normal_where_the_anchors_are_not(anchors: Embeddings, drawn: dict[str, Tensor]) -> None:
    column, value = drawn["gaussian"][:3000, 0].numpy(), anchors.z.flatten(1)[:, 0].numpy()
    assert kstest(column, "norm", (value.mean(), value.std(ddof=1))).pvalue > 1e-3


def test_kernel_densities_without_bandwidth_give_values_of_anchors(anchors: Embeddings) -> None:
    z = anchors.z
    joint, token, value = (
        sampler_named(name, 0.0, size)(anchors, 50, generator()) for name in ("kde", "kde-token", "kde-value")
    )
    assert (joint[:, None] == z).all(-1).all(-1).any(1).all()
    assert (token[:, None] == z).all(-1).any(1).all()  # every token is some anchor's
    assert not (token[:, None] == z).all(-1).all(-1).any()
    assert (value[:, None] == z).any(1).all()
    assert (value[:, None] == z).all(-1).any(1).float().mean() < 0.2  # a token's values are of different anchors


def test_noise_stays_in_the_span_of_few_anchors_in_many_dimensions() -> None:
    z = torch.randn(5, 40, 30, generator=generator(0))
    for name in ("kde", "gaussian", "flow"):
        new = sampler_named(name, 0.3, size)(embeddings(z), 9, generator()).flatten(1)
        basis = torch.linalg.qr((z.flatten(1) - z.flatten(1).mean(0)).T).Q[:, :4]  # five points span four dimensions
        centered = new - z.flatten(1).mean(0)
        torch.testing.assert_close(centered @ basis @ basis.T, centered, rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_deterministic_and_leaves_torch_alone(name: str, anchors: Embeddings) -> None:
    before, given = torch.get_rng_state(), anchors.z.clone()
    with torch.no_grad():
        first, again, other = (sampler_named(name, 0.2, size)(anchors, 7, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(anchors.z, given)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (7, 3, 2) and first.dtype == torch.float32
    assert not first.requires_grad and first.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_depend_on_the_bandwidth_where_they_say_so(name: str, anchors: Embeddings) -> None:
    narrow, wide = (sampler_named(name, bandwidth, size)(anchors, 7, generator()) for bandwidth in (0.1, 0.9))
    assert torch.equal(narrow, wide) == (name not in WITH_BANDWIDTH)


@pytest.mark.parametrize("name", SAMPLERS)
def test_two_anchors_are_enough_and_one_is_not(name: str, anchors: Embeddings) -> None:
    sampler = sampler_named(name, 0.2, size)
    assert sampler(embeddings(anchors.z[:2]), 5, generator()).isfinite().all()
    with pytest.raises(UserError, match="at least 2 anchors, given 1"):
        sampler(embeddings(anchors.z[:1]), 5, generator())


def test_unknown_sampler_is_told_the_names() -> None:
    with pytest.raises(UserError, match=r"'kda'.*kde, kde-token, kde-value, gaussian, flow, subsampled, bootstrapped"):
        sampler_named("kda", 0.2, size)


def test_subsampling_keeps_the_fittest_of_the_same_draw(anchors: Embeddings) -> None:
    pool = samplers.kde(0.3)(anchors, 40, generator())
    kept = samplers.subsampled(samplers.kde(0.3), size, factor=4)(anchors, 10, generator())
    expected = sorted(pool.flatten(1).norm(dim=1).tolist())[:10]
    np.testing.assert_allclose(kept.flatten(1).norm(dim=1), expected, rtol=1e-6)


def test_fitness_rises_with_selection_and_feedback(anchors: Embeddings) -> None:
    base = samplers.kde(0.3)
    made = {
        "drawn": base,
        "selected": samplers.subsampled(base, size),
        "one round": samplers.bootstrapped(base, size, rounds=1),
        "fed back": samplers.bootstrapped(base, size, rounds=4),
    }
    reached = {name: float(size(sampler(anchors, 50, generator())).mean()) for name, sampler in made.items()}
    assert reached["drawn"] < reached["selected"] == reached["one round"] < reached["fed back"]


def test_flow_learns_two_clusters_that_a_gaussian_bridges() -> None:
    sign = torch.where(torch.arange(90) < 30, -1.0, 1.0)[:, None, None]  # a third of the anchors lies at -2
    z = 2 * sign * torch.ones(90, 2, 2) + 0.2 * torch.randn(90, 2, 2, generator=generator(0))
    assert len(z) > z[0].numel()  # more anchors than dimensions
    new = samplers.flow()(embeddings(z), 500, generator()).flatten(1)
    normal = samplers.gaussian()(embeddings(z), 500, generator()).flatten(1)
    near, near_normal = ((((x.abs() - 2).norm(dim=1)) < 1.0).float().mean() for x in (new, normal))
    assert near > 0.9 > 0.5 > near_normal
    assert ((new.mean(1) < 0).float().mean() - 1 / 3).abs() < 0.1
    assert new[new.mean(1) > 0].std(0).mean() == pytest.approx(0.2, abs=0.1)  # neither collapsed nor blurred


def test_flow_of_equal_anchors_is_that_anchor() -> None:
    z = torch.randn(1, 3, 2, generator=generator(0)).expand(4, -1, -1)
    torch.testing.assert_close(samplers.flow(steps=2)(embeddings(z), 5, generator()), z[:1].expand(5, -1, -1))
