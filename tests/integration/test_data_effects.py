"""Data and options of tasks that a run makes no use of are said at start."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import sft_recipe, toy_recipe, write_prompts

import opd
from opd.config import SftConfig, parse_config
from opd.finetune import sft


def warnings_of(tree: dict[str, Any], **callables: Any) -> list[str]:
    findings = opd.Trainer(parse_config(tree), **callables).check()
    return [finding.detail for finding in findings if finding.name == "no effect"]


def one_task(folder: Path, records: list[dict[str, Any]], held_out: list[dict[str, Any]] = (), **options: Any) -> Any:
    """A recipe of one file task of these records."""
    task = {"type": "file", "path": str(folder / "p.jsonl"), "teacher": "even", **options}
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    if held_out:
        (folder / "h.jsonl").write_text("\n".join(map(json.dumps, held_out)))
        task["held_out_path"] = str(folder / "h.jsonl")
    tree = toy_recipe(folder, sampling={"prompts_per_step": 2})
    return tree | {"tasks": {"words": task}, "teachers": {"even": tree["teachers"]["even"]}}


PROMPTS = [{"prompt": f"say {letter}"} for letter in "abc"]
ANSWERED = [{"prompt": f"say {n}", "answer": str(n)} for n in range(3)]


def test_a_recipe_that_uses_all_it_has_says_nothing(tmp_path):
    assert warnings_of(one_task(tmp_path, ANSWERED, [{"prompt": "say 9", "answer": "9"}], verifier="number")) == []


def test_a_step_of_more_prompts_than_there_are_is_said(tmp_path):
    tree = one_task(tmp_path, PROMPTS)
    tree["sampling"] = tree["sampling"] | {"prompts_per_step": 4}
    [line] = warnings_of(tree)
    assert line.startswith("sampling.prompts_per_step = 4 takes 4 prompts of tasks.words per step, and it has 3")


def test_held_out_prompts_that_are_trained_on_are_said(tmp_path):
    [line] = warnings_of(one_task(tmp_path, PROMPTS, [{"id": "h", "prompt": "say b"}, {"prompt": "say z"}]))
    assert line.startswith("1 of 2 held-out prompts of tasks.words are training prompts too, the first 'words:h'")


@pytest.mark.parametrize(
    ("records", "options", "said"),
    [
        (ANSWERED, {"verifier": "none"}, "3 answers of tasks.words: verifier = 'none'; choose a verifier"),
        (PROMPTS, {"verifier": "math"}, "tasks.words.verifier = 'math': no prompt has an answer"),
        (
            ANSWERED,
            {"grader": "number"},
            'tasks.words.grader = "number": it grades held-out rewards, and evaluation.every = 0',
        ),
    ],
)
def test_answers_and_verifiers_without_each_other_are_said(tmp_path, records, options, said):
    tree = one_task(tmp_path, records, **options)
    [line] = warnings_of(tree)
    assert line.startswith(said)
    key = next(iter(options))
    replaced = [f"tasks.words.{key} = '{options[key]}': the reward function takes its place"]
    shown = {"none": [], "math": replaced}
    given = warnings_of(tree, reward=lambda prompt, response: 1.0)
    assert given == shown.get(options[key], [line])


def test_a_grader_without_an_answer_is_said_beside_one_that_has_some(tmp_path):
    tree = one_task(tmp_path, PROMPTS, verifier="none", grader="number")
    tree["evaluation"] = {"num_prompts": 0, "every": 2}
    other = tmp_path / "other"
    other.mkdir()
    more = one_task(other, ANSWERED, [{"prompt": "say 9", "answer": "9"}], verifier="number")["tasks"]["words"]
    assert warnings_of(tree | {"tasks": tree["tasks"] | {"more": more}}) == [
        "tasks.words.grader = 'number': no prompt has an answer (the key 'answer' of its record)"
    ]


def test_fine_tuning_says_it_too(tmp_path, capsys):
    tree = toy_recipe(tmp_path)
    recipe = sft_recipe(tmp_path / "sft", tree["student"], batch_size=16, steps=2)
    recipe["tasks"]["answers"]["held_out_path"] = write_prompts(tmp_path / "same.jsonl", 2)
    sft(parse_config(recipe, kind=SftConfig))
    said = capsys.readouterr().out
    assert "warning: no effect: batch_size = 16 takes 16 prompts of tasks.answers per batch, and it has 12" in said
    assert "warning: no effect: 2 of 2 held-out prompts of tasks.answers are training prompts too" in said
