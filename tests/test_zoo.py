"""ModelZoo on disk: select, read, and name what is wrong with a damaged one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, checksum
from weightspace.zoo import model_zoo
from weightspace.zoo.model_zoo import (
    PLACE_COLUMNS,
    ModelZoo,
    ZooWriter,
    check_numeric,
    overview,
    summary,
    usable,
    verify,
)

SHARDS = ("weights-00000.safetensors", "weights-00001.safetensors")


def write_zoo(folder: Path, checkpoints: Checkpoints, provenance: dict[str, object]) -> ModelZoo:
    """Checkpoints in memory as a zoo of one shard."""
    writer = ZooWriter(folder, checkpoints.architecture, provenance)
    writer.write(0, checkpoints)
    return writer.finish([0])


def by_hand(zoo: ModelZoo, row: pd.Series) -> dict[str, Tensor]:
    """The weights of one row, read with safetensors alone."""
    stacked = load_file(zoo.folder / f"weights-{row['shard']:05d}.safetensors")
    return {name: weight[row["row"]] for name, weight in stacked.items()}


# selecting


def test_open_and_len(tiny_zoo: ModelZoo) -> None:
    zoo = ModelZoo.open(str(tiny_zoo.folder))
    assert len(zoo) == 18 * 3
    assert zoo.architecture.name == "CNN8" and zoo.tasks == ("digits",)
    assert zoo.fingerprint == tiny_zoo.fingerprint
    assert set(zoo.frame["shard"]) == {0, 1}


@pytest.mark.parametrize(
    ("query", "conditions", "keep"),
    [
        (None, {}, lambda f: f["member"] >= 0),
        (None, {"split": "test"}, lambda f: f["split"] == "test"),
        (None, {"epoch": [0, 2]}, lambda f: f["epoch"] != 1),
        (None, {"epoch": (2,), "split": {"val", "test"}}, lambda f: f.eval("epoch == 2 and split in ['val', 'test']")),
        (None, {"min_epoch": 1}, lambda f: f["epoch"] >= 1),
        (None, {"max_epoch": 1}, lambda f: f["epoch"] <= 1),
        (None, {"min_learning_rate": 3e-3, "max_weight_decay": 1e-3},
         lambda f: f.eval("learning_rate == 0.003 and weight_decay < 0.005")),
        ("val_acc > 0.2 and epoch == 2", {}, lambda f: (f["val_acc"] > 0.2) & (f["epoch"] == 2)),
        ("member < 4", {"epoch": 1}, lambda f: (f["member"] < 4) & (f["epoch"] == 1)),
    ],
)  # fmt: skip
def test_select_reads_what_fulfils_every_condition(
    tiny_zoo: ModelZoo, query: str | None, conditions: dict[str, Any], keep: Callable[[pd.DataFrame], pd.Series]
) -> None:
    expected = tiny_zoo.frame[keep(tiny_zoo.frame)]
    assert len(expected) > 0
    found = tiny_zoo.select(query, **conditions)
    assert len(found) == len(expected)
    assert not set(PLACE_COLUMNS) & set(found.frame)
    pd.testing.assert_frame_equal(found.frame, expected.drop(columns=PLACE_COLUMNS).reset_index(drop=True))
    for row in (0, len(expected) // 2, len(expected) - 1):
        for name, weight in by_hand(tiny_zoo, expected.iloc[row]).items():
            assert torch.equal(found.weights[name][row], weight)


def test_few_rows_give_the_right_weights(tiny_zoo: ModelZoo) -> None:
    for _, row in tiny_zoo.frame.iloc[[0, 26, 27, 53]].iterrows():
        found = tiny_zoo.select(member=row["member"], epoch=row["epoch"])
        assert len(found) == 1
        for name, weight in by_hand(tiny_zoo, row).items():
            assert torch.equal(found.weights[name][0], weight)


def test_what_was_read_is_independent_of_the_files(tiny_zoo: ModelZoo) -> None:
    before = tiny_zoo.select(member=0).flat()
    found = tiny_zoo.select(member=0)
    for weight in found.weights.values():
        weight.zero_()
    assert torch.equal(tiny_zoo.select(member=0).flat(), before)
    assert verify(tiny_zoo.folder) == []


def test_read_keeps_the_order_of_the_rows(tiny_zoo: ModelZoo) -> None:
    order = [40, 3, 29, 3, 53, 0]  # across shards, one of them twice
    chosen = tiny_zoo.frame.iloc[order]
    found = tiny_zoo.read(chosen)
    assert found.frame["member"].tolist() == chosen["member"].tolist()
    assert found.frame.index.tolist() == list(range(6))
    for position, (_, row) in enumerate(chosen.iterrows()):
        for name, weight in by_hand(tiny_zoo, row).items():
            assert torch.equal(found.weights[name][position], weight)


@pytest.mark.parametrize(
    ("query", "conditions", "message"),
    [
        (None, {"spilt": "test"}, r"the zoo has no column 'spilt'; its columns are member, epoch, .*split"),
        (None, {"min_acc": 0.5}, r"the zoo has no column 'acc'"),
        (None, {"split": "tset"}, r"no checkpoint of .* fulfils split='tset'; its splits: .*test \d+"),
        ("epoch > 99", {"split": "val"}, r"fulfils epoch > 99 and split='val'"),
        ("val_acc >", {}, r"invalid query 'val_acc >'"),
        ("accuracy > 0.5", {}, r"invalid query 'accuracy > 0.5': .*; columns: member, epoch"),
    ],
)
def test_a_selection_that_cannot_be_made_is_explained(
    tiny_zoo: ModelZoo, query: str | None, conditions: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_zoo.select(query, **conditions)


@pytest.mark.parametrize("query", ["epoch", "1"])
def test_a_query_that_is_no_condition_is_refused(tiny_zoo: ModelZoo, query: str) -> None:
    with pytest.raises(UserError):
        tiny_zoo.select(query)


@pytest.mark.parametrize("values", [range(1, 3), np.array([1, 2]), pd.Series([1, 2])])
def test_any_sequence_may_hold_the_values(tiny_zoo: ModelZoo, values: Any) -> None:
    assert len(tiny_zoo.select(epoch=values)) == 36


# writing


def test_write_and_read_are_inverse(population: Checkpoints, tmp_path: Path) -> None:
    zoo = write_zoo(tmp_path / "zoo", population, {"source": "here"})
    found = ModelZoo.open(tmp_path / "zoo").select()
    assert torch.equal(found.flat(), population.flat())
    pd.testing.assert_frame_equal(found.frame, population.frame)
    assert found.architecture == population.architecture
    assert verify(zoo.folder) == []
    assert {path.name for path in zoo.folder.iterdir()} == {"zoo.json", "checkpoints.parquet", SHARDS[0]}
    assert zoo.description["provenance"]["source"] == "here"


def test_fingerprint_follows_the_content(population: Checkpoints, tmp_path: Path) -> None:
    zoos = [write_zoo(tmp_path / name, population, {}) for name in ("a", "b")]
    assert zoos[0].fingerprint == zoos[1].fingerprint
    population.weights["fc2.bias"][7, 9] += 1e-3
    assert write_zoo(tmp_path / "c", population, {}).fingerprint != zoos[0].fingerprint


# damage


@pytest.fixture
def copy(tiny_zoo: ModelZoo, tmp_path: Path) -> Path:
    """A copy of the tiny zoo that may be damaged."""
    return Path(shutil.copytree(tiny_zoo.folder, tmp_path / "zoo"))


def describe(folder: Path, **changes: Any) -> None:
    """Change entries of zoo.json."""
    description = json.loads((folder / "zoo.json").read_text())
    (folder / "zoo.json").write_text(json.dumps({**description, **changes}))


def files_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zoo.json").read_text())["files"]


def assert_named(folder: Path, problem: str) -> None:
    """`verify` lists exactly this problem, and `open` already refuses the zoo because of it."""
    assert verify(folder) == [problem]
    with pytest.raises(UserError) as caught:
        ModelZoo.open(folder)
    assert problem in str(caught.value) and str(folder) in str(caught.value)


def test_an_intact_zoo_has_no_problems(copy: Path) -> None:
    assert verify(copy) == []
    assert verify(copy) == []


@pytest.mark.parametrize("name", [*SHARDS, "checkpoints.parquet"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert_named(copy, f"{name} is missing")


@pytest.mark.parametrize("name", [*SHARDS, "checkpoints.parquet"])
def test_a_truncated_file_is_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-100])
    assert_named(copy, f"{name} has {len(content) - 100} bytes, {len(content)} were written")


@pytest.mark.parametrize("name", [*SHARDS, "checkpoints.parquet"])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_named(copy: Path, name: str, position: float) -> None:
    content = bytearray((copy / name).read_bytes())
    content[round(position * (len(content) - 1))] ^= 1
    (copy / name).write_bytes(content)
    assert verify(copy) == [f"{name} has changed since it was written (its checksum differs)"]


def test_a_flipped_bit_is_told_where_it_is_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(model_zoo, "checksum", lambda path: looked.append(path.name) or checksum(path))
    zoo = ModelZoo.open(copy)
    for _ in range(2):
        zoo.select()
    assert looked == list(SHARDS)  # once
    content = bytearray((copy / SHARDS[1]).read_bytes())
    content[-1] ^= 1
    (copy / SHARDS[1]).write_bytes(content)
    zoo.select("shard == 0")  # an intact one
    with pytest.raises(UserError, match=r"weights-00001.safetensors has changed since .* --repair. keeps every"):
        zoo.select("shard == 1")


def test_all_problems_are_listed(copy: Path) -> None:
    (copy / SHARDS[0]).unlink()
    content = bytearray((copy / SHARDS[1]).read_bytes())
    content[-1] ^= 1
    (copy / SHARDS[1]).write_bytes(content)
    assert [problem.split()[0] for problem in verify(copy)] == list(SHARDS)


def test_a_shard_that_is_no_safetensors_is_a_user_error(copy: Path) -> None:
    zoo = ModelZoo.open(copy)
    (copy / SHARDS[0]).write_bytes(b"\0" * (copy / SHARDS[0]).stat().st_size)
    with pytest.raises(UserError, match=r"weights-00000\.safetensors cannot be read"):
        zoo.select(member=0)


def test_a_shard_of_another_network_is_a_user_error(copy: Path) -> None:
    zoo = ModelZoo.open(copy)
    tensors = load_file(copy / SHARDS[0])
    save_file({**tensors, "fc2.bias": torch.zeros(27, 11)}, copy / SHARDS[0])
    with pytest.raises(UserError, match=r"fc2\.bias has shape \(27, 11\), expected \(n, 10\)"):
        zoo.select(member=0)
    save_file({"other": torch.zeros(27)}, copy / SHARDS[0])
    with pytest.raises(UserError, match=r"holds \['other'\], expected \['conv1\.bias'"):
        zoo.select(member=0)


def test_a_table_that_does_not_fit_its_shards_is_named(copy: Path) -> None:
    frame = pd.read_parquet(copy / "checkpoints.parquet")
    frame.iloc[:-1].to_parquet(copy / "checkpoints.parquet", index=False)
    path = copy / "checkpoints.parquet"
    entry = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    describe(copy, files={**files_of(copy), path.name: entry})
    (problem,) = verify(copy)
    assert SHARDS[1] in problem and "27" in problem and "26" in problem


def test_a_table_without_its_columns_is_named(copy: Path) -> None:
    path = copy / "checkpoints.parquet"
    pd.read_parquet(path).drop(columns=["split", "row"]).to_parquet(path, index=False)
    entry = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    describe(copy, files={**files_of(copy), path.name: entry})
    with pytest.raises(UserError, match=r"checkpoints\.parquet lacks split, row"):
        ModelZoo.open(copy)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_named(copy: Path, version: object) -> None:
    describe(copy, schema_version=version)
    assert_named(copy, f"zoo.json has schema version {version!r}, this weightspace reads version 1")


def test_a_lacking_entry_is_named(copy: Path) -> None:
    description = json.loads((copy / "zoo.json").read_text())
    del description["files"], description["tasks"]
    (copy / "zoo.json").write_text(json.dumps(description))
    assert_named(copy, "zoo.json lacks tasks, files")
    (copy / "zoo.json").write_text("[]")
    assert_named(copy, "zoo.json is not a JSON object")


OUTSIDE = pytest.mark.parametrize("name", ["../secret.bin", "/absent/secret.bin", "sub/weights-00000.safetensors"])


def point_outside(folder: Path, name: str) -> None:
    """Let zoo.json name a file of another folder."""
    (folder.parent / "secret.bin").write_bytes(b"secret")
    (folder / "sub").mkdir()
    shutil.copy(folder / SHARDS[0], folder / "sub")
    describe(folder, files={**files_of(folder), name: {"bytes": 6, "sha256": "0" * 64}})


@OUTSIDE
def test_open_refuses_a_file_outside_the_folder(copy: Path, name: str) -> None:
    point_outside(copy, name)
    with pytest.raises(UserError, match=f"names '{name}', which is not a file of the zoo's own folder"):
        ModelZoo.open(copy)


@OUTSIDE
def test_verify_names_a_file_outside_the_folder_and_does_not_read_it(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_outside(copy, name)
    seen: list[Path] = []
    monkeypatch.setattr("weightspace.zoo.model_zoo.checksum", lambda path: seen.append(path) or checksum(path))
    assert_named(copy, f"zoo.json names {name!r}, which is not a file of the zoo's own folder")
    assert {path.parent for path in seen} == {copy}


def test_what_is_no_zoo_is_said_to_be_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"is not a zoo: it (has no finished zoo\.json|does not exist)$"):
            ModelZoo.open(folder)
        with pytest.raises(UserError, match=r"is not a zoo: it has no zoo\.json$"):
            verify(folder)
    (tmp_path / "zoo.json").write_text("{")
    for reader in (ModelZoo.open, verify):
        with pytest.raises(UserError, match=r"zoo\.json is not valid JSON"):
            reader(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": ["checkpoints.parquet"]},
        {"files": {"checkpoints.parquet": {}}},
        {"files": {}},
        {"architecture": {"nme": "CNN8"}},
        {"architecture": "CNN8"},
    ],
)
def test_a_malformed_description_is_named(copy: Path, changes: dict[str, Any]) -> None:
    describe(copy, **changes)
    assert verify(copy)
    with pytest.raises(UserError, match="damaged"):
        ModelZoo.open(copy)


# what is shown


def test_overview_counts_by_epoch(tiny_zoo: ModelZoo) -> None:
    found = overview(tiny_zoo)
    assert found.index.tolist() == [0, 1, 2] and found["count"].tolist() == [18, 18, 18]
    last = tiny_zoo.frame.loc[tiny_zoo.frame["epoch"] == 2, "test_acc"]
    assert found.loc[2, "50%"] == pytest.approx(np.median(last))


def test_summary_says_what_the_zoo_is(tiny_zoo: ModelZoo) -> None:
    text = summary(tiny_zoo)
    assert "CNN8" in text and "2,758 parameters" in text
    assert "18 (test 3, train 6, unseen 6, val 3)" in text
    assert "0.0001, 0.001, 0.01" in text


def test_a_split_that_does_not_exist_is_told_one_that_is_lacking_left_out(
    tiny_zoo: ModelZoo, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="there is no split holdout; the splits are train, val, test, unseen"):
        tiny_zoo.splits(("test", "holdout"))
    without = ModelZoo(tiny_zoo.folder, tiny_zoo.description, tiny_zoo.frame[tiny_zoo.frame["split"] != "unseen"])
    assert without.splits(("test", "unseen")) == ("test",)
    assert "has no split unseen: left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no split unseen, but test, train, val"):
        without.splits(("unseen",))


def test_usable_finds_diverged_checkpoints(population: Checkpoints) -> None:
    population.weights["fc1.weight"][2, 0, 0] = torch.nan
    population.weights["fc1.weight"][5, 0, 0] = torch.inf
    population.weights["fc2.bias"][6, 0] = -20_000
    assert usable(population).tolist() == [True, True, False, True, True, False, False, True]
    assert usable(population, limit=30_000).tolist() == [True, True, False, True, True, False, True, True]


def test_check_numeric_names_what_cannot_be_predicted(tiny_zoo: ModelZoo) -> None:
    check_numeric(tiny_zoo.frame, ["gap", "epoch"])
    for wrong in ("accuracy", "init"):  # missing, not a number
        with pytest.raises(UserError, match=rf"no numeric property {wrong}; the zoo has member, .*test_acc"):
            check_numeric(tiny_zoo.frame, ["gap", wrong])


# the documented format


def documented_reader() -> Callable[..., Any]:
    """The reader of docs/format.md."""
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "weightspace" not in code and len(code.splitlines()) <= 24
    names: dict[str, Any] = {}
    exec(code, names)
    return names["read_zoo"]


def test_the_documented_reader_reads(tiny_zoo: ModelZoo) -> None:
    rows, weights = documented_reader()(tiny_zoo.folder, "epoch == 2 and split == 'train'")
    expected = tiny_zoo.select("epoch == 2 and split == 'train'")
    assert rows["member"].tolist() == expected.frame["member"].tolist()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(weights[name], weight.numpy())


def test_other_libraries_read_the_table(tiny_zoo: ModelZoo) -> None:
    table = tiny_zoo.folder / "checkpoints.parquet"
    wanted = tiny_zoo.rows("epoch == 2 and test_acc > 0.6")[["member", "split", "test_acc"]].reset_index(drop=True)
    condition = f"FROM '{table}' WHERE epoch = 2 AND test_acc > 0.6 ORDER BY member"
    duck = duckdb.sql(f"SELECT member, split, test_acc {condition}").fetchall()
    bear = polars.scan_parquet(table).filter((polars.col("epoch") == 2) & (polars.col("test_acc") > 0.6)).sort("member")
    panda = pd.read_parquet(table).query("epoch == 2 and test_acc > 0.6").sort_values("member")
    assert 0 < len(wanted) < 18
    expected = list(wanted.itertuples(index=False, name=None))
    assert duck == bear.select("member", "split", "test_acc").collect().rows() == expected
    assert list(panda[["member", "split", "test_acc"]].itertuples(index=False, name=None)) == expected
    assert set(polars.read_parquet_schema(table)) == set(tiny_zoo.frame.columns)


def test_a_zoo_written_by_hand_is_a_zoo(tmp_path: Path) -> None:
    rng, shapes = np.random.default_rng(0), {"fc1.weight": [3, 4], "fc1.bias": [3], "fc2.weight": [3, 3]}
    shapes |= {"fc2.bias": [3], "fc3.weight": [2, 3], "fc3.bias": [2]}
    stacked = {name: rng.normal(size=[5, *shape]).astype(np.float32) for name, shape in shapes.items()}
    save_file({name: torch.from_numpy(value) for name, value in stacked.items()}, tmp_path / SHARDS[0])
    flat = np.concatenate([value.reshape(5, -1) for value in stacked.values()], axis=1)
    table = {"member": range(5), "epoch": 1, "split": "train", "task": "unknown", "shard": 0, "row": range(5)}
    digests = [hashlib.sha256(row.tobytes()).hexdigest()[:32] for row in flat]
    pd.DataFrame(table).assign(digest=digests).to_parquet(tmp_path / "checkpoints.parquet")
    files = [tmp_path / "checkpoints.parquet", tmp_path / SHARDS[0]]
    described = {file.name: {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in files}
    network = {"name": "MLP", "arguments": {"size": 2, "hidden": 3, "classes": 2}}
    content = {"schema_version": 1, "architecture": network, "parameters": shapes, "tasks": ["unknown"]}
    content |= {"files": described, "fingerprint": "mine", "provenance": {}}
    (tmp_path / "zoo.json").write_text(json.dumps(content))
    assert verify(tmp_path) == []
    zoo = ModelZoo.open(tmp_path)
    np.testing.assert_array_equal(zoo.read(zoo.frame).flat().numpy(), flat)


def test_a_description_that_lacks_something_is_not_relied_on(tiny_zoo: ModelZoo, tmp_path: Path) -> None:
    """Found by fuzzing: what it says of the files was believed."""
    described = json.loads((tiny_zoo.folder / "zoo.json").read_text())
    del described["tasks"]
    described["files"] = {name: {} for name in described["files"]}
    (tmp_path / "zoo.json").write_text(json.dumps(described))
    assert model_zoo.verify(tmp_path) == ["zoo.json lacks tasks"]
