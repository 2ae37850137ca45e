"""The questions that a paper asks: each study is one short function over experiments.

A study works in a `Lab`: a folder for one task and scale, in which zoos and representations are kept under the
fingerprint of their config, so that studies share them and an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from scipy import stats

from weightspace import runs
from weightspace.config import (
    AutoencoderConfig,
    Experiment,
    GenerateConfig,
    LossConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
)
from weightspace.downstream import metrics
from weightspace.downstream.baselines import ANCHORS
from weightspace.downstream.distances import paired
from weightspace.downstream.generate import choose_anchors, titles
from weightspace.downstream.probe import by_epoch
from weightspace.downstream.samplers import SAMPLERS, kde
from weightspace.experiment import (
    finetune_stage,
    generate_stage,
    pretrain_stage,
    probe_stage,
    reconstruct_stage,
    zoo_stage,
)
from weightspace.hyperrep.pretrain import METRICS_FILE, pretrain, training_checkpoints
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.report.study import STUDY_FILE, make_study_report
from weightspace.runs import RunFailed, UserError, atomic, derive_seed, fingerprint, read_json, write_json
from weightspace.tasks.images import SHAPE, load_task
from weightspace.zoo.cluster import connected, over
from weightspace.zoo.model_zoo import ModelZoo
from weightspace.zoo.spectrum import components, spectrum_study, variance_along

Records = list[dict[str, Any]]
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Where a study looks for every variant's own learning rate."""
PUBLISHED = ("svhn", "cifar10", "eurosat")
"""The tasks of the paper."""
LENET5 = "LeNet5"
STRUCTURE, BEHAVIOR = "structure", "structure+behavior"
BOTH: dict[str, dict[str, Any]] = {STRUCTURE: {"beta": 1.0}, BEHAVIOR: {}}
"""The baseline without the behavioral loss and the same with it, as changes of the base variant."""


@dataclass(frozen=True)
class Variant:
    """How one representation of a study is trained."""

    loss: LossConfig
    pretrain: PretrainConfig
    autoencoder: AutoencoderConfig
    x: float | None = None
    """the number that the study varies, where it varies one"""
    group: str | None = None
    """the curve it belongs to, where there are several"""
    start: HyperRepresentation | None = None
    """the representation it goes on from"""

    def at(self, learning_rate: float) -> Variant:
        """The same at another learning rate."""
        return dataclasses.replace(self, pretrain=dataclasses.replace(self.pretrain, learning_rate=learning_rate))


@dataclass(frozen=True)
class Lab:
    """Where studies of one task and scale work: trains what they ask for, once."""

    base: Experiment
    """what every variant starts from"""
    folder: Path
    study: str
    """name of the study at work, whose own files are in the folder of that name"""
    device: torch.device
    processors: int = 0
    """of a connected Ray cluster; 0: everything is trained here"""
    seeds: int = 1
    """from the base's on, at which the study is run"""

    @property
    def own(self) -> Path:
        """The folder of the study at work."""
        return self.folder / self.study

    def at_seeds(self) -> list[Lab]:
        """The lab at each of its seeds, with a folder of its own in the study's."""
        return [
            dataclasses.replace(
                self, base=dataclasses.replace(self.base, seed=seed), study=f"{self.study}/seed-{seed}", seeds=1
            )
            for seed in range(self.base.seed, self.base.seed + self.seeds)
        ]

    def zoo(self, **changes: Any) -> ModelZoo:
        """The zoo of the base experiment with some fields of its ZooConfig changed."""
        config = dataclasses.replace(self.base.zoo, **changes)
        key = fingerprint({"config": dataclasses.asdict(config), "seed": self.base.seed})
        place = self.folder / "zoos" / key
        return zoo_stage(place, config, self.base.seed, self.device, True, self.processors)

    def variant(self, **changes: Any) -> Variant:
        """The base representation (structure+behavior) with some fields changed.

        Args:
            changes: fields of LossConfig, PretrainConfig, AutoencoderConfig or Variant.
        """
        parts: list[Any] = [self.base.representations[BEHAVIOR], self.base.pretrain, self.base.autoencoder]
        for i, part in enumerate(parts):
            names = {entry.name for entry in dataclasses.fields(part)} & changes.keys()
            parts[i] = dataclasses.replace(part, **{name: changes.pop(name) for name in names})
        return Variant(*parts, **changes)

    def place(self, zoo: ModelZoo, variant: Variant) -> Path:
        """The folder of a variant trained on a zoo."""
        key: dict[str, Any] = {name: dataclasses.asdict(getattr(variant, name)) for name in ("loss", "pretrain")}
        key |= {"autoencoder": dataclasses.asdict(variant.autoencoder), "zoo": zoo.fingerprint, "seed": self.base.seed}
        key["start"] = variant.start.fingerprint if variant.start else None
        return self.folder / "representations" / fingerprint(key)

    def represent(self, zoo: ModelZoo, variant: Variant, title: str) -> HyperRepresentation:
        """Train a variant on a zoo, or load it where that was done."""
        parts = variant.pretrain, variant.loss, variant.autoencoder
        folder = self.place(zoo, variant)
        return pretrain_stage(folder, zoo, *parts, self.base.seed, self.device, variant.start, title)

    def tuned(self, zoo: ModelZoo, variant: Variant, title: str) -> Variant:
        """The variant at the learning rate of LEARNING_RATES that gives the best agreement on split 'val'.

        The search starts at the base's rate and climbs until both neighbors are worse: the best one is bracketed.
        Agreement is what variants are compared by; their own losses weigh terms that say little of it.
        """
        tried: dict[int, float] = {}

        def agreement(i: int) -> float:
            if i not in tried:
                try:
                    found = self.represent(zoo, variant.at(LEARNING_RATES[i]), title).info["validation"]["agreement"]
                except RunFailed as error:  # it diverged
                    runs.notice(str(error))
                    found = -math.inf
                tried[i] = found
            return tried[i]

        best, start = -1, int(np.abs(np.log(np.array(LEARNING_RATES) / variant.pretrain.learning_rate)).argmin())
        while best != start:
            best = start
            near = [best, *(i for i in (best - 1, best + 1) if 0 <= i < len(LEARNING_RATES))]
            start = max(near, key=agreement)
        return variant.at(LEARNING_RATES[best])

    def both(self, **changes: Any) -> dict[str, Variant]:
        """Without and with the behavioral loss (BOTH), each at the learning rate that suits it on the base zoo.

        Args:
            changes: what else is changed; see `variant`. The learning rate is found without these changes.
        """
        self._ahead(self.zoo(), {name: self.variant(**loss) for name, loss in BOTH.items()}, tuned=True)
        rates = {name: self.rate(name) for name in BOTH}
        return {name: self.variant(**loss, learning_rate=rates[name], **changes) for name, loss in BOTH.items()}

    def rate(self, name: str) -> float:
        """The learning rate that suits one of BOTH on the base zoo."""
        return self.tuned(self.zoo(), self.variant(**BOTH[name]), name).pretrain.learning_rate

    def compare(self, zoo: ModelZoo, variants: Mapping[str, Variant], tuned: bool = False, **changes: Any) -> Records:
        """Train every variant on a zoo and score it; see `score`.

        Args:
            zoo: where training and held-out checkpoints come from.
            variants: name -> variant.
            tuned: choose each one's learning rate on validation (and record it).
            changes: passed on to `score`.
        """
        self._ahead(zoo, variants, tuned)
        if tuned:
            variants = {name: self.tuned(zoo, variant, name) for name, variant in variants.items()}
        trained = {name: self.represent(zoo, variant, name) for name, variant in variants.items()}
        records = self.score(zoo, trained, variants, **changes)
        lines = {name: runs.read_lines(self.place(zoo, variant) / METRICS_FILE) for name, variant in variants.items()}
        write_json(self.own / changes.get("where", "") / "metrics.json", lines)
        if tuned:
            for name, variant in variants.items():
                records.append(placed(setting(name, "learning rate", variant.pretrain.learning_rate), variant))
        return records

    def _ahead(self, zoo: ModelZoo, variants: Mapping[str, Variant], tuned: bool) -> None:
        """On a cluster, train all variants at the same time; what follows finds them in the (shared) folder."""
        if self.processors:
            here = dataclasses.replace(self, processors=0)
            jobs = [(here, zoo.folder, variant, name, tuned) for name, variant in variants.items()]
            with runs.progress(f"{self.study}: variants on the cluster", len(jobs)) as advance:
                for name in over(_trained, jobs, self.device.type == "cuda"):
                    advance(1, name)

    def score(
        self,
        zoo: ModelZoo,
        trained: Mapping[str, HyperRepresentation],
        variants: Mapping[str, Variant],
        where: str = "",
        **changes: Any,
    ) -> Records:
        """Probes, reconstruction and generation of trained representations on a zoo: tidy records.

        Args:
            zoo: where training and held-out checkpoints come from.
            trained: name -> representation.
            variants: what they are, for x and group of the records.
            where: sub-folder of the study for the outputs, where it scores several times.
            changes: fields of ProbeConfig, ReconstructConfig or GenerateConfig.
        """
        folder = self.own / where
        probes = dataclasses.replace(self.base.probe, **_fields(ProbeConfig, changes))
        generation = dataclasses.replace(self.base.generate, **_fields(GenerateConfig, changes))
        write_table(folder / "zoo" / "checkpoints.parquet", zoo.frame)  # for the overview on the page
        records = probe_stage(folder / "probe", zoo, trained, probes)
        write_table(
            folder / "probe_epochs.parquet", by_epoch(pd.read_parquet(folder / "probe" / "predictions.parquet"))
        )
        rebuilding = dataclasses.replace(self.base.reconstruct, **_fields(ReconstructConfig, changes))
        records += reconstruct_stage(folder / "reconstruct", zoo, trained, rebuilding, self.base.seed, self.device)
        records += generate_stage(folder / "generate", zoo, trained, generation, self.base.seed, self.device)
        known = {
            title: variants.get(name) for name in trained for title in (name, *titles([name], generation.samplers))
        }
        return [placed(record, known.get(record["representation"])) for record in records]


def _trained(job: tuple[Lab, Path, Variant, str, bool]) -> str:
    """Train one variant on a worker of a cluster."""
    lab, zoo, variant, name, tuned = job
    torch.set_num_threads(1)
    (lab.tuned if tuned else lab.represent)(ModelZoo.open(zoo), variant, name)
    return name


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table atomically."""
    with atomic(path) as partial:
        frame.to_parquet(partial, index=False)


def _fields(kind: type[Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in changes.items() if name in names}


def placed(record: dict[str, Any], variant: Variant | None) -> dict[str, Any]:
    """A record with the x and group of its variant, and whether it is of a variant at all or of a baseline."""
    x, group = (variant.x, variant.group) if variant else (None, None)
    return {**record, "x": x, "group": group, "variant": variant is not None}


def setting(variant: str, name: str, value: float) -> dict[str, Any]:
    """A record of how a variant was trained; it belongs to every split."""
    return metrics.record("pretrain", variant, "", name, value)


FIDELITY = ("agreement", "skill", "identity", "accuracy fidelity: slope")
WHOLE = (*FIDELITY, "R2 test_acc", "R2 gap", "mean accuracy", "diversity in structure", "diversity in behavior")


@dataclass(frozen=True)
class Study:
    """A question and how it is answered."""

    question: str
    run: Callable[[Lab], Records]
    metrics: tuple[str, ...]
    """what its table and figure show"""
    x: str = ""
    """what the variants' x is"""
    seeds: int = 1
    """seeds that it compares by itself"""


STUDIES: dict[str, Study] = {}


def study(*shown: str, x: str = "", seeds: int = 1) -> Callable[[Callable[[Lab], Records]], Callable[[Lab], Records]]:
    """Register a function as the study of its name; the first line of its docstring is the question."""

    def register(run: Callable[[Lab], Records]) -> Callable[[Lab], Records]:
        STUDIES[run.__name__] = Study((run.__doc__ or "").splitlines()[0], run, shown, x, seeds)
        return run

    return register


@study(
    *WHOLE,
    "weight distance",
    "reconstructed accuracy",
    "best reconstructed accuracy",
    "best accuracy",
    "learning rate",
)
def losses(lab: Lab) -> Records:
    """Which of the three losses does it take? All seven combinations, each tuned over the same learning rates."""
    variants = {
        "contrastive": lab.variant(gamma=1.0),
        "structure": lab.variant(gamma=0.0, beta=1.0),
        "behavior": lab.variant(gamma=0.0, beta=0.0),
        "contrastive+structure": lab.variant(beta=1.0),
        "contrastive+behavior": lab.variant(beta=0.0),
        "structure+behavior": lab.variant(gamma=0.0),
        "all three": lab.variant(),
    }
    return lab.compare(lab.zoo(), variants, tuned=True)


@study(*WHOLE, "learning rate")
def distance(lab: Lab) -> Records:
    """Which distance between outputs? Probabilities (published), logits, KL at two temperatures, cross-entropy."""
    variants = {
        "probabilities": lab.variant(distance="probabilities"),
        "logits": lab.variant(distance="logits"),
        "KL": lab.variant(distance="kl", temperature=1.0),
        "KL, temperature 2": lab.variant(distance="kl", temperature=2.0),
        "cross-entropy": lab.variant(distance="cross-entropy"),
    }
    return lab.compare(lab.zoo(), variants, tuned=True)


@study(*WHOLE, x="beta")
def beta(lab: Lab) -> Records:
    """How much structure beside behavior? beta from 0 (behavior alone) to 1 (structure alone)."""
    values = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    rates = {value: lab.rate(STRUCTURE if value == 1.0 else BEHAVIOR) for value in values}
    variants = {f"beta {v:g}": lab.variant(beta=v, x=v, learning_rate=rates[v]) for v in values}
    return lab.compare(lab.zoo(), variants)


@study(*WHOLE)
def cycle(lab: Lab) -> Records:
    """Does the cycle loss help? lambda 0 and .05, with and without behavior."""
    variants = {
        f"{name}, lambda {value:g}": variant for value in (0.0, 0.05) for name, variant in lab.both(cycle=value).items()
    }
    return lab.compare(lab.zoo(), variants)


@study(*WHOLE)
def queries(lab: Lab) -> Records:
    """On which inputs is behavior compared? Own images, foreign images, noise and unions."""
    foreign = foreign_of(lab.base)
    sources = ("own", foreign, "noise", f"own+{foreign}+noise")
    rate = lab.rate(BEHAVIOR)
    return lab.compare(lab.zoo(), {name: lab.variant(query_set=name, learning_rate=rate) for name in sources})


@study(*WHOLE, x="queries per step")
def number(lab: Lab) -> Records:
    """How many queries per step? From a quarter to four times the usual number."""
    usual = lab.base.representations[BEHAVIOR].queries
    counts = [max(round(usual * factor), 1) for factor in (0.25, 0.5, 1, 2, 4)]
    rate = lab.rate(BEHAVIOR)
    variants = {f"{n} queries": lab.variant(queries=n, x=float(n), learning_rate=rate) for n in counts}
    return lab.compare(lab.zoo(), variants)


@study(*WHOLE, x="latent values per token")
def latent(lab: Lab) -> Records:
    """How small can the bottleneck be? Half, once and twice the usual latent values, with and without behavior."""
    usual = lab.base.autoencoder.latent
    variants = {
        f"{name}, {size} per token": dataclasses.replace(variant, group=name)
        for size in (usual // 2, usual, 2 * usual)
        for name, variant in lab.both(latent=size, x=float(size)).items()
    }
    return lab.compare(lab.zoo(), variants)


@study(*WHOLE, "learning rate")
def attention(lab: Lab) -> Records:
    """What does our autoencoder change? The published recipe with attention over tokens, and ours, at equal steps.

    The published recipe has the steps, batch and queries of the scale (256 queries at paper scale, as published), and
    attention over tokens, losses without padding, fixed scales, fresh permutations and clipped gradients as ours.
    """
    published = {"normalize": "none", "schedule": "constant", "warmup": 0.0, "weight_decay": 3e-9}
    published |= {"components": 0, "distance": "probabilities", "permute": "all"}
    recipes = {"published recipe": published, "transformer alone": {"components": 0}, "ours": {}}
    variants = {
        f"{name}, {kind}": lab.variant(**recipe, **loss)
        for name, recipe in recipes.items()
        for kind, loss in BOTH.items()
    }
    return lab.compare(lab.zoo(), variants, tuned=True)


@study(*WHOLE, x="latent values per token")
def lenet5(lab: Lab) -> Records:
    """Does it hold for a larger network? LeNet5 (62,006 weights) at half, once and twice the usual latent values."""
    base, task = lab.base, lab.base.zoo.tasks[0]
    wide = task if load_task(task).input_shape == (3, 32, 32) else f"{task.partition('@')[0]}@3x32x32"
    rates = base.zoo.learning_rates[:2] if base.study.thin else base.zoo.learning_rates
    zoo = dataclasses.replace(base.zoo, tasks=(wide,), network=LENET5, learning_rates=rates)
    size = dataclasses.replace(base.autoencoder, **_size_for(LENET5, base))
    return latent(dataclasses.replace(lab, base=dataclasses.replace(base, zoo=zoo, autoencoder=size)))


@study(*WHOLE, "learning rate")
def multitask(lab: Lab) -> Records:
    """Does one representation serve several tasks? A zoo of three tasks, each member scored on its own.

    Behavior is compared on every member's own images, or on those of all tasks.
    """
    base, settings = lab.base, lab.base.study
    network, seeds_per_init = settings.multitask_network or base.zoo.network, settings.multitask_seeds or base.zoo.seeds
    zoo = lab.zoo(
        tasks=(base.zoo.tasks[0], *others(base)),
        network=network,
        seeds=seeds_per_init,
        weight_decays=base.zoo.weight_decays[::2] if settings.thin else base.zoo.weight_decays,
    )
    size = _size_for(network, base)
    variants = {name: lab.variant(**loss, **size) for name, loss in BOTH.items()}
    variants[f"{BEHAVIOR}, queries of all tasks"] = lab.variant(query_set="tasks", **size)
    return lab.compare(zoo, variants, tuned=True)


def _size_for(network: str, base: Experiment) -> dict[str, Any]:
    """What differs in an autoencoder for this base network: LeNet5 has the published tokens, and less to fit."""
    return {"token_size": 256, "components": min(base.autoencoder.components, 2)} if network == LENET5 else {}


@study(*WHOLE, "steps")
def budget(lab: Lab) -> Records:
    """Is behavior worth its time? Structure alone for equally many steps and for equal time."""
    zoo, usual = lab.zoo(), lab.base.pretrain.steps
    ratio = _time_ratio(lab, zoo)
    full, longer, half = (lab.both(steps=steps) for steps in (usual, round(usual * ratio), usual // 2))
    variants = {
        "structure, equal steps": full[STRUCTURE],
        "structure, equal time": longer[STRUCTURE],
        "structure+behavior, half the steps": half[BEHAVIOR],
        BEHAVIOR: full[BEHAVIOR],
    }
    records = lab.compare(zoo, variants)
    for name, variant in variants.items():
        records.append(placed(setting(name, "steps", variant.pretrain.steps), variant))
    return records


def _time_ratio(lab: Lab, zoo: ModelZoo) -> float:
    """Seconds of a step with behavior over those of a step without, measured once and kept in the study's folder."""
    file = lab.own / "budget.json"
    if not file.exists():
        seconds = {}
        for name, loss in BOTH.items():
            total = []
            for steps in (2, 42):
                variant = lab.variant(**loss, steps=steps, validate_every=steps)
                parts = variant.pretrain, variant.loss, variant.autoencoder
                times = []
                for _ in range(3):  # the least: what other work on the machine adds is not the loss's
                    with tempfile.TemporaryDirectory() as folder:
                        started = time.perf_counter()
                        pretrain(zoo, Path(folder), *parts, lab.base.seed, lab.device, f"{name}, timed")
                        times.append(time.perf_counter() - started)
                total.append(min(times))
            seconds[name] = (total[1] - total[0]) / 40
        write_json(file, {"seconds": seconds, "ratio": max(seconds[BEHAVIOR] / seconds[STRUCTURE], 1.0)})
    return float(read_json(file)["ratio"])


@study(*FIDELITY, "R2 test_acc", "mean accuracy", "diversity in behavior")
def transfer(lab: Lab) -> Records:
    """Does a representation serve another zoo? As it is, fine-tuned for a tenth of the steps, and from scratch."""
    home = lab.zoo()
    away = lab.zoo(tasks=(others(lab.base)[0],))
    steps = max(lab.base.pretrain.steps // 10, 2)
    short = lab.both(steps=steps, validate_every=min(steps, lab.base.pretrain.validate_every))
    records: Records = []
    for name, variant in lab.both().items():
        source = lab.represent(home, variant, name)
        further = dataclasses.replace(short[name], start=source)
        trained = {
            f"{name}, as it is": source,
            f"{name}, fine-tuned": lab.represent(away, further, f"{name}, fine-tuned"),
            f"{name}, from scratch, as few steps": lab.represent(away, short[name], f"{name}, few steps"),
            f"{name}, from scratch": lab.represent(away, variant, f"{name}, away"),
        }
        found = lab.score(away, trained, dict.fromkeys(trained, variant), where=name)
        records += [record for record in found if record["variant"] or name == STRUCTURE]  # the baselines once
    return records


@study("accuracy", "agreement", x="principal components kept")
def spectrum(lab: Lab) -> Records:
    """Where in the spectrum of the weights does accuracy lie? Networks from the top, bottom or random components."""
    zoo = lab.zoo()
    trained = {name: lab.represent(zoo, variant, name) for name, variant in lab.both().items()}
    train, test = (training_checkpoints(zoo, lab.base.pretrain, split) for split in ("train", "test"))
    task = load_task(zoo.tasks[0]).to(lab.device)
    generator = torch.Generator().manual_seed(derive_seed(lab.base.seed, "spectrum"))
    most = min(len(train) - 1, zoo.architecture.parameter_count)
    counts = sorted({max(round(most * share), 1) for share in (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)})
    frame = spectrum_study(train, test, task.test.images, task.test.labels, counts, generator)
    write_table(lab.own / "spectrum.parquet", frame)
    found = {"original": test}
    for name, representation in trained.items():
        anchors = choose_anchors(train, lab.base.generate.anchors)
        found[f"{name}, reconstructed"] = representation.reconstruct(test)
        found[f"{name}, generated"] = representation.generate(len(test), kde(), anchors, lab.base.seed)
    along = {name: variance_along(networks, components(train)).numpy() for name, networks in found.items()}
    curves = [pd.DataFrame({"name": k, "component": range(len(v)), "variance": v}) for k, v in along.items()]
    write_table(lab.own / "variance.parquet", pd.concat(curves, ignore_index=True))
    records = []
    for key, rows in frame.groupby(["which", "count"], sort=False):
        which, count = str(key[0]), int(key[1])  # type: ignore[index]
        for metric, column in (("accuracy", "test_acc"), ("agreement", "agreement")):
            sums, members = metrics.mean_of(rows[column].to_numpy(float)), rows["member"].to_numpy()
            record = metrics.summarize("spectrum", f"{which} {count}", "test", metric, sums, members)
            records.append({**record, "x": float(count), "group": which, "variant": True})
    return records


@study(
    *FIDELITY,
    "skill: paired t-test p",
    "identity: paired t-test p",
    "R2 test_acc",
    "mean accuracy",
    "diversity in behavior",
    seeds=3,
)
def seeds(lab: Lab) -> Records:
    """How much is chance? Zoo and representations from several seeds: intervals over seeds, and paired tests."""
    variants = lab.both()
    found = [at.compare(at.zoo(), variants) for at in lab.at_seeds()]
    frame = pd.concat([pd.DataFrame(some).assign(seed=seed) for seed, some in enumerate(found)])
    frame = frame[~frame["metric"].str.endswith(P_VALUE)]
    by_name = frame.pivot_table(index=["stage", "split", "metric", "seed"], columns="representation", values="mean")
    gain = (by_name[BEHAVIOR] - by_name[STRUCTURE]).dropna()
    records = averaged(found)
    for key, values in gain.groupby(level=["stage", "split", "metric"], sort=False):
        stage, split, metric = cast(tuple[str, str, str], key)
        differences = values.to_numpy(float)
        record = over_seeds(stage, "gain of behavior", split, metric, differences)
        name, p = f"{metric}: paired t-test{P_VALUE}", paired(differences)
        test = metrics.record(stage, "gain of behavior", split, name, p, n=len(differences))
        records += [placed(record, lab.variant()), placed(test, lab.variant())]
    return records


P_VALUE = " p"
"""How the names of metrics end that are p values; they are not averaged."""


def averaged(found: Sequence[Records]) -> Records:
    """The records of a study at several seeds as one: means over seeds with their intervals."""
    same: dict[tuple[str, str, str, str], Records] = {}
    for record in (record for some in found for record in some if not record["metric"].endswith(P_VALUE)):
        key = record["stage"], record["representation"], record["split"], record["metric"]
        same.setdefault(key, []).append(record)
    return [
        {**records[0], **over_seeds(*key, np.array([record["mean"] for record in records], float))}
        for key, records in same.items()
    ]


def over_seeds(stage: str, name: str, split: str, metric: str, values: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Mean over seeds with its 95 % t-interval."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("nan")
    mean = float(values.mean())
    return metrics.record(stage, name, split, metric, mean, mean - half, mean + half, len(values))


@study(*FIDELITY, "structural R2", x="initializations per scheme")
def unseen(lab: Lab) -> Records:
    """What do siblings give? Equally many members from few and from many initializations, `test` against `unseen`."""
    zoo = lab.base.zoo
    members = zoo.seeds * len(zoo.learning_rates) * len(zoo.weight_decays)
    rate = lab.rate(BEHAVIOR)
    records: Records = []
    for seeds_per_init in (zoo.seeds, zoo.seeds * len(zoo.weight_decays), members):
        rates = zoo.learning_rates if seeds_per_init < members else zoo.learning_rates[-2:-1]
        decays = zoo.weight_decays if seeds_per_init == zoo.seeds else zoo.weight_decays[:1]
        held = max(round(seeds_per_init * zoo.unseen_seeds / zoo.seeds), 1)
        population = lab.zoo(seeds=seeds_per_init, unseen_seeds=held, learning_rates=rates, weight_decays=decays)
        for permute in ("contrastive", "all"):
            name = f"{seeds_per_init} seeds, permuted views: {permute}"
            group = f"permuted views: {permute}"
            variant = lab.variant(permute=permute, x=float(seeds_per_init), group=group, learning_rate=rate)
            found = lab.compare(population, {name: variant}, where=f"{seeds_per_init}-{permute}")
            records += [record for record in found if record["representation"] == name]
    return records


@study(
    "mean accuracy",
    "median accuracy",
    "diversity in structure",
    "diversity in behavior",
    "novelty",
    "ensemble accuracy",
)
def samplers(lab: Lab) -> Records:
    """Which sampler? Every sampler in embedding space, beside the anchors, noise, averages and PCA."""
    records = lab.compare(lab.zoo(), lab.both(), samplers=tuple(SAMPLERS))
    return [record for record in records if record["stage"] == "generate"]


@study("accuracy backdoor", "R2 attack", "accuracy init")
def backdoors(lab: Lab) -> Records:
    """Can backdoors be seen in the weights? Half of the members were trained with a trigger patch."""
    zoo, variants = lab.zoo(backdoor_share=0.5), lab.both()
    trained = {name: lab.represent(zoo, variant, name) for name, variant in variants.items()}
    config = dataclasses.replace(
        lab.base.probe,
        categories=("backdoor", "init"),
        properties=("attack", "test_acc"),
        epochs=lab.base.zoo.save_epochs[-1:],
    )
    records = probe_stage(lab.own / "probe", zoo, trained, config)
    return [placed(record, variants.get(record["representation"])) for record in records]


@study("accuracy after 0 epochs", "accuracy after 1 epoch", "accuracy after 5 epochs")
def finetuning(lab: Lab) -> Records:
    """What is a generated network worth as a start? Trained on its own task and on another one, beside scratch."""
    variants = lab.both()
    lab.compare(lab.zoo(), variants)
    files = {name: lab.own / "generate" / f"{name}.safetensors" for name in (*variants, ANCHORS)}
    records: Records = []
    for task in (None, others(lab.base)[0]):
        config = dataclasses.replace(lab.base.finetune, task=task)
        found = finetune_stage(
            lab.own / f"finetune-{'other' if task else 'own'}", files, config, lab.base.seed, lab.device
        )
        records += [{**record, "split": f"test {task}" if task else "test"} for record in found]
    return [placed(record, variants.get(record["representation"])) for record in records]


def shaped(task: str) -> str:
    """The name of a task of one's own images with their shape, by which a scale chooses the base network."""
    if not task.startswith("folder:") or SHAPE.fullmatch(task.rpartition("@")[2]):
        return task
    return f"{task}@{'x'.join(map(str, load_task(task).input_shape))}"


def others(base: Experiment) -> tuple[str, ...]:
    """Further tasks with images of the same shape: those that the base names, the other published ones, or offline."""
    task = base.zoo.tasks[0]
    if base.study.others:
        return base.study.others
    if task in PUBLISHED:
        return tuple(name for name in PUBLISHED if name != task)
    shape = "x".join(map(str, load_task(task).input_shape))
    suffix = "" if shape == "3x32x32" else f"@{shape}"
    return tuple(f"{name}{suffix}" for name in ("patches", "street", "digits@3x32x32") if name != task)[:2]


def foreign_of(base: Experiment) -> str:
    """The task whose images are foreign queries."""
    published = base.zoo.tasks[0] in PUBLISHED
    return base.study.foreign or ("stl10@3x32x32" if published else others(base)[0])


def run_study(
    name: str,
    base: Experiment,
    folder: Path,
    device: torch.device,
    command: str = "",
    cluster: str | None = None,
    seeds: int | None = None,
) -> Path:
    """Run one study in its folder, or go on with it, and draw its page.

    Args:
        name: one of STUDIES.
        base: the experiment that its variants start from.
        folder: of the lab: zoos and representations of all studies are kept here, the study's own files in folder/name.
        device: where to train.
        command: what the page says made it.
        cluster: address of a Ray cluster, see `connected`, whose machines share the folder.
        seeds: how many seeds it is run at, from the base's on, in folder/NAME-N-seeds: its table then has means and
            intervals over seeds (default: one; the study `seeds` has three).

    Returns:
        The path of its page.

    Raises:
        UserError: no such study, too few seeds, a folder that holds something else.
        RunFailed: a stage that could not go on.
    """
    if name not in STUDIES:
        raise UserError(f"unknown study {name!r}; the studies are {', '.join(STUDIES)}")
    chosen = STUDIES[name]
    compares = chosen.seeds > 1
    if seeds is not None and seeds < 1 + compares:
        raise UserError(f"the study {name} needs at least {1 + compares} seeds, given --seeds {seeds}")
    count = seeds or chosen.seeds
    title = name if count == chosen.seeds else f"{name}-{count}-seeds"
    lab = Lab(base, folder.resolve() if cluster else folder, title, device, seeds=count)
    claim = {"study": name, "base": dataclasses.asdict(base), "learning_rates": LEARNING_RATES, "seeds": count}
    with runs.stage(lab.own, "study", claim) as todo:
        if todo:
            with connected(cluster) if cluster else nullcontext(0) as processors:
                lab = dataclasses.replace(lab, processors=processors)
                alone = count == 1 or compares
                records = chosen.run(lab) if alone else averaged([chosen.run(at) for at in lab.at_seeds()])
            write_json(lab.own / "records.json", records)
            about = {"name": title, "question": chosen.question, "task": ", ".join(base.zoo.tasks), "command": command}
            write_json(lab.own / STUDY_FILE, {**about, "metrics": list(chosen.metrics), "x": chosen.x})
    return make_study_report(lab.own)
