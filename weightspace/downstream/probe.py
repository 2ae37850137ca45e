"""Properties predicted from embeddings by linear probes, beside layer-wise weight statistics and raw weights.

Numeric properties by ridge regression, categories by logistic regression; scored on held-out members and on other zoos.

Legend: n checkpoints, F features.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from weightspace.config import PretrainConfig, ProbeConfig
from weightspace.downstream import metrics
from weightspace.downstream.baselines import MAJORITY, RAW, STATISTICS
from weightspace.hyperrep.pretrain import Monitor, training_rows
from weightspace.hyperrep.representation import Embeddings, HyperRepresentation
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, notice, progress
from weightspace.zoo.model_zoo import SPLITS, ModelZoo, check_numeric, usable

STAGE = "probe"
CLASSES = 20
"""Most values of a column of text that is taken for a category."""
NAMES = ["split", "source", "digest"]
"""Columns of text that say which checkpoint it is, and are no property of it."""
FLAGS = ["backdoor"]
"""Columns of 0 and 1 that are categories."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

Array = np.ndarray[Any, Any]


def weight_statistics(checkpoints: Checkpoints) -> Array:
    """Mean, standard deviation and five quantiles of every parameter tensor: [n, 7 x parameters].

    The baseline of Unterthiner et al. 2020 (arXiv 2002.11448).
    """
    columns = []
    for weight in checkpoints.weights.values():
        flat = weight.flatten(1).double()
        quantiles = torch.quantile(flat, torch.tensor(QUANTILES, dtype=flat.dtype), dim=1).T
        columns += [flat.mean(1, keepdim=True), flat.std(1, correction=0, keepdim=True), quantiles]
    return torch.cat(columns, dim=1).numpy()


def embedding_features(embeddings: Embeddings, layers: Tensor) -> Array:
    """Mean and standard deviation of the latent values over the tokens of each layer: [n, 2 x layers x Z].

    Args:
        embeddings: [n, T, Z].
        layers: the layer of each token [T].
    """
    columns = []
    for layer in layers.unique().tolist():
        z = embeddings.z[:, layers == layer].double()
        columns += [z.mean(1), z.std(1, correction=0)]
    return torch.cat(columns, dim=1).numpy()


def ridge_probe(
    features: Sequence[dict[str, Array]], target: dict[str, Array], penalties: tuple[float, ...]
) -> dict[str, Array]:
    """Ridge regression fitted on 'train', features and penalty chosen on 'val'; predictions for every split.

    Args:
        features: candidates {split: [n, F]}; standardized inside with the training mean and standard deviation.
        target: {split: [n]}.
        penalties: candidates, in units of the number of training rows.
    """
    fits = []
    for candidate, penalty in itertools.product(features, penalties):
        model = make_pipeline(StandardScaler(), Ridge(penalty * len(target["train"]), solver="svd"))
        model.fit(candidate["train"], target["train"])
        error = float(np.square(model.predict(candidate["val"]) - target["val"]).mean())
        fits.append((error, len(fits), model, candidate))
    best, chosen = min(fits, key=lambda fit: fit[:2])[2:]
    return {split: best.predict(values) for split, values in chosen.items()}


def logistic_probe(
    features: Sequence[dict[str, Array]], target: dict[str, Array], penalties: tuple[float, ...]
) -> dict[str, Array]:
    """Multinomial logistic regression fitted on 'train', features and penalty chosen on 'val'; predicted classes.

    Of penalties with equal accuracy on 'val' the largest is used.

    Args:
        features: candidates {split: [n, F]}; standardized inside with the training mean and standard deviation.
        target: {split: [n]} classes; those that do not occur in 'train' are never predicted.
        penalties: candidates, in units of the number of training rows.
    """
    candidates = []
    for each in features:
        scaler = StandardScaler().fit(each["train"])
        candidates.append({split: scaler.transform(values) for split, values in each.items()})
    fits = []
    for scaled, penalty in itertools.product(candidates, penalties):
        model = LogisticRegression(C=1 / (penalty * len(target["train"])), max_iter=300)
        with warnings.catch_warnings(), threadpool_limits(1):  # small products, for which threads would wait
            warnings.simplefilter("ignore", ConvergenceWarning)  # such a fit competes on validation as it is
            model.fit(scaled["train"], target["train"])
        fits.append((float(np.mean(model.predict(scaled["val"]) == target["val"])), penalty, model, scaled))
    best, chosen = max(fits, key=lambda fit: fit[:2])[2:]
    return {split: best.predict(values) for split, values in chosen.items()}


def probe(
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    config: ProbeConfig,
    others: Mapping[str, ModelZoo] | None = None,
) -> tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame]:
    """Probe every representation and both baselines for every configured property and category.

    Features of an embedding are the mean and deviation of its values layer by layer, or its principal components;
    which of the two is chosen on validation, property by property.

    Args:
        zoo: probes are fitted on its split 'train' and their penalty is chosen on 'val'.
        representations: name -> representation.
        config: what is probed ("all": every property that `numeric_properties` finds, every category that
            `categorical_columns` finds), at which epochs.
        others: further zoos of the same base network, scored whole as splits of their names.

    Returns:
        Records (R^2 and rank correlation of properties, accuracy of categories beside that of the majority class; on
        test, unseen and the other zoos), predictions of the properties (a row per checkpoint of test or unseen,
        features and property), and a two-dimensional map of the zoo's embeddings (their principal components).

    Raises:
        UserError: a property that a zoo does not have, that is not a number or not known of every checkpoint; an
            unknown category; another zoo with the name of a split.
    """
    others = others or {}
    if clash := sorted(set(others) & set(SPLITS)):
        raise UserError(f"another zoo cannot be called {clash[0]!r}, which is a split; rename its folder")
    for some in (zoo, *others.values()):
        check_numeric(some.frame, [name for name in config.properties if name != "all"])
        if missing := [name for name in config.categories if name != "all" and name not in some.frame]:
            raise UserError(f"no category {', '.join(missing)}; {some.folder} has {', '.join(some.frame.columns)}")
    fitted = ("train", "val")
    own = (*fitted, *zoo.splits([split for split in SPLITS if split not in fitted]))
    checkpoints = {split: _chosen(zoo, config, split) for split in own}
    checkpoints |= {name: _chosen(other, config, None) for name, other in others.items()}
    frames = [part.frame for part in checkpoints.values()]
    properties = union(config.properties, numeric_properties(frames))
    if unknown := [name for name in properties if not all(np.isfinite(frame[name]).all() for frame in frames)]:
        raise UserError(f"{', '.join(unknown)} is missing or infinite for some checkpoints; probe other properties")
    asked = union(config.categories, categorical_columns(frames))
    categories = [column for column in asked if checkpoints["train"].frame[column].nunique() > 1]
    if skipped := sorted(set(asked) - set(categories)):
        notice(f"not classified, since all training members have the same: {', '.join(skipped)}")
    features: dict[str, list[dict[str, Array]]] = {}
    maps = []
    with progress("probe", (len(representations) + 2) * (1 + len(properties) + len(categories))) as advance:
        for name, representation in representations.items():
            layers = representation.tokenizer.positions[:, 1]
            embedded = {split: representation.embed(part) for split, part in checkpoints.items()}
            by_layer = {split: embedding_features(part, layers) for split, part in embedded.items()}
            values = {split: part.z.flatten(1).numpy() for split, part in embedded.items()}
            features[name] = [by_layer, _reduced(values, config)]
            maps.append(_map(by_layer, checkpoints).assign(representation=name))
            advance(1, name)
        features[STATISTICS] = [{split: weight_statistics(part) for split, part in checkpoints.items()}]
        advance(1)
        features[RAW] = [_reduced({split: part.flat().numpy() for split, part in checkpoints.items()}, config)]
        advance(1)
        scored = [split for split in checkpoints if split not in fitted]
        records, predictions = [], []
        for name, values in features.items():
            for prop in properties:
                target = {split: part.frame[prop].to_numpy(dtype=float) for split, part in checkpoints.items()}
                predicted = ridge_probe(values, target, config.penalties)
                for split in scored:
                    frame = checkpoints[split].frame[["split", "member", "epoch"]]
                    records += _regressed(name, split, prop, predicted[split], target[split], frame["member"])
                    if split not in others:
                        each = {"true": target[split], "predicted": predicted[split]}
                        predictions.append(frame.assign(features=name, property=prop, **each))
                advance(1, f"{prop} from {name}")
            for column in categories:
                classes = {split: part.frame[column].astype(str).to_numpy() for split, part in checkpoints.items()}
                found = logistic_probe(values, classes, config.penalties)
                records += [_classified(name, s, column, found[s], classes[s], checkpoints[s]) for s in scored]
                advance(1, f"{column} from {name}")
        for column in categories:
            most = checkpoints["train"].frame[column].astype(str).mode()[0]
            for split in scored:
                classes_of = checkpoints[split].frame[column].astype(str).to_numpy()
                guess = np.full(len(classes_of), most, dtype=object)
                records.append(_classified(MAJORITY, split, column, guess, classes_of, checkpoints[split]))
    return records, pd.concat(predictions, ignore_index=True), pd.concat(maps, ignore_index=True)


def by_epoch(predictions: pd.DataFrame, split: str = "test") -> pd.DataFrame:
    """R^2 of the probes among the checkpoints of each epoch of the zoo, with 95 % bootstrap intervals over members.

    Args:
        predictions: of `probe`.
        split: whose checkpoints.

    Returns:
        A row per features, property and epoch: representation, property, epoch, mean, low, high. An epoch at which all
        members have one value has no R^2 and no row.
    """
    rows = predictions[predictions["split"] == split]
    found = []
    for key, part in rows.groupby(["features", "property", "epoch"], sort=False):
        true, predicted = part["true"].to_numpy(float), part["predicted"].to_numpy(float)
        if np.ptp(true) > 0:
            sums = np.stack([np.square(predicted - true), np.square(true - true.mean())], axis=1)
            record = metrics.summarize(STAGE, "", split, "R2", sums, part["member"].to_numpy(), metrics.one_minus_ratio)
            names = dict(zip(("representation", "property", "epoch"), key, strict=True))
            found.append({**names, **{name: record[name] for name in ("mean", "low", "high")}})
    return pd.DataFrame(found, columns=["representation", "property", "epoch", "mean", "low", "high"])


def numeric_properties(frames: Sequence[pd.DataFrame]) -> tuple[str, ...]:
    """Every numeric column that all frames hold without gaps and that varies in the first; not member, shard or row."""
    first, *others = (frame.select_dtypes("number") for frame in frames)
    candidates = first.columns.drop(["member", "shard", "row"], errors="ignore").astype(str)
    return tuple(
        name
        for name in candidates
        if first[name].nunique() > 1
        and all(name in frame and np.isfinite(frame[name]).all() for frame in (first, *others))
    )


def union(asked: Sequence[str], found: Sequence[str]) -> tuple[str, ...]:
    """The names that are asked for; "all" stands for those that were found."""
    names = [name for each in asked for name in (found if each == "all" else (each,))]
    return tuple(dict.fromkeys(names))


def categorical_columns(frames: Sequence[pd.DataFrame]) -> tuple[str, ...]:
    """Every column of text (but NAMES) and of FLAGS that all frames hold without gaps, with 2 to CLASSES values in the
    first."""

    def candidates(frame: pd.DataFrame) -> pd.DataFrame:
        flags = frame[[name for name in FLAGS if name in frame]]
        return frame.select_dtypes(exclude="number").drop(columns=[*NAMES, *flags], errors="ignore").join(flags)

    first, *others = map(candidates, frames)
    return tuple(
        str(name)
        for name in first
        if 1 < first[name].nunique() <= CLASSES
        and all(name in frame and frame[name].notna().all() for frame in (first, *others))
    )


def monitor(zoos: Sequence[ModelZoo], config: PretrainConfig) -> Monitor:
    """What `pretrain` measures at every validation: R2 of its configured properties on split 'val' of each zoo.

    The ridge probe is fitted on at most 512 training checkpoints with a fixed penalty: nothing is chosen by it.
    """
    each = []
    for zoo in zoos:
        check_numeric(zoo.frame, config.probes)
        rows = {split: training_rows(zoo, config, split) for split in ("train", "val")}
        rows["train"] = rows["train"].iloc[
            np.linspace(0, len(rows["train"]) - 1, min(len(rows["train"]), 512)).astype(int)
        ]
        each.append({split: zoo.read(some) for split, some in rows.items()})

    def measure(representation: HyperRepresentation) -> dict[str, float]:
        found = {}
        for parts in each:
            own = representation.on(parts["val"].architecture)
            layers = own.tokenizer.positions[:, 1]
            features = {split: embedding_features(own.embed(part), layers) for split, part in parts.items()}
            for prop in config.probes:
                target = {split: part.frame[prop].to_numpy(dtype=float) for split, part in parts.items()}
                error = ridge_probe([features], target, (0.1,))["val"] - target["val"]
                deviation = target["val"] - target["val"].mean()
                name = f"R2 {prop}" if len(each) == 1 else f"R2 {prop} {own.architecture.name}"
                found[name] = float(1 - np.square(error).sum() / np.square(deviation).sum())
        return found

    return measure


def _chosen(zoo: ModelZoo, config: ProbeConfig, split: str | None) -> Checkpoints:
    conditions: dict[str, Any] = {"split": split} if split else {}
    if config.epochs:
        conditions["epoch"] = list(config.epochs)
    chosen = zoo.select(**conditions) if conditions else zoo.read(zoo.frame)
    return chosen.rows(usable(chosen))


def _regressed(
    name: str, split: str, prop: str, predicted: Array, true: Array, members: pd.Series
) -> list[dict[str, Any]]:
    """R^2, and the rank correlation (Spearman), which a shift of the property does not harm."""
    each = members.to_numpy()
    sums = np.stack([np.square(predicted - true), np.square(true - true.mean())], axis=1)
    ranks = metrics.moments(stats.rankdata(predicted), stats.rankdata(true))
    return [
        metrics.summarize(STAGE, name, split, f"R2 {prop}", sums, each, metrics.one_minus_ratio),
        metrics.summarize(STAGE, name, split, f"rank correlation {prop}", ranks, each, metrics.pearson),
    ]


def _classified(name: str, split: str, column: str, found: Array, true: Array, part: Checkpoints) -> dict[str, Any]:
    hits = metrics.mean_of((found == true).astype(float))
    return metrics.summarize(STAGE, name, split, f"accuracy {column}", hits, part.frame["member"].to_numpy())


def _reduced(flat: dict[str, Array], config: ProbeConfig) -> dict[str, Array]:
    varies = flat["train"].std(0) > 0  # directions that nobody has are left out
    flat = {split: values[:, varies] for split, values in flat.items()}
    rows, columns = flat["train"].shape
    pca = PCA(min(config.components, rows, columns), svd_solver="covariance_eigh" if columns <= 2 * rows else "full")
    pca.fit(flat["train"])
    real = pca.explained_variance_ > 1e-9 * pca.explained_variance_[0]  # the others are rounding
    return {split: pca.transform(values)[:, real] for split, values in flat.items()}


def _map(features: dict[str, Array], checkpoints: dict[str, Checkpoints]) -> pd.DataFrame:
    scaler = StandardScaler().fit(features["train"])
    plane = PCA(2, svd_solver="full").fit(scaler.transform(features["train"]))
    frames = []
    for split in [split for split in SPLITS if split in checkpoints]:
        x, y = plane.transform(scaler.transform(features[split])).T
        frame = checkpoints[split].frame
        kept = frame[["split", "member", "epoch"]].assign(x=x, y=y)
        frames.append(kept.assign(test_acc=frame["test_acc"]) if "test_acc" in frame else kept)
    return pd.concat(frames, ignore_index=True)
