"""New networks from embeddings of good anchors, and the baselines that have to be beaten.

Legend: a anchors, T tokens, Z latent values, P weights of one network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weightspace.config import GenerateConfig
from weightspace.downstream import metrics
from weightspace.downstream.baselines import ANCHORS, AVERAGES, NOISE, PCA, fit_pca
from weightspace.downstream.samplers import WITH_BANDWIDTH, Fitness, joint_kde, sampler_named
from weightspace.hyperrep.pretrain import training_checkpoints
from weightspace.hyperrep.refine import compares_behavior, descend, refined, refining_queries, rows_at_once
from weightspace.hyperrep.representation import Embeddings, HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.behavior import Outputs
from weightspace.networks.checkpoints import Checkpoints, concatenate, unflatten
from weightspace.networks.symmetry import align, groups_of
from weightspace.runs import UserError, derive_seed, progress, read_json, write_json, write_tensors
from weightspace.tasks.images import ImageTask
from weightspace.zoo.model_zoo import ModelZoo

STAGE = "generate"


def titles(representations: Iterable[str], samplers: Sequence[str]) -> list[str]:
    """What the networks of each representation and sampler are called: the sampler is named where there are several."""
    if len(samplers) == 1:
        return list(representations)
    return [f"{name}, {sampler}" for name in representations for sampler in samplers]


def choose_anchors(train: Checkpoints, count: int) -> Checkpoints:
    """The best training checkpoints by validation accuracy, at most one per member."""
    frame = train.frame.sort_values(["val_acc", "member", "epoch"], ascending=[False, True, True], kind="stable")
    return train.rows(frame.drop_duplicates("member").head(count).index.to_numpy())


def numbered(count: int, task: str) -> pd.DataFrame:
    """The rows of `count` new networks for a task."""
    return pd.DataFrame({"network": range(count), "task": task})


def as_checkpoints(architecture: Architecture, flat: Tensor, task: str) -> Checkpoints:
    """Vectors [n, P] as checkpoints for a task."""
    return Checkpoints(architecture, unflatten(architecture.shapes, flat), numbered(len(flat), task))


@dataclass(frozen=True)
class Generated:
    """Networks of every method."""

    networks: dict[str, Checkpoints]
    """representation (and sampler) or baseline -> networks"""
    records: list[dict[str, Any]]
    table: pd.DataFrame
    """a row per network: representation, network, task, test_acc, novelty"""


def generate(
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    tasks: Mapping[str, ImageTask],
    config: GenerateConfig,
    seed: int,
) -> Generated:
    """Generate networks with every representation and sampler; score them beside the baselines of DESIGN section 7.

    Every task of the zoo has anchors and networks of its own; where there are several, the split in the records is
    "test TASK".
    """
    train = training_checkpoints(zoo, next(iter(representations.values())).pretrain_config, "train")
    typical = metrics.typical_nearest_distance(train.flat(), train.frame["member"].to_numpy())
    made, records, rows = [], [], []
    with progress("generate", len(tasks) * (len(representations) * len(config.samplers) + 4)) as advance:
        for task in tasks.values():
            of_task = train.rows((train.frame["task"] == task.name).to_numpy())
            networks = networks_for(zoo, representations, of_task, task, config, seed, advance)
            split = "test" if len(tasks) == 1 else f"test {task.name}"
            outputs = {k: behavior.outputs(c, task.test.images, task.test.labels) for k, c in networks.items()}
            reference = diversities(networks[ANCHORS], networks[ANCHORS], outputs[ANCHORS], task.classes)
            for name, some in networks.items():
                nearest = metrics.nearest_distance(some.flat(), train.flat())
                novelty = (nearest / (typical or math.nan)).numpy()  # no scale where training members coincide
                pairs = diversities(some, networks[ANCHORS], outputs[name], task.classes)
                records += score(name, split, outputs[name], novelty, pairs, reference)
                row = {"representation": name, "network": range(len(some)), "task": task.name, "novelty": novelty}
                rows.append(pd.DataFrame({**row, "test_acc": _array(outputs[name].accuracy)}))
            made.append(networks)
            advance(1)
    joined = {name: concatenate(part[name] for part in made) for name in made[0]}
    return Generated(joined, records, pd.concat(rows, ignore_index=True))


def networks_for(
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    train: Checkpoints,
    task: ImageTask,
    config: GenerateConfig,
    seed: int,
    advance: Callable[..., None],
) -> dict[str, Checkpoints]:
    """The networks of every method for one task: representations first, then the baselines.

    The baselines: the anchors; the joint KDE in a PCA of the weights with as many values; anchors + noise at the
    distance at which the networks of the last representation (and sampler) lie from their nearest anchor; averages
    of two aligned anchors. Where a sampler has a bandwidth, the widest is used that keeps the anchors' validation
    accuracy.
    """
    first = next(iter(representations.values()))
    architecture = zoo.architecture
    anchors = choose_anchors(train, config.anchors)
    if len(anchors) < 2:
        raise UserError(f"generation needs at least two anchors, the zoo has {len(anchors)} training member")
    flat = anchors.flat()

    def conditioned(networks: Checkpoints) -> Checkpoints:
        images = task.train.images[: config.condition]
        return behavior.conditioned(networks, images) if config.condition else networks

    def accuracy(networks: Checkpoints) -> Tensor:
        return behavior.outputs(networks, task.val.images, task.val.labels).accuracy.cpu()

    least = float(accuracy(anchors).mean()) - config.tolerance

    def widest(draw: Callable[[float], Checkpoints], bandwidths: Sequence[float]) -> Checkpoints:
        """The networks of the widest bandwidth that keeps the validation accuracy; else those of the best accuracy."""
        candidates = {bandwidth: draw(bandwidth) for bandwidth in bandwidths}
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        reached = {bandwidth: float(accuracy(networks).mean()) for bandwidth, networks in candidates.items()}
        keeping = [bandwidth for bandwidth, value in reached.items() if value >= least]
        return candidates[max(keeping) if keeping else max(reached, key=lambda bandwidth: reached[bandwidth])]

    def generator(*names: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(seed, "generate", *names))

    teachable = config.refine.steps > 0
    inputs = refining_queries(task, config.refine, seed, train) if teachable else task.train.images
    of_anchors = behavior.outputs(anchors, inputs) if teachable else None
    few = min(config.teachers, len(anchors))

    def taught(representation: HyperRepresentation, z: Tensor) -> Tensor:
        """Embeddings refined until each network gives the mean probabilities of its own few random anchors.

        In its weights it stays close to where it was drawn: new weights, and a new mixture of known behaviors.
        """
        if of_anchors is None or not compares_behavior(representation):
            return z
        draws = torch.rand(len(z), len(anchors), generator=generator("teachers"))
        chosen = draws.argsort(1)[:, :few].to(of_anchors.logits.device)  # [n, few] different anchors each
        found = []
        some = rows_at_once(representation)
        for start, own in zip(z.split(some), chosen.split(some), strict=True):
            goal = of_anchors.logits[own].mean(1) if task.real else of_anchors.probabilities[own].mean(1).log()
            with torch.no_grad():
                decoding = representation.decoding(start.to(representation.device))
                drawn = decoding.tokens()
            moved = descend(representation, decoding, drawn, goal, inputs, config.refine, seed, task.real)
            found.append(moved.cpu())
        return torch.cat(found)

    networks: dict[str, Checkpoints] = {}
    for name, representation in representations.items():
        embedded = refined(representation, anchors, {task.name: task}, config.refine, seed, train)

        def decoded(z: Tensor, representation: HyperRepresentation = representation) -> Checkpoints:
            return conditioned(representation.decode(Embeddings(z, numbered(len(z), task.name), architecture)))

        def fitness(z: Tensor, decoded: Callable[[Tensor], Checkpoints] = decoded) -> Tensor:
            return accuracy(decoded(z))

        for sampler in config.samplers:

            def draw(
                bandwidth: float,
                sampler: str = sampler,
                embedded: Embeddings = embedded,
                decoded: Callable[[Tensor], Checkpoints] = decoded,
                fitness: Fitness = fitness,
                representation: HyperRepresentation = representation,
            ) -> Checkpoints:
                sample = sampler_named(sampler, bandwidth, fitness)
                z = sample(embedded, config.networks, generator("kde"))
                return decoded(taught(representation, z))

            title = titles([name], config.samplers)[config.samplers.index(sampler)]
            networks[title] = widest(draw, config.bandwidths if sampler in WITH_BANDWIDTH else config.bandwidths[:1])
            advance(1, title)
    last = networks[list(networks)[-1]]
    networks[ANCHORS] = anchors
    pca = fit_pca(train.flat(), first.latent_size)

    def draw_pca(bandwidth: float) -> Checkpoints:
        scores = joint_kde(pca.encode(flat), bandwidth, config.networks, generator("kde"))
        return conditioned(as_checkpoints(architecture, pca.decode(scores), task.name))

    networks[PCA] = widest(draw_pca, config.bandwidths)
    advance(1, PCA)
    matched = metrics.nearest_distance(last.flat(), flat).mean()
    noised = _noised(flat, matched, config.networks, generator("noise"))
    networks[NOISE] = conditioned(as_checkpoints(architecture, noised, task.name))
    advance(1, NOISE)
    averages = _averages(anchors, config.networks, generator("averages"))
    networks[AVERAGES] = conditioned(as_checkpoints(architecture, averages, task.name))
    advance(1, AVERAGES)
    return networks


def score(
    name: str,
    split: str,
    outputs: Outputs,
    novelty: np.ndarray[Any, Any],
    pairs: tuple[metrics.Array, metrics.Array],
    reference: tuple[metrics.Array, metrics.Array],
) -> list[dict[str, Any]]:
    """The records of one set of n networks; intervals over networks.

    Args:
        name: the method.
        split: the records' split.
        outputs: of the networks on the task's test images.
        novelty: distance to the nearest training checkpoint over the zoo's typical one [n].
        pairs: distances in weights and disagreements of the networks [n, n] each.
        reference: the same of the anchors [a, a].
    """
    accuracy = _array(outputs.accuracy)
    each = np.arange(len(accuracy))
    scale = [float(metrics.pair_mean(values, np.ones(len(values)))) for values in reference]
    drawn = np.random.default_rng(0).choice(accuracy, (metrics.RESAMPLES, len(accuracy)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])

    def plain(metric: str, value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        return metrics.record(STAGE, name, split, metric, value, low, high, len(accuracy))

    return [
        metrics.summarize(STAGE, name, split, "mean accuracy", metrics.mean_of(accuracy), each),
        plain("median accuracy", float(np.median(accuracy)), float(low), float(high)),
        plain("best accuracy", float(accuracy.max())),
        metrics.summarize_pairs(STAGE, name, split, "diversity in structure", pairs[0], scale[0]),
        metrics.summarize_pairs(STAGE, name, split, "diversity in behavior", pairs[1], scale[1]),
        metrics.summarize(STAGE, name, split, "novelty", metrics.mean_of(novelty), each),
        metrics.summarize_ensemble(STAGE, name, split, outputs),
    ]


def diversities(
    networks: Checkpoints, anchors: Checkpoints, outputs: Outputs, classes: int
) -> tuple[metrics.Array, metrics.Array]:
    """L2 of every pair after alignment to the first anchor, and its disagreement in these outputs: [n, n] each."""
    groups = groups_of(networks.architecture)
    reference = {name: weight[:1] for name, weight in anchors.weights.items()}
    aligned = Checkpoints(networks.architecture, align(networks.weights, reference, groups), networks.frame)
    distances = torch.cdist(aligned.flat(), aligned.flat(), compute_mode=metrics.EXACT)
    return _array(distances), _array(1 - metrics.pairwise_agreement(outputs.predictions, classes))


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    return values.double().cpu().numpy()


def _noised(flat: Tensor, distance: Tensor, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(flat), (count,), generator=generator)
    noise = torch.randn(count, flat.shape[1], generator=generator)
    return flat[chosen] + distance * noise / noise.norm(dim=1, keepdim=True)


def _averages(anchors: Checkpoints, count: int, generator: torch.Generator) -> Tensor:
    """Averages of two different random anchors, the second aligned to the first [count, P]."""
    first = torch.randint(len(anchors), (count,), generator=generator)
    second = (first + torch.randint(1, len(anchors), (count,), generator=generator)) % len(anchors)
    one, other = anchors.rows(first.numpy()), anchors.rows(second.numpy())
    aligned = align(other.weights, one.weights, groups_of(anchors.architecture))
    return (one.flat() + Checkpoints(anchors.architecture, aligned, other.frame).flat()) / 2


def save_networks(folder: Path, name: str, networks: Checkpoints, table: pd.DataFrame) -> None:
    """Write networks as NAME.safetensors (each parameter stacked) and NAME.json (architecture, tasks, metrics)."""
    write_tensors(folder / f"{name}.safetensors", networks.weights)
    own = table[table["representation"] == name].drop(columns="representation")
    write_json(
        folder / f"{name}.json", {"architecture": networks.architecture.to_json(), "networks": own.to_dict("records")}
    )


def load_networks(path: str | Path) -> Checkpoints:
    """Read networks written by `save_networks`; `path` is the .safetensors or the .json file, or both without ending.

    Raises:
        UserError: a file is missing or damaged.
    """
    if Path(path).is_dir():
        files = ", ".join(sorted(file.name for file in Path(path).glob("*.safetensors")))
        raise UserError(f"{path} is a folder; name one of its files: {files or 'it has none'}")
    description = read_json(networks_file(Path(path), ".json"))
    try:
        weights = load_file(networks_file(Path(path), ".safetensors"))
        architecture = Architecture(**description["architecture"])
        ordered = {name: weights[name] for name in architecture.shapes}
        frame = pd.DataFrame(description["networks"])
        if "task" not in frame:
            raise KeyError("task")
        return Checkpoints(architecture, ordered, frame)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the networks {path} cannot be read: {error}") from None


def networks_file(path: Path, ending: str) -> Path:
    """One of the two files of saved networks, from the path of either or the path without ending."""
    name = path.name
    for known in (".safetensors", ".json"):
        name = name.removesuffix(known)
    return path.with_name(name + ending)


def load_network(path: str | Path, network: int = 0) -> nn.Module:
    """One generated network as an ordinary module in evaluation mode.

    Raises:
        UserError: a file is missing or damaged, or it has fewer networks.
    """
    networks = load_networks(path)
    if not 0 <= network < len(networks):
        raise UserError(f"{path} has no network {network}; it has networks 0 to {len(networks) - 1}")
    return networks.network(network)
