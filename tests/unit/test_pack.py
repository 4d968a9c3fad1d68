"""From scored rollouts to one batch, and to its log ratios: what is kept, in which dtype, and what stays at zero."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import objective_config as config
from factories import prompt, rollout, scored

from opd.batch import Batch, consecutive, pack, split, trainable
from opd.errors import ScoreError
from opd.metrics import values
from opd.objective import compute_advantages
from opd.objectives.target import target_logprobs
from opd.records import ChunkScore, FailedScore, Flag, HiddenPart, ScoredRollout, TopKScore, Turn

P0 = prompt("p0")


def item(teacher_logprobs: list[float], *, sample: int = 0, of: str = "p0", part: int = 0) -> ScoredRollout:
    """Two tokens of prompt, and an action for each log-probability; the student's are -1."""
    made = rollout([1, 2, *range(3, 3 + len(teacher_logprobs))], 2, prompt=prompt(of), sample=sample)
    return scored(replace(made, part=part), teacher_logprobs)


def lost(one: ScoredRollout, reason: str) -> ScoredRollout:
    return ScoredRollout(one.rollout, FailedScore(one.score.teacher, reason))


def in_chunks(chunks: list[int], totals: list[float], *, compared: list[bool] | None = None) -> ScoredRollout:
    """A rollout of these chunks, one number an action; nonsense stands before the actions, where nothing may read it."""
    made = rollout([1, 2, *range(3, 3 + len(chunks))], 2, prompt=P0, logprobs=[-1.0] * len(chunks))
    logprobs = np.array([-9.0, -9.0, *totals], np.float32)
    flags = None if compared is None else np.array([False, False, *compared])
    part = None if compared is None else HiddenPart("t", 1.0, np.zeros((sum(compared), 2), np.float32))
    score = ChunkScore("t", logprobs, np.array([-1, -1, *chunks]), 5, {"turns": 1}, compared=flags, part=part)
    return ScoredRollout(made, score)


def packed(*items: ScoredRollout, unscored: bool = False) -> Batch:
    return pack(items, logprob_floor=-50.0, unscored=unscored)[0]


def test_the_log_ratio_is_zero_wherever_there_is_no_score():
    batch = packed(item([-0.5, -2.0]), lost(item([-0.5], sample=1), "no answer"), unscored=True)
    assert batch.log_ratio.tolist() == [0, 0, 0.5, -1.0, 0, 0, 0]
    assert batch.teacher_logprobs.tolist() == [0, 0, -0.5, -2.0, 0, 0, 0]
    again = replace(batch, student_logprobs=torch.full_like(batch.rollout_logprobs, -3.0))
    assert again.log_ratio.tolist() == [0, 0, 2.5, 1.0, 0, 0, 0]


def test_columns_have_the_dtypes_that_torch_indexes_and_multiplies_with():
    first = item([-0.5])
    wide = replace(first.rollout, rollout_logprobs=first.rollout.rollout_logprobs.astype(np.float64))
    batch = packed(replace(first, rollout=wide))
    assert batch.token_ids.dtype == batch.turns.dtype == torch.int64
    assert batch.rollout_logprobs.dtype == batch.teacher_logprobs.dtype == torch.float32
    assert batch.loss_mask.tolist() == batch.distill_mask.tolist() == [False, False, True]
    assert not batch.reward_mask.any()  # which rewards act is said by `compute_advantages`


def test_tokens_of_no_action_have_no_log_probability_and_no_floor_is_counted_twice():
    batch, counts = pack([in_chunks([0, 0], [0.0, -1.5])], logprob_floor=-50.0)
    assert batch.teacher_logprobs.tolist() == [0, 0, 0, -1.5]
    assert counts == {"dropped": 0, "floored": 0}


def test_a_rollout_with_a_reward_and_no_score_trains_only_where_it_is_asked_for():
    one = lost(item([-0.5]), "no answer")
    assert trainable([one]) == []
    assert trainable([one], unscored=True) == [one]


def test_nothing_to_train_on_names_every_reason_once_in_order():
    items = [lost(item([-0.5], sample=i), reason) for i, reason in enumerate(["too long", "no answer", "too long"])]
    with pytest.raises(ScoreError, match=r"none of 3 rollouts can be trained on: no answer; too long$"):
        packed(*items)
    still = item([])
    with pytest.raises(ScoreError, match=r"none of 1 rollouts can be trained on: no actions$"):
        packed(still)
    with pytest.raises(ScoreError, match=r"none of 2 rollouts can be trained on: too long$"):
        packed(still, items[0])


def test_parts_without_actions_and_parts_that_failed_stay_out_of_their_episode():
    whole = [item([-0.5], part=0), item([], part=1), item([-0.25], part=2)]
    failed = replace(whole[2], rollout=replace(whole[2].rollout, failure="gone"))
    assert packed(*whole).teacher_logprobs.tolist() == [0, 0, -0.5, 0, 0, -0.25]
    assert packed(whole[0], whole[1], failed).teacher_logprobs.tolist() == [0, 0, -0.5]


def test_every_share_of_a_batch_begins_with_a_first_part():
    batch = packed(item([-0.5]), item([-0.25], sample=1), item([-1.0], of="p1"))
    shares = split(batch, 3)
    assert [share.first_parts.tolist() for share in shares if share is not None] == [[0], [0], [0]]
    first, rest = split(packed(item([-0.5])), 2)
    assert (len(first or []), rest) == (1, None)


def test_stretches_of_nothing_and_of_much():
    assert consecutive([], [], 2) == [(0, 0), (0, 0)]
    assert consecutive([3, 1, 1, 1], "abcd", 2) == [(0, 1), (1, 4)]
    assert consecutive([1, 1, 1, 3], "abcd", 2) == [(0, 3), (3, 4)]
    assert consecutive([1, 1, 1, 1], "abbb", 2) == [(0, 4), (4, 4)]
    assert consecutive([5, 1, 1], "aab", 2) == [(0, 2), (2, 3)]


def test_student_turns_are_numbered_through_each_episode():
    first, second = item([-0.5, -0.5, -0.5, -0.5]), item([-0.5, -0.5], sample=1)
    turns = (Turn("prompt", 0, 2), Turn("student", 2, 3), Turn("observation", 3, 4), Turn("student", 4, 6))
    other = replace(second, rollout=replace(second.rollout, turns=(Turn("prompt", 0, 2), Turn("student", 2, 4))))
    batch = packed(replace(first, rollout=replace(first.rollout, turns=turns)), other)
    assert batch.turns.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_chunks_are_numbered_through_the_batch_and_only_where_there_are_any():
    plain = packed(item([-0.5]))
    assert (plain.chunks, plain.num_bytes, plain.compared) == (None, None, None)
    one, other = (in_chunks([0, 0, 1], [0.0, -0.5, -1.0], compared=[False, False, True]) for _ in range(2))
    other = replace(other, rollout=replace(other.rollout, sample=1))
    failed = lost(replace(other, rollout=replace(other.rollout, sample=2)), "no answer")
    batch = packed(one, failed, other, unscored=True)
    assert batch.chunks is not None
    assert batch.num_bytes is not None
    assert batch.chunks.tolist() == [-1, -1, 0, 0, 1, *[-1] * 5, -1, -1, 2, 2, 3]
    assert batch.num_bytes.tolist() == [5, 0, 5]
    assert batch.teacher_parts is not None
    assert [len(parts) for parts in batch.teacher_parts] == [1, 0, 1]


def test_ids_that_a_teacher_did_not_name_are_minus_one_with_no_probability():
    made = item([-0.5]).rollout
    score = TopKScore("t", np.array([0, 0, -0.5], np.float32), np.array([[3, 4]]), np.array([[-0.5, -1.0]], np.float32))
    batch = packed(ScoredRollout(made, score))
    assert batch.top_k_ids is not None
    assert batch.logprobs_at is not None
    assert batch.logprobs_at.dtype == torch.float32
    assert batch.top_k_ids.tolist() == [[-1, -1], [-1, -1], [3, 4]]
    assert batch.logprobs_at.tolist() == [[-np.inf] * 2, [-np.inf] * 2, [-0.5, -1.0]]


def test_teachers_that_name_different_numbers_of_tokens_share_columns_of_the_widest():
    found = []
    for ids in ([[3]], [[3, 4, 5]]):
        values = np.full((1, len(ids[0])), -0.5, np.float32)
        found.append(
            ScoredRollout(
                item([-0.5]).rollout, TopKScore("t", np.array([0, 0, -0.5], np.float32), np.array(ids), values)
            )
        )
    batch = packed(*found)
    assert batch.top_k_ids is not None
    assert batch.top_k_ids[[2, 5]].tolist() == [[3, -1, -1], [3, 4, 5]]


def test_an_error_lies_in_actions_alone():
    """A flag may run across what the environment said."""
    made = rollout([1, 2, 3, 4, 5, 6], 2, prompt=P0, logprobs=[-1.0] * 4)
    mask = np.array([False, False, True, False, True, True])
    made = replace(made, loss_mask=mask, flags=(Flag("rule", 2, 5),))
    batch = packed(scored(made, [-0.5] * 3))
    assert batch.flagged.tolist() == [False, False, True, False, True, False]


def test_the_first_scored_part_of_an_episode_leads_it():
    parts = [item([-0.5], part=0), item([-0.5], part=1), item([-0.25], sample=1)]
    batch = packed(lost(parts[0], "no answer"), *parts[1:])
    assert batch.leading.dtype == torch.bool
    assert batch.leading.tolist() == [False, True, True]


def test_only_tokens_without_a_common_distribution_have_a_sampled_part_beside_top_k():
    """The log ratios of the second chunk's two tokens are 1 and -2, so with those after them in the chunk -1 and -2."""
    how = config(group_size=1, objective={"type": "top_k", "top_k": 2, "coef": 3.0})
    some = packed(in_chunks([0, 1, 1], [-0.5, 0.0, -3.0], compared=[True, False, False]))
    found, _ = compute_advantages(how, some)
    assert found.advantages is not None
    assert found.advantages.tolist() == [0, 0, 0, -3.0, -6.0]
    every = packed(in_chunks([0, 1], [-0.5, -3.0], compared=[True, True]))
    assert compute_advantages(how, every)[0].advantages is None  # all of it is integrated


def test_credit_for_whole_chunks_asks_nothing_of_a_batch_without_chunks():
    plain = config(group_size=1, objective={"type": "immediate"})
    full = config(group_size=1, objective={"type": "immediate"}, alignment={"credit": "full"})
    batch = packed(item([-0.5, -3.0]))
    (one, _), (other, _) = (compute_advantages(how, batch) for how in (plain, full))
    assert one.advantages is not None
    assert other.advantages is not None
    assert one.advantages.tolist() == other.advantages.tolist() == [0, 0, 0.5, -2.0]


def test_rounding_is_magnified_by_extrapolation():
    """1.5 log q - 0.5 log pi_ref: three roundings of 1, 1.5 and 0.5, half of which is the threshold's 1e-4."""
    past = {"reference": "student", "extrapolation": 1.5}
    for more, shown in [({}, True), (past, False)]:
        how = config(group_size=1, objective={"type": "immediate", **more})
        found, _ = compute_advantages(how, packed(item([-1.0 + 1.3e-4])))
        assert found.advantages is not None
        assert bool(found.advantages.any()) == shown


def test_a_correction_of_equal_policies_truncates_nothing_at_any_cap():
    how = config(group_size=1, objective={"type": "immediate", "correction": {"type": "truncate", "cap": 1.0}})
    batch = packed(item([-0.5, -3.0]))
    same = replace(batch, student_logprobs=batch.rollout_logprobs.clone())
    found, metrics = compute_advantages(how, same)
    assert values(metrics)["correction/truncated/sum"] == 0
    assert found.advantages is not None
    assert found.advantages.tolist() == [0, 0, 0.5, -2.0]


def test_a_correction_without_a_used_action_measures_nothing():
    how = config(group_size=1, objective={"type": "immediate", "correction": {"type": "truncate"}})
    batch = packed(item([-0.5]))
    unused = replace(batch, chunks=torch.full((3,), -1), num_bytes=torch.tensor([0]), student_logprobs=torch.zeros(3))
    _, metrics = compute_advantages(how, unused)
    assert values(metrics)["correction/gap/max"] == 0.0
    assert values(metrics)["correction/truncated/sum"] == 0  # its weight is e, above the cap of 2


def test_a_target_scales_each_model_and_counts_those_below_the_floor_alone():
    found, below = target_logprobs([(torch.tensor([-2.0, -9.0]), 2.0)], -4.0)
    assert (found.tolist(), None if below is None else below.tolist()) == ([-4.0, -8.0], [False, True])
    found, below = target_logprobs([(torch.tensor([-4.0, -5.0]), 1.0)], -4.0)
    assert (found.tolist(), None if below is None else below.tolist()) == ([-4.0, -4.0], [False, True])
    assert target_logprobs([(torch.zeros(0), 1.0)], -4.0)[1] is None
