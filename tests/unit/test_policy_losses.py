"""Laws of the policy-gradient losses: the clip, masks, and what a sum is divided by."""

import math
from collections.abc import Callable

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from opd.objectives.advantages import immediate
from opd.objectives.losses import ppo, reinforce
from opd.objectives.reduce import Normalizer, denominator, masked

NORMALIZERS: tuple[Normalizer, ...] = ("trajectory", "token", "constant")
NAN, INF = math.nan, math.inf
MASK = torch.tensor([[False, True, True, False], [True, True, False, False], [False, False, False, False]])


def policy_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student log-probabilities with gradient, rollout log-probabilities and advantages, [3, 4] as MASK."""
    generator = torch.Generator().manual_seed(seed)
    student, rollout, advantages = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return (-student.abs()).requires_grad_(), -rollout.abs(), advantages


def losses() -> list[tuple[str, Callable[..., Tensor]]]:
    """Both policy-gradient losses under one signature; the clip is wide enough to leave random ratios alone."""
    return [
        ("reinforce", lambda new, old, adv, mask, **kw: reinforce(new, adv, mask, **kw)),
        ("ppo", lambda new, old, adv, mask, **kw: ppo(new, old, adv, mask, **kw)[0]),
    ]


both_losses = pytest.mark.parametrize("loss", [f for _, f in losses()], ids=[n for n, _ in losses()])


def test_reinforce_is_the_weighted_sum_of_logprobs_over_the_number_of_trajectories():
    student = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    advantages = torch.tensor([[0.5, 2.0], [1.0, 10.0]])
    mask = torch.tensor([[True, True], [True, False]])
    # -(0.5 * -1 + 2 * -2 + 1 * -3) / 2 trajectories
    assert float(reinforce(student, advantages, mask)) == pytest.approx(3.75)
    assert float(reinforce(student, advantages, mask, "token")) == pytest.approx(2.5)


def test_reinforce_does_not_differentiate_its_advantages():
    student, _, advantages = policy_inputs()
    loss = reinforce(student, advantages * student, MASK)
    (got,) = torch.autograd.grad(loss, student)
    (want,) = torch.autograd.grad(reinforce(student, (advantages * student).detach(), MASK), student)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("divisor", [None, 7.0])
def test_ppo_at_ratio_one_has_the_gradient_of_reinforce(divisor):
    student, _, advantages = policy_inputs()
    loss, num_clipped = ppo(student, student.detach().clone(), advantages, MASK, divisor=divisor)
    (got,) = torch.autograd.grad(loss, student)
    (want,) = torch.autograd.grad(reinforce(student, advantages, MASK, divisor=divisor), student)
    torch.testing.assert_close(got, want)
    assert int(num_clipped) == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.5, 1.0, True),  # already more likely and good: nothing more to gain
        (1.5, -1.0, False),  # more likely and bad: must come down
        (0.5, -1.0, True),  # already less likely and bad
        (0.5, 1.0, False),  # less likely and good: must come up
        (1.1, 1.0, False),
        (1.1, -1.0, False),
        (0.9, -1.0, False),
    ],
)
def test_the_clip_removes_the_gradient_only_where_the_ratio_has_gone_far_enough(ratio, advantage, clipped):
    old = torch.tensor([[-2.0]])
    student = (old + math.log(ratio)).requires_grad_()
    loss, num_clipped = ppo(student, old, torch.tensor([[advantage]]), torch.tensor([[True]]), 0.2, 0.2)
    loss.backward()
    assert int(num_clipped) == int(clipped)
    assert student.grad is not None
    expected = 0.0 if clipped else -advantage * ratio
    assert float(student.grad) == pytest.approx(expected, rel=1e-6)


def test_the_clip_is_asymmetric():
    old = torch.tensor([[-2.0, -2.0]])
    student = old + torch.tensor([[1.3, 0.7]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1.0]])
    assert int(ppo(student, old, advantages, mask, 0.2, 0.4)[1]) == 1
    assert int(ppo(student, old, advantages, mask, 0.4, 0.2)[1]) == 1
    assert int(ppo(student, old, advantages, mask, 0.4, 0.4)[1]) == 0
    # min(w A, clip(w) A): 1.3 is held at 1.2, 0.7 is let be
    assert float(ppo(student, old, advantages, mask, 0.4, 0.2)[0]) == pytest.approx(-(1.2 - 0.7), rel=1e-5)


@both_losses
@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@pytest.mark.parametrize("which", ["student", "rollout", "advantages"])
def test_masked_tokens_contribute_exactly_zero_in_value_and_gradient(loss, poison, which):
    values = dict(zip(("student", "rollout", "advantages"), policy_inputs(), strict=True))
    clean = {name: value.detach().clone() for name, value in values.items()}
    dirty = clean | {which: torch.where(MASK, clean[which], poison)}
    results = []
    for inputs in (clean, dirty):
        student = inputs["student"].requires_grad_()
        value = loss(student, inputs["rollout"], inputs["advantages"], MASK)
        (gradient,) = torch.autograd.grad(value, student)
        results.append((value.detach(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[1][1][~MASK].any()


@both_losses
def test_an_all_masked_batch_has_loss_zero_and_gradient_zero(loss):
    student, rollout, advantages = policy_inputs()
    value = loss(student, rollout, advantages, torch.zeros_like(MASK))
    (gradient,) = torch.autograd.grad(value, student)
    assert float(value.detach()) == 0.0
    assert not gradient.any()


@both_losses
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_sum_over_parts_is_the_loss_of_the_whole(loss, normalizer):
    student, rollout, advantages = policy_inputs()
    divisor = denominator(MASK, normalizer, constant=7.0)
    whole = loss(student, rollout, advantages, MASK, divisor=divisor)
    parts = [loss(student[[i]], rollout[[i]], advantages[[i]], MASK[[i]], divisor=divisor) for i in (2, 0, 1)]
    torch.testing.assert_close(sum(parts), whole)
    if normalizer == "trajectory":
        torch.testing.assert_close(whole, loss(student, rollout, advantages, MASK))


def test_the_normalisers_count_trajectories_tokens_or_nothing():
    assert denominator(MASK, "trajectory") == 2.0  # the third row has no action
    assert denominator(MASK, "token") == 4.0
    assert denominator(MASK, "constant", constant=0.5) == 0.5
    assert denominator(torch.zeros_like(MASK), "trajectory") == 1.0
    assert denominator(torch.zeros_like(MASK), "token") == 1.0


@pytest.mark.parametrize("constant", [None, 0.0, -1.0])
def test_the_constant_normaliser_needs_a_positive_constant(constant):
    with pytest.raises(ValueError, match="needs a positive constant"):
        denominator(MASK, "constant", constant=constant)


def test_masked_keeps_the_mask_and_zeroes_the_rest_whatever_stands_there():
    values = torch.tensor([1.0, INF, NAN, -2.0])
    assert masked(values, torch.tensor([True, False, False, True])).tolist() == [1.0, 0.0, 0.0, -2.0]


def test_shapes_that_do_not_fit_are_refused_while_testing():
    with pytest.raises(TypeCheckError):
        immediate(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        reinforce(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
