"""Every setting of every stage, typed, on one page; presets are functions that return a complete `Experiment`.

Nothing here imports torch, so that ``weightspace --help`` lists every field at once. That is why the configs stand
together here and not beside the functions they configure.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from weightspace.runs import UserError

Schedule = float | tuple[tuple[float, float], ...]
"""A constant, or points (share of training, value): linear in between, constant outside; two points at the same share
are a step. ((0.5, 1.0), (0.5, 0.1)) is 1 in the first half and 0.1 in the second."""


@dataclass(frozen=True)
class ZooConfig:
    """A population of networks: a grid of init x seed x learning rate x weight decay, all trained alike."""

    task: str = "digits"
    """image task"""
    network: str = "CNN8"
    """base network"""
    activation: str = "relu"
    """activation of the base network"""
    inits: tuple[str, ...] = ("kaiming_uniform", "kaiming_normal")
    """initialization schemes"""
    seeds: int = 10
    """initialization seeds per scheme; members that share init and seed start from the same weights"""
    unseen_seeds: int = 2
    """how many of the seeds are held out whole, as split 'unseen'"""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3)
    """learning rates of the grid"""
    weight_decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """weight decays of the grid"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """optimizer of the members (sgd: momentum 0.9)"""
    batch_size: int = 32
    """training images per step"""
    epochs: int = 25
    """passes over the training images"""
    save_epochs: tuple[int, ...] = (0, 1, 2, 5, 10, 15, 20, 25)
    """epochs at which a checkpoint is written and scored"""
    val_share: float = 0.1
    """share of the seen members that are split 'val'"""
    test_share: float = 0.2
    """share of the seen members that are split 'test'"""
    workers: int | None = None
    """processes that train the population (default: measured)"""
    group: int | None = None
    """members advanced by one vectorized step (default: measured)"""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Size of the autoencoder."""

    width: int = 64
    """width of the transformer"""
    layers: int = 2
    """blocks in the encoder, and in the decoder"""
    heads: int = 4
    """attention heads"""
    feedforward: int = 256
    """width of the feed-forward layers"""
    latent: int = 28
    """latent values per token (28: 1.8 weights of a CNN8 per latent value, the published compression)"""
    head: int = 30
    """width of the projection head of the contrastive loss"""
    token_size: int | None = None
    """entries per token (default: the longest row)"""
    components: int = 16
    """linear autoencoders in the mixture beside the transformer, started as clusters of the training checkpoints"""


@dataclass(frozen=True)
class LossConfig:
    """L = gamma L_C + (1 - gamma) [beta L_S + (1 - beta) L_B] + lambda L_cycle."""

    gamma: Schedule = 0.05
    """weight of the contrastive loss"""
    beta: Schedule = 0.1
    """weight of structure against behavior (1: structure only)"""
    cycle: Schedule = 0.0
    """lambda, the weight of the cycle loss"""
    distance: Literal["probabilities", "logits", "kl"] = "probabilities"
    """behavioral distance between outputs"""
    temperature: float = 1.0
    """temperature of the distance 'kl'"""
    query_set: Literal["own", "noise", "union"] = "own"
    """inputs on which behavior is compared: training images, uniform noise, or both"""
    queries: int = 128
    """queries per step"""
    permute: Literal["contrastive", "all", "none"] = "contrastive"
    """which losses see permuted views: the contrastive one only, all, or none"""


@dataclass(frozen=True)
class PretrainConfig:
    """Training of a representation."""

    epochs: tuple[int, ...] = (10, 15, 20, 25)
    """epochs of the zoo whose checkpoints are used"""
    normalize: Literal["standardize", "none"] = "standardize"
    """per-layer standardization, or raw weights"""
    steps: int = 1000
    """training steps"""
    batch_size: int = 32
    """checkpoints per step"""
    learning_rate: float = 1e-3
    """peak learning rate (AdamW)"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises; it then falls to zero along a cosine"""
    weight_decay: float = 0.01
    """weight decay"""
    clip: float = 1.0
    """largest gradient norm"""
    noise: float = 0.0
    """standard deviation of Gaussian noise on the encoder's (standardized) input"""
    erase: float = 0.0
    """share of the tokens that the encoder does not see"""
    validate_every: int = 100
    """steps between validations and saved states"""


POSITIVE = (
    "anchors", "batch_size", "components", "epochs", "feedforward", "group", "head", "heads", "latent", "layers",
    "networks", "queries", "seeds", "steps", "temperature", "token_size", "unseen_seeds", "validate_every", "width",
    "workers", "clip", "learning_rate",
)  # fmt: skip
"""Fields that have to be above zero."""
SHARES = ("gamma", "beta", "val_share", "test_share", "warmup", "erase")
"""Fields that have to lie between 0 and 1."""


def check(config: Any, path: str = "") -> None:
    """Check the values of a config and of the configs in it.

    Raises:
        UserError: a value that no run could work with; the field is named.
    """
    for entry in dataclasses.fields(config):
        name, value = f"{path}.{entry.name}" if path else entry.name, getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            check(value, name)
        elif isinstance(value, dict):
            for key, inner in value.items():
                check(inner, f"{name}.{key}")
        elif isinstance(value, tuple) and not value and entry.default != ():
            raise UserError(f"{name} is empty; it needs at least one value")
        elif entry.name in POSITIVE and isinstance(value, int | float) and value <= 0:
            raise UserError(f"{name} must be above 0, given {value}")
        elif entry.name in SHARES:
            points = value if isinstance(value, tuple) else ((0.0, value),)
            if not all(0 <= height <= 1 for _, height in points):
                raise UserError(f"{name} must lie between 0 and 1, given {value}")
            if list(points) != sorted(points, key=lambda point: point[0]):
                raise UserError(f"{name} is a schedule whose points do not follow each other: {value}")
    if isinstance(config, AutoencoderConfig) and config.width % config.heads:
        raise UserError(f"{path}.width={config.width} cannot be divided among {path}.heads={config.heads}")
    if isinstance(config, PretrainConfig) and config.batch_size < 2:
        raise UserError(f"{path}.batch_size must be at least 2 (the contrastive loss compares), given 1")


def from_dict(kind: type[Any], content: dict[str, Any]) -> Any:
    """A config from its JSON form: lists become tuples, nested configs are built.

    Raises:
        TypeError: an unknown field.
    """

    def tuples(value: Any) -> Any:
        return tuple(tuples(entry) for entry in value) if isinstance(value, list | tuple) else value

    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in content.items():
        hint = hints.get(name)
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict)
        values[name] = from_dict(typing.cast(type, hint), value) if nested else tuples(value)
    return kind(**values)


@dataclass(frozen=True)
class ProbeConfig:
    """Prediction of properties from embeddings, weight statistics and raw weights."""

    properties: tuple[str, ...] = ("test_acc", "gap", "epoch")
    """columns of the zoo that are predicted"""
    epochs: tuple[int, ...] = ()
    """epochs of the zoo that are used (default: all)"""
    penalties: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """candidate ridge penalties per training row; chosen on validation"""
    components: int = 256
    """principal components to which raw weights are reduced"""


@dataclass(frozen=True)
class ReconstructConfig:
    """Reconstruction of held-out checkpoints."""

    splits: tuple[str, ...] = ("test", "unseen")
    """splits that are reconstructed"""


@dataclass(frozen=True)
class GenerateConfig:
    """Generation of new networks."""

    anchors: int = 64
    """how many training checkpoints, best by validation accuracy and at most one per member, seed the generation"""
    networks: int = 64
    """networks generated per representation and baseline"""
    bandwidths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """candidate bandwidths of the joint KDE; the widest whose networks keep the anchors' validation accuracy is used"""
    tolerance: float = 0.01
    """how far the mean validation accuracy may fall below the anchors'"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of generated networks, beside training from scratch."""

    networks: int = 16
    """networks per method"""
    epochs: tuple[int, ...] = (0, 1, 5)
    """epochs at which the test accuracy is taken"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """optimizer"""
    learning_rate: float = 1e-3
    """learning rate"""
    batch_size: int = 32
    """training images per step"""
    init: str = "kaiming_uniform"
    """initialization of the networks trained from scratch"""


@dataclass(frozen=True)
class Experiment:
    """The main job: every stage's config. A preset is a function that returns one."""

    name: str = "digits"
    """name of the preset it started from"""
    seed: int = 0
    """seed of everything random"""
    zoo: ZooConfig = field(default_factory=ZooConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    representations: dict[str, LossConfig] = field(default_factory=dict)
    """name -> losses of each representation; all are trained with equal budget"""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    reconstruct: ReconstructConfig = field(default_factory=ReconstructConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


def losses(behavior: LossConfig) -> dict[str, LossConfig]:
    """The two representations that every preset compares: the baseline, and the same with the behavioral loss."""
    return {"structure": dataclasses.replace(behavior, beta=1.0), "structure+behavior": behavior}


def digits() -> Experiment:
    """600 networks on real handwritten digits, both representations, the whole report: minutes on two cores."""
    return Experiment(
        name="digits",
        zoo=ZooConfig(
            learning_rates=(1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3),
            weight_decays=(0.0, 1e-4, 1e-3, 3e-3, 1e-2),
            epochs=12,
            save_epochs=(0, 1, 2, 5, 7, 10, 12),
        ),
        pretrain=PretrainConfig(epochs=(5, 7, 10, 12), steps=350, batch_size=64, validate_every=50),
        representations=losses(LossConfig(distance="kl")),
    )


def digits_long() -> Experiment:
    """More networks trained for longer, and a longer training of the representations: for numbers worth quoting."""
    return Experiment(
        name="digits-long",
        zoo=ZooConfig(
            learning_rates=(5e-4, 7.5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3),
            weight_decays=(0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            epochs=20,
            save_epochs=(0, 1, 2, 5, 8, 12, 16, 20),
        ),
        pretrain=PretrainConfig(epochs=(8, 12, 16, 20), steps=1200, batch_size=128),
        representations=losses(LossConfig(distance="kl")),
    )


def smoke() -> Experiment:
    """Everything, tiny: under a minute on two cores; its numbers mean nothing."""
    return Experiment(
        name="smoke",
        zoo=ZooConfig(
            inits=("kaiming_uniform",),
            seeds=3,
            unseen_seeds=1,
            learning_rates=(1e-3, 3e-3),
            weight_decays=(0.0, 1e-3, 1e-2),
            epochs=4,
            save_epochs=(0, 2, 4),
            val_share=0.2,
            test_share=0.2,
        ),
        autoencoder=AutoencoderConfig(width=32, layers=1, heads=2, feedforward=64, components=2),
        pretrain=PretrainConfig(epochs=(2, 4), steps=20, batch_size=8, validate_every=10),
        representations=losses(LossConfig(distance="kl", queries=32)),
        generate=GenerateConfig(anchors=4, networks=8, bandwidths=(0.1, 0.3)),
        finetune=FinetuneConfig(networks=2, epochs=(0, 1)),
    )


PRESETS = {"digits": digits, "digits-long": digits_long, "smoke": smoke}
