"""Laws of the baselines on sampled advantages and of the importance corrections."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives.advantages import full_trajectory, future_kl, immediate, kl_to_go, log_ratio_to_go
from opd.objectives.baselines import leave_one_out, negative_kl
from opd.objectives.corrections import importance_weights, rejected, truncated
from opd.objectives.losses import ppo

quick = settings(max_examples=40)
NAN = math.nan

R = torch.tensor([[1.0, 2.0, 4.0], [3.0, NAN, NAN]])
KL = torch.tensor([[0.5, 0.25, 1.0], [2.0, NAN, NAN]])
MASK = torch.tensor([[True, True, True], [True, False, False]])


# --- advantages with a future ---


def test_the_whole_trajectorys_log_ratio_stands_on_every_action():
    assert full_trajectory(R, MASK).tolist() == [[7.0, 7.0, 7.0], [3.0, 0.0, 0.0]]


def test_kl_to_go_replaces_later_log_ratios_by_kls():
    assert kl_to_go(R, KL, MASK, 0.5).tolist() == [[1 - 0.5 * 0.25 - 0.25 * 1.0, 2 - 0.5, 4.0], [3.0, 0.0, 0.0]]
    assert kl_to_go(R, KL, MASK).tolist() == [[1 - 1.25, 2 - 1.0, 4.0], [3.0, 0.0, 0.0]]


def test_future_kl_is_kl_to_go_without_the_immediate_part():
    for discount in (0.0, 0.3, 1.0):
        torch.testing.assert_close(future_kl(KL, MASK, discount) + immediate(R, MASK), kl_to_go(R, KL, MASK, discount))
    assert future_kl(KL, MASK, 0.0).tolist() == [[0.0] * 3] * 2


def test_discounts_count_actions_and_not_the_observations_between_them():
    mask = torch.tensor([[True, False, False, True, True]])
    kl = torch.tensor([[NAN, 9.0, 9.0, 1.0, 2.0]])
    assert future_kl(kl, mask, 0.5)[0].tolist() == [-(0.5 + 0.5), 0.0, 0.0, -1.0, 0.0]
    ratio = torch.tensor([[3.0, 9.0, NAN, 1.0, 2.0]])
    assert log_ratio_to_go(ratio, mask, 0.5)[0].tolist() == [3 + 0.5 + 0.5, 0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("discount", [-0.1, 1.1, NAN])
def test_a_discount_outside_its_range_is_refused(discount: float):
    for call in (
        lambda: log_ratio_to_go(R, MASK, discount),
        lambda: kl_to_go(R, KL, MASK, discount),
        lambda: future_kl(KL, MASK, discount),
    ):
        with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\]"):
            call()


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_action_and_one_action(tokens: int):
    ratio, mask = torch.full((2, tokens), 2.0), torch.ones(2, tokens, dtype=torch.bool)
    assert full_trajectory(ratio, mask).tolist() == ratio.tolist()
    assert kl_to_go(ratio, ratio, mask).tolist() == ratio.tolist()
    assert future_kl(ratio, mask).tolist() == [[0.0] * tokens] * 2
    nothing = torch.zeros_like(mask)
    for found in (full_trajectory(ratio, nothing), kl_to_go(ratio, ratio, nothing), future_kl(ratio, nothing)):
        assert not found.any()
    assert leave_one_out(ratio, mask, torch.zeros(2, dtype=torch.long)).tolist() == ratio.tolist()


# --- leave-one-out ---


def test_leave_one_out_is_the_mean_of_the_others_at_the_same_step():
    advantages = torch.tensor([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0], [100.0, 7.0]])
    groups = torch.tensor([4, 4, 4, 9])
    found = leave_one_out(advantages, torch.ones(4, 2, dtype=torch.bool), groups)
    assert found.tolist() == [[4.0, 40.0], [3.5, 35.0], [1.5, 15.0], [0.0, 0.0]]


def test_a_step_that_the_others_did_not_reach_has_no_baseline():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    advantages = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN], [6.0, 8.0, NAN]])
    found = leave_one_out(advantages, mask, torch.zeros(3, dtype=torch.long))
    assert found.tolist() == [[5.0, 8.0, 0.0], [3.5, 0.0, 0.0], [2.5, 2.0, 0.0]]


def test_steps_count_actions_so_that_observations_do_not_shift_them():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    advantages = torch.tensor([[1.0, NAN, 3.0], [10.0, 30.0, NAN]])
    found = leave_one_out(advantages, mask, torch.zeros(2, dtype=torch.long))
    assert found.tolist() == [[10.0, 0.0, 30.0], [1.0, 3.0, 0.0]]


def test_per_prompt_is_the_mean_over_all_actions_of_the_others():
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    advantages = torch.tensor([[1.0, 3.0], [5.0, NAN], [2.0, 2.0]])
    found = leave_one_out(advantages, mask, torch.zeros(3, dtype=torch.long), per="prompt")
    assert found.tolist() == [[3.0, 3.0], [2.0, 0.0], [3.0, 3.0]]


@quick
@given(st.integers(0, 10_000), st.sampled_from(["step", "prompt"]))
def test_a_samples_baseline_does_not_depend_on_itself(seed: int, per: Literal["step", "prompt"]):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    groups = torch.randint(0, 3, (6,), generator=generator)
    before = leave_one_out(advantages, mask, groups, per=per)
    changed = advantages.clone()
    changed[2] += 5.0
    after = leave_one_out(changed, mask, groups, per=per)
    torch.testing.assert_close(before[2], after[2], rtol=0, atol=1e-12)
    assert torch.equal(before[groups != groups[2]], after[groups != groups[2]])
    assert not before[~mask].any()


def test_the_order_of_the_batch_does_not_matter():
    advantages = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    groups = torch.tensor([0, 1, 0, 1, 1])
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = leave_one_out(advantages, mask, groups)
    torch.testing.assert_close(leave_one_out(advantages[order], mask[order], groups[order]), whole[order])


def test_the_kl_baseline_is_the_mean_of_the_log_ratio():
    assert negative_kl(KL, MASK).tolist() == [[-0.5, -0.25, -1.0], [-2.0, 0.0, 0.0]]


# --- corrections ---

NEW = torch.tensor([[-1.0, -2.0], [-0.5, NAN]])
OLD = torch.tensor([[-1.5, -1.0], [-0.5, NAN]])
TWO = torch.tensor([[True, True], [True, False]])


def test_weights_at_their_three_levels_by_hand():
    e = math.exp
    close = torch.testing.assert_close
    close(importance_weights(NEW, OLD, TWO), torch.tensor([[e(0.5), e(-1.0)], [1.0, 0.0]]))
    close(importance_weights(NEW, OLD, TWO, "geometric"), torch.tensor([[e(-0.25)] * 2, [1.0, 0.0]]))
    close(importance_weights(NEW, OLD, TWO, "sequence"), torch.tensor([[e(-0.5)] * 2, [1.0, 0.0]]))


@pytest.mark.parametrize("level", ["token", "geometric", "sequence"])
def test_on_policy_every_correction_is_the_identity(level):
    weights = importance_weights(NEW, NEW.clone(), TWO, level)
    assert weights.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    for corrected, kept in (truncated(weights, TWO), rejected(weights, TWO)):
        assert torch.equal(corrected, weights)
        assert torch.equal(kept, TWO)


def test_truncation_caps_and_keeps_rejection_leaves_out():
    weights = torch.tensor([[3.0, 0.1], [1.5, 0.0]])
    capped, kept = truncated(weights, TWO, cap=2.0)
    assert capped.tolist() == [[2.0, pytest.approx(0.1)], [1.5, 0.0]]
    assert torch.equal(kept, TWO)
    left, kept = rejected(weights, TWO, low=0.5, high=2.0)
    assert left.tolist() == [[0.0, 0.0], [1.5, 0.0]]
    assert kept.tolist() == [[False, False], [True, False]]


def test_weights_carry_no_gradient_and_cannot_overflow():
    new = torch.tensor([[1e4]], requires_grad=True)
    weights = importance_weights(new, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    assert not weights.requires_grad
    assert torch.isfinite(weights).all()


def test_the_dual_clip_bounds_what_a_negative_advantage_may_cost():
    new = torch.tensor([[math.log(10.0), math.log(10.0), math.log(2.0)]], requires_grad=True)
    advantages = torch.tensor([[-1.0, 1.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    plain, _ = ppo(new, torch.zeros(1, 3), advantages, mask)
    loss, clipped = ppo(new, torch.zeros(1, 3), advantages, mask, clip_dual=3.0)
    assert float(plain.detach()) == pytest.approx(10.0 - 1.2 + 2.0, rel=1e-6)
    assert float(loss.detach()) == pytest.approx(3.0 - 1.2 + 2.0, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, new)
    assert gradient[0].tolist() == [0.0, 0.0, pytest.approx(2.0)]
    assert int(clipped) == 2


@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_a_dual_clip_of_one_or_less_is_refused(clip: float):
    with pytest.raises(ValueError, match="clip_dual must be above 1"):
        ppo(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), clip_dual=clip)
