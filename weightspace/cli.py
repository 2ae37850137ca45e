"""The command line: one sub-command per stage, no logic of its own.

The stages are imported when a command runs, not before, so that --help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from weightspace.config import (
    PRESETS,
    SCALES,
    AutoencoderConfig,
    Experiment,
    FinetuneConfig,
    GenerateConfig,
    ImportConfig,
    LossConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
    RefineConfig,
    ZooConfig,
)
from weightspace.runs import RunFailed, UserError, read_json

if TYPE_CHECKING:
    import torch

    from weightspace.hyperrep.representation import HyperRepresentation
    from weightspace.zoo.model_zoo import ModelZoo

Config = TypeVar("Config")
Inline = Annotated[Config, tyro.conf.arg(name="")]
Device = Annotated[str, tyro.conf.arg(help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")]
Cluster = Annotated[
    str | None,
    tyro.conf.arg(
        help="train on a Ray cluster (extra `ray`): auto (the one that runs here), local (started and ended here) or "
        "HOST:PORT; its machines share the output folder of a study"
    ),
]
Folder = tyro.conf.Positional[Path]
Folders = tyro.conf.Positional[tuple[Path, ...]]

DEFAULT = PRESETS["digits"]()
BEHAVIOR = DEFAULT.representations["structure+behavior"]


@dataclass(frozen=True)
class Run:
    """Images -> zoo -> representations -> probes, reconstruction, generation, fine-tuning -> report.

    PRESET is digits (the default: 600 networks, minutes), digits-long (960 networks, under 45 minutes), smoke
    (everything, tiny; its numbers mean nothing), street or patches (150 CNN3 on 32x32 images) or, for a
    GPU, the published sizes: paper (CNN3 on SVHN), paper-lenet5, paper-multitask (three tasks), paper-mnist (CNN).
    Running the same command again skips finished stages and continues an interrupted one. Every field below can be
    set as an option (--pretrain.steps 200) or as --set pretrain.steps=200; the defaults shown are the preset's.
    """

    experiment: Inline[Experiment]
    out: Path | None = None
    """output folder (default: runs/PRESET)"""
    device: Device = "auto"

    def __call__(self) -> None:
        from weightspace.experiment import choose_device, run

        page = run(self.experiment, self.out or Path("runs") / self.experiment.name, choose_device(self.device))
        show(read_json(page.parent.parent / "results.json"), "reconstruct", "generate")
        print(f"report: {page}")


@dataclass(frozen=True)
class ZooTrain:
    """Train a population of networks and write it as a zoo.

    A PRESET (as of `weightspace run`; default: digits) gives the grid that the fields below start from.
    """

    out: Path
    """folder of the zoo"""
    config: Inline[ZooConfig] = field(default_factory=lambda: DEFAULT.zoo)
    seed: int = 0
    """seed of initializations, data orders and split"""
    device: Device = "auto"
    cluster: Cluster = None

    def __call__(self) -> None:
        from weightspace.experiment import choose_device, zoo_stage
        from weightspace.zoo.cluster import connected
        from weightspace.zoo.model_zoo import summary

        device = choose_device(self.device)
        with connected(self.cluster) if self.cluster else nullcontext(0) as processors:
            zoo = zoo_stage(self.out, self.config, self.seed, device, processors=processors)
        print(summary(zoo))


@dataclass(frozen=True)
class ZooImport:
    """Turn networks from elsewhere into a zoo (one per architecture), safely; a line per checkpoint in report.jsonl.

    SOURCE is a folder, an archive of one (.zip, .tar, .tar.gz ...), or hub:owner/name (several: separated by commas, or
    hub:FILE with a name per line; needs the extra `hub`). Its layout is found out: ray-tune (trials with params.json,
    result.json, checkpoint_*), samples (dataset_torch.<split>), small-cnn (weights.npy), hub (config.json and
    model.safetensors), or directory (.pt, .pth, .bin, .safetensors, with a table of properties). The base network is
    what the source says, else the one whose shapes fit, else yours: --network package.module:factory.
    """

    source: tyro.conf.Positional[str]
    """what to read"""
    out: Path
    """folder of the zoo"""
    config: Inline[ImportConfig] = field(default_factory=ImportConfig)
    seed: int = 0
    """seed of the split"""

    def __call__(self) -> None:
        from weightspace.networks.architectures import register_network
        from weightspace.zoo.importing import import_zoo
        from weightspace.zoo.model_zoo import summary

        if self.config.network and ":" in self.config.network:
            register_network(self.config.network)
        print("\n\n".join(map(summary, import_zoo(self.source, self.out, self.config, self.seed))))


@dataclass(frozen=True)
class ZooExport:
    """Write a zoo in a layout that other code reads.

    ray-tune: the field's own layout, for its existing code; directory: safetensors with a table of properties;
    weightspace: a smaller zoo of the rows that --query chooses.
    """

    zoo: Folder
    """folder of the zoo"""
    out: Path
    """output folder"""
    layout: Literal["ray-tune", "directory", "weightspace"]
    """layout to write"""
    query: str | None = None
    """which checkpoints, as for a data frame: "val_acc > 0.8 and epoch == 25" (default: all)"""

    def __call__(self) -> None:
        from weightspace.zoo.exporting import export_zoo
        from weightspace.zoo.model_zoo import ModelZoo

        export_zoo(ModelZoo.open(self.zoo), self.out, self.layout, self.query)
        print(f"exported: {self.out}")


@dataclass(frozen=True)
class ZooAlign:
    """Write a zoo with the units of all networks in one order, and say what lies between members before and after.

    Permutation groups are found by tracing the base network; every network computes what it did.
    """

    zoo: Folder
    """folder of the zoo"""
    out: Path
    """folder of the aligned zoo"""
    to: str = "mean"
    """what the networks are aligned to: mean, or the number of a member"""
    by: Literal["weights", "activations"] = "weights"
    """what lies closest: the units' weights, or what they put out on validation images"""
    seed: int = 0
    """seed of the pairs of members between which the barrier is measured"""
    device: Device = "auto"

    def __call__(self) -> None:
        from weightspace.experiment import choose_device
        from weightspace.zoo.aligning import align_zoo
        from weightspace.zoo.model_zoo import ModelZoo

        device = choose_device(self.device)
        found = align_zoo(ModelZoo.open(self.zoo), self.out, self.to, self.seed, device, self.by)
        for name in ("distance", "mean barrier", "largest barrier"):
            print(f"{name:<16}{found[f'{name} before']:10.4f} -> {found[f'{name} after']:.4f}")
        print(f"over {found['pairs']} pairs of members at their last epoch, barriers in validation loss: {self.out}")


@dataclass(frozen=True)
class ZooShow:
    """Show what a zoo holds: base network, members, properties, accuracy by epoch."""

    zoo: Folder
    """folder of the zoo"""

    def __call__(self) -> None:
        from weightspace.zoo.model_zoo import ModelZoo, summary

        print(summary(ModelZoo.open(self.zoo)))


@dataclass(frozen=True)
class ZooVerify:
    """Check every file of a zoo against its checksum and shape; lists what is wrong (exit code 1).

    With --repair, a damaged zoo is replaced by one of its intact checkpoints and kept beside it as ZOO.damaged.
    """

    zoo: Folder
    """folder of the zoo"""
    repair: bool = False
    """keep every intact checkpoint of a damaged zoo"""

    def __call__(self) -> None:
        from weightspace.zoo.model_zoo import verify

        if self.repair:
            from weightspace.zoo.repair import repair

            kept, lost, aside = repair(self.zoo)
            print(f"kept: {kept:,} checkpoints; lost: {len(lost):,}; the damaged zoo is now {aside}")
            for row in lost.to_dict("records"):
                print(f"lost: member {row['member']}, epoch {row['epoch']}")
            return
        problems = verify(self.zoo)
        if problems:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise RunFailed(f"the zoo {self.zoo} is damaged:\n{listed}\n--repair keeps every intact checkpoint")
        print(f"the zoo {self.zoo} is intact")


@dataclass(frozen=True)
class Pretrain:
    """Train a representation on a zoo and write it as one folder (best and last state).

    Several zoos, of any base networks, share one representation: they take turns.
    """

    zoos: Folders
    """folder of the zoo, or of several"""
    out: Path
    """folder of the representation"""
    pretrain: PretrainConfig = field(default_factory=lambda: DEFAULT.pretrain)
    loss: LossConfig = field(default_factory=lambda: BEHAVIOR)
    autoencoder: AutoencoderConfig = field(default_factory=lambda: DEFAULT.autoencoder)
    start: Path | None = None
    """folder of a representation of another zoo to go on from (its size and normalization are kept)"""
    seed: int = 0
    """seed of initialization, batches, queries and views"""
    device: Device = "auto"

    def __call__(self) -> None:
        from weightspace.experiment import choose_device, pretrain_stage
        from weightspace.hyperrep.representation import HyperRepresentation
        from weightspace.zoo.model_zoo import ModelZoo

        device = choose_device(self.device)
        if not self.zoos:
            raise UserError("no zoo given; name at least one folder written by `weightspace zoo train` or `zoo import`")
        zoos = [ModelZoo.open(folder) for folder in self.zoos]
        start = HyperRepresentation.load(self.start, device) if self.start else None
        size = start.autoencoder_config if start else self.autoencoder
        made = pretrain_stage(
            self.out, zoos if len(zoos) > 1 else zoos[0], self.pretrain, self.loss, size, self.seed, device, start
        )
        best = ", ".join(f"{name} {value:.4g}" for name, value in made.info["validation"].items())
        print(f"{self.out}: best at step {made.info['step']}, validation {best}")


@dataclass(frozen=True)
class Embed:
    """Embed the checkpoints of a zoo: embeddings.safetensors (latent values) and embeddings.parquet (their rows)."""

    zoo: Folder
    """folder of the zoo"""
    representation: Folder
    """folder of the representation"""
    out: Path
    """output folder"""
    split: str | None = None
    """split to embed (default: all)"""
    refine: RefineConfig = field(default_factory=lambda: RefineConfig())
    """refinement of the embeddings (docs/method.md)"""
    seed: int = 0
    """seed of the refinement's queries"""
    device: Device = "auto"

    def __call__(self) -> None:
        from weightspace.experiment import choose_device, embed_stage
        from weightspace.hyperrep.representation import HyperRepresentation
        from weightspace.zoo.model_zoo import ModelZoo

        device = choose_device(self.device)
        representation = HyperRepresentation.load(self.representation, device)
        zoo = ModelZoo.open(self.zoo)
        embed_stage(self.out, zoo, representation, self.split, self.refine, self.seed, device)
        print(f"embeddings: {self.out}")


@dataclass(frozen=True)
class Downstream:
    """What every use of representations on a zoo is given."""

    zoo: Folder
    """folder of the zoo"""
    representations: Folders
    """folders of representations"""
    out: Path
    """output folder"""
    device: Device = "auto"

    def opened(self) -> tuple[ModelZoo, dict[str, HyperRepresentation], torch.device]:
        """The zoo, the representations by name, and the device on which they are."""
        from weightspace.experiment import choose_device, load_representations
        from weightspace.zoo.model_zoo import ModelZoo

        device = choose_device(self.device)
        return ModelZoo.open(self.zoo), load_representations(self.representations, device), device


@dataclass(frozen=True)
class Probe(Downstream):
    """Predict properties from embeddings, beside weight statistics and raw weights: on test, unseen and other zoos."""

    config: Inline[ProbeConfig] = field(default_factory=lambda: DEFAULT.probe)
    others: tuple[Path, ...] = ()
    """folders of other zoos of the same base network on which the probes are scored too"""

    def __call__(self) -> None:
        from weightspace.experiment import probe_stage
        from weightspace.zoo.model_zoo import ModelZoo

        zoo, representations, _ = self.opened()
        others = {folder.resolve().name: ModelZoo.open(folder) for folder in self.others}
        show(probe_stage(self.out, zoo, representations, self.config, others))


@dataclass(frozen=True)
class Reconstruct(Downstream):
    """Reconstruct held-out checkpoints and score them: agreement, floor, skill, identity, fidelity."""

    config: Inline[ReconstructConfig] = field(default_factory=lambda: replace(DEFAULT.reconstruct, epochs=()))
    seed: int = 0
    """seed of the refinement's queries"""

    def __call__(self) -> None:
        from weightspace.experiment import reconstruct_stage

        zoo, representations, device = self.opened()
        show(reconstruct_stage(self.out, zoo, representations, self.config, self.seed, device))


@dataclass(frozen=True)
class Generate(Downstream):
    """Generate networks (NAME.safetensors and NAME.json) from the best training members, beside the baselines."""

    config: Inline[GenerateConfig] = field(default_factory=lambda: DEFAULT.generate)
    seed: int = 0
    """seed of the samples"""

    def __call__(self) -> None:
        from weightspace.experiment import generate_stage

        zoo, representations, device = self.opened()
        show(generate_stage(self.out, zoo, representations, self.config, self.seed, device))


@dataclass(frozen=True)
class Finetune:
    """Train generated networks on, on their own task or another one, beside training from scratch."""

    networks: Folders
    """files written by `generate` (NAME.safetensors)"""
    out: Path
    """output folder"""
    config: Inline[FinetuneConfig] = field(default_factory=lambda: DEFAULT.finetune)
    seed: int = 0
    """seed of data orders and fresh networks"""
    device: Device = "auto"

    def __call__(self) -> None:
        from weightspace.experiment import choose_device, finetune_stage

        names = [path.name.removesuffix(".safetensors").removesuffix(".json") for path in self.networks]
        if len(set(names)) < len(names) or not names:
            raise UserError(f"networks are told apart by the names of their files, given {names}; rename one")
        networks = dict(zip(names, self.networks, strict=True))
        show(finetune_stage(self.out, networks, self.config, self.seed, choose_device(self.device)))


@dataclass(frozen=True)
class RunStudy:
    """Answer one of the questions of the paper: train what it compares, tables, figures, a page.

    `weightspace study --list` names the studies. Studies of one task and scale share zoos and representations in their
    folder; an interrupted study goes on where it was.
    """

    study: tyro.conf.Positional[str]
    """name of the study"""
    task: str = "digits"
    """image task (docs/tasks.md)"""
    scale: Literal["small", "paper", "smoke"] = "small"
    """small: within about an hour on two cores; paper: the published size, for a GPU; smoke: tiny, to try it out"""
    out: Path | None = None
    """folder of the studies of this task and scale (default: runs/studies/TASK-SCALE)"""
    seed: int = 0
    """seed of everything random"""
    foreign: str | None = None
    """task whose images are foreign queries (default: see `weightspace run --help`, study.foreign)"""
    others: tuple[str, ...] = ()
    """further tasks of multi-task zoos, transfer and fine-tuning (default: see study.others)"""
    seeds: int | None = None
    """seeds, from --seed on, at which it is run, for means and intervals over seeds (default: one; `seeds`: three)"""
    device: Device = "auto"
    cluster: Cluster = None

    def __call__(self) -> None:
        from weightspace.experiment import choose_device
        from weightspace.studies import run_study, shaped

        base = replace(SCALES[self.scale](shaped(self.task)), seed=self.seed)
        base = replace(base, study=replace(base.study, foreign=self.foreign, others=self.others))
        name = f"{self.task.replace('/', '-').replace(':', '-')}-{self.scale}"
        command = f"weightspace study {self.study} --task {self.task} --scale {self.scale} --seed {self.seed}"
        command += f" --foreign {self.foreign}" if self.foreign else ""
        command += f" --others {' '.join(self.others)}" if self.others else ""
        command += f" --seeds {self.seeds}" if self.seeds else ""
        folder = self.out or Path("runs") / "studies" / name
        page = run_study(self.study, base, folder, choose_device(self.device), command, self.cluster, self.seeds)
        print(f"page: {page}")


@dataclass(frozen=True)
class Report:
    """Draw the page, figures and tables of a run or a study again (a run's results.json too), or those of a zoo."""

    run: Folder
    """folder of the run, of one study, or of a zoo"""

    def __call__(self) -> None:
        from weightspace.report.page import make_report
        from weightspace.report.study import STUDY_FILE, make_study_report

        if (self.run / STUDY_FILE).exists():
            print(f"report: {make_study_report(self.run)}")
            return

        print(f"report: {make_report(self.run, self.run / 'report')}")


@dataclass(frozen=True)
class Push:
    """Share a zoo or a representation on the Hugging Face hub, with a card (extra `hub`)."""

    folder: Folder
    """folder of the zoo or of the representation"""
    repository: tyro.conf.Positional[str]
    """owner/name, made where it is missing with the token that `hf auth login` keeps; or a new folder: ./shared"""
    private: bool = False
    """make a new repository private"""

    def __call__(self) -> None:
        from weightspace.hyperrep.representation import HyperRepresentation
        from weightspace.zoo.model_zoo import ZOO_FILE, ModelZoo

        kind = ModelZoo.open if (self.folder / ZOO_FILE).is_file() else HyperRepresentation.load
        local = self.repository.startswith((".", "/"))
        where = Path(self.repository) if local else self.repository
        print(f"shared: {kind(self.folder).push_to_hub(where, self.private)}")


COMMANDS: dict[str, type[Any]] = {
    "run": Run,
    "zoo train": ZooTrain,
    "zoo import": ZooImport,
    "zoo export": ZooExport,
    "zoo align": ZooAlign,
    "zoo show": ZooShow,
    "zoo verify": ZooVerify,
    "pretrain": Pretrain,
    "embed": Embed,
    "probe": Probe,
    "reconstruct": Reconstruct,
    "generate": Generate,
    "finetune": Finetune,
    "push": Push,
    "study": RunStudy,
    "report": Report,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit code 0, 1 for a failed run, 2 for something the user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command(given)()
    except UserError as error:
        fail(str(error), 2)
    except RunFailed as error:
        fail(str(error), 1)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror or error}{where}; what was finished is kept: mend this and run the command again", 1)
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to continue", 130)


def fail(message: str, code: int) -> None:
    """Print one message to standard error and exit."""
    print(f"weightspace: {message}", file=sys.stderr)
    sys.exit(code)


def command(given: list[str]) -> Callable[[], None]:
    """The command that the arguments ask for, parsed; --help prints and exits.

    Raises:
        UserError: no such command or preset, or a malformed --set.
    """
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if given else 2)
    if given[0] == "--version":
        from importlib.metadata import version

        print(version("weightspace"))
        sys.exit(0)
    words = 2 if given[0] == "zoo" else 1
    name, rest = " ".join(given[:words]), given[words:]
    if name not in COMMANDS:
        if given[0] == "zoo" and (len(given) == 1 or given[1] in ("-h", "--help")):
            print(usage("zoo "))
            sys.exit(0 if len(given) > 1 else 2)
        raise UserError(f"unknown command {name!r}; the commands are {', '.join(COMMANDS)}")
    if name == "study" and "--list" in rest:
        return list_studies
    default: Any = None
    if name in ("run", "zoo train"):
        preset = rest.pop(0) if rest and not rest[0].startswith("-") else "digits"
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
        experiment = PRESETS[preset]()
        default = Run(experiment) if name == "run" else ZooTrain(tyro.MISSING, experiment.zoo)
    prog = f"weightspace {name}" + (" [PRESET]" if default is not None else "")
    return tyro.cli(COMMANDS[name], prog=prog, default=default, args=expand_sets(rest))


def list_studies() -> None:
    """Print every study with its question."""
    from weightspace.studies import STUDIES

    for name, study in STUDIES.items():
        print(f"{name:<12}{study.question}")


def expand_sets(arguments: list[str]) -> list[str]:
    """Rewrite ``--set field=value`` (also --set=field=value) as ``--field value``.

    Lists are separated by spaces or commas.

    Raises:
        UserError: --set without field=value.
    """
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--set" and not argument.startswith("--set="):
            expanded.append(argument)
            continue
        setting = next(rest, "") if argument == "--set" else argument.removeprefix("--set=")
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set takes FIELD=VALUE, such as --set pretrain.steps=200; given {setting!r}")
        expanded += [f"--{name}", *value.replace(",", " ").split()]
    return expanded


def usage(prefix: str = "") -> str:
    """The list of commands, each with the first line of its description."""
    named = {name: kind.__doc__ or "" for name, kind in COMMANDS.items() if name.startswith(prefix)}
    rows = [f"  {name:<14}{text.splitlines()[0]}" for name, text in named.items()]
    return "\n".join(
        [
            "usage: weightspace COMMAND ...",
            "",
            "Trained neural networks as data: model zoos, hyper-representations, and the behavioral loss.",
            "",
            *rows,
            "",
            f"Presets of `run`: {', '.join(PRESETS)}. `weightspace COMMAND --help` lists every option and field.",
        ]
    )


def show(records: list[dict[str, Any]], *stages: str) -> None:
    """Print records as one table per stage and split, a column per representation; intervals where there is room."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 250)
    wanted = [record for record in records if not stages or record["stage"] in stages]
    for stage, split in dict.fromkeys((record["stage"], record["split"]) for record in wanted):
        part = [record for record in wanted if (record["stage"], record["split"]) == (stage, split)]
        names = list(dict.fromkeys(record["representation"] for record in part))
        needed = 46 + 25 * len(names)
        roomy = not sys.stdout.isatty() or console.width >= needed
        table = Table(title=f"{stage} · {split}", title_justify="left")
        table.add_column("metric")
        for name in names:
            table.add_column(name, justify="right")
        cells = {(record["metric"], record["representation"]): record for record in part}
        for metric in dict.fromkeys(record["metric"] for record in part):
            table.add_row(metric, *(cell(cells.get((metric, name)), roomy) for name in names))
        console.print(table, width=needed if roomy else None)


def cell(record: dict[str, Any] | None, interval: bool) -> str:
    """A number, with its interval where there is one and it is asked for."""
    if record is None or record["mean"] is None:
        return ""
    if record["low"] is None or not interval:
        return f"{record['mean']:.3f}"
    return f"{record['mean']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"


if __name__ == "__main__":
    main()
