"""Damaged and hostile files for every reader: whatever they hold, a reader reads them or says why it does not.

python scripts/fuzz.py [TARGET ...] [--seconds 60]         coverage-guided (pip install atheris), each in a process
python scripts/fuzz.py [TARGET ...] --mutations 1000       plain mutations of valid files, without atheris

An input that ends in anything but the errors a reader may raise is a finding: it is written to fuzz-TARGET.bin.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save

from weightspace.networks import fitting
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.networks.fitting import Misfit
from weightspace.runs import UserError
from weightspace.zoo import model_zoo, untrusted
from weightspace.zoo.layouts import directory, hub, ray_tune, samples, small_cnn
from weightspace.zoo.layouts.found import Found
from weightspace.zoo.model_zoo import TABLE_FILE, ZOO_FILE, ModelZoo, ZooWriter, shard_name

ALLOWED = (untrusted.Unreadable, Misfit, UserError)
"""What a reader may raise."""
NETWORK = Architecture("MLP", {"size": 2, "hidden": 2, "classes": 2})
Target = Callable[[Path, bytes], None]


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a tiny network."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in NETWORK.shapes.items()}


def saved(content: object, zipped: bool = True) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def use(found: Found) -> None:
    """What an import does with a checkpoint that was found."""
    state = found.load()
    fitting.fit({name: tuple(tensor.shape) for name, tensor in state.items()}, found.network, found.arguments)


def state(folder: Path, content: bytes) -> None:
    """A file of torch.save."""
    (folder / "net_epoch_1.pt").write_bytes(content)
    for found in directory.read(folder):
        use(found)


def safetensors(folder: Path, content: bytes) -> None:
    """A file of safetensors."""
    (folder / "net.safetensors").write_bytes(content)
    for found in directory.read(folder):
        use(found)


def parts(content: bytes, count: int) -> list[bytes]:
    """An input cut into several files at the marker that the seeds have."""
    return [*content.split(b"\n%%\n", count - 1), *[b""] * count][:count]


def table(folder: Path, content: bytes) -> None:
    """A table of properties: its kind is the first byte."""
    ending = (".csv", ".jsonl", ".parquet", ".csv.gz")[(content[:1] or b"\0")[0] % 4]
    (folder / "net.safetensors").write_bytes(save(tensors()))
    (folder / f"properties{ending}").write_bytes(content[1:])
    for found in directory.read(folder):
        use(found)


def ray(folder: Path, content: bytes) -> None:
    """params.json and result.json of a trial."""
    trial = folder / "trial"
    (trial / "checkpoint_1").mkdir(parents=True)
    for name, part in zip(("params.json", "result.json"), parts(content, 2), strict=True):
        (trial / name).write_bytes(part)
    (trial / "checkpoint_1" / "checkpoints").write_bytes(saved(tensors()))
    for found in ray_tune.read(folder):
        use(found)


def sample(folder: Path, content: bytes) -> None:
    """A sample of tokens."""
    (folder / "dataset_torch.train").mkdir()
    (folder / "dataset_torch.train" / "sample_0.pt").write_bytes(content)
    for found in samples.reader(NETWORK)(folder):
        use(found)


def small(folder: Path, content: bytes) -> None:
    """Array, layout and metrics of a Small CNN Zoo."""
    for name, part in zip(("layout.csv", "metrics.csv", "weights.npy"), parts(content, 3), strict=True):
        (folder / name).write_bytes(part)
    for found in small_cnn.read(folder):
        use(found)


def snapshot(folder: Path, content: bytes) -> None:
    """Config, card and index of a repository."""
    for name, part in zip(("config.json", "README.md", hub.INDICES[0]), parts(content, 3), strict=True):
        (folder / name).write_bytes(part)
    (folder / "model-1.safetensors").write_bytes(save(tensors()))
    for found in hub.read(folder):
        use(found)


def archive(folder: Path, content: bytes) -> None:
    """A zip or tar archive; nothing may be written outside of its folder."""
    (folder / "a").write_bytes(content)
    (folder / "in").mkdir()
    try:
        untrusted.unpack(folder / "a", folder / "in", 2**20)
    finally:
        assert sorted(path.name for path in folder.iterdir()) == ["a", "in"], "a file left the archive's folder"


def zoo(folder: Path, content: bytes) -> None:
    """Description, table and shard of our own format."""
    described, rows, shard = parts(content, 3)
    for name, part in ((ZOO_FILE, described), (TABLE_FILE, rows), (shard_name(0), shard)):
        (folder / name).write_bytes(part)
    model_zoo.verify(folder)
    opened = ModelZoo.open(folder)
    opened.read(opened.frame)


def seeds() -> dict[str, tuple[Target, list[bytes]]]:
    """Every target with valid inputs from which mutations start."""
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]] * 2 + [[1.0, 2.0, 3.0, 0.0, 0.0]] * 4)
    tokens = {"w": w, "m": (w != 0), "p": torch.zeros(6, 3), "props": {"test_acc": 0.5, "epoch": 3}}
    packed, bundle = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("zoo/net.pt", b"weights" * 9)
    with tarfile.open(fileobj=bundle, mode="w") as out:
        item = tarfile.TarInfo("zoo/net.pt")
        item.size = 7
        out.addfile(item, io.BytesIO(b"weights"))
    array, parquet = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(12, dtype=np.float32).reshape(2, 6))
    frame = pd.DataFrame({"file": ["net"], "epoch": [3], "test_acc": [0.5], "word": ["x"]})
    frame.to_parquet(parquet)
    lines = frame.to_json(orient="records", lines=True).encode()
    layout = b'varname,start_idx,end_idx,shape\nd/bias:0,0,2,"(2,)"\nd/kernel:0,2,6,"(2, 2)"\n'
    metrics = b"config.activation,modeldir,step,test_accuracy\nrelu,a,86,0.5\ntanh,b,86,0.25\n"
    params = json.dumps({"model::type": "MLP", "model::nlin": "relu", "optim::lr": 0.1, "seed": 1}).encode()
    config = json.dumps({"activation": "relu", "hidden_size": 2}).encode()
    card = b"---\nmodel-index:\n- results:\n  - metrics:\n    - {type: accuracy, value: 0.5}\n---\ntext\n"
    index = json.dumps({"weight_map": dict.fromkeys(NETWORK.shapes, "model-1.safetensors")}).encode()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {key: value[None] for key, value in tensors().items()}
        rows = pd.DataFrame({"member": [0], "epoch": [1], "split": ["train"], "task": ["unknown"]})
        writer = ZooWriter(folder, NETWORK, {})
        writer.write(0, Checkpoints(NETWORK, weights, rows))
        writer.finish([0])
        whole = b"\n%%\n".join((folder / part).read_bytes() for part in (ZOO_FILE, TABLE_FILE, shard_name(0)))
    wrapped = {"model_state_dict": {f"module.{key}": value for key, value in tensors().items()}, "epoch": 3}
    return {
        "state": (state, [saved(tensors()), saved(wrapped), saved(tensors(), False), pickle.dumps({"a": [1, "b"]})]),
        "safetensors": (safetensors, [save(tensors())]),
        "table": (table, [b"\0file,epoch\nnet,3\n", b"\1" + lines, b"\2" + parquet.getvalue()]),
        "ray": (ray, [params + b'\n%%\n{"test_acc": 0.5, "training_iteration": 1}\n']),
        "sample": (sample, [saved(tokens), saved(tokens, False)]),
        "small": (small, [b"\n%%\n".join((layout, metrics, array.getvalue()))]),
        "snapshot": (snapshot, [b"\n%%\n".join((config, card, index))]),
        "archive": (archive, [packed.getvalue(), bundle.getvalue()]),
        "zoo": (zoo, [whole]),
    }


def once(target: Target, content: bytes) -> None:
    """One input, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(*ALLOWED):
        target(Path(folder), content)


WORDS = (b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'"', b"../", b"\xff\xff\xff\xff", b"\0" * 8)
"""What mutations put in."""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or put in."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 40)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            changed[at:at] = changed[at : at + rng.randint(1, 60)]
        else:
            word = rng.choice(WORDS)
            changed[at : at + len(word)] = word
    return bytes(changed)


def by_mutations(name: str, count: int, seed: int = 0) -> int:
    """Try mutations of the seeds of a target; the number of inputs tried.

    Raises:
        Exception: of the reader; the input is in fuzz-NAME.bin.
    """
    target, known = seeds()[name]
    rng = random.Random(f"{name} {seed}")
    for number in range(count + len(known)):
        content = known[number] if number < len(known) else mutated(rng.choice(known), rng)
        try:
            once(target, content)
        except Exception:
            Path(f"fuzz-{name}.bin").write_bytes(content)
            raise
    return count + len(known)


def by_coverage(name: str, seconds: int) -> None:
    """Let atheris look for inputs that reach new code of a reader; it ends the process."""
    import atheris

    target, known = seeds()[name]
    for module in (untrusted, directory, hub, ray_tune, samples, small_cnn, fitting, model_zoo):
        for key, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                setattr(module, key, atheris.instrument_func(value))
    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(known):
        (corpus / str(number)).write_bytes(content)
    try:
        limits = [f"-max_total_time={seconds}", "-max_len=20000", f"-exact_artifact_path=fuzz-{name}.bin"]
        atheris.Setup([sys.argv[0], str(corpus), *limits], lambda content: once(target, content))
        atheris.Fuzz()
    finally:
        shutil.rmtree(corpus, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"which of {', '.join(seeds())} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="time for each target")
    parser.add_argument("--mutations", type=int, help="plain mutations for each target, instead of atheris")
    arguments = parser.parse_args()
    for name in arguments.targets or seeds():
        start = time.perf_counter()
        if arguments.mutations is not None:
            tried = by_mutations(name, arguments.mutations)
            print(f"{name:<12}{tried:,} inputs in {time.perf_counter() - start:.0f} s, nothing found", flush=True)
        elif len(arguments.targets) == 1:
            by_coverage(name, arguments.seconds)
        else:
            command = [sys.executable, __file__, name, "--seconds", str(arguments.seconds)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            told = [line for line in done.stderr.splitlines() if line.startswith(("Done", " ===")) or "cov:" in line]
            print(f"{name:<12}exit code {done.returncode}: {'; '.join(told[-2:]) or done.stderr[-300:]}", flush=True)


if __name__ == "__main__":
    main()
