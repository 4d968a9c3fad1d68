"""What a user can mend in a recipe or in its prompts ends the command with one line and exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, sft_recipe, toy_recipe, write_toml
from toy_runs import bench as bench
from toy_runs import invoke, refuse, refuse_tree
from toy_runs import recipe as recipe
from toy_runs import tree as tree

import opd

# What a recipe says


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("stepz=3", "stepz", "steps"),
        ("optimizer.leaning_rate=1", "optimizer.leaning_rate", None),
        ("optimizer.betaz=[0.1, 0.2]", "optimizer.betaz", "betas"),
        ("sampling.groupsize=2", "sampling.groupsize", "group_size"),
        ("teachers.even.modle=a", "teachers.even.modle", "model"),
        ("tasks.first.pth=a", "tasks.first.pth", "path"),
        ("smapling.top_p=1.0", "smapling", "sampling"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    recipe: str, tmp_path: Path, override: str, key: str, hint: str | None
):
    line = refuse(tmp_path, "train", recipe, override)
    assert f"unknown key '{key}'" in line
    assert (f"did you mean '{hint}'?" in line) if hint else True
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_file_is_refused_too(tree: dict[str, Any], tmp_path: Path):
    line = refuse_tree(tree | {"temprature": 1.0}, tmp_path)
    assert line == f"opd: {tmp_path}/recipe.toml: unknown key 'temprature'; did you mean 'temperature'?"


@pytest.mark.parametrize(
    "override",
    [
        "temperature=0",
        "temperature=-1",
        "temperature=nan",
        "temperature=inf",
        "steps=0",
        "steps=2.5",
        "seed=-1",
        "optimizer.lr=0",
        "optimizer.lr=fast",
        "optimizer.final_lr_fraction=1.5",
        "sampling.group_size=0",
        "sampling.max_new_tokens=0",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "lora.rank=0",
        "objective.clip_low=1",
        "objective.teacher_logprob_floor=1",
        "objective.type=forward",
        "reward.coef=-1",
        "compute.dtype=float16",
        "trainable=half",
        "teachers={}",
        "tasks={}",
        "tasks.first.weight=0",
        "logging.writers=['wandb']",
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(recipe: str, tmp_path: Path, override: str):
    line = refuse(tmp_path, "train", recipe, override)
    assert override.partition("=")[0] in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["objective.discount=0.5"], "no future part to discount; drop discount or write type = 'exact_to_go'"),
        (["objective.type=immediate", "objective.epochs=2"], "epochs > 1 needs loss = 'ppo'"),
        (["objective.loss=ppo"], "write loss = 'reinforce'"),
        (["objective.normalizer=constant"], "go together"),
        (["objective.constant=3"], "go together"),
        (["reward.coef=1", "sampling.group_size=1"], "sampling.group_size >= 2"),
        (["tasks.first.teacher=evn"], "did you mean 'even'?"),
        (["optimizer.betas=[0.9, 1.0]"], "betas must lie in [0, 1), got [0.9, 1.0]"),
        (["tasks.first.type=csv"], "must be 'file', 'python', 'reasoning_gym', 'textarena' or 'tools', got 'csv'"),
        (["sampling.top_p=0.9"], "untruncated distribution"),
        (["sampling.top_k=50"], "untruncated distribution"),
    ],
)
def test_a_senseless_combination_is_refused_with_what_to_write_instead(
    recipe: str, tmp_path: Path, overrides: list[str], reason: str
):
    assert reason in refuse(tmp_path, "train", recipe, *overrides)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_two_sources_or_none_is_refused(tree: dict[str, Any], tmp_path: Path):
    for source in ({}, {"model": "a/b", "adapter": "c"}):
        line = refuse_tree(tree | {"teachers": tree["teachers"] | {"even": source}}, tmp_path)
        assert "teachers.even" in line
        assert "exactly one of 'model'" in line


@pytest.mark.parametrize("override", ["steps", "=3", "steps.x=1", ""])
def test_a_malformed_override_is_refused(recipe: str, tmp_path: Path, override: str):
    assert f"override '{override}'" in refuse(tmp_path, "train", recipe, override)


@pytest.mark.parametrize("command", ["train", "check", "sft"])
def test_a_missing_recipe_is_refused(tmp_path: Path, command: str):
    assert f"recipe '{tmp_path}/none.toml' does not exist" in refuse(tmp_path, command, tmp_path / "none.toml")


def test_a_folder_or_a_broken_file_as_recipe_is_refused(tmp_path: Path):
    assert "is a folder" in refuse(tmp_path, "train", tmp_path)
    (tmp_path / "broken.toml").write_text("steps = = 3")
    assert "is not valid TOML" in refuse(tmp_path, "train", tmp_path / "broken.toml")
    (tmp_path / "broken.toml").write_bytes(b"\xff\xfe")
    assert "is not valid TOML" in refuse(tmp_path, "train", tmp_path / "broken.toml")


def test_a_recipe_under_a_file_is_refused(recipe: str, tmp_path: Path):
    assert "recipe.toml" in refuse(tmp_path, "train", f"{recipe}/x.toml")


def test_neither_recipe_nor_resume_or_both_is_refused(recipe: str, tmp_path: Path):
    assert "give a recipe, or --resume RUN" in refuse(tmp_path, "train")
    assert "give a recipe, or --resume RUN" in refuse(tmp_path, "train", recipe, "--resume", tmp_path)


def test_fine_tuning_goes_on_with_the_keys_that_it_began_with(tmp_path: Path):
    line = refuse(tmp_path, "sft", "--resume", tmp_path, "steps=5")
    assert "the recipe that the run was started with), 'steps=5' has no effect" in line


@pytest.mark.parametrize("arguments", [["train", "--resume"], ["eval"]])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, arguments: list[str]):
    assert "is no run folder" in refuse(tmp_path, *arguments, tmp_path)
    assert "is no run folder" in refuse(tmp_path, *arguments, tmp_path / "none")


def test_a_run_with_a_damaged_configuration_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"steps": ')
    assert "is damaged" in refuse(tmp_path, "train", "--resume", tmp_path)


def test_a_fine_tuning_run_cannot_be_resumed_as_a_distillation(bench: dict[str, Any], tmp_path: Path):
    tree = sft_recipe(tmp_path, bench["student"], steps=1, optimizer={"warmup_steps": 0}, evaluation={"num_prompts": 0})
    assert invoke("sft", write_toml(tmp_path / "sft.toml", tree)).exit_code == 0
    line = refuse(tmp_path, "train", "--resume", tree["output"])
    assert line.endswith(
        f"is a run of 'opd sft', not of 'opd train'; continue it with: opd sft --resume {tree['output']}"
    )


# What the prompts say


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": \n', "line 2: not valid JSON"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}\n', "line 3: id 'first:a' was used in line 1"),
        ('{"id": "a", "prompt": " "}\n', "line 1: 'prompt' is empty"),
        ('{"id": "a", "messages": []}\n', "line 1: 'messages' must be a non-empty list"),
        ('{"id": "a", "messages": [{"role": "user", "content": ""}]}\n', "line 1: every message is empty"),
        (
            '{"id": "a", "question": "x"}\n',
            "line 1: give exactly one of 'messages' and 'prompt' (or 'conversations'), or choose a column of yours ",
        ),
        ('{"id": " ", "prompt": "x"}\n', "line 1: 'id' must be a non-empty string"),
        ('{"id": "a", "promt": "x"}\n', "line 1: unknown key 'promt'; did you mean 'prompt'?"),
        ('{"id": "a", "prompt": "x", "teacher": "evn"}\n', "teacher 'evn' is not in [teachers]"),
        ('["a"]\n', "record 1: expected an object of keys and values, got str"),
        ("\n\n", "no prompts"),
        ("", "no prompts"),
    ],
)
def test_a_bad_prompt_file_is_refused_by_its_line(tree: dict[str, Any], tmp_path: Path, text: str, reason: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    tree["tasks"]["first"]["path"] = str(path)
    line = refuse_tree(tree, tmp_path)
    assert reason in line
    assert str(path) in line or "'first:a'" in line
    assert not (tmp_path / "run").exists()


def test_a_line_separator_within_a_prompt_does_not_cut_its_record(tree: dict[str, Any], tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "a", "prompt": "one\u2028two\x85three"}\n{"id": "b", "prompt": "x"}\n', encoding="utf-8")
    tree["tasks"]["first"]["path"] = str(path)
    result = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert result.exit_code == 0, result.stderr


def test_a_prompt_file_that_is_missing_or_no_text_is_refused(tree: dict[str, Any], tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    tree["tasks"]["first"]["path"] = str(path)
    assert f"prompt file '{path}' does not exist (tasks.first.path)" in refuse_tree(tree, tmp_path)
    path.write_bytes(b'{"prompt": "a"}\n\xff')
    assert "line 2: not UTF-8" in refuse_tree(tree, tmp_path)


def test_a_folder_as_prompt_file_is_refused(tree: dict[str, Any], tmp_path: Path):
    tree["tasks"]["first"]["path"] = str(tmp_path)
    assert f"prompt file '{tmp_path}'" in refuse_tree(tree, tmp_path)


def test_a_record_without_a_teacher_is_refused_where_the_task_names_none(tree: dict[str, Any], tmp_path: Path):
    del tree["tasks"]["first"]["teacher"]
    assert "line 1: no teacher" in refuse_tree(tree, tmp_path)


@pytest.mark.parametrize("who", ["student", "even"])
def test_a_prompt_longer_than_the_context_is_refused_by_its_id(tree: dict[str, Any], tmp_path: Path, who: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"id": "short", "prompt": "x"}\n' + json.dumps({"id": "long", "prompt": "x" * 100}) + "\n")
    tree["tasks"]["first"]["path"] = str(path)
    short = save_toy(tmp_path / "short", 1, max_context=100)
    if who == "student":
        tree["student"] = short
    else:
        tree["teachers"]["even"]["model"] = short
    line = refuse_tree(tree, tmp_path)
    name = "the student" if who == "student" else "teacher 'even'"
    assert f"prompt 'first:long': 119 tokens + sampling.max_new_tokens = 6 exceed the context of {name} (100)" in line


def test_a_run_shorter_than_its_warm_up_says_how_far_the_rate_comes(tmp_path: Path):
    tree = toy_recipe(tmp_path, evaluation={"num_prompts": 0}) | {"optimizer": {"lr": 1e-3, "warmup_steps": 5}}
    result = invoke("train", write_toml(tmp_path / "recipe.toml", tree), "--steps", "3")
    assert result.exit_code == 0, result.output
    assert "warmup_steps = 5 is not below steps = 3: the learning rate rises to 50% of optimizer.lr" in result.output
    rates = [line["optim/lr/max"] for line in opd.read_metrics(tree["output"])]
    assert rates == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6])
