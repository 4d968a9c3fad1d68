"""A teacher with another tokenizer, scored in chunks: against plain forward passes, and case by case what goes wrong elsewhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import CHATML, save_toy, toy_recipe
from pairs import rollout_of
from templated import policy_of, save_cross_tokenizer, toy_without
from transformers import AutoModelForCausalLM, AutoTokenizer
from zoo import toy, toy_bpe

import opd
from opd.errors import ModelError
from opd.local.teacher import CrossTokenizerPolicy, score_cross_tokenizer
from opd.records import ChunkScore, FailedScore, Rollout, Turn
from opd.text.alignment import chunk_score, pair_turns
from opd.text.special_tags import counterparts
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide


def score(policy: CrossTokenizerPolicy, rollouts: list[Rollout], *, temperature: float = 1.0) -> list[ChunkScore]:
    found = score_cross_tokenizer("t", policy, rollouts, temperature=temperature, max_tokens=64)
    assert all(isinstance(s, ChunkScore) for s in found), found
    return found  # type: ignore[return-value]  # asserted above


def written(policy: CrossTokenizerPolicy, text: str, *, ended: bool = True) -> Rollout:
    return rollout_of(policy.student_side.encode(text), policy.student_side, text=text, ended=ended)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> CrossTokenizerPolicy:
    """A BPE teacher for a student that writes bytes."""
    return policy_of(save_cross_tokenizer(tmp_path_factory.mktemp("teacher"), toy("bpe400")), toy("bytes"))


def plain_logprobs(
    policy: CrossTokenizerPolicy, text: str, *, temperature: float = 1.0
) -> tuple[list[int], list[float], float]:
    """The teacher's ids of the response, their log-probabilities, and that of ending, by one unpacked forward pass."""
    tokenizer, model = policy.teacher_side.tokenizer, policy.network.base
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say it."}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(rendered, add_special_tokens=False).input_ids
    ids = tokenizer(rendered + text, add_special_tokens=False).input_ids
    assert ids[: len(prompt)] == prompt
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double() / temperature
    logprobs = logits.log_softmax(-1)
    each = [float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
    ending = float(logprobs[-1, list(policy.teacher_side.end_ids)].logsumexp(-1))
    return ids[len(prompt) :], each, ending


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_sum_what_a_plain_forward_pass_gives(policy: CrossTokenizerPolicy, temperature: float):
    text = "the cat saw 123 naïve 漢字 🙂 ok"
    [found] = score(policy, [written(policy, text)], temperature=temperature)
    _, each, ending = plain_logprobs(policy, text, temperature=temperature)
    assert found.logprobs.sum() == pytest.approx(sum(each) + ending, abs=1e-3)
    last = np.flatnonzero(found.chunks == found.chunks.max())
    assert found.logprobs[last[-1]] == pytest.approx(ending, abs=1e-4)


def test_one_tokenizer_gives_the_plain_log_ratio(tmp_path: Path):
    """T1."""
    policy = policy_of(save_toy(tmp_path, 5), toy("bytes"))
    text = "plain"
    [found] = score(policy, [written(policy, text)])
    _, each, ending = plain_logprobs(policy, text)
    assert found.chunks.tolist() == [-1, *range(len(text) + 1)]
    assert found.logprobs[1:] == pytest.approx([*each, ending], abs=1e-5)


def test_two_spellings_of_one_text_have_one_teacher_total(policy: CrossTokenizerPolicy, tmp_path: Path):
    """T20: the student's side differs, the teacher's total does not."""
    student = toy("bpe300")
    both = CrossTokenizerPolicy(policy.network, None, policy.teacher_side, StudentSide(student), -50.0)
    text = "the cat sat"
    ids = both.student_side.encode(text)
    split = [t for c in text for t in both.student_side.encode(c)]
    assert split != ids
    usual, odd = score(both, [rollout_of(i, both.student_side, text=text) for i in (ids, split)])
    assert usual.logprobs.sum() == pytest.approx(odd.logprobs.sum(), abs=1e-4)
    assert usual.facts["non_canonical"] == 0
    assert odd.facts["non_canonical"] == 1


def test_scores_do_not_depend_on_what_is_packed_beside(policy: CrossTokenizerPolicy):
    items = [written(policy, t) for t in ("the cat", "the cat sat on the mat", "12345", "")]
    together = score(policy, items)
    for item, found in zip(items, together, strict=True):
        [alone] = score(policy, [item])
        assert found.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert found.chunks.tolist() == alone.chunks.tolist()


def test_ending_is_one_event_whichever_token_says_it(tmp_path: Path):
    """T5: the log-probability of the end is that of the set of end tokens."""
    tokenizer = toy_bpe(350)
    source = save_cross_tokenizer(tmp_path, tokenizer)
    policy = policy_of(source, toy("bytes"))
    both = (*policy.teacher_side.end_ids, 42)
    wide = CrossTokenizerPolicy(policy.network, None, policy.teacher_side, policy.student_side, -50.0)
    wide.teacher_side.end_ids = both
    [found] = score(wide, [written(wide, "hi")])
    _, _, ending = plain_logprobs(wide, "hi")
    assert found.logprobs[-1] == pytest.approx(ending, abs=1e-4)


def test_a_truncated_response_has_no_end(policy: CrossTokenizerPolicy):
    cut = policy.student_side.encode("the cat 漢")[:-1]  # T18: in mid-character
    [found] = score(policy, [rollout_of(cut, policy.student_side, text="", ended=False)])
    assert found.facts["masked/invalid_utf8"] == 2
    assert found.chunks[-2:].tolist() == [-1, -1]
    assert found.chunks[1] == 0
    assert found.num_bytes == len("the cat ")


def test_bytes_that_are_no_text_mask_their_neighbours_at_most(policy: CrossTokenizerPolicy):
    """In the middle, not only at the end: what stands behind keeps its own score."""
    table = policy.student_side.table
    ids = [*policy.student_side.encode("the cat"), table_id(table, b"\xff"), *policy.student_side.encode(" sat")]
    [turn] = pair_turns(rollout_of(ids, policy.student_side, text=""), policy.student_side, policy.teacher_side)
    assert turn.student_text.text == "the cat\ufffd sat"
    assert [i for i, m in enumerate(turn.pairing.masked) if m] == [7]
    assert turn.pairing.chunk_ids[-1] == len(turn.pairing.sums(np.zeros(len(turn.teacher_text.ends) + 1))) - 1


def table_id(table, piece: bytes) -> int:
    return next(i for i in range(len(table)) if table.of(i) == piece)


def test_control_tokens_without_a_counterpart_are_masked_and_not_read(policy: CrossTokenizerPolicy):
    start = toy("bytes").convert_tokens_to_ids("<|im_start|>")
    ids = [*policy.student_side.encode("ab"), start, *policy.student_side.encode("cd")]
    assert (
        counterparts(policy.student_side.table, policy.teacher_side.table)[start] == "<|im_start|>"
    )  # both have it: it is written
    [turn] = pair_turns(rollout_of(ids, policy.student_side, text=""), policy.student_side, policy.teacher_side)
    theirs = policy.teacher_side.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert turn.teacher_text.token_ids[turn.teacher_text.first :].tolist().count(theirs) == 1
    assert not turn.pairing.masked.any()
    assert turn.canonical
    lonely = TeacherSide(toy_without(toy("bpe400"), "<|im_start|>"), name="t")
    [turn] = pair_turns(rollout_of(ids, policy.student_side, text=""), policy.student_side, lonely)
    assert turn.student_text.text == "abcd"
    assert turn.pairing.masked.tolist() == [0, 0, int(Masked.NO_COUNTERPART), 0, 0, 0]
    assert turn.pairing.kept_sizes.sum() == 4


def test_ids_beyond_the_tokenizer_are_masked(policy: CrossTokenizerPolicy):
    ids = [*policy.student_side.encode("ab"), 5000, *policy.student_side.encode("cd")]
    [found] = score(policy, [rollout_of(ids, policy.student_side, text="")])
    assert found.facts["masked/unknown_id"] == 1
    assert found.num_bytes == 4


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("ids", [[], [256], [256, 5000], [5000]])
def test_responses_of_nothing_but_control_tokens(policy: CrossTokenizerPolicy, ids: list[int], ended: bool):
    lonely = TeacherSide(toy_without(toy("bpe400"), "<|im_start|>"), name="t")
    item = rollout_of(ids, policy.student_side, text="", ended=ended)
    turns = pair_turns(item, policy.student_side, lonely)
    found = chunk_score("t", item, turns, [np.full(len(t.teacher_text.ends) + ended, -2.0) for t in turns])
    assert found.chunks.tolist() == [-1] * (1 + len(ids)) + [0] * ended
    assert found.logprobs.tolist() == [0.0] * (1 + len(ids)) + [-2.0] * ended
    assert found.num_bytes == 0
    assert found.facts["masked/no_counterpart"] + found.facts["masked/unknown_id"] == len(ids)


@pytest.mark.parametrize(
    ("shown", "answer", "gone"),
    [
        pytest.param("m['content'].split('</think>')[-1]", "<think>hm</think>yes", "hm", id="T14: drops thinking"),
        pytest.param(
            "m['content'].replace(': ', ':')",
            '{"name": "f", "arguments": {"a": 1}}',
            '": ',
            id="T13: writes calls anew",
        ),
    ],
)
def test_history_that_the_template_rewrites_is_read_as_the_teacher_would_see_it(
    policy: CrossTokenizerPolicy, shown: str, answer: str, gone: str
):
    """The first turn is read as it was written, the second behind the conversation as the template shows it then."""
    tokenizer = toy_bpe(380, template=CHATML.replace("m['content'] +", f"{shown} +"))
    teacher_side = TeacherSide(tokenizer, name="t")
    first, second = policy.student_side.encode(answer), policy.student_side.encode("no")
    end = policy.student_side.end_ids[-1]
    ids = [0, *first, end, 5, *second, end]
    stops = [1, 1 + len(first) + 1]
    base = rollout_of([], policy.student_side, text="")
    item = Rollout(
        prompt=base.prompt,
        sample=0,
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.array([False, *[True] * (len(first) + 1), False, *[True] * (len(second) + 1)]),
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(
            Turn("prompt", 0, 1), Turn("student", *stops), Turn("observation", stops[1], stops[1] + 1),
            Turn("student", stops[1] + 1, len(ids)),
        ),
        messages=(
            *base.prompt.messages, {"role": "assistant", "content": answer},
            {"role": "user", "content": "and?"}, {"role": "assistant", "content": "no"},
        ),
        finish="end",
        policy_version=0,
    )  # fmt: skip
    one, two = pair_turns(item, policy.student_side, teacher_side)
    assert (one.rewritten, two.rewritten) == (False, True)
    written = teacher_side.table.join(one.teacher_text.token_ids[one.teacher_text.first :]).tobytes().decode()
    assert written == one.student_text.text == answer
    assert gone not in tokenizer.decode(two.teacher_text.token_ids)
    [found] = score(policy, [item])
    assert (found.chunks[item.loss_mask] >= 0).all()
    assert found.facts["turns"] == 2


def test_the_floor_is_of_a_token_and_counted(policy: CrossTokenizerPolicy):
    text = "xq zj vw kp yy"
    [free] = score(policy, [written(policy, text)])
    low = CrossTokenizerPolicy(policy.network, None, policy.teacher_side, policy.student_side, -3.0)
    [found] = score(low, [written(low, text)])
    _, each, ending = plain_logprobs(policy, text)
    assert found.logprobs.sum() == pytest.approx(sum(max(x, -3.0) for x in [*each, ending]), abs=1e-3)
    assert found.facts["floored"] == sum(x < -3.0 for x in [*each, ending]) > 0
    assert free.facts["floored"] == 0


def test_a_context_that_is_too_short_fails_that_rollout_alone(tmp_path: Path):
    policy = policy_of(save_cross_tokenizer(tmp_path, toy_bpe(360), max_context=40), toy("bytes"))
    short, long = written(policy, "the cat"), written(policy, "xyz " * 40)
    found = score_cross_tokenizer("t", policy, [long, short], temperature=1.0, max_tokens=64)
    assert isinstance(found[0], FailedScore)
    assert "exceed the context of teacher 't' (40)" in found[0].reason
    assert isinstance(found[1], ChunkScore)


def test_training_follows_a_foreign_teacher(tmp_path: Path):
    """The whole loop: chunks on disk and back, metrics by byte, the same run with another teacher beside."""
    tree = toy_recipe(tmp_path, objective={"type": "immediate"}, steps=2)
    tree["teachers"]["odd"] = {"model": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(390))}
    reports = []
    result = opd.train(opd.parse_config(tree), callbacks=[reports.append])
    assert result.finished
    values = reports[-1].values
    assert values["kl/byte/mean"] > 0
    assert 0 <= values["align/odd/masked/mean"] < 1
    assert np.isfinite(values["kl/token/odd/mean"])
    back = list(opd.read_rollouts(tmp_path / "run", step=1))
    for now, then in zip(reports[0].scored, back, strict=True):
        assert type(now.score) is type(then.score) or now.score.teacher == "even"
        if isinstance(now.score, ChunkScore):
            assert isinstance(then.score, ChunkScore)
            assert then.score.chunks.tolist() == now.score.chunks.tolist()
            assert then.score.num_bytes == now.score.num_bytes
            assert dict(then.score.facts) == dict(now.score.facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"type": "exact"}}, "needs its distribution over the student's tokens"),
        ({"objective": {"type": "immediate", "baseline": "kl"}}, "needs its distribution over the student's tokens"),
        ({"objective": {"type": "immediate", "extrapolation": 1.5, "reference": "student"}}, "leave it at 1.0"),
        (
            {"objective": {"type": "immediate"}, "teachers": {"both": {"weights": {"even": 1.0, "odd": 1.0}}}},
            "cannot be a part of teachers.both.weights",
        ),
    ],
)
def test_what_needs_common_tokens_is_refused(tmp_path: Path, change: dict, message: str):
    tree = toy_recipe(tmp_path, **change)
    tree["teachers"]["odd"] = {"model": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(390))}
    if "both" in tree["teachers"]:
        tree["tasks"]["first"]["teacher"] = "both"
    with pytest.raises(ModelError, match=r"teacher 'odd': .* has another tokenizer") as caught:
        opd.train(opd.parse_config(tree))
    assert message in str(caught.value)


def test_models_load_as_saved(tmp_path: Path):
    source = save_cross_tokenizer(tmp_path, toy_bpe(320))
    assert (
        AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|im_end|>")
        == AutoModelForCausalLM.from_pretrained(source).generation_config.eos_token_id
    )


def test_a_rollout_without_a_turn_cannot_be_scored_and_holds_up_no_other(policy: CrossTokenizerPolicy):
    item = written(policy, "the cat")
    nothing = replace(item, loss_mask=np.zeros(len(item.token_ids), dtype=bool), turns=item.turns[:1])
    found = score_cross_tokenizer("t", policy, [nothing, item], temperature=1.0, max_tokens=64)
    assert found[0] == FailedScore("t", "no turn of the student")
    assert isinstance(found[1], ChunkScore)
