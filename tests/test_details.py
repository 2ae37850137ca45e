"""Details of sketches: few values, chosen by each checkpoint's own sketch; nothing else is needed to decode them."""

from __future__ import annotations

import itertools
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
from weightspace.hyperrep.details import Details, Span
from weightspace.hyperrep.pretrain import pretrain
from weightspace.hyperrep.refine import refined
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError
from weightspace.tasks.images import load_task
from weightspace.zoo.model_zoo import ModelZoo

IMAGES = load_task("digits").test.images
SIZE = AutoencoderConfig(
    width=16, layers=1, heads=2, feedforward=32, latent=12, sketch=3, lots=2, queries=100, components=2
)
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
    torch.testing.assert_close(again.z, embedded.z, rtol=1e-2, atol=3e-3)  # the second lot magnifies rounding
    assert torch.equal(again.z, representation.unpacked(values, embedded.frame, embedded.architecture).z)
    with pytest.raises(UserError, match="choose other directions"):
        other = {**values, "directions": values["directions"] + 1}
        representation.unpacked(other, embedded.frame, embedded.architecture)
    with pytest.raises(UserError, match="not the latent values of this representation"):
        other = {**values, "details": values["details"][:, 1:]}
        representation.unpacked(other, embedded.frame, embedded.architecture)
    for name, weight in representation.decode(embedded).weights.items():
        torch.testing.assert_close(representation.decode(again).weights[name], weight, rtol=1e-3, atol=1e-3)


def test_beyond_the_span_nothing_is_read(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    z = representation.embed(held_out).z
    decoding = representation.decoding(z)
    assert decoding.span is not None
    noise = torch.randn(z[..., 3:].shape, generator=torch.Generator().manual_seed(0))
    beyond = noise - decoding.span.told(decoding.span.values(noise))
    assert beyond.square().mean() > 0.05 * noise.square().mean()
    more = torch.cat([z[..., :3], z[..., 3:] + beyond], 2)
    torch.testing.assert_close(representation.decoding(more).tokens(), decoding.tokens(), rtol=1e-2, atol=3e-3)
    torch.testing.assert_close(decoding.embeddings(decoding.values), z, rtol=1e-2, atol=3e-3)


def span_of(representation: HyperRepresentation, z: Tensor) -> Span:
    span = representation.decoding(z).span
    assert span is not None
    return span


def test_the_sketch_alone_says_where_details_lie(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    """Of each checkpoint on its own, differently for different ones; the second lot hears of the first, no other."""
    z = representation.embed(held_out).z
    span, count = span_of(representation, z), representation.tokenizer.count * 9
    assert [int(lot[0].sum()) for lot in span.lots] == [round(count / 4), count - round(count / 4)]
    without = span_of(representation, sketch_of(representation, z))
    assert torch.equal(span.lot == 1, without.lot[..., : span.lot.shape[2]] == 1)
    assert (span.checksum() - without.checksum()).abs().min() > 0.1  # the second lot is another
    settled = span.told(span.values(z[..., 3:]) * (span.lot == 1))
    first = span_of(representation, torch.cat([z[..., :3], settled], 2))
    torch.testing.assert_close(first.checksum(), span.checksum(), rtol=0, atol=0.01)
    alone = span_of(representation, z[1:2]).checksum()
    torch.testing.assert_close(span.checksum()[1:2], alone, rtol=0, atol=0.01)
    assert not torch.equal(span.lot[0], span.lot[1])
    each = (span.lot > 0).sum(2).float()  # per token: rows of 10 weights need fewer than the others
    assert each.max() > 12 and each.min() < 9


@pytest.mark.parametrize("threads", [1, 3])
def test_every_core_works_on_a_part_of_its_own(
    representation: HyperRepresentation, held_out: Checkpoints, threads: int
) -> None:
    """The parts are computed as they would be alone, and errors come through."""
    expected, before = representation.embed(held_out).z, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(representation.embed(held_out).z, expected, rtol=1e-4, atol=1e-4)
        parts = sensitivity.on_every_core(lambda part: list(range(10))[part], 10, 4, torch.device("cpu"))
        assert list(itertools.chain(*parts)) == list(range(10)) and max(map(len, parts)) * threads <= 4
        with pytest.raises(ZeroDivisionError):
            sensitivity.on_every_core(lambda part: 1 // part.start, 10, 4, torch.device("cpu"))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


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
    details = Details(torch.ones(2, 3), 1, 1, 1, (1,))
    details.axes.copy_(torch.eye(3).expand(2, 3, 3))
    details.deviation.copy_(torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 1.0]]))
    matrices = torch.diag_embed(torch.tensor([[[3.0, 1.0, 1.0], [8.0, 2.0, 0.5]], [[0.1, 0.2, 0.0], [0.05, 3.0, 4.0]]]))
    left = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]).expand(2, 2, 3)
    span = details.span(matrices, 2)
    first = [[[0.0, 0.0, 3.0], [4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 5.0, 6.0]]]  # worth 3 1 9, 8 2 .5
    torch.testing.assert_close(span.told(span.values(left)), torch.tensor(first))  # what no output sees keeps nothing
    more = details.span(matrices, 2, span)
    second = [[[1.0, 0.0, 3.0], [4.0, 5.0, 0.0]], [[1.0, 2.0, 0.0], [0.0, 5.0, 6.0]]]
    torch.testing.assert_close(more.told(more.values(left)), torch.tensor(second))
    assert [int(lot.sum()) for lot in more.lots] == [4, 4]
    every = details.span(matrices, 2, more)  # all six
    torch.testing.assert_close(every.told(every.values(left)), left)
    assert [int(lot.sum()) for lot in every.lots] == [4, 4, 4]


def test_a_broken_network_does_not_break_others(representation: HyperRepresentation, held_out: Checkpoints) -> None:
    weights = {name: weight.clone() for name, weight in held_out.weights.items()}
    weights["fc1.weight"][1] = torch.nan
    weights["conv1.weight"][2] = 1e30
    z = representation.embed(replace(held_out, weights=weights)).z
    others = [0, *range(3, len(z))]
    torch.testing.assert_close(z[others], representation.embed(held_out).z[others], rtol=1e-2, atol=3e-3)
    config = RefineConfig(steps=4, queries=16)
    tasks = {"digits": load_task("digits")}
    found = refined(representation, replace(held_out, weights=weights), tasks, config).z
    assert found[others].isfinite().all()


@pytest.mark.parametrize(("per_token", "lots", "wanted"), [(9, 2, [2, 4]), (1, 2, [1, 1]), (1, 1, [2]), (2, 2, [1, 3])])
def test_there_are_no_more_details_than_entries(per_token: int, lots: int, wanted: list[int]) -> None:
    assert Details(torch.ones(2, 3), per_token, lots, 1, (1,)).counts == wanted


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_values_are_those_of_least_cost(scale: float) -> None:
    """Against least squares in double precision, for both lots together where the matrices are the same."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(1, 2, 6, 6, generator=generator)
    metric = scale * (roots.mT @ roots + 0.1 * torch.eye(6))
    details = Details(torch.ones(2, 6), 2, 1, 1, (1,))
    left = torch.randn(50, 2, 6, generator=generator) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1])
    details.fit(left, torch.tensor([0, 1]), torch.ones(1, 1), real=False)
    span = details.span(metric, 3, details.span(metric, 1))
    along = details.along_axes(left[:1])
    told = details.tokens(span.told(span.values(along)))
    for token in range(2):
        kept = span.lot[0, token] > 0
        ones = torch.zeros(int(kept.sum()), *span.lot.shape[1:])
        ones[:, token, : len(ones)] = torch.eye(len(ones))  # the values of a token are its first
        directions = torch.stack([details.tokens(span.told(one[None]))[0, token] for one in ones])
        half = torch.linalg.cholesky(metric[0, token].double()).mT
        found = torch.linalg.lstsq(half @ directions.double().T, half @ left[0, token].double()).solution
        wanted = directions.double().T @ found
        torch.testing.assert_close(told[0, token].double(), wanted, rtol=1e-3, atol=1e-3)


def test_fitted_axes_are_principal_in_what_is_left_out() -> None:
    """Against the covariance that the tokens were drawn with; a token that never differs borrows from its layer."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1))).Q
    left = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 1.0, 0.1])
    left = torch.stack([left[:, 0] @ turn.T, torch.zeros(4000, 3)], 1)
    details = Details(torch.ones(2, 3), 1, 1, 1, (1,))
    details.fit(left, torch.tensor([0, 0]), torch.ones(1, 1), real=False)
    for column in range(3):
        assert (details.axes[0, :, column] @ turn[:, column]).abs() > 0.99
    isotropic = 0.02 * 5.01 / 3
    variances = torch.tensor([4.0, 1.0, 0.01])
    torch.testing.assert_close(details.deviation[0], (0.95 * variances + isotropic).sqrt(), rtol=0.05, atol=0.01)
    torch.testing.assert_close(details.deviation[1], (0.05 * variances).sqrt(), rtol=0.05, atol=0.01)


def test_details_are_saved_and_loaded(representation: HyperRepresentation, held_out: Checkpoints, folder: Path) -> None:
    assert representation.autoencoder_config.details == 9
    details = representation.autoencoder.details
    assert details is not None and details.queries.shape == (100, 1, 8, 8) and details.queries.std() > 0.1
    assert "100 inputs (own), which the file contains" in (folder / "README.md").read_text()
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sensitivity, "MATRICES_AT_ONCE", 1000)
    trained(tiny_zoo, tmp_path / "r", BEHAVIOR, SIZE)
    told = capsys.readouterr().err
    assert all(text in told for text in ("no details", "does not know what errors cost"))


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
    torch.testing.assert_close(again.z, representation.embed(checkpoints).z, rtol=1e-2, atol=3e-3)
