"""Run folders: seeds by name, atomic writes, claims, resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightspace.runs import (
    LOCK_FILE,
    STAGE_FILE,
    UserError,
    atomic,
    checksum,
    derive_seed,
    differences,
    fingerprint,
    finite,
    read_json,
    read_lines,
    stage,
    write_json,
    write_lines,
    write_text,
)

CONFIG = {"epochs": 5, "rates": (0.1, 0.2), "size": {"width": 8, "depth": 2}}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_whose_first_write_was_killed_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".stage.json.0a1b2c3d.partial").write_text("{")
    with stage(tmp_path, "zoo", {}) as todo:
        assert todo
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "stage.json"]


def test_derive_seed_is_stable() -> None:
    # the first 8 bytes of sha256("0/zoo/order/3"), halved (from sha256sum)
    assert derive_seed(0, "zoo", "order", 3) == 0xD68EF5E5644125F8 >> 1
    assert derive_seed("a") == 0xCA978112CA1BBDCA >> 1  # the published digest of "a" starts with ca978112ca1bbdca


def test_derive_seed_depends_on_every_name_and_fits_a_generator() -> None:
    seeds = [
        derive_seed(run, stage, number) for run in range(5) for stage in ("zoo", "pretrain") for number in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "x", 2) != derive_seed(2, "x", 1)
    ones = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(63)]
    assert all(0.3 < share < 0.7 for share in ones)  # every bit is used, none is constant


def test_atomic_replaces_the_file_when_the_block_succeeds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as partial:
        assert partial.parent == path.parent
        partial.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with open(path) as reader:
        with atomic(path) as partial:
            partial.write_text("second")
            assert path.read_text() == "first"
        assert reader.read() == "first"  # whoever had it open reads the old file to its end
    assert path.read_text() == "second"
    assert names(path.parent) == {"file.txt"}


def test_atomic_leaves_nothing_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == set()
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with atomic(path) as slow:
        slow.write_text("slow")
        with atomic(path) as quick:
            quick.write_text("quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert names(tmp_path) == {"file.txt"}


def test_finite_replaces_only_what_json_cannot_say() -> None:
    content = {"a": math.nan, "b": [1.5, math.inf, (-math.inf, 2)], 3: {"c": "nan", "d": None, "e": True}}
    assert finite(content) == {"a": None, "b": [1.5, None, [None, 2]], "3": {"c": "nan", "d": None, "e": True}}


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": math.nan, "a": (1, "ü")})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, "ü"], "b": None}
    assert text.index('"a"') < text.index('"b"')
    assert read_json(tmp_path / "x.json") == {"a": [1, "ü"], "b": None}


def test_lines_round_trip(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.inf}]
    write_lines(tmp_path / "m.jsonl", records)
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert read_lines(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("content", [b'{"a": 1', b"", b"\xff\xfe{}"])
def test_read_json_names_the_broken_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.json is not valid JSON"):
        read_json(path)


def test_read_json_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json does not exist"):
        read_json(tmp_path / "absent.json")


def test_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert checksum(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_fingerprint_follows_content_not_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": (2,)}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_stage_fresh_then_finished(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "zoo"
    with stage(folder, "zoo", CONFIG) as work:
        assert work
        assert read_json(folder / STAGE_FILE)["finished"] is False
        (folder / "result").write_text("kept")
    assert read_json(folder / STAGE_FILE) == {
        "stage": "zoo",
        "config": {"epochs": 5, "rates": [0.1, 0.2], "size": {"width": 8, "depth": 2}},
        "finished": True,
    }
    with stage(folder, "zoo", CONFIG) as work:
        assert not work
    assert (folder / "result").read_text() == "kept"


def test_stage_interrupted_is_entered_again(tmp_path: Path) -> None:
    folder = tmp_path / "zoo"
    with pytest.raises(KeyboardInterrupt), stage(folder, "zoo", CONFIG):
        (folder / "half").write_text("kept")
        raise KeyboardInterrupt
    assert read_json(folder / STAGE_FILE)["finished"] is False
    with stage(folder, "zoo", CONFIG) as work:
        assert work
        assert (folder / "half").read_text() == "kept"
    assert read_json(folder / STAGE_FILE)["finished"] is True


@pytest.mark.parametrize("finished", [True, False])
def test_stage_refuses_another_config_and_names_the_difference(tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "zoo"
    try:
        with stage(folder, "zoo", CONFIG):
            if not finished:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    other = {**CONFIG, "size": {"width": 8, "depth": 3}}
    with pytest.raises(UserError, match=r"size\.depth: 2 there, 3 asked for"), stage(folder, "zoo", other):
        pytest.fail("entered")
    assert read_json(folder / STAGE_FILE)["finished"] is finished


def test_stage_refuses_another_stage(tmp_path: Path) -> None:
    with stage(tmp_path / "x", "zoo", CONFIG):
        pass
    with pytest.raises(UserError, match="holds a 'zoo', not a 'probe'"), stage(tmp_path / "x", "probe", CONFIG):
        pytest.fail("entered")


def test_stage_refuses_a_foreign_folder_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not empty and not a weightspace zoo"), stage(tmp_path, "zoo", CONFIG):
        pytest.fail("entered")
    assert names(tmp_path) == {"thesis.tex"}
    with pytest.raises(UserError, match="is a file"), stage(tmp_path / "thesis.tex", "zoo", CONFIG):
        pytest.fail("entered")


def test_stage_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()  # what a stage that was refused at the lock leaves
    with stage(tmp_path, "zoo", CONFIG) as work:
        assert work


def test_stage_is_locked_while_another_process_works(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from weightspace.runs import stage\n"
        "with stage(Path(sys.argv[1]), 'zoo', {'epochs': 5}):\n"
        "    print('in', flush=True); sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "zoo")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(UserError, match="another process is at work"),
            stage(tmp_path / "zoo", "zoo", {"epochs": 5}),
        ):
            pytest.fail("entered")
        other.communicate("go on\n", timeout=60)
    assert other.returncode == 0
    with stage(tmp_path / "zoo", "zoo", {"epochs": 5}) as work:
        assert not work


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_stage_says_so_when_the_folder_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot write to"), stage(tmp_path / "zoo", "zoo", CONFIG):
            pytest.fail("entered")
    finally:
        tmp_path.chmod(0o700)


def test_stage_says_so_when_the_parent_is_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "text")
    with pytest.raises(UserError, match="cannot write to"), stage(tmp_path / "file" / "zoo", "zoo", CONFIG):
        pytest.fail("entered")


def test_differences_names_at_most_three() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == "b.c: 2 there, 3 asked for"
    assert differences({}, {"a": 1}) == "a: None there, 1 asked for"
    many = differences({str(n): 0 for n in range(5)}, {str(n): 1 for n in range(5)})
    assert many.count("asked for") == 3 and many.endswith("; and 2 more")
