"""The command line: what a user can mend ends with one line and exit code 2, and nothing that was there is written over."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from factories import byte_tokenizer, save_adapter, save_toy, sft_recipe, toy_model, toy_recipe, write_toml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import opd
from opd import checkpoint
from opd.cli import app


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(result: Result) -> str:
    """The one line of a command that must have been refused."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("opd: ")
    return lines[0]


def refuse(folder: Path, *arguments: str | Path) -> str:
    """The same, for a command that must leave every file under `folder` as it was and start no run."""
    before = files_of(folder)
    line = one_line(invoke(*arguments))
    after = files_of(folder)
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith(("metrics.jsonl", ".safetensors")) and name not in before]
    return line


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sound recipe; tests change a copy of it."""
    return toy_recipe(tmp_path_factory.mktemp("bench"), steps=2, evaluation={"num_prompts": 0})


@pytest.fixture
def tree(bench: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    copied: dict[str, Any] = json.loads(json.dumps(bench))
    return copied | {"output": str(tmp_path / "run")}


@pytest.fixture
def recipe(tree: dict[str, Any], tmp_path: Path) -> str:
    return write_toml(tmp_path / "recipe.toml", tree)


def refuse_tree(tree: dict[str, Any], tmp_path: Path) -> str:
    """What `opd train` says of a recipe that it must refuse."""
    return refuse(tmp_path, "train", write_toml(tmp_path / "recipe.toml", tree))


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
        "optimizer.final_lr_share=1.5",
        "sampling.group_size=0",
        "sampling.max_new_tokens=0",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "lora.rank=0",
        "objective.clip_low=1",
        "objective.teacher_logprob_floor=1",
        "objective.type=forward",
        "outcome.coef=-1",
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
        (["outcome.coef=1", "sampling.group_size=1"], "sampling.group_size >= 2"),
        (["optimizer.warmup_steps=2"], "leaves nothing of steps = 2"),
        (["tasks.first.teacher=evn"], "did you mean 'even'?"),
        (["optimizer.betas=[0.9, 1.0]"], "betas must lie in [0, 1), got [0.9, 1.0]"),
        (["tasks.first.type=csv"], "must be 'file', 'reasoning_gym', 'textarena' or 'tools', got 'csv'"),
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
    assert "unknown key" in refuse(tmp_path, "train", "--resume", tree["output"])


# What the prompts say


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": \n', "line 2: not valid JSON"),
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}\n', "line 3: id 'first:a' was used on line 1"),
        ('{"id": "a", "prompt": " "}\n', "line 1: 'prompt' is empty"),
        ('{"id": "a", "messages": []}\n', "line 1: 'messages' must be a non-empty list"),
        ('{"id": "a", "messages": [{"role": "user", "content": ""}]}\n', "line 1: every message is empty"),
        ('{"id": "a"}\n', "line 1: give exactly one of 'messages' and 'prompt'"),
        ('{"prompt": "x"}\n', "line 1: 'id' must be a non-empty string"),
        ('{"id": "a", "promt": "x"}\n', "line 1: unknown key 'promt'; did you mean 'prompt'?"),
        ('{"id": "a", "prompt": "x", "teacher": "evn"}\n', "teacher 'evn' is not in [teachers]"),
        ('["a"]\n', "line 1: expected a JSON object, got list"),
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
    path.write_bytes(b"\xff\xfe\x00")
    assert "line 1: not UTF-8" in refuse_tree(tree, tmp_path)


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


# What the models are


def place_of(tree: dict[str, Any], who: str, path: Path | str) -> None:
    if who == "student":
        tree["student"] = str(path)
    else:
        tree["teachers"]["even"]["model"] = str(path)


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


# Where a run is written


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_folder_that_exists_is_not_written_over(tree: dict[str, Any], tmp_path: Path, command: str):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    if command == "sft":
        tree = sft_recipe(tmp_path, tree["student"]) | {"output": tree["output"]}
    before = files_of(tmp_path / "run")
    line = refuse(tmp_path, command, write_toml(tmp_path / "recipe.toml", tree))
    assert f"run folder '{tmp_path}/run' exists and is not empty" in line
    assert files_of(tmp_path / "run") == before


def test_an_empty_folder_is_taken_as_the_run_folder(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "run").mkdir()
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    assert (tmp_path / "run" / "student").is_dir()


def test_an_output_that_is_a_file_or_lies_under_one_is_refused(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    assert "exists" in refuse_tree(tree | {"output": f"{tmp_path}/file"}, tmp_path)
    assert f"cannot write '{tmp_path}/file/run'" in refuse_tree(tree | {"output": f"{tmp_path}/file/run"}, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_without_write_permission_is_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbid)
    line = refuse(tmp_path, "train", recipe)
    assert f"cannot write '{tmp_path}/run': Permission denied" in line


def test_a_recipe_that_may_not_be_read_is_refused(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(self: Path, *args: Any, **kwargs: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", forbid)
        line = one_line(invoke("train", recipe))
    assert f"'{recipe}'" in line
    assert "ermission" in line


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_in_safetensors(*args: Any, **kwargs: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture(scope="module")
def whole(bench: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose disk was never full."""
    path = tmp_path_factory.mktemp("whole") / "run"
    tree = bench | {"output": str(path), "steps": 3, "checkpoint": {"every": 1}}
    return opd.train(opd.parse_config(tree)).run


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in opd.read_metrics(run)]


@pytest.mark.parametrize(
    ("target", "failure", "place"),
    [
        ("opd.checkpoint.save_file", full_disk, "checkpoints"),
        ("opd.checkpoint.save_file", full_disk_in_safetensors, "checkpoints"),
        ("opd.checkpoint.os.fsync", full_disk, "rollouts/step-000002.jsonl.gz"),
    ],
    ids=["tensors", "safetensors", "rollouts"],
)
def test_a_full_disk_keeps_the_earlier_checkpoint_and_the_run_goes_on_later(
    tree: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    failure: Any,
    place: str,
):
    tree |= {"steps": 3, "checkpoint": {"every": 1}}
    run = Path(tree["output"])
    save = checkpoint.save

    def save_and_fill_the_disk(*args: Any, **kwargs: Any) -> Path:
        path = save(*args, **kwargs)
        monkeypatch.setattr(target, failure)  # from the first checkpoint on
        return path

    monkeypatch.setattr("opd.launch.checkpoint.save", save_and_fill_the_disk)
    line = one_line(invoke("train", write_toml(tmp_path / "recipe.toml", tree)))
    assert f"cannot write '{run}/{place}'" in line
    assert "No space left on device" in line
    monkeypatch.undo()
    found = checkpoint.load_newest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    assert found.step == 1
    assert not [p for p in run.rglob("*") if "partial" in p.name]
    result = invoke("train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert metrics_of(run) == metrics_of(whole)


# What a sound command prints


def test_a_finished_run_prints_where_its_student_is_and_nothing_on_stderr(
    whole: Path, tree: dict[str, Any], tmp_path: Path
):
    result = invoke("train", write_toml(tmp_path / "recipe.toml", tree), "steps=3", "checkpoint.every=1")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == f"done: {tree['output']} (student in {tree['output']}/student)"
    assert metrics_of(Path(tree["output"])) == metrics_of(whole)


def test_check_prints_every_finding_and_writes_nothing(recipe: str, tmp_path: Path):
    before = files_of(tmp_path)
    result = invoke("check", recipe)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert len(lines) >= 7
    assert all(line.startswith(("ok  ", "warn  ")) for line in lines)
    # toys of random weights: that they are far apart is said, and stops nothing
    assert any(line.startswith("warn  distance to teacher 'even': KL ") for line in lines)
    assert files_of(tmp_path) == before


def test_check_exits_with_2_where_a_check_fails(tree: dict[str, Any], tmp_path: Path):
    place_of(tree, "teacher", save_toy(tmp_path / "uniform", 1, scale=0.0))
    result = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert result.exit_code == 2
    [failed] = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert "teacher 'even' is not uniform" in failed


def test_eval_prints_the_parity_table_of_a_run(tree: dict[str, Any], tmp_path: Path):
    tree["evaluation"] = {"num_prompts": 2}
    run = Path(tree["output"])
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    before = (run / "parity.json").read_bytes()
    (run / "parity.json").unlink()
    result = invoke("eval", run)
    assert result.exit_code == 0, result.output
    assert "| second | held-out |" in result.stdout
    assert (run / "parity.json").read_bytes() == before


def test_every_command_explains_itself():
    shown = invoke("--help").stdout
    assert all(name in shown for name in ("train", "sft", "eval", "check"))
    for name in ("train", "sft", "eval", "check"):
        result = invoke(name, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def test_a_run_whose_folder_was_moved_goes_on_where_it_is(tree: dict[str, Any], tmp_path: Path):
    assert invoke("train", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(tree["output"], moved)
    shutil.rmtree(moved / "student")
    result = invoke("train", "--resume", moved)
    assert result.exit_code == 0, result.output
    assert (moved / "student").is_dir()
    assert not Path(tree["output"]).exists()


def test_what_is_printed_of_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    from opd.cli import _one_line
    from opd.errors import RunError

    with pytest.raises(typer.Exit), _one_line():
        raise RunError("a tool said \x1b[2J\x07 and\nmore")
    assert capsys.readouterr().err == "opd: a tool said \ufffd[2J\ufffd and more\n"
