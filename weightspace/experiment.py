"""The main job: the stages in the order in which the data travels, each usable alone on folders on disk.

A stage claims its output folder for one config, skips when that is finished, and continues when it was interrupted.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from weightspace import runs
from weightspace.config import (
    AutoencoderConfig,
    Experiment,
    FinetuneConfig,
    GenerateConfig,
    LossConfig,
    PretrainConfig,
    ProbeConfig,
    ReconstructConfig,
    RefineConfig,
    ZooConfig,
    check,
)
from weightspace.downstream import finetune, generate, probe, reconstruct
from weightspace.downstream.baselines import ANCHORS, RESERVED
from weightspace.hyperrep.parallel import processes
from weightspace.hyperrep.pretrain import pretrain, training_checkpoints
from weightspace.hyperrep.refine import refined
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.report.page import make_report
from weightspace.runs import UserError, atomic, checksum, write_json
from weightspace.tasks.images import ImageTask, load_task
from weightspace.zoo.model_zoo import ModelZoo
from weightspace.zoo.population import train_population

Records = list[dict[str, Any]]


def run(config: Experiment, folder: Path, device: torch.device) -> Path:
    """Images -> zoo -> representations -> probes, reconstruction, generation, fine-tuning -> report.

    Stages that are finished are skipped, an interrupted one is continued. Returns the path of the page.

    Raises:
        UserError: a setting that cannot work, or a folder that holds something else.
        RunFailed: a stage that could not go on.
    """
    check_names(config.representations)
    check(config)
    missing = sorted(set(config.pretrain.epochs) - set(config.zoo.save_epochs))
    if missing:
        raise UserError(f"pretrain.epochs asks for {missing}, which zoo.save_epochs={config.zoo.save_epochs} lacks")
    with runs.stage(folder, "run", dataclasses.asdict(config)):
        write_json(folder / "config.json", dataclasses.asdict(config))
        if not (folder / "environment.json").exists():
            where = {"device": str(device), "threads": torch.get_num_threads()}
            write_json(folder / "environment.json", {**runs.environment(), **where})
        zoo = zoo_stage(folder / "zoo", config.zoo, config.seed, device)
        representations = {
            name: pretrain_stage(
                folder / "representations" / name, zoo, config.pretrain, loss, config.autoencoder, config.seed, device
            )
            for name, loss in config.representations.items()
        }
        probe_stage(folder / "probe", zoo, representations, config.probe)
        reconstruct_stage(folder / "reconstruct", zoo, representations, config.reconstruct, config.seed, device)
        generate_stage(folder / "generate", zoo, representations, config.generate, config.seed, device)
        names = [*generate.titles(config.representations, config.generate.samplers), ANCHORS]
        networks = {name: folder / "generate" / f"{name}.safetensors" for name in names}
        finetune_stage(folder / "finetune", networks, config.finetune, config.seed, device)
        return make_report(folder, folder / "report")


def zoo_stage(
    folder: Path,
    config: ZooConfig,
    seed: int,
    device: torch.device,
    quiet: bool = False,
    processors: int = 0,
) -> ModelZoo:
    """Train a population and write it as a zoo, here or on the processors of a connected Ray cluster.

    Quiet: it is not told when that was done before.
    """
    with runs.stage(folder, "zoo", {"zoo": dataclasses.asdict(config), "seed": seed}, quiet=quiet) as todo:
        if todo:
            train_population(config, folder, seed, device, processors)
    return ModelZoo.open(folder)


def pretrain_stage(
    folder: Path,
    zoo: ModelZoo | Sequence[ModelZoo],
    config: PretrainConfig,
    loss: LossConfig,
    autoencoder: AutoencoderConfig,
    seed: int,
    device: torch.device,
    start: HyperRepresentation | None = None,
    title: str = "",
) -> HyperRepresentation:
    """Train a representation on a zoo or several, from scratch or from another representation; write it as one folder.

    With a title, which progress bars show instead of the folder's name, it is not told when that was done before.
    """
    claim = {
        "zoo": zoo.fingerprint if isinstance(zoo, ModelZoo) else [each.fingerprint for each in zoo],
        "pretrain": dataclasses.asdict(config),
        "loss": dataclasses.asdict(loss),
        "autoencoder": dataclasses.asdict(autoencoder),
        "seed": seed,
        "start": start.fingerprint if start else None,
    }
    claimed = runs.stage(folder, "representation", claim, quiet=bool(title))
    with processes(device) as here, here.led(claimed) as todo:
        if todo:
            zoos = [zoo] if isinstance(zoo, ModelZoo) else zoo
            monitor = probe.monitor(zoos, config) if config.probes else None
            title = title or folder.name
            pretrain(zoo, folder, config, loss, autoencoder, seed, device, title, monitor, start, here)
    return HyperRepresentation.load(folder, device)


def on(zoo: ModelZoo, representations: Mapping[str, HyperRepresentation]) -> dict[str, HyperRepresentation]:
    """The representations for the zoo's base network.

    Raises:
        UserError: one was not trained on such checkpoints.
    """
    return {name: representation.on(zoo.architecture) for name, representation in representations.items()}


def _claim(
    zoo: ModelZoo, representations: Mapping[str, HyperRepresentation], config: Any, **more: Any
) -> dict[str, Any]:
    """What the output of a downstream stage depends on."""
    check(config)
    check_names(representations)
    fingerprints = {name: representation.fingerprint for name, representation in representations.items()}
    return {"zoo": zoo.fingerprint, "representations": fingerprints, "config": dataclasses.asdict(config), **more}


def _write(folder: Path, records: Records, tables: Mapping[str, pd.DataFrame]) -> None:
    for name, table in tables.items():
        with atomic(folder / f"{name}.parquet") as path:
            table.to_parquet(path, index=False)
    write_json(folder / "records.json", records)


def embed_stage(
    folder: Path,
    zoo: ModelZoo,
    representation: HyperRepresentation,
    split: str | None,
    config: RefineConfig,
    seed: int,
    device: torch.device,
) -> None:
    """Write embeddings.safetensors (as `packed`) and embeddings.parquet (the n rows they belong to)."""
    check(config, "refine")
    representation = representation.on(zoo.architecture)
    claim = {"zoo": zoo.fingerprint, "representation": representation.fingerprint, "split": split}
    with runs.stage(folder, "embed", claim | {"refine": dataclasses.asdict(config), "seed": seed}) as todo:
        if todo:
            checkpoints = zoo.select(split=split) if split else zoo.read(zoo.frame)
            refines = config.steps > 0  # else neither images nor training checkpoints are read
            training = training_checkpoints(zoo, representation.pretrain_config, "train") if refines else None
            tasks = load_tasks(zoo, device) if refines else {}
            with runs.progress("embed", len(checkpoints)) as advance:
                embeddings = refined(representation, checkpoints, tasks, config, seed, training, advance)
            runs.write_tensors(folder / "embeddings.safetensors", representation.packed(embeddings))
            with atomic(folder / "embeddings.parquet") as path:
                embeddings.frame.to_parquet(path, index=False)


def probe_stage(
    folder: Path,
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    config: ProbeConfig,
    others: Mapping[str, ModelZoo] | None = None,
) -> Records:
    """Predict properties from embeddings, weight statistics and raw weights, also of other zoos {name: zoo}."""
    representations = on(zoo, representations)
    others = others or {}
    fingerprints = {name: other.fingerprint for name, other in others.items()}
    with runs.stage(folder, "probe", _claim(zoo, representations, config, others=fingerprints)) as todo:
        if todo:
            records, predictions, plane = probe.probe(zoo, representations, config, others)
            _write(folder, records, {"predictions": predictions, "map": plane})
    return runs.read_json(folder / "records.json")


def reconstruct_stage(
    folder: Path,
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    config: ReconstructConfig,
    seed: int,
    device: torch.device,
) -> Records:
    """Reconstruct held-out checkpoints and score them."""
    representations = on(zoo, representations)
    with runs.stage(folder, "reconstruct", _claim(zoo, representations, config, seed=seed)) as todo:
        if todo:
            tasks = load_tasks(zoo, device)
            records, rows = reconstruct.reconstruct(zoo, representations, tasks, config, seed)
            _write(folder, records, {"checkpoints": rows})
    return runs.read_json(folder / "records.json")


def generate_stage(
    folder: Path,
    zoo: ModelZoo,
    representations: Mapping[str, HyperRepresentation],
    config: GenerateConfig,
    seed: int,
    device: torch.device,
) -> Records:
    """Generate networks with every representation and baseline, score them and write them."""
    representations = on(zoo, representations)
    with runs.stage(folder, "generate", _claim(zoo, representations, config, seed=seed)) as todo:
        if todo:
            made = generate.generate(zoo, representations, load_tasks(zoo, device), config, seed)
            for name, networks in made.networks.items():
                generate.save_networks(folder, name, networks, made.table)
            _write(folder, made.records, {"networks": made.table})
    return runs.read_json(folder / "records.json")


def finetune_stage(
    folder: Path, networks: Mapping[str, Path], config: FinetuneConfig, seed: int, device: torch.device
) -> Records:
    """Train generated networks on, each on its own task (or all on config.task), beside training from scratch.

    Args:
        folder: where the records go.
        networks: {name: file written by the generation}.
        config: how many, how long.
        seed: seed of the data order and of the fresh networks.
        device: where to train.
    """
    check(config)
    loaded = {name: generate.load_networks(path) for name, path in networks.items()}
    architectures = {str(checkpoints.architecture) for checkpoints in loaded.values()}
    if len(architectures) != 1:
        raise UserError(f"fine-tune networks of one base network at a time, given {', '.join(sorted(architectures))}")
    digests = {name: checksum(generate.networks_file(path, ".safetensors")) for name, path in networks.items()}
    claim = {"networks": digests, "config": dataclasses.asdict(config), "seed": seed}
    with runs.stage(folder, "finetune", claim) as todo:
        if todo:
            names = {name for checkpoints in loaded.values() for name in checkpoints.frame["task"]}
            tasks = {name: load_task(name).to(device) for name in ([config.task] if config.task else sorted(names))}
            records, curves = finetune.finetune(loaded, tasks, config, seed)
            _write(folder, records, {"curves": curves})
    return runs.read_json(folder / "records.json")


def load_tasks(zoo: ModelZoo, device: torch.device) -> dict[str, ImageTask]:
    """The tasks of a zoo by name, on a device."""
    return {name: load_task(name).to(device) for name in zoo.tasks}


def load_representations(folders: Sequence[Path], device: torch.device) -> dict[str, HyperRepresentation]:
    """Representations by the names of their folders.

    Raises:
        UserError: two folders of one name, or a folder that is not a representation.
    """
    if not folders:
        raise UserError("no representation given; name at least one folder written by `weightspace pretrain`")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"representations are told apart by their folder names, given {', '.join(names)}; rename one")
    check_names(names)
    return {name: HyperRepresentation.load(folder, device) for name, folder in zip(names, folders, strict=True)}


def check_names(names: Iterable[str]) -> None:
    """Raise a UserError unless there are representations and none is called like a baseline."""
    names = list(names)
    if not names:
        raise UserError("no representation given; name at least one")
    taken = [name for name in names if name in RESERVED]
    if taken:
        raise UserError(
            f"a representation cannot be called {taken[0]!r}: tables use that name for a baseline; rename it"
        )


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU where there is one.

    Raises:
        UserError: no such device on this machine.
    """
    # the same numbers at every run, and those of float32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # one each under torchrun
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); use --device auto or --device cpu") from None
    return device
