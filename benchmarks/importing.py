"""Importing a directory of checkpoints against reading its files and writing the same bytes, from the disk
and from memory; peak memory; a large zoo shown.

python benchmarks/importing.py [--checkpoints 10000] [--layout safetensors|pt] [--shown 100000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.zoo.model_zoo import ZooWriter

IMPORT = (
    "import resource, sys, time; from pathlib import Path\n"
    "from weightspace.config import ImportConfig; from weightspace.zoo.importing import import_zoo\n"
    "import torch; torch.set_num_threads(1); start = time.perf_counter()\n"
    "import_zoo(sys.argv[1], Path(sys.argv[2]), ImportConfig())\n"
    "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
)


def write_source(folder: Path, count: int, layout: str) -> None:
    """Random checkpoints of CNN3, a file each."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = Architecture("CNN3").shapes
    for number in range(count):
        state = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
        path = folder / f"net{number:05d}_epoch_{number % 5}.{layout}"
        save_file(state, path) if layout == "safetensors" else torch.save(state, path)


def evict(folder: Path) -> None:
    """Put every file on the disk and out of the memory in which the system keeps what was read lately."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path) -> float:
    """Seconds to read every file and write its bytes into one file that reaches the disk."""
    start = time.perf_counter()
    with open(target, "wb") as out:
        for path in sorted(source.iterdir()):
            out.write(path.read_bytes())
        out.flush()
        os.fsync(out.fileno())
    return time.perf_counter() - start


def imported(source: Path, target: Path) -> tuple[float, float]:
    """Seconds and peak memory (MiB) of an import in a process of its own, without its start."""
    done = subprocess.run([sys.executable, "-c", IMPORT, source, target], capture_output=True, text=True, check=True)
    seconds, memory = done.stdout.split()
    return float(seconds), float(memory)


def shown(folder: Path, count: int) -> float:
    """Seconds of `weightspace zoo show`, start included, on a zoo of many checkpoints of a small network."""
    architecture = Architecture("MLP", {"size": 2, "hidden": 2, "classes": 2})
    weights = {name: torch.randn(count, *shape) for name, shape in architecture.shapes.items()}
    member = torch.arange(count).numpy() // 10
    columns = {"member": member, "epoch": torch.arange(count).numpy() % 10, "split": "train", "task": "digits"}
    accuracy = torch.rand(count, 3).numpy()
    frame = pd.DataFrame(columns | {f"{name}_acc": accuracy[:, i] for i, name in enumerate(("train", "val", "test"))})
    writer = ZooWriter(folder, architecture, {})
    writer.write(0, Checkpoints(architecture, weights, frame))
    writer.finish([0])
    command = [sys.executable, "-m", "weightspace.cli", "zoo", "show", str(folder)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=10_000, help="checkpoints to import")
    parser.add_argument("--layout", choices=["safetensors", "pt"], default="safetensors", help="format of the files")
    parser.add_argument("--shown", type=int, default=100_000, help="checkpoints of the zoo that is shown")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median ratio is printed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "source", arguments.checkpoints, arguments.layout)
        write_source(folder / "few", max(arguments.checkpoints // 10, 1), arguments.layout)
        ratios, each = {}, 1e3 / arguments.checkpoints
        for place in ("memory", "disk"):
            rounds, memory = [], 0.0
            for _ in range(arguments.rounds):
                if place == "disk":
                    evict(folder / "source")
                plain = copied(folder / "source", folder / "copy")
                if place == "disk":
                    evict(folder / "source")
                ours, memory = imported(folder / "source", folder / "zoo")
                shutil.rmtree(folder / "zoo")
                rounds.append((plain, ours, plain / ours))
            plain, ours, ratios[place] = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"files in {place:<6} copied {plain * each:.3f}, imported {ours * each:.3f} ms per checkpoint")
        _, little = imported(folder / "few", folder / "zoo")
        print(f"peak memory {memory:.0f} MiB; for a tenth of the checkpoints {little:.0f} MiB")
        print(f"zoo show {shown(folder / 'large', arguments.shown):.2f} s for {arguments.shown:,} checkpoints")
        print(f"ratio importing_{arguments.layout}_in_memory {ratios['memory']:.2f}")
        print(f"ratio importing_{arguments.layout} {ratios['disk']:.2f}")


if __name__ == "__main__":
    main()
