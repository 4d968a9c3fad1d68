"""What a user sees of a model that packed passes are wrong for, or passes are right for only up to a length."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import PADDED, SOUND, WINDOWED, toy_of
from factories import byte_tokenizer, prompt, rollout, save_adapter, sft_recipe, toy_recipe

import opd
from opd.config import SftConfig
from opd.errors import CheckError, DataError
from opd.finetune import sft
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.sampler import LocalSampler
from opd.models.head import HeadShape
from opd.models.network import Network
from opd.records import FailedScore, Rollout
from opd.roles import PassGaps

LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
}

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def save(folder: Path, kind: str, options: dict[str, Any]) -> str:
    toy_of(kind, options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def unlikely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be sampled."""

    def sample(*args: Any, **options: Any) -> Any:
        raise AssertionError("sampled from a model that is refused")

    monkeypatch.setattr(LocalSampler, "sample", sample)


def recipe(tmp_path: Path, who: str, model: str, **changes: Any) -> opd.Config:
    tree = toy_recipe(tmp_path, **changes)
    if who == "student":
        tree["student"] = model
    else:
        tree["teachers"]["even"] = {"model": model}
    return opd.parse_config(tree)


@pytest.mark.parametrize("kind", ["lfm2", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("who", ["student", "even"])
def test_a_model_that_cannot_be_packed_trains_with_padded_passes_and_the_check_says_why(
    tmp_path: Path, who: str, kind: str
):
    options, cause = PADDED[kind]
    config = recipe(tmp_path, who, save(tmp_path / kind, kind, options), steps=2)
    name = "the student" if who == "student" else "teacher 'even'"
    [found] = [f for f in opd.Trainer(config).check() if f.name == f"forward passes equal the model's own ({name})"]
    assert found.passed
    assert re.match(f"padded passes, one row for each sequence, because this model.*{cause}", found.detail)
    assert opd.train(config).metrics["kl/token/mean"] > 0


@pytest.mark.parametrize("who", ["student", "even"])
def test_a_model_with_a_window_samples_scores_and_trains_beyond_it(tmp_path: Path, who: str):
    model = save(tmp_path / "model", "gemma3_text", {**WINDOWED["gemma3_text"], "sliding_window": 10})
    sampled = {"objective": {"type": "immediate", "correction": {"type": "truncate"}}}
    config = recipe(tmp_path, who, model, steps=2, sampling={"max_new_tokens": 12}, **sampled)
    [found] = [f for f in opd.Trainer(config).check() if who in f.name and "forward passes" in f.name]
    assert found.passed
    assert found.detail.startswith("packed passes")
    metrics = opd.train(config).metrics
    assert metrics["kl/token/mean"] > 0
    assert metrics["batch/tokens/sum"] / metrics["batch/rollouts/sum"] > 15
    assert 0 < metrics["correction/gap/max"] < 1e-4  # sampled log-probabilities and those of the update


def plain_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every head for a plain product: what a model of tomorrow does to its logits, no config key says."""
    monkeypatch.setattr("opd.models.network.head_shape", lambda model: HeadShape())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("who", ["student", "even"])
def test_a_model_whose_numbers_alone_are_wrong_is_refused_before_anything_is_sampled(
    tmp_path: Path, who: str, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    model = save(tmp_path / "granite", "granite", SOUND["granite"])
    unlikely(monkeypatch)
    plain_heads(monkeypatch)
    config = recipe(tmp_path, who, model, compute={"dtype": dtype})
    name = "the student" if who == "student" else "teacher 'even'"
    line = (
        rf"^start-up check 'forward passes equal the model's own \({name}\)' failed: this model scales, caps or shifts its logits "
        "after the output head; packed passes; largest difference"
    )
    with pytest.raises(CheckError, match=line):
        opd.train(config)
    assert not (tmp_path / "run").exists()
    findings = opd.Trainer(config).check()
    assert [f.name for f in findings if not f.passed] == [f"forward passes equal the model's own ({name})"]


def test_fine_tuning_refuses_a_model_whose_numbers_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = save(tmp_path / "granite", "granite", SOUND["granite"])
    unlikely(monkeypatch)
    plain_heads(monkeypatch)
    with pytest.raises(CheckError, match="this model scales, caps or shifts its logits after the output head"):
        sft(SftConfig(**sft_recipe(tmp_path / "sft", model)))
    assert not (tmp_path / "sft" / "expert").exists()


def test_evaluation_checks_the_packing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = recipe(tmp_path, "student", save(tmp_path / "qwen3", "qwen3", SOUND["qwen3"]), steps=2)
    opd.train(config)
    monkeypatch.setattr(
        LocalBackend, "check_passes", lambda self: {"the student": PassGaps({"several sequences": 0.3})}
    )
    with pytest.raises(
        CheckError, match=r"forward passes equal the model's own \(the student\)' failed: .* carry state across"
    ):
        opd.Trainer(tmp_path / "run").evaluate()


def test_every_model_is_checked_with_its_adapter_and_none_twice(tmp_path: Path):
    tree = toy_recipe(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", tree["student"])
    tree["teachers"]["even"] = {"adapter": adapter}
    tree["teachers"]["odd"] = {"model": tree["student"]}
    found = build(opd.parse_config(tree)).check_passes()
    assert list(found) == ["the student", "teacher 'even'", "teacher 'odd'"]
    assert ["gradients" in each.gaps for each in found.values()] == [True, False, False]


def test_where_one_adapter_needs_padded_passes_the_others_on_its_base_are_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = toy_recipe(tmp_path)
    tree["teachers"]["even"] = {"adapter": save_adapter(tmp_path / "adapter", tree["student"])}
    asked: list[bool] = []

    def settled(network: Network, *, gradients: bool) -> PassGaps:
        asked.append(gradients)
        if not gradients and network.padded_because is None and len(asked) == 2:  # the teacher
            network.pad("its adapter keeps state")
        return PassGaps({"head": 0.0}, network.padded_because)

    monkeypatch.setattr("opd.local.backend.settled_passes", settled)
    found = build(opd.parse_config(tree)).check_passes()
    assert asked == [True, False, *([False] * (len(found) - 2)), True]
    assert found["the student"].padded_because == found["teacher 'even'"].padded_because == "its adapter keeps state"


# --- lengths ---


@pytest.mark.parametrize("who", ["student", "even"])
@pytest.mark.parametrize(
    ("kind", "options", "cause"),
    [
        ("phi3", {**LONGROPE, "original_max_position_embeddings": 64}, "its rope ('longrope') changes beyond 64 tokens"),
        (
            "llama",
            {**SOUND["llama"], "max_position_embeddings": 64, "rope_parameters": DYNAMIC},
            "its rope ('dynamic') changes beyond 64 tokens",
        ),
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_a_recipe_that_needs_more_than_the_limit_is_refused_by_its_cause_and_the_advice_works(
    tmp_path: Path, who: str, kind: str, options: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch
):
    model = save(tmp_path / kind, kind, options)
    name = "the student" if who == "student" else "teacher 'even'"
    with pytest.raises(DataError) as caught:
        opd.Trainer(recipe(tmp_path, who, model, sampling={"max_new_tokens": 50})).check()
    line = str(caught.value)
    assert line.startswith("prompt 'first:0': ")
    assert line.endswith(
        f"+ sampling.max_new_tokens = 50 exceed the limit of {name} (64: {cause}); shorten the prompt or lower "
        "sampling.max_new_tokens"
    )
    assert all(f.passed for f in opd.Trainer(recipe(tmp_path, who, model, sampling={"max_new_tokens": 20})).check())


def of_length(name: str, tokens: int) -> Rollout:
    return rollout([256, *range(97, 96 + tokens)], 4, prompt=prompt(name, teacher="even"))


def test_a_teacher_scores_up_to_the_change_of_its_rope_and_says_why_not_beyond(tmp_path: Path):
    model = save(tmp_path / "llama", "llama", {**SOUND["llama"], **LONGROPE})
    teachers = build(recipe(tmp_path, "even", model)).teachers(keep_hidden=False)
    alone = teachers.score([of_length("a", 9)])[0]
    for order in (1, -1):
        rollouts = [of_length("a", 9), of_length("b", 64), of_length("c", 65)][::order]
        a, b, c = teachers.score(rollouts)[::order]
        assert not isinstance(a.score, FailedScore)
        assert not isinstance(alone.score, FailedScore)
        assert abs(a.score.logprobs - alone.score.logprobs).max() < 1e-4
        assert not isinstance(b.score, FailedScore)
        reason = "65 tokens exceed the limit of teacher 'even' (64: its rope ('longrope') changes beyond 64 tokens)"
        assert c.score == FailedScore("even", reason)


def test_a_student_stops_sampling_where_its_rope_changes(tmp_path: Path):
    """Rows of different lengths grow together; each keeps the numbers of the model's own forward pass."""
    model = save(tmp_path / "llama", "llama", {**SOUND["llama"], **LONGROPE})
    backend = build(recipe(tmp_path, "student", model, sampling={"max_new_tokens": 40}))
    prompts = [prompt("short", "a"), prompt("long", "b" * 20)]
    sampled = backend.sampler().sample(prompts, num_samples=4, seed=(1,))
    assert max(len(r.token_ids) for r in sampled) == 64
    assert {r.finish for r in sampled if r.prompt.id == "long"} <= {"context", "end"}
    assert any(r.finish == "context" for r in sampled)
    base = backend.student.network.base
    for item in sampled:
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([item.token_ids.tolist()])).logits[0, :-1]
        own = torch.log_softmax(logits, -1).gather(-1, torch.tensor(item.token_ids[1:].astype("int64"))[:, None])[:, 0]
        gap = abs(own.numpy()[item.loss_mask[1:]] - item.rollout_logprobs[item.loss_mask]).max()
        assert gap < 1e-4


def test_a_demonstration_beyond_the_change_of_a_rope_is_refused_by_its_cause(tmp_path: Path):
    model = save(tmp_path / "llama", "llama", {**SOUND["llama"], **LONGROPE})
    tree = sft_recipe(tmp_path / "sft", model)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"id": "0", "prompt": "say", "answer": "x" * 70}) + "\n", encoding="utf-8")
    tree["tasks"]["answers"]["path"] = str(path)
    with pytest.raises(
        DataError, match=r"tokens with its answer exceed the limit of the student \(64: its rope \('longrope'\)"
    ):
        sft(SftConfig(**tree))


@pytest.mark.parametrize(("given", "added"), [((), ["--max-model-len", "64"]), (("--max-model-len=32",), [])])
def test_a_server_takes_no_sequence_for_which_its_rope_would_change(
    tmp_path: Path, given: tuple[str, ...], added: list[str]
):
    engines = pytest.importorskip("opd.distributed.engines")
    assert engines._max_model_len(save(tmp_path / "long", "llama", {**SOUND["llama"], **LONGROPE}), given) == added
    assert engines._max_model_len(save(tmp_path / "plain", "llama", SOUND["llama"]), given) == []
    assert engines._max_model_len(str(tmp_path / "nowhere"), given) == []
