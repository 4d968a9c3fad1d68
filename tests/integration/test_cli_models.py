"""Models, tokenizers and adapters that do not fit end the command with one line and exit code 2; padding does fit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import byte_tokenizer, save_adapter, save_toy, sft_recipe, toy_model, write_toml
from safetensors.torch import load_file, save_file
from toy_runs import bench as bench
from toy_runs import invoke, place_of, refuse_tree
from toy_runs import tree as tree
from transformers import PreTrainedTokenizerFast

import opd


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nowhere/none", "model '/nowhere/none' is neither a folder, a .gguf file, nor a hub id"),
        ("./none", "model './none' is neither a folder"),
        ("none.gguf", "GGUF file 'none.gguf' does not exist"),
        ("nobody/none", "model 'nobody/none' cannot be loaded"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(tree: dict[str, Any], tmp_path: Path, who: str, name: str, reason: str):
    place_of(tree, who, name)
    assert reason in refuse_tree(tree, tmp_path)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_folder_without_a_model_is_refused(tree: dict[str, Any], tmp_path: Path, who: str):
    (tmp_path / "empty").mkdir()
    place_of(tree, who, tmp_path / "empty")
    assert f"model folder '{tmp_path}/empty' has no config.json" in refuse_tree(tree, tmp_path)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_folder_without_a_tokenizer_is_refused(tree: dict[str, Any], tmp_path: Path, who: str):
    toy_model(1).save_pretrained(tmp_path / "bare")
    place_of(tree, who, tmp_path / "bare")
    line = refuse_tree(tree, tmp_path)
    assert f"model '{tmp_path}/bare'" in line
    assert "tokenizer" in line


def test_a_model_folder_without_weights_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder = Path(save_toy(tmp_path / "hollow", 1))
    (folder / "model.safetensors").unlink()
    place_of(tree, "teacher", folder)
    assert f"model '{folder}' cannot be loaded" in refuse_tree(tree, tmp_path)


def test_a_model_folder_with_cut_weights_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder = Path(save_toy(tmp_path / "cut", 1))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    place_of(tree, "teacher", folder)
    assert f"model '{folder}' cannot be loaded" in refuse_tree(tree, tmp_path)


def test_an_objective_over_the_vocabulary_names_the_difference_of_two_tokenizers(tree: dict[str, Any], tmp_path: Path):
    folder = Path(save_toy(tmp_path / "other", 1))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    place_of(tree, "teacher", folder)
    line = refuse_tree(tree, tmp_path)
    assert "teacher 'even'" in line
    assert "has another tokenizer than" in line
    assert "258 tokens against 258, 2 of the student's under another id or absent; first: id" in line
    assert "write objective.type = 'immediate' or 'to_go'" in line
    assert "'a' for the student and 'b' for the teacher" in line


def test_a_teacher_with_one_token_more_is_refused_with_the_difference(tree: dict[str, Any], tmp_path: Path):
    folder = save_toy(tmp_path / "larger", 1, vocab_size=259)
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    tokenizer.save_pretrained(folder)
    place_of(tree, "teacher", folder)
    line = refuse_tree(tree, tmp_path)
    assert "258 tokens against 259" in line
    assert "id 258 is '<|think|>' for the teacher and absent for the student" in line


def test_a_teacher_with_a_padded_vocabulary_is_accepted(tree: dict[str, Any], tmp_path: Path):
    place_of(tree, "teacher", save_toy(tmp_path / "padded", 1, vocab_size=264))
    result = invoke("train", write_toml(tmp_path / "recipe.toml", tree))
    assert result.exit_code == 0, result.output
    assert f"done: {tree['output']}" in result.stdout
    assert len(opd.read_metrics(tree["output"])) == 2


def test_a_student_with_a_padded_vocabulary_never_samples_the_padding(tree: dict[str, Any], tmp_path: Path):
    place_of(tree, "student", save_toy(tmp_path / "padded", 0, vocab_size=400))
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    assert max(int(s.rollout.token_ids.max()) for s in opd.read_rollouts(tree["output"])) < 258


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_that_says_it_has_another_base_is_refused(
    bench: dict[str, Any], tree: dict[str, Any], tmp_path: Path, trainable: str
):
    made = sft_recipe(tmp_path, bench["student"], steps=1, optimizer={"warmup_steps": 0}, evaluation={"num_prompts": 0})
    assert invoke("sft", write_toml(tmp_path / "sft.toml", made)).exit_code == 0
    tree |= {"student": save_toy(tmp_path / "other", 8), "trainable": trainable}
    tree["teachers"]["odd"] = {"adapter": f"{made['output']}/student"}
    line = refuse_tree(tree, tmp_path)
    assert "(teacher 'odd') was made on another base" in line
    assert bench["student"] in line


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_of_other_shapes_is_refused(tree: dict[str, Any], tmp_path: Path, trainable: str):
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    tree["teachers"]["odd"] = {"adapter": str(adapter)}
    tree["trainable"] = trainable
    line = refuse_tree(tree, tmp_path)
    assert f"adapter '{adapter}' (teacher 'odd') does not fit the base" in line
    assert "size mismatch" in line


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_with_weights_for_layers_that_the_base_lacks_is_refused(
    tree: dict[str, Any], tmp_path: Path, trainable: str
):
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    file = adapter / "adapter_model.safetensors"
    renamed = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    tree["teachers"]["odd"] = {"adapter": str(adapter)}
    tree["trainable"] = trainable
    assert f"adapter '{adapter}' (teacher 'odd')" in refuse_tree(tree, tmp_path)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_that_lacks_some_of_its_weights_is_refused(tree: dict[str, Any], tmp_path: Path, trainable: str):
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "layers.1." not in n}, file, metadata={"format": "pt"})
    tree["teachers"]["odd"] = {"adapter": str(adapter)}
    tree["trainable"] = trainable
    assert f"adapter '{adapter}' (teacher 'odd')" in refuse_tree(tree, tmp_path)


def test_an_adapter_whose_file_was_cut_is_refused(tree: dict[str, Any], tmp_path: Path):
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tree["teachers"]["odd"] = {"adapter": str(adapter)}
    assert f"adapter '{adapter}' (teacher 'odd')" in refuse_tree(tree, tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(tree: dict[str, Any], tmp_path: Path):
    tree["teachers"]["odd"] = {"adapter": tree["student"]}
    assert f"adapter '{tree['student']}' (teacher 'odd') has no adapter_config.json" in refuse_tree(tree, tmp_path)


def test_target_modules_that_the_student_lacks_are_refused(tree: dict[str, Any], tmp_path: Path):
    line = refuse_tree(tree | {"lora": {"target_modules": ["query_key_value"]}}, tmp_path)
    assert "lora.target_modules does not fit" in line


def test_a_recipe_that_was_refused_runs_once_it_is_mended(tree: dict[str, Any], tmp_path: Path):
    mended = json.loads(json.dumps(tree))
    place_of(tree, "teacher", tmp_path / "none")
    refuse_tree(tree, tmp_path)
    assert not (tmp_path / "run").exists()
    assert invoke("train", write_toml(tmp_path / "recipe.toml", mended)).exit_code == 0


def test_a_process_of_its_own_prints_one_line_even_behind_the_loaders(tree: dict[str, Any], tmp_path: Path):
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    tree["teachers"]["odd"] = {"adapter": str(adapter)}
    finished = subprocess.run(
        [sys.executable, "-c", "from opd.cli import main; main()", "train", write_toml(tmp_path / "r.toml", tree)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 2
    [line] = finished.stderr.splitlines()
    assert line.startswith(f"opd: adapter '{adapter}' (teacher 'odd') does not fit")
