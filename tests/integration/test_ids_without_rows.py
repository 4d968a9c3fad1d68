"""Ids of a tokenizer for which a model has no rows: accepted where nothing needs them, named where something does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import CHATML, byte_tokenizer, save_toy, sft_recipe, toy_model, toy_recipe, write_toml
from toy_runs import bench as bench
from toy_runs import invoke, one_line, place_of, refuse_tree
from toy_runs import tree as tree
from transformers import PreTrainedTokenizerFast
from zoo import toy_ascii

import opd
from opd.config import ComputeConfig
from opd.errors import DataError, ModelError
from opd.local.build import build
from opd.models.loading import load_network
from opd.records import FailedScore
from opd.roles import Step

IMAGE = "<image>"


def wide_tokenizer(*, special: bool = True, template: str = CHATML) -> PreTrainedTokenizerFast:
    """The byte tokenizer with one token more, id 258, which toys have no row for."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([IMAGE], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def save_wide(folder: Path, seed: int = 0, *, rows: int = 258, **kwargs: Any) -> str:
    save_toy(folder, seed, vocab_size=rows)
    wide_tokenizer(**kwargs).save_pretrained(folder)
    return str(folder)


def widen(tree: dict[str, Any], folder: Path, **kwargs: Any) -> dict[str, Any]:
    """A recipe, all of its models with the wide tokenizer."""
    tree["student"] = save_wide(folder / "student", 0, **kwargs)
    for seed, name in enumerate(("even", "odd"), start=1):
        tree["teachers"][name]["model"] = save_wide(folder / name, seed, **kwargs)
    return tree


def write_records(tree: dict[str, Any], path: Path, *texts: str) -> None:
    lines = [json.dumps({"id": f"r{i}", "prompt": text, "answer": text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tree["tasks"]["first"]["path"] = str(path)


@pytest.mark.parametrize("objective", ["exact", "immediate", "top_k"])
@pytest.mark.parametrize("special", [True, False])
def test_an_id_above_the_head_that_nothing_needs_is_accepted_and_said(
    tree: dict[str, Any], tmp_path: Path, objective: str, special: bool
):
    widen(tree, tmp_path, special=special)
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"objective": {"type": objective}})
    shown = invoke("check", recipe)
    assert shown.exit_code == 0, shown.output
    said = f"has 1 ids beyond the 258 rows of '{tree['student']}', first '<image>' (id 258)"
    assert f"warn  models are loaded as their files say: the tokenizer of '{tree['student']}' {said}" in shown.stdout
    assert invoke("train", recipe).exit_code == 0
    assert max(int(s.rollout.token_ids.max()) for s in opd.read_rollouts(tree["output"])) < 258


def test_a_teacher_with_fewer_rows_than_the_student_is_accepted(tree: dict[str, Any], tmp_path: Path):
    tree["student"] = save_wide(tmp_path / "student", 0, rows=300)
    for seed, name in enumerate(("even", "odd"), start=1):
        tree["teachers"][name]["model"] = save_wide(tmp_path / name, seed)
    shown = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert shown.exit_code == 0, shown.output
    assert "ids beyond the 258 rows of" in shown.stdout


def test_a_special_token_that_somebody_types_is_text_and_needs_no_row(tree: dict[str, Any], tmp_path: Path):
    write_records(widen(tree, tmp_path), tmp_path / "r.jsonl", "what is <image>?")
    assert invoke("check", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0


@pytest.mark.parametrize("rows", [258, 300])
def test_a_prompt_that_needs_the_token_is_named(tree: dict[str, Any], tmp_path: Path, rows: int):
    widen(tree, tmp_path, special=False)
    tree["student"] = save_wide(tmp_path / "other", 0, rows=rows, special=False)
    write_records(tree, tmp_path / "r.jsonl", "fine", "what is <image>?")
    line = refuse_tree(tree, tmp_path)
    assert (
        "prompt 'first:r1': its text needs token '<image>' (id 258), and the models have embeddings for ids below 258"
        in line
    )
    assert "take it out of the record, or give the model a row for it" in line


def test_a_template_that_needs_the_token_is_named(tree: dict[str, Any], tmp_path: Path):
    widen(tree, tmp_path, template=IMAGE + CHATML)
    line = refuse_tree(tree, tmp_path)
    assert "the chat template needs token '<image>' (id 258)" in line
    assert "take it out of the template" in line


def test_an_end_of_turn_without_a_row_is_named(tree: dict[str, Any], tmp_path: Path):
    widen(tree, tmp_path)
    tokenizer = wide_tokenizer()
    tokenizer.eos_token = IMAGE
    tokenizer.save_pretrained(tree["student"])
    assert "its turns end with '<image>' (id 258), which could never be sampled" in refuse_tree(tree, tmp_path)


def test_an_end_of_turn_of_the_generation_config_without_a_row_is_named(tree: dict[str, Any], tmp_path: Path):
    widen(tree, tmp_path)
    file = Path(tree["student"]) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [257, 258]}))
    assert "its turns end with '<image>' (id 258), which could never be sampled" in refuse_tree(tree, tmp_path)


def test_the_advice_to_give_the_model_a_row_works(tree: dict[str, Any], tmp_path: Path):
    widen(tree, tmp_path, special=False)
    write_records(tree, tmp_path / "r.jsonl", "what is <image>?")
    refuse_tree(tree, tmp_path)
    for source in (tree["student"], *(t["model"] for t in tree["teachers"].values())):
        network = load_network(source, ComputeConfig(device="cpu"))
        network.base.resize_token_embeddings(259, mean_resizing=False)
        network.base.save_pretrained(source)
    assert invoke("check", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0


def test_fine_tuning_names_an_answer_that_needs_the_token(tmp_path: Path):
    folder = save_wide(tmp_path / "base", 0, special=False)
    tree = sft_recipe(tmp_path / "sft", folder, steps=1, optimizer={"warmup_steps": 0}, evaluation={"num_prompts": 0})
    path = Path(tree["tasks"]["answers"]["path"])
    path.write_text(json.dumps({"id": "a0", "prompt": "hi", "answer": "an <image>"}) + "\n")
    line = one_line(invoke("sft", write_toml(tmp_path / "sft.toml", tree)))
    assert "prompt 'answers:a0': its text needs token '<image>' (id 258)" in line
    path.write_text(json.dumps({"id": "a0", "prompt": "hi", "answer": "an image"}) + "\n")
    assert invoke("sft", write_toml(tmp_path / "sft.toml", tree)).exit_code == 0


class _Shows:
    """An environment that shows a picture."""

    async def reset(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"look: {IMAGE}"}]

    async def step(self, message: dict[str, str]) -> Step:
        return Step([], done=True)


def test_an_environment_that_says_the_token_loses_its_episode_and_not_the_run(tmp_path: Path):
    tree = widen(toy_recipe(tmp_path / "toys"), tmp_path, special=False)
    backend = build(opd.parse_config(tree), lambda prompt: _Shows())
    [prompt, *_] = opd_prompts(tree)
    found = backend.sampler().sample([prompt], num_samples=2, seed=(1,))
    assert all("needs token '<image>' (id 258)" in str(r.failure) for r in found)


def opd_prompts(tree: dict[str, Any]) -> list[Any]:
    from opd.data.tasks import make_tasks

    return make_tasks(opd.parse_config(tree).tasks)["first"].prompts("train")


def save_reader(folder: Path, *, template: str = CHATML) -> str:
    """A teacher of another tokenizer with one id more than rows."""
    tokenizer = toy_ascii(("a", "b"))
    tokenizer.add_tokens([IMAGE], special_tokens=False)
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = toy_model(3, vocab_size=len(tokenizer) - 1)
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("objective", ["immediate", "top_k"])
def test_a_teacher_of_another_tokenizer_with_an_id_too_many_is_followed(
    tree: dict[str, Any], tmp_path: Path, objective: str
):
    place_of(tree, "teacher", save_reader(tmp_path / "reader"))
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"objective": {"type": objective}})
    shown = invoke("check", recipe)
    assert shown.exit_code == 0, shown.output
    assert f"the tokenizer of '{tmp_path}/reader' has 1 ids beyond" in shown.stdout
    assert invoke("train", recipe).exit_code == 0
    assert np.isfinite([row["kl/token/mean"] for row in opd.read_metrics(tree["output"])]).all()


def test_a_teacher_of_another_tokenizer_cannot_score_a_text_that_needs_the_token(tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"type": "immediate"})
    tree["teachers"]["even"]["model"] = save_reader(tmp_path / "reader")
    write_records(tree, tmp_path / "r.jsonl", "what is <image>?", "fine")
    backend = build(opd.parse_config(tree))
    rollouts = backend.sampler().sample(opd_prompts(tree)[:2], num_samples=1, seed=(1,))
    first, second = backend.teachers(keep_hidden=False).score(rollouts)
    assert isinstance(first.score, FailedScore)
    assert "the text needs token '<image>' (id " in first.score.reason
    assert not isinstance(second.score, FailedScore)


def test_a_teacher_of_another_tokenizer_whose_template_needs_the_token_is_refused(tree: dict[str, Any], tmp_path: Path):
    place_of(tree, "teacher", save_reader(tmp_path / "reader", template=IMAGE + CHATML))
    tree["objective"] = {"type": "immediate"}
    with pytest.raises((ModelError, DataError, opd.errors.CheckError), match=r"token '<image>' \(id "):
        opd.train(opd.parse_config(tree))
