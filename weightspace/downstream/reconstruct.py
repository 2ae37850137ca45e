"""Checkpoint -> embedding -> checkpoint, scored against the original by every metric of DESIGN section 7."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weightspace.config import ReconstructConfig
from weightspace.downstream import distances, metrics
from weightspace.downstream.baselines import PCA, fit_pca
from weightspace.downstream.distances import model_distances, paired, two_sample
from weightspace.hyperrep.pretrain import training_checkpoints
from weightspace.hyperrep.refine import refined
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks import behavior
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import progress
from weightspace.tasks.images import ImageTask
from weightspace.zoo.model_zoo import ModelZoo

STAGE = "reconstruct"
DISTANCES = tuple(name for name in distances.COLUMNS if name != "L2 of weights")
TESTS = ("accuracy: t-test p", "accuracy: KS p", "accuracy: paired t-test p")
"""Whether originals and reconstructions have one mean accuracy, and one distribution of it; over members, not
checkpoints, which are not independent of each other."""
Records = list[dict[str, Any]]


def compare(
    originals: Checkpoints,
    reconstructed: Checkpoints,
    tasks: Mapping[str, ImageTask],
    tokens: Callable[[dict[str, Tensor]], Tensor],
    condition: int = 0,
) -> pd.DataFrame:
    """One row per checkpoint: what the original and its reconstruction do on their task's test images.

    Floor and identity are taken among the checkpoints of the same task and epoch, one per member.

    Args:
        originals: n checkpoints.
        reconstructed: their reconstructions, in the same order.
        tasks: the tasks that they were trained on; the test images are the queries.
        tokens: stacked weights -> normalized tokens, in which structural R^2 is measured.
        condition: training images on which the reconstructions' batch normalizations are measured anew before they
            run (0: as decoded).
    """
    x, x_hat = tokens(originals.weights).flatten(1), tokens(reconstructed.weights).flatten(1)
    frame = originals.frame[["member", "epoch", "split", "task"]].assign(
        squared_error=_array((x_hat - x).square().sum(1)), squared_deviation=_array((x - x.mean(0)).square().sum(1))
    )
    parts = []
    for task, rows in frame.groupby("task"):
        index = rows.index.to_numpy()
        own, again = tasks[str(task)], reconstructed.rows(index)
        if condition:
            again = behavior.conditioned(again, own.train.images[:condition])
        parts.append(rows.join(_behaviors(originals.rows(index), again, own, index)))
    return pd.concat(parts).sort_index()


def _behaviors(originals: Checkpoints, reconstructed: Checkpoints, task: ImageTask, index: Any) -> pd.DataFrame:
    """What originals and reconstructions of one task do on its test images, a row each, under this index."""
    images, labels = task.test.images, task.test.labels
    outputs = behavior.outputs(originals, images, labels)
    outputs_hat = behavior.outputs(reconstructed, images, labels)
    alike, wrong = metrics.agreement_on_errors(outputs_hat.predictions, outputs.predictions, labels)
    frame = model_distances(originals, reconstructed, outputs, outputs_hat).assign(
        original_acc=_array(outputs.accuracy),
        reconstructed_acc=_array(outputs_hat.accuracy),
        agreement=_array(behavior.agreement(outputs_hat.predictions, outputs.predictions)),
        errors_alike=_array(alike),
        errors=_array(wrong),
        floor=np.nan,
        identified=False,
    )
    for _, rows in frame.groupby(originals.frame["epoch"]):
        chosen = rows.index.to_numpy(copy=True)
        among = torch.from_numpy(chosen).to(images.device)
        frame.loc[chosen, "floor"] = _array(metrics.floor(outputs.predictions[among], task.classes))
        same = metrics.identified(outputs_hat.probabilities[among], outputs.probabilities[among])
        frame.loc[chosen, "identified"] = same.cpu().numpy()
    return frame.rename(columns={"L2 of weights": "distance"}).set_axis(index)


def _array(values: Tensor) -> np.ndarray[Any, Any]:
    return values.double().cpu().numpy()


def summarize(frame: pd.DataFrame, representation: str, split: str) -> Records:
    """The records of one representation on one split, from the rows of `compare`."""
    members = frame["member"].to_numpy()

    def column(name: str) -> np.ndarray[Any, Any]:
        return frame[name].to_numpy(dtype=float)

    def entry(metric: str, sums: np.ndarray[Any, Any], statistic: metrics.Statistic = metrics.ratio) -> dict[str, Any]:
        return metrics.summarize(STAGE, representation, split, metric, sums, members, statistic)

    by_member = frame.groupby("member")[["original_acc", "reconstructed_acc"]].mean()
    original, reconstructed = by_member.to_numpy(dtype=float).T
    tests = dict(zip(TESTS, (*two_sample(original, reconstructed), paired(reconstructed - original)), strict=True))
    best = float(column("reconstructed_acc").max())
    pair = metrics.moments(column("original_acc"), column("reconstructed_acc"))
    ones = np.ones(len(frame))
    return [
        entry("agreement", metrics.mean_of(column("agreement"))),
        entry("floor", metrics.mean_of(column("floor"))),
        entry("skill", np.stack([column("agreement"), column("floor"), ones], axis=1), metrics.skill),
        entry("identity", metrics.mean_of(column("identified"))),
        entry("agreement on errors", np.stack([column("errors_alike"), column("errors")], axis=1)),
        entry("accuracy fidelity: slope", pair, metrics.slope),
        entry("accuracy fidelity: Pearson r", pair, metrics.pearson),
        entry(
            "accuracy fidelity: mean absolute difference",
            metrics.mean_of(np.abs(column("original_acc") - column("reconstructed_acc"))),
        ),
        entry(
            "structural R2",
            np.stack([column("squared_error"), column("squared_deviation")], axis=1),
            metrics.one_minus_ratio,
        ),
        entry("weight distance", metrics.mean_of(column("distance"))),
        *(entry(name, metrics.mean_of(column(name))) for name in DISTANCES),
        entry("original accuracy", metrics.mean_of(column("original_acc"))),
        entry("reconstructed accuracy", metrics.mean_of(column("reconstructed_acc"))),
        metrics.record(STAGE, representation, split, "best reconstructed accuracy", best, n=len(by_member)),
        *(metrics.record(STAGE, representation, split, name, p, n=len(by_member)) for name, p in tests.items()),
    ]


def gains(frame: pd.DataFrame, baseline: pd.DataFrame, representation: str, name: str, split: str) -> Records:
    """Paired differences to a baseline, row by row on the same checkpoints; intervals over members."""
    members = frame["member"].to_numpy()
    column = {key: frame[key].to_numpy(dtype=float) for key in ("agreement", "floor", "identified")}
    better = column["agreement"] - baseline["agreement"].to_numpy(dtype=float)
    told = column["identified"] - baseline["identified"].to_numpy(dtype=float)
    sums = {
        f"skill above {name}": np.stack([better, 1 - column["floor"]], axis=1),
        f"identity above {name}": metrics.mean_of(told),
    }
    return [metrics.summarize(STAGE, representation, split, metric, values, members) for metric, values in sums.items()]


def reconstruct(
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    tasks: Mapping[str, ImageTask],
    config: ReconstructConfig,
    seed: int = 0,
) -> tuple[Records, pd.DataFrame]:
    """Reconstruct the checkpoints of some splits with every representation and with PCA at the same size.

    Every further representation is also compared with the first one, checkpoint by checkpoint.

    The checkpoints are those of the configured epochs, by default those that the (first) representation was trained
    on. Splits that the zoo lacks are left out.

    Args:
        zoo: the zoo.
        representations: name -> representation.
        tasks: the zoo's tasks by name.
        config: splits and epochs, the refinement of the embeddings, batch normalizations measured after decoding.
        seed: seed of the refinement's queries.

    Returns:
        The records, and a row per checkpoint, representation and split.
    """
    first, splits = next(iter(representations.values())), zoo.splits(config.splits)
    training = training_checkpoints(zoo, first.pretrain_config, "train")
    pca = fit_pca(training.flat(), first.latent_size)
    chosen = replace(first.pretrain_config, epochs=config.epochs or first.pretrain_config.epochs)
    parts = {split: training_checkpoints(zoo, chosen, split) for split in splits}
    records, frames = [], []
    with progress("reconstruct", (len(representations) + 1) * sum(map(len, parts.values()))) as advance:
        for split, originals in parts.items():
            baseline = None
            for name in (*representations, PCA):
                done = partial(advance, note=f"{name} on {split}")
                if name in representations:
                    refine = (tasks, config.refine, seed, training, done)
                    again = representations[name].decode(refined(representations[name], originals, *refine))
                else:
                    again = pca.reconstruct(originals)
                    done(len(originals))
                frame = compare(originals, again, tasks, first.cpu_tokens, config.condition)
                records += summarize(frame, name, split)
                if baseline is None:
                    baseline = frame
                elif name in representations:
                    records += gains(frame, baseline, name, next(iter(representations)), split)
                frames.append(frame.assign(representation=name, split=split))
    return records, pd.concat(frames, ignore_index=True)
