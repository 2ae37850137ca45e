"""The house: imports run downward only, and the two bottom files stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightspace

PACKAGE = "weightspace"
SOURCE = Path(weightspace.__file__).parent
LEVELS = (
    ("runs",),
    ("config", "hub"),
    ("networks", "tasks"),
    ("zoo", "report"),
    ("tokens",),
    ("hyperrep",),
    ("downstream",),
    ("experiment",),
    ("studies",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
ONLY = {"report": {"runs", "config"}}
"""Rooms that may import less than everything below them."""


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of the package that a module imports, at any depth of its code.

    `module` is the dotted name of the module itself ("weightspace.zoo.model_zoo"), against which relative imports are
    resolved. For ``from a import b`` both a.b and, where that is no room, a are meant: a.b says which.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield node.lineno, name


def violations(source: str, module: str) -> list[str]:
    """The arrows of one module that do not run down, one sentence each."""
    room = module.split(".")[1]
    if room not in LEVEL:
        return [f"{module}: the room {room!r} has no place in the order"]
    found = []
    for line, name in imported(source, module):
        target = [*name.split("."), ""][1]
        if target == room:
            continue
        if target not in LEVEL:
            found.append(f"{module}:{line} imports {name}, which is no room")
        elif LEVEL[target] >= LEVEL[room] or (room in ONLY and target not in ONLY[room]):
            found.append(f"{module}:{line} imports {name}: the arrow runs up")
    return found


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module of the package but its own __init__."""
    files = {path.relative_to(SOURCE.parent): path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"}
    return {".".join(name.with_suffix("").parts): path for name, path in sorted(files.items())}


def test_imports_run_downward() -> None:
    found = modules()
    assert len(found) > 15  # the walk sees the package
    assert {"weightspace.runs", "weightspace.zoo.model_zoo"} <= found.keys()
    problems = [p for name, path in found.items() for p in violations(path.read_text(encoding="utf-8"), name)]
    assert problems == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("weightspace.runs", "from weightspace.config import ZooConfig"),
        ("weightspace.config", "import weightspace.cli"),
        ("weightspace.networks.behavior", "from weightspace.tasks.images import ImageTask"),
        ("weightspace.tasks.images", "from weightspace.networks import behavior"),
        ("weightspace.networks.behavior", "from weightspace.zoo import population"),
        ("weightspace.report.tables", "from weightspace.networks.behavior import Outputs"),
        ("weightspace.report.tables", "import weightspace.zoo.model_zoo as model_zoo"),
        ("weightspace.zoo.population", "def late():\n    from weightspace.tokens.views import noisy"),
        ("weightspace.zoo.population", "from weightspace import hyperrep"),
        ("weightspace.zoo.population", "from ..hyperrep import losses"),
        ("weightspace.zoo.population", "from .. import cli"),
        ("weightspace.zoo.population", "import weightspace"),
        ("weightspace.tokens.views", "from weightspace import ModelZoo"),
        ("weightspace.downstream.probe", "if TYPE_CHECKING:\n    from weightspace.experiment import Experiment"),
        ("weightspace.experiment", "from weightspace.studies import ablation"),
        ("weightspace.utils", "import torch"),
    ],
)
def test_an_arrow_that_runs_up_is_noticed(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("weightspace.zoo.population", "from weightspace.zoo.model_zoo import ModelZoo\nimport weightspace.runs"),
        ("weightspace.zoo.population", "from .model_zoo import ModelZoo\nfrom ..networks import behavior"),
        ("weightspace.tokens.views", "from weightspace import runs\nimport torch, weightspacer"),
        ("weightspace.cli", "def main():\n    from weightspace.studies import ablation"),
        (
            "weightspace.report.tables",
            "from weightspace.runs import read_json\nfrom weightspace.config import ZooConfig",
        ),
    ],
)
def test_an_arrow_that_runs_down_is_allowed(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_config_and_runs_do_not_import_torch() -> None:
    code = "import sys, weightspace.config, weightspace.runs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
