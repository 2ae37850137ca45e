"""Every benchmark runs, in its smallest size, and ends with a ratio; the numbers are not judged here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALLEST = {
    "alignment.py": ["--checkpoints", "8", "--rounds", "1"],
    "importing.py": ["--checkpoints", "20", "--shown", "20", "--rounds", "1"],
    "population.py": ["--members", "16", "--steps", "2", "--rounds", "1", "--device", "cpu"],
    "scoring.py": ["--checkpoints", "8", "--images", "16", "--rounds", "1", "--device", "cpu"],
    "pretrain_scale.py": ["--checkpoints", "200", "--steps", "1", "--rounds", "1"],
    "pretrain_step.py": ["--small", "--rounds", "1"],
}


def test_all_benchmarks_are_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == SMALLEST.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALLEST))
def test_benchmark_prints_its_ratio(name: str) -> None:
    command = [sys.executable, str(FOLDER / name), *SMALLEST[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ratio \S+ [0-9.]+", done.stdout.splitlines()[-1])
