"""The Trainer: prompts from Python, callbacks, results, runs that exist, checkpoints that are evaluated and written."""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import toy_recipe, write_toml
from toy_runs import invoke, one_line

import opd
from opd.interrupts import Interrupts

RECORDS = [{"question": f"say {word}", "solution": word, "level": n} for n, word in enumerate("abcdef")]


def tree_without_tasks(folder: Path, **changes: Any) -> dict[str, Any]:
    tree = toy_recipe(folder, steps=2, evaluation={"num_prompts": 0}, **changes)
    tree["teachers"] = {"even": tree["teachers"]["even"]}
    del tree["tasks"]
    return tree


def as_messages(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": r["question"], "answer": r["solution"], "level": r["level"]} for r in records]


def test_prompts_and_a_reward_of_ones_own_train_without_a_recipe_file(tmp_path: Path):
    seen: list[tuple[str, str | None, Any]] = []

    def reward(prompt: opd.Prompt, response: str) -> float:
        seen.append((prompt.messages[-1]["content"], prompt.answer, prompt.meta["level"]))
        return 1.0

    trainer = opd.Trainer(tree_without_tasks(tmp_path), prompts=iter(as_messages(RECORDS)), reward=reward)
    assert all(finding.passed for finding in trainer.check())
    result = trainer.fit()
    assert result.finished
    assert set(seen) <= {(r["question"], r["solution"], r["level"]) for r in RECORDS}
    assert result.metrics["reward/mean"] == 1.0
    assert [line["step"] for line in result.history] == [1, 2]


def test_a_finding_prints_as_the_line_of_opd_check(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
    shown = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    found = [str(finding) for finding in opd.Trainer(tree).check()]
    assert found == shown.output.splitlines()[1:]
    assert {line[:6] for line in found} == {"ok    ", "warn  "}
    assert str(opd.Finding("a rule", False, "no")) == "FAIL  a rule: no"


def test_a_column_mapping_renames_columns_of_a_data_set(tmp_path: Path):
    from datasets import Dataset

    tree = tree_without_tasks(tmp_path)
    tree["tasks"] = {"mine": {"type": "python", "columns": {"prompt": "question", "answer": "solution"}}}
    trainer = opd.Trainer(tree, prompts=Dataset.from_list(RECORDS), held_out_prompts=RECORDS[:1])
    assert trainer.fit().finished
    prompts = {s.rollout.prompt.messages[-1]["content"] for s in opd.read_rollouts(tree["output"])}
    assert prompts <= {r["question"] for r in RECORDS}


def test_a_run_with_prompts_from_python_asks_for_them_again(tmp_path: Path):
    result = opd.train(tree_without_tasks(tmp_path), prompts=as_messages(RECORDS))
    with pytest.raises(opd.OpdError, match=r"started with prompts from Python.*prompts=\.\.\.\)\.resume\(\)"):
        opd.Trainer(result.run).resume()
    assert invoke("export", result.run).exit_code == 0  # no prompts are needed to write a student
    assert (result.run / "export" / "adapter_config.json").is_file()
    more = opd.Trainer(result.run, prompts=as_messages(RECORDS)).resume(["steps=3"])
    assert more.steps_done == 3
    with pytest.raises(opd.OpdError, match="training prompts"):
        opd.Trainer(result.run, prompts=as_messages(RECORDS[:3])).resume(["steps=4"])


def test_a_recipe_with_a_python_task_needs_prompts(tmp_path: Path):
    tree = tree_without_tasks(tmp_path) | {"tasks": {"mine": {"type": "python"}}}
    with pytest.raises(opd.OpdError, match=r"tasks.mine has type = 'python': pass its prompts"):
        opd.Trainer(tree).fit()
    with pytest.raises(opd.OpdError, match="held_out_prompts works only together with prompts"):
        opd.Trainer(tree, held_out_prompts=[])


class Recorder(opd.Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_step(self, report: opd.StepReport) -> Mapping[str, float]:
        self.events.append(("step", report.step))
        return {"mine/square": report.step**2}

    async def on_checkpoint(self, step: int, folder: Path) -> None:
        await asyncio.sleep(0)
        self.events.append(("checkpoint", step, (folder / "state.json").is_file()))

    def on_evaluate(self, step: int, metrics: Mapping[str, float], parity: Any) -> None:
        self.events.append(("evaluate", step, sorted(metrics), [row.task for row in parity]))

    def on_end(self, result: opd.Result) -> None:
        self.events.append(("end", result.finished))


def test_callbacks_see_steps_checkpoints_evaluations_and_the_end_and_add_metrics(tmp_path: Path):
    recorder = Recorder()
    tree = toy_recipe(tmp_path, steps=2, checkpoint={"every": 1}, evaluation={"num_prompts": 1, "before_prompts": 0})
    result = opd.train(tree, callbacks=[recorder])
    kinds = [event[0] for event in recorder.events]
    assert kinds == ["step", "checkpoint", "step", "checkpoint", "evaluate", "end"]
    assert recorder.events[1] == ("checkpoint", 1, True)
    assert recorder.events[-1] == ("end", True)
    assert [line["mine/square"] for line in opd.read_metrics(result.run)] == [1, 4]
    assert {row.task for row in result.parity} == set(recorder.events[-2][3])


def test_stop_ends_the_run_as_an_interrupt_does(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=4, evaluation={"num_prompts": 0})
    result = opd.train(tree, callbacks=[lambda report: opd.STOP if report.step == 2 else None])
    assert (result.finished, result.steps_done) == (False, 2)
    assert (result.student / "adapter_config.json").is_file()
    assert (result.run / "curves.png").is_file()
    assert opd.Trainer(result.run).resume().finished


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"kl/token/mean": 1.0}, "which the step already has"),
        ({"mine": float("nan")}, "expected a finite number"),
        ({"no name": 1.0}, "expected a name such as"),
        ({3: 1.0}, "expected a name such as"),
        ({"step": 7.0}, "which the step already has"),
        ("stop", "returned str, expected a mapping of metrics, opd.STOP or None"),
    ],
    ids=str,
)
def test_a_wrong_answer_of_a_callback_saves_first(tmp_path: Path, answer: Any, message: str):
    tree = toy_recipe(tmp_path, steps=3, evaluation={"num_prompts": 0})
    with pytest.raises(opd.OpdError, match=message) as caught:
        opd.train(tree, callbacks=[lambda report: answer if report.step == 2 else None])
    assert "step 2 is saved" in str(caught.value)
    assert opd.Trainer(tree["output"]).resume().finished


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (opd.Callback, "the class Callback"),
        (3, "a callback is int, expected a function"),
        (lambda: None, "expected \\(report\\)"),
    ],
    ids=["a class", "a number", "no argument"],
)
def test_what_is_no_callback_is_refused_before_anything_is_loaded(tmp_path: Path, callback: Any, message: str):
    with pytest.raises(opd.OpdError, match=message):
        opd.Trainer({"student": "none"}, callbacks=[callback])


def test_a_cell_can_be_run_again(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
    first = opd.train(tree)
    with pytest.raises(opd.OpdError, match="exists and is not empty"):
        opd.train(tree)
    assert opd.train({**tree, "steps": 3}, if_exists="resume").steps_done == 3
    with pytest.raises(opd.OpdError, match="this changes what the run learns"):
        opd.train({**tree, "optimizer": {**tree["optimizer"], "lr": 0.5}}, if_exists="resume")
    other = {**tree, "optimizer": {**tree["optimizer"], "lr": 0.5}}
    with pytest.raises(opd.OpdError, match="this changes what the run learns"):
        opd.Trainer(other).resume(["steps=4"])
    with pytest.raises(opd.OpdError, match="seed = 9: a run that continues keeps what it learns from"):
        opd.Trainer({**tree, "seed": 9}).resume(["steps=4"], allow_changes=True)
    assert opd.Trainer({**other, "steps": 4}).resume(allow_changes=True).steps_done == 4
    changes = [json.loads(line)["key"] for line in (first.run / "changes.jsonl").read_text().splitlines()]
    assert sorted(changes) == ["optimizer.lr", "steps", "steps"]
    # the recipe as it was: what the run changed since stays changed
    assert opd.Trainer(tree).resume(["steps=5"]).steps_done == 5
    assert opd.Trainer(first.run).config.optimizer.lr == 0.5
    assert opd.Trainer({**tree, "evaluation": {"num_prompts": 2}}).evaluate(["evaluation.num_prompts=1"])
    with pytest.raises(opd.OpdError, match=r"was started without reward from Python; leave it out"):
        opd.Trainer(first.run, reward=lambda prompt, response: 0.0).resume(["steps=5"])
    again = opd.train(tree, if_exists="overwrite")
    assert again.steps_done == 2
    (first.run / "notes.txt").write_text("mine")
    with pytest.raises(opd.OpdError, match=r"holds 'notes.txt', which opd did not write"):
        opd.train(tree, if_exists="overwrite")
    assert (first.run / "notes.txt").read_text() == "mine"


def test_it_trains_inside_a_running_event_loop(tmp_path: Path):
    async def reward(prompt: opd.Prompt, response: str) -> float:
        await asyncio.sleep(0)
        return 0.5

    async def cell() -> opd.Result:
        tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
        return opd.train(tree, reward=reward)

    assert asyncio.run(cell()).metrics["reward/mean"] == 0.5


def test_teachers_may_be_passed_by_name(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
    source = tree["teachers"].pop("even")
    (where,) = source.values()
    trainer = opd.Trainer(tree, teachers={"even": where})
    assert trainer.config.teachers["even"].model_dump(exclude_defaults=True) == source
    asked = tree | {"objective": {"type": "immediate"}}
    served = opd.Trainer(asked, teachers={"even": "http://127.0.0.1:8000"}).config.teachers["even"]
    assert served.urls == ("http://127.0.0.1:8000",)
    with pytest.raises(opd.OpdError, match=r"teachers\['even'\] is int"):
        opd.Trainer(tree, teachers={"even": 3})


def test_the_learning_rate_changes_on_request_and_the_folder_says_so(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
    run = opd.train(tree).run
    line = one_line(invoke("train", "--resume", run, "steps=3", "optimizer.lr=1e-5"))
    assert "--allow-changes" in line
    assert invoke("train", "--resume", run, "--allow-changes", "steps=3", "optimizer.lr=1e-5").exit_code == 0
    changes = [json.loads(text) for text in (run / "changes.jsonl").read_text().splitlines()]
    assert ("optimizer.lr", 1e-5, 2) in [(c["key"], c["now"], c["after_step"]) for c in changes]
    assert "works only with --resume" in one_line(
        invoke("train", write_toml(tmp_path / "r.toml", tree), "--allow-changes")
    )


def test_overwriting_deletes_only_runs_and_only_once_the_new_one_is_checked(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})
    run = opd.train(tree).run
    before = (run / "metrics.jsonl").read_bytes()
    for broken in ({"student": "/nowhere"}, {"lora": {**tree.get("lora", {}), "start": str(run / "student")}}):
        with pytest.raises(opd.OpdError):
            opd.train({**tree, **broken}, if_exists="overwrite")
        assert (run / "metrics.jsonl").read_bytes() == before
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.json").write_text('{"model": "mine"}')
    (other / "checkpoints" / "epoch1.pt").write_text("weights")
    with pytest.raises(opd.OpdError):
        opd.train({**tree, "output": str(other)}, if_exists="overwrite")
    assert (other / "checkpoints" / "epoch1.pt").read_text() == "weights"


class StopAtCheckpoint(opd.Callback):
    def on_checkpoint(self, step: int, folder: Path) -> Any:
        return opd.STOP


def test_stop_from_a_checkpoint_ends_the_run_there(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=4, checkpoint={"every": 2}, evaluation={"num_prompts": 0})
    assert opd.train(tree, callbacks=iter([StopAtCheckpoint()])).steps_done == 2


def test_prompts_for_a_run_of_files_or_for_two_tasks_are_refused(tmp_path: Path):
    run = opd.train(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})).run
    with pytest.raises(opd.OpdError, match="was started without prompts from Python; leave it out"):
        opd.Trainer(run, prompts=as_messages(RECORDS)).resume(["steps=3"])
    two = tree_without_tasks(tmp_path) | {"tasks": {"a": {"type": "python"}, "b": {"type": "python"}}}
    with pytest.raises(opd.OpdError, match=r"several tasks \(a, b\)"):
        opd.Trainer(two, prompts=as_messages(RECORDS))


def test_a_signal_without_a_terminal_still_stops_after_the_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "__stderr__", SimpleNamespace(fileno=lambda: -1))
    saver = SimpleNamespace(done=3, learner=SimpleNamespace(whole=True))
    interrupts = Interrupts(saver)  # pyright: ignore[reportArgumentType]
    with interrupts.handled():
        signal.raise_signal(signal.SIGINT)
    assert interrupts.stop
