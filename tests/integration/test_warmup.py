"""What a warm-up and fine-tuning learn from: whole turns, in the student's own tokens and template."""

import json
from pathlib import Path

import pytest
from factories import CHATML, byte_tokenizer, save_toy, sft_recipe, toy_recipe

import opd
from opd.config import SftConfig
from opd.errors import ConfigError, DataError
from opd.finetune import sft
from opd.local import warmup
from opd.local.build import build
from opd.records import Prompt

SHOUTING = CHATML.replace("m['role'] +", "m['role'] | upper +")


def test_a_teacher_with_a_template_of_its_own_is_learnt_from_in_the_students(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = toy_recipe(tmp_path)
    source = Path(tree["teachers"]["even"]["model"])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SHOUTING
    tokenizer.save_pretrained(source)
    config = opd.parse_config(tree | {"warmup": {"steps": 1}, "temperature": 2.0})
    backend = build(config)
    assert backend.policies["even"].network.tokenizer.chat_template == SHOUTING
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": "hi"},), "even", "first") for i in range(64)]
    found = warmup._demonstrations(backend, prompts, 1)
    assert found  # some of 64 ended within their limit
    own = backend.student.network.tokenizer
    for rollout in found:
        assert "<|im_start|>user" in own.decode(rollout.token_ids)
        assert "USER" not in own.decode(rollout.token_ids)
        assert rollout.finish == "end"
        assert rollout.response


def test_a_warm_up_on_a_mixture_is_refused_before_anything_is_written(tmp_path: Path):
    tree = toy_recipe(tmp_path, warmup={"steps": 2})
    tree["teachers"]["both"] = {"weights": {"even": 1.0, "odd": 1.0}}
    tree["tasks"]["first"]["teacher"] = "both"
    tree["tasks"]["second"]["teacher"] = "odd"
    with pytest.raises(DataError, match=r"its teacher 'both' is a mixture of teachers.*warmup.steps = 2"):
        opd.train(opd.parse_config(tree))
    assert not Path(tree["output"]).exists()


def demonstrated(folder: Path, turns: int, observation: str = "go on") -> SftConfig:
    """A fine-tuning recipe on one recorded demonstration."""
    said: list[dict[str, str]] = []
    for i in range(turns):
        said += [{"role": "assistant", "content": f"turn {i}"}, {"role": "user", "content": observation}]
    path = folder / "demo.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": "q", "demonstration": said[:-1]}) + "\n")
    tree = sft_recipe(folder, save_toy(folder / "student", 0), steps=2, evaluation={"num_prompts": 1})
    tree["tasks"] = {"answers": {"type": "file", "path": str(path), "teacher": "-", "verifier": "none"}}
    tree["episodes"] = {"max_turns": 3, "max_observation_chars": 20}
    return opd.parse_config(tree, kind=SftConfig)


def test_demonstrations_that_the_limits_would_cut_are_refused(tmp_path: Path):
    (tmp_path / "long").mkdir()
    with pytest.raises(DataError, match=r"its demonstration has more than episodes.max_turns = 3 turns"):
        sft(demonstrated(tmp_path / "long", 4))
    (tmp_path / "wide").mkdir()
    with pytest.raises(DataError, match=r"a message of more than episodes.max_observation_chars = 20"):
        sft(demonstrated(tmp_path / "wide", 2, "x" * 21))
    (tmp_path / "good").mkdir()
    sft(demonstrated(tmp_path / "good", 3))
    assert opd.read_metrics(tmp_path / "good" / "expert")


def test_training_does_not_replay_demonstrations(tmp_path: Path):
    """They are for fine-tuning: in training nobody answers the student's turn as it was answered once."""
    tree = toy_recipe(tmp_path, steps=1, evaluation={"num_prompts": 0}, optimizer={"warmup_steps": 0})
    said = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    path = tmp_path / "demo.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": "q", "meta": {"level": 3}, "demonstration": said}) + "\n")
    tree["tasks"]["first"] |= {"path": str(path), "verifier": "none"}
    run = opd.train(opd.parse_config(tree)).run
    for item in opd.read_rollouts(run, 1):
        assert [t.author for t in item.rollout.turns] == ["prompt", "student"]
        if item.rollout.prompt.task == "first":
            assert dict(item.rollout.prompt.meta) == {"level": 3}


def test_a_demonstration_is_not_evaluated_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert sft(demonstrated(tmp_path, 2)).accuracy == {}
    assert "answers train: 1 prompts with a demonstration are not evaluated" in capsys.readouterr().out


def test_a_rate_without_a_warm_up_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="lr works only with steps > 0"):
        opd.parse_config(toy_recipe(tmp_path, warmup={"lr": 1e-3}))
