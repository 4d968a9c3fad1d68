"""What is made of a run and its checkpoints: evaluations, exported students, and further steps."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, toy_recipe, write_toml
from toy_runs import invoke, one_line
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import opd


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = toy_recipe(
        tmp_path_factory.mktemp("trained"),
        steps=4,
        checkpoint={"every": 2, "keep": 2},
        evaluation={"num_prompts": 2, "before_prompts": 0},
    )
    return opd.train(tree).run


def test_every_wait_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 2, "before_prompts": 2})
    opd.train(tree)
    shown = capsys.readouterr().out
    waits = [
        f"loading student '{tree['student']}'",
        f"loading teacher 'even': '{tmp_path / 'even'}'",
        "loading teacher 'odd'",
    ]
    waits += [
        "checking the recipe",
        "evaluating the student before",
        "step 1/2",
        "step 2/2",
        "evaluating the student and its",
    ]
    places = [shown.replace("\n", "").find(line) for line in waits]
    assert -1 not in places
    assert places == sorted(places)


def test_any_checkpoint_is_evaluated(run: Path):
    last = (run / "parity.json").read_text()
    assert invoke("eval", run, "--step", "2").exit_code == 0
    assert (run / "parity.json").read_text() == last
    assert (run / "evaluations" / "step-000002.json").read_text() != last
    assert invoke("eval", run, "--step", "4").exit_code == 0
    assert (run / "evaluations" / "step-000004.json").read_text() == last
    assert invoke("eval", run).exit_code == 0
    assert (run / "parity.json").read_text() == last
    assert "has no checkpoint of step 3; it has: 2, 4" in one_line(invoke("eval", run, "--step", "3"))


def test_any_checkpoint_is_exported_as_an_adapter_or_merged(run: Path, tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for step in (2, 4):
        done = invoke("export", run, "--step", step, "--output", tmp_path / f"adapter-{step}")
        assert done.exit_code == 0, done.output
    early, late = (load_file(tmp_path / f"adapter-{step}" / "adapter_model.safetensors") for step in (2, 4))
    assert any(bool((early[name] != late[name]).any()) for name in early)
    kept = load_file(run / "student" / "adapter_model.safetensors")
    assert all(bool((kept[name] == late[name]).all()) for name in kept)
    merged = tmp_path / "merged"
    assert invoke("export", run, "--merged", "--dtype", "bfloat16", "--output", merged).exit_code == 0
    assert str(next(AutoModelForCausalLM.from_pretrained(merged).parameters()).dtype) == "torch.bfloat16"
    for folder in (merged, run / "student"):
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert "exists and is not empty" in one_line(invoke("export", run, "--output", merged))
    assert "works only with merged" in one_line(
        invoke("export", run, "--dtype", "bfloat16", "--output", tmp_path / "x")
    )


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_student_is_exported_without_its_teachers_and_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str
):
    run = opd.train(toy_recipe(tmp_path, steps=2, trainable=trainable, evaluation={"num_prompts": 0})).run
    for teacher in ("even", "odd"):
        shutil.rmtree(tmp_path / teacher)
    trainer, merged = opd.Trainer(run), tmp_path / "merged"
    trainer.export(tmp_path / "plain")
    files = [path.name for path in sorted((run / "student").iterdir())]
    assert files == [path.name for path in sorted((tmp_path / "plain").iterdir())]
    assert all((run / "student" / f).read_bytes() == (tmp_path / "plain" / f).read_bytes() for f in files)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerBase, "save_pretrained", full_disk)
        with pytest.raises(opd.OpdError, match=r"cannot write '.*merged': No space left"):
            trainer.export(merged, merged=True)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    merged.mkdir()
    monkeypatch.chdir(merged)
    trainer = opd.Trainer(run)
    trainer.export(".", merged=True)
    monkeypatch.chdir(tmp_path)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in merged.iterdir())
    template = AutoTokenizer.from_pretrained(tmp_path / "student")
    template.chat_template = "{{ messages[0].content }}!"
    template.save_pretrained(tmp_path / "student")
    with pytest.raises(opd.OpdError, match="the student's tokenizer is not what this run began with"):
        trainer.export(tmp_path / "wrong")
    if trainable == "lora":
        save_toy(tmp_path / "student", 7)
        with pytest.raises(opd.OpdError, match="the student's base is not what this run began with"):
            trainer.export(tmp_path / "wrong")


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_adapter_is_evaluated_as_the_student_of_a_recipe(run: Path, tmp_path: Path):
    tree = json.loads((run / "config.json").read_text()) | {"output": str(tmp_path / "none")}
    recipe = write_toml(tmp_path / "recipe.toml", without_nothing(tree))
    result = invoke("eval", recipe, "--student", run / "student")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("| ")]
    assert rows[1:] != []
    assert not (tmp_path / "none").exists()
    assert "--student works only with a recipe" in one_line(invoke("eval", run, "--student", run / "student"))
    assert "--step works only with a run folder" in one_line(invoke("eval", recipe, "--step", "2"))


def without_nothing(tree: Any) -> Any:
    """TOML has no null."""
    if isinstance(tree, dict):
        return {key: without_nothing(value) for key, value in tree.items() if value is not None}
    return tree


def test_checkpoints_are_readable_by_the_group(run: Path):
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    assert files
    assert {oct(path.stat().st_mode & 0o044) for path in files} == {"0o44"}


def test_a_run_goes_on_past_its_end_and_says_how_its_schedule_changes(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=3, evaluation={"num_prompts": 0})
    tree["optimizer"] = {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1}
    run = opd.train(tree).run
    result = invoke("train", "--resume", run, "steps=6")
    assert result.exit_code == 0, result.output
    assert "the learning rate follows 6 steps now" in result.output
    rates = [line["optim/lr/max"] for line in opd.read_metrics(run)]
    assert len(rates) == 6
    assert rates[3] > rates[2] > rates[-1]


def test_evaluating_a_recipe_leaves_its_run_alone(run: Path, tmp_path: Path):
    tree = json.loads((run / "config.json").read_text()) | {"output": str(run)}
    recipe = write_toml(tmp_path / "recipe.toml", without_nothing(tree))
    written = (run / "parity.json").stat().st_mtime_ns
    assert invoke("eval", recipe).exit_code == 0
    assert (run / "parity.json").stat().st_mtime_ns == written
