"""Damaged zoos keep every intact checkpoint; shared zoos and representations come back as they went."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

import weightspace as ws
from weightspace.config import AutoencoderConfig, LossConfig, PretrainConfig
from weightspace.hyperrep.pretrain import pretrain
from weightspace.hyperrep.representation import HyperRepresentation
from weightspace.networks.checkpoints import Checkpoints
from weightspace.runs import UserError, checksum, locked
from weightspace.zoo.model_zoo import TABLE_FILE, ZOO_FILE, ModelZoo, described, shard_name, verify
from weightspace.zoo.repair import repair
from weightspace.zoo.tables import read_parquet


@pytest.fixture
def zoo(tiny_zoo: ModelZoo, tmp_path: Path) -> ModelZoo:
    """A copy of the tiny zoo (two shards of 27 checkpoints) that may be damaged."""
    shutil.copytree(tiny_zoo.folder, tmp_path / "zoo")
    return ModelZoo.open(tmp_path / "zoo")


def place_of(path: Path, name: str, row: int) -> int:
    """Byte at which the weights of one row of one parameter begin."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, end = header[name]["data_offsets"]
    return 8 + length + start + row * (end - start) // header[name]["shape"][0]


def flip(path: Path, at: int) -> None:
    """Invert a byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def identity(frame: pd.DataFrame) -> set[tuple[int, int]]:
    """(member, epoch) of every row."""
    return set(zip(frame["member"], frame["epoch"], strict=True))


def test_a_flipped_byte_costs_one_checkpoint(zoo: ModelZoo, tiny_zoo: ModelZoo) -> None:
    shard = zoo.folder / shard_name(1)
    flip(shard, place_of(shard, "fc1.weight", 5) + 3)
    victim = zoo.rows("shard == 1 and row == 5")
    assert verify(zoo.folder) == [f"{shard.name} has changed since it was written (its checksum differs)"]
    kept, lost, aside = repair(zoo.folder)
    assert kept == 53 and identity(lost) == identity(victim)
    assert verify(zoo.folder) == [] and verify(aside) != [] and aside.name == "zoo.damaged"
    whole = ModelZoo.open(zoo.folder)
    assert identity(whole.frame) == identity(tiny_zoo.frame) - identity(victim)
    expected = tiny_zoo.read(tiny_zoo.frame[~((tiny_zoo.frame["shard"] == 1) & (tiny_zoo.frame["row"] == 5))])
    found = whole.read(whole.frame)
    assert torch.equal(found.flat(), expected.flat())
    pd.testing.assert_frame_equal(found.frame, expected.frame)


def test_a_damaged_header_costs_nothing(zoo: ModelZoo) -> None:
    flip(zoo.folder / shard_name(0), 20)
    kept, lost, _ = repair(zoo.folder)
    assert kept == 54 and lost.empty


def test_shards_of_other_writers_are_cut_by_their_own_header(zoo: ModelZoo, tiny_zoo: ModelZoo) -> None:
    shard = zoo.folder / shard_name(0)
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    moved, data = {}, b""
    for name in reversed(sorted(names, key=lambda name: header[name]["data_offsets"][0])):
        start, end = header[name]["data_offsets"]
        moved[name] = {**header[name], "data_offsets": [len(data), len(data) + end - start]}
        data += content[8 + length + start : 8 + length + end]
    written = json.dumps(moved).encode()
    shard.write_bytes(len(written).to_bytes(8, "little") + written + data)
    flip(shard, place_of(shard, "fc1.weight", 5) + 3)
    kept, lost, _ = repair(zoo.folder)
    assert kept == 53 and identity(lost) == identity(tiny_zoo.rows("shard == 0 and row == 5"))


def rewritten(zoo: ModelZoo, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the table of a zoo as a careless writer might: zoo.json describes it as it is."""
    change(pd.read_parquet(zoo.folder / TABLE_FILE)).to_parquet(zoo.folder / TABLE_FILE, index=False)
    description = json.loads((zoo.folder / ZOO_FILE).read_text())
    description["files"][TABLE_FILE] = described(zoo.folder / TABLE_FILE)
    (zoo.folder / ZOO_FILE).write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.drop(columns="digest"), "checkpoints.parquet lacks digest"),
        (lambda frame: frame.assign(member=frame["member"] / 2), "member holds other values than whole numbers"),
        (lambda frame: frame.assign(split="rest"), "split holds rest, expected train, val, test, unseen"),
        (lambda frame: frame.assign(task="letters"), "task holds letters, expected digits"),
        (lambda frame: frame.assign(shard=frame["shard"] + 7), "names weights-00007.safetensors, weights-00008"),
        (lambda frame: frame.assign(digest="0" * 32), "row 0: the weights have another digest"),
    ],
)
def test_tables_of_other_writers_are_checked(
    zoo: ModelZoo, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    rewritten(zoo, change)
    assert message in verify(zoo.folder)[0]


def test_other_versions_are_not_repaired(zoo: ModelZoo) -> None:
    description = json.loads((zoo.folder / ZOO_FILE).read_text())
    (zoo.folder / ZOO_FILE).write_text(json.dumps({**description, "schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2, this weightspace repairs version 1"):
        repair(zoo.folder)


def test_a_cut_costs_what_is_behind_it(zoo: ModelZoo, tiny_zoo: ModelZoo) -> None:
    shard = zoo.folder / shard_name(0)
    with safe_open(shard, "pt") as file:
        last = max(file.keys(), key=lambda name: place_of(shard, name, 0))
    content = shard.read_bytes()
    shard.write_bytes(content[: place_of(shard, last, 10)])
    kept, lost, _ = repair(zoo.folder)
    assert kept == 54 - 17 and identity(lost) == identity(tiny_zoo.rows("shard == 0 and row >= 10"))


def test_a_missing_shard_costs_its_checkpoints(zoo: ModelZoo) -> None:
    (zoo.folder / shard_name(0)).unlink()
    kept, lost, _ = repair(zoo.folder)
    assert kept == 27 and set(lost["shard"]) == {0}
    with pytest.raises(UserError, match="is intact; there is nothing to repair"):
        repair(zoo.folder)
    (zoo.folder / shard_name(1)).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint of .* is intact"):
        repair(zoo.folder)
    assert not zoo.folder.with_name("zoo.repaired").exists()


@pytest.mark.parametrize(
    ("name", "message"), [(TABLE_FILE, "it alone says which checkpoint is which"), (ZOO_FILE, "is not valid JSON")]
)
def test_what_cannot_be_repaired(zoo: ModelZoo, name: str, message: str) -> None:
    flip(zoo.folder / name, 0)
    with pytest.raises(UserError, match=message):
        repair(zoo.folder)
    assert zoo.folder.exists()


def test_only_one_process_repairs(zoo: ModelZoo) -> None:
    flip(zoo.folder / shard_name(0), 5000)
    with locked(zoo.folder), pytest.raises(UserError, match="another process is at work in"):
        repair(zoo.folder)


@pytest.mark.parametrize("moment", ["zoo", "zoo.repaired"])
def test_a_killed_repair_goes_on(zoo: ModelZoo, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    flip(zoo.folder / shard_name(0), 5000)
    rename = Path.rename

    def dies(path: Path, target: Path) -> Path:
        if path.name == moment:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            repair(zoo.folder)
    assert zoo.folder.exists() == (moment == "zoo")
    assert repair(zoo.folder)[0] == 53 and verify(zoo.folder) == []


# sharing


def representation(zoo: ModelZoo, folder: Path) -> HyperRepresentation:
    """A representation that was hardly trained."""
    config = PretrainConfig(epochs=(1, 2), steps=2, batch_size=4, validate_every=2)
    size = AutoencoderConfig(width=16, layers=1, heads=2, feedforward=16, latent=8, components=2)
    return pretrain(zoo, folder, config, LossConfig(queries=8), size, 0, torch.device("cpu"))


def test_a_zoo_is_shared_and_comes_back(zoo: ModelZoo, tmp_path: Path) -> None:
    where = zoo.push_to_hub(tmp_path / "shared")
    assert sorted(path.name for path in Path(where).iterdir()) == [
        "README.md",
        TABLE_FILE,
        shard_name(0),
        shard_name(1),
        ZOO_FILE,
    ]
    back = ws.ModelZoo.from_hub(where)
    assert back.fingerprint == zoo.fingerprint
    card = (tmp_path / "shared" / "README.md").read_text()
    assert card.startswith("---\n") and "CNN8" in card and f'from_hub("{where}")' in card and "54" in card
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        zoo.push_to_hub(tmp_path / "shared")
    flip(tmp_path / "shared" / shard_name(0), 5000)
    with pytest.raises(UserError, match=r"is damaged: weights-00000.safetensors has changed"):
        ws.ModelZoo.from_hub(where)


def test_a_representation_is_shared_and_loads_in_two_lines(zoo: ModelZoo, tmp_path: Path) -> None:
    made = representation(zoo, tmp_path / "representation")
    where = made.push_to_hub(tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(lines[:2]), names)
    checkpoints = zoo.select(split="test")
    assert torch.equal(names["representation"].embed(checkpoints).z, made.embed(checkpoints).z)
    assert "| agreement |" in card and where in card


class Hub:
    """Stands in for the hub: keeps what is uploaded in a folder, and fails where it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def api(self, **_: Any) -> Hub:
        return self

    def create_repo(self, name: str, **settings: Any) -> Any:
        assert settings["exist_ok"] and settings["private"] is True
        if name == "no/access":
            raise OSError("401 Client Error\nlong text")
        if name == "no/network":
            raise type("ConnectError", (Exception,), {})("Name or service not known")  # as of httpx
        return type("Repository", (), {"repo_id": name})()

    def create_commit(self, name: str, operations: list[Any], **settings: Any) -> Any:
        target = self.folder / f"{settings['repo_type']}s" / name
        target.mkdir(parents=True)
        for operation in operations:
            with operation.as_file() as file:
                (target / operation.path_in_repo).write_bytes(file.read())
        return type("Commit", (), {"commit_url": f"https://hub.test/{name}"})()

    def snapshot_download(self, name: str, **settings: Any) -> str:
        found = self.folder / f"{settings['repo_type']}s" / name
        if not found.exists():
            raise OSError(f"404 {name}")
        return str(found)


def test_the_hub_gets_one_commit(zoo: ModelZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert zoo.push_to_hub("ada/zoo", private=True) == "https://hub.test/ada/zoo"
    assert ws.ModelZoo.from_hub("ada/zoo").fingerprint == zoo.fingerprint
    with pytest.raises(UserError, match=r"no/access cannot be written on the hub \(401 Client Error\)"):
        zoo.push_to_hub("no/access", private=True)
    with pytest.raises(UserError, match=r"no/network cannot be written on the hub \(Name or service not known\)"):
        zoo.push_to_hub("no/network", private=True)
    with pytest.raises(UserError, match=r"ada/other cannot be fetched from the hub \(404 ada/other\)"):
        HyperRepresentation.from_hub("ada/other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the extra 'hub': pip install 'weightspace\[hub\]'"):
        zoo.push_to_hub("ada/zoo")


def claim_huge_width(folder: Path) -> None:
    """A config that asks for an autoencoder of terabytes."""
    config = json.loads((folder / "config.json").read_text())
    config["autoencoder"] |= {"feedforward": 2**40}
    (folder / "config.json").write_text(json.dumps(config))


def claim_huge_network(folder: Path) -> None:
    """A config of a base network of terabytes."""
    config = json.loads((folder / "config.json").read_text())
    config["networks"][0] |= {"name": "MLP", "arguments": {"hidden": 2**20, "size": 2**10}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("claim", [claim_huge_width, claim_huge_network])
def test_a_representation_takes_no_more_memory_than_its_file(
    zoo: ModelZoo, tmp_path: Path, claim: Callable[[Path], None]
) -> None:
    representation(zoo, tmp_path / "representation")
    claim(tmp_path / "representation")
    with pytest.raises(UserError, match=r"is damaged or of another version: .*(does not hold|more weights than)"):
        HyperRepresentation.load(tmp_path / "representation")


def test_a_zoo_takes_no_more_memory_than_its_files(zoo: ModelZoo) -> None:
    many = pd.concat([zoo.frame] * 3, ignore_index=True)
    many.to_parquet(zoo.folder / TABLE_FILE, index=False)
    description = json.loads((zoo.folder / ZOO_FILE).read_text())
    table = zoo.folder / TABLE_FILE
    description["files"][TABLE_FILE] = {"bytes": table.stat().st_size, "sha256": checksum(table)}
    (zoo.folder / ZOO_FILE).write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"162 checkpoints of 11,032 bytes are not in it"):
        ModelZoo.open(zoo.folder)
    assert isinstance(zoo.read(zoo.frame.iloc[:2]), Checkpoints)


@pytest.mark.parametrize("dictionaries", [True, False])
def test_the_table_of_a_zoo_takes_no_more_memory_than_a_table_should(zoo: ModelZoo, dictionaries: bool) -> None:
    table = zoo.folder / TABLE_FILE
    words = pd.DataFrame({"word": ["x" * (6 * 2**20)] * len(zoo)})
    pd.concat([zoo.frame, words], axis=1).to_parquet(
        table, index=False, compression="zstd", use_dictionary=dictionaries, dictionary_pagesize_limit=2**25
    )
    assert table.stat().st_size < 2**20
    description = json.loads((zoo.folder / ZOO_FILE).read_text())
    description["files"][TABLE_FILE] = described(table)
    (zoo.folder / ZOO_FILE).write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"checkpoints.parquet cannot be read \(.* are not read\)"):
        ModelZoo.open(zoo.folder)
    assert any("are not read" in problem for problem in verify(zoo.folder))
    with pytest.raises(UserError, match="are not read"):
        repair(zoo.folder)


def test_tables_are_read_as_pandas_reads_them(zoo: ModelZoo, tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", None, "yy"], "b": [1, 2, 3], "c": [b"1", None, b""], "d": [1.0, None, 3.0]})
    frame["e"] = pd.Categorical(["u", "v", "u"])
    for each in (frame, frame.iloc[:0], zoo.frame):
        each.to_parquet(tmp_path / "table.parquet", index=False)
        pd.testing.assert_frame_equal(
            read_parquet(tmp_path / "table.parquet"), pd.read_parquet(tmp_path / "table.parquet")
        )
