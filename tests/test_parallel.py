"""Several processes give the losses of one, whatever divides the weights; they go on in another number; none hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from weightspace.hyperrep.parallel import ALONE, LOST, Processes
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.runs import UserError, read_lines
from weightspace.zoo.model_zoo import ModelZoo

SMALL = [
    *("--pretrain.epochs", "1", "2", "--pretrain.batch-size", "6", "--pretrain.validate-every", "2"),
    *("--pretrain.steps", "6", "--autoencoder.width", "16", "--autoencoder.layers", "1", "--autoencoder.heads", "2"),
    *("--autoencoder.feedforward", "32", "--autoencoder.latent", "6", "--autoencoder.components", "2"),
    *("--loss.queries", "16", "--loss.distance", "kl", "--loss.variance-penalty", ".1", "--device", "cpu"),
]


def command(zoo: ModelZoo, out: Path, processes: int, *more: str) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "weightspace.cli"]
    asked = ["pretrain", str(zoo.folder), "--out", str(out), *SMALL, *more]
    return [sys.executable, *(start if processes > 1 else ["-m", "weightspace.cli"]), *asked]


def run(zoo: ModelZoo, out: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(zoo, out, processes, *more), capture_output=True, text=True, timeout=300)


def curve(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "metrics.jsonl")


def check_alike(one: Path, other: Path) -> None:
    """The same losses at the same steps and the same weights in the end, to float tolerance."""
    for ours, theirs in zip(curve(one), curve(other), strict=True):
        assert ours["step"] == theirs["step"]
        for part in ("train", "val"):
            assert ours[part] == pytest.approx(theirs[part], rel=2e-3, abs=2e-4), ours["step"]
    first, second = (HyperRepresentation.load(folder).state() for folder in (one, other))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-2, atol=1e-3, msg=name)


@pytest.fixture(scope="module")
def alone(tiny_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "rep"
    done = run(tiny_zoo, folder, 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(kind: str, tiny_zoo: ModelZoo, alone: Path, tmp_path: Path) -> None:
    done = run(tiny_zoo, tmp_path / "rep", 2, "--pretrain.parallel", kind)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pretrain: rep: done") == 1  # one of them tells it
    check_alike(alone, tmp_path / "rep")
    assert {path.name for path in alone.iterdir()} == {path.name for path in (tmp_path / "rep").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_training_goes_on_in_another_number(
    before: int, after: int, tiny_zoo: ModelZoo, tmp_path: Path
) -> None:
    more = ["--pretrain.steps", "60", "--pretrain.parallel", "fsdp"]
    out = tmp_path / "rep"
    started = subprocess.Popen(
        command(tiny_zoo, out, before, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while not (out / "state.json").exists() and started.poll() is None:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    for child in _children_of(out):
        os.kill(child, signal.SIGKILL)
    started.communicate()
    assert json.loads((out / "state.json").read_text())["step"] < 60
    done = run(tiny_zoo, out, after, *more)
    assert done.returncode == 0, done.stderr
    whole = run(tiny_zoo, tmp_path / "whole", 1, *more)
    assert whole.returncode == 0, whole.stderr
    check_alike(tmp_path / "whole", out)
    assert not list(out.glob("state*"))


def _children_of(out: Path) -> list[int]:
    """Processes that work on a folder (torchrun's workers have sessions of their own)."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if entry.name.isdigit() and str(out) in words and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_when_one_dies_the_others_end(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    out = tmp_path / "rep"
    more = ["--pretrain.steps", "2000"]
    started = subprocess.Popen(
        command(tiny_zoo, out, 2, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "state.json").exists() and started.poll() is None:
        time.sleep(0.02)
    workers = [child for child in _children_of(out) if child != started.pid]
    os.kill(max(workers), signal.SIGKILL)
    _, told = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "Signal 9 (SIGKILL)" in told  # torchrun says which one died; it ends the others
    shutil.rmtree(out)


def started_by_hand(zoo: ModelZoo, out: Path, *more: str) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, which would end one when the other fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            command(zoo, out, 1, *more),
            env={**os.environ, **place, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_one_tells_what_the_user_got_wrong(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    both = started_by_hand(tiny_zoo, tmp_path)
    first, other = (each.communicate(timeout=120)[1] for each in both)
    assert f"{tmp_path} is not empty and not a weightspace representation" in first
    assert other == "" and [each.returncode for each in both] == [2, 2]


@pytest.mark.slow
def test_the_others_say_that_one_died(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    both = started_by_hand(tiny_zoo, tmp_path / "rep", "--pretrain.steps", "2000")
    while not (tmp_path / "rep" / "state.json").exists() and both[0].poll() is None:
        time.sleep(0.02)
    both[1].kill()
    told = both[0].communicate(timeout=120)[1]
    assert both[0].returncode == 1
    assert "another process of this training died or does not answer" in told and "start the same command again" in told
    assert "Traceback" not in told
    both[1].communicate()


def test_batches_are_divided_evenly() -> None:
    shares = [Processes(rank, 3).share(12) for rank in range(3)]
    assert [list(range(12))[share] for share in shares] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert list(range(5))[ALONE.share(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"batch_size=32 cannot be divided among 3 processes"):
        Processes(0, 3).share(32)
    loss = torch.tensor(2.0, requires_grad=True)
    whole = Processes(0, 3).whole(loss * 5)
    whole.backward()
    assert float(whole.detach()) == 10 and float(loss.grad or 0) == 15


def test_lost_processes_are_recognized() -> None:
    assert LOST.search("Connection closed by peer [127.0.0.1]:1") and not LOST.search("shape mismatch")
