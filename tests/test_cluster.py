"""Populations and studies on a local Ray cluster: what it makes is what is made here; lost workers; wrong addresses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightspace.runs import UserError, read_json
from weightspace.zoo import cluster as cluster_module
from weightspace.zoo.cluster import connected, over
from weightspace.zoo.model_zoo import ModelZoo

pytest.importorskip("ray", reason="needs the extra ray")

GRID = [
    *("--inits", "kaiming_uniform", "--seeds", "4", "--unseen-seeds", "1", "--learning-rates", "1e-3", "3e-3"),
    *("--weight-decays", "1e-4", "1e-3", "1e-2", "--val-share", ".25", "--test-share", ".25", "--group", "4"),
    *("--workers", "2", "--device", "cpu"),
]
SHORT = ["--epochs", "1", "--save-epochs", "0", "1"]
LONG = ["--epochs", "12", "--save-epochs", "0", "12"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "weightspace.cli", *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray cluster of two processors on this machine; its address."""
    with started({"RAY_AUTH_MODE": "disabled"}) as address:
        yield address


@contextmanager
def started(environment: dict[str, str]) -> Iterator[str]:
    """Start a cluster; yields its address."""
    address = f"127.0.0.1:{free_port()}"
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it: a short path
    where = ["--port", address.split(":")[1], "--temp-dir", place, "--num-cpus", "2"]
    slim = ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory", str(10**8)]
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *where, *slim]
    one = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=one) as head:
        assert head.stdout
        try:
            assert any("Ray runtime started" in line for line in head.stdout)
            yield address
        finally:
            head.terminate()
            head.wait(60)
    shutil.rmtree(place, ignore_errors=True)


def free_port() -> int:
    """A port at which nothing answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def contents(zoo: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(zoo.glob("*.safetensors"))} | {
        "table": ModelZoo.open(zoo).frame.to_json().encode()
    }


@pytest.mark.slow
def test_a_cluster_makes_the_same_zoo(cluster: str, tmp_path: Path) -> None:
    here = run("zoo", "train", "--out", str(tmp_path / "here"), *GRID, *SHORT)
    assert here.returncode == 0, here.stderr
    there = run("zoo", "train", "--out", str(tmp_path / "there"), "--cluster", cluster, *GRID, *SHORT)
    assert there.returncode == 0, there.stderr
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.slow
def test_the_members_of_a_lost_worker_are_trained_again(cluster: str, tmp_path: Path) -> None:
    here = run("zoo", "train", "--out", str(tmp_path / "here"), *GRID, *LONG)
    assert here.returncode == 0, here.stderr
    words = command("zoo", "train", "--out", str(tmp_path / "there"), "--cluster", cluster, *GRID, *LONG)
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (busy := workers()) and started.poll() is None:
        time.sleep(0.05)
    os.kill(busy[0], signal.SIGKILL)
    _, told = started.communicate(timeout=300)
    assert started.returncode == 0, told
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    frame = ModelZoo.open(tmp_path / "there").frame
    assert not frame.duplicated(["member", "epoch"]).any()


def workers() -> list[int]:
    """Processes of Ray that train members."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and title.startswith(b"ray::_work"):
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_study_trains_its_variants_on_the_cluster(cluster: str, tmp_path: Path) -> None:
    words = ["study", "cycle", "--scale", "smoke", "--device", "cpu"]
    done = run(*words, "--out", str(tmp_path), "--cluster", cluster)
    assert done.returncode == 0, done.stderr
    assert "variants on the cluster" in done.stderr and Path(done.stdout.removeprefix("page: ").strip()).exists()
    records = read_json(tmp_path / "cycle" / "records.json")
    trained = list((tmp_path / "representations").glob("*/model.safetensors"))
    assert trained and len(records) >= len(trained)


@pytest.mark.slow
def test_a_cluster_may_want_the_token_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    home = {"HOME": str(tmp_path)}
    code = "import sys; from weightspace.zoo.cluster import connected\nwith connected(sys.argv[1]) as cpus: print(cpus)"
    with started({**home, "RAY_AUTH_MODE": "token"}) as address:
        words = [sys.executable, "-c", code, address]
        done = subprocess.run(words, env={**os.environ, **home}, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.slow
def test_work_that_no_machine_can_take_is_told(
    cluster: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_module, "SILENCE", 0.2)
    with connected(cluster) as processors:
        assert processors == 2
        with pytest.raises(
            UserError, match=r"every job needs 1 CPU and 1 GPU of one machine, which none .*\(in all 2 CPU and 0 GPU\)"
        ):
            list(over(lambda job: job, [1], gpu=True))
        assert sorted(over(lambda job: time.sleep(1) or job, [1, 2, 3])) == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("the cluster: 3 jobs run or wait, free are") == told.count("of 2 CPU") == 1


def test_addresses_that_do_not_answer() -> None:
    with socket.socket() as other:  # something that is no cluster
        other.bind(("127.0.0.1", 0))
        other.listen()
        for address, message in (
            (f"127.0.0.1:{free_port()}", "no Ray cluster answers at 127.0.0.1"),
            (f"127.0.0.1:{other.getsockname()[1]}", "something else answers there"),
            ("cluster.invalid:6379", "no Ray cluster answers at cluster.invalid:6379"),
            ("somewhere", "is no address of a Ray cluster; give auto, local or HOST:PORT"),
        ):
            started = time.monotonic()
            with pytest.raises(UserError, match=message), connected(address):
                pass
            assert time.monotonic() - started < 15
