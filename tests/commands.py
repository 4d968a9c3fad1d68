"""The command line as a test calls it, a sound recipe to change, and the one line of what must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from factories import toy_recipe, write_toml
from run_folders import files_of
from typer.testing import CliRunner

from opd.cli import app


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
