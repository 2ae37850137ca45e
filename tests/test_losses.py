"""The losses, worked by hand or against torch and explicit loops.

Legend: B checkpoints, T tokens, D token size, Q queries, C classes, H features.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, mse_loss

from weightspace.config import LossConfig
from weightspace.hyperrep.losses import (
    behavioral,
    contrastive,
    cross_entropy,
    cycle,
    distance_of,
    kl,
    logits_distance,
    norm_penalty,
    positive,
    probabilities,
    scheduled,
    structural,
    variance_penalty,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_structural_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])  # B = T = D = 2
    x_hat = torch.tensor([[[2.0, 2.0], [1.0, 9.0]], [[0.0, 3.0], [1.0, -9.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    # squared errors on real entries: 1, 0, 4 and 0, 9, 0; six real entries
    assert structural(x_hat, x, mask).item() == pytest.approx(14 / 6)


def test_structural_ignores_padding_and_its_gradient() -> None:
    x, x_hat = random(3, 4, 5), random(3, 4, 5, seed=1).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4]])
    loss = structural(x_hat, x, mask)
    assert structural(x_hat + 7 * ~mask, x - 5 * ~mask, mask).item() == pytest.approx(loss.item())
    loss.backward()
    assert x_hat.grad is not None
    assert (x_hat.grad[:, ~mask] == 0).all() and (x_hat.grad[:, mask] != 0).all()
    everything = torch.ones(4, 5, dtype=torch.bool)
    assert structural(x_hat, x, everything).item() == pytest.approx(mse_loss(x_hat, x).item())


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    """Equation 1 of arXiv 2002.05709, term by term."""

    def cosine(left: Tensor, right: Tensor) -> float:
        return float(left @ right) / (float(left.norm()) * float(right.norm()))

    views = [row for pair in zip(first.double(), second.double(), strict=True) for row in pair]  # 2k, 2k + 1: a pair
    total = 0.0
    for i in range(len(views)):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = [math.exp(cosine(views[i], views[k]) / temperature) for k in range(len(views)) if k != i]
        total -= math.log(math.exp(cosine(views[i], views[partner]) / temperature) / sum(others))
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("count", [2, 5])
def test_contrastive_is_nt_xent(count: int, temperature: float) -> None:
    first, second = random(count, 6), random(count, 6, seed=1)
    expected = nt_xent(first, second, temperature)
    assert contrastive(first, second, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_defaults_to_the_published_temperature() -> None:
    first, second = random(4, 6), random(4, 6, seed=1)
    assert contrastive(first, second).item() == pytest.approx(nt_xent(first, second, 0.1), rel=1e-5)
    assert contrastive(3 * first, second).item() == pytest.approx(contrastive(first, second).item(), rel=1e-5)


def test_contrastive_prefers_its_own_partner() -> None:
    first = random(5, 6)
    assert contrastive(first, first + 0.01) < contrastive(first, (first + 0.01).roll(1, 0))


def test_probabilities_by_hand() -> None:
    target = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]]))
    found = torch.log(torch.tensor([[[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]])) + 3  # the sum of logits is arbitrary
    torch.testing.assert_close(probabilities(found, target), torch.tensor([[0.125, 0.0]]))
    assert behavioral(found, target, probabilities).item() == pytest.approx(0.0625)


def test_logits_by_hand_and_blind_to_shifts() -> None:
    target = torch.tensor([[[1.0, 2.0, 3.0]]])  # centered: -1 0 1
    found = torch.tensor([[[0.0, 0.0, 6.0]]])  # centered: -2 -2 4
    torch.testing.assert_close(logits_distance(found, target), torch.tensor([[(1 + 4 + 9) / 3]]))
    assert behavioral(found, target, logits_distance).item() == pytest.approx(14 / 3)
    target, found = random(2, 3, 4), random(2, 3, 4, seed=1)
    shifts = random(2, 3, 1, seed=2)
    expected = logits_distance(found, target)
    torch.testing.assert_close(logits_distance(found + 5 * shifts, target), expected)
    torch.testing.assert_close(logits_distance(found, target - 3 * shifts), expected)
    assert logits_distance(2 * found, target).allclose(expected) is False


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_against_torch(temperature: float) -> None:
    found, target = random(3, 5, 4), random(3, 5, 4, seed=1)
    logs = (found / temperature).log_softmax(-1), (target / temperature).softmax(-1)
    expected = kl_div(*logs, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(kl(found, target, temperature), expected)
    mean = behavioral(found, target, distance_of(LossConfig(distance="kl", temperature=temperature)))
    assert mean.item() == pytest.approx(kl_div(*logs, reduction="sum").item() / 15 * temperature**2, rel=1e-5)
    assert not torch.allclose(kl(target, found, temperature), expected)  # the original comes first


@pytest.mark.parametrize("distance", ["probabilities", "logits", "kl"])
def test_distances_are_zero_only_for_equal_behavior(distance: str) -> None:
    logits = random(2, 3, 4)
    between = distance_of(LossConfig(distance=distance))
    assert behavioral(logits, logits, between).item() == pytest.approx(0, abs=1e-7)
    assert behavioral(logits + 2, logits, between).item() == pytest.approx(0, abs=1e-6)
    assert behavioral(logits.flip(-1), logits, between).item() > 0.01


@pytest.mark.parametrize("distance", ["probabilities", "logits", "kl"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_behavioral_gradients_are_finite(distance: str, scale: float) -> None:
    found = (scale * random(2, 3, 4)).requires_grad_()
    behavioral(found, scale * random(2, 3, 4, seed=1), distance_of(LossConfig(distance=distance))).backward()
    assert found.grad is not None and found.grad.isfinite().all()
    assert distance == "probabilities" or found.grad.abs().max() > 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_cross_entropy_is_kl_plus_entropy_with_the_same_gradients(temperature: float) -> None:
    found, target = random(3, 5, 4).requires_grad_(), random(3, 5, 4, seed=1)
    chances = (target / temperature).softmax(-1)
    entropy = -(chances * chances.log()).sum(-1) * temperature**2
    torch.testing.assert_close(cross_entropy(found, target, temperature), kl(found, target, temperature) + entropy)
    gradients = [torch.autograd.grad(loss(found, target, temperature).sum(), found)[0] for loss in (kl, cross_entropy)]
    torch.testing.assert_close(*gradients)


def test_positive_contrast_wants_equal_directions() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[3.0, 0.0], [1.0, 0.0]])  # the same direction, and a right angle
    assert positive(first, second).item() == pytest.approx(0.5)
    assert positive(first, -first).item() == pytest.approx(2.0)


def test_penalties_by_hand() -> None:
    z = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
    assert norm_penalty(z).item() == pytest.approx((1 + 9) / 4)
    assert variance_penalty(z).item() == pytest.approx((0 + 0.99) / 2)  # deviations sqrt(2) and sqrt(1e-4)


def test_contrastive_gradients_are_finite() -> None:
    first = random(4, 6).requires_grad_()
    contrastive(first, first.detach() + 0.1).backward()
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().max() > 0
    dead = torch.zeros(4, 6, requires_grad=True)  # a head whose units all died
    contrastive(dead, random(4, 6)).backward()
    assert dead.grad is not None and dead.grad.isfinite().all()


def test_cycle_by_hand() -> None:
    assert cycle(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[4.0, 2.0]]])).item() == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("share", "value"),
    [(0.0, 1.0), (0.19, 1.0), (0.2, 1.0), (0.3, 2.0), (0.4, 3.0), (0.49, 3.0), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)],
)
def test_schedule_is_linear_between_its_points(share: float, value: float) -> None:
    schedule = ((0.2, 1.0), (0.4, 3.0), (0.5, 3.0), (0.5, 0.5), (1.0, 0.0))
    assert scheduled(schedule, share) == pytest.approx(value)


def test_schedule_of_constants_and_steps() -> None:
    assert [scheduled(0.3, share) for share in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert scheduled(1, 0.5) == 1.0
    step = ((0.5, 1.0), (0.5, 0.1))  # the example of the config's documentation
    assert [scheduled(step, share) for share in (0.0, 0.499, 0.5, 1.0)] == [1.0, 1.0, 0.1, 0.1]
    assert [scheduled(((0.5, 2.0),), share) for share in (0.0, 0.5, 1.0)] == [2.0] * 3
