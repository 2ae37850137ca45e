"""The one training loop of a representation: validate, save, resume.

Every step's randomness is a function of (seed, step), so training that was interrupted and resumed equals training
that was not.

Legend: B checkpoints, T tokens, D token size, Z latent values, Q queries, C classes.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig, check
from weightspace.hyperrep import losses
from weightspace.hyperrep.autoencoder import Window
from weightspace.hyperrep.parallel import ALONE, Processes, distributed, load_shards, save_shards, whole_state
from weightspace.hyperrep.representation import (
    CONFIG_FILE,
    MODEL_FILE,
    STATE_FILE,
    HyperRepresentation,
    assembled,
    once,
)
from weightspace.hyperrep.sensitivity import TOO_LARGE, affordable, mean_sensitivity
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.inventing import invented
from weightspace.networks.symmetry import groups_of
from weightspace.runs import (
    RunFailed,
    UserError,
    derive_seed,
    notice,
    progress,
    read_json,
    read_lines,
    write_json,
    write_lines,
    write_tensors,
)
from weightspace.tasks.images import load_task
from weightspace.tasks.queries import QuerySet, query_set
from weightspace.tokens.normalize import NORMALIZERS
from weightspace.tokens.stream import SAMPLE_BYTES, Stream, sample
from weightspace.tokens.tokenizer import Tokenizer
from weightspace.tokens.views import erased, noisy, permuted, scaled
from weightspace.zoo.model_zoo import ModelZoo, usable

METRICS_FILE = "metrics.jsonl"
LAST_FILE = "last.safetensors"
STATE_FOLDER = "state"
"""How the folder of weights and optimizer begins; the number of the step follows."""
METRIC_CHECKPOINTS, METRIC_QUERIES = 32, 64
"""Training checkpoints, and queries for each, on which the metric of the first linear compression is measured."""
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
    inputs: int = 4
    """dimensions of a batch of queries, 4 for images"""
    here: Processes = ALONE
    """the processes among which every batch is divided"""
    real: bool = False
    """whether the networks' outputs are values, not logits of classes"""


def step_losses(
    setting: Setting,
    weights: dict[str, Tensor],
    queries: Tensor,
    share: float,
    generator: torch.Generator,
    augment: PretrainConfig | None = None,
    window: Window | None = None,
) -> dict[str, Tensor]:
    """The losses of one batch of checkpoints, each divided by its scale, and their weighted sum as "total".

    A term whose weight is zero at this point of the schedule is not computed. Of several processes, each computes the
    losses of its own rows; only the contrastive one compares the whole batch. With a window, only its tokens are
    encoded, decoded and compared; for the behavioral loss they take their place among the original's other tokens.

    Args:
        setting: representation, loss weights, network, scales.
        weights: {name: [B, *shape]}, the whole batch.
        queries: [Q, ...], or [B, Q, ...] where every checkpoint has its own.
        share: how much of the training is over, 0 to 1.
        generator: randomness of the views.
        augment: how the encoder's input is disturbed (noise, erase); not at all when None.
        window: a window of the autoencoder (default: all tokens).
    """
    representation, config = setting.representation, setting.loss
    autoencoder, mask = representation.autoencoder, representation.autoencoder.mask
    gamma, beta, lam = (losses.scheduled(w, share) for w in (config.gamma, config.beta, config.cycle))
    groups = groups_of(representation.architecture)
    found: dict[str, Tensor] = {}
    if config.permute == "all":
        weights = permuted(weights, groups, generator)
    everything = representation.tokens(weights)  # [B, T, D]
    here, rows = setting.here, setting.here.share(len(everything))
    at = slice(0, len(mask)) if window is None else window.stretch
    core = at if window is None else window.core
    inner = slice(core.start - at.start, core.stop - at.start)

    def encode(x: Tensor) -> Tensor:
        return autoencoder.encode(x) if window is None else autoencoder.encode_at(x, at)

    x, mask = everything[:, at], mask[at]  # [B, T', D], [T', D]
    seen = _disturbed(x, mask, augment, generator)[rows]
    if gamma > 0:
        other = weights if config.permute == "none" else permuted(weights, groups, generator)
        view = _disturbed(representation.tokens(other)[:, at], mask, augment, generator)[rows]  # [B, T', D]
        z, z_view = encode(torch.cat([seen, view])).chunk(2)  # [B, T', Z] each
        contrast = losses.contrastive if config.contrast == "nt-xent" else losses.positive
        features, features_view = (here.gathered(autoencoder.project(some[:, inner])) for some in (z, z_view))
        found["contrastive"] = here.whole(contrast(features, features_view))
    else:
        z = encode(seen)  # [B, T', Z]
    weight = {
        "contrastive": gamma,
        "structural": (1 - gamma) * beta,
        "behavioral": (1 - gamma) * (1 - beta),
        "cycle": lam,
        "norm": config.norm_penalty,
        "variance": config.variance_penalty,
    }
    x, everything = x[rows], everything[rows]
    weights = {name: weight[rows] for name, weight in weights.items()}
    x_hat = autoencoder.decode(z) if window is None else autoencoder.decode_at(z, at)  # [B, T', D]
    if weight["structural"] > 0:
        found["structural"] = losses.structural(x_hat[:, inner], x[:, inner], mask[inner])
    if weight["behavioral"] > 0:
        shared = queries.ndim == setting.inputs
        queries = queries if shared else queries[rows]
        with torch.no_grad():
            target = behavior.logits(setting.network, weights, queries, setting.group, shared)  # [B, Q, C]
        spliced = torch.cat([everything[:, : core.start], x_hat[:, inner], everything[:, core.stop :]], 1)  # [B, T, D]
        weights_hat = representation.weights(spliced)
        logits = behavior.logits(setting.network, weights_hat, queries, setting.group, shared)  # [B, Q, C]
        found["behavioral"] = losses.behavioral(logits, target, setting.distance)
    if lam > 0:
        found["cycle"] = losses.cycle(z, encode(x_hat))
    if config.norm_penalty > 0:
        found["norm"] = losses.norm_penalty(z)
    if config.variance_penalty > 0:
        found["variance"] = here.whole(losses.variance_penalty(here.gathered(z)))
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


def training_rows(zoo: ModelZoo, config: PretrainConfig, split: str) -> pd.DataFrame:
    """The rows of one split at the configured epochs, without checkpoints that are not finite or huge."""
    missing = sorted(set(config.epochs) - set(zoo.frame["epoch"]))
    if missing:
        there = sorted(zoo.frame["epoch"].unique().tolist())
        raise UserError(f"pretrain.epochs asks for epochs {missing}, but the zoo has {there}; name some of these")
    frame = zoo.rows(split=split, epoch=list(config.epochs))
    some = max(SAMPLE_BYTES // (4 * zoo.architecture.parameter_count), 1)
    keep = np.concatenate([usable(zoo.read(frame.iloc[i : i + some])) for i in range(0, len(frame), some)])
    if not keep.any():
        raise UserError(f"every checkpoint of split {split!r} of {zoo.folder} has non-finite or huge weights")
    if not keep.all():
        members = ", ".join(map(str, sorted(set(frame["member"][~keep]))[:10]))
        left = f"{(~keep).sum()} of {len(keep)} {split} checkpoints have non-finite or huge weights: left out"
        notice(f"{left} ({members})")
    return frame[keep]


def training_checkpoints(zoo: ModelZoo, config: PretrainConfig, split: str) -> Checkpoints:
    """The checkpoints of one split at the configured epochs, without those that are not finite or huge."""
    return zoo.read(training_rows(zoo, config, split))


def fit_scales(
    checkpoints: Checkpoints,
    queries: Mapping[str, QuerySet],
    loss: LossConfig,
    distance: losses.Distance,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """The value by which each loss is divided, so that 1 means "no better than knowing nothing".

    contrastive: chance, ln(2B - 1) (1 where it is the positive-only one). structural: 1, the constant predictor on
    standardized weights. behavioral: the distance between random pairs of different training members of one task on
    its queries. cycle: 1.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "scales"))
    order = torch.randperm(len(checkpoints), generator=generator)[:512].numpy()
    total, count = 0.0, 0
    for task, own in queries.items():
        first = checkpoints.rows(order[checkpoints.frame["task"].to_numpy()[order] == task])
        members = torch.from_numpy(first.frame["member"].to_numpy(copy=True))
        different = members.roll(1) != members
        if different.any():
            logits = behavior.outputs(first, own.draw(4 * loss.queries, generator)).logits
            different = different.to(logits.device)
            pairs = losses.behavioral(logits.roll(1, 0)[different], logits[different], distance)
            total, count = total + float(pairs) * int(different.sum()), count + int(different.sum())
    if not count:
        raise UserError("the training split holds one member only; a representation needs several")
    scales = {
        "contrastive": math.log(2 * batch_size - 1) if loss.contrast == "nt-xent" else 1.0,
        "structural": 1.0,
        "behavioral": total / count,
        "cycle": 1.0,
    }
    if not 0 < scales["behavioral"] < math.inf:
        raise RunFailed(
            f"training members differ in behavior by {scales['behavioral']}; a finite positive mean is needed"
        )
    return scales


@dataclass(frozen=True)
class Part:
    """One zoo as a training sees it."""

    setting: Setting
    stream: Stream
    frame: pd.DataFrame
    """rows of its training checkpoints"""
    queries: dict[str, QuerySet]
    """task -> inputs on which behavior is compared"""
    validation: list[tuple[dict[str, Tensor], Tensor]]
    """per task: weights {name: [n, *shape]} of validation checkpoints and images [Q, ...]"""

    def asked(self, rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Queries for the checkpoints of some rows: [count, ...], or [B, count, ...] where there are several tasks."""
        drawn = [own.draw(count, generator) for own in self.queries.values()]
        if len(drawn) == 1:
            return drawn[0]
        numbers = {task: number for number, task in enumerate(self.queries)}
        which = torch.tensor([numbers[task] for task in self.frame["task"].iloc[rows.numpy()]])
        return torch.stack(drawn)[which.to(drawn[0].device)]


def part_of(
    zoo: ModelZoo,
    frame: pd.DataFrame,
    representation: HyperRepresentation,
    config: PretrainConfig,
    loss: LossConfig,
    seed: int,
    group: int | None,
    here: Processes,
) -> Part:
    """Prepare a zoo for training: scales of the losses, queries, validation checkpoints and images.

    Args:
        zoo: the zoo.
        frame: rows of its training checkpoints.
        representation: the one of its base network.
        config, loss, seed: see `pretrain`.
        group: checkpoints per vectorized call of the base network (default: measured).
        here: the processes among which every batch is divided.
    """
    device, architecture = representation.device, zoo.architecture
    tasks = [load_task(name).to(device) for name in zoo.tasks]
    generator = torch.Generator().manual_seed(derive_seed(seed, "queries"))
    size = representation.tokenizer.mask.numel()

    def invent(*inputs: Any) -> Tensor:
        return invented(zoo.read(sample(frame, size, seed)), *inputs)

    queries = {task.name: query_set(loss.query_set, task, tasks, generator, invent) for task in tasks}
    val = zoo.read(sample(training_rows(zoo, config, "val"), size, seed)).to(device)
    validation = []
    for task in tasks:
        own = val.rows((val.frame["task"] == task.name).to_numpy())
        if len(own):
            validation.append((own.weights, task.val.images[: VALIDATION_IMAGES // len(tasks)]))
    shared = len(tasks) == 1
    group = group or behavior.calibrate(architecture, device, loss.queries, config.batch_size, shared, training=True)
    real = tasks[0].real
    distance = losses.distance_of(loss, real)
    scales = fit_scales(zoo.read(sample(frame, size, seed)), queries, loss, distance, config.batch_size, seed)
    network = behavior.runner(architecture, device)
    setting = Setting(representation, loss, network, distance, group, scales, tasks[0].train.images.ndim, here, real)
    return Part(setting, Stream(zoo, frame, config.batch_size, seed), frame, queries, validation)


@torch.no_grad()
def validate(parts: Sequence[Part], batch_size: int) -> dict[str, float]:
    """The losses over validation checkpoints at the final weights, agreement and L_S; views are fixed.

    Agreement and L_S are those of whole reconstructions, the losses those that are trained: of sketches.

    Of several zoos it is the mean over them, beside the agreement on each.
    """
    each = [_validate(part, batch_size) for part in parts]
    found = {name: sum(one[name] for one in each) / len(each) for name in each[0]}
    if len(parts) > 1:
        names = [part.setting.representation.architecture.name for part in parts]
        found |= {f"agreement {name}": one["agreement"] for name, one in zip(names, each, strict=True)}
    return found


def _validate(part: Part, batch_size: int) -> dict[str, float]:
    setting, total = dataclasses.replace(part.setting, here=ALONE), dict[str, float]()
    autoencoder = setting.representation.autoencoder.eval()
    count = sum(len(next(iter(weights.values()))) for weights, _ in part.validation)
    generator = torch.Generator().manual_seed(0)  # the same views at every validation
    for weights, queries in part.validation:
        for start in range(0, len(next(iter(weights.values()))), batch_size):
            batch = {name: weight[start : start + batch_size] for name, weight in weights.items()}
            rows = len(next(iter(batch.values())))
            found = {k: float(v) for k, v in step_losses(setting, batch, queries, 1.0, generator).items()}
            x = setting.representation.tokens(batch)
            x_hat = setting.representation.encode(x).tokens()
            found["structural"] = float(losses.structural(x_hat, x, autoencoder.mask))
            predicted, original = (
                outputs if setting.real else outputs.argmax(-1)
                for some in (setting.representation.weights(x_hat), batch)
                for outputs in [behavior.logits(setting.network, some, queries, setting.group)]
            )
            found["agreement"] = float(behavior.agreement(predicted, original).mean())
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value * rows / count
    return total


def pretrain(
    zoo: ModelZoo | Sequence[ModelZoo],
    folder: Path,
    config: PretrainConfig,
    loss: LossConfig,
    autoencoder_config: AutoencoderConfig,
    seed: int,
    device: torch.device,
    title: str = "representation",
    probe: Monitor | None = None,
    start: HyperRepresentation | None = None,
    here: Processes = ALONE,
) -> HyperRepresentation:
    """Train a representation on the zoo's train split; the state of best validation total is what is returned.

    Several zoos, of any base networks, take turns: each step sees checkpoints of one. Checkpoints are read from disk
    as they are needed.

    The folder receives metrics.jsonl, the best and the last model and, while training, the state to resume from.

    Args:
        zoo: where the checkpoints come from: one zoo or several.
        folder: where the representation is written.
        config, loss, autoencoder_config: how it is trained, on what, and its size.
        seed: seed of everything random.
        device: where to train.
        title: its name in progress bars and messages.
        probe: what else is measured at every validation.
        start: a representation of another zoo to go on from, with its normalization; it must have the same size. With
            sinusoidal positions it may be of other base networks: then its transformer is taken over.
        here: the processes among which every batch is divided; the first one writes.

    Raises:
        UserError: a value that cannot work, epochs or a task that the zoo does not have.
        RunFailed: a loss that is not finite.
    """
    for part, path in ((config, "pretrain"), (loss, "loss"), (autoencoder_config, "autoencoder")):
        check(part, path)
    if (folder / CONFIG_FILE).exists():  # killed after the last write
        if here.first:
            _forget_state(folder)
        return HyperRepresentation.load(folder, device)
    zoos = [zoo] if isinstance(zoo, ModelZoo) else list(zoo)
    frames = [training_rows(each, config, "train") for each in zoos]
    here.share(config.batch_size)  # it has to be divided evenly
    representation = untrained(zoos, frames, config, loss, autoencoder_config, seed, start).to(device)
    trained, core = representation.modules, representation.autoencoder.core
    core.reduced = config.precision == "bfloat16"
    if config.compile:
        core.compile_blocks(device)
    step_of = distributed(trained, config.parallel, here, device)
    optimizer = OPTIMIZERS[config.optimizer](trained.parameters(), config.learning_rate, config.weight_decay)

    records = read_lines(folder / METRICS_FILE)
    done, best, groups = 0, None, [None] * len(zoos)
    if (state := _saved_state(folder)) is not None:
        load_shards(folder / state["at"], trained, optimizer)
        # an interrupted training goes on with the group size that it began with: other sizes round differently
        done, best, groups = state["step"], state["best"], state["groups"]
    records = [record for record in records if record["step"] <= done]
    parts = [
        part_of(each, frame, representation.on(each.architecture), config, loss, seed, group, here)
        for each, frame, group in zip(zoos, frames, groups, strict=True)
    ]
    scales = [part.setting.scales for part in parts]
    representation.info["scales"] = scales[0] if len(scales) == 1 else scales
    # the zoos take turns; each counts its own steps, so that its batches do not depend on the others
    turns = [
        part.stream.batches([step // len(parts) for step in range(done, config.steps) if step % len(parts) == number])
        for number, part in enumerate(parts)
    ]
    with progress(f"pretrain: {title}", config.steps, done) as advance:
        for step in range(done, config.steps):
            part = parts[step % len(parts)]
            generator = torch.Generator().manual_seed(derive_seed(seed, "step", step))
            rows, batch = next(turns[step % len(parts)])
            batch = {name: weight.to(device) for name, weight in batch.items()}
            trained.train()
            asked = part.asked(rows, loss.queries, generator)
            window = _window(part, generator)
            work = partial(
                step_losses, part.setting, batch, asked, step / config.steps, generator, config, window=window
            )
            found: dict[str, Tensor] = step_of(work)
            values = here.mean({name: float(value.detach()) for name, value in found.items()}, device)
            members = sorted(set(part.frame["member"].iloc[rows.numpy()].tolist()))
            _check_finite(values, f"the loss of {title}", step, members)
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, step)
            optimizer.zero_grad()
            found["total"].backward()
            norm = nn.utils.clip_grad_norm_(trained.parameters(), config.clip)
            _check_finite({"norm": float(norm)}, f"the gradient of {title}", step, members)
            optimizer.step()
            done = step + 1
            advance(1, f"loss {values['total']:.3f}")
            if done % config.validate_every == 0 or done == config.steps:
                validation: dict[str, float] = step_of(partial(validate, parts, config.batch_size))
                if probe is not None:
                    validation |= step_of(partial(probe, representation))
                _check_finite(validation, f"the validation of {title}", step, [])
                record = {"step": done, "train": values, "val": validation}
                records.append(record)
                better = best is None or validation["total"] < best["total"]
                best = {"step": done, **validation} if best is None or better else best
                now = once(whole_state(trained, here))
                if here.first and better:
                    write_tensors(folder / MODEL_FILE, now)
                if here.first and done == config.steps:
                    write_tensors(folder / LAST_FILE, now)
                if here.first:
                    write_lines(folder / METRICS_FILE, records)
                _save_state(folder, trained, optimizer, here, done, best, [part.setting.group for part in parts])
    assert best is not None  # every training ends with a validation
    here.wait()  # for the best model to be written
    finished = assembled(
        representation.autoencoder_config,
        [each.tokenizer for each in representation.siblings],
        [each.normalizer.to("cpu") for each in representation.siblings],
        {**representation.info, "step": best.pop("step"), "validation": best},
    )
    finished.load_state(load_file(folder / MODEL_FILE))
    finished.modules.eval()
    if here.first:
        finished.save(folder)
        _forget_state(folder)
    return finished.to(device)


def untrained(
    zoos: Sequence[ModelZoo],
    frames: Sequence[pd.DataFrame],
    config: PretrainConfig,
    loss: LossConfig,
    autoencoder: AutoencoderConfig,
    seed: int,
    start: HyperRepresentation | None,
) -> HyperRepresentation:
    """The representation as training begins: normalizers and mixtures fitted to (a sample of) training checkpoints.

    Args:
        zoos: the zoos; those of one base network share what is fitted.
        frames: rows of the training checkpoints of each.
        config, loss, autoencoder, seed, start: see `pretrain`.
    """
    each = [zoo.architecture for zoo in zoos]
    networks = [network for i, network in enumerate(each) if network not in each[:i]]
    if len(networks) > 1 and autoencoder.token_size is None:
        longest = max(Tokenizer(network).token_size for network in networks)
        autoencoder = dataclasses.replace(autoencoder, token_size=longest)
    tokenizers = [Tokenizer(network, autoencoder.token_size) for network in networks]
    if autoencoder.details and (reason := _incomplete(autoencoder, loss, tokenizers)):
        if _compares_behavior(loss):
            notice(f"no details, all latent values go to the autoencoder: {reason}")
        autoencoder = dataclasses.replace(autoencoder, sketch=0)
    if start is not None and start.autoencoder_config != autoencoder:
        raise UserError(
            f"the representation to start from is of another size ({start.autoencoder_config}) than asked for "
            f"({autoencoder}); ask for the same autoencoder"
        )
    go_on = start is not None and (autoencoder.positions == "learned" or _covers(start, networks))
    normalizers, tokens = [], []
    for tokenizer in tokenizers:
        some = [
            zoo.read(sample(frame, tokenizer.mask.numel(), seed))
            for zoo, frame in zip(zoos, frames, strict=True)
            if zoo.architecture == tokenizer.architecture
        ]
        x = torch.cat([tokenizer.tokenize(part.weights).x for part in some])
        own = start.on(tokenizer.architecture).normalizer.to("cpu") if start and go_on else None
        normalizers.append(own or NORMALIZERS[config.normalize](tokenizer, x))
        tokens.append(x)
    members = sum(int(frame["member"].nunique()) for frame in frames)
    info: dict[str, Any] = {
        "tasks": list(dict.fromkeys(task for zoo in zoos for task in zoo.tasks)),
        "zoo": {"fingerprint": "+".join(zoo.fingerprint for zoo in zoos), "members": members},
        "loss": dataclasses.asdict(loss),
        "pretrain": dataclasses.asdict(config),
        "seed": seed,
    }
    with torch.random.fork_rng(devices=[]):  # built on the CPU
        torch.default_generator.manual_seed(derive_seed(seed, "autoencoder"))
        representation = assembled(autoencoder, tokenizers, normalizers, info)
    mixes, fresh = autoencoder.components > 0, start is None or not go_on
    costs = [
        _costs(one, zoos, frames, loss, autoencoder.queries, seed) if mixes and (fresh or autoencoder.details) else None
        for one in representation.siblings
    ]
    normalized = [one.normalizer.normalize(x) for one, x in zip(representation.siblings, tokens, strict=True)]
    if fresh:
        for one, x, own in zip(representation.siblings, normalized, costs, strict=True):
            one.autoencoder.fit(x, derive_seed(seed, "mixture"), own and own.metric)
            if one.latent_size >= one.architecture.parameter_count:
                notice(
                    f"nothing is compressed: {one.latent_size:,} latent values (tokens x autoencoder.latent) for "
                    f"{one.architecture.parameter_count:,} weights; lower autoencoder.latent"
                )
    if start is not None:
        state = start.state()
        kept = state if go_on else {name: value for name, value in state.items() if name.startswith("0.core.")}
        representation.load_state({**representation.state(), **kept})
    for one, x, own in zip(representation.siblings, normalized, costs, strict=True):
        if own is not None:
            one.autoencoder.fit_details(x, own.queries, own.real)
    return representation


def _incomplete(autoencoder: AutoencoderConfig, loss: LossConfig, tokenizers: Sequence[Tokenizer]) -> str | None:
    """Why details cannot complete a sketch, if they cannot."""
    if not _compares_behavior(loss):
        return "their directions are those that behavior sees"
    if not autoencoder.components:
        return "they complete a mixture, and autoencoder.components=0"
    if autoencoder.window is not None:
        return f"they need whole checkpoints, and autoencoder.window={autoencoder.window}"
    return None if all(affordable(tokenizer) for tokenizer in tokenizers) else TOO_LARGE


def _compares_behavior(loss: LossConfig) -> bool:
    heights = [beta for _, beta in loss.beta] if isinstance(loss.beta, tuple) else [loss.beta]
    return min(heights) < 1


@dataclass(frozen=True)
class Costs:
    """What errors cost in behavior, on average over some training checkpoints."""

    metric: Tensor
    """[T, D, D]: a quadratic form per position"""
    queries: Tensor
    """[Q, ...]: inputs on which behavior is compared, in equal parts of every task"""
    real: bool
    """whether the networks' outputs are values"""


def _costs(
    representation: HyperRepresentation,
    zoos: Sequence[ModelZoo],
    frames: Sequence[pd.DataFrame],
    loss: LossConfig,
    count: int,
    seed: int,
) -> Costs | None:
    """The costs for one base network, and `count` queries; None without behavior or where it would take much memory."""
    tokenizer, normalizer = representation.tokenizer, representation.normalizer
    if not _compares_behavior(loss):
        return None
    if not affordable(tokenizer):
        notice(f"{representation.architecture}: the start does not know what errors cost in behavior: {TOO_LARGE}")
        return None
    metrics, shown, real = [], [], False
    for zoo, frame in zip(zoos, frames, strict=True):
        if zoo.architecture != representation.architecture:
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, "metric", zoo.fingerprint))
        tasks = [load_task(name) for name in zoo.tasks]
        for task in (task for task in tasks if (frame["task"] == task.name).any()):
            rows = frame[frame["task"] == task.name]
            rows = rows.iloc[torch.randperm(len(rows), generator=generator)[:METRIC_CHECKPOINTS].numpy()]
            some, real = zoo.read(rows), task.real
            queries = query_set(loss.query_set, task, tasks, generator, partial(invented, some))
            inputs = queries.draw(METRIC_QUERIES * len(some), generator)
            metrics.append(mean_sensitivity(tokenizer, normalizer, some, inputs, real, generator))
            shown.append(queries.draw(count, generator).cpu())
    every = torch.cat(shown)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(derive_seed(seed, "details")))
    return Costs(torch.stack(metrics).mean(0), every[chosen[:count]], real)


def _covers(start: HyperRepresentation, networks: Sequence[Architecture]) -> bool:
    return [sibling.architecture for sibling in start.siblings] == list(networks)


def _window(part: Part, generator: torch.Generator) -> Window | None:
    """A random window of a training step; None where all tokens are seen at once."""
    windows = part.setting.representation.autoencoder.windows
    return windows[int(torch.randint(len(windows), (), generator=generator))] if len(windows) > 1 else None


def _check_finite(values: dict[str, float], what: str, step: int, members: list[int]) -> None:
    if not all(math.isfinite(value) for value in values.values()):
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise RunFailed(
            f"{what} is not finite at step {step} ({numbers}) with members {members}; lower pretrain.learning_rate and "
            "choose another --out, or leave such members out of the zoo"
        )


def _save_state(
    folder: Path,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    here: Processes,
    step: int,
    best: dict[str, float],
    groups: list[int],
) -> None:
    """Keep all that is needed to go on; the state before is there until this one is complete."""
    name = f"{STATE_FOLDER}-{step}"
    if here.first:
        shutil.rmtree(folder / name, ignore_errors=True)  # of a process that was killed while writing
    here.wait()
    save_shards(folder / name, trained, optimizer)
    here.wait()
    if here.first:
        state = {"at": name, "step": step, "best": best, "groups": groups}
        write_json(folder / STATE_FILE, state, sort=False)  # the order of the metrics is that of the model card
        for path in folder.glob(f"{STATE_FOLDER}-*"):
            if path.name != name:
                shutil.rmtree(path)


def _saved_state(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / STATE_FILE) if (folder / STATE_FILE).exists() else None


def _forget_state(folder: Path) -> None:
    (folder / STATE_FILE).unlink(missing_ok=True)
    for path in folder.glob(f"{STATE_FOLDER}-*"):
        shutil.rmtree(path)
