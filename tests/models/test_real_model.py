"""The real model and the experts that ship with the examples: what the demo starts from is true, and its tokens are flagged."""

from dataclasses import replace
from pathlib import Path

import pytest
from call_texts import ALL, GOOD, config, flagged, flagged_rollout, tagged
from zoo import real

import opd
from opd.checks.startup import run_checks
from opd.data.tasks import make_tasks, read_tasks
from opd.evaluate import evaluate, pick
from opd.local.build import build
from opd.rewards.judge import Judge
from opd.text.tokenizer import token_bytes

MODEL = Path("models/smollm2-135m-instruct")


@pytest.fixture(scope="module")
def backend():
    assert MODEL.is_dir(), "run `make model`"
    return build(opd.load_config("recipes/merge.toml", ["compute.threads=2"]))


@pytest.mark.real
def test_the_base_fails_both_tasks_and_each_expert_solves_its_own(backend):
    for name, task in make_tasks(backend.config.tasks).items():
        prompts = pick(task.prompts("held_out"), 48, seed=1)
        base = evaluate(backend.sampler(), prompts, Judge(task.reward))
        expert = evaluate(backend.sampler(backend.policies[name]), prompts, Judge(task.reward))
        assert base.correct is not None
        assert expert.correct is not None
        assert base.accuracy < 0.10
        # Half a dozen below the 90 % that 256 prompts show: 48 prompts leave that much to chance.
        assert expert.accuracy > 0.83


@pytest.mark.real
def test_every_start_up_check_passes_on_the_demos_recipe(backend):
    task_data = read_tasks(backend.config, None)
    few = {name: {split: chosen[:20] for split, chosen in splits.items()} for name, splits in task_data.prompts.items()}
    findings = run_checks(backend.config, backend, replace(task_data, prompts=few))
    assert len(findings) >= 7
    assert [f.name for f in findings if not f.passed] == []


@pytest.mark.real
def test_real_tokens_are_flagged_where_they_spell_the_error():
    tokenizer = real("smollm2")
    table = token_bytes(tokenizer)
    wrong = tagged(GOOD.replace("add", "sub"))
    text = f"Let me see, naïve 🙂 漢字:\n{wrong}\n```python\nx = 1\n"
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    head = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True, return_dict=False)
    item = flagged_rollout([head, ids])
    found = dict(flagged(item, ALL, table))
    assert found["unknown_tool"].strip() == wrong.encode()
    assert found["code_fence"].strip() == b"```python"
    assert found["tags"] == found["answer_pattern"] == b"<|im_end|>"
    assert set(found) == {"unknown_tool", "code_fence", "tags", "answer_pattern"}


@pytest.mark.real
def test_a_character_in_several_real_tokens_is_flagged_with_all_of_them():
    tokenizer = real("smollm2")
    table = token_bytes(tokenizer)
    whole = tokenizer("𓀀").input_ids
    assert len(whole) > 2
    half = flagged_rollout([[1], [*tokenizer("so ").input_ids, *whole[:-1], *tokenizer("on").input_ids]])
    [(rule, raw)] = flagged(half, config("invalid_utf8"), table)
    assert (rule, raw) == ("invalid_utf8", "𓀀".encode()[: len(raw)])
    assert len(raw) > 1
    loop = flagged_rollout([[1], [*tokenizer("so ").input_ids, *whole * 200]])
    [(rule, raw)] = flagged(loop, config("repetition"), table)
    assert raw == "𓀀".encode() * 199
