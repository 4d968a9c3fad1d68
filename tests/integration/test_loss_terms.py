"""What each term of a loss is multiplied with, summed over and divided by, on batches small enough to write out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import in_float64 as in_float64
from benches import make_bench
from factories import CHECKED, objective_config, prompt, rollout, scored

from opd.batch import Batch, pack
from opd.metrics import values
from opd.objective import compute_advantages
from opd.records import FailedScore, Flag, HiddenPart, HiddenScore, Rollout, SampledScore, ScoredRollout, Turn


def one_turn(sample: int, logprobs: list[float], *, part: int = 0, reward: float | None = None) -> ScoredRollout:
    """An episode's part whose actions have the log ratios given: the student's log-probabilities are -1."""
    n = len(logprobs)
    item = rollout([1, 2, *range(3, 3 + n)], 2, prompt=prompt("p"), sample=sample, logprobs=[-1.0] * n)
    return scored(replace(item, part=part, reward=reward), [x - 1.0 for x in logprobs])


def advantages(batch: Batch, **tables: Any) -> list[list[float]]:
    """Of the actions of each rollout."""
    found, _ = compute_advantages(objective_config(**tables), batch)
    assert found.advantages is not None
    rows = torch.split(found.advantages, batch.lengths.tolist())
    masks = torch.split(batch.loss_mask, batch.lengths.tolist())
    return [row[mask].tolist() for row, mask in zip(rows, masks, strict=True)]


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "immediate"},
        {"type": "to_go", "discount": 1.0},
        {"type": "immediate", "baseline": "leave_one_out"},
        {"type": "kl_to_go", "discount": 0.5},
        {"type": "exact_to_go", "discount": 0.5, "baseline": "leave_one_out"},
    ],
    ids=lambda o: f"{o['type']}-{o.get('baseline')}",
)
def test_the_coefficient_of_the_distillation_scales_its_sampled_term(objective: dict[str, Any]):
    batch, _ = pack([one_turn(0, [0.5, -2.0]), one_turn(1, [1.0])], logprob_floor=-50.0)
    kl = torch.where(batch.loss_mask, torch.arange(len(batch.token_ids)) * 0.25, 0.0)
    batch = replace(batch, reverse_kl=kl, student_logprobs=batch.rollout_logprobs)
    whole = advantages(batch, objective=objective)
    assert any(x for row in whole for x in row)
    fifth = advantages(batch, objective=objective | {"coef": 0.2})
    assert [x for row in fifth for x in row] == pytest.approx([0.2 * x for row in whole for x in row])


@pytest.mark.parametrize(("kind", "bounds"), [("truncate", {"cap": 1.5}), ("reject", {"high": 4.0})])
def test_an_outcome_is_weighted_by_the_correction(kind: str, bounds: dict[str, float]):
    batch, _ = pack([one_turn(0, [0.0, 0.0], reward=1.0), one_turn(1, [0.0], reward=0.0)], logprob_floor=-50.0)
    moved = torch.where(batch.loss_mask, batch.rollout_logprobs + 0.25, 0.0)
    moved[3] += 0.5  # of the first rollout's second action
    batch = replace(batch, student_logprobs=moved)
    correction = {"type": kind, **bounds}
    found = advantages(
        batch, objective={"coef": 0.0, "correction": correction}, reward={"coef": 2.0, "baseline": "none"}
    )
    second = 1.5 if kind == "truncate" else float(np.exp(0.75))
    assert found == [pytest.approx([2.0 * np.exp(0.25), 2.0 * second]), [0.0]]


@pytest.mark.parametrize("kind", ["to_go", "kl_to_go", "exact_to_go"])
def test_what_a_mask_leaves_out_still_counts_in_earlier_sums(kind: str):
    """The future of a kept action holds every scored action, masked or not."""
    item = one_turn(0, [0.5, -2.0, -3.0], reward=1.0)
    flagged = ScoredRollout(replace(item.rollout, flags=(Flag("truncated", 4, 5),)), item.score)
    batch, _ = pack([flagged], logprob_floor=-50.0)
    kl = torch.where(batch.loss_mask, torch.tensor([0.0, 0.0, 1.0, 3.0, 7.0]), 0.0)
    batch = replace(batch, reverse_kl=kl, student_logprobs=batch.rollout_logprobs)
    objective = {"type": kind, "discount": 1.0} | ({"baseline": "leave_one_out"} if kind == "exact_to_go" else {})
    tables = {"mask": {"format_errors": "span"}, "tasks": CHECKED, "reward": {"coef": 1e-9, "baseline": "none"}}
    wanted = {"to_go": [-4.5, -5.0, 0.0], "kl_to_go": [0.5 - 10.0, -2.0 - 7.0, 0.0], "exact_to_go": [-10.0, -7.0, 0.0]}
    [found] = advantages(batch, objective=objective, **tables)
    assert found == pytest.approx(wanted[kind], abs=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_a_geometric_weight_is_the_mean_over_the_actions_of_the_episode(split: bool):
    """Not over the prompt, the padding of a batch or one part alone."""
    parts = [one_turn(0, [1.0, 1.0]), one_turn(0, [1.0], part=1)] if split else [one_turn(0, [1.0, 1.0, 1.0])]
    batch, _ = pack([*parts, one_turn(1, [1.0] * 9)], logprob_floor=-50.0)
    gaps = torch.zeros(len(batch.token_ids))
    gaps[torch.nonzero(batch.loss_mask)[:3, 0]] = torch.tensor([0.1, 0.2, 0.6])
    student = torch.where(batch.loss_mask, batch.rollout_logprobs + gaps, 0.0)
    # log q moves with the student, so that every log ratio stays 1
    batch = replace(batch, student_logprobs=student, teacher_logprobs=torch.where(batch.loss_mask, student + 1.0, 0.0))
    correction = {"type": "truncate", "level": "geometric", "cap": 5.0}
    found = advantages(batch, objective={"type": "immediate", "correction": correction})
    assert [x for row in found for x in row] == pytest.approx([np.exp(0.3)] * 3 + [1.0] * 9, rel=1e-6)


def two_turns(flag: tuple[int, int]) -> Rollout:
    """Turns of two actions each with an observation between them, and a format error."""
    item = rollout([1, 2, 3, 4, 5, 6, 7], 2, prompt=prompt("p"))
    mask = np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool)
    turns = (Turn("prompt", 0, 2), Turn("student", 2, 4), Turn("observation", 4, 5), Turn("student", 5, 7))
    logprobs = np.where(mask, -1.0, 0.0).astype(np.float32)
    return replace(item, loss_mask=mask, rollout_logprobs=logprobs, turns=turns, flags=(Flag("truncated", *flag),))


@pytest.mark.parametrize(("flag", "kept"), [((3, 4), [False, False, True, True]), ((5, 6), [True, True, False, False])])
def test_a_format_error_masks_its_own_turn_and_no_other(flag: tuple[int, int], kept: list[bool]):
    batch, _ = pack([scored(two_turns(flag), [-1.0] * 4)], logprob_floor=-50.0)
    found, _ = compute_advantages(
        objective_config(objective={"type": "exact"}, mask={"format_errors": "turn"}, tasks=CHECKED), batch
    )
    assert found.distill_mask[batch.loss_mask].tolist() == kept


def test_a_split_episode_counts_once_in_the_outcomes_of_its_group():
    """Whatever the baseline, and however many parts it has."""
    for baseline in ("leave_one_out", "group_mean", "grpo"):
        rewards = {0: 1.0, 1: 0.0, 2: 0.25}
        found = {}
        for parts in (1, 3):
            items = [
                one_turn(s, [0.0], part=k, reward=r) for s, r in rewards.items() for k in range(parts if s == 0 else 1)
            ]
            batch, _ = pack(items, logprob_floor=-50.0)
            rows = advantages(batch, objective={"coef": 0.0}, reward={"coef": 1.0, "baseline": baseline})
            found[parts] = [rows[0], rows[parts], rows[parts + 1]]
            assert rows[:parts] == [rows[0]] * parts
        assert found[1] == found[3]


def test_a_rollout_without_a_score_keeps_its_outcome_and_has_no_part_in_the_kl(tmp_path: Path):
    bench = make_bench(tmp_path)
    rewarded = [replace(s, rollout=replace(s.rollout, reward=float(i % 2))) for i, s in enumerate(bench.scored)]
    lost = ScoredRollout(rewarded[1].rollout, FailedScore(rewarded[1].score.teacher, "lost"))
    for objective in ({"type": "exact"}, {"type": "immediate"}, {"type": "top_k", "top_k": 4}):
        how = objective_config(objective=objective, reward={"coef": 1.0})
        shown = []
        for items in ([rewarded[0], lost, *rewarded[2:]], [rewarded[0], *rewarded[2:]]):
            batch, _ = pack(items, logprob_floor=-50.0, unscored=True)
            batch, _ = compute_advantages(how, batch)
            shown.append(values(bench.learner(**objective).forward_backward(batch)))
            if items[1] is lost:
                row = torch.tensor([name == lost.rollout.id for name in batch.rollout_ids])
                assert row.sum() == 1
                row = torch.repeat_interleave(row, batch.lengths)
                assert batch.advantages is not None
                assert batch.reward_mask[row & batch.loss_mask].all()
                assert batch.advantages[row & batch.loss_mask].all()
        for name in ("kl/token/mean", "kl/sequence/mean", "kl/token/even/mean", "kl/token/odd/mean"):
            assert shown[0][name] == pytest.approx(shown[1][name], rel=1e-9), name


def test_without_an_outcome_no_action_has_one():
    batch, _ = pack([one_turn(0, [0.5], reward=1.0), one_turn(1, [1.0], reward=0.0)], logprob_floor=-50.0)
    for objective in ({"type": "exact"}, {"type": "immediate"}):
        found, _ = compute_advantages(objective_config(objective=objective), batch)
        assert torch.equal(found.distill_mask, batch.loss_mask)
        assert not found.reward_mask.any()


def test_a_part_without_a_score_adds_no_sampled_term_to_an_integrated_objective():
    first, second = one_turn(0, [0.5]), one_turn(0, [1.0], part=1)
    assert isinstance(first.score, SampledScore)
    score = HiddenScore("t", first.score.logprobs, (HiddenPart("t", 1.0, np.zeros((1, 4), dtype=np.float32)),))
    whole = [replace(first, score=score), replace(second, score=FailedScore("t", "lost"))]
    batch, _ = pack(whole, logprob_floor=-50.0)
    assert len(batch) == 2
    found, _ = compute_advantages(objective_config(objective={"type": "exact"}), batch)
    assert found.advantages is None
