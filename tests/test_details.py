"""Details of sketches: few values, chosen by each checkpoint's own sketch; nothing else is needed to decode them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, RefineConfig, check
from weightspace.experiment import embed_stage
from weightspace.hyperrep import sensitivity
from weightspace.hyperrep.details import QUERIES, Details
from weightspace.hyperrep.directions import nearest
from weightspace.hyperrep.pretrain import pretrain
from weightspace.hyperrep.refine import refined
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError
from weightspace.tasks.images import load_task
from weightspace.zoo.model_zoo import ModelZoo

IMAGES = load_task("digits").test.images
SIZE = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, latent=12, sketch=3, components=2)
BEHAVIOR = LossConfig(distance="kl", queries=16)


def trained(zoo: ModelZoo, folder: Path, loss: LossConfig, size: AutoencoderConfig) -> HyperRepresentation:
    config = PretrainConfig(epochs=(1, 2), steps=2, batch_size=4, learning_rate=1e-4)
    return pretrain(zoo, folder, config, loss, size, seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tiny_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("details") / "r"
    trained(tiny_zoo, folder, BEHAVIOR, SIZE)
    return folder


@pytest.fixture(scope="module")
def representation(folder: Path) -> HyperRepresentation:
    return HyperRepresentation.load(folder)


@pytest.fixture(scope="module")
def held_out(tiny_zoo: ModelZoo) -> Checkpoints:
    return tiny_zoo.select(split=["val", "test"], epoch=2)


def agreement(first: Checkpoints, second: Checkpoints) -> float:
    found = [behavior.outputs(some, IMAGES).logits.argmax(-1) for some in (first, second)]
    return float((found[0] == found[1]).float().mean())


def sketch_of(representation: HyperRepresentation, z: Tensor) -> Tensor:
    """The embeddings without their details."""
    return torch.cat([z[..., :3], torch.zeros_like(z[..., 3:])], -1)


def test_the_latent_values_are_all_that_decoding_needs(
    representation: HyperRepresentation, held_out: Checkpoints
) -> None:
    tokens = representation.tokenizer.count
    embedded = representation.embed(held_out)
    values = representation.packed(embedded)
    assert values["sketch"].shape == (len(held_out), tokens, 3)
    assert values["details"].shape == (len(held_out), tokens * 9)
    assert representation.latent_size == tokens * 12 == values["sketch"][0].numel() + values["details"][0].numel()
    again = representation.unpacked(values, embedded.frame, embedded.architecture)
    assert torch.equal(again.z, embedded.z)
    with pytest.raises(UserError, match="choose other directions"):
        other = {**values, "directions": values["directions"] + 1}
        representation.unpacked(other, embedded.frame, embedded.architecture)
    with pytest.raises(UserError, match="not the latent values of this representation"):
        other = {**values, "details": values["details"][:, 1:]}
        representation.unpacked(other, embedded.frame, embedded.architecture)
    for name, weight in representation.decode(embedded).weights.items():
        assert torch.equal(weight, representation.decode(again).weights[name])
    more = replace(embedded, z=embedded.z + 1 * (embedded.z == 0))  # beyond the kept directions nothing is read
    for name, weight in representation.decode(embedded).weights.items():
        assert torch.equal(weight, representation.decode(more).weights[name])


def test_the_sketch_alone_says_where_details_lie(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    """Of each checkpoint on its own, and differently for different checkpoints."""
    z = representation.embed(held_out).z
    kept = representation.decoding(z).kept
    assert kept is not None and (kept.flatten(1).sum(1) == representation.tokenizer.count * 9).all()
    for other in (sketch_of(representation, z), z + torch.nn.functional.pad(torch.randn(z[..., 3:].shape), (3, 0))):
        assert torch.equal(kept, representation.decoding(other).kept)
    assert torch.equal(kept[1:2], representation.decoding(z[1:2]).kept)
    assert not torch.equal(kept[0], kept[1])
    each = kept.sum(2).float()  # per token: rows of 10 weights need fewer than the others
    assert each.max() > 12 and each.min() < 9


def test_details_bring_the_behavior_back(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    embedded = representation.embed(held_out)
    sketch = representation.decode(replace(embedded, z=sketch_of(representation, embedded.z)))
    whole = representation.decode(embedded)
    assert 1 - agreement(held_out, whole) < 0.4 * (1 - agreement(held_out, sketch))
    errors = [(representation.tokens(some.weights) - representation.tokens(held_out.weights)).square().mean()
              for some in (whole, sketch)]  # fmt: skip
    assert errors[0] < 0.5 * errors[1]


def test_directions_are_kept_by_what_they_are_worth() -> None:
    """Worked out by hand: with axes as directions, the worth is spread times the diagonal of the matrix."""
    details = Details(torch.ones(2, 3), 1, (1,))
    details.basis.copy_(torch.eye(3).expand(2, 3, 3))
    details.spread.copy_(torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 1.0]]))
    matrices = torch.diag_embed(torch.tensor([[[3.0, 1.0, 1.0], [8.0, 2.0, 0.5]], [[0.1, 0.1, 0.0], [0.1, 3.0, 4.0]]]))
    first, second = details.kept(matrices).tolist()
    assert first == [[False, False, True], [True, False, False]]  # worth 3 1 9 and 8 2 .5
    assert second == [[False, False, False], [False, True, True]]  # a token that no output sees keeps none
    left = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
    coordinates = details.code(left, matrices[:1], details.kept(matrices[:1]))
    torch.testing.assert_close(coordinates, torch.tensor([[[0.0, 0.0, 3.0], [4.0, 0.0, 0.0]]]), rtol=1e-4, atol=1e-4)
    assert torch.equal(details(coordinates), coordinates)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_coordinates_do_not_depend_on_the_scale_of_the_metric(scale: float) -> None:
    """Against least squares in double precision; most directions are unused, and errors may cost next to nothing."""
    root = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    metric, left = root.mT @ root + 0.1 * torch.eye(6), torch.ones(1, 2, 6)
    directions = torch.eye(6).expand(1, 2, 6, 6) * (torch.arange(6) < 2)[:, None]
    found = nearest(left, directions, scale * metric, torch.ones(2, 6))
    for token in range(2):
        half = torch.linalg.cholesky(metric[0, token].double()).mT
        wanted = torch.linalg.lstsq(half[:, :2], half @ left[0, token].double()).solution
        torch.testing.assert_close(found[0, token, :2].double(), wanted, rtol=1e-3, atol=1e-4)
    assert (found[..., 2:] == 0).all()


def test_fitted_directions_are_those_in_which_tokens_differ_and_outputs_move() -> None:
    """Two tokens of one layer; along the second axis nothing is left out, along the third no output moves."""
    left = torch.randn(200, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01, 1.0])
    details = Details(torch.ones(2, 3), 1, (1,))
    metric = torch.diag(torch.tensor([1.0, 1.0, 0.001])).expand(2, 3, 3)
    details.fit(left, torch.tensor([0, 0]), metric, torch.ones(QUERIES, 1), real=False)
    for token in range(2):
        assert details.basis[token, :, 0].abs().argmax() == 0
        torch.testing.assert_close(details.basis[token].T @ details.basis[token], torch.eye(3), rtol=1e-4, atol=1e-4)
        assert details.spread[token, 0] == pytest.approx(1, rel=0.3)


def test_details_are_saved_and_loaded(representation: HyperRepresentation, held_out: Checkpoints, folder: Path) -> None:
    assert representation.autoencoder_config.details == 9
    details = representation.autoencoder.details
    assert details is not None and details.queries.shape == (QUERIES, 1, 8, 8) and details.queries.std() > 0.1
    assert f"{QUERIES} inputs (own), which the file contains" in (folder / "README.md").read_text()
    again = HyperRepresentation.load(folder)
    assert torch.equal(representation.embed(held_out).z, again.embed(held_out).z)
    other = HyperRepresentation.load(folder)
    assert other.autoencoder.details is not None
    other.autoencoder.details.queries.add_(1)
    assert other.fingerprint != representation.fingerprint


@pytest.mark.parametrize(
    ("loss", "size", "reason"),
    [
        (replace(BEHAVIOR, beta=1.0), SIZE, ""),
        (BEHAVIOR, replace(SIZE, components=0), "autoencoder.components=0"),
        (BEHAVIOR, replace(SIZE, window=20), "autoencoder.window=20"),
    ],
    ids=["without behavior", "without a mixture", "in windows"],
)
def test_where_details_have_no_meaning_the_sketch_gets_all_values(
    loss: LossConfig,
    size: AutoencoderConfig,
    reason: str,
    tiny_zoo: ModelZoo,
    held_out: Checkpoints,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = trained(tiny_zoo, tmp_path / "r", loss, size)
    assert made.autoencoder_config.details == 0 and made.autoencoder.details is None
    assert made.embed(held_out).z.shape[2] == 12
    told = capsys.readouterr().err
    assert reason in told and ("no details" in told) == bool(reason)


def test_what_takes_too_much_memory_is_told(
    tiny_zoo: ModelZoo,
    representation: HyperRepresentation,
    held_out: Checkpoints,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sensitivity, "MATRICES_AT_ONCE", 1000)
    trained(tiny_zoo, tmp_path / "r", BEHAVIOR, SIZE)
    refined(representation, held_out.rows([0]), {"digits": load_task("digits")}, RefineConfig(projection=10))
    told = capsys.readouterr().err
    assert all(text in told for text in ("no details", "does not know what errors cost", "no projection"))


def test_a_sketch_leaves_something_for_details() -> None:
    with pytest.raises(UserError, match="leaves nothing of"):
        check(replace(SIZE, sketch=12), "autoencoder")


def test_details_that_no_config_may_have_are_refused_at_load(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["autoencoder"] |= {"latent": -2}
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"autoencoder\.latent must be above 0"):
        HyperRepresentation.load(tmp_path / "r")


def test_validation_scores_whole_reconstructions(tiny_zoo: ModelZoo, representation: HyperRepresentation) -> None:
    """The recorded L_S is that of sketch and details together."""
    checkpoints = tiny_zoo.select(split="val", epoch=[1, 2])
    x, mask = representation.tokens(checkpoints.weights), representation.autoencoder.mask
    x_hat = representation.tokens(representation.reconstruct(checkpoints).weights)
    whole = ((x_hat - x).square() * mask).sum() / mask.sum() / len(x)
    assert representation.info["validation"]["structural"] == pytest.approx(float(whole), rel=1e-3)


@pytest.mark.parametrize("moved", [False, True], ids=["the same images", "another query set"])
def test_going_on_fits_the_details_again(
    moved: bool, tiny_zoo: ModelZoo, representation: HyperRepresentation, tmp_path: Path
) -> None:
    config = PretrainConfig(epochs=(1, 2), steps=1, batch_size=4, learning_rate=1e-4)
    loss = replace(BEHAVIOR, query_set="noise") if moved else BEHAVIOR
    made = pretrain(tiny_zoo, tmp_path / "r", config, loss, SIZE, 0, torch.device("cpu"), start=representation)
    before, after = representation.autoencoder.details, made.autoencoder.details
    assert before is not None and after is not None
    assert torch.equal(before.queries, after.queries) != moved


def test_written_embeddings_are_the_latent_values(
    representation: HyperRepresentation, tiny_zoo: ModelZoo, tmp_path: Path
) -> None:
    embed_stage(tmp_path / "z", tiny_zoo, representation, "test", RefineConfig(), 0, torch.device("cpu"))
    written = load_file(tmp_path / "z" / "embeddings.safetensors")
    checkpoints = tiny_zoo.select(split="test")
    again = representation.unpacked(written, checkpoints.frame, checkpoints.architecture)
    assert torch.equal(again.z, representation.embed(checkpoints).z)
