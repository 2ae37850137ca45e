"""Refinement of embeddings, the metric it works in, and queries made from networks alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from weightspace.config import AutoencoderConfig, GenerateConfig, LossConfig, PretrainConfig, RefineConfig
from weightspace.downstream.baselines import ANCHORS
from weightspace.downstream.generate import generate
from weightspace.experiment import embed_stage
from weightspace.hyperrep import losses
from weightspace.hyperrep.directions import covariance, principal_directions
from weightspace.hyperrep.pretrain import pretrain
from weightspace.hyperrep.refine import refined, refining_queries
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.hyperrep.sensitivity import RIDGE, sensitivities
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.inventing import invented
from weightspace.runs import UserError
from weightspace.tasks.images import load_task
from weightspace.tasks.queries import query_set
from weightspace.zoo.model_zoo import ModelZoo

DIGITS = load_task("digits")
TASKS = {"digits": DIGITS}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(zoo: ModelZoo, folder: Path, loss: LossConfig, sketch: int = 0) -> HyperRepresentation:
    config = PretrainConfig(epochs=(1, 2), steps=2, batch_size=4, learning_rate=1e-4)
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, latent=20, sketch=sketch, components=2)
    return pretrain(zoo, folder, config, loss, size, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def representation(tiny_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> HyperRepresentation:
    return trained(tiny_zoo, tmp_path_factory.mktemp("behavior"), LossConfig(distance="kl", queries=16))


@pytest.fixture(scope="module")
def detailed(tiny_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> HyperRepresentation:
    return trained(tiny_zoo, tmp_path_factory.mktemp("details"), LossConfig(distance="kl", queries=16), sketch=4)


@pytest.fixture(scope="module")
def held_out(tiny_zoo: ModelZoo) -> Checkpoints:
    return tiny_zoo.select(split=["val", "test", "unseen"], epoch=2)


def behavioral_error(representation: HyperRepresentation, checkpoints: Checkpoints, z: Tensor) -> Tensor:
    """KL to the originals on the test images, from the definition: [n]."""
    decoded = representation.decode(replace(representation.embed(checkpoints), z=z))
    wanted, found = (behavior.outputs(some, DIGITS.test.images).logits for some in (checkpoints, decoded))
    kl = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    return kl.sum(-1).mean(1)


def test_steps_bring_the_behavior_closer(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    plain = refined(representation, held_out, TASKS, RefineConfig()).z
    assert torch.equal(plain, representation.embed(held_out).z)
    descended = refined(representation, held_out, TASKS, RefineConfig(steps=30)).z
    errors = [behavioral_error(representation, held_out, z).mean() for z in (plain, descended)]
    assert errors[1] < 0.87 * errors[0]


def test_steps_on_details_bring_the_behavior_closer(detailed: HyperRepresentation, held_out: Checkpoints) -> None:
    """Of networks whose initialization was seen, and of others, where the first lot has to move; the sketch stays."""
    configs = (RefineConfig(), RefineConfig(steps=30, learning_rate=0.1))
    z = [refined(detailed, held_out, TASKS, config).z for config in configs]
    errors = [behavioral_error(detailed, held_out, each) for each in z]
    seen = torch.tensor((held_out.frame["split"] != "unseen").to_numpy())
    assert errors[1][seen].mean() < 0.87 * errors[0][seen].mean()
    assert errors[1][~seen].mean() < 0.9 * errors[0][~seen].mean()
    assert torch.equal(z[0][..., :4], z[1][..., :4])


def test_a_network_is_refined_on_its_own(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    config = RefineConfig(steps=5, queries=16)
    together = refined(representation, held_out, TASKS, config).z
    alone = refined(representation, held_out.rows([1]), TASKS, config).z
    torch.testing.assert_close(together[1:2], alone, rtol=1e-3, atol=1e-3)
    assert torch.equal(together, refined(representation, held_out, TASKS, config).z)  # the same seed
    assert not torch.equal(together, refined(representation, held_out, TASKS, config, seed=1).z)


def test_structure_alone_is_refined_without_running_networks(
    tiny_zoo: ModelZoo, held_out: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = trained(tiny_zoo, tmp_path / "r", LossConfig(beta=1.0, queries=16))
    x, mask = structure.tokens(held_out.weights), structure.autoencoder.mask
    start = structure.embed(held_out).z
    for name in ("logits", "outputs", "gradients"):
        monkeypatch.setattr(behavior, name, None)
    z = refined(structure, held_out, TASKS, RefineConfig(steps=40)).z
    before, after = (losses.structural(structure.autoencoder.decode(some), x, mask) for some in (start, z))
    assert after < before


def test_sensitivity_is_the_gauss_newton_matrix_of_kl(
    representation: HyperRepresentation, held_out: Checkpoints
) -> None:
    """For a small error e of one token the mean KL is e^T M e / 2, up to what sampling of classes leaves."""
    one, images = held_out.rows([0]), DIGITS.train.images[:400]
    tokenizer, normalizer = representation.tokenizer, representation.normalizer
    found = sensitivities(tokenizer, normalizer, one, images, False, seed=0)[0]  # [T, D, D]
    x = representation.tokens(one.weights)
    wanted = behavior.outputs(one, images).logits
    mask = representation.autoencoder.mask
    for token in (30, 50):  # of the linear layers
        matrix = found[token]
        level = matrix.diagonal()[mask[token]].mean() * RIDGE / (1 + RIDGE)
        matrix = matrix - level * torch.diag(mask[token].float())
        error = torch.linalg.eigh(matrix).eigenvectors[:, -1]  # where it is largest
        size = (2e-3 / (error @ matrix @ error)).sqrt()
        moved = x.clone()
        moved[0, token] += size * error
        other = Checkpoints(one.architecture, representation.weights(moved), one.frame)
        logits = behavior.outputs(other, images).logits
        kl = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
        assert float(kl) == pytest.approx(1e-3, rel=0.35)


@torch.no_grad()
def test_directions_in_a_metric_leave_the_least_error() -> None:
    """Against PCA of transformed data, worked out in whitened coordinates; without a metric, against plain PCA."""
    x = torch.randn(50, 2, 4, generator=seeded())
    root = torch.randn(2, 4, 4, generator=seeded(1))
    metric = root.transpose(1, 2) @ root + 0.1 * torch.eye(4)
    spread = covariance(x)
    in_metric, plain = principal_directions(spread, 2, metric), principal_directions(spread, 2)
    for directions, forms in ((in_metric, metric), (plain, torch.eye(4).expand(2, 4, 4))):
        for token in range(2):
            half = torch.linalg.cholesky(forms[token])  # metric = half half^T
            cost_of = half.T @ (x[:, token].T @ x[:, token] / 50) @ half  # of whitened coordinates
            values = torch.linalg.eigvalsh(cost_of).flip(0)
            basis = torch.linalg.qr(half.T @ directions[token]).Q  # [D, 2] in the whitened coordinates
            left = cost_of.trace() - (basis.T @ cost_of @ basis).trace()
            torch.testing.assert_close(left, values[2:].sum(), rtol=1e-3, atol=1e-4)
    assert principal_directions(spread, 6, metric)[..., 4:].abs().max() == 0  # there are no more


def test_invented_queries_confuse_networks_more_than_noise(tiny_zoo: ModelZoo) -> None:
    members = tiny_zoo.select(split="train", epoch=2)
    low, high = DIGITS.train.images.min(), DIGITS.train.images.max()
    made = invented(members, torch.Size((32, 1, 8, 8)), low, high, seeded())
    assert made.shape == (32, 1, 8, 8) and made.min() >= low and made.max() <= high
    noise = low + (high - low) * torch.rand(32, 1, 8, 8, generator=seeded())
    runner_up = [behavior.outputs(members, some).probabilities.topk(2).values[..., 1].mean() for some in (made, noise)]
    assert runner_up[0] > 1.1 * runner_up[1]  # two classes at once
    (queries,) = query_set("invented", DIGITS, [DIGITS], seeded(), partial(invented, members)).sources
    assert len(queries) == 2 * len(DIGITS.train.images)
    with pytest.raises(UserError, match="made from training checkpoints, and none are given"):
        query_set("own+invented", DIGITS, [DIGITS], seeded())


def test_mixed_queries_lie_between_two_images() -> None:
    (mixed,) = query_set("mixed", DIGITS, [DIGITS], seeded()).sources
    own = DIGITS.train.images
    assert len(mixed) == 2 * len(own) and mixed.min() >= own.min() - 1e-5 and mixed.max() <= own.max() + 1e-5
    stacked = refining_queries(DIGITS, RefineConfig(), 0)
    assert len(stacked) == 3 * len(own) and torch.equal(stacked[: len(own)], own)


def test_taught_networks_behave_like_their_teachers(representation: HyperRepresentation, tiny_zoo: ModelZoo) -> None:
    """With all anchors as teachers every network learns to give what their ensemble gives."""
    config = GenerateConfig(anchors=4, networks=4, bandwidths=(0.3,), teachers=4)
    taught = replace(config, refine=RefineConfig(steps=60, learning_rate=0.03))
    made, plain = (generate(tiny_zoo, {"r": representation}, TASKS, each, 0).networks for each in (taught, config))
    ensemble = behavior.outputs(made[ANCHORS], DIGITS.test.images).probabilities.mean(0)
    distances = [
        (behavior.outputs(some["r"], DIGITS.test.images).probabilities - ensemble).square().sum(-1).mean()
        for some in (made, plain)
    ]
    assert distances[0] < 0.7 * distances[1]


def test_progress_counts_every_checkpoint_once(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    for config in (RefineConfig(), RefineConfig(steps=1, queries=4)):
        counted: list[int] = []
        refined(representation, held_out, TASKS, config, advance=counted.append)
        assert sum(counted) == len(held_out)


def test_refined_embeddings_are_written(
    representation: HyperRepresentation, tiny_zoo: ModelZoo, tmp_path: Path
) -> None:
    config = RefineConfig(steps=2)
    embed_stage(tmp_path / "z", tiny_zoo, representation, "test", config, 0, torch.device("cpu"))
    z = load_file(tmp_path / "z" / "embeddings.safetensors")["z"]
    assert torch.equal(z, refined(representation, tiny_zoo.select(split="test"), TASKS, config).z)


def test_one_lot_is_unpacked_as_it_was(detailed: HyperRepresentation, held_out: Checkpoints) -> None:
    embedded = detailed.embed(held_out)
    again = detailed.unpacked(detailed.packed(embedded), embedded.frame, embedded.architecture)
    torch.testing.assert_close(again.z, embedded.z, rtol=1e-4, atol=1e-5)
