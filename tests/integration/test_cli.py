"""The command line: what a sound command writes and prints, and that nothing that was there is written over."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from factories import save_toy, sft_recipe, write_toml
from safetensors import SafetensorError
from toy_runs import bench as bench
from toy_runs import files_of, invoke, one_line, place_of, refuse, refuse_tree
from toy_runs import recipe as recipe
from toy_runs import tree as tree

import opd
from opd import checkpoint

# Where a run is written


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_folder_that_exists_is_not_written_over(tree: dict[str, Any], tmp_path: Path, command: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    if command == "sft":
        tree = sft_recipe(tmp_path, tree["student"]) | {"output": tree["output"]}
    before = files_of(tmp_path / "run")
    line = refuse(tmp_path, command, write_toml(tmp_path / "recipe.toml", tree))
    assert f"run folder '{tmp_path}/run' exists and is not empty" in line
    assert files_of(tmp_path / "run") == before


def test_an_empty_folder_is_taken_as_the_run_folder(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    assert (tmp_path / "run" / "student").is_dir()


def test_an_output_that_is_a_file_or_lies_under_one_is_refused(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    assert "exists" in refuse_tree(tree | {"output": f"{tmp_path}/file"}, tmp_path)
    assert f"cannot write '{tmp_path}/file/run'" in refuse_tree(tree | {"output": f"{tmp_path}/file/run"}, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_without_write_permission_is_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbid)
    line = refuse(tmp_path, "train", recipe)
    assert f"cannot write '{tmp_path}/run': Permission denied" in line


def test_a_recipe_that_may_not_be_read_is_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", forbid)
        line = one_line(invoke("train", recipe))
    assert f"'{recipe}'" in line
    assert "ermission" in line


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture(scope="module")
def whole(bench: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose disk was never full."""
    path = tmp_path_factory.mktemp("whole") / "run"
    tree = bench | {"output": str(path), "steps": 3, "checkpoint": {"every": 1}}
    return opd.train(opd.parse_config(tree)).run


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in opd.read_metrics(run)]


@pytest.mark.parametrize(
    ("target", "failure", "place"),
    [
        ("opd.checkpoint.save_file", full_disk, "checkpoints"),
        ("opd.checkpoint.save_file", full_disk_in_safetensors, "checkpoints"),
        ("opd.checkpoint.os.fsync", full_disk, "rollouts/step-000002.jsonl.gz"),
    ],
    ids=["tensors", "safetensors", "rollouts"],
)
def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_run_goes_on_later(
    tree: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    failure: Any,
    place: str,
):
    tree |= {"steps": 3, "checkpoint": {"every": 1}}
    run = Path(tree["output"])
    save = checkpoint.save

    def save_and_fill_the_disk(*args: Any, **kwargs: Any) -> Path:
        path = save(*args, **kwargs)
        monkeypatch.setattr(target, failure)  # from the first checkpoint on
        return path

    monkeypatch.setattr("opd.checkpoint.save", save_and_fill_the_disk)
    line = one_line(invoke("train", write_toml(tmp_path / "recipe.toml", tree)))
    assert f"cannot write '{run}/{place}'" in line
    assert "No space left on device" in line
    monkeypatch.undo()
    found = checkpoint.load_newest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found.step == 1
    assert not [p for p in run.rglob("*") if "partial" in p.name]
    result = invoke("train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert metrics_of(run) == metrics_of(whole)


# What a sound command prints


def test_a_finished_run_prints_where_its_student_is_and_nothing_on_stderr(
    whole: Path, tree: dict[str, Any], tmp_path: Path
):
    result = invoke("train", write_toml(tmp_path / "recipe.toml", tree), "steps=3", "checkpoint.every=1")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == f"done: {tree['output']} (student in {tree['output']}/student)"
    assert metrics_of(Path(tree["output"])) == metrics_of(whole)


def test_check_prints_every_finding_and_writes_nothing(recipe: str, tmp_path: Path):
    before = files_of(tmp_path)
    result = invoke("check", recipe)
    assert result.exit_code == 0
    first, *lines = result.stdout.splitlines()
    assert first == f"opd {opd.__version__}: loading recipe {recipe}"
    assert len(lines) >= 7
    assert all(line.startswith(("ok  ", "warn  ")) for line in lines)
    # toys of random weights: that they are far apart is said, and stops nothing
    assert any(line.startswith("warn  distance to teacher 'even': KL ") for line in lines)
    assert files_of(tmp_path) == before


def test_check_exits_with_2_where_a_check_fails(tree: dict[str, Any], tmp_path: Path):
    place_of(tree, "teacher", save_toy(tmp_path / "uniform", 1, scale=0.0))
    result = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert result.exit_code == 2
    [failed] = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert "teacher 'even' is not uniform" in failed


def test_eval_prints_the_parity_table_of_a_run(tree: dict[str, Any], tmp_path: Path):
    tree["evaluation"] = {"num_prompts": 2}
    run = Path(tree["output"])
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    before = (run / "parity.json").read_bytes()
    (run / "parity.json").unlink()
    result = invoke("eval", run)
    assert result.exit_code == 0, result.output
    assert "| second | held-out |" in result.stdout
    assert (run / "parity.json").read_bytes() == before


def test_every_command_explains_itself():
    shown = invoke("--help").stdout
    commands = ("train", "sft", "eval", "check", "align", "plan", "theory")
    assert all(name in shown for name in commands)
    for name in commands:
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def test_the_help_of_training_shows_examples():
    shown = invoke("train", "--help").stdout
    assert "opd train recipes/sums.toml --steps 3 --optimizer.lr 1e-5" in shown


def test_the_version_is_printed_by_the_command_and_by_the_module():
    module = subprocess.run([sys.executable, "-m", "opd", "--version"], check=True, capture_output=True, text=True)
    assert invoke("--version").stdout == module.stdout == f"opd {opd.__version__}\n"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[opd.Config]:
    """The configurations with which runs are started, in place of runs."""
    found: list[opd.Config] = []

    def start(trainer: opd.Trainer) -> opd.Result:
        found.append(trainer.config)
        return SimpleNamespace(run=Path(trainer.config.output), finished=True)  # pyright: ignore[reportReturnType]

    monkeypatch.setattr("opd.Trainer.fit", start)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["RECIPE", "--steps", "9", "--optimizer.lr", "1e-5"],
        ["--steps", "9", "RECIPE", "--optimizer.lr=1e-5"],
        ["RECIPE", "optimizer.lr=1e-5", "--steps=9"],
        ["RECIPE", "--optimizer.lr", "1e-5", "steps=9"],
    ],
    ids=" ".join,
)
def test_options_are_the_same_as_pairs(recipe: str, started: list[opd.Config], arguments: list[str]):
    assert invoke("train", *(recipe if a == "RECIPE" else a for a in arguments)).exit_code == 0
    assert invoke("train", recipe, "steps=9", "optimizer.lr=1e-5").exit_code == 0
    assert started[0] == started[1]
    assert (started[0].steps, started[0].optimizer.lr) == (9, 1e-5)


def test_options_take_dashes_negative_numbers_and_no_value(recipe: str, tmp_path: Path, started: list[opd.Config]):
    options = (
        "--objective.teacher-logprob-floor",
        "-20",
        "--sampling.max-new-tokens",
        "7",
        "--compute.activation-checkpointing",
    )
    assert invoke("train", recipe, *options).exit_code == 0
    assert started[0].objective.teacher_logprob_floor == -20
    assert started[0].sampling.max_new_tokens == 7
    assert started[0].compute.activation_checkpointing


def test_an_option_of_another_library_is_answered(recipe: str, tmp_path: Path):
    line = refuse(tmp_path, "train", recipe, "--lr", "1e-5")
    assert line == f"opd: {recipe}: unknown key 'lr': opd calls it optimizer.lr; write optimizer.lr=1e-5"
    line = refuse(tmp_path, "check", recipe, "--max-completion-length", "9")
    assert line.endswith("opd calls it sampling.max_new_tokens; write sampling.max_new_tokens=9")


def test_a_command_says_within_seconds_what_it_does(recipe: str):
    """Half a second of a processor; imports of a run take several."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen([sys.executable, "-m", "opd", "train", recipe], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert first == f"opd {opd.__version__}: loading recipe {recipe}\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


def test_a_run_whose_folder_was_moved_goes_on_where_it_is(tree: dict[str, Any], tmp_path: Path):
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tree["output"], moved)
    shutil.rmtree(moved / "student")
    result = invoke("train", "--resume", moved)
    assert result.exit_code == 0, result.output
    assert (moved / "student").is_dir()
    assert not Path(tree["output"]).exists()


def test_what_is_printed_of_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    from opd.cli import _one_line
    from opd.errors import RunError

    with pytest.raises(typer.Exit), _one_line():
        raise RunError("a tool said \x1b[2J\x07 and\nmore")
    assert capsys.readouterr().err == "opd: a tool said \ufffd[2J\ufffd and more\n"
