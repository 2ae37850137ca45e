"""Damaged files for every reader (scripts/fuzz.py); the format over networks, types and tables that chance makes."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightspace.config import ImportConfig
from weightspace.networks.architectures import Architecture
from weightspace.networks.checkpoints import Checkpoints
from weightspace.zoo.importing import import_zoo
from weightspace.zoo.model_zoo import ModelZoo, ZooWriter, verify


def script() -> ModuleType:
    """scripts/fuzz.py as a module."""
    path = Path(__file__).parent.parent / "scripts" / "fuzz.py"
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = script()


@pytest.mark.parametrize("name", sorted(FUZZ.seeds()))
def test_readers_read_or_say_why_not(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target, known = FUZZ.seeds()[name]
    for number, content in enumerate(known):
        (tmp_path / str(number)).mkdir()
        if (name, number) in (("state", 3), ("small", 0)):  # no weights; not a network of the package
            continue
        target(tmp_path / str(number), content)  # the seeds themselves are read
    assert FUZZ.by_mutations(name, 60, seed=1) == 60 + len(known)


ARCHITECTURES = st.one_of(
    st.builds(
        lambda size, hidden, classes: Architecture("MLP", {"size": size, "hidden": hidden, "classes": classes}),
        st.integers(1, 5),
        st.integers(1, 7),
        st.integers(1, 5),
    ),
    st.builds(
        lambda channels, classes: Architecture("CNN8", {"channels": channels, "classes": classes}),
        st.integers(1, 3),
        st.integers(1, 12),
    ),
)
VALUES = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=25)
@given(ARCHITECTURES, st.integers(1, 5), st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=4), st.data())
def test_what_is_written_is_read(architecture: Architecture, count: int, order: list[int], data: st.DataObject) -> None:
    columns = {
        "member": np.arange(count) // 2,
        "epoch": np.arange(count) % 2,
        "split": "train",
        "task": "digits",
        "number": data.draw(st.lists(st.floats(allow_nan=False), min_size=count, max_size=count)),
        "word": data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=count, max_size=count)),
        "truth": data.draw(st.lists(st.booleans(), min_size=count, max_size=count)),
    }
    first = data.draw(VALUES)
    weights = {name: torch.randn(count, *shape) for name, shape in architecture.shapes.items()}
    next(iter(weights.values())).view(-1)[0] = first
    checkpoints = Checkpoints(architecture, weights, pd.DataFrame(columns))
    with tempfile.TemporaryDirectory() as folder:
        writer = ZooWriter(Path(folder), architecture, {})
        for shard in dict.fromkeys(order):
            writer.write(shard, checkpoints)
        zoo = writer.finish(list(dict.fromkeys(order)))
        assert verify(folder) == []
        found = ModelZoo.open(folder).read(zoo.frame.iloc[:count])
    for name, weight in weights.items():
        assert torch.equal(found.weights[name].view(torch.int32), weight.view(torch.int32))  # NaN too, bit for bit
    pd.testing.assert_frame_equal(found.frame, checkpoints.frame)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_are_imported(tmp_path: Path, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = Architecture("CNN8").shapes
    state = {name: torch.randn(*shape, generator=generator).to(kind) for name, shape in shapes.items()}
    (tmp_path / "source").mkdir()
    torch.save({**state, "steps": torch.tensor(3)}, tmp_path / "source" / "a.pt")
    (zoo,) = import_zoo(str(tmp_path / "source"), tmp_path / "zoo", ImportConfig())
    for name, weight in zoo.read(zoo.frame).weights.items():
        assert torch.equal(weight[0], state[name].to(torch.float32))
