"""A run that a signal stops, at any moment, ends as one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from factories import write_toml
from toy_runs import assert_same_result, checkpoints, stateful_recipe
from typer.testing import CliRunner

import opd
from opd.cli import app
from opd.logging.run_folder import Background, RunFolder
from opd.run import Run

STEPS = 30
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

# The slow imports once, then the `opd` command in a child of its own for each line of arguments and files to print to.
SPAWNER = """
import json, os, sys
import opd.run
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


def steps_done(run: Path) -> int:
    lines = opd.read_metrics(run) if (run / "config.json").exists() else []
    return lines[-1]["step"] if lines else 0


def wait_for_step(run: Path, step: int, limit_s: float = 300.0) -> None:
    end = time.monotonic() + limit_s
    while steps_done(run) < step:
        assert time.monotonic() < end, f"step {step} was not reached; at {steps_done(run)}"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def long_recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return stateful_recipe(tmp_path_factory.mktemp("long"), steps=STEPS, checkpoint={"every": 3})


@pytest.fixture(scope="module")
def uninterrupted(long_recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, command: Opd) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    command.start("train", write_toml(path.with_name("recipe.toml"), long_recipe | {"output": str(path)}))
    assert command.wait() == 0, command.errors
    return path


def test_a_run_killed_at_five_random_moments_ends_as_one_that_was_not(
    long_recipe: dict[str, Any], uninterrupted: Path, command: Opd, tmp_path: Path
):
    run = tmp_path / "run"
    moments = random.Random(20)
    # The first before there is any checkpoint.
    at = [moments.choice([1, 2]), *sorted(moments.sample(range(4, STEPS - 12), 4))]
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


def test_an_interrupt_finishes_the_step_saves_it_and_says_how_to_go_on(
    long_recipe: dict[str, Any], uninterrupted: Path, command: Opd, tmp_path: Path
):
    run = tmp_path / "run"
    tree = long_recipe | {"output": str(run), "checkpoint": {"every": STEPS}}
    process = command.start("train", write_toml(tmp_path / "recipe.toml", tree))
    wait_for_step(run, 4)
    os.kill(process, signal.SIGINT)
    assert command.wait() == 130
    done = steps_done(run)
    assert command.errors.strip() == f"finishing step {done}; press Ctrl-C again to stop without it"
    assert 4 <= done < STEPS
    last = command.output.splitlines()[-1]
    assert last == f"stopped after step {done} of {STEPS}; continue with: opd train --resume {run}"
    assert checkpoints(run) == [f"step-{done:06d}"]
    assert (run / "student" / "adapter_config.json").is_file()  # the newest student, before the run has ended
    assert opd.Trainer(run).resume().finished
    assert_same_result(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_step_stops_behind_it(tmp_path: Path, number: signal.Signals):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(report: Any) -> None:
        if report.step == 3:
            signal.raise_signal(number)

    tree = stateful_recipe(tmp_path, steps=6, checkpoint={"every": 5})
    result = opd.train(opd.parse_config(tree), callbacks=[interrupt])
    assert (result.steps_done, result.finished) == (3, False)
    assert checkpoints(result.run) == ["step-000003"]
    assert steps_done(result.run) == 3
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_steps_rollouts_are_on_disk_when_its_callback_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = RunFolder.write_rollouts

    def slowly(self: RunFolder, step: int, scored: Any) -> None:
        time.sleep(0.2)
        write(self, step, scored)

    monkeypatch.setattr(RunFolder, "write_rollouts", slowly)
    tree = stateful_recipe(tmp_path, steps=2)
    seen: list[int] = []
    opd.train(
        opd.parse_config(tree),
        callbacks=[lambda report: seen.append(len(list(opd.read_rollouts(tree["output"], report.step))))],
    )
    assert len(seen) == 2
    assert all(seen)


def test_a_second_interrupt_saves_the_step_that_is_whole_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = stateful_recipe(tmp_path, steps=6, checkpoint={"every": 2})

    record = Run._record

    def interrupt_twice(self: Run, report: Any, line: Any, records: Background) -> None:
        record(self, report, line, records)
        if report.step == 4:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "_record", interrupt_twice)
    result = CliRunner().invoke(app, ["train", write_toml(tmp_path / "recipe.toml", tree)])
    assert result.exit_code == 130
    [line] = result.stderr.splitlines()
    assert line == f"opd: stopped after step 4 of 6; continue with: opd train --resume {tree['output']}"
    assert checkpoints(Path(tree["output"])) == ["step-000002", "step-000004"]
