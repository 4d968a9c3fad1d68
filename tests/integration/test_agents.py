"""Training agents end to end on toy models: tools, several turns, resume, warm-up, one's own environment."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import prompt, toy_recipe
from games import always_echo

import opd
from opd.config import EpisodesConfig, ToolTask
from opd.data.tasks import read_tasks
from opd.episodes.tool_problems import ToolProblems
from opd.local.build import build


def agents(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two tool tasks, a teacher each; a toy student that never makes a call."""
    tree = toy_recipe(folder, **changes)
    tree["tasks"] = {
        "calculator": {"type": "tools", "problems": "calculator", "teacher": "even", "size": 20, "held_out_size": 4},
        "lookup": {"type": "tools", "problems": "lookup", "teacher": "odd", "size": 20, "held_out_size": 4},
    }
    for model in ("student", "even", "odd"):  # a toy's context is for short prompts
        path = folder / model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 1200}))
    return tree


def test_a_run_with_tools_trains_evaluates_and_reads_back(tmp_path: Path):
    result = opd.train(opd.parse_config(agents(tmp_path, steps=2)))
    assert result.finished
    for item in opd.read_rollouts(result.run, 1):
        assert item.rollout.prompt.tools[0]["function"]["name"] in ("calculator", "lookup")
        assert item.rollout.reward == 0.0
        assert item.rollout.messages[-1]["content"] == item.rollout.response
    assert {row.task for row in result.parity} == {"calculator", "lookup"}


def several_turns(folder: Path, **changes: Any) -> Any:
    """A student that ends some of its turns, so that episodes go on."""
    sampling = {"prompts_per_step": 16, "group_size": 2, "max_new_tokens": 30}
    tree = toy_recipe(folder, sampling=sampling, **changes)
    return opd.parse_config(tree | {"temperature": 3.0, "evaluation": {"num_prompts": 2}})


def test_an_environment_of_ones_own_speaks_between_the_turns(tmp_path: Path):
    config = several_turns(tmp_path, steps=2)
    result = opd.train(config, environment=always_echo)
    metrics = opd.read_metrics(result.run)
    turns = [sum(t.author == "student" for t in s.rollout.turns) for s in opd.read_rollouts(result.run, 1)]
    assert metrics[0]["episode/turns/mean"] == np.mean(turns)
    for item in opd.read_rollouts(result.run, 1):
        authors = [t.author for t in item.rollout.turns]
        assert authors[0] == "prompt"
        assert authors[-1] == "student"
        assert item.rollout.events.get("heard", 0) == authors.count("student") - (item.rollout.finish == "length")
        assert len(item.score.logprobs) == len(item.rollout.token_ids)  # type: ignore[union-attr]  # none failed
    with pytest.raises(opd.OpdError, match=r"was started with environment from Python"):
        opd.Trainer(result.run).resume()


def test_scores_and_gradients_of_several_turns_are_those_of_plain_passes(tmp_path: Path):
    """The sampled log-probabilities of every turn, those behind observations too, against one plain forward pass."""
    from factories import plain_logprobs, toy_model

    config = several_turns(tmp_path)
    backend = build(config, always_echo)
    prompts = [prompt(f"p{i}", "hi", teacher="even") for i in range(12)]
    rollouts = backend.sampler().sample(prompts, num_samples=2, seed=(3,))
    assert max(sum(t.author == "student" for t in r.turns) for r in rollouts) > 1
    student, teacher = toy_model(0), toy_model(1)
    for item in backend.teachers(keep_hidden=False).score(rollouts):
        rollout = item.rollout
        plain = plain_logprobs(student, rollout, temperature=3.0)
        np.testing.assert_allclose(rollout.rollout_logprobs[rollout.loss_mask], plain, atol=2e-4)
        plain = plain_logprobs(teacher, rollout, temperature=3.0)
        np.testing.assert_allclose(item.score.logprobs[rollout.loss_mask], plain, atol=2e-4)  # type: ignore[union-attr]  # none failed


def test_the_same_seed_gives_the_same_episodes_however_they_are_split(tmp_path: Path):
    config = several_turns(tmp_path)
    prompts = [prompt(f"p{i}", "hi", teacher="even") for i in range(6)]
    whole = build(config, always_echo).sampler().sample(prompts, num_samples=2, seed=(3,))
    few = config.model_copy(update={"sampling": config.sampling.model_copy(update={"max_rows": 3})})
    split = build(few, always_echo).sampler().sample(prompts, num_samples=2, seed=(3,))
    narrow = config.model_copy(update={"episodes": EpisodesConfig(max_concurrent=12)})
    again = build(narrow, always_echo).sampler().sample(prompts, num_samples=2, seed=(3,))
    for a, b, c in zip(whole, split, again, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()


def test_a_killed_run_of_agents_goes_on_as_if_it_had_not_been(tmp_path: Path):
    tree = agents(tmp_path, steps=4)
    whole = opd.train(opd.parse_config(tree)).run
    stopped = opd.parse_config(tree | {"output": str(tmp_path / "stopped")})

    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        opd.train(stopped, callbacks=[stop])
    resumed = opd.Trainer(tmp_path / "stopped").resume().run
    drop = ("time/",)
    plain = [
        [{k: v for k, v in line.items() if not k.startswith(drop)} for line in opd.read_metrics(run)]
        for run in (whole, resumed)
    ]
    assert plain[0] == plain[1]


def test_warming_up_moves_the_student_to_its_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = toy_recipe(tmp_path / "plain", steps=2, evaluation={"num_prompts": 0})
    warm = toy_recipe(tmp_path / "warm", steps=2, evaluation={"num_prompts": 0}, warmup={"steps": 50, "lr": 3e-2})
    first = [opd.read_metrics(opd.train(opd.parse_config(t)).run)[0]["kl/token/mean"] for t in (plain, warm)]
    assert first[1] < 0.8 * first[0]
    assert "warm-up 50/50: nll/token" in capsys.readouterr().out


def test_a_warm_run_that_was_stopped_is_not_warmed_up_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}, warmup={"steps": 2})
    whole = opd.train(opd.parse_config(tree)).run

    def stop(report: Any) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        opd.train(opd.parse_config(tree | {"output": str(tmp_path / "again")}), callbacks=[stop])
    capsys.readouterr()
    resumed = opd.Trainer(tmp_path / "again").resume().run
    assert "warm-up" not in capsys.readouterr().out
    lines = [opd.read_metrics(run) for run in (whole, resumed)]
    assert [line["kl/token/mean"] for line in lines[0]] == [line["kl/token/mean"] for line in lines[1]]


@pytest.mark.parametrize("problems", ["calculator", "lookup"])
def test_problems_are_distinct_solvable_and_the_same_again(problems: Any):
    config = ToolTask(type="tools", problems=problems, teacher="t", size=200, held_out_size=50)
    task, again = (ToolProblems("x", config, EpisodesConfig()) for _ in range(2))
    train, held_out = task.prompts("train"), task.prompts("held_out")
    assert len({(p.messages[0]["content"], p.answer) for p in [*train, *held_out]}) == 250
    assert [p.id for p in again.prompts("train")] == [p.id for p in train]


@pytest.mark.parametrize("problems", ["calculator", "lookup"])
def test_a_solution_wins_and_an_answer_without_the_tool_is_judged_alike(problems: Any, tmp_path: Path):
    import asyncio

    config = ToolTask(type="tools", problems=problems, teacher="t", size=5, held_out_size=0)
    task = ToolProblems("x", config, EpisodesConfig())
    for item in task.prompts("train"):
        environment = task.environment(item)
        call = task.solution(item, item.messages)
        assert call is not None
        seen = asyncio.run(environment.step({"role": "assistant", "content": call}))
        assert not seen.done
        [observation] = seen.observations
        assert observation["content"] == item.answer
        assert asyncio.run(environment.step({"role": "assistant", "content": str(item.answer)})).reward == 1.0
        assert asyncio.run(environment.step({"role": "assistant", "content": "no idea"})).reward == 0.0


def test_files_may_have_tools_and_demonstrations(tmp_path: Path):
    path = tmp_path / "demo.jsonl"
    recorded = [
        {"role": "assistant", "content": "<tool_call>x</tool_call>"},
        {"role": "tool", "content": "error"},
        {"role": "assistant", "content": "bye"},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    path.write_text(json.dumps({"id": 1, "prompt": "q", "tools": [tool], "demonstration": recorded}) + "\n")
    tree = toy_recipe(tmp_path)
    tree["tasks"]["first"]["path"] = str(path)
    [found] = read_tasks(opd.parse_config(tree), None).prompts["first"]["train"]
    assert found.tools == (tool,)
    assert [dict(m) for m in found.demonstration] == recorded
    path.write_text(json.dumps({"id": 1, "prompt": "q", "demonstration": recorded[1:]}) + "\n")
    with pytest.raises(opd.OpdError, match="must begin and end with a message of role 'assistant'"):
        read_tasks(opd.parse_config(tree), None)


def test_an_alarm_that_stops_saves_the_run_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every response of a toy is cut, from the first step on: the detector of truncation has its case."""
    detectors = {"truncation": {"action": "stop", "patience": 2, "memory": 1}}
    tree = toy_recipe(tmp_path, steps=6, detectors=detectors, evaluation={"num_prompts": 0})
    tree["sampling"]["max_new_tokens"] = 2
    result = opd.train(opd.parse_config(tree))
    assert not result.finished
    assert result.steps_done < 6
    shown = capsys.readouterr().out
    assert "stopping: step" in shown
    assert f"continue with: opd train --resume {result.run}" in shown
    alarms = [json.loads(line) for line in (result.run / "alarms.jsonl").read_text().splitlines()]
    assert [a["detector"] for a in alarms if a["action"] == "stop"] == ["truncation"]
    assert "detectors/truncation/value" in opd.read_metrics(result.run)[-1]
    resumed = opd.Trainer(result.run).resume()
    assert resumed.finished
    again = [json.loads(line) for line in (result.run / "alarms.jsonl").read_text().splitlines()]
    assert again[: len(alarms)] == alarms


def test_a_held_out_outcome_by_another_grader(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=4)
    tree["tasks"]["second"] |= {"verifier": "none", "grader": "exact"}
    tree["evaluation"] = {"num_prompts": 0, "every": 2, "held_out_prompts": 3}
    lines = opd.read_metrics(opd.train(opd.parse_config(tree)).run)
    assert ["held_out/reward/second/mean" in line for line in lines] == [False, True, False, True]
    assert "reward/second/mean" not in lines[0]
    assert lines[1]["held_out/reward/mean"] == lines[1]["held_out/reward/second/mean"]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("f", "must be a list of JSON schemas, got str"),
        ([{"type": "function"}], "'tools': "),
        (["f"], "must be a list of JSON schemas"),
    ],
)
def test_tools_that_are_none_are_refused_with_their_line(tools: Any, reason: str, tmp_path: Path):
    path = tmp_path / "tools.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": "q", "tools": tools}) + "\n")
    tree = toy_recipe(tmp_path)
    tree["tasks"]["first"]["path"] = str(path)
    with pytest.raises(opd.OpdError, match=r"tools\.jsonl, line 1: ") as caught:
        read_tasks(opd.parse_config(tree), None)
    assert reason in str(caught.value)
