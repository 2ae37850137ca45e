"""The whole command line on a tiny experiment, and its messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from weightspace import cli
from weightspace.config import PRESETS, Experiment, LossConfig

TINY = [
    "--set", "zoo.epochs=2", "--set", "zoo.save_epochs=0,1,2", "--set", "pretrain.epochs=1,2",
    "--set", "pretrain.steps=6", "--set", "pretrain.validate_every=2", "--set", "finetune.epochs=0,1",
    "--set", "zoo.workers=1", "--set", "zoo.group=8", "--device", "cpu",
]  # fmt: skip


def run(*arguments: object, code: int = 0) -> None:
    """One command in this process."""
    if code == 0:
        cli.main([str(argument) for argument in arguments])
        return
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    assert caught.value.code == code


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    run("run", "smoke", "--out", folder, *TINY)
    return folder


def test_run_leaves_everything(finished: Path) -> None:
    for name in (
        "config.json", "environment.json", "results.json", "zoo/zoo.json", "zoo/checkpoints.parquet",
        "representations/structure/model.safetensors", "representations/structure+behavior/last.safetensors",
        "representations/structure/metrics.jsonl", "probe/predictions.parquet", "reconstruct/checkpoints.parquet",
        "generate/structure+behavior.safetensors", "generate/structure+behavior.json", "finetune/curves.parquet",
        "report/index.html", "report/tables/reconstruct.tex", "report/figures/zoo_accuracy.svg",
    ):  # fmt: skip
        assert (finished / name).is_file(), name
    records = json.loads((finished / "results.json").read_text())
    assert {record["stage"] for record in records} == {
        "zoo", "pretrain", "probe", "reconstruct", "generate", "finetune",
    }  # fmt: skip
    keys = {"stage", "representation", "split", "metric", "mean", "low", "high", "n"}
    assert all(record.keys() == keys for record in records)
    splits = {(r["representation"], r["split"]) for r in records if r["stage"] == "reconstruct"}
    assert splits == {
        (name, split) for name in ("structure", "structure+behavior", "PCA") for split in ("test", "unseen")
    }
    methods = {record["representation"] for record in records if record["stage"] == "generate"}
    assert methods == {"structure", "structure+behavior", "anchors", "anchors + noise", "weight averages", "PCA"}
    resolved = json.loads((finished / "config.json").read_text())
    assert resolved["pretrain"]["steps"] == 6
    assert not [path for path in finished.rglob("*.partial")]


def test_running_again_skips_everything(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    run("run", "smoke", "--out", finished, *TINY)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == stamps
    assert "report:" in capsys.readouterr().out


def test_same_config_and_seed_give_the_same_results(finished: Path, tmp_path: Path) -> None:
    run("run", "smoke", "--out", tmp_path / "again", *TINY)
    assert (tmp_path / "again" / "results.json").read_bytes() == (finished / "results.json").read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_gives_the_same_results(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "weightspace.cli", "run", "smoke", "--out", str(folder), *TINY]
    moments = (
        "zoo/strategy.json", "zoo/checkpoints.parquet", "representations/structure/metrics.jsonl",
        "representations/structure+behavior/state.json", "reconstruct/stage.json", "generate/records.json",
    )  # fmt: skip
    for moment in moments:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / moment).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "results.json").exists()
    run("run", "smoke", "--out", folder, *TINY)
    assert (folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_every_stage_works_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = tmp_path / "zoo"
    smoke = PRESETS["smoke"]().zoo
    grid = [
        "--set", "inits=kaiming_uniform", "--set", f"seeds={smoke.seeds}", "--set", "unseen_seeds=1",
        "--set", "learning_rates=1e-3,3e-3", "--set", "weight_decays=0,1e-3,1e-2", "--set", "val_share=0.2",
    ]  # fmt: skip
    run("zoo", "train", "--out", zoo, *grid, "--set", "epochs=1", "--set", "save_epochs=0,1", "--workers", 1)
    run("zoo", "show", zoo)
    assert "2,758 parameters" in capsys.readouterr().out
    run("zoo", "verify", zoo)
    assert "intact" in capsys.readouterr().out
    rep = tmp_path / "mine"
    small = [
        "--autoencoder.width", "16", "--autoencoder.layers", "1", "--autoencoder.heads", "2",
        "--autoencoder.components", "2",
    ]  # fmt: skip
    steps = ["--pretrain.steps", "4", "--pretrain.epochs", "1", "--pretrain.batch-size", "4", "--loss.queries", "16"]
    run("pretrain", zoo, "--out", rep, *small, *steps)
    refine = ["--refine.steps", 3]
    run("embed", zoo, rep, "--out", tmp_path / "z", "--split", "test", *refine)
    run("probe", zoo, rep, "--out", tmp_path / "probe")
    assert "R2 test_acc" in capsys.readouterr().out
    run("reconstruct", zoo, rep, "--out", tmp_path / "reconstruct", "--splits", "test", *refine)
    run("generate", zoo, rep, "--out", tmp_path / "generate", "--networks", 3, "--bandwidths", 0.1, *refine)
    made = tmp_path / "generate" / "mine.safetensors"
    run("finetune", made, "--out", tmp_path / "finetune", "--networks", 2, "--epochs", 0, 1)
    run("pretrain", zoo, "--out", tmp_path / "on", "--start", rep, *steps)
    run("probe", zoo, rep, "--out", tmp_path / "away", "--others", finished / "zoo", "--epochs", 0)
    assert "probe · zoo" in capsys.readouterr().out
    run("finetune", made, "--out", tmp_path / "elsewhere", "--networks", 2, "--epochs", 0, "--task", "street@1x8x8")
    output = capsys.readouterr().out
    assert "accuracy after 0 epochs" in output
    run("report", finished)
    run("report", tmp_path)  # any folder whose stages bear their names
    assert (tmp_path / "report" / "index.html").is_file()
    run("study", "--list")
    listed = capsys.readouterr().out
    assert "backdoors" in listed and "Which of the three losses" in listed


def message(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["zoo", "frobnicate"], "unknown command 'zoo frobnicate'"),
        (["run", "nope"], "unknown preset 'nope'; the presets are digits, digits-long, smoke"),
        (["run", "smoke", "--set", "pretrain.stepz=3"], "pretrain.stepz"),
        (["run", "smoke", "--set", "pretrain.steps=many"], "many"),
        (["run", "smoke", "--set", "pretrain.steps"], "--set takes FIELD=VALUE"),
        (["run", "smoke", "--set", "zoo.tasks=faces", "--out", "OUT"], "unknown task 'faces'; the tasks are digits"),
        (["run", "smoke", "--set", "zoo.network=VGG", "--out", "OUT"], "unknown base network 'VGG'"),
        (["run", "smoke", "--set", "zoo.network=CNN3", "--out", "OUT"], "CNN3 takes images of shape"),
        (["run", "smoke", "--set", "zoo.inits=zeros", "--out", "OUT"], "unknown init 'zeros'"),
        (["run", "smoke", "--set", "zoo.epochs=2", "--out", "OUT"], "zoo.save_epochs has [4]"),
        (["run", "smoke", "--device", "cuda:99", "--out", "OUT"], "device 'cuda:99' cannot be used"),
        (["zoo", "train", "nope", "--out", "OUT"], "unknown preset 'nope'"),
        (["study", "nope", "--out", "OUT"], "unknown study 'nope'; the studies are losses"),
        (["study", "beta", "--task", "faces", "--out", "OUT"], "unknown task 'faces'"),
        (["study", "beta", "--task", "folder:OUT", "--out", "OUT"], "OUT"),
        (["zoo", "show", "OUT"], "is not a zoo"),
        (["zoo", "verify", "OUT"], "is not a zoo"),
        (["report", "OUT"], "OUT"),
    ],
)
def test_mistakes_get_one_message_and_code_2(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "OUT"
    run(*[str(out) if argument == "OUT" else argument for argument in arguments], code=2)
    assert expected in re.sub(r"\s+", " ", message(capsys))
    assert not list(out.rglob("*.safetensors"))


def test_mistakes_on_what_lies_on_disk(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo, rep = finished / "zoo", finished / "representations" / "structure"
    run("run", "smoke", "--out", finished, *TINY, "--set", "pretrain.steps=7", code=2)
    assert "pretrain.steps: 6 there, 7 asked for" in message(capsys)
    run("pretrain", zoo, "--out", zoo, code=2)
    assert "holds a 'zoo'" in message(capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    run("run", "smoke", "--out", tmp_path / "mine", code=2)
    assert "not empty" in message(capsys)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    run("probe", zoo, "--out", tmp_path / "p", code=2)
    assert "no representation given" in message(capsys)
    run("probe", zoo, zoo, "--out", tmp_path / "p", code=2)
    assert "is not a representation" in message(capsys)
    run("reconstruct", zoo, rep, "--out", tmp_path / "p", "--splits", "holdout", code=2)
    assert "holdout" in message(capsys)
    run("embed", zoo, rep, "--out", tmp_path / "e", "--split", "holdout", code=2)
    assert "holdout" in message(capsys)
    run("probe", zoo, rep, "--out", tmp_path / "q", "--properties", "height", code=2)
    assert "no numeric property height" in message(capsys)
    run("pretrain", zoo, "--out", tmp_path / "r", "--pretrain.epochs", 9, code=2)
    assert "[9]" in message(capsys)
    run("finetune", tmp_path / "nothing.safetensors", "--out", tmp_path / "f", code=2)
    assert "does not exist" in message(capsys)


def test_a_damaged_zoo_fails_verification(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = tmp_path / "zoo"
    shutil.copytree(finished / "zoo", copy)
    shard = copy / "weights-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    run("zoo", "verify", copy, code=1)
    assert "weights-00000.safetensors has changed" in message(capsys)


def test_a_representation_of_another_network(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "zoo"
    grid = ["--set", "inits=normal", "--set", "seeds=3", "--set", "unseen_seeds=1", "--set", "network=MLP"]
    rates = ["--set", "learning_rates=1e-3", "--set", "weight_decays=0,1e-3,1e-2", "--set", "val_share=0.2"]
    once = ["--set", "epochs=1", "--set", "save_epochs=1", "--workers", 1, "--group", 8]
    run("zoo", "train", "--out", zoo, *grid, *rates, *once)
    run("reconstruct", zoo, finished / "representations" / "structure", "--out", tmp_path / "r", code=2)
    assert "CNN8(" in (error := message(capsys)) and "MLP(" in error


def test_a_mistake_leaves_the_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mistake in ("zoo.tasks=faces", "zoo.inits=zeros", "pretrain.steps=0", "pretrain.epochs=3"):
        run("run", "smoke", "--out", tmp_path / "run", *TINY, "--set", mistake, code=2)
        assert not (tmp_path / "run").exists(), mistake
    run("run", "smoke", "--out", tmp_path / "run", *TINY, "--set", "pretrain.batch_size=1", code=2)
    assert "pretrain.batch_size must be at least 2" in message(capsys)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("autoencoder.heads=3", "cannot be divided"),
        ("autoencoder.components=-1", "autoencoder.components must not be negative"),
        ("representations.structure.beta=1.5", "beta must lie between 0 and 1"),
        ("representations.structure.beta=0.5 1 0.2 1", "do not follow each other"),
        ("generate.bandwidths=", "generate.bandwidths is empty"),
        ("zoo.weight_decays=", "zoo.weight_decays is empty"),
        ("name=it's", "smoke"),
    ],
)
def test_values_that_cannot_work_are_named(setting: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    from weightspace.config import check
    from weightspace.runs import UserError

    command = cli.command(["run", "smoke", "--set", setting])
    if setting.startswith("name"):
        assert command.experiment.name == "it's"  # type: ignore[attr-defined]
        return
    with pytest.raises(UserError, match=expected):
        check(command.experiment)  # type: ignore[attr-defined]


def test_a_full_disk_is_a_failed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".safetensors" in path.name:
            write(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    run("run", "smoke", "--out", tmp_path / "run", *TINY, code=1)
    assert "No space left on device" in message(capsys)
    assert not (tmp_path / "run" / "zoo" / "zoo.json").exists()


def test_help_lists_every_field_and_answers_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--help"])
    assert caught.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for stage in dataclasses.fields(Experiment):
        inner = getattr(PRESETS["digits"](), stage.name)
        for entry in dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else ():
            assert f"--{stage.name}.{entry.name.replace('_', '-')}" in text
    for entry in dataclasses.fields(LossConfig):
        assert f"--representations.structure+behavior.{entry.name.replace('_', '-')}" in text
    code = "import sys; from weightspace import cli; cli.command(['run']); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "False"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_is_complete(preset: str) -> None:
    experiment = PRESETS[preset]()
    assert experiment.name == preset
    assert set(experiment.pretrain.epochs) <= set(experiment.zoo.save_epochs)
    assert experiment.representations["structure"].beta == 1.0
    assert experiment.representations["structure+behavior"].beta != 1.0


def test_readme_example_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(finished.parent)
    example = (
        "\n".join(blocks)
        .replace("runs/digits", finished.name)
        .replace("epoch=12", "epoch=2")
        .replace("min_val_acc=0.9", "min_val_acc=0.1")
    )
    exec(compile(example, "README.md", "exec"), {})


def test_every_field_of_every_config_is_read() -> None:
    import dataclasses

    from weightspace import config

    package = Path(cli.__file__).parent
    source = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name != "config.py")
    for kind in vars(config).values():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            for entry in dataclasses.fields(kind):
                assert re.search(rf"\.{entry.name}\b", source), f"{kind.__name__}.{entry.name} is never read"


@pytest.mark.slow
def test_every_command_works_on_an_imported_zoo(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("zoo", "export", finished / "zoo", "--layout", "ray-tune", "--out", tmp_path / "ray")
    for params in (tmp_path / "ray").glob("*/params.json"):  # others know no splits, no seeds and no task
        content = json.loads(params.read_text())
        kept = {key: value for key, value in content.items() if key not in ("split", "seed", "task")}
        params.write_text(json.dumps(kept))
    zoo, rep = tmp_path / "zoo", tmp_path / "rep"
    run("zoo", "import", tmp_path / "ray", "--out", zoo, "--task", "digits", "--epochs", 1, 2)
    assert "members       18 (test 4, train 12, val 2)" in capsys.readouterr().out
    sizes = ["--autoencoder.width", 16, "--autoencoder.layers", 1, "--autoencoder.heads", 2]
    steps = ["--pretrain.steps", 2, "--pretrain.validate-every", 2, "--pretrain.epochs", 1, 2]
    run("pretrain", zoo, "--out", rep, *steps, *sizes)
    run("probe", zoo, rep, "--out", tmp_path / "probe", "--properties", "all")
    run("reconstruct", zoo, rep, "--out", tmp_path / "reconstruct")
    run("generate", zoo, rep, "--out", tmp_path / "generate", "--anchors", 4, "--networks", 4)
    run("embed", zoo, rep, "--out", tmp_path / "embed")
    run("zoo", "verify", zoo)
    told = capsys.readouterr()
    assert "has no split unseen: left out" in told.err and "is intact" in told.out
    run("zoo", "import", tmp_path / "ray", "--out", tmp_path / "nameless")
    run("reconstruct", tmp_path / "nameless", rep, "--out", tmp_path / "none", code=2)
    assert "this zoo was imported without --task" in capsys.readouterr().err


def test_damaged_zoos_are_repaired(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / "zoo", tmp_path / "zoo")
    shard = tmp_path / "zoo" / "weights-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    run("zoo", "verify", tmp_path / "zoo", code=1)
    assert "--repair keeps every intact checkpoint" in capsys.readouterr().err
    run("zoo", "verify", tmp_path / "zoo", "--repair")
    assert "lost: 1; the damaged zoo is now" in capsys.readouterr().out
    run("zoo", "verify", tmp_path / "zoo")
