"""The metrics that detectors read: each by hand, its laws, and batches that lack something."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import Bench, random_case
from benches import bench as bench
from factories import prompt, rollout, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.batch import Batch, pack
from opd.detectors.metrics import auroc, compression, detector_metrics, longest_run, repeated_trigrams
from opd.local import loss_terms as terms
from opd.metrics import Metrics, merge, values
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, agreement
from opd.records import ChunkScore, FailedScore, Flag, Rollout, ScoredRollout

quick = settings(max_examples=60)
small = st.integers(-3, 3).map(float)


def made(count: int, *, sample: int = 0, teacher: str = "t", ids: list[int] | None = None, **changes: Any) -> Rollout:
    """A rollout of two prompt tokens and `count` actions of different ids, each sampled with log-probability -1."""
    given = prompt(f"p{sample}", teacher=teacher)
    actions = ids or list(range(10, 10 + count))
    item = rollout([1, 2, *actions], 2, prompt=given, sample=sample, logprobs=[-1.0] * len(actions))
    return replace(item, **changes)


def found(items: list[ScoredRollout], *, special: frozenset[int] = frozenset(), **columns: Any) -> dict[str, float]:
    """The plain metrics of some rollouts; `columns` take the place of the batch's."""
    batch, _ = pack(items, logprob_floor=-50.0)
    return values(detector_metrics(items, replace(batch, **columns), special_ids=special))


@quick
@given(st.lists(st.tuples(small, st.sampled_from([0.0, 0.5, 1.0])), max_size=12))
def test_auroc_is_the_fraction_of_pairs_in_the_right_order(pairs: list[tuple[float, float]]):
    wins = weight = 0.0
    for (a, high), (b, low) in product(pairs, pairs):
        if high > low:
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
            weight += 1.0
    area = auroc(np.array([s for s, _ in pairs]), np.array([o for _, o in pairs]))
    assert (area.total, area.weight) == (wins, weight)


@quick
@given(st.lists(st.tuples(small, st.booleans()), min_size=2, max_size=12))
def test_auroc_knows_only_the_order(pairs: list[tuple[float, bool]]):
    scores, rewards = np.array([s for s, _ in pairs]), np.array([float(o) for _, o in pairs])
    area = auroc(scores, rewards)
    assert auroc(np.exp(scores) - 3.0, 5.0 * rewards - 1.0) == area
    assert auroc(-scores, rewards).total == pytest.approx(area.weight - area.total)


@quick
@given(st.lists(st.integers(0, 3), max_size=30))
def test_repeated_trigrams_are_those_that_a_set_has_already(ids: list[int]):
    grams = list(zip(ids, ids[1:], ids[2:], strict=False))
    wanted = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
    assert repeated_trigrams(np.array(ids, dtype=np.int32)) == pytest.approx(wanted)


def test_large_ids_do_not_make_trigrams_equal():
    ids = np.array([250_000, 7, 249_999, 8, 250_000, 7, 249_998], dtype=np.int32)
    assert repeated_trigrams(ids) == 0.0


def test_compression_tells_loops_from_text():
    assert compression("") == 0.0
    assert compression("the same words again. " * 40) > 8.0
    assert compression(Path(__file__).read_text(encoding="utf-8")) < 6.0
    assert compression("\ud800 alone") > 0.0  # half of a pair, as a tokenizer may leave it


@quick
@given(st.lists(st.booleans(), max_size=20))
def test_the_longest_run_is_the_longest_block_of_true(low: list[bool]):
    wanted = max((len(part) for part in "".join("x" if b else " " for b in low).split()), default=0)
    assert longest_run(np.array(low, dtype=bool)) == wanted


def test_the_log_ratio_of_a_response_is_ranked_against_its_reward():
    totals = {0: (-3.0, 1.0), 1: (-1.0, 0.0), 2: (-2.0, 0.0), 3: (-5.0, None)}
    items = [scored(made(1, sample=i, reward=o), [t - 1.0]) for i, (t, o) in totals.items()]
    metrics = found(items)
    assert metrics["detectors/auroc/mean"] == 0.0
    assert (metrics["detectors/auroc_pairs/sum"], metrics["detectors/auroc_of/sum"]) == (2.0, 3.0)


def test_the_parts_of_an_episode_are_ranked_as_one():
    parts = [made(1, sample=0, reward=1.0, part=part) for part in (0, 1)]
    items = [scored(parts[0], [-3.0]), scored(parts[1], [-3.0]), scored(made(1, sample=1, reward=0.0), [-4.5])]
    metrics = found(items)
    assert metrics["detectors/auroc/mean"] == 0.0  # -4 against -3.5, where one part alone has -2
    assert metrics["detectors/auroc_of/sum"] == 2.0
    assert metrics["detectors/reward/t/mean"] == 0.5


def test_the_ratio_is_to_the_student_as_it_was_before_the_update():
    items = [scored(made(1, sample=i, reward=float(i)), [-1.0]) for i in range(2)]
    later = torch.tensor([0.0, 0.0, -1.0, 0.0, 0.0, -9.0])
    assert found(items, student_logprobs=later)["detectors/auroc/mean"] == 1.0
    assert found(items)["detectors/auroc/mean"] == 0.5


def in_chunks(chunks: list[int], logprobs: list[float], **changes: Any) -> ScoredRollout:
    """A response read by a teacher of another tokenizer; one chunk number an action, log q at each chunk's last token."""
    item = made(len(chunks), **changes)
    spread = np.zeros(len(item.token_ids), dtype=np.float32)
    spread[item.loss_mask] = logprobs
    numbers = np.full(len(item.token_ids), -1, dtype=np.int32)
    numbers[item.loss_mask] = chunks
    return ScoredRollout(item, ChunkScore("t", spread, numbers, 9, {}))


def test_a_chunk_of_another_tokenizer_is_one_log_ratio():
    special = frozenset({12, 13})
    # log q - log pi: the chunk of tokens 10 to 12 -20 + 3, token 13 none, the chunk of token 14 -2 + 1
    metrics = found([in_chunks([0, 0, 0, -1, 1], [0.0, 0.0, -20.0, 0.0, -2.0])], special=special)
    assert metrics["detectors/special_tokens/sum"] == metrics["detectors/special_tokens/mean"] == 1.0
    assert metrics["detectors/special_log_ratio/max"] == 17.0
    # The second response's first chunk has the number of the first one's last: -1 against -2, not -3 against 0.
    both = [in_chunks([0, 0], [0.0, -3.0], reward=1.0), in_chunks([0, 1], [-3.0, -1.0], sample=1, reward=0.0)]
    assert found(both)["detectors/auroc/mean"] == 1.0


def test_special_tokens_count_beyond_fifteen_nats_either_way():
    item = scored(made(4, ids=[5, 6, 5, 7]), [-17.5, -30.0, -10.0, 0.0])
    metrics = found([item], special=frozenset({5, 9}))
    assert metrics["detectors/special_tokens/mean"] == 0.5
    assert metrics["detectors/special_log_ratio/max"] == 16.5
    assert not any("special" in name for name in found([item]))


def test_low_windows_are_low_beside_the_rest_of_the_step():
    loud, quiet = [-3.0] * 64, [-1.1] * 64
    hiding = scored(made(320), loud + quiet * 4)
    honest = scored(made(320, sample=1), loud * 2 + quiet * 3)
    short = scored(made(200, sample=2), [-1.1] * 200)
    metrics = found([hiding, honest, short])
    assert metrics["detectors/low_kl/mean"] == 0.5
    assert metrics["detectors/low_kl_run/max"] == 4.0
    assert not any("low_kl" in name for name in found([short]))


def test_a_response_that_ends_in_a_loop_is_one():
    start = list(range(100, 300))
    looping = scored(made(0, ids=[*start, *([3, 4, 5] * 60)]), [-1.0] * 380)
    plain = scored(made(0, ids=[*start, *range(400, 580)], sample=1), [-1.0] * 380)
    phrase = scored(made(0, ids=[3, 4, 5] * 5, sample=2), [-1.0] * 15)
    metrics = found([looping, plain, phrase])
    assert metrics["detectors/looping/mean"] == pytest.approx(1 / 3)
    assert metrics["detectors/repeated/mean"] == pytest.approx((175 / 378 + 0.0 + 10 / 13) / 3)


def test_the_students_own_words_are_compressed():
    question, words = {"role": "user", "content": "q" * 900}, {"role": "assistant", "content": "again and again "}
    answers = {
        "what others say": [words, {"role": "tool", "content": "x" * 900}],
        "no text at all": [{"role": "assistant", "content": None}],
        "a loop": [words | {"content": 60 * words["content"]}],
    }
    looping = {}
    for name, messages in answers.items():
        item = made(3)
        asked = replace(item.prompt, messages=(question,))
        looping[name] = found([scored(replace(item, prompt=asked, messages=(question, *messages)), [-1.0] * 3)])
    assert [m["detectors/looping/mean"] for m in looping.values()] == [0.0, 0.0, 1.0]
    assert ["detectors/compression/mean" in m for m in looping.values()] == [False, False, True]


def test_format_errors_count_by_episode():
    flags = (Flag("tags", 2, 3), Flag("tags", 3, 4), Flag("truncated", 4, 5))
    items = [
        scored(made(3, flags=flags), [-1.0] * 3),
        scored(made(3, part=1), [-1.0] * 3),
        scored(made(3, sample=1), [-1.0] * 3),
    ]
    metrics = found(items)
    assert metrics["format/errors/mean"] == 0.5
    assert (metrics["format/tags/sum"], metrics["format/truncated/sum"]) == (1.0, 1.0)
    assert metrics["detectors/episodes/sum"] == 2.0


def test_flagged_tokens_are_held_against_the_others():
    items = [scored(made(4, flags=(Flag("tags", 4, 6),)), [-3.0, -2.0, -1.0, -0.5])]
    advantages = torch.tensor([0.0, 0.0, -2.0, -1.0, 0.0, 0.0])  # masked: what is flagged gets 0
    metrics = found(items, advantages=advantages)
    assert (metrics["detectors/flagged_advantage/mean"], metrics["detectors/unflagged_advantage/mean"]) == (0.0, -1.5)
    # Over the vocabulary the immediate part is centred by itself, so there is nothing to hold it against.
    metrics = found(items)
    assert metrics["detectors/flagged_advantage/mean"] == pytest.approx(0.25)
    assert "detectors/unflagged_advantage/mean" not in metrics


def test_an_integrated_part_is_added_to_the_sampled_one_where_it_acts():
    items = [scored(made(3, flags=(Flag("tags", 2, 4),)), [-3.0, -2.0, -7.0])]
    batch, _ = pack(items, logprob_floor=-50.0)
    masked = torch.tensor([False, False, False, True, True])
    batch = replace(batch, advantages=torch.tensor([0.0, 0.0, 4.0, 4.0, -1.0]), distill_mask=masked)
    metrics = values(detector_metrics(items, batch, special_ids=frozenset(), integrated=0.5))
    assert metrics["detectors/flagged_advantage/mean"] == (4.0 + 4.0 - 0.5) / 2
    assert metrics["detectors/unflagged_advantage/mean"] == -1.0


def test_the_five_most_common_tokens_have_their_fraction_of_the_positive_advantage():
    ids = [3, 4, 5, 6, 7] * 2 + list(range(20, 30))
    gains = [1.0, -9.0] + [0.0] * 8 + [3.0] + [0.0] * 9
    item = scored(made(0, ids=ids), [g - 1.0 for g in gains])
    metrics = found([item])
    assert metrics["detectors/common_gain/mean"] == 0.25
    assert metrics["detectors/common_actions/mean"] == 0.5
    few = scored(made(0, ids=[3, 4, 5, 6] * 5), [0.0] * 20)
    assert "detectors/common_gain/mean" not in found([few])


def test_what_is_missing_is_left_out():
    fine = scored(made(2, reward=None), [-1.0, -1.0])
    failed = ScoredRollout(made(2, sample=1, reward=0.25), FailedScore("other", "no room"))
    silent = scored(replace(made(1, sample=2), loss_mask=np.zeros(3, dtype=bool)), [])
    metrics = found([fine, failed, silent])
    assert metrics["detectors/reward/other/mean"] == 0.25
    assert metrics["detectors/episodes/sum"] == 3.0
    assert not any("auroc" in name for name in metrics)


def test_a_batch_without_a_scored_action_has_nothing_to_say():
    item = in_chunks([-1, -1], [0.0, 0.0], reward=1.0)
    metrics = found([item])
    assert not any(
        name in metrics for name in ("detectors/auroc/mean", "detectors/low_kl/mean", "detectors/special_tokens/mean")
    )


@quick
@given(st.data())
def test_no_batch_makes_it_fail(data: st.DataObject):
    rewards, floats = st.sampled_from([None, 0.0, 0.3, 1.0]), st.floats(-60, 0, width=32)
    items = []
    for sample in range(data.draw(st.integers(1, 4))):
        size = data.draw(st.integers(1, 6))
        logprobs = data.draw(st.lists(floats, min_size=size, max_size=size))
        flags = (Flag("tags", *sorted(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))),)
        changes = {"sample": sample, "reward": data.draw(rewards), "flags": data.draw(st.sampled_from([(), flags]))}
        kind = data.draw(st.sampled_from(["sampled", "chunks", "failed"])) if sample else "sampled"
        if kind == "chunks":
            numbers = sorted(data.draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size)))
            items.append(in_chunks(numbers, logprobs, **changes))
        elif kind == "failed":
            items.append(ScoredRollout(made(size, **changes), FailedScore("t", "why")))
        else:
            items.append(scored(made(size, **changes), logprobs))
    batch, _ = pack(items, logprob_floor=-50.0)
    number = data.draw(st.sampled_from([None, 0.0, math.nan, math.inf, 2.0]))
    if number is not None:
        batch = replace(batch, advantages=torch.full((len(batch.token_ids),), number))
    metrics = detector_metrics(
        items, batch, special_ids=frozenset({10, 12}), integrated=data.draw(st.sampled_from([0.0, 1.0]))
    )
    for name, value in values(metrics).items():
        assert math.isfinite(value), name
        assert (
            not name.endswith("/mean") or "advantage" in name or "compression" in name or -1e-9 <= value <= 1.0 + 1e-9
        )


def test_detector_metrics_of_two_ranks_merges():
    halves = [[scored(made(4, sample=i, reward=float(i % 2)), [-2.0] * 4)] for i in range(4)]

    def metrics(items: list[ScoredRollout]) -> Metrics:
        return detector_metrics(items, pack(items, logprob_floor=-50.0)[0], special_ids=frozenset({10}))

    whole, parts = values(metrics([item for half in halves for item in half])), values(merge(map(metrics, halves)))
    for name in (
        "format/errors/mean",
        "detectors/special_tokens/mean",
        "detectors/repeated/mean",
        "detectors/reward/t/mean",
    ):
        assert whole[name] == parts[name]


def dense_agreement(logp: torch.Tensor, logq: torch.Tensor, k: int) -> list[tuple[float, float, float]]:
    """(overlap, student's entropy, teacher's), state by state, from the whole distributions."""
    rows = []
    for p, q in zip(logp.exp(), logq.exp(), strict=True):
        both = set(p.argsort(descending=True)[:k].tolist()) & set(q.argsort(descending=True)[:k].tolist())
        rows.append((len(both) / k, -float((p * p.log()).sum()), -float((q * q.log()).sum())))
    return rows


@pytest.mark.parametrize("max_logits", [1, 30, 10_000])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_agreement_equals_a_dense_computation(k: int, max_logits: int):
    def draw(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    hidden, head = draw(5, 4, seed=0), draw(9, 4, seed=1)
    teachers = [
        TeacherStates(draw(5, 3, seed=2), draw(9, 3, seed=3), 1.5),
        TeacherStates(draw(5, 6, seed=4), draw(9, 6, seed=5), -0.5),
    ]
    how = VocabularyLoss(temperature=0.7, max_logits=max_logits)
    seen = agreement(hidden, head, teachers, how, k=k)
    mixed = sum(t.weight * torch.log_softmax(t.hidden @ t.head.T / 0.7, -1) for t in teachers)
    assert isinstance(mixed, torch.Tensor)
    wanted = dense_agreement(torch.log_softmax(hidden @ head.T / 0.7, -1), torch.log_softmax(mixed, -1), k)
    torch.testing.assert_close(torch.stack(list(seen), -1), torch.tensor(wanted, dtype=torch.float64))


def test_agreement_is_whole_where_the_two_are_equal_and_k_may_exceed_the_vocabulary():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eye = torch.eye(9, dtype=torch.float64)
    for k in (2, 9, 40):
        seen = agreement(logits, eye, [TeacherStates(logits + 3.0, eye)], VocabularyLoss(), k=k)
        assert seen.topk_overlap.tolist() == [1.0] * 4
        torch.testing.assert_close(seen.student_entropy, seen.teacher_entropy)


def test_agreement_with_another_vocabulary_is_that_of_cells():
    hidden, head, teacher, theirs, cells = random_case()
    seen = agreement(hidden, head, [TeacherStates(teacher, theirs, 1.0, cells)], VocabularyLoss(), k=2)
    p, q = (hidden.detach() @ head.detach().T).softmax(-1), (teacher @ theirs.T).softmax(-1)
    ours = torch.stack([p[:, cells.student == c].sum(-1) for c in range(cells.num)], -1)
    other = torch.stack([q[:, cells.teacher == c].sum(-1) for c in range(cells.num)], -1).clamp(min=math.exp(-50.0))
    for row in range(len(hidden)):
        # the last cell holds what has no counterpart, so it is nobody's likeliest token
        both = set(ours[row, :-1].topk(2).indices.tolist()) & set(other[row, :-1].topk(2).indices.tolist())
        assert float(seen.topk_overlap[row]) == len(both) / 2
    torch.testing.assert_close(seen.student_entropy, -(ours * ours.log()).sum(-1))
    torch.testing.assert_close(seen.teacher_entropy, -(other * other.log()).sum(-1), rtol=1e-6, atol=1e-9)


def compared(bench: Bench, batch: Batch, **options: Any) -> dict[str, float]:
    metrics = values(bench.learner(**options).forward_backward(batch))
    return {
        n: v
        for n, v in metrics.items()
        if "topk_overlap" in n or n in ("teacher/entropy/mean", "student/entropy_gap/mean")
    }


def test_an_update_reports_the_agreement_with_each_teacher(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terms, "_COMPARED_EVERY", 1)
    batch, _ = pack(bench.scored[::2], logprob_floor=-50.0)  # no two samples share a state, so every state counts once
    metrics = compared(bench, batch)
    overlaps = [metrics[f"student/topk_overlap/{name}/mean"] for name in ("even", "odd")]
    assert min(overlaps) < metrics["student/topk_overlap/mean"] < max(overlaps)
    student = values(bench.learner().forward_backward(batch))["student/entropy/mean"]
    assert metrics["teacher/entropy/mean"] - metrics["student/entropy_gap/mean"] == pytest.approx(student)
    assert abs(metrics["student/entropy_gap/mean"]) > 0.01
    sampled = replace(batch, advantages=torch.ones(len(batch.token_ids)))
    assert compared(bench, sampled, type="kl_to_go", discount=1.0) == metrics
    assert compared(bench, replace(sampled, teacher_parts=None), type="immediate") == {}


def test_a_pass_compares_a_bounded_number_of_states(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def counting(hidden: torch.Tensor, *rest: Any, **options: Any) -> Any:
        asked.append(len(hidden))
        return agreement(hidden, *rest, **options)

    monkeypatch.setattr(terms, "agreement", counting)
    compared(bench, bench.batch)
    eighth, asked[:] = sum(asked), []
    monkeypatch.setattr(terms, "_COMPARED_EVERY", 1)
    compared(bench, bench.batch)
    everything, asked[:] = sum(asked), []
    monkeypatch.setattr(terms, "_MOST_COMPARED", 10)
    compared(bench, bench.batch)
    assert everything / 8 <= eighth <= everything / 8 + 2  # two teachers round up
    assert sum(asked) <= 10 < everything
