"""Credit within chunks: worked examples, laws, and what a batch with a foreign teacher follows."""

from typing import Any

import numpy as np
import pytest
import torch
from factories import objective_config as config_of
from factories import prompt, rollout, scored
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.batch import Batch, pack
from opd.objective import compute_advantages
from opd.objectives.advantages import immediate, log_ratio_to_go, whole_chunks
from opd.records import ChunkScore, ScoredRollout

# two chunks, [0, 0, 0] and [1], then one of two tokens; the teacher's part stands at each chunk's end
STUDENT = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 0.0, -10.0, -20.0, 0.0, -30.0]], dtype=torch.float64)
CHUNKS = torch.tensor([[0, 0, 0, 1, 2, 2]])
ALL = torch.ones(1, 6, dtype=torch.bool)


def test_a_token_gets_what_of_its_chunk_is_still_open():
    # log q(c) - sum_{i' >= i} log pi_i'
    expected = [-10 + 6, -10 + 5, -10 + 3, -20 + 4, -30 + 11, -30 + 6]
    assert immediate(TEACHER - STUDENT, ALL, CHUNKS)[0].tolist() == expected


def test_a_discount_counts_chunks():
    found = log_ratio_to_go(TEACHER - STUDENT, ALL, 0.5, CHUNKS)[0].tolist()
    third = -30 + 11
    second = -20 + 4 + 0.5 * third
    assert found == [
        -10 + 6 + 0.5 * second, -10 + 5 + 0.5 * second, -10 + 3 + 0.5 * second, second, third, -30 + 6,
    ]  # fmt: skip


def test_full_credit_is_the_chunks_own():
    found = whole_chunks(immediate(TEACHER - STUDENT, ALL, CHUNKS), ALL, CHUNKS)[0].tolist()
    assert found == [-4, -4, -4, -16, -19, -19]


values = st.lists(st.floats(-5, 5), min_size=1, max_size=8)


@given(values, st.floats(0, 1))
def test_chunks_of_one_token_are_tokens(ratios: list[float], discount: float):
    ratio = torch.tensor([ratios], dtype=torch.float64)
    mask = torch.ones_like(ratio, dtype=torch.bool)
    chunks = torch.arange(len(ratios))[None]
    assert torch.allclose(log_ratio_to_go(ratio, mask, discount, chunks), log_ratio_to_go(ratio, mask, discount))
    assert torch.equal(whole_chunks(ratio, mask, chunks), ratio)


@given(values, st.data())
def test_at_discount_one_chunks_do_not_matter(ratios: list[float], data: st.DataObject):
    steps = data.draw(st.lists(st.integers(0, 1), min_size=len(ratios), max_size=len(ratios)))
    ratio = torch.tensor([ratios], dtype=torch.float64)
    mask = torch.ones_like(ratio, dtype=torch.bool)
    chunks = torch.from_numpy(np.cumsum(steps))[None]
    assert torch.allclose(log_ratio_to_go(ratio, mask, 1.0, chunks), log_ratio_to_go(ratio, mask, 1.0))


@given(values, st.data())
def test_immediate_sums_each_chunk_from_the_token_on(ratios: list[float], data: st.DataObject):
    steps = data.draw(st.lists(st.integers(0, 1), min_size=len(ratios), max_size=len(ratios)))
    chunks = np.cumsum(steps)
    ratio = torch.tensor([ratios], dtype=torch.float64)
    found = immediate(ratio, torch.ones_like(ratio, dtype=torch.bool), torch.from_numpy(chunks)[None])[0]
    for i in range(len(ratios)):
        plain = sum(r for k, r in enumerate(ratios) if k >= i and chunks[k] == chunks[i])
        assert float(found[i]) == pytest.approx(plain, abs=1e-9)


def scored_in_chunks() -> ScoredRollout:
    """Prompt of two tokens; actions: a chunk of two, a masked one, a chunk of one."""
    item = rollout([1, 2, 3, 4, 5, 6], 2, prompt=prompt(), logprobs=[-1.0, -2.0, -3.0, -4.0])
    logprobs = np.array([0, 0, 0, -7.0, 0, -9.0], dtype=np.float32)
    chunks = np.array([-1, -1, 0, 0, -1, 1], dtype=np.int32)
    return ScoredRollout(item, ChunkScore("t", logprobs, chunks, 5, {"turns": 1}))


def followed(**tables: Any) -> tuple[Batch, Tensor]:
    batch, _ = pack([scored_in_chunks()], logprob_floor=-50.0)
    batch, _ = compute_advantages(config_of(**tables), batch)
    assert batch.advantages is not None
    return batch, batch.advantages


def test_masked_tokens_have_no_advantage_and_leave_the_denominator():
    batch, advantages = followed(objective={"type": "immediate"})
    assert advantages.tolist() == [0, 0, -7 + 3, -7 + 2, 0, -9 + 4]
    assert batch.train_mask.tolist() == [False, False, True, True, False, True]
    assert batch.distill_mask.tolist() == batch.train_mask.tolist()


def test_an_outcome_still_trains_masked_tokens():
    batch, _ = followed(objective={"type": "immediate"}, reward={"coef": 1.0, "baseline": "none"})
    assert batch.train_mask.tolist() == [False, False, True, True, True, True]
    assert batch.distill_mask.tolist() == [False, False, True, True, False, True]


def test_the_recipe_chooses_the_credit():
    _, advantages = followed(objective={"type": "immediate"}, alignment={"credit": "full"})
    assert advantages.tolist() == [0, 0, -4, -4, 0, -5]


def test_rollouts_of_both_kinds_share_a_batch():
    plain = scored(rollout([1, 2, 3], 1, prompt=prompt("p1")), [-0.5, -0.25])
    batch, _ = pack([scored_in_chunks(), plain], logprob_floor=-50.0)
    assert batch.chunks is not None
    assert batch.num_bytes is not None
    assert batch.num_bytes.tolist() == [5, 0]
    batch, _ = compute_advantages(config_of(objective={"type": "immediate"}), batch)
    assert batch.advantages is not None
    assert batch.advantages[6:].tolist() == [0.0, 0.5, 0.75]
    assert batch.scored.tolist()[6:] == [False, True, True]
