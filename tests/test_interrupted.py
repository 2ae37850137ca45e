"""Whatever moment a process dies at, the same command ends in the same bytes.

A death is raised where a file is about to be put in its place, or was just put there: between two of these moments
nothing on disk changes but partial files, which are litter.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.process
import os
import random
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_ZOO

from weightspace import studies
from weightspace.cli import main
from weightspace.config import (
    SCALES,
    AutoencoderConfig,
    Experiment,
    GenerateConfig,
    LossConfig,
    PretrainConfig,
    ZooConfig,
)
from weightspace.experiment import pretrain_stage, zoo_stage
from weightspace.studies import run_study
from weightspace.zoo import population
from weightspace.zoo.exporting import export_zoo
from weightspace.zoo.model_zoo import ModelZoo

CPU = torch.device("cpu")
CHANCE = {".lock", "environment.json"}
"""Files that say when or where, not what."""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the pages, whose figures are drawn again at every start."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in found.items() if path.name not in CHANCE and "report/" not in name
    }


def tiny_study() -> Experiment:
    """A study's experiment that takes seconds."""
    base: Experiment = SCALES["smoke"]("digits")
    return dataclasses.replace(
        base,
        zoo=dataclasses.replace(base.zoo, epochs=1, save_epochs=(0, 1), workers=1, group=8),
        pretrain=dataclasses.replace(base.pretrain, steps=2, epochs=(1,), validate_every=1, batch_size=4),
        generate=GenerateConfig(anchors=3, networks=3, bandwidths=(0.1,)),
    )


def dying(monkeypatch: pytest.MonkeyPatch, share: float, work: Callable[[], Any], seed: int = 0) -> int:
    """Do some work that dies at a share of its writes, as often as it takes; how often it died."""
    replace, chance = os.replace, random.Random(seed)

    def dies(*paths: Any, **names: Any) -> None:
        moment = chance.random()
        if moment < share / 2:
            raise KeyboardInterrupt
        replace(*paths, **names)
        if moment < share:
            raise KeyboardInterrupt

    deaths = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        while True:
            try:
                work()
                return deaths
            except KeyboardInterrupt:
                deaths += 1


def make_zoo(folder: Path, zoo: Path) -> None:
    """A population of four shards."""
    population.UNIT = 5  # of a process of its own
    zoo_stage(folder, TINY_ZOO, 0, CPU)


def make_representation(folder: Path, zoo: Path) -> None:
    """A representation that is validated and saved at every other step."""
    config = PretrainConfig(epochs=(1, 2), steps=20, batch_size=4, validate_every=2, probes=("test_acc",))
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=16, latent=8, components=2)
    pretrain_stage(folder, ModelZoo.open(zoo), config, LossConfig(queries=8), size, 0, CPU)


def make_study(folder: Path, zoo: Path) -> None:
    """A study without its page, whose figures are drawn again at every start."""
    studies.make_study_report = lambda folder: folder  # of a process of its own
    run_study("cycle", tiny_study(), folder, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("work", [make_zoo, make_representation, make_study])
def test_sigkill_at_random_moments(work: Callable[[Path, Path], None], tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # what takes seconds is imported once

    def started(name: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(tmp_path / name, tiny_zoo.folder))
        process.start()
        return process

    def stamps() -> dict[Path, int]:
        files = list((tmp_path / "parts").rglob("*"))
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    whole = started("whole")
    whole.join()
    assert whole.exitcode == 0
    chance, deaths = random.Random(0), 0
    for _ in range(4):
        process, before, left = started("parts"), {}, chance.randint(3, 9)
        while process.is_alive() and left:  # until so much was written
            with suppress(OSError):  # a file that is gone
                now = stamps()
                left, before = left - (now != before), now
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        deaths += process.is_alive()
        process.kill()
        process.join()
    last = started("parts")
    last.join()
    assert last.exitcode == 0 and deaths > 1
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_population(tiny_config: ZooConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(population, "UNIT", 5)
    zoo_stage(tmp_path / "whole", tiny_config, 0, CPU)
    deaths = dying(monkeypatch, 0.4, lambda: zoo_stage(tmp_path / "parts", tiny_config, 0, CPU), seed)
    assert deaths > 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_representation(tiny_zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    config = PretrainConfig(epochs=(1, 2), steps=6, batch_size=4, validate_every=2, probes=("test_acc",))
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=16, latent=8, components=2)

    def work(folder: Path) -> None:
        pretrain_stage(folder, tiny_zoo, config, LossConfig(queries=8), size, 0, CPU)

    work(tmp_path / "whole")
    deaths = dying(monkeypatch, 0.3, lambda: work(tmp_path / "parts"), seed)
    assert deaths > 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_full_disk(tiny_zoo: ModelZoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files may not grow beyond a limit, which the operating system enforces at any byte of any file."""
    export_zoo(tiny_zoo, tmp_path / "files", "directory")
    tiny = "--pretrain.epochs 1 2 --pretrain.steps 4 --pretrain.batch_size 4 --autoencoder.components 2"
    commands = [
        ["zoo", "import", str(tmp_path / "files")],
        ["zoo", "export", str(tiny_zoo.folder), "--layout", "ray-tune"],
        ["pretrain", str(tiny_zoo.folder), *tiny.split()],
    ]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for i, command in enumerate(commands):
        main([*command, "--out", str(tmp_path / f"whole{i}")])
        parts, failures = tmp_path / f"parts{i}", 0
        for power in range(5, 32, 3):
            capsys.readouterr()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**power, hard))
            try:
                main([*command, "--out", str(parts)])
                break
            except SystemExit as error:
                assert error.code == 1
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            failures += 1
            message = capsys.readouterr().err
            wrong = rf"File too large \({parts}/|{parts}/state-\d+ cannot be written \("  # by torch
            assert re.search(rf"({wrong}).*what was finished is kept", message), message
        assert failures > 1
        assert contents(parts) == contents(tmp_path / f"whole{i}")


@pytest.mark.slow
def test_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightspace.studies.make_study_report", lambda folder: folder)  # tested where it is made
    run_study("queries", tiny_study(), tmp_path / "whole", CPU)
    deaths = dying(monkeypatch, 0.1, lambda: run_study("queries", tiny_study(), tmp_path / "parts", CPU))
    assert deaths > 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
