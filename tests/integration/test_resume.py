"""A run that was cut short anywhere goes on from what it saved and ends as one that was not; what cannot continue says why."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import save_adapter, save_toy, toy_recipe
from toy_runs import assert_same_result, checkpoints, files_of, lines_of, stateful_recipe
from typer.testing import CliRunner

import opd
from opd import checkpoint
from opd.cli import app
from opd.local.build import build


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run with checkpoints of its steps 4 and 6; copies of it are damaged."""
    tree = stateful_recipe(tmp_path_factory.mktemp("short"), steps=6)
    return opd.train(opd.parse_config(tree)).run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def refused(run: Path) -> str:
    """What `opd train --resume` says when it must refuse with one line."""
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = result.stderr.splitlines()
    assert line.startswith("opd: ")
    return line


def test_a_run_killed_before_its_first_checkpoint_starts_again(copy: Path, finished: Path):
    for name in ("checkpoints", "student", "rollouts"):
        shutil.rmtree(copy / name)
    for name in ("parity.json", "parity.md", "curves.png", "before.json"):
        (copy / name).unlink()
    metrics = copy / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:3])[:-9])  # two lines, and a third that was cut
    steps = []
    assert opd.Trainer(copy, callbacks=[lambda report: steps.append(report.step)]).resume().finished
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_result(copy, finished)


def test_an_error_in_on_step_leaves_a_run_that_can_go_on(tmp_path: Path, finished: Path):
    class Stop(Exception):
        pass

    def fail(report: Any) -> None:
        if report.step == 5:
            raise Stop

    tree = stateful_recipe(tmp_path, steps=6)
    with pytest.raises(Stop):
        opd.train(opd.parse_config(tree), callbacks=[fail])
    assert opd.Trainer(tree["output"]).resume().finished
    assert lines_of(Path(tree["output"])) == lines_of(finished)


def test_resuming_a_finished_run_does_no_further_step_and_keeps_its_results(copy: Path, finished: Path):
    steps = []
    result = opd.Trainer(copy, callbacks=[steps.append]).resume()
    assert (result.steps_done, result.finished, steps) == (6, True, [])
    assert len(result.parity) == 3
    ours, theirs = files_of(copy), files_of(finished)
    for pictures in (ours, theirs):
        del pictures["curves.png"]  # names its folder
    assert ours == theirs


def cut_tensors(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_one_bit(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def edit_state(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"policy_version": 6', '"policy_version": 5'))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def garble_checksums(folder: Path) -> None:
    (folder / "checksums.json").write_text("{")


DAMAGES = {
    "cut tensors": (cut_tensors, "tensors.safetensors does not match its checksum"),
    "one bit": (flip_one_bit, "tensors.safetensors does not match its checksum"),
    "edited state": (edit_state, "state.json does not match its checksum"),
    "no tensors": (without("tensors.safetensors"), "tensors.safetensors is missing"),
    "no state": (without("state.json"), "state.json is missing"),
    "no checksums": (without("checksums.json"), "checksums.json is missing"),
    "garbled checksums": (garble_checksums, "checksums.json is unreadable"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_the_reason(copy: Path, name: str):
    damage, reason = DAMAGES[name]
    damage(copy / "checkpoints" / "step-000006")
    said: list[str] = []
    found = checkpoint.load_newest(copy / "checkpoints", warn=said.append)
    assert found is not None
    assert found.step == 4
    [line] = said
    assert "step-000006' is damaged" in line
    assert f"({reason})" in line


@pytest.mark.parametrize("name", ["cut tensors", "no checksums"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(
    copy: Path, finished: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    damage, reason = DAMAGES[name]
    damage(copy / "checkpoints" / "step-000006")
    steps = []
    assert opd.Trainer(copy, callbacks=[lambda report: steps.append(report.step)]).resume().finished
    assert steps == [5, 6]
    assert_same_result(copy, finished)
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert said == [
        f"checkpoint '{copy}/checkpoints/step-000006' is damaged ({reason}); falling back to the one before"
    ]


def test_when_every_checkpoint_is_damaged_one_line_says_so_and_nothing_changes(copy: Path):
    for name in checkpoints(copy):
        cut_tensors(copy / "checkpoints" / name)
    before = files_of(copy)
    assert "all 2 checkpoints" in refused(copy)
    assert files_of(copy) == before


def test_a_kill_during_a_checkpoints_writing_leaves_the_one_before(copy: Path, finished: Path):
    half = copy / "checkpoints" / ".step-000006.partial"
    (copy / "checkpoints" / "step-000006").rename(half)
    (half / "checksums.json").unlink()
    (half / "state.json").unlink()
    cut_tensors(half)
    shutil.rmtree(copy / "student")
    metrics = copy / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])  # and the last line was cut
    steps = []
    assert opd.Trainer(copy, callbacks=[lambda report: steps.append(report.step)]).resume().finished
    assert steps == [5, 6]
    assert_same_result(copy, finished)


def test_a_kill_during_the_export_leaves_a_run_that_exports_again(copy: Path, finished: Path):
    (copy / "student").rename(copy / ".student.partial")
    (copy / ".student.partial" / "adapter_model.safetensors").write_bytes(b"half")
    assert opd.Trainer(copy).resume().finished
    assert_same_result(copy, finished)


def resumable(folder: Path) -> Path:
    """A run of its own teachers, stopped after step 3."""
    tree = stateful_recipe(folder, steps=6)
    result = opd.train(
        opd.parse_config(tree), callbacks=[lambda r: signal.raise_signal(signal.SIGINT) if r.step == 3 else None]
    )
    assert not result.finished
    return result.run


@pytest.mark.parametrize("which", ["adapter", "model"])
def test_a_changed_teacher_is_refused_on_resume(tmp_path: Path, which: str):
    run = resumable(tmp_path)
    before = files_of(run)
    if which == "adapter":
        save_adapter(tmp_path / "adapter", str(tmp_path / "student"), 6)
    else:
        save_toy(tmp_path / "even", 9)
    line = refused(run)
    assert f"teacher '{'odd' if which == 'adapter' else 'even'}' is not what this run began with" in line
    assert files_of(run) == before


def test_a_changed_base_of_the_student_is_refused_on_resume(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=6, evaluation={"num_prompts": 2})  # both teachers are models of their own
    stop = signal.SIGINT
    result = opd.train(opd.parse_config(tree), callbacks=[lambda r: signal.raise_signal(stop) if r.step == 3 else None])
    assert not result.finished
    before = files_of(result.run)
    save_toy(tmp_path / "student", 9)
    assert "the student's base is not what this run began with" in refused(result.run)
    assert files_of(result.run) == before


def test_the_identity_of_a_teacher_does_not_depend_on_where_it_lies(tmp_path: Path):
    tree = stateful_recipe(tmp_path)
    here = build(opd.parse_config(tree)).identities
    tree["teachers"] = {
        "even": {"model": str(shutil.copytree(tmp_path / "even", tmp_path / "elsewhere"))},
        "odd": {"adapter": str(shutil.copytree(tmp_path / "adapter", tmp_path / "moved"))},
    }
    assert build(opd.parse_config(tree)).identities == here
    assert here["teacher 'even'"] != here["teacher 'odd'"]
