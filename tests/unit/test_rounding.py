"""Where two models of the same weights differ, it is by rounding: losses are exactly 0 there, and follow the rest."""

import math

import pytest
import torch

from opd.objectives.divergences import magnified, resolution, resolved, reverse_kl, tail_logprob, top_k_reverse_kl

BOUND = resolution(torch.float64)


def test_the_bound_is_1e_4_in_float32_and_shrinks_with_the_dtype():
    assert resolution(torch.float32) == pytest.approx(1e-4)
    assert pytest.approx(1e-4 * 2.0**-29) == BOUND


def test_errors_of_several_models_add_up_and_a_low_temperature_divides_them():
    assert magnified(1.0) == magnified(2.0) == 1.0
    assert magnified(0.5) == 2.0
    assert magnified(1.0, (1.5, -0.5)) == 1.5
    assert magnified(0.5, (3.0, -2.0)) == 6.0
    assert magnified(1.0, (0.25, 0.25)) == 1.0  # never below that of one model


@pytest.mark.parametrize(
    ("mean", "spread", "seen"), [(0.9, 0.9, 0), (1.1, 0.0, 1), (-1.1, 0.0, 1), (0.0, 1.1, 1), (1.0, 1.0, 0)]
)
def test_a_state_counts_by_its_mean_or_by_its_standard_deviation(mean: float, spread: float, seen: int):
    """Two tokens of p 1/2 with log ratios mean +- spread, in units of the bound."""
    most = 2.0**-10
    p = torch.full((1, 2), 0.5, dtype=torch.float64)
    centred = torch.tensor([[spread, -spread]], dtype=torch.float64) * most
    found = resolved(p, centred, torch.tensor([mean * most], dtype=torch.float64), most)
    assert (found.dtype, found.tolist()) == (torch.float64, [seen])


@pytest.mark.parametrize(("size", "seen"), [(0.9, False), (1.1, True)])
@pytest.mark.parametrize("more", [1.0, 3.0])
def test_top_k_is_zero_with_its_gradient_up_to_the_bound(size: float, seen: bool, more: float):
    """Two ids of p 1/4 with log ratios -+ x, and a tail without one: the standard deviation is x / sqrt(2)."""
    x = size * more * math.sqrt(2.0) * BOUND * 1e6
    logp = torch.full((1, 2), math.log(0.25), dtype=torch.float64, requires_grad=True)
    q = 0.25 * torch.tensor([[math.exp(x), 2.0 - math.exp(x)]], dtype=torch.float64)
    loss = top_k_reverse_kl(logp, q.log(), rounding=more * 1e6)
    [gradient] = torch.autograd.grad(loss.sum(), logp)
    assert bool(loss.any()) == bool(gradient.any()) == seen


def test_the_bound_is_that_of_one_model_unless_another_is_given():
    x = 1.5 * math.sqrt(2.0) * BOUND
    logp = torch.full((1, 2), math.log(0.25), dtype=torch.float64, requires_grad=True)
    q = 0.25 * torch.tensor([[math.exp(x), 2.0 - math.exp(x)]], dtype=torch.float64)
    for options, seen in [({}, True), ({"rounding": 2.0}, False)]:
        [gradient] = torch.autograd.grad(top_k_reverse_kl(logp, q.log(), **options).sum(), logp)
        assert bool(gradient.any()) == seen


def test_a_tail_that_is_only_the_error_of_a_sum_has_no_log_ratio():
    """The ids hold all of p, and their sum in floating point is one minus a few units in the last place."""
    p = torch.tensor([[0.5, 0.5 - 1.5 * 2.0**-51]], dtype=torch.float64)
    assert 0 < 1 - float(p.log().exp().sum(-1)) < 4 * torch.finfo(torch.float64).eps
    q = torch.tensor([[0.25, 0.25]], dtype=torch.float64)  # the teacher's tail is one half
    logp = p.log().requires_grad_()
    loss = top_k_reverse_kl(logp, q.log())
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1), rtol=1e-12, atol=0)
    [gradient] = torch.autograd.grad(loss.sum(), logp)  # of a tail with a log ratio it would be a multiple of this
    torch.testing.assert_close(gradient, p * (p / q).log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("ids", [2, 16, 400])
def test_a_student_whose_ids_hold_nearly_all_its_mass_equals_itself(ids: int):
    """In float32 the tail is a few units in the last place, and its logarithm is off by as much as its own size."""
    generator = torch.Generator().manual_seed(ids)
    logits = torch.randn(400, ids + 1, generator=generator, dtype=torch.float64)
    logits[:, -1] = logits[:, :-1].logsumexp(-1) + torch.linspace(math.log(1e-9), math.log(1e-5), 400)
    logp = logits.log_softmax(-1)[:, :-1].float().requires_grad_()
    loss = top_k_reverse_kl(logp, logp)
    [gradient] = torch.autograd.grad(loss.sum(), logp)
    assert (int(loss.count_nonzero()), int(gradient.count_nonzero())) == (0, 0)


def test_the_floor_of_top_k_raises_ids_and_the_tail_alike():
    """p 1/2 and 1/4, a tail of 1/4; the teacher gives the second id e^-60 and the tail nothing."""
    logp = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    logq = torch.tensor([[0.0, -60.0]], dtype=torch.float64)
    for floor, options in [(-50.0, {}), (-8.0, {"logprob_floor": -8.0})]:
        wanted = 0.5 * math.log(0.5) + 2 * 0.25 * (math.log(0.25) - floor)
        assert float(top_k_reverse_kl(logp, logq, **options)) == pytest.approx(wanted, rel=1e-12)


def test_the_teachers_logprobs_of_top_k_are_constants():
    logp = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    logq = torch.tensor([[0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    assert not top_k_reverse_kl(logp, logq).requires_grad


def test_what_is_above_the_bound_is_the_kl():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)
    whole = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(reverse_kl(p.log(), q.log()), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(top_k_reverse_kl(p.log(), q.log()), whole, rtol=1e-9, atol=0)


def test_a_small_tail_counts_where_its_log_ratio_is_beyond_all_rounding():
    """A tail of six units in the last place, where the teacher has none: ln of it is 15 nats above the floor."""
    logp = torch.tensor([[0.5, 0.5 - 3 * 2.0**-51]], dtype=torch.float64).log().requires_grad_()
    loss = top_k_reverse_kl(logp, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    [gradient] = torch.autograd.grad(loss.sum(), logp)
    assert float(gradient[0, 0]) == pytest.approx(-0.5 * (math.log(6 * 2.0**-52) + 50), rel=1e-3)


@pytest.mark.parametrize(("size", "seen"), [(0.9, False), (1.1, True)])
def test_a_shift_of_all_log_ratios_counts_from_the_bound_on(size: float, seen: bool):
    logp = torch.full((1, 2), math.log(0.5), dtype=torch.float64)
    assert bool(top_k_reverse_kl(logp, logp - size * BOUND).any()) == seen


def test_the_tail_of_float32_logprobs_is_summed_in_float64():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    logp = (logits - logits.logsumexp(-1) + math.log1p(-3e-6)).detach()
    found = tail_logprob(logp)
    assert found.dtype == torch.float32
    exact = math.log1p(-math.fsum(math.exp(x) for x in logp[0].tolist()))
    torch.testing.assert_close(found, torch.tensor([exact]), rtol=1e-5, atol=0)


def test_probabilities_that_sum_to_more_than_one_leave_a_tail_at_the_floor():
    logp = torch.full((1, 2), math.log(0.5) + 1e-9, dtype=torch.float64)
    assert tail_logprob(logp).tolist() == [-50.0]
    assert tail_logprob(logp, logprob_floor=-8.0).tolist() == [-8.0]


def seen_of(p: list[float], q: list[float]) -> bool:
    """Whether top-k tells two distributions apart: whether the loss has a gradient."""
    logp = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    loss = top_k_reverse_kl(logp, torch.tensor([q], dtype=torch.float64).log())
    return bool(torch.autograd.grad(loss.sum(), logp)[0].any())


def test_a_tail_below_the_bound_is_rounding_however_large_it_is():
    assert not seen_of([0.25, 0.25], [0.25 - 2.5e-14, 0.25 - 2.5e-14])  # all log ratios are -+1e-13
    assert seen_of([0.25, 0.25], [0.25 - 1e-13, 0.25 - 1e-13])


@pytest.mark.parametrize(("mine", "theirs"), [(100, 500), (500, 100)])
def test_a_tail_that_is_only_a_fraction_of_the_others_is_told_apart(mine: int, theirs: int):
    """Tails of so many units in the last place; what the two ids differ by is below the bound."""
    eps = torch.finfo(torch.float64).eps
    assert seen_of([0.5 - mine / 2 * eps] * 2, [0.5 - theirs / 2 * eps] * 2)
