"""Properties predicted from embeddings by ridge regression, beside per-layer weight statistics and raw weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from weightspace.config import ProbeConfig
from weightspace.downstream import metrics
from weightspace.hyperrep.representation import Embeddings, HyperRepresentation
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import progress
from weightspace.zoo.model_zoo import ModelZoo, check_numeric, usable

STAGE = "probe"
SPLITS = ("train", "val", "test", "unseen")
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


def ridge_probe(features: dict[str, Array], target: dict[str, Array], penalties: tuple[float, ...]) -> dict[str, Array]:
    """Ridge regression fitted on 'train', its penalty chosen on 'val'; predictions for every split.

    Args:
        features: {split: [n, F]}; standardized inside with the training mean and standard deviation.
        target: {split: [n]}.
        penalties: candidates, in units of the number of training rows.
    """
    fits = []
    for penalty in penalties:
        model = make_pipeline(StandardScaler(), Ridge(penalty * len(target["train"]), solver="svd"))
        model.fit(features["train"], target["train"])
        fits.append((float(np.square(model.predict(features["val"]) - target["val"]).mean()), len(fits), model))
    best = min(fits)[2]
    return {split: best.predict(values) for split, values in features.items()}


def probe(
    zoo: ModelZoo, representations: Mapping[str, HyperRepresentation], config: ProbeConfig
) -> tuple[list[dict[str, Any]], pd.DataFrame, pd.DataFrame]:
    """Probe every representation and both baselines for every configured property, at every epoch of the zoo.

    Returns:
        Records (R^2 on test and unseen), predictions (a row per checkpoint, features and property), and a
        two-dimensional map of the embeddings (their principal components).

    Raises:
        UserError: a property that the zoo does not have or that is not a number.
    """
    check_numeric(zoo.frame, config.properties)
    checkpoints = {}
    for split in SPLITS:
        chosen = zoo.select(split=split, epoch=list(config.epochs)) if config.epochs else zoo.select(split=split)
        checkpoints[split] = chosen.rows(usable(chosen))
    features: dict[str, dict[str, Array]] = {}
    maps = []
    with progress("probe", (len(representations) + 2) * (1 + len(config.properties))) as advance:
        for name, representation in representations.items():
            layers = representation.tokenizer.positions[:, 1]
            embedded = {split: representation.embed(part) for split, part in checkpoints.items()}
            features[name] = {split: embedding_features(part, layers) for split, part in embedded.items()}
            maps.append(_map(features[name], checkpoints).assign(representation=name))
            advance(1, name)
        features["weight statistics"] = {split: weight_statistics(part) for split, part in checkpoints.items()}
        advance(1)
        features["raw weights"] = _reduced({split: part.flat().numpy() for split, part in checkpoints.items()}, config)
        advance(1)
        records, predictions = [], []
        for name, values in features.items():
            for prop in config.properties:
                target = {split: part.frame[prop].to_numpy(dtype=float) for split, part in checkpoints.items()}
                predicted = ridge_probe(values, target, config.penalties)
                for split in ("test", "unseen"):
                    members = checkpoints[split].frame["member"].to_numpy()
                    error = np.square(predicted[split] - target[split])
                    deviation = np.square(target[split] - target[split].mean())
                    sums = np.stack([error, deviation], axis=1)
                    records.append(
                        metrics.summarize(STAGE, name, split, f"R2 {prop}", sums, members, metrics.one_minus_ratio)
                    )
                    frame = checkpoints[split].frame[["split", "member", "epoch"]]
                    predictions.append(
                        frame.assign(features=name, property=prop, true=target[split], predicted=predicted[split])
                    )
                advance(1, f"{prop} from {name}")
    return records, pd.concat(predictions, ignore_index=True), pd.concat(maps, ignore_index=True)


def _reduced(flat: dict[str, Array], config: ProbeConfig) -> dict[str, Array]:
    components = min(config.components, *flat["train"].shape)
    pca = PCA(components, svd_solver="covariance_eigh" if flat["train"].shape[1] < 4000 else "full")
    pca.fit(flat["train"])
    real = pca.explained_variance_ > 1e-9 * pca.explained_variance_[0]  # the others are rounding
    return {split: pca.transform(values)[:, real] for split, values in flat.items()}


def _map(features: dict[str, Array], checkpoints: dict[str, Checkpoints]) -> pd.DataFrame:
    scaler = StandardScaler().fit(features["train"])
    plane = PCA(2, svd_solver="full").fit(scaler.transform(features["train"]))
    frames = []
    for split, values in features.items():
        x, y = plane.transform(scaler.transform(values)).T
        frame = checkpoints[split].frame
        kept = frame[["split", "member", "epoch"]].assign(x=x, y=y)
        frames.append(kept.assign(test_acc=frame["test_acc"]) if "test_acc" in frame else kept)
    return pd.concat(frames, ignore_index=True)
