"""New networks from embeddings of good anchors, and the baselines that have to be beaten.

Legend: a anchors, T tokens, Z latent values, P weights of one network.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from weightspace.downstream.baselines import fit_pca
from weightspace.hyperrep.pretrain import training_checkpoints
from weightspace.hyperrep.representation import Embeddings, HyperRepresentation, Sampler
from weightspace.networks import behavior
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints, unflatten
from weightspace.networks.symmetry import align, groups_of
from weightspace.runs import UserError, derive_seed, progress, read_json, write_json, write_tensors
from weightspace.tasks.images import ImageTask
from weightspace.zoo.model_zoo import ModelZoo

STAGE = "generate"


def kde(bandwidth: float = 0.2) -> Sampler:
    """Joint kernel density over whole embeddings: a random anchor plus Gaussian noise with the anchors' covariance.

    The same density as scipy.stats.gaussian_kde with this factor, drawn without forming the [TZ, TZ] covariance: the
    noise is a random combination of the centered anchors.
    """

    def sample(anchors: Embeddings, count: int, generator: torch.Generator) -> Tensor:
        flat = anchors.z.flatten(1)  # [a, TZ]
        return _joint(flat, bandwidth, count, generator).unflatten(1, anchors.z.shape[1:])

    return sample


def _joint(flat: Tensor, bandwidth: float, count: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(len(flat), (count,), generator=generator)
    mixture = torch.randn(count, len(flat), generator=generator) / max(len(flat) - 1, 1) ** 0.5
    return flat[chosen] + bandwidth * mixture @ (flat - flat.mean(0))


def choose_anchors(zoo: ModelZoo, epochs: tuple[int, ...], count: int) -> Checkpoints:
    """The best training checkpoints by validation accuracy, at most one per member."""
    frame = zoo.frame[(zoo.frame["split"] == "train") & zoo.frame["epoch"].isin(epochs)]
    frame = frame.sort_values(["val_acc", "member", "epoch"], ascending=[False, True, True], kind="stable")
    return zoo.read(frame.drop_duplicates("member").head(count))


def as_checkpoints(architecture: Architecture, flat: Tensor) -> Checkpoints:
    """Vectors [n, P] as checkpoints with a running number."""
    return Checkpoints(architecture, unflatten(architecture, flat), pd.DataFrame({"network": range(len(flat))}))


@dataclass(frozen=True)
class Generated:
    """Networks of every method."""

    networks: dict[str, Checkpoints]
    """representation or baseline -> networks"""
    records: list[dict[str, Any]]
    table: pd.DataFrame
    """a row per network: representation, network, test_acc, novelty"""


def generate(
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    task: ImageTask,
    config: GenerateConfig,
    seed: int,
) -> Generated:
    """Generate networks with every representation; score them beside the baselines of DESIGN section 7.

    The baselines: the anchors; anchors + noise at the distance at which the networks of the last representation lie
    from their nearest anchor; averages of two aligned anchors; the same KDE in a PCA of the weights with as many
    values.
    """
    first = next(iter(representations.values()))
    architecture, epochs = zoo.architecture, first.pretrain_config.epochs
    train = training_checkpoints(zoo, first.pretrain_config, "train")
    anchors = choose_anchors(zoo, epochs, config.anchors)
    if len(anchors) < 2:
        raise UserError(f"generation needs at least two anchors, the zoo has {len(anchors)} training member")
    flat = anchors.flat()
    floor = float(_accuracy(anchors, task, "val").mean()) - config.tolerance
    networks: dict[str, Checkpoints] = {"anchors": anchors}
    with progress("generate", len(representations) + 4) as advance:
        for name, representation in representations.items():
            embedded = representation.embed(anchors)
            candidates = {}
            for bandwidth in config.bandwidths:
                generator = torch.Generator().manual_seed(derive_seed(seed, "generate", "kde"))
                z = kde(bandwidth)(embedded, config.networks, generator)
                frame = pd.DataFrame({"network": range(config.networks)})
                candidates[bandwidth] = representation.decode(Embeddings(z, frame))
            networks[name] = _widest(candidates, task, floor)
            advance(1, name)
        pca = fit_pca(train.flat(), first.latent_size)
        candidates = {}
        for bandwidth in config.bandwidths:
            generator = torch.Generator().manual_seed(derive_seed(seed, "generate", "kde"))
            scores = _joint(pca.encode(flat), bandwidth, config.networks, generator)
            candidates[bandwidth] = as_checkpoints(architecture, pca.decode(scores))
        networks["PCA"] = _widest(candidates, task, floor)
        advance(1, "PCA")
        last = networks[list(representations)[-1]]
        matched = metrics.nearest_distance(last.flat(), flat).mean()
        networks["anchors + noise"] = as_checkpoints(architecture, _noised(flat, matched, config.networks, seed))
        advance(1, "anchors + noise")
        networks["weight averages"] = as_checkpoints(architecture, _averages(anchors, config.networks, seed))
        advance(1, "weight averages")
        records, rows = [], []
        typical = metrics.typical_nearest_distance(train.flat(), train.frame["member"].to_numpy())
        reference = tuple(float(metrics.pair_mean(p, np.ones(len(p)))) for p in _pairs(anchors, anchors, task))
        order = list(representations) + [name for name in networks if name not in representations]
        for name in order:
            novelty = (metrics.nearest_distance(networks[name].flat(), train.flat()) / typical).numpy()
            records += score(networks[name], name, task, novelty, anchors, reference)
            accuracy = _accuracy(networks[name], task, "test")
            row = {"representation": name, "network": range(len(accuracy)), "test_acc": accuracy, "novelty": novelty}
            rows.append(pd.DataFrame(row))
        advance(1)
    return Generated({name: networks[name] for name in order}, records, pd.concat(rows, ignore_index=True))


def score(
    networks: Checkpoints,
    name: str,
    task: ImageTask,
    novelty: np.ndarray[Any, Any],
    anchors: Checkpoints,
    reference: tuple[float, ...],
) -> list[dict[str, Any]]:
    """The records of one set of networks on the task's test images; intervals over networks.

    Args:
        networks: n networks.
        name: the method.
        task: its test images are used.
        novelty: distance to the nearest training checkpoint over the zoo's typical one [n].
        anchors: the anchors they were made from.
        reference: diversity of the anchors in structure and in behavior.
    """
    outputs = behavior.outputs(networks, task.test.images, task.test.labels)
    accuracy = outputs.accuracy.double().cpu().numpy()
    each = np.arange(len(accuracy))
    distances, disagreements = _pairs(networks, anchors, task)
    ensemble = (outputs.probabilities.mean(0).argmax(-1) == task.test.labels).double().mean()
    drawn = np.random.default_rng(0).choice(accuracy, (metrics.RESAMPLES, len(accuracy)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])

    def plain(metric: str, value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
        return metrics.record(STAGE, name, "test", metric, value, low, high, len(accuracy))

    return [
        metrics.summarize(STAGE, name, "test", "mean accuracy", metrics.mean_of(accuracy), each),
        plain("median accuracy", float(np.median(accuracy)), float(low), float(high)),
        plain("best accuracy", float(accuracy.max())),
        metrics.summarize_pairs(STAGE, name, "test", "diversity in structure", distances, reference[0]),
        metrics.summarize_pairs(STAGE, name, "test", "diversity in behavior", disagreements, reference[1]),
        metrics.summarize(STAGE, name, "test", "novelty", metrics.mean_of(novelty), each),
        plain("ensemble accuracy", float(ensemble)),
    ]


def _accuracy(networks: Checkpoints, task: ImageTask, split: str) -> np.ndarray[Any, Any]:
    images = task.split(split)
    return behavior.outputs(networks, images.images, images.labels).accuracy.double().cpu().numpy()


def _pairs(networks: Checkpoints, anchors: Checkpoints, task: ImageTask) -> tuple[metrics.Array, metrics.Array]:
    """L2 of every pair after alignment to the first anchor, and its disagreement on the test images: [n, n] each."""
    groups = groups_of(networks.architecture)
    reference = {name: weight[:1] for name, weight in anchors.weights.items()}
    aligned = Checkpoints(networks.architecture, align(networks.weights, reference, groups), networks.frame)
    predictions = behavior.outputs(networks, task.test.images).predictions
    distances = torch.cdist(aligned.flat(), aligned.flat(), compute_mode=metrics.EXACT)
    disagreements = 1 - metrics.pairwise_agreement(predictions, task.classes)
    return distances.double().numpy(), disagreements.double().cpu().numpy()


def _widest(candidates: dict[float, Checkpoints], task: ImageTask, floor: float) -> Checkpoints:
    """The networks of the widest bandwidth that keeps the validation accuracy; else those of the best accuracy."""
    accuracy = {bandwidth: float(_accuracy(networks, task, "val").mean()) for bandwidth, networks in candidates.items()}
    keeping = [bandwidth for bandwidth, value in accuracy.items() if value >= floor]
    return candidates[max(keeping) if keeping else max(accuracy, key=lambda bandwidth: accuracy[bandwidth])]


def _noised(flat: Tensor, distance: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "generate", "noise"))
    chosen = torch.randint(len(flat), (count,), generator=generator)
    noise = torch.randn(count, flat.shape[1], generator=generator)
    return flat[chosen] + distance * noise / noise.norm(dim=1, keepdim=True)


def _averages(anchors: Checkpoints, count: int, seed: int) -> Tensor:
    """Averages of two different random anchors, the second aligned to the first [count, P]."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "generate", "averages"))
    first = torch.randint(len(anchors), (count,), generator=generator)
    second = (first + torch.randint(1, len(anchors), (count,), generator=generator)) % len(anchors)
    one, other = anchors.rows(first.numpy()), anchors.rows(second.numpy())
    aligned = align(other.weights, one.weights, groups_of(anchors.architecture))
    return (one.flat() + Checkpoints(anchors.architecture, aligned, other.frame).flat()) / 2


def save_networks(folder: Path, name: str, networks: Checkpoints, task: str, table: pd.DataFrame) -> None:
    """Write networks as NAME.safetensors (each parameter stacked) and NAME.json (architecture, task, metrics)."""
    write_tensors(folder / f"{name}.safetensors", networks.weights)
    own = table[table["representation"] == name].drop(columns="representation")
    description = {"architecture": networks.architecture.to_json(), "task": task, "networks": own.to_dict("records")}
    write_json(folder / f"{name}.json", description)


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
        return Checkpoints(architecture, ordered, pd.DataFrame(description["networks"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the networks {path} cannot be read: {error}") from None


def networks_file(path: Path, ending: str) -> Path:
    """One of the two files of saved networks, from the path of either or the path without ending."""
    name = path.name
    for known in (".safetensors", ".json"):
        name = name.removesuffix(known)
    return path.with_name(name + ending)


def task_of(path: Path) -> str:
    """The task that networks written by `save_networks` were made for.

    Raises:
        UserError: the description is missing or damaged.
    """
    description = read_json(networks_file(path, ".json"))
    if "task" not in description:
        raise UserError(f"{path} names no task; it was not written by weightspace generate")
    return description["task"]


def load_network(path: str | Path, network: int = 0) -> nn.Module:
    """One generated network as an ordinary module in evaluation mode."""
    return load_networks(path).network(network)
