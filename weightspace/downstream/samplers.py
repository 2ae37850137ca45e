"""Samplers in embedding space, all of one signature: embeddings of at least two anchors -> new embeddings.

Legend: a anchors, T tokens, Z latent values per token, k principal components of the anchors.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor

from weightspace.hyperrep.representation import Embeddings, Sampler
from weightspace.runs import UserError

Fitness = Callable[[Tensor], Tensor]
"""New embeddings [n, T, Z] -> how good their networks are [n], such as their validation accuracy."""


INTEGRATION_STEPS = 32
"""Midpoint steps in which samples follow a learned flow."""


def kde(bandwidth: float = 0.2) -> Sampler:
    """Joint kernel density over whole embeddings: a random anchor plus Gaussian noise with the anchors' covariance."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        flat = _several(anchors.z).flatten(1)  # [a, TZ]
        return joint_kde(flat, bandwidth, count, generator).unflatten(1, anchors.z.shape[1:])

    return sample


def joint_kde(flat: Tensor, bandwidth: float, count: int, generator: torch.Generator) -> Tensor:
    """Samples [count, D] of the Gaussian kernel density of vectors [a, D].

    The same density as scipy.stats.gaussian_kde with this factor, drawn without forming the [D, D] covariance.

    Raises:
        UserError: fewer than two vectors.
    """
    chosen = torch.randint(len(_several(flat)), (count,), generator=generator)
    return flat[chosen] + bandwidth * _noise(flat, count, generator)


def kde_token(bandwidth: float = 0.2) -> Sampler:
    """A joint kernel density per token, the tokens independent of each other."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        z = _several(anchors.z).transpose(0, 1)  # [T, a, Z]
        chosen = torch.randint(z.shape[1], (z.shape[0], count), generator=generator)  # [T, count]
        picked = torch.take_along_dim(z, chosen[..., None], dim=1)  # [T, count, Z]
        return (picked + bandwidth * _noise(z, count, generator)).transpose(0, 1)

    return sample


def kde_value(bandwidth: float = 0.2) -> Sampler:
    """A kernel density per latent value, all independent: the sampler of SANE (arXiv 2406.09997)."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        z = _several(anchors.z)
        chosen = torch.randint(len(z), (count, *z.shape[1:]), generator=generator)
        noise = torch.randn(count, *z.shape[1:], generator=generator)
        return torch.take_along_dim(z, chosen, dim=0) + bandwidth * z.std(0) * noise

    return sample


def gaussian() -> Sampler:
    """One Gaussian with the anchors' mean and covariance (in their span)."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        flat = _several(anchors.z).flatten(1)
        return (flat.mean(0) + _noise(flat, count, generator)).unflatten(1, anchors.z.shape[1:])

    return sample


def flow(steps: int = 1000, width: int = 128, components: int = 32, rate: float = 1e-2) -> Sampler:
    """Flow matching (Lipman et al. 2023, arXiv 2210.02747) between a Gaussian and the anchors' principal components.

    A small network learns the velocity x_1 - x_0 along the straight lines from noise x_0 to anchors x_1 (their optimal
    transport path with sigma_min = 0), anew in every call; samples follow it. What lies outside the components is the
    anchors' mean.

    Args:
        steps: training steps of 128 pairs each.
        width: of its two hidden layers.
        components: how many principal components, at most.
        rate: first learning rate; it falls to zero along a line.
    """

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        flat = _several(anchors.z).flatten(1)
        mean = flat.mean(0)
        _, scale, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        k = min(components, int((scale > 1e-5 * scale[0]).sum()))  # the others are rounding
        directions, spread = directions[:k], scale[:k] / (len(flat) - 1) ** 0.5  # [k, TZ], [k]
        data = (flat - mean) @ directions.T / spread  # [a, k], unit variance
        with threadpool_limits(1):  # the products are small: threads would mostly wait for each other
            x = _flowed(data, count, generator, steps, width, rate)  # [count, k]
        return (mean + (x * spread) @ directions).unflatten(1, anchors.z.shape[1:])

    return sample


def subsampled(sampler: Sampler, fitness: Fitness, factor: int = 4) -> Sampler:
    """Draw `factor` times as many and keep the fittest (SANE's subsampling)."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        z = sampler(anchors, factor * count, generator)
        return z[fitness(z).argsort(descending=True, stable=True)[:count]]

    return sample


def bootstrapped(sampler: Sampler, fitness: Fitness, rounds: int = 3, factor: int = 4) -> Sampler:
    """Subsampling with feedback (SANE's bootstrapping): in every round the fittest become anchors of the next."""

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        draw = subsampled(sampler, fitness, factor)
        for _ in range(rounds - 1):
            kept = draw(anchors, len(anchors.z), generator)
            anchors = Embeddings(kept, pd.DataFrame(index=range(len(kept))), anchors.architecture)
        return draw(anchors, count, generator)

    return sample


def _several(vectors: Tensor) -> Tensor:
    if len(vectors) < 2:
        raise UserError(f"sampling needs at least 2 anchors, given {len(vectors)}; choose more checkpoints as anchors")
    return vectors


def _noise(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise [..., count, D] with the covariance of vectors [..., a, D]: random mixtures of them, centered."""
    a = vectors.shape[-2]
    mixture = torch.randn(*vectors.shape[:-2], count, a, generator=generator) / (a - 1) ** 0.5
    return mixture @ (vectors - vectors.mean(-2, keepdim=True))


def _flowed(data: Tensor, count: int, generator: torch.Generator, steps: int, width: int, rate: float) -> Tensor:
    """Samples [count, k] of a flow learned from data [a, k]."""
    k = data.shape[1]
    sizes = (k + 1, width, width, k)
    weights = [torch.randn(i, o, generator=generator) * (2 / i) ** 0.5 for i, o in pairwise(sizes)]
    weights[-1].zero_()
    biases = [torch.zeros(o) for o in sizes[1:]]
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in (*weights, *biases)], rate)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        h = torch.cat([x, t], dim=1)  # [n, k + 1]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            h = F.silu(h @ weight + bias)  # [n, width]
        return h @ weights[-1] + biases[-1]  # [n, k]

    with torch.enable_grad():
        for step in range(steps):
            end = data[torch.randint(len(data), (128,), generator=generator)]
            start, t = torch.randn(128, k, generator=generator), torch.rand(128, 1, generator=generator)
            loss = (velocity((1 - t) * start + t * end, t) - (end - start)).square().mean()
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, dt = torch.randn(count, k, generator=generator), 1 / INTEGRATION_STEPS
    with torch.no_grad():
        for step in range(INTEGRATION_STEPS):
            t = torch.full((count, 1), step * dt)
            middle = x + velocity(x, t) * dt / 2
            x = x + velocity(middle, t + dt / 2) * dt
    return x


SAMPLERS: dict[str, Callable[[float, Fitness], Sampler]] = {
    "kde": lambda bandwidth, fitness: kde(bandwidth),
    "kde-token": lambda bandwidth, fitness: kde_token(bandwidth),
    "kde-value": lambda bandwidth, fitness: kde_value(bandwidth),
    "gaussian": lambda bandwidth, fitness: gaussian(),
    "flow": lambda bandwidth, fitness: flow(),
    "subsampled": lambda bandwidth, fitness: subsampled(kde(bandwidth), fitness),
    "bootstrapped": lambda bandwidth, fitness: bootstrapped(kde(bandwidth), fitness),
}
WITH_BANDWIDTH = ("kde", "kde-token", "kde-value", "subsampled", "bootstrapped")
"""Samplers that depend on the bandwidth."""


def sampler_named(name: str, bandwidth: float, fitness: Fitness) -> Sampler:
    """The sampler of this name.

    Raises:
        UserError: there is no such sampler.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; the samplers are {', '.join(SAMPLERS)}")
    return SAMPLERS[name](bandwidth, fitness)
