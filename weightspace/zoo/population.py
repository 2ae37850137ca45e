"""Train many networks at once: one vectorized step advances a whole group of members.

Every member has its own initialization, learning rate, weight decay and data order, and ends with the weights that a
plain torch.optim loop would give it (to float tolerance). Whether groups run vectorized in this process or in worker
processes of one thread each is measured once per machine.

Legend: n members, B images per step, C classes, P weights of one network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed, parallel_config
from torch import Tensor

from weightspace.config import ZooConfig, check
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture, arguments_of, check_init, initialize, register_network
from weightspace.networks.checkpoints import Checkpoints, concatenate, flatten, unflatten
from weightspace.runs import RunFailed, UserError, cores, derive_seed, notice, progress, read_json, write_json
from weightspace.tasks.images import ImageTask, load_task
from weightspace.zoo.cluster import over
from weightspace.zoo.model_zoo import SPLITS, ZOO_FILE, ModelZoo, ZooWriter

UNIT = 64
"""Most members that are trained and written together as one shard; what an interrupted run can lose."""
UNIT_GPU = 1024
"""The same on a GPU, which needs larger groups."""
STRATEGY_FILE = "strategy.json"


def grid(config: ZooConfig, seed: int) -> pd.DataFrame:
    """The members: a row per task x init x seed x learning rate x weight decay, with its split.

    The last `unseen_seeds` seeds are split 'unseen'; the others are divided at random, by member. Where some members
    have a backdoor, the column `backdoor` is 1 for them and 0 for the others.
    """
    check(config, "zoo")
    rows = [
        {"task": task, "init": init, "seed": number, "learning_rate": rate, "weight_decay": decay}
        for task in config.tasks
        for init in config.inits
        for number in range(config.seeds)
        for rate in config.learning_rates
        for decay in config.weight_decays
    ]
    members = pd.DataFrame(rows)
    members.insert(0, "member", np.arange(len(members)))
    unseen = members["seed"] >= config.seeds - config.unseen_seeds
    seen = members.index[~unseen]
    generator = torch.Generator().manual_seed(derive_seed(seed, "zoo", "split"))
    shuffled = seen[torch.randperm(len(seen), generator=generator).numpy()]
    val, test = round(config.val_share * len(seen)), round(config.test_share * len(seen))
    members["split"] = "train"
    members.loc[unseen, "split"] = "unseen"
    members.loc[shuffled[:val], "split"] = "val"
    members.loc[shuffled[val : val + test], "split"] = "test"
    absent = set(SPLITS) - set(members["split"])
    if absent:
        raise UserError(
            f"a zoo of {len(members)} members with these shares has no member in {', '.join(sorted(absent))}; "
            "raise zoo.seeds, zoo.unseen_seeds, zoo.val_share or zoo.test_share"
        )
    if config.backdoor_share:
        generator = torch.Generator().manual_seed(derive_seed(seed, "zoo", "backdoor"))
        chosen = torch.randperm(len(members), generator=generator)[: round(config.backdoor_share * len(members))]
        if not 0 < len(chosen) < len(members):
            raise UserError(
                f"zoo.backdoor_share={config.backdoor_share} of {len(members)} members leaves no "
                f"{'backdoored' if not len(chosen) else 'clean'} one; choose another share"
            )
        members["backdoor"] = 0
        members.loc[chosen.numpy(), "backdoor"] = 1
    return members


@dataclass(frozen=True)
class Backdoors:
    """Which training images of n members bear a trigger, and what class it means."""

    poisoned: Tensor
    """[n, N] bool"""
    target: Tensor
    """[n]"""


@dataclass(frozen=True)
class Recipe:
    """How n members are trained; one entry per member where it says [n]."""

    learning_rate: Tensor
    """[n]"""
    weight_decay: Tensor
    """[n]"""
    orders: tuple[int, ...]
    """n seeds of the data order; members with equal seeds see the same batches."""
    optimizer: str = "adam"
    batch_size: int = 32
    backdoors: Backdoors | None = None


def stamped(images: Tensor) -> Tensor:
    """Images [N, C, H, W] with the trigger: a white square of a quarter of the height in the lower right corner."""
    size = max(images.shape[-1] // 4, 1)
    marked = images.clone()
    marked[..., -size:, -size:] = images.amax(dim=(0, 2, 3), keepdim=True)[0]  # the brightest value of each channel
    return marked


def data_order(order: int, epoch: int, count: int) -> Tensor:
    """The order in which a member with this order seed sees `count` training images in this epoch [count]."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(order, "epoch", epoch)))


def train(
    architecture: Architecture,
    weights: dict[str, Tensor],
    task: ImageTask,
    recipe: Recipe,
    epochs: int,
    group: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train n networks together; yields (epoch, weights {name: [n, *shape]}) for epoch 0 (as given) to `epochs`.

    Args:
        architecture: their base network.
        weights: where they start {name: [n, *shape]}.
        task: its training images are used, on the device where they lie; the loss is the cross-entropy, or the
            squared error of values.
        recipe: learning rates, weight decays, data orders, optimizer.
        epochs: passes over the training images.
        group: members per vectorized step (1: one after another).
        advance: called with the number of steps taken, for a progress bar.
    """
    images, labels = task.train.images, task.train.labels
    device, count = images.device, len(labels)
    if recipe.backdoors is not None:
        poisoned, target = recipe.backdoors.poisoned.to(device), recipe.backdoors.target.to(device)
        images = torch.cat([images, stamped(images)])  # image i with the trigger is image N + i
    network = behavior.runner(architecture, device).train()
    buffers = {name: weights[name].to(device, copy=True) for name in architecture.buffers}  # the networks update them
    trained = {name: shape for name, shape in architecture.shapes.items() if name not in buffers}
    flat = flatten({name: weights[name].to(device) for name in trained})  # [n, P]
    update = Optimizer(recipe, flat)

    def now() -> dict[str, Tensor]:
        state = {**unflatten(trained, flat.clone()), **{name: value.clone() for name, value in buffers.items()}}
        return {name: state[name] for name in architecture.shapes}

    yield 0, now()
    for epoch in range(1, epochs + 1):
        orders = {order: data_order(order, epoch, count) for order in set(recipe.orders)}
        order = torch.stack([orders[seed] for seed in recipe.orders]).to(device)  # [n, N]
        classes = labels[order]  # [n, N], or values [n, N, C]
        if recipe.backdoors is not None:
            bears = poisoned.gather(1, order)
            classes = torch.where(bears, target[:, None], classes)
            order = order + count * bears
        with torch.random.fork_rng(
            [device] if device.type == "cuda" else []
        ):  # dropout draws from the global generator
            torch.manual_seed(derive_seed(*recipe.orders, "dropout", epoch))
            for start in range(0, count, recipe.batch_size):
                batch = order[:, start : start + recipe.batch_size]  # [n, B]
                wanted = classes[:, start : start + recipe.batch_size].flatten(0, 1)
                flat.requires_grad_()
                state = {**unflatten(trained, flat), **buffers}
                logits = behavior.logits(network, state, images[batch], group, shared=False)
                if task.real:
                    losses = F.mse_loss(logits.flatten(0, 1), wanted, reduction="sum") / (batch.shape[1] * task.classes)
                else:
                    losses = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum") / batch.shape[1]
                (gradient,) = torch.autograd.grad(losses, flat)  # [n, P]
                flat = flat.detach()
                update.step(flat, gradient)
                advance(1)
        yield epoch, now()


class Optimizer:
    """torch.optim's Adam, AdamW and SGD (momentum 0.9) for n members, each with its own rate and decay, in place."""

    def __init__(self, recipe: Recipe, flat: Tensor) -> None:
        if recipe.optimizer not in ("adam", "adamw", "sgd"):
            raise UserError(f"unknown optimizer {recipe.optimizer!r}; the optimizers are adam, adamw, sgd")
        self.kind = recipe.optimizer
        self.rate = recipe.learning_rate.to(flat)[:, None]  # [n, 1]
        self.decay = recipe.weight_decay.to(flat)[:, None]  # [n, 1]
        self.mean = torch.zeros_like(flat)
        self.square = torch.zeros_like(flat)
        self.steps = 0

    def step(self, flat: Tensor, gradient: Tensor) -> None:
        """Update the weights [n, P] in place. Formulas: torch.optim.Adam, AdamW and SGD."""
        self.steps += 1
        if self.kind == "adamw":
            flat.mul_(1 - self.rate * self.decay)
        else:
            gradient = gradient.addcmul_(flat, self.decay)
        if self.kind == "sgd":
            self.mean.mul_(0.9).add_(gradient)
            flat.addcmul_(self.mean, self.rate, value=-1)
            return
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        denominator = (self.square.sqrt() / (1 - 0.999**self.steps) ** 0.5).add_(1e-8)
        flat.sub_(self.mean / denominator * (self.rate / (1 - 0.9**self.steps)))


def score(checkpoints: Checkpoints, task: ImageTask) -> Checkpoints:
    """The same checkpoints with train, val and test loss and accuracy, and the gap (train - test accuracy).

    Members of a zoo with backdoors also get `attack`: the share of the test images of other classes that are taken for
    the target class once they bear the trigger (for clean members: of the class that would be their target).
    """
    properties = {}
    for split in ("train", "val", "test"):
        images = task.split(split)
        outputs = behavior.outputs(checkpoints, images.images, images.labels)
        properties[f"{split}_loss"] = outputs.loss.double().cpu().numpy()
        properties[f"{split}_acc"] = outputs.accuracy.double().cpu().numpy()
    if "target" in checkpoints.frame:
        target = torch.from_numpy(checkpoints.frame["target"].to_numpy(copy=True)).to(task.test.labels.device)[:, None]
        taken = behavior.outputs(checkpoints, stamped(task.test.images)).predictions == target  # [n, Q]
        other = task.test.labels != target
        properties["attack"] = ((taken & other).sum(1) / other.sum(1)).double().cpu().numpy()
    frame = checkpoints.frame.assign(**properties)
    return dataclasses.replace(checkpoints, frame=frame.assign(gap=frame["train_acc"] - frame["test_acc"]))


def start_weights(architecture: Architecture, members: pd.DataFrame, seed: int) -> dict[str, Tensor]:
    """Initial weights {name: [n, *shape]}; members that share init and seed start from the same weights."""
    fresh: dict[tuple[str, int], dict[str, Tensor]] = {}
    for init, number in zip(members["init"], members["seed"], strict=True):
        if (init, number) not in fresh:
            generator = torch.Generator().manual_seed(derive_seed(seed, "zoo", "init", init, number))
            fresh[init, number] = initialize(architecture, init, generator)
    each = [fresh[pair] for pair in zip(members["init"], members["seed"], strict=True)]
    return {name: torch.stack([weights[name] for weights in each]) for name in architecture.shapes}


def recipe_of(members: pd.DataFrame, config: ZooConfig, task: ImageTask, seed: int) -> Recipe:
    """The recipe of some members of a grid; members of one seed see the same data order, as in the published zoos."""
    backdoors = None
    if "backdoor" in members:
        each = []
        for member, backdoor in zip(members["member"], members["backdoor"], strict=True):
            generator = torch.Generator().manual_seed(derive_seed(seed, "zoo", "poison", member))
            each.append(
                (torch.rand(len(task.train.labels), generator=generator) < config.backdoor_poison) & (backdoor == 1)
            )
        backdoors = Backdoors(torch.stack(each), torch.tensor(members["target"].to_numpy(copy=True)))
    return Recipe(
        torch.tensor(members["learning_rate"].to_numpy(), dtype=torch.float32),
        torch.tensor(members["weight_decay"].to_numpy(), dtype=torch.float32),
        tuple(derive_seed(seed, "zoo", "order", number) for number in members["seed"]),
        config.optimizer,
        config.batch_size,
        backdoors,
    )


def train_members(
    config: ZooConfig,
    members: pd.DataFrame,
    task: ImageTask,
    seed: int,
    group: int,
    advance: Callable[[int], None] = lambda steps: None,
) -> Checkpoints:
    """Train members of one task and score them at every epoch to be saved; rows are ordered by member, epoch."""
    architecture = architecture_of(config, task)
    if "backdoor" in members:
        draws = [derive_seed(seed, "zoo", "target", member) % task.classes for member in members["member"]]
        members = members.assign(target=draws)
    weights = start_weights(architecture, members, seed)
    recipe = recipe_of(members, config, task, seed)
    kept = []
    for epoch, now in train(architecture, weights, task, recipe, config.epochs, group, advance):
        if epoch in config.save_epochs:
            frame = members.reset_index(drop=True)
            frame.insert(1, "epoch", epoch)
            kept.append(score(Checkpoints(architecture, {k: w.cpu() for k, w in now.items()}, frame), task))
    all_epochs = concatenate(kept)
    return all_epochs.rows(all_epochs.frame.sort_values(["member", "epoch"], kind="stable").index.to_numpy())


def architecture_of(config: ZooConfig, task: ImageTask) -> Architecture:
    """The base network of a zoo config, with the channels and classes of its task.

    Raises:
        UserError: the network takes images of another size.
    """
    known: dict[str, Any] = {"activation": config.activation}
    if config.dropout:
        known["dropout"] = config.dropout
    if task.real:
        known |= {"inputs": task.input_shape[0], "outputs": task.classes}
    else:
        channels, height, width = task.input_shape
        known |= {"channels": channels, "classes": task.classes} | ({"size": height} if height == width else {})
    takes = Architecture(config.network).takes
    arguments = {name: value for name, value in known.items() if takes is None or name in takes}
    if config.dropout and "dropout" not in arguments:
        raise UserError(f"zoo.dropout={config.dropout}: {config.network} has no dropout; choose another zoo.network")
    architecture = Architecture(config.network, arguments | arguments_of(config.arguments))
    expected = behavior.input_shape_of(architecture.build())
    if len(expected) != len(task.input_shape):
        kind, other = ("coordinates", "pixels:0:digits") if len(expected) == 1 else ("images", "digits")
        raise UserError(
            f"{config.network} takes {kind}, which {task.name!r} does not have; choose another zoo.network, or another "
            f"task, such as {other}"
        )
    if expected != task.input_shape:
        fitting = f"{task.name.partition('@')[0]}@{'x'.join(map(str, expected))}"
        raise UserError(
            f"{config.network} takes images of shape {expected}, but the images of {task.name!r} have "
            f"{task.input_shape}; choose another zoo.network, or resize them with zoo.tasks={fitting} "
            f"(of a study: --task {fitting})"
        )
    return architecture


@dataclass(frozen=True)
class Strategy:
    """How a population is trained; kept in the zoo's folder, so that an interrupted zoo is finished the same way."""

    workers: int
    """worker processes of one thread (1: this process with all threads)"""
    group: int
    """members per vectorized step"""
    unit: int
    """most members per shard"""


def shards_of(members: int, strategy: Strategy) -> int:
    """How many shards some members are trained in: as many for every worker, where there are enough members."""
    least = -(-members // strategy.unit)
    return min(-(-least // strategy.workers) * strategy.workers, members)


def plan(config: ZooConfig, task: ImageTask, members: int, cores: int) -> Strategy:
    """The fastest strategy for this network on this machine, by measurement; config.workers and .group overrule it."""
    architecture = architecture_of(config, task)
    if (config.group or 1) > 1 and not behavior.vectorized(architecture):
        raise UserError(f"zoo.group={config.group}: {architecture} cannot be vectorized; leave it out, or set it to 1")
    device = task.train.images.device
    unit = UNIT if device.type == "cpu" else UNIT_GPU

    def fastest(threads: int | None) -> tuple[float, int]:
        seconds = behavior.timings(
            architecture, device, config.batch_size, min(members, unit), shared=False, training=True, threads=threads
        )
        group = config.group or min(seconds, key=lambda size: seconds[size])
        return seconds.get(group, min(seconds.values())), group

    together, group = fastest(None)
    if device.type != "cpu" or config.workers == 1 or (cores == 1 and not config.workers):
        return Strategy(1, group, unit)
    apart, group_apart = fastest(1)
    steps = config.epochs * -(-len(task.train.labels) // config.batch_size) * members
    gain = (together - apart / cores) * steps  # seconds that workers would save
    startup = 5.0  # seconds until a new process has imported torch
    if config.workers or gain > max(startup, 0.2 * together * steps):
        return Strategy(config.workers or cores, group_apart, unit)
    return Strategy(1, group, unit)


def train_population(config: ZooConfig, folder: Path, seed: int, device: torch.device, processors: int = 0) -> ModelZoo:
    """Train the whole grid and write it as a zoo; continues after the shards that are already there.

    Args:
        config: the grid, and how it is trained.
        folder: the zoo.
        seed: seed of initializations, data orders and split.
        device: where to train.
        processors: of a connected Ray cluster that trains the shards (`zoo.cluster`; 0: they are trained here). The
            zoo is the one that as many workers make here.

    Raises:
        UserError: an unknown task, network, init or activation, or a grid that leaves a split empty.
        RunFailed: a worker process was killed.
    """
    members = grid(config, seed)
    if ":" in config.network:
        register_network(config.network)
    tasks = {name: load_task(name).to(device) for name in config.tasks}
    task = next(iter(tasks.values()))
    architecture = architecture_of(config, task)
    if config.backdoor_share and task.real:
        raise UserError(f"zoo.backdoor_share={config.backdoor_share}: {task.name!r} has no classes to mistake")
    for other in tasks.values():
        if architecture_of(config, other) != architecture:
            raise UserError(
                f"the tasks of one zoo need the same shape of inputs and number of classes: {task.name!r} has "
                f"{task.input_shape} and {task.classes}, {other.name!r} has {other.input_shape} and {other.classes}"
            )
    for init in config.inits:
        check_init(init)
    late = [epoch for epoch in config.save_epochs if not 0 <= epoch <= config.epochs]
    if late:
        raise UserError(f"zoo.save_epochs has {late}, outside 0 to zoo.epochs={config.epochs}")
    writer = ZooWriter(folder, architecture, {"config": dataclasses.asdict(config), "seed": seed})
    if (folder / STRATEGY_FILE).exists():
        strategy = Strategy(**read_json(folder / STRATEGY_FILE))
    else:
        asked = dataclasses.replace(config, workers=config.workers or processors or None)
        strategy = plan(asked, task, len(members), cores())
        write_json(folder / STRATEGY_FILE, dataclasses.asdict(strategy))
    units = [
        own.iloc[rows]
        for _, own in members.groupby("task", sort=False)
        for rows in np.array_split(np.arange(len(own)), shards_of(len(own), strategy))
    ]
    todo = [unit for unit in range(len(units)) if not writer.has(unit)]
    if (folder / ZOO_FILE).exists():  # killed after the last write
        return writer.finish(range(len(units)))
    finished = len(members) - sum(len(units[unit]) for unit in todo)
    with progress("zoo: training members", len(members), finished) as advance:
        if (strategy.workers == 1 and not processors) or not todo:
            for unit in todo:
                own = tasks[units[unit]["task"].iloc[0]]
                steps = config.epochs * -(-len(own.train.labels) // config.batch_size)
                share = len(units[unit]) / steps
                part = train_members(config, units[unit], own, seed, strategy.group, lambda n, s=share: advance(n * s))
                writer.write(unit, part)
        else:
            jobs = [Job(config, units[unit], seed, strategy.group, unit, device.type) for unit in todo]
            results = over(_work, jobs, device.type == "cuda") if processors else _in_workers(strategy.workers, jobs)
            for unit, part in results:
                writer.write(unit, part)
                advance(len(units[unit]))
    zoo = writer.finish(range(len(units)))
    diverged = zoo.frame.loc[~np.isfinite(zoo.frame["train_loss"]), "member"].unique()
    if len(diverged):
        notice(f"{len(diverged)} members diverged (their loss is not finite): {', '.join(map(str, diverged[:10]))}")
    return zoo


@dataclass(frozen=True)
class Job:
    """One shard as a worker is given it."""

    config: ZooConfig
    members: pd.DataFrame
    seed: int
    group: int
    unit: int
    device: str


def _in_workers(workers: int, jobs: Sequence[Job]) -> Iterator[tuple[int, Checkpoints]]:
    with parallel_config("loky", n_jobs=min(workers, len(jobs)), inner_max_num_threads=1):
        done = Parallel(return_as="generator_unordered")(delayed(_work)(job) for job in jobs)
        try:
            yield from cast(Iterator[tuple[int, Checkpoints]], done)
        except BrokenProcessPool:
            raise RunFailed(
                "a worker process was killed, often for lack of memory; what is finished is kept, start the same "
                "command again (where that does not help: with fewer zoo.workers, in another --out)"
            ) from None


def _work(job: Job) -> tuple[int, Checkpoints]:
    torch.set_num_threads(1)
    task = load_task(job.members["task"].iloc[0]).to(job.device)
    return job.unit, train_members(job.config, job.members, task, job.seed, job.group)
