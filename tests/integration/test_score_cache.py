"""Cached scores: which are scored again, and that training gives the same numbers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import prompt, rollout, toy_recipe
from hypothesis import given
from hypothesis import strategies as st

import opd
from opd.records import FailedScore, Rollout, SampledScore, ScoredRollout, Turn
from opd.score_cache import CachedTeacher, MemoryScores, key_of


class Recorder:
    """A teacher that gives each token's id as its score, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self.asked.append([r.id for r in rollouts])
        return [ScoredRollout(r, self._one(r)) for r in rollouts]

    def _one(self, item: Rollout) -> SampledScore | FailedScore:
        if item.prompt.id == "bad":
            return FailedScore("t", "no")
        return SampledScore("t", np.where(item.loss_mask, -item.token_ids.astype(np.float32), 0.0))


def test_an_equal_response_is_scored_once():
    inner = Recorder()
    teacher = CachedTeacher(inner, MemoryScores(10))
    first, second = (rollout([1, 2, last], 1, prompt=prompt("p")) for last in (3, 4))
    again = replace(first, sample=7, reward=0.5, rollout_logprobs=first.rollout_logprobs - 1)
    one, same, other = teacher.score([first, again, second])
    assert len(inner.asked[-1]) == 2
    assert (one.cached, same.cached, other.cached) == (False, False, False)
    [later] = teacher.score([again])
    assert len(inner.asked) == 1  # nobody was asked
    assert later.cached
    assert later.rollout is again
    assert not isinstance(later.score, FailedScore)
    assert later.score.logprobs.tolist() == [0, -2, -3]


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": prompt("p", teacher="u")},
        {"token_ids": np.array([1, 2, 5], dtype=np.int32)},
        {"loss_mask": np.array([False, False, True])},
        {"messages": ({"role": "user", "content": "else"}, {"role": "assistant", "content": "x"})},
        {"turns": (Turn("prompt", 0, 1), Turn("student", 1, 2), Turn("observation", 2, 3))},
        {"prompt": replace(prompt("p"), tools=({"name": "add"},))},
    ],
)
def test_what_a_score_depends_on_is_in_its_key(change: dict):
    inner = Recorder()
    teacher = CachedTeacher(inner, MemoryScores(10))
    item = rollout([1, 2, 3], 1, prompt=prompt("p"))
    teacher.score([item])
    teacher.score([replace(item, **change)])
    assert [len(asked) for asked in inner.asked] == [1, 1]


DIFFERENT = (
    st.integers(0, 3),  # the length of a message
    st.lists(st.integers(0, 300), min_size=2, max_size=4),
    st.integers(1, 2),  # tokens of the prompt
    st.sampled_from(["t", "u"]),
)


@given(one=st.tuples(*DIFFERENT), other=st.tuples(*DIFFERENT), dtype=st.sampled_from([np.int32, np.int64]))
def test_two_rollouts_have_one_key_just_where_nothing_that_counts_differs(one: Any, other: Any, dtype: Any):
    def made(length: int, tokens: list[int], start: int, teacher: str) -> Rollout:
        return rollout(tokens, start, prompt=prompt("p", "x" * length, teacher=teacher))

    first, second = made(*one), made(*other)
    again = replace(second, sample=3, reward=None, finish="length", token_ids=second.token_ids.astype(dtype))
    assert key_of(again) == key_of(second)
    assert (key_of(first) == key_of(second)) == (one == other)


def test_failures_are_scored_again_and_the_oldest_is_forgotten():
    inner = Recorder()
    teacher = CachedTeacher(inner, MemoryScores(2))
    bad = rollout([1, 9], 1, prompt=prompt("bad"))
    items = [rollout([1, k], 1, prompt=prompt("p")) for k in (2, 3, 4)]
    teacher.score([bad, *items])
    teacher.score([bad, *items])
    assert len(inner.asked[-1]) == 2  # the failure, and the first of three where two are kept


def test_what_was_used_last_is_forgotten_last():
    inner = Recorder()
    teacher = CachedTeacher(inner, MemoryScores(2))
    one, two, three = [rollout([1, k], 1, prompt=prompt("p")) for k in (2, 3, 4)]
    teacher.score([one, two])
    teacher.score([one])
    teacher.score([three])
    [found] = teacher.score([one])
    assert found.cached


def test_training_with_kept_scores_follows_the_same_numbers(tmp_path: Path):
    """One token a response: by the time that prompts come again, some responses do too."""
    found = []
    for size in (0, 100):
        tree = toy_recipe(tmp_path / str(size), steps=30, compute={"score_cache": size, "threads": 1, "device": "cpu"})
        tree["sampling"] = {"prompts_per_step": 1, "group_size": 32, "max_new_tokens": 1}
        tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 1}
        tree["evaluation"] = {"num_prompts": 0}
        lines: list[dict[str, float]] = []
        opd.train(opd.parse_config(tree), callbacks=[lambda report, lines=lines: lines.append(dict(report.values))])
        found.append(lines)
    plain, cached = found
    assert sum(line["batch/cached/sum"] for line in cached) > 0
    for a, b in zip(plain, cached, strict=True):
        assert a["kl/token/mean"] == pytest.approx(b["kl/token/mean"], abs=1e-4)
        assert a["optim/grad_norm/mean"] == pytest.approx(b["optim/grad_norm/mean"], rel=1e-3)
