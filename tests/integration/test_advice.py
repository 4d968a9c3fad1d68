"""What a line advises works when it is done."""

import re
from pathlib import Path
from typing import Any

import pytest
from factories import write_toml
from toy_runs import bench as bench
from toy_runs import invoke, one_line
from toy_runs import tree as tree

import opd


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_new_run_begins_where_a_finished_one_is_as_the_line_says(
    bench: dict[str, Any], tmp_path: Path, trainable: str
):
    tree = bench | {
        "output": str(tmp_path / "run"),
        "trainable": trainable,
        "steps": 2,
        "evaluation": {"num_prompts": 0},
    }
    tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 1}
    run = opd.train(opd.parse_config(tree)).run
    line = one_line(invoke("train", "--resume", run, "seed=7"))
    advised = re.search(r"once this one is done, (\S+) = 'RUN/student' begins where it is", line)
    assert advised
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"output": str(tmp_path / "next")})
    result = invoke("train", recipe, f"{advised[1]}={run}/student")
    assert result.exit_code == 0, result.output
    before, after = (opd.read_metrics(r)[0]["kl/token/mean"] for r in (run, tmp_path / "next"))
    assert before != after


def test_an_evaluation_that_a_line_advises_works(tree: dict[str, Any], tmp_path: Path):
    run = opd.train(opd.parse_config(tree | {"evaluation": {"num_prompts": 0}})).run
    advised = re.search(r"such as (evaluation\.num_prompts=\d+)", one_line(invoke("eval", run)))
    assert advised
    assert invoke("eval", run, advised[1]).exit_code == 0


def test_the_extras_that_lines_advise_to_install_exist():
    text = "".join(p.read_text() for p in Path(opd.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"pip install 'opd\[(\w+)\]'", text))
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE))
    assert named
    assert named <= extras
