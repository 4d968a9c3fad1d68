"""A run goes on elsewhere: other addresses, folders and machines, the same result; what would change what it learns is refused."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, toy_model, toy_recipe
from servers import serving
from toy_runs import files_of, lines_of, stateful_recipe
from typer.testing import CliRunner

import opd
from opd.cli import app
from opd.config import config_changes, resumed_config
from opd.errors import ConfigError
from opd.logging.run_folder import RunFolder


def stopped(tree: dict[str, Any], step: int = 3) -> Path:
    result = opd.train(
        opd.parse_config(tree), callbacks=[lambda r: signal.raise_signal(signal.SIGINT) if r.step == step else None]
    )
    assert not result.finished
    return result.run


def assert_same_training(run: Path, reference: Path) -> None:
    """Metrics bit for bit, and the student, but for the names of the folders that it came from."""
    assert lines_of(run) == lines_of(reference)
    weights = "student/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (reference / weights).read_bytes()
    assert (run / "parity.json").read_bytes() == (reference / "parity.json").read_bytes()


def test_models_and_prompts_that_lie_elsewhere_are_the_same_run(tmp_path: Path):
    whole = opd.train(opd.parse_config(stateful_recipe(tmp_path / "whole", steps=6))).run
    run = stopped(stateful_recipe(tmp_path / "here", steps=6))
    there = shutil.move(tmp_path / "here", tmp_path / "there")
    tree = json.loads((there / run.name / "config.json").read_text())
    moved = [f"student={there}/student", f"teachers.even.model={there}/even", f"teachers.odd.adapter={there}/adapter"]
    for name, task in tree["tasks"].items():
        moved += [
            f"tasks.{name}.{key}={there}/{Path(task[key]).name}" for key in ("path", "held_out_path") if task[key]
        ]
    result = CliRunner().invoke(app, ["train", "--resume", str(there / run.name), *moved])
    assert result.exit_code == 0, result.output
    assert f'changed: student = "{there}/student", was "{tmp_path}/here/student"' in result.output.replace("\n", "")
    assert_same_training(there / run.name, whole)
    assert json.loads((there / run.name / "config.json").read_text())["student"] == f"{there}/student"
    assert opd.Trainer(there / run.name).resume().finished  # it knows by now


def test_a_server_may_have_another_address(tmp_path: Path):
    objective = {"type": "immediate"}
    remote = {"attempts": 2, "first_wait_s": 0.01, "longest_wait_s": 0.02}
    tree = toy_recipe(tmp_path, steps=6, objective=objective, remote=remote, evaluation={"num_prompts": 2})
    with serving(toy_model(2)) as server:
        tree["teachers"]["odd"] = {"url": server.url}
        run = stopped(tree)
    before = files_of(run)
    with serving(toy_model(2)) as server:
        server.name = "other"
        with pytest.raises(opd.errors.CheckError, match="teacher 'odd' is not what this run began with"):
            opd.Trainer(run).resume([f"teachers.odd.url={server.url}"])
    assert files_of(run) == before
    with serving(toy_model(2)) as server:
        assert opd.Trainer(run).resume([f"teachers.odd.url={server.url}"]).finished
        assert opd.Trainer(run).evaluate()
    with serving(toy_model(2)) as server:
        noted = (run / "config.json").read_bytes()
        assert opd.Trainer(run).evaluate([f"teachers.odd.url={server.url}"])
        assert (run / "config.json").read_bytes() == noted


def test_another_model_elsewhere_is_refused_and_nothing_is_written(tmp_path: Path):
    run = stopped(stateful_recipe(tmp_path, steps=6))
    before = files_of(run)
    save_toy(tmp_path / "other", 9)
    with pytest.raises(opd.errors.CheckError, match="teacher 'even' is not what this run began with"):
        opd.Trainer(run).resume([f"teachers.even.model={tmp_path}/other"])
    assert files_of(run) == before


def test_more_steps_at_a_constant_rate_are_those_of_a_longer_run(tmp_path: Path):
    constant = {"optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_steps": 1}}
    whole = opd.train(opd.parse_config(stateful_recipe(tmp_path / "whole", steps=6, **constant))).run
    run = opd.train(opd.parse_config(stateful_recipe(tmp_path / "short", steps=4, **constant))).run
    with pytest.raises(ConfigError, match="steps = 3: step 4 of this run is done; ask for as many or more"):
        opd.Trainer(run).resume(["steps=3"])
    assert opd.Trainer(run).resume(["steps=6"]).finished
    assert_same_training(run, whole)


KEEPS = "a run that continues keeps what it learns from"
ON_REQUEST = "this changes what the run learns from here on; add --allow-changes"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=0.1", rf"^optimizer.lr = 0.1: {ON_REQUEST}"),
        ("seed=2", KEEPS),
        ("compute.dtype=bfloat16", rf'^compute.dtype = "bfloat16": {KEEPS}'),
        ("sampling.group_size=3", KEEPS),
        ("tasks.first.weight=2.0", KEEPS),
        ("evaluation.num_prompts=2", ON_REQUEST),  # the table's rows would not be those of the student before
        ("teachers.evn.model=x", r"this run has no teacher 'evn' \(even, odd\); did you mean 'even'\?"),
        ("output=elsewhere", "a run is where its folder is; move the folder"),
    ],
)
def test_what_a_run_learns_from_may_not_change(tmp_path: Path, override: str, line: str):
    config = opd.parse_config(toy_recipe(tmp_path))
    with pytest.raises(ConfigError, match=line):
        resumed_config(config, [override])


def test_a_run_without_evaluation_is_evaluated_on_as_many_prompts_as_asked_for(tmp_path: Path):
    run = opd.train(opd.parse_config(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}))).run
    noted = (run / "config.json").read_bytes()
    with pytest.raises(opd.OpdError, match=r"such as evaluation.num_prompts=128"):
        opd.Trainer(run).evaluate()
    rows = opd.Trainer(run).evaluate(["evaluation.num_prompts=3"])
    assert {row.after.total for row in rows} == {3}
    assert {row.before for row in rows} == {None}
    assert (run / "config.json").read_bytes() == noted
    with pytest.raises(ConfigError, match=r"optimizer.lr = 0.1: a run is evaluated as it was trained"):
        opd.Trainer(run).evaluate(["optimizer.lr=0.1"])


def test_a_second_process_is_refused_before_it_reads_anything(tmp_path: Path):
    run = stopped(stateful_recipe(tmp_path, steps=6))
    (run / "config.json").write_text("{")  # which would be the first error otherwise
    with (
        RunFolder(run).locked(),
        pytest.raises(opd.OpdError, match="another process trains in run folder"),
    ):
        opd.Trainer(run).resume(["compute.max_tokens=512"])


def test_a_finished_run_keeps_the_configuration_that_it_was_made_with(tmp_path: Path):
    run = opd.train(opd.parse_config(stateful_recipe(tmp_path, steps=2))).run
    noted = (run / "config.json").read_bytes()
    assert opd.Trainer(run).resume(["compute.max_tokens=512"]).finished
    assert (run / "config.json").read_bytes() == noted


def test_an_adapter_that_is_gone_says_how_to_name_its_new_place(tmp_path: Path):
    run = stopped(stateful_recipe(tmp_path, steps=6))
    (tmp_path / "adapter").rename(tmp_path / "moved")
    for go_on in (opd.Trainer.resume, opd.Trainer.evaluate):
        with pytest.raises(opd.OpdError, match=r"is not a folder here; if it has moved, add teachers.odd.adapter=PATH"):
            go_on(opd.Trainer(run))
    assert opd.Trainer(run).resume([f"teachers.odd.adapter={tmp_path}/moved"]).finished


def test_where_and_how_it_runs_may(tmp_path: Path):
    tree = toy_recipe(tmp_path) | {"backend": "ray", "cluster": {"learner_ranks": 2, "max_staleness": 1}}
    config = opd.parse_config(tree)
    overrides = [
        "cluster.learner_ranks=4", "cluster.address=auto", "cluster.engines=3", "remote.attempts=9", "checkpoint.keep=5",
        "compute.max_tokens=512", "sampling.max_rows=3", "episodes.max_concurrent=2", "logging.samples_every=0",
        "seed=0",  # as it is
    ]  # fmt: skip
    moved = resumed_config(config, overrides)
    assert {key for key, _, _ in config_changes(config, moved)} == {o.partition("=")[0] for o in overrides[:-1]}
    assert moved.cluster.learner_ranks == 4
    assert moved.cluster.max_staleness == 1
    for refused in ("cluster.max_staleness=0", "cluster.mixed_precision=true", "backend=local"):
        with pytest.raises(
            ConfigError, match=r"may change is where and how it runs|remove \[cluster\], or write backend = "
        ):
            resumed_config(config, [refused])


def test_an_override_that_is_none_gets_one_line(tmp_path: Path):
    config = opd.parse_config(toy_recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"override 'steps' is not of the form key=value"):
        resumed_config(config, ["steps"])
    with pytest.raises(ConfigError, match=r"unknown key 'remote.attemps'; did you mean 'attempts'"):
        resumed_config(config, ["remote.attemps=3"])


def test_a_folder_stays_locked_when_its_configuration_is_replaced(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", opd.parse_config(toy_recipe(tmp_path)))
    with folder.locked():
        folder.write_text("config.json", "{}")
        with pytest.raises(opd.OpdError, match="another process trains in run folder"), RunFolder(folder.path).locked():
            pass
