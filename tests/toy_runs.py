"""Runs: the command line as a test calls it, toy runs from end to end, and what a run has left in its folder."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import pytest
from click.testing import Result
from factories import save_adapter, toy_recipe, write_toml
from safetensors.torch import load_file
from typer.testing import CliRunner

import opd
import opd.logging.writers
from opd import checkpoint
from opd.cli import app
from opd.loop import StepReport
from opd.records import Prompt


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


def checkpoints(run: Path) -> list[str]:
    return [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")]


def newest(run: Path) -> tuple[Any, Any]:
    found = checkpoint.load_newest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    return load_file(found.path / "tensors.safetensors"), found.state


@dataclass(frozen=True)
class Run:
    """A finished run, what it returned, and what its callables saw."""

    tree: dict[str, Any]
    result: opd.Result
    reports: list[StepReport]
    rewarded: list[tuple[Prompt, str]]

    @property
    def path(self) -> Path:
        return self.result.run


def reward_of(prompt: Prompt, response: str) -> float:
    """Some reward that differs between samples."""
    return float(crc32(response.encode()) % 2)


def other_words(path: str) -> None:
    """Another text for every prompt of a file, so that two teachers do not pull apart what one text is answered with."""
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text.replace("say ", "Now for something else: "), encoding="utf-8")


DRAW = opd.logging.writers.draw_curves


@contextmanager
def with_pictures() -> Iterator[None]:
    """Runs draw their curves, which conftest.py leaves out otherwise."""
    with patch("opd.logging.writers.draw_curves", DRAW):
        yield


def train(tree: dict[str, Any]) -> Run:
    reports: list[StepReport] = []
    rewarded: list[tuple[Prompt, str]] = []

    def reward(prompt: Prompt, response: str) -> float:
        rewarded.append((prompt, response))
        return reward_of(prompt, response)

    result = opd.train(opd.parse_config(tree), reward=reward, callbacks=[reports.append])
    assert result.finished
    assert result.steps_done == tree["steps"]
    return Run(tree, result, reports, rewarded)


def stateful_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of two tasks, one teacher an adapter, whose random numbers, order, optimizer and schedule all matter."""
    tree = toy_recipe(folder, evaluation={"num_prompts": 2}, **changes)
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    return tree


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_line(result: Result) -> str:
    """The one line of a command that must have been refused."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("opd: ")
    return lines[0]


def refuse(folder: Path, *arguments: str | Path) -> str:
    """The same, for a command that must leave every file under `folder` as it was and start no run."""
    before = files_of(folder)
    line = one_line(invoke(*arguments))
    after = files_of(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith(("metrics.jsonl", ".safetensors")) and name not in before]
    return line


def follow_advice(line: str, run: Path, *more: str) -> None:
    """Run the command that a line advises, which must end the run."""
    found = re.search(r"continue with: opd (.*)$", line)
    assert found, line
    assert shlex.split(found[1])[-1] == str(run)
    result = invoke(*shlex.split(found[1]), *more)
    assert result.exit_code == 0, result.output
    assert (run / "student").is_dir()


# Fixtures: where tests take them they are imported as themselves (`tree as tree`), with those that they rest on.


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sound recipe; tests change a copy of it."""
    return toy_recipe(tmp_path_factory.mktemp("bench"), steps=2, evaluation={"num_prompts": 0})


@pytest.fixture
def tree(bench: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(bench))
    return copied | {"output": str(tmp_path / "run")}


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path) -> str:
    return write_toml(tmp_path / "recipe.toml", tree)


def refuse_tree(tree: dict[str, Any], tmp_path: Path) -> str:
    """What `opd train` says of a recipe that it must refuse."""
    return refuse(tmp_path, "train", write_toml(tmp_path / "recipe.toml", tree))


def place_of(tree: dict[str, Any], who: str, path: Path | str) -> None:
    if who == "student":
        tree["student"] = str(path)
    else:
        tree["teachers"]["even"]["model"] = str(path)
