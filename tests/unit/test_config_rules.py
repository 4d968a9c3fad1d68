"""The ranges of a configuration's values and the rules across its keys, each with its message."""

import json
from typing import Any

import pytest
from factories import config_tree, fault, put

from opd.config import dump_config, parse_config

# --- ranges ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("steps", 0),
        ("temperature", 0.0),
        ("temperature", float("inf")),
        ("trainable", "half"),
        ("lora.rank", 0),
        ("lora.alpha", 0),
        ("sampling.prompts_per_step", 0),
        ("sampling.group_size", 0),
        ("sampling.max_new_tokens", 0),
        ("sampling.max_rows", 0),
        ("objective.type", "exactly"),
        ("objective.discount", 1.5),
        ("objective.discount", -0.1),
        ("objective.clip_low", 0.0),
        ("objective.clip_low", 1.0),
        ("objective.clip_high", 0.0),
        ("objective.epochs", 0),
        ("objective.constant", 0.0),
        ("objective.teacher_logprob_floor", 0.0),
        ("reward.coef", -0.1),
        ("reward.baseline", "mean"),
        ("optimizer.lr", 0.0),
        ("optimizer.lr", float("nan")),
        ("optimizer.eps", 0.0),
        ("optimizer.weight_decay", -1.0),
        ("optimizer.max_grad_norm", 0.0),
        ("optimizer.schedule", "step"),
        ("optimizer.warmup_steps", -1),
        ("optimizer.final_lr_fraction", 1.1),
        ("compute.dtype", "float16"),
        ("compute.max_tokens", 0),
        ("compute.threads", -1),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("evaluation.num_prompts", -1),
        ("logging.samples_every", -1),
        ("tasks.words.weight", 0.0),
        ("tasks.words.verifier", "regex"),
        ("tasks.sums.size", 0),
        ("tasks.sums.held_out_size", -1),
        ("tasks.sums.seed", -1),
        ("tasks.sums.weight", -1.0),
        ("steps", "many"),
        ("optimizer", 3),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_found(key, value):
    assert fault(put(key, value)).startswith(f"{key} = {value!r}: ")


@pytest.mark.parametrize("value", [3, True, [1]])
def test_a_wrong_type_in_a_choice_of_types_is_reported_under_the_key_of_the_recipe(value):
    assert fault(put("lora.target_modules", value)).startswith("lora.target_modules")
    assert "lora.target_modules.str" not in fault(put("lora.target_modules", value))


@pytest.mark.parametrize("table", ["teachers", "tasks"])
def test_a_run_needs_a_teacher_and_a_task(table):
    assert fault(config_tree(**{table: {}})).startswith(f"{table} = {{}}: ")


def test_a_task_of_an_unknown_type_lists_the_types():
    message = fault(put("tasks.words.type", "folder"))
    assert message.startswith("tasks.words")
    assert "'file'" in message
    assert "'reasoning_gym'" in message


def test_a_task_without_a_type_is_told_so():
    data = config_tree()
    del data["tasks"]["words"]["type"]
    message = fault(data)
    assert message.startswith("tasks.words")
    assert "type" in message


# --- cross-field rules ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teachers": {"even": {}, "odd": {"model": "m"}}},
            "teachers.even: set exactly one of 'model' (hub id, folder, GGUF file), 'adapter' (a LoRA folder), 'url'",
        ),
        (
            {"teachers": {"even": {"model": "m", "adapter": "a"}, "odd": {"model": "m"}}},
            "teachers.even: set exactly one of 'model' (hub id, folder, GGUF file), 'adapter' (a LoRA folder), 'url'",
        ),
        ({"sampling": {"top_p": 0.9}}, "sampling: top_p and top_k sampling are refused"),
        ({"sampling": {"top_k": 5}}, "sampling: top_p and top_k sampling are refused"),
        (
            {"objective": {"type": "immediate", "discount": 0.5}},
            "objective: type = 'immediate' has no future part to discount; drop discount or write type = 'to_go'",
        ),
        (
            {"objective": {"discount": 0.5}},
            "objective: type = 'exact' has no future part to discount; drop discount or write type = 'exact_to_go'",
        ),
        (
            {"objective": {"normalizer": "constant"}},
            "objective: normalizer = 'constant' and a value for 'constant' go together",
        ),
        (
            {"objective": {"constant": 5.0}},
            "objective: normalizer = 'constant' and a value for 'constant' go together",
        ),
        (
            {"objective": {"type": "to_go"}},
            "objective: type = 'to_go' needs a discount: 0 is the immediate term, 1 the unbiased sum",
        ),
        (
            {"trainable": "full", "compute": {"dtype": "bfloat16"}},
            "trainable = 'full' needs compute.dtype = 'float32', got 'bfloat16'",
        ),
        (
            {"objective": {"type": "to_go", "discount": 0.5, "epochs": 2}},
            "objective: epochs > 1 needs loss = 'ppo': REINFORCE has no ratio for a student that has changed",
        ),
        (
            {"objective": {"loss": "ppo"}},
            "loss = 'ppo' clips sampled advantages; type = 'exact' without a reward has none: write loss = 'reinforce'",
        ),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer: betas must lie in [0, 1), got [0.9, 1.0]"),
        ({"optimizer": {"betas": [-0.1, 0.5]}}, "optimizer: betas must lie in [0, 1), got [-0.1, 0.5]"),
        (
            {"reward": {"coef": 1.0}},
            "reward.baseline = 'leave_one_out' compares the samples of one prompt: set sampling.group_size >= 2, "
            "or reward.baseline = 'none'",
        ),
        (
            {"reward": {"coef": 1.0, "baseline": "grpo"}},
            "reward.baseline = 'grpo' compares the samples of one prompt",
        ),
        (
            {"tasks": {"words": {"type": "file", "path": "w", "teacher": "evn"}}},
            "tasks.words.teacher = 'evn' is no teacher of [teachers] (even, odd); did you mean 'even'?",
        ),
    ],
)
def test_rules_across_keys_say_what_to_write_instead(changes, message):
    assert fault(config_tree(**changes)).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"type": "to_go", "discount": 0.5}},
        {"objective": {"type": "to_go", "discount": 0.0}},
        {"objective": {"normalizer": "constant", "constant": 5.0}},
        {"objective": {"type": "immediate", "loss": "ppo", "epochs": 3}},
        {"reward": {"coef": 1.0}, "sampling": {"group_size": 2}},
        {"reward": {"coef": 1.0, "baseline": "none"}},
        {"reward": {"coef": 0.0, "baseline": "grpo"}},
        {"steps": 5, "optimizer": {"schedule": "constant"}},
        {"steps": 6},
        {"tasks": {"words": {"type": "file", "path": "w"}}},  # its records name their teachers
        {"sampling": {"top_p": 1.0, "top_k": 0}},
    ],
)
def test_combinations_that_make_sense_are_accepted(changes):
    config = parse_config(config_tree(**changes))
    assert parse_config(json.loads(dump_config(config))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"type": "exakt"}}, "; did you mean 'exact'?"),
        (
            {"detectors": {"goodhart": "stop"}},
            "detectors.goodhart = 'stop': expected a table of keys (action, memory, drop, gain)",
        ),
        ({"logging": {"writers": "trackio"}}, 'valid list, such as ["trackio"]'),
    ],
)
def test_a_value_of_another_kind_is_told_what_to_write(changes: dict[str, Any], message: str):
    assert message in fault(config_tree(**changes))


def test_a_rule_that_is_none_names_the_nearest():
    task = {"type": "file", "path": "p", "teacher": "even"}
    assert "did you mean 'tool_call'?" in fault(
        config_tree(tasks={"first": task | {"checks": {"rules": ["toolcall"]}}})
    )
