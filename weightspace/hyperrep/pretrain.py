"""The one training loop of a representation: validate, save, resume.

Every step's randomness is a function of (seed, step), so training that was interrupted and resumed equals training
that was not.

Legend: B checkpoints, T tokens, D token size, Z latent values, Q queries, C classes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, check
from weightspace.hyperrep import losses
from weightspace.hyperrep.autoencoder import Autoencoder
from weightspace.hyperrep.representation import CONFIG_FILE, MODEL_FILE, STATE_FILE, HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints, unflatten
from weightspace.networks.symmetry import groups_of
from weightspace.runs import (
    RunFailed,
    UserError,
    atomic,
    derive_seed,
    notice,
    progress,
    read_lines,
    write_lines,
    write_tensors,
)
from weightspace.tasks.images import load_task
from weightspace.tasks.queries import QuerySet, query_set
from weightspace.tokens.normalize import NORMALIZERS
from weightspace.tokens.stream import batch_rows
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.tokens.views import erased, noisy, permuted, scaled
from weightspace.zoo.model_zoo import ModelZoo, usable

METRICS_FILE = "metrics.jsonl"
LAST_FILE = "last.safetensors"
VALIDATION_IMAGES = 512
"""Most images on which validation compares behavior."""


Monitor = Callable[[HyperRepresentation], dict[str, float]]
"""What else is measured of a representation at every validation."""


@dataclass(frozen=True)
class Setting:
    """What every step of one training shares."""

    representation: HyperRepresentation
    loss: LossConfig
    network: nn.Module
    """an instance of the base network"""
    distance: losses.Distance
    """between outputs"""
    group: int
    """checkpoints per vectorized call of the base network"""
    scales: dict[str, float]
    """values by which the losses are divided"""


def step_losses(
    setting: Setting,
    weights: dict[str, Tensor],
    queries: Tensor,
    share: float,
    generator: torch.Generator,
    augment: PretrainConfig | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch of checkpoints, each divided by its scale, and their weighted sum as "total".

    A term whose weight is zero at this point of the schedule is not computed.

    Args:
        setting: representation, loss weights, network, scales.
        weights: {name: [B, *shape]}.
        queries: [Q, ...].
        share: how much of the training is over, 0 to 1.
        generator: randomness of the views.
        augment: how the encoder's input is disturbed (noise, erase); not at all when None.
    """
    representation, config = setting.representation, setting.loss
    autoencoder, mask = representation.autoencoder, representation.autoencoder.mask
    gamma, beta, lam = (losses.scheduled(w, share) for w in (config.gamma, config.beta, config.cycle))
    groups = groups_of(representation.architecture)
    found: dict[str, Tensor] = {}
    if config.permute == "all":
        weights = permuted(weights, groups, generator)
    x = representation.tokens(weights)  # [B, T, D]
    seen = _disturbed(x, mask, augment, generator)
    if gamma > 0:
        other = weights if config.permute == "none" else permuted(weights, groups, generator)
        view = _disturbed(representation.tokens(other), mask, augment, generator)  # [B, T, D]
        z, z_view = autoencoder.encode(torch.cat([seen, view])).chunk(2)  # [B, T, Z] each
        contrast = losses.contrastive if config.contrast == "nt-xent" else losses.positive
        found["contrastive"] = contrast(autoencoder.project(z), autoencoder.project(z_view))
    else:
        z = autoencoder.encode(seen)  # [B, T, Z]
    weight = {
        "contrastive": gamma,
        "structural": (1 - gamma) * beta,
        "behavioral": (1 - gamma) * (1 - beta),
        "cycle": lam,
        "norm": config.norm_penalty,
        "variance": config.variance_penalty,
    }
    x_hat = autoencoder.decode(z)  # [B, T, D]
    if weight["structural"] > 0:
        found["structural"] = losses.structural(x_hat, x, mask)
    if weight["behavioral"] > 0:
        with torch.no_grad():
            target = behavior.logits(setting.network, weights, queries, setting.group)  # [B, Q, C]
        logits = behavior.logits(setting.network, representation.weights(x_hat), queries, setting.group)  # [B, Q, C]
        found["behavioral"] = losses.behavioral(logits, target, setting.distance)
    if lam > 0:
        found["cycle"] = losses.cycle(z, autoencoder.encode(x_hat))
    if config.norm_penalty > 0:
        found["norm"] = losses.norm_penalty(z)
    if config.variance_penalty > 0:
        found["variance"] = losses.variance_penalty(z)
    found = {name: value / setting.scales.get(name, 1.0) for name, value in found.items()}
    found["total"] = torch.stack([weight[name] * value for name, value in found.items()]).sum()
    return found


def _disturbed(x: Tensor, mask: Tensor, augment: PretrainConfig | None, generator: torch.Generator) -> Tensor:
    if augment is not None and augment.noise:
        x = noisy(x, mask, augment.noise, generator)
    if augment is not None and augment.scaling:
        x = scaled(x, augment.scaling, generator)
    if augment is not None and augment.erase:
        x = erased(x, augment.erase, generator)
    return x


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda weights, rate, decay: torch.optim.AdamW(weights, rate, weight_decay=decay, fused=True),
    "adam": lambda weights, rate, decay: torch.optim.Adam(weights, rate, weight_decay=decay, fused=True),
    "sgd": lambda weights, rate, decay: torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=decay),
}


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Warm-up, then the configured schedule; "onecycle" is that of Smith and Topin 2017 (arXiv 1708.07120)."""
    warmup = max(round((0.3 if config.schedule == "onecycle" else config.warmup) * config.steps), 1)
    if step < warmup:
        share = (step + 1) / warmup
        return config.learning_rate * (
            0.5 * (1 - math.cos(math.pi * share)) if config.schedule == "onecycle" else share
        )
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))


def training_checkpoints(zoo: ModelZoo, config: PretrainConfig, split: str) -> Checkpoints:
    """The checkpoints of one split at the configured epochs, without those that are not finite or huge."""
    missing = sorted(set(config.epochs) - set(zoo.frame["epoch"]))
    if missing:
        there = sorted(zoo.frame["epoch"].unique().tolist())
        raise UserError(f"pretrain.epochs asks for epochs {missing}, but the zoo has {there}; name some of these")
    checkpoints = zoo.select(split=split, epoch=list(config.epochs))
    keep = usable(checkpoints)
    if not keep.any():
        raise UserError(f"every checkpoint of split {split!r} of {zoo.folder} has non-finite or huge weights")
    if keep.all():
        return checkpoints
    members = ", ".join(map(str, sorted(set(checkpoints.frame["member"][~keep]))[:10]))
    notice(f"{(~keep).sum()} of {len(keep)} {split} checkpoints have non-finite or huge weights: left out ({members})")
    return checkpoints.rows(keep)


def fit_scales(
    checkpoints: Checkpoints, queries: QuerySet, loss: LossConfig, batch_size: int, seed: int
) -> dict[str, float]:
    """The value by which each loss is divided, so that 1 means "no better than knowing nothing".

    contrastive: chance, ln(2B - 1) (1 where it is the positive-only one). structural: 1, the constant predictor on
    standardized weights. behavioral: the distance between random pairs of different training members. cycle: 1.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "scales"))
    order = torch.randperm(len(checkpoints), generator=generator)[:512].numpy()
    first = checkpoints.rows(order)
    second = first.rows(torch.arange(len(first)).roll(1).numpy())
    different = torch.from_numpy(first.frame["member"].to_numpy() != second.frame["member"].to_numpy())
    if not different.any():
        raise UserError("the training split holds one member only; a representation needs several")
    logits = behavior.outputs(first, queries.draw(4 * loss.queries, generator)).logits
    pairs = losses.behavioral(logits.roll(1, 0)[different], logits[different], losses.distance_of(loss))
    scales = {
        "contrastive": math.log(2 * batch_size - 1) if loss.contrast == "nt-xent" else 1.0,
        "structural": 1.0,
        "behavioral": float(pairs),
        "cycle": 1.0,
    }
    if not 0 < scales["behavioral"] < math.inf:
        raise RunFailed(
            f"training members differ in behavior by {scales['behavioral']}; a finite positive mean is needed"
        )
    return scales


@torch.no_grad()
def validate(setting: Setting, weights: dict[str, Tensor], queries: Tensor, batch_size: int) -> dict[str, float]:
    """The losses over validation checkpoints at the final weights, agreement and L_S; views are fixed."""
    setting.representation.autoencoder.eval()
    total: dict[str, float] = {}
    count = len(next(iter(weights.values())))
    generator = torch.Generator().manual_seed(0)  # the same views at every validation
    for start in range(0, count, batch_size):
        batch = {name: weight[start : start + batch_size] for name, weight in weights.items()}
        rows = len(next(iter(batch.values())))
        found = {k: float(v) for k, v in step_losses(setting, batch, queries, 1.0, generator).items()}
        x = setting.representation.tokens(batch)
        x_hat = setting.representation.autoencoder.decode(setting.representation.autoencoder.encode(x))
        if "structural" not in found:  # its weight is zero at the end
            found["structural"] = float(losses.structural(x_hat, x, setting.representation.autoencoder.mask))
        predicted, original = (
            behavior.logits(setting.network, some, queries, setting.group).argmax(-1)
            for some in (setting.representation.weights(x_hat), batch)
        )
        found["agreement"] = float((predicted == original).float().mean())
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + value * rows / count
    return total


def pretrain(
    zoo: ModelZoo,
    folder: Path,
    config: PretrainConfig,
    loss: LossConfig,
    autoencoder_config: AutoencoderConfig,
    seed: int,
    device: torch.device,
    title: str = "representation",
    probe: Monitor | None = None,
    start: HyperRepresentation | None = None,
) -> HyperRepresentation:
    """Train a representation on the zoo's train split; the state of best validation total is what is returned.

    The folder receives metrics.jsonl, the best and the last model and, while training, the state to resume from.

    Args:
        zoo: where the checkpoints come from.
        folder: where the representation is written.
        config, loss, autoencoder_config: how it is trained, on what, and its size.
        seed: seed of everything random.
        device: where to train.
        title: its name in progress bars and messages.
        probe: what else is measured at every validation.
        start: a representation of another zoo to go on from, with its normalization; it must have the same size.

    Raises:
        UserError: a value that cannot work, epochs or a task that the zoo does not have.
        RunFailed: a loss that is not finite.
    """
    for part, path in ((config, "pretrain"), (loss, "loss"), (autoencoder_config, "autoencoder")):
        check(part, path)
    if (folder / CONFIG_FILE).exists():  # killed after the last write
        (folder / STATE_FILE).unlink(missing_ok=True)
        return HyperRepresentation.load(folder, device)
    tasks = [load_task(name).to(device) for name in zoo.tasks]
    train = training_checkpoints(zoo, config, "train")
    val = training_checkpoints(zoo, config, "val")
    queries = query_set(loss.query_set, tasks, torch.Generator().manual_seed(derive_seed(seed, "queries")))
    tokenizer = Tokenizer(zoo.architecture, autoencoder_config.token_size)
    tokens = tokenizer.tokenize(train.weights).x
    if start is not None:
        start.tokenizer.check_architecture(zoo.architecture)
        if start.autoencoder_config != autoencoder_config:
            raise UserError(
                f"the representation to start from is of another size ({start.autoencoder_config}) than asked for "
                f"({autoencoder_config}); ask for the same autoencoder"
            )
    normalizer = start.normalizer.to("cpu") if start else NORMALIZERS[config.normalize](tokenizer, tokens)
    with torch.random.fork_rng(devices=[]):  # built on the CPU
        torch.default_generator.manual_seed(derive_seed(seed, "autoencoder"))
        autoencoder = Autoencoder(autoencoder_config, tokenizer.mask, tokenizer.positions)
    if start is None:
        autoencoder.fit(normalizer.normalize(tokens), derive_seed(seed, "mixture"))
    else:
        autoencoder.load_state_dict(start.autoencoder.state_dict())
    info: dict[str, Any] = {
        "tasks": list(zoo.tasks),
        "zoo": {"fingerprint": zoo.fingerprint, "members": int(train.frame["member"].nunique())},
        "loss": dataclasses.asdict(loss),
        "pretrain": dataclasses.asdict(config),
        "seed": seed,
        "scales": fit_scales(train, queries, loss, config.batch_size, seed),
    }
    representation = HyperRepresentation(zoo.architecture, autoencoder_config, autoencoder, normalizer, info).to(device)
    if representation.latent_size >= zoo.architecture.parameter_count:
        notice(
            f"nothing is compressed: {representation.latent_size:,} latent values (tokens x autoencoder.latent) for "
            f"{zoo.architecture.parameter_count:,} weights; lower autoencoder.latent"
        )
    network = behavior.runner(zoo.architecture, device)
    optimizer = OPTIMIZERS[config.optimizer](autoencoder.parameters(), config.learning_rate, config.weight_decay)
    flat = train.flat().to(device)
    val_weights = val.to(device).weights

    records = read_lines(folder / METRICS_FILE)
    state = _saved_state(folder, device)
    done, best, group = 0, None, None
    if state is not None:
        autoencoder.load_state_dict(state["autoencoder"])
        optimizer.load_state_dict(state["optimizer"])
        done, best, group = state["step"], json.loads(state["best"]), state["group"]
    records = [record for record in records if record["step"] <= done]
    # an interrupted training goes on with the group size that it began with: other sizes round differently
    group = group or behavior.calibrate(zoo.architecture, device, loss.queries, config.batch_size, training=True)
    setting = Setting(representation, loss, network, losses.distance_of(loss), group, info["scales"])
    val_images = torch.cat([task.val.images[: VALIDATION_IMAGES // len(tasks)] for task in tasks])
    with progress(f"pretrain: {title}", config.steps, done) as advance:
        for step in range(done, config.steps):
            rows = batch_rows(len(flat), config.batch_size, step, seed)
            generator = torch.Generator().manual_seed(derive_seed(seed, "step", step))
            batch = unflatten(zoo.architecture.shapes, flat[rows.to(device)])
            autoencoder.train()
            asked = queries.draw(loss.queries, generator)
            found = step_losses(setting, batch, asked, step / config.steps, generator, config)
            values = {name: float(value.detach()) for name, value in found.items()}
            members = sorted(set(train.frame["member"].iloc[rows.numpy()].tolist()))
            _check_finite(values, f"the loss of {title}", step, members)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, step)
            optimizer.zero_grad()
            found["total"].backward()
            norm = nn.utils.clip_grad_norm_(autoencoder.parameters(), config.clip)
            _check_finite({"norm": float(norm)}, f"the gradient of {title}", step, members)
            optimizer.step()
            done = step + 1
            advance(1, f"loss {values['total']:.3f}")
            if done % config.validate_every == 0 or done == config.steps:
                validation = validate(setting, val_weights, val_images, config.batch_size)
                if probe is not None:
                    validation |= probe(representation)
                _check_finite(validation, f"the validation of {title}", step, sorted(set(val.frame["member"])))
                record = {"step": done, "train": values, "val": validation}
                records.append(record)
                if best is None or validation["total"] < best["total"]:
                    best = {"step": done, **validation}
                    write_tensors(folder / MODEL_FILE, autoencoder.state_dict())
                write_lines(folder / METRICS_FILE, records)
                _save_state(folder, autoencoder, optimizer, done, best, group)
    assert best is not None  # every training ends with a validation
    write_tensors(folder / LAST_FILE, autoencoder.state_dict())
    autoencoder.load_state_dict(load_file(folder / MODEL_FILE))
    autoencoder.eval()
    info.update(step=best.pop("step"), validation=best)
    representation.save(folder)
    (folder / STATE_FILE).unlink()
    return representation


def _check_finite(values: dict[str, float], what: str, step: int, members: list[int]) -> None:
    if not all(math.isfinite(value) for value in values.values()):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise RunFailed(
            f"{what} is not finite at step {step} ({numbers}) with members {members}; lower pretrain.learning_rate and "
            "choose another --out, or leave such members out of the zoo"
        )


def _save_state(
    folder: Path,
    autoencoder: Autoencoder,
    optimizer: torch.optim.Optimizer,
    step: int,
    best: dict[str, float],
    group: int,
) -> None:
    state = {
        "autoencoder": autoencoder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "best": json.dumps(best),
        "group": group,
    }
    content = io.BytesIO()
    torch.save(state, content)
    with atomic(folder / STATE_FILE) as path:
        path.write_bytes(content.getbuffer())


def _saved_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    if not (folder / STATE_FILE).exists():
        return None
    try:
        return torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder / STATE_FILE} cannot be read ({error}); delete it to train from the start") from None
