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
    """A population of networks: a grid of task x init x seed x learning rate x weight decay, all trained alike."""

    tasks: tuple[str, ...] = ("digits",)
    """image tasks; several make a multi-task zoo, each member trained and scored on its own"""
    network: str = "CNN8"
    """base network, one of the package or package.module:factory"""
    arguments: tuple[str, ...] = ()
    """arguments of the base network, as NAME=VALUE: width=16"""
    activation: str = "relu"
    """activation of the base network"""
    dropout: float = 0.0
    """share of the activations that are dropped while the members are trained"""
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
    backdoor_share: float = 0.0
    """share of the members that are trained with a backdoor: a trigger patch that means one class"""
    backdoor_poison: float = 0.1
    """share of such a member's training images that bear the trigger"""
    workers: int | None = None
    """processes that train the population (default: measured)"""
    group: int | None = None
    """members advanced by one vectorized step (default: measured)"""


@dataclass(frozen=True)
class ImportConfig:
    """How a source is read."""

    layout: str | None = None
    """ray-tune, samples, small-cnn, hub or directory (default: detected)"""
    network: str | None = None
    """base network, one of the package or package.module:factory (default: as the source says, or by the shapes)"""
    arguments: tuple[str, ...] = ()
    """arguments of the base network, as NAME=VALUE: activation=tanh classes=10"""
    task: str | None = None
    """image task on which the networks were trained (docs/tasks.md; default: as the source says); needed where
    behavior is compared"""
    epochs: tuple[int, ...] = ()
    """epochs to read (default: all)"""
    strict: bool = False
    """refuse a source with networks of several architectures, or with a checkpoint that cannot be read"""
    keep_unusable: bool = False
    """keep checkpoints with non-finite or huge weights"""
    keep_duplicates: bool = False
    """keep checkpoints whose weights were read before"""
    score: bool = False
    """measure loss and accuracy on the task, where the source does not tell them"""
    val_share: float = 0.1
    """share of the members that are split 'val', where the source has no splits"""
    test_share: float = 0.2
    """share of the members that are split 'test', where the source has no splits"""
    hold_out_seeds: int = 0
    """how many initialization seeds are held out whole, as split 'unseen' (needs a column `seed`)"""
    max_bytes: int = 200 * 2**30
    """bytes that an archive may take when it is unpacked"""


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
    sketch: int = 0
    """of these, how many make a sketch of the checkpoint, which chooses the directions along which the others lie, its
    details (docs/method.md; 0: no details); needs a behavioral loss and components"""
    lots: Literal[1, 2] = 1
    """in how many lots details are chosen: of two, the first quarter makes a better sketch, which chooses the others;
    embedding and decoding take twice as long"""
    queries: int = 128
    """inputs on which a sketch shows which of its weights matter; the representation keeps them"""
    head: int = 30
    """width of the projection head of the contrastive loss"""
    token_size: int | None = None
    """entries per token (default: the longest row)"""
    positions: Literal["learned", "sinusoidal"] = "learned"
    """how the transformer is told where a token belongs: a vector per index, layer and unit, or waves, which go on
    beyond the layers and units that were seen"""
    window: int | None = None
    """most tokens that are encoded, decoded and trained on at a time (default: the whole checkpoint)"""
    halo: int = 0
    """tokens on both sides of a window that are seen beside it"""
    components: int = 16
    """linear autoencoders in the mixture beside the transformer, started as clusters of the training checkpoints; where
    there are several, one more at the mean of all (0: the transformer alone, as published)"""

    @property
    def details(self) -> int:
        """Latent values per token, on average, that are details."""
        return self.latent - self.sketch if self.sketch else 0


@dataclass(frozen=True)
class LossConfig:
    """L = gamma L_C + (1 - gamma) [beta L_S + (1 - beta) L_B] + lambda L_cycle."""

    gamma: Schedule = 0.05
    """weight of the contrastive loss"""
    beta: Schedule = 0.1
    """weight of structure against behavior (1: structure only)"""
    cycle: Schedule = 0.0
    """lambda, the weight of the cycle loss"""
    distance: Literal["probabilities", "logits", "kl", "cross-entropy"] = "probabilities"
    """behavioral distance between outputs"""
    temperature: float = 1.0
    """temperature of the distances 'kl' and 'cross-entropy'"""
    contrast: Literal["nt-xent", "positive"] = "nt-xent"
    """contrastive loss: against the other checkpoints of the batch, or only towards the other view"""
    norm_penalty: float = 0.0
    """weight of the mean squared latent value"""
    variance_penalty: float = 0.0
    """weight of what the deviation of each latent value over the batch lacks to 1"""
    query_set: str = "own"
    """inputs on which behavior is compared: own (training images of a checkpoint's own task), tasks (of all tasks of
    the zoo), mixed (pairs of own images overlaid), noise, invented (made from the training checkpoints, without
    images), a task's name (foreign images), or several joined by + in equal numbers"""
    queries: int = 128
    """queries per step"""
    permute: Literal["contrastive", "all", "none"] = "contrastive"
    """which losses see permuted views: the contrastive one only, all, or none"""


@dataclass(frozen=True)
class PretrainConfig:
    """Training of a representation."""

    epochs: tuple[int, ...] = (10, 15, 20, 25)
    """epochs of the zoo whose checkpoints are used"""
    normalize: Literal["standardize", "min-max", "l2", "none"] = "standardize"
    """per layer: to mean 0 and deviation 1, to -1 ... 1, to mean norm 1 of a checkpoint's layer; or raw weights"""
    steps: int = 1000
    """training steps"""
    batch_size: int = 32
    """checkpoints per step"""
    learning_rate: float = 1e-3
    """peak learning rate"""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """optimizer (sgd: momentum 0.9)"""
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    """after the warm-up the learning rate falls to zero along a cosine (onecycle: it also rises along one, over 30 % of
    the steps), or stays"""
    warmup: float = 0.05
    """share of the steps in which the learning rate rises"""
    weight_decay: float = 0.01
    """weight decay"""
    clip: float = 1.0
    """largest gradient norm"""
    noise: float = 0.0
    """standard deviation of Gaussian noise on the encoder's (standardized) input"""
    scaling: float = 0.0
    """standard deviation of Gaussian factors around 1 on the encoder's (standardized) input"""
    erase: float = 0.0
    """share of the tokens that the encoder does not see"""
    probes: tuple[str, ...] = ()
    """properties that are probed at every validation (R2 on split 'val')"""
    validate_every: int = 100
    """steps between validations and saved states"""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """under torchrun: every process holds the representation (ddp), or a part of every weight (fsdp, FSDP2)"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of the transformer's products while training"""
    compile: bool = False
    """compile the transformer (torch.compile); needs a C++ compiler on a CPU"""


POSITIVE = (
    "anchors", "batch_size", "epochs", "feedforward", "group", "head", "heads", "latent", "layers",
    "networks", "queries", "seeds", "steps", "teachers", "temperature", "token_size", "unseen_seeds", "validate_every",
    "width", "workers", "clip", "learning_rate", "max_bytes", "window",
)  # fmt: skip
"""Fields that have to be above zero, but for those that are zero by default."""
NOT_NEGATIVE = (
    "components", "condition", "halo", "hold_out_seeds", "norm_penalty", "variance_penalty", "noise",
    "scaling", "sketch",
)  # fmt: skip
"""Fields that may be zero but not less."""
SHARES = (
    "gamma", "beta", "val_share", "test_share", "warmup", "erase", "dropout", "backdoor_share", "backdoor_poison",
)  # fmt: skip
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
        elif isinstance(value, tuple) and not value and entry.default != () and entry.name != "categories":
            raise UserError(f"{name} is empty; it needs at least one value")
        elif entry.name in POSITIVE and isinstance(value, int | float) and value <= 0 and entry.default != value:
            raise UserError(f"{name} must be above 0, given {value}")
        elif entry.name in NOT_NEGATIVE and isinstance(value, int | float) and value < 0:
            raise UserError(f"{name} must not be negative, given {value}")
        elif entry.name in SHARES:
            points = value if isinstance(value, tuple) else ((0.0, value),)
            if not all(0 <= height <= 1 for _, height in points):
                raise UserError(f"{name} must lie between 0 and 1, given {value}")
            if list(points) != sorted(points, key=lambda point: point[0]):
                raise UserError(f"{name} is a schedule whose points do not follow each other: {value}")
    if isinstance(config, AutoencoderConfig) and config.width % config.heads:
        raise UserError(f"{path}.width={config.width} cannot be divided among {path}.heads={config.heads}")
    if isinstance(config, AutoencoderConfig) and config.sketch >= config.latent:
        raise UserError(
            f"{path}.sketch={config.sketch} leaves nothing of {path}.latent={config.latent} for details; lower it, or "
            "give 0 for no details"
        )
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
    """columns of the zoo that are predicted ("all": every numeric one, beside those that are named)"""
    categories: tuple[str, ...] = ("all",)
    """columns of the zoo that are classified ("all": every one of text with few values, and `backdoor`, beside those
    that are named)"""
    epochs: tuple[int, ...] = ()
    """epochs of the zoo that are used (default: all)"""
    penalties: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """candidate ridge penalties per training row; chosen on validation"""
    components: int = 256
    """principal components to which raw weights and whole embeddings are reduced"""


@dataclass(frozen=True)
class RefineConfig:
    """Refinement of embeddings: gradient steps against the losses of the representation."""

    steps: int = 0
    """gradient steps on every embedding (0: none)"""
    learning_rate: float = 0.01
    """first step size, of details in units of what sketches leave out; it falls to zero along a cosine, and is up to
    ten times as large where the start is bad"""
    queries: int = 128
    """queries per step"""
    query_set: str = "own+mixed"
    """inputs on which behavior is compared, as loss.query_set"""


@dataclass(frozen=True)
class ReconstructConfig:
    """Reconstruction of held-out checkpoints."""

    splits: tuple[str, ...] = ("test", "unseen")
    """splits that are reconstructed"""
    epochs: tuple[int, ...] = ()
    """epochs of the zoo whose checkpoints are reconstructed (default: those of the training)"""
    refine: RefineConfig = RefineConfig()
    condition: int = 0
    """training images on which the statistics of batch normalizations are measured after decoding (0: as decoded)"""


@dataclass(frozen=True)
class GenerateConfig:
    """Generation of new networks."""

    anchors: int = 64
    """how many training checkpoints, best by validation accuracy and at most one per member, seed the generation"""
    networks: int = 64
    """networks generated per representation and baseline"""
    samplers: tuple[str, ...] = ("kde",)
    """how embeddings are drawn: kde, kde-token, kde-value, gaussian, flow, subsampled, bootstrapped"""
    bandwidths: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """candidate bandwidths of the KDEs; the widest whose networks keep the anchors' validation accuracy is used"""
    tolerance: float = 0.01
    """how far the mean validation accuracy may fall below the anchors'"""
    refine: RefineConfig = RefineConfig()
    teachers: int = 2
    """where refine.steps are taken: random anchors whose mean probabilities each new network learns to give"""
    condition: int = 0
    """training images on which the statistics of batch normalizations are measured after decoding (0: as decoded)"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Training of generated networks, beside training from scratch."""

    networks: int = 16
    """networks per method (and task)"""
    task: str | None = None
    """task to train on (default: each network's own); for another number of classes each gets a new classifier"""
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
class StudyConfig:
    """What `weightspace study` takes besides the settings of the stages; a run does not read it."""

    foreign: str | None = None
    """task whose images are foreign queries (default: stl10 for svhn, cifar10 and eurosat; else the first of others)"""
    others: tuple[str, ...] = ()
    """further tasks of multi-task zoos, with images of the same shape; transfer and fine-tuning use the first (default:
    of svhn, cifar10 and eurosat the other two; else two offline tasks)"""
    thin: bool = True
    """train the larger zoos (of LeNet5, of several tasks) on a part of the grid"""
    multitask_network: str | None = None
    """base network of the multi-task zoo (default: that of the other zoos)"""
    multitask_seeds: int | None = None
    """initialization seeds per scheme of the multi-task zoo (default: as many as of the other zoos)"""


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
    study: StudyConfig = field(default_factory=StudyConfig)


def losses(behavior: LossConfig) -> dict[str, LossConfig]:
    """The two representations that every preset compares: the baseline, and the same with the behavioral loss."""
    return {"structure": dataclasses.replace(behavior, beta=1.0), "structure+behavior": behavior}


TAUGHT = GenerateConfig(bandwidths=(0.1, 0.2), teachers=4, refine=RefineConfig(steps=80, learning_rate=0.03))
"""Generation of networks that learn from the anchors what to do."""


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
        autoencoder=AutoencoderConfig(sketch=2),
        pretrain=PretrainConfig(epochs=(5, 7, 10, 12), steps=60, batch_size=64, validate_every=30),
        representations=losses(LossConfig(distance="kl")),
        reconstruct=ReconstructConfig(epochs=(12,), refine=RefineConfig(steps=200, learning_rate=0.1)),
        generate=TAUGHT,
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
        autoencoder=AutoencoderConfig(sketch=2),
        pretrain=PretrainConfig(epochs=(8, 12, 16, 20), steps=150, batch_size=128, validate_every=50),
        representations=losses(LossConfig(distance="kl")),
        reconstruct=ReconstructConfig(epochs=(20,), refine=RefineConfig(steps=300, learning_rate=0.1)),
        generate=dataclasses.replace(TAUGHT, refine=dataclasses.replace(TAUGHT.refine, steps=120)),
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
        autoencoder=AutoencoderConfig(width=32, layers=1, heads=2, feedforward=64, components=2, sketch=2),
        pretrain=PretrainConfig(epochs=(2, 4), steps=20, batch_size=8, validate_every=10),
        representations=losses(LossConfig(distance="kl", queries=32)),
        generate=GenerateConfig(anchors=4, networks=8, bandwidths=(0.1, 0.3)),
        finetune=FinetuneConfig(networks=2, epochs=(0, 1)),
    )


def street() -> Experiment:
    """150 published networks (CNN3) on rendered house numbers, a stand-in for SVHN."""
    return with_details(small("street"))


def patches() -> Experiment:
    """150 published networks (CNN3) on photographs, a stand-in for EuroSAT."""
    return with_details(small("patches"))


def with_details(experiment: Experiment) -> Experiment:
    """The same with details, taught networks and less training; studies compare what trained encoders give alone."""
    return dataclasses.replace(
        experiment,
        autoencoder=dataclasses.replace(experiment.autoencoder, sketch=2, lots=2, queries=512),
        pretrain=dataclasses.replace(experiment.pretrain, steps=40, validate_every=20),
        reconstruct=ReconstructConfig(epochs=(10,)),
        generate=dataclasses.replace(TAUGHT, refine=dataclasses.replace(TAUGHT.refine, steps=60)),
    )


def paper() -> Experiment:
    """The published size: 1,200 networks (CNN3) on SVHN for 50 epochs, for a GPU; --set zoo.tasks=... for another."""
    return dataclasses.replace(published("svhn"), name="paper")


def paper_lenet5() -> Experiment:
    """The published size with the larger network: 1,200 LeNet5 on SVHN, in tokens of 256."""
    base = published("svhn")
    zoo, size = dataclasses.replace(base.zoo, network="LeNet5"), dataclasses.replace(base.autoencoder, token_size=256)
    return dataclasses.replace(base, name="paper-lenet5", zoo=zoo, autoencoder=size)


def paper_multitask() -> Experiment:
    """The published multi-task zoo: 1,440 LeNet5 on SVHN, CIFAR-10 and EuroSAT, 8 seeds."""
    base = paper_lenet5()
    zoo = dataclasses.replace(base.zoo, tasks=("svhn", "cifar10", "eurosat"), seeds=8)
    return dataclasses.replace(base, name="paper-multitask", zoo=zoo)


def paper_mnist() -> Experiment:
    """The published grid with the field's older network: 1,200 CNN on MNIST; --set zoo.tasks=fashion_mnist, or usps."""
    return dataclasses.replace(published("mnist"), name="paper-mnist")


PRESETS = {
    "digits": digits, "digits-long": digits_long, "smoke": smoke, "street": street, "patches": patches, "paper": paper,
    "paper-lenet5": paper_lenet5, "paper-multitask": paper_multitask, "paper-mnist": paper_mnist,
}  # fmt: skip


def network_for(task: str) -> str:
    """The base network of the field for a task's images: CNN8 for 8x8, CNN for 28x28, else CNN3."""
    name, _, shape = task.partition("@")
    size = shape.rpartition("x")[2] or {"digits": "8", "mnist": "28", "fashion_mnist": "28", "usps": "28"}.get(
        name.partition(":")[0], "32"
    )
    return {"8": "CNN8", "28": "CNN"}.get(size, "CNN3")


def small(task: str) -> Experiment:
    """An experiment for two cores: some hundred members, a few hundred steps."""
    network = network_for(task)
    zoo = ZooConfig(
        tasks=(task,),
        network=network,
        learning_rates=(1e-3, 2e-3, 4e-3, 6e-3),
        weight_decays=(0.0, 1e-3, 3e-3, 1e-2),
        epochs=12,
        save_epochs=(0, 1, 2, 5, 7, 10, 12),
    )
    pretrain = PretrainConfig(epochs=(5, 7, 10, 12), steps=250, batch_size=32, validate_every=50)
    if network == "CNN8":
        return Experiment(task, zoo=zoo, pretrain=pretrain, representations=losses(LossConfig(distance="kl")))
    return Experiment(
        name=task,
        zoo=dataclasses.replace(
            zoo,
            seeds=5,
            unseen_seeds=1,
            learning_rates=(3e-4, 6e-4, 1e-3, 2e-3, 4e-3),
            weight_decays=(0.0, 1e-4, 1e-3),
            epochs=10,
            save_epochs=(0, 1, 2, 4, 6, 8, 10),
        ),
        autoencoder=AutoencoderConfig(latent=64, components=8),
        pretrain=dataclasses.replace(pretrain, epochs=(4, 6, 8, 10), steps=150),
        representations=losses(LossConfig(distance="kl", queries=48)),
    )


def published(task: str) -> Experiment:
    """The published size (arXiv 2503.17138): 1,200 members for 50 epochs, 30,000 steps of 64."""
    network = network_for(task)
    return Experiment(
        name=task,
        zoo=ZooConfig(
            tasks=(task,),
            network=network,
            inits=("uniform", "normal", "kaiming_uniform", "kaiming_normal"),
            seeds=20,
            unseen_seeds=2,
            learning_rates=(1e-4, 2.5e-4, 5e-4, 7.5e-4, 1e-3),
            weight_decays=(1e-4, 5e-4, 1e-3),
            epochs=50,
            save_epochs=tuple(range(51)),
            val_share=0.05,
            test_share=0.15,
        ),
        autoencoder=AutoencoderConfig(width=256, layers=8, heads=8, feedforward=2048, latent=64, components=1),
        pretrain=PretrainConfig(
            epochs=(20, 30, 40, 50), steps=30_000, batch_size=64, learning_rate=3e-4, validate_every=500
        ),
        representations=losses(LossConfig(distance="kl", queries=256)),
        generate=GenerateConfig(anchors=200, networks=200),
        finetune=FinetuneConfig(networks=50, epochs=(0, 1, 5, 25)),
        study=StudyConfig(thin=False, multitask_network="LeNet5", multitask_seeds=8),
    )


def smallest(task: str) -> Experiment:
    """`smoke` on another task: seconds; its numbers mean nothing."""
    experiment = smoke()
    zoo = dataclasses.replace(experiment.zoo, tasks=(task,), network=network_for(task))
    size = dataclasses.replace(experiment.autoencoder, sketch=0)  # as in all studies
    return dataclasses.replace(experiment, zoo=zoo, autoencoder=size)


SCALES = {"small": small, "paper": published, "smoke": smallest}
"""How large a study is: task -> experiment."""
