"""Networks of any size: windows with halo, positions beyond those seen, zoos read as a stream, several zoos at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig
from weightspace.experiment import on, pretrain_stage
from weightspace.hyperrep import losses
from weightspace.hyperrep import pretrain as module
from weightspace.hyperrep.autoencoder import Autoencoder, SinusoidalPositions, windows_of
from weightspace.hyperrep.pretrain import Part, Setting, pretrain, step_losses
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, read_lines
from weightspace.tasks.images import load_task
from weightspace.tasks.queries import QuerySet
from weightspace.tokens import stream
from weightspace.tokens.stream import Stream, batch_rows
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter

CPU = torch.device("cpu")
CNN8 = Architecture("CNN8")
MLP = Architecture("MLP", {"size": 8, "hidden": 6})
SIZE = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, latent=6, components=0)
WINDOWS = dataclasses.replace(SIZE, window=10, halo=3)
BUDGET = PretrainConfig(epochs=(0, 1), steps=8, batch_size=4, validate_every=4)
LOSS = LossConfig(queries=16, distance="kl")

Make = Callable[..., Checkpoints]


def write_zoo(folder: Path, checkpoints: Checkpoints, **columns: Any) -> ModelZoo:
    """A zoo of two shards; half of the members are for training, the others for validation and test."""
    split = checkpoints.frame["member"].map({0: "train", 1: "val", 2: "train", 3: "test"}).fillna("train")
    checkpoints = dataclasses.replace(checkpoints, frame=checkpoints.frame.assign(split=split, **columns))
    writer = ZooWriter(folder, checkpoints.architecture, {})
    half = len(checkpoints) // 2
    writer.write(0, checkpoints.rows(slice(0, half)))
    writer.write(1, checkpoints.rows(slice(half, None)))
    return writer.finish([0, 1])


@pytest.fixture
def cnns(tmp_path: Path, make_checkpoints: Make) -> ModelZoo:
    return write_zoo(tmp_path / "cnns", make_checkpoints(CNN8, 12))


@pytest.fixture
def mlps(tmp_path: Path, make_checkpoints: Make) -> ModelZoo:
    return write_zoo(tmp_path / "mlps", make_checkpoints(MLP, 14, seed=1))


def build(config: AutoencoderConfig, architecture: Architecture = CNN8) -> Autoencoder:
    tokenizer = Tokenizer(architecture)
    torch.manual_seed(0)
    return Autoencoder(config, tokenizer.mask, tokenizer.positions).eval()


# windows


@pytest.mark.parametrize(("count", "size", "halo"), [(10, 3, 2), (10, 10, 5), (7, None, 1), (1, 4, 0), (9, 4, 20)])
def test_windows_cover_every_token_once(count: int, size: int | None, halo: int) -> None:
    windows = windows_of(count, size, halo)
    assert windows[0].core.start == 0 and windows[-1].core.stop == count
    assert all(left.core.stop == right.core.start for left, right in pairwise(windows))
    for window in windows:
        seen = range(count)[window.stretch]
        assert seen[window.inner] == range(count)[window.core]
        assert seen.start == max(0, window.core.start - halo) and seen.stop == min(count, window.core.stop + halo)


def test_a_window_sees_its_halo_and_no_more() -> None:
    autoencoder = build(WINDOWS)
    count = len(autoencoder.mask)
    x = torch.randn(2, *autoencoder.mask.shape, generator=torch.Generator().manual_seed(1)) * autoencoder.mask
    z = autoencoder.encode(x)
    changed = x.clone()
    changed[:, 20] += 1
    moved = (autoencoder.encode(changed) - z).abs().amax((0, 2)) > 0
    # token 20 is in the windows of tokens 10 to 19 (with their halo of 3) and 20 to 29
    assert moved.tolist() == [10 <= token < 30 for token in range(count)]
    back = (
        (autoencoder.decode(z + 0.1 * (torch.arange(count) == 20)[:, None]) - autoencoder.decode(z)).abs().amax((0, 2))
    )
    assert (back > 0).tolist() == [10 <= token < 30 for token in range(count)]


def test_one_window_of_everything_is_no_window() -> None:
    whole, window = build(SIZE), build(dataclasses.replace(SIZE, window=1000, halo=7))
    state = {name: value for name, value in whole.state_dict().items() if "head" not in name}
    window.load_state_dict(state, strict=False)
    x = torch.randn(2, *whole.mask.shape) * whole.mask
    assert torch.equal(whole.encode(x), window.encode(x))
    assert torch.equal(whole.decode(whole.encode(x)), window.decode(window.encode(x)))


def test_decoded_windows_take_their_place_in_the_original(
    cnns: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pretrain(cnns, tmp_path / "rep", BUDGET, LOSS, WINDOWS, 0, CPU)
    weights = cnns.select(split="train").weights
    queries = load_task("digits").train.images[:16]
    network = CNN8.build()
    setting = Setting(made, LOSS, network, losses.distance_of(LOSS), 1, {})
    spliced: list[Tensor] = []
    whole = HyperRepresentation.weights
    monkeypatch.setattr(
        HyperRepresentation, "weights", lambda self, tokens: spliced.append(tokens) or whole(self, tokens)
    )
    x = made.tokens(weights)
    for window in made.autoencoder.windows:
        generator = torch.Generator().manual_seed(0)
        found = step_losses(dataclasses.replace(setting), weights, queries, 1.0, generator, window=window)
        core, tokens = window.core, spliced.pop()
        assert torch.equal(tokens[:, : core.start], x[:, : core.start])
        assert torch.equal(tokens[:, core.stop :], x[:, core.stop :])
        assert not torch.allclose(tokens[:, core], x[:, core])
        mask = made.autoencoder.mask[core]
        expected = losses.structural(tokens[:, core], x[:, core], mask)
        torch.testing.assert_close(found["structural"], expected)
        gradients = torch.autograd.grad(found["behavioral"], [made.autoencoder.core.to_token.weight])
        assert gradients[0].abs().sum() > 0


def test_training_in_windows_resumes(cnns: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_resumes(cnns, WINDOWS, tmp_path, monkeypatch)


def check_resumes(
    zoo: Any, size: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HyperRepresentation:
    """Training that dies after step 6 and goes on ends like one that does not."""
    whole = pretrain(zoo, tmp_path / "whole", BUDGET, LOSS, size, 0, CPU)
    steps, original = 0, module.step_losses

    def dies(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if steps == 7:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, "step_losses", dies)
        with pytest.raises(KeyboardInterrupt):
            pretrain(zoo, tmp_path / "parts", BUDGET, LOSS, size, 0, CPU)
    again = pretrain(zoo, tmp_path / "parts", BUDGET, LOSS, size, 0, CPU)
    assert again.fingerprint == whole.fingerprint
    for name in ("metrics.jsonl", "last.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert HyperRepresentation.load(tmp_path / "whole").fingerprint == whole.fingerprint
    return whole


# positions


def test_waves_go_on_beyond_what_was_seen() -> None:
    short, long = SinusoidalPositions([3, 1, 2], 8), SinusoidalPositions([500, 70, 90], 8)
    long.load_state_dict(short.state_dict())  # no size depends on how many positions there are
    where = torch.tensor([[0, 0, 0], [1, 0, 1], [499, 69, 90]])
    vectors = long(where)
    assert torch.equal(short(where), vectors) and torch.pdist(vectors).min() > 1e-3
    features = torch.eye(8, 96)
    with torch.no_grad():
        long.map.weight.copy_(features)
        long.map.bias.zero_()
    torch.testing.assert_close(
        long(torch.tensor([[2, 0, 0]]))[0, :2], torch.tensor([2.0, 2 * 10_000 ** (-1 / 15)]).sin()
    )


def test_a_representation_goes_on_with_another_network(cnns: ModelZoo, mlps: ModelZoo, tmp_path: Path) -> None:
    token_size = Tokenizer(CNN8).token_size
    size = dataclasses.replace(SIZE, positions="sinusoidal", token_size=token_size)
    first = pretrain(cnns, tmp_path / "first", BUDGET, LOSS, size, 0, CPU)
    still = dataclasses.replace(BUDGET, steps=1, learning_rate=1e-12)
    second = pretrain(mlps, tmp_path / "second", still, LOSS, size, 0, CPU, start=first)
    assert second.architecture == MLP
    for (name, ours), theirs in zip(
        second.autoencoder.core.state_dict().items(), first.autoencoder.core.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
    with pytest.raises(UserError, match=r"is of CNN8\(\), the checkpoints are of MLP\(hidden=6, size=8\)"):
        learned = pretrain(cnns, tmp_path / "third", BUDGET, LOSS, dataclasses.replace(SIZE, token_size=65), 0, CPU)
        pretrain(mlps, tmp_path / "fourth", still, LOSS, learned.autoencoder_config, 0, CPU, start=learned)


# streams


def test_a_stream_gives_the_batches_of_the_zoo(cnns: ModelZoo) -> None:
    frame = cnns.rows(split="train")
    steps = [0, 3, 4]
    found = list(Stream(cnns, frame, 5, seed=3).batches(steps))
    assert len(found) == 3
    for step, (rows, weights) in zip(steps, found, strict=True):
        assert torch.equal(rows, batch_rows(len(frame), 5, step, 3))
        expected = cnns.read(frame.iloc[rows.numpy()]).weights
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    part = list(Stream(cnns, frame, 5, seed=3).batches([0], slice(1, None, 2)))
    assert torch.equal(part[0][0], found[0][0][1::2])


def test_samples_are_the_rows_or_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"member": range(1000)})
    assert stream.sample(frame, 10, 0) is frame
    monkeypatch.setattr(stream, "SAMPLE_BYTES", 4 * 10 * 100)
    some = stream.sample(frame, 10, 0)
    assert len(some) == 100 and some["member"].is_monotonic_increasing and some["member"].iloc[-1] > 900
    assert some.equals(stream.sample(frame, 10, 0)) and not some.equals(stream.sample(frame, 10, 1))


def test_a_damaged_shard_ends_the_training_with_a_message(cnns: ModelZoo, tmp_path: Path) -> None:
    shard = cnns.folder / "weights-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"weights-00001.safetensors cannot be read"):
        pretrain(cnns, tmp_path / "rep", BUDGET, LOSS, SIZE, 0, CPU)


# several zoos


def test_one_representation_of_several_networks(
    cnns: ModelZoo, mlps: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = dataclasses.replace(SIZE, components=2)
    made = check_resumes([cnns, mlps], size, tmp_path, monkeypatch)
    assert [sibling.architecture for sibling in made.siblings] == [CNN8, MLP]
    one, other = made.siblings
    assert one.autoencoder.core is other.autoencoder.core
    assert one.tokenizer.token_size == other.tokenizer.token_size == 73  # the longest row of all
    loaded = HyperRepresentation.load(tmp_path / "whole")
    for zoo in (cnns, mlps):
        checkpoints = zoo.select(split="test")
        embedded = loaded.embed(checkpoints)
        assert torch.equal(embedded.z, made.embed(checkpoints).z)
        assert loaded.decode(embedded).architecture == zoo.architecture
        assert len(loaded.generate(3, lambda a, n, g: a.z[:1].expand(n, -1, -1), checkpoints)) == 3
        assert on(zoo, {"r": loaded})["r"].architecture == zoo.architecture
    with pytest.raises(UserError, match=r"is of CNN8\(\), MLP\(hidden=6, size=8\), the checkpoints are of CNN3"):
        loaded.on(Architecture("CNN3"))
    validation = read_lines(tmp_path / "whole" / "metrics.jsonl")[-1]["val"]
    mean = (validation["agreement CNN8"] + validation["agreement MLP"]) / 2
    assert validation["agreement"] == pytest.approx(mean)


def test_zoos_of_one_network_share_what_is_fitted(cnns: ModelZoo, tmp_path: Path, make_checkpoints: Make) -> None:
    second = write_zoo(tmp_path / "second", make_checkpoints(CNN8, 12, seed=7, scale=1.0))
    made = pretrain([cnns, second], tmp_path / "rep", BUDGET, LOSS, SIZE, 0, CPU)
    assert len(made.siblings) == 1
    spread = made.normalizer.std[made.normalizer.mask]
    assert spread.min() > 0.6 and spread.max() < 0.85  # of both: (0.2^2 + 1)^.5 / 2^.5


def test_several_zoos_are_one_stage(cnns: ModelZoo, mlps: ModelZoo, tmp_path: Path) -> None:
    config = dataclasses.replace(BUDGET, probes=("val_acc",))
    pretrain_stage(tmp_path / "rep", [cnns, mlps], config, LOSS, SIZE, 0, CPU)
    validation = read_lines(tmp_path / "rep" / "metrics.jsonl")[-1]["val"]
    assert {"R2 val_acc CNN8", "R2 val_acc MLP"} <= validation.keys()
    with pytest.raises(UserError, match="holds"):
        pretrain_stage(tmp_path / "rep", [mlps, cnns], config, LOSS, SIZE, 0, CPU)


def test_every_checkpoint_is_asked_about_its_own_task(tmp_path: Path, make_checkpoints: Make) -> None:
    tasks = ["digits", "digits@1x8x8"]
    zoo = write_zoo(tmp_path / "zoo", make_checkpoints(CNN8, 16), task=[tasks[row // 2 % 2] for row in range(16)])
    frame = zoo.rows(split="train")
    queries = {name: QuerySet((torch.full((9, 1, 8, 8), float(i)),)) for i, name in enumerate(tasks)}
    part = Part(None, None, frame, queries, [])  # type: ignore[arg-type]
    rows = torch.tensor([0, 2, 5, 3])
    asked = part.asked(rows, 4, torch.Generator())
    assert asked.shape == (4, 4, 1, 8, 8)
    assert asked[:, 0, 0, 0, 0].tolist() == [tasks.index(task) for task in frame["task"].iloc[rows.numpy()]]
    seen: list[Tensor] = []
    original = module.step_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "step_losses", lambda *a, **k: seen.append(a[2]) or original(*a, **k))
        made = pretrain(zoo, tmp_path / "rep", BUDGET, LOSS, SIZE, 0, CPU)
    assert {tuple(queries.shape[1:]) for queries in seen if queries.ndim == 5} == {(16, 1, 8, 8)}
    assert 0 <= made.info["validation"]["agreement"] <= 1
