"""Laws of the advantages: those of the log ratio, and those of rewards within a group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.objectives.advantages import immediate, log_ratio_to_go, reward_advantages

quick = settings(max_examples=40)
NAN, INF = math.nan, math.inf


def tables(rows: int, tokens: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Log ratios [rows, tokens] in float64 and a mask of the same shape."""
    numbers = st.lists(st.floats(-8, 8), min_size=rows * tokens, max_size=rows * tokens)
    flags = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
    return st.tuples(
        numbers.map(lambda v: torch.tensor(v).double().view(rows, tokens)),
        flags.map(lambda v: torch.tensor(v).view(rows, tokens)),
    )


# --- advantages of the log ratio ---


@quick
@given(tables(3, 5))
def test_discount_zero_is_the_immediate_advantage(table):
    assert torch.equal(log_ratio_to_go(*table, 0.0), immediate(*table))


@quick
@given(tables(3, 5))
def test_discount_one_is_the_reversed_cumulative_sum(table):
    log_ratio, mask = table
    kept = torch.where(mask, log_ratio, 0.0)
    expected = torch.where(mask, kept.flip(-1).cumsum(-1).flip(-1), 0.0)
    torch.testing.assert_close(log_ratio_to_go(log_ratio, mask), expected, atol=1e-12, rtol=0)


@quick
@given(tables(2, 6), st.floats(0, 1))
def test_advantages_are_exactly_zero_off_the_mask_whatever_stands_there(table, discount):
    log_ratio, mask = table
    dirty = torch.where(mask, log_ratio, torch.tensor([NAN, INF, -INF] * 2).double())
    for clean, got in (
        (immediate(log_ratio, mask), immediate(dirty, mask)),
        (log_ratio_to_go(log_ratio, mask, discount), log_ratio_to_go(dirty, mask, discount)),
    ):
        assert torch.equal(clean, got)
        assert not got[~mask].any()


@quick
@given(tables(1, 7), st.floats(0, 1))
def test_tokens_between_turns_do_not_discount(table, discount):
    log_ratio, mask = table
    closed_up = log_ratio[mask][None]
    expected = log_ratio_to_go(closed_up, torch.ones_like(closed_up, dtype=torch.bool), discount)
    torch.testing.assert_close(log_ratio_to_go(log_ratio, mask, discount)[mask], expected[0])


def test_a_discounted_advantage_matches_the_sum_written_out():
    log_ratio = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    mask = torch.tensor([[False, True, True, False, True]])
    # 1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4
    assert log_ratio_to_go(log_ratio, mask, 0.5).tolist() == [[0.0, 3.0, 4.0, 0.0, 4.0]]


def test_advantages_of_no_tokens_are_empty():
    empty, mask = torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    assert log_ratio_to_go(empty, mask, 0.5).shape == (2, 0)
    assert immediate(empty, mask).shape == (2, 0)


def test_advantages_carry_no_gradient():
    log_ratio = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not immediate(log_ratio, mask).requires_grad
    assert not log_ratio_to_go(log_ratio, mask, 0.0).requires_grad
    assert not log_ratio_to_go(log_ratio, mask, 0.9).requires_grad


@pytest.mark.parametrize("discount", [-0.01, 1.01, NAN, INF])
def test_a_discount_outside_zero_and_one_is_refused(discount):
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\], got"):
        log_ratio_to_go(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), discount)


# --- reward ---

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.5, 0.0])
GROUPS = torch.tensor([7, 3, 7, 3, 3, 9])  # 7: [1, 0.5], 3: [0, 0.2, 0.5], 9: [0]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # 3: 0 - 0.35, 0.2 - 0.25, 0.5 - 0.1
    expected = torch.tensor([0.5, -0.35, -0.5, -0.05, 0.4, 0.0])
    torch.testing.assert_close(reward_advantages(REWARDS, GROUPS, "leave_one_out"), expected, atol=1e-6, rtol=0)


def test_group_mean_compares_with_the_mean_of_all():
    mean = 0.7 / 3
    expected = torch.tensor([0.25, -mean, -0.25, 0.2 - mean, 0.5 - mean, 0.0])
    torch.testing.assert_close(reward_advantages(REWARDS, GROUPS, "group_mean"), expected, atol=1e-6, rtol=0)


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    mean = 0.7 / 3
    deviation = math.sqrt(((0 - mean) ** 2 + (0.2 - mean) ** 2 + (0.5 - mean) ** 2) / 3)
    expected = torch.tensor([1.0, -mean / deviation, -1.0, (0.2 - mean) / deviation, (0.5 - mean) / deviation, 0.0])
    torch.testing.assert_close(reward_advantages(REWARDS, GROUPS, "grpo"), expected, atol=1e-5, rtol=0)


def test_without_a_baseline_the_outcome_is_the_reward():
    got = reward_advantages(REWARDS, GROUPS, "none")
    assert torch.equal(got, REWARDS)
    assert got.data_ptr() != REWARDS.data_ptr()


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
def test_a_group_of_one_has_nothing_to_compare_with(baseline):
    assert float(reward_advantages(torch.tensor([0.8]), torch.tensor([4]), baseline)) == 0.0


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
@quick
@given(reward=st.floats(0, 1, width=32), size=st.integers(1, 16))
def test_equal_rewards_give_no_advantage(baseline, reward, size):
    got = reward_advantages(torch.full((size,), reward), torch.zeros(size, dtype=torch.long), baseline)
    assert float(got.abs().max()) <= 1e-6


@quick
@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.integers(0, 3)), min_size=1, max_size=12))
def test_outcome_advantages_of_every_group_sum_to_zero(pairs):
    rewards, groups = torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs])
    for baseline in ("leave_one_out", "group_mean", "grpo"):
        got = reward_advantages(rewards, groups, baseline)
        for group in groups.unique():
            assert float(got[groups == group].sum()) == pytest.approx(0.0, abs=1e-6)


@quick
@given(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=8))
def test_leave_one_out_is_group_mean_times_n_over_n_minus_one(rewards):
    values, n = torch.tensor(rewards).double(), len(rewards)
    group = torch.zeros(n, dtype=torch.long)
    torch.testing.assert_close(
        reward_advantages(values, group, "leave_one_out"), reward_advantages(values, group, "group_mean") * n / (n - 1)
    )


def test_the_outcome_of_no_rollouts_is_empty():
    for baseline in ("leave_one_out", "group_mean", "grpo", "none"):
        assert reward_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), baseline).shape == (0,)
