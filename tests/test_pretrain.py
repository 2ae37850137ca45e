"""The training loop and the representation it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open

from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig
from weightspace.downstream.probe import monitor
from weightspace.hyperrep import autoencoder as autoencoder_module
from weightspace.hyperrep import pretrain as module
from weightspace.hyperrep.pretrain import METRICS_FILE, STATE_FILE, learning_rate, pretrain, training_checkpoints
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.runs import RunFailed, UserError, read_lines
from weightspace.zoo.model_zoo import ModelZoo

CPU = torch.device("cpu")
SMALL = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=32, latent=6, components=2)
BUDGET = PretrainConfig(epochs=(1, 2), steps=12, batch_size=4, validate_every=4)
LOSS = LossConfig(queries=16, distance="kl")


def train(zoo: ModelZoo, folder: Path, loss: LossConfig = LOSS, config: PretrainConfig = BUDGET) -> HyperRepresentation:
    folder.mkdir(parents=True, exist_ok=True)
    return pretrain(zoo, folder, config, loss, SMALL, 0, CPU)


def state(representation: HyperRepresentation) -> torch.Tensor:
    return torch.cat([value.flatten() for value in representation.autoencoder.state_dict().values()])


def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_zoo, tmp_path / "whole")
    steps = 0
    original = module.step_losses

    def dies(*arguments: object, **more: object) -> object:
        nonlocal steps
        steps += 1
        if steps == 9:  # after the state of step 4, between two saves
            raise KeyboardInterrupt
        return original(*arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "step_losses", dies)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_zoo, tmp_path / "parts")
    assert (tmp_path / "parts" / STATE_FILE).exists()
    resumed = train(tiny_zoo, tmp_path / "parts")
    assert torch.equal(state(whole), state(resumed))
    for name in (METRICS_FILE, "last.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert not (tmp_path / "parts" / STATE_FILE).exists()


@pytest.mark.parametrize(
    "loss",
    [
        LOSS,
        dataclasses.replace(LOSS, beta=1.0),
        dataclasses.replace(LOSS, distance="logits", query_set="noise"),
        dataclasses.replace(LOSS, distance="probabilities", query_set="own+noise", gamma=0.0),
        dataclasses.replace(LOSS, cycle=0.1, permute="all"),
        dataclasses.replace(LOSS, beta=((0.5, 1.0), (0.5, 0.1)), permute="none"),
        dataclasses.replace(
            LOSS, contrast="positive", distance="cross-entropy", norm_penalty=0.1, variance_penalty=0.1
        ),
    ],
    ids=[
        "default",
        "structure",
        "logits-noise",
        "probabilities-union",
        "cycle-permute",
        "warmup",
        "positive-penalties",
    ],
)
def test_every_loss_trains(tiny_zoo: ModelZoo, tmp_path: Path, loss: LossConfig) -> None:
    train(tiny_zoo, tmp_path, loss)
    records = read_lines(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [4, 8, 12]
    terms = {"contrastive": loss.gamma != 0, "behavioral": loss.beta != 1.0, "cycle": loss.cycle != 0}
    terms |= {"norm": loss.norm_penalty > 0, "variance": loss.variance_penalty > 0}
    for name, used in terms.items():
        assert (name in records[-1]["val"]) == used
    if isinstance(loss.beta, tuple):
        assert "behavioral" not in records[0]["train"]  # not computed while its weight is zero


def test_training_lowers_the_validation_loss(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    config = dataclasses.replace(BUDGET, steps=60, validate_every=20)
    train(tiny_zoo, tmp_path, config=config)
    totals = [record["val"]["total"] for record in read_lines(tmp_path / METRICS_FILE)]
    assert totals[-1] < totals[0]


def test_the_best_state_is_the_one_kept(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    made = train(tiny_zoo, tmp_path)
    records = read_lines(tmp_path / METRICS_FILE)
    best = min(records, key=lambda record: record["val"]["total"])
    assert made.info["step"] == best["step"]
    assert made.info["validation"] == best["val"]


def test_representation_survives_its_folder(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    made = train(tiny_zoo, tmp_path)
    loaded = HyperRepresentation.load(tmp_path)
    checkpoints = tiny_zoo.select(split="test")
    assert torch.equal(made.embed(checkpoints).z, loaded.embed(checkpoints).z)
    assert loaded.fingerprint == made.fingerprint
    assert loaded.pretrain_config == BUDGET
    assert loaded.info["loss"] == json.loads(json.dumps(dataclasses.asdict(LOSS)))
    assert "```python" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["scales"]["behavioral"] > 0


def test_raw_weights_can_be_used(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    made = train(tiny_zoo, tmp_path, config=dataclasses.replace(BUDGET, normalize="none"))
    assert made.normalizer.std.eq(1).all()


def test_non_finite_loss_stops_with_step_and_members(
    tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.step_losses

    def broken(*arguments: object, **more: object) -> dict[str, torch.Tensor]:
        found = original(*arguments, **more)  # type: ignore[arg-type]
        return {**found, "total": found["total"] * float("nan")}

    monkeypatch.setattr(module, "step_losses", broken)
    with pytest.raises(RunFailed, match=r"not finite at step 0 .* members \["):
        train(tiny_zoo, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_unknown_epochs_are_named(tiny_zoo: ModelZoo) -> None:
    with pytest.raises(UserError, match=r"\[7\].*\[0, 1, 2\]"):
        training_checkpoints(tiny_zoo, dataclasses.replace(BUDGET, epochs=(1, 7)), "train")


def test_learning_rate_rises_and_falls_to_zero() -> None:
    config = PretrainConfig(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


@pytest.mark.parametrize("schedule", ["onecycle", "constant"])
def test_schedules(schedule: Literal["onecycle", "constant"]) -> None:
    config = PretrainConfig(steps=100, warmup=0.1, learning_rate=1.0, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[9 if schedule == "constant" else 29] == pytest.approx(1.0)
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.001


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam", "schedule": "onecycle", "scaling": 0.1, "noise": 0.1, "erase": 0.1},
        {"optimizer": "sgd", "normalize": "min-max"},
        {"normalize": "l2"},
    ],
)
def test_every_optimizer_and_normalization_trains(tiny_zoo: ModelZoo, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = train(tiny_zoo, tmp_path, config=dataclasses.replace(BUDGET, **changes))
    assert made.info["validation"]["structural"] < 1


def test_without_a_mixture_the_transformer_stands_alone(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    size = dataclasses.replace(SMALL, components=0)
    made = pretrain(tiny_zoo, tmp_path, BUDGET, LOSS, size, 0, CPU)
    assert not any("mixture" in name for name in made.autoencoder.state_dict())
    checkpoints = tiny_zoo.select(split="test")
    assert torch.equal(HyperRepresentation.load(tmp_path).embed(checkpoints).z, made.embed(checkpoints).z)


def test_a_representation_goes_on_from_another(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    first = train(tiny_zoo, tmp_path / "first")
    still = dataclasses.replace(BUDGET, steps=1, validate_every=1, learning_rate=1e-12, weight_decay=0.0)
    second = pretrain(tiny_zoo, tmp_path / "second", still, LOSS, SMALL, 0, CPU, start=first)
    checkpoints = tiny_zoo.select(split="test")
    torch.testing.assert_close(second.embed(checkpoints).z, first.embed(checkpoints).z, rtol=1e-4, atol=1e-5)
    wider = dataclasses.replace(SMALL, width=2 * SMALL.width)
    with pytest.raises(UserError, match="of another size"):
        pretrain(tiny_zoo, tmp_path / "third", still, LOSS, wider, 0, CPU, start=first)


def test_probes_during_training(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    config = dataclasses.replace(BUDGET, probes=("val_acc",))
    made = pretrain(tiny_zoo, tmp_path, config, LOSS, SMALL, 0, CPU, probe=monitor([tiny_zoo], config))
    assert [record["val"]["R2 val_acc"] <= 1 for record in read_lines(tmp_path / METRICS_FILE)] == [True] * 3
    assert torch.equal(state(made), state(train(tiny_zoo, tmp_path / "without")))  # it changes nothing


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_damaged_representation_is_named(tiny_zoo: ModelZoo, tmp_path: Path, damage: str) -> None:
    train(tiny_zoo, tmp_path)
    model = tmp_path / "model.safetensors"
    if damage == "missing":
        model.unlink()
    elif damage == "truncated":
        model.write_bytes(model.read_bytes()[:100])
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["autoencoder"]["width"] = 8
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="damaged"):
        HyperRepresentation.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "normalization.safetensors"])
def test_a_flipped_bit_of_a_representation_is_told(tiny_zoo: ModelZoo, tmp_path: Path, name: str) -> None:
    train(tiny_zoo, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged .*: {name} has changed since it was written"):
        HyperRepresentation.load(tmp_path)


def test_a_folder_that_is_no_representation(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a representation"):
        HyperRepresentation.load(tmp_path)


@pytest.mark.parametrize(
    "moment", ["model.safetensors", "metrics.jsonl", "state.json", "last.safetensors", "config.json"]
)
def test_killed_at_every_write_ends_the_same(
    tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Die right after each kind of write in turn, then start again."""
    whole = train(tiny_zoo, tmp_path / "whole")
    replace = os.replace

    def dies(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == moment and target.parent.name == "parts":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_zoo, tmp_path / "parts")
    again = train(tiny_zoo, tmp_path / "parts")
    assert again.fingerprint == whole.fingerprint
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for name in (METRICS_FILE, "config.json", "model.safetensors", "last.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch's own tracing looks at, and hides
def test_compiled_training_compiles_both_transformers(
    tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        def call(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*given)

        return call

    plain = train(tiny_zoo, tmp_path / "plain")
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(autoencoder_module, "_probe", lambda x: x)  # does not count
    compiled = train(tiny_zoo, tmp_path / "compiled", config=dataclasses.replace(BUDGET, compile=True))
    assert calls >= 2 * BUDGET.steps  # encoder and decoder at every step
    torch.testing.assert_close(state(compiled), state(plain), rtol=1e-4, atol=1e-5)
    assert list(compiled.state()) == list(plain.state())
    for name in ("model.safetensors", "last.safetensors"):
        with safe_open(tmp_path / "plain" / name, "pt") as one, safe_open(tmp_path / "compiled" / name, "pt") as other:
            assert set(one.keys()) == set(other.keys())


def test_without_a_compiler_nothing_is_compiled(
    tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    with pytest.raises(UserError, match=r"pretrain\.compile=True: .*C\+\+ compiler.*leave pretrain\.compile out"):
        train(tiny_zoo, tmp_path / "rep", config=dataclasses.replace(BUDGET, compile=True))
