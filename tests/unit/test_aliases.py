"""Keys of other libraries are answered with opd's key, in a form that works when it is pasted."""

import re
import shlex
from typing import Any

import pytest
from factories import config_tree, fault, put

from opd.config import Config, SftConfig, parse_config
from opd.config.aliases import _TABLE
from opd.config.parse import apply_overrides
from opd.errors import ConfigError

NAMES = sorted({name for alias in _TABLE for name in alias.names.split()})
ASKED = """
    lr learning_rate batch_size per_device_train_batch_size train_batch_size lora.r lora_r lora_alpha num_generations rollout.n
    max_new_tokens max_completion_length max_response_length beta lmbda max_steps num_train_epochs gradient_accumulation_steps
    max_grad_norm warmup_steps warmup_ratio weight_decay lr_scheduler_type bf16 gradient_checkpointing save_steps eval_steps
    logging_steps report_to output_dir model_name_or_path teacher_model_name_or_path use_vllm micro_batch_size kl_coef
    entropy_coeff clip_ratio epsilon loss_type reward_weights dataset_name
"""


def recipe_of(kind: Any) -> dict[str, Any]:
    return config_tree() if kind is Config else {k: v for k, v in config_tree().items() if k != "teachers"}


def answer_to(key: str, value: Any, kind: Any) -> str:
    data = recipe_of(kind)
    apply_overrides(data, [f"{key}={value}"], kind=kind)
    return fault(data, kind)


@pytest.mark.parametrize("kind", [Config, SftConfig], ids=["train", "sft"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_with_the_advised_overrides_parses(name: str, kind: Any):
    renamed = next(alias for alias in _TABLE if name in alias.names.split())
    value = renamed.write.partition("=")[2] if not renamed.note else "1"
    if (name, kind) == ("batch_size", SftConfig):  # opd's own key
        data = recipe_of(kind)
        apply_overrides(data, ["batch_size=7"], kind=kind)
        assert parse_config(data, kind=kind).batch_size == 7
        return
    line = answer_to(name, value, kind)
    if kind is SftConfig and "; write " not in line and not line.endswith("; remove this key"):
        assert line.startswith(f"unknown key '{name.partition('.')[0]}'")  # fine-tuning has nothing like it
        return
    assert line.startswith(f"unknown key '{name}': ")
    advised = shlex.split(line.partition("; write ")[2])
    assert bool(advised) != line.endswith("; remove this key")
    data = recipe_of(kind)
    apply_overrides(data, advised, kind=kind)
    assert parse_config(data, kind=kind) != parse_config(recipe_of(kind), kind=kind) or set(advised) <= DEFAULTS


# advice that says what a recipe has anyway
DEFAULTS = {
    "optimizer.schedule=cosine", "optimizer.warmup_steps=5", "optimizer.max_grad_norm=1.0", "optimizer.betas=[0.9, 0.95]",
    "optimizer.eps=1e-8", "sampling.prompts_per_step=32", "batch_size=32", "compute.max_tokens=2048", "steps=100",
    "sampling.max_new_tokens=256", "max_new_tokens=64", "sampling.top_p=1.0", "temperature=1.0", "lora.rank=16", "lora.alpha=32",
    "lora.target_modules=all-linear", "trainable=lora", "objective.coef=1.0", "objective.divergence=reverse_kl",
    "checkpoint.every=20", "checkpoint.keep=2", "evaluation.num_prompts=128", "logging.samples_every=20",
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED.split())
def test_the_common_names_of_trl_and_verl_are_answered(name: str):
    assert re.match(rf"unknown key '{re.escape(name)}': .*; (write \S+=|remove this key)", fault(put(name, 1)))


def test_a_renamed_key_is_advised_with_the_value_that_was_given():
    assert answer_to("lr", "1e-5", Config) == "unknown key 'lr': opd calls it optimizer.lr; write optimizer.lr=1e-5"
    line = answer_to("lora_target_modules", '["q_proj"]', Config)
    assert line.endswith("""write 'lora.target_modules=["q_proj"]'""")


def test_a_key_of_a_table_of_another_library_is_answered():
    line = answer_to("actor_rollout_ref.rollout.n", 8, Config)
    assert line.startswith(
        "unknown key 'actor_rollout_ref.rollout.n': opd calls it sampling.group_size; write sampling.gr"
    )
    assert line.endswith("group_size=8")


@pytest.mark.parametrize(
    ("key", "home"),
    [
        ("group_size", "sampling.group_size"),
        ("sampling.temperature", "temperature"),
        ("optimizer.rank", "lora.rank"),
        ("data.seed", "seed"),
    ],
)
def test_a_key_of_opd_in_the_wrong_table_is_told_its_place(key: str, home: str):
    assert answer_to(key, 2, Config) == f"unknown key '{key}': opd calls it {home}; write {home}=2"


def test_keys_of_named_tables_are_no_other_librarys():
    assert (
        fault(put("tasks.sums.dataset_name", "x")) == "unknown key 'tasks.sums.dataset_name'; did you mean 'dataset'?"
    )
    assert "optimizer" not in fault(put("teachers.even.lr", 1))


def test_a_batch_is_counted_in_prompts_by_training_and_in_examples_by_fine_tuning():
    assert "write sampling.prompts_per_step=32" in answer_to("per_device_train_batch_size", 8, Config)
    assert "write batch_size=32" in answer_to("per_device_train_batch_size", 8, SftConfig)


def test_a_name_of_another_library_does_nothing_by_itself():
    with pytest.raises(ConfigError):
        parse_config(config_tree(lr=1e-5))
