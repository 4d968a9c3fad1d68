"""A run that was stopped, at any moment and in any way, ends as one that was not; what cannot continue says why."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import save_adapter, save_toy, toy_recipe, write_toml
from typer.testing import CliRunner

import opd
from opd import checkpoint
from opd.cli import app
from opd.embedded.build import build

STEPS = 30
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# The slow imports once, then the `opd` command in a child of its own for each line of arguments and files to print to.
SPAWNER = """
import json, os, sys
import opd.launch
from opd.cli import main

for line in sys.stdin:
    arguments, log = json.loads(line)
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = ["opd", *arguments]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        os._exit(70)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Opd:
    """Runs the `opd` command in processes of its own."""

    def __init__(self, spawner: "subprocess.Popen[str]", folder: Path) -> None:
        self._spawner = spawner
        self._log = folder / "log"

    def start(self, *arguments: str) -> int:
        """The process id of a command that runs from now on."""
        assert self._spawner.stdin is not None
        assert self._spawner.stdout is not None
        self._spawner.stdin.write(json.dumps([list(arguments), str(self._log)]) + "\n")
        self._spawner.stdin.flush()
        return int(self._spawner.stdout.readline())

    def wait(self) -> int:
        """The exit code of the command that was started last; minus the signal that killed it."""
        assert self._spawner.stdout is not None
        return int(self._spawner.stdout.readline())

    @property
    def output(self) -> str:
        return self._log.with_name("log.out").read_text()

    @property
    def errors(self) -> str:
        return self._log.with_name("log.err").read_text()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opd]:
    spawner = subprocess.Popen(
        [sys.executable, "-c", SPAWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    with spawner:
        yield Opd(spawner, tmp_path_factory.mktemp("command"))
        assert spawner.stdin is not None
        spawner.stdin.close()


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of two tasks, one teacher an adapter, whose random numbers, order, optimizer and schedule all matter."""
    tree = toy_recipe(folder, evaluation={"num_prompts": 2}, **changes)
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    return tree


def steps_done(run: Path) -> int:
    lines = opd.read_metrics(run)
    return lines[-1]["step"] if lines else 0


def wait_for_step(run: Path, step: int, limit_s: float = 300.0) -> None:
    end = time.monotonic() + limit_s
    while steps_done(run) < step:
        assert time.monotonic() < end, f"step {step} was not reached; at {steps_done(run)}"
        time.sleep(0.002)


def lines_of(run: Path) -> list[str]:
    """metrics.jsonl line by line, without what a clock measured."""
    found = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = {key: value for key, value in json.loads(text).items() if not key.startswith("time/")}
        found.append(json.dumps(line))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_result(run: Path, reference: Path) -> None:
    """Metrics bit for bit, the student byte for byte, every rollout, the newest checkpoint and the parity table."""
    ours, theirs = lines_of(run), lines_of(reference)
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert a == b, f"metrics.jsonl, line {number}"
    assert files_of(run / "student") == files_of(reference / "student")
    assert files_of(run / "rollouts") == files_of(reference / "rollouts")
    assert (run / "parity.json").read_bytes() == (reference / "parity.json").read_bytes()
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert files_of(newest) == files_of(reference / "checkpoints" / newest.name)
    assert not [p for p in run.rglob("*") if "partial" in p.name]


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return recipe(tmp_path_factory.mktemp("long"), steps=STEPS, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def uninterrupted(long_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, command: Opd) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    command.start("train", write_toml(path.with_name("recipe.toml"), long_recipe | {"output": str(path)}))
    assert command.wait() == 0, command.errors
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run with checkpoints of its steps 4 and 6; copies of it are damaged."""
    tree = recipe(tmp_path_factory.mktemp("short"), steps=6)
    return opd.train(opd.parse_config(tree)).run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def checkpoints(run: Path) -> list[str]:
    return [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")]


def refused(run: Path) -> str:
    """What `opd train --resume` says when it must refuse with one line."""
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = result.stderr.splitlines()
    assert line.startswith("opd: ")
    return line


def test_a_run_killed_at_five_random_moments_ends_as_one_that_was_not(
    long_recipe: dict[str, Any], uninterrupted: Path, command: Opd, tmp_path: Path
):
    run = tmp_path / "run"
    moments = random.Random(20)
    # The first before there is any checkpoint.
    at = [moments.choice([1, 2]), *sorted(moments.sample(range(4, STEPS - 4), 4))]
    arguments = ["train", write_toml(tmp_path / "recipe.toml", long_recipe | {"output": str(run)})]
    for step in at:
        process = command.start(*arguments)
        wait_for_step(run, step)
        if step > 2:
            time.sleep(moments.uniform(0.0, 0.03))  # somewhere within the next step, or within a checkpoint's writing
        os.kill(process, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        assert not (run / "student").exists()
        arguments = ["train", "--resume", str(run)]
    command.start(*arguments)
    assert command.wait() == 0, command.errors
    assert_same_result(run, uninterrupted)


def test_a_run_killed_before_its_first_checkpoint_starts_again(copy: Path, finished: Path):
    for name in ("checkpoints", "student", "rollouts"):
        shutil.rmtree(copy / name)
    for name in ("parity.json", "parity.md", "curves.png", "before.json"):
        (copy / name).unlink()
    metrics = copy / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:3])[:-9])  # two lines, and a third that was cut
    steps = []
    assert opd.resume(copy, on_step=lambda report: steps.append(report.step)).finished
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_result(copy, finished)


def test_an_interrupt_finishes_the_step_saves_it_and_says_how_to_go_on(
    long_recipe: dict[str, Any], uninterrupted: Path, command: Opd, tmp_path: Path
):
    run = tmp_path / "run"
    tree = long_recipe | {"output": str(run), "checkpoint": {"every": STEPS}}
    process = command.start("train", write_toml(tmp_path / "recipe.toml", tree))
    wait_for_step(run, 4)
    os.kill(process, signal.SIGINT)
    assert command.wait() == 130
    assert command.errors == ""
    done = steps_done(run)
    assert 4 <= done < STEPS
    last = command.output.splitlines()[-1]
    assert last == f"stopped after step {done} of {STEPS}; continue with: opd train --resume {run}"
    assert checkpoints(run) == [f"step-{done:06d}"]
    assert not (run / "student").exists()
    assert opd.resume(run).finished
    assert_same_result(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_step_stops_behind_it(tmp_path: Path, number: signal.Signals):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(report: Any) -> None:
        if report.step == 3:
            signal.raise_signal(number)

    tree = recipe(tmp_path, steps=6, checkpoint={"every": 5})
    result = opd.train(opd.parse_config(tree), on_step=interrupt)
    assert (result.steps_done, result.finished) == (3, False)
    assert checkpoints(result.run) == ["step-000003"]
    assert steps_done(result.run) == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_interrupt_stops_at_once_with_one_line_and_leaves_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = recipe(tmp_path, steps=6, checkpoint={"every": 2})

    def interrupt_twice(self: Any, report: Any, line: Any) -> None:
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("opd.launch._Run._record", interrupt_twice)
    result = CliRunner().invoke(app, ["train", write_toml(tmp_path / "recipe.toml", tree)])
    assert result.exit_code == 130
    [line] = result.stderr.splitlines()
    assert line.startswith("opd: stopped at once")
    assert checkpoints(Path(tree["output"])) == ["step-000002"]


def test_an_error_in_on_step_leaves_a_run_that_can_go_on(tmp_path: Path, finished: Path):
    class Stop(Exception):
        pass

    def fail(report: Any) -> None:
        if report.step == 5:
            raise Stop

    tree = recipe(tmp_path, steps=6)
    with pytest.raises(Stop):
        opd.train(opd.parse_config(tree), on_step=fail)
    assert opd.resume(tree["output"]).finished
    assert lines_of(Path(tree["output"])) == lines_of(finished)


def test_resuming_a_finished_run_does_no_further_step_and_keeps_its_results(copy: Path, finished: Path):
    steps = []
    result = opd.resume(copy, on_step=steps.append)
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
    assert opd.resume(copy, on_step=lambda report: steps.append(report.step)).finished
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
    assert opd.resume(copy, on_step=lambda report: steps.append(report.step)).finished
    assert steps == [5, 6]
    assert_same_result(copy, finished)


def test_a_kill_during_the_export_leaves_a_run_that_exports_again(copy: Path, finished: Path):
    (copy / "student").rename(copy / ".student.partial")
    (copy / ".student.partial" / "adapter_model.safetensors").write_bytes(b"half")
    assert opd.resume(copy).finished
    assert_same_result(copy, finished)


def resumable(folder: Path) -> Path:
    """A run of its own teachers, stopped after step 3."""
    tree = recipe(folder, steps=6)
    result = opd.train(
        opd.parse_config(tree), on_step=lambda r: signal.raise_signal(signal.SIGINT) if r.step == 3 else None
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
    result = opd.train(opd.parse_config(tree), on_step=lambda r: signal.raise_signal(stop) if r.step == 3 else None)
    assert not result.finished
    before = files_of(result.run)
    save_toy(tmp_path / "student", 9)
    assert "the student's base is not what this run began with" in refused(result.run)
    assert files_of(result.run) == before


def test_the_identity_of_a_teacher_does_not_depend_on_where_it_lies(tmp_path: Path):
    tree = recipe(tmp_path)
    here = build(opd.parse_config(tree)).identities
    tree["teachers"] = {
        "even": {"model": str(shutil.copytree(tmp_path / "even", tmp_path / "elsewhere"))},
        "odd": {"adapter": str(shutil.copytree(tmp_path / "adapter", tmp_path / "moved"))},
    }
    assert build(opd.parse_config(tree)).identities == here
    assert here["even"] != here["odd"]
