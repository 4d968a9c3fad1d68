"""Laws of the divergences, log-probabilities, advantages and losses."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd.objectives.advantages import immediate, log_ratio_to_go, outcome
from opd.objectives.divergences import reverse_kl
from opd.objectives.logprobs import gather_logprobs, token_logprobs
from opd.objectives.losses import exact_reverse_kl, ppo, reinforce
from opd.objectives.reduce import Normalizer, denominator, masked

quick = settings(max_examples=40, deadline=None, derandomize=True)
NORMALIZERS: tuple[Normalizer, ...] = ("trajectory", "token", "constant")
NAN, INF = math.nan, math.inf


def logits_pairs(size: int = 5) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Two float64 logit vectors."""
    vector = st.lists(st.floats(-30, 30), min_size=size, max_size=size).map(lambda v: torch.tensor(v).double())
    return st.tuples(vector, vector)


def tables(rows: int, tokens: int) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Log ratios [rows, tokens] in float64 and a mask of the same shape."""
    numbers = st.lists(st.floats(-8, 8), min_size=rows * tokens, max_size=rows * tokens)
    flags = st.lists(st.booleans(), min_size=rows * tokens, max_size=rows * tokens)
    return st.tuples(
        numbers.map(lambda v: torch.tensor(v).double().view(rows, tokens)),
        flags.map(lambda v: torch.tensor(v).view(rows, tokens)),
    )


def states(dtype: torch.dtype = torch.float64, *, count: int = 6, vocab: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """Hidden states and heads of a student (hidden 4) and a teacher (hidden 3), and a weight a state, one of them 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": draw(count, 4).requires_grad_(),
        "student_head": draw(vocab, 4).requires_grad_(),
        "teacher_hidden": 2 * draw(count, 3),
        "teacher_head": draw(vocab, 3),
        "weights": torch.tensor([0.5, 0.0, 2.0, 1.0, 1 / 3, 0.25][:count], dtype=dtype),
    }


def dense_kl(given: dict[str, Tensor], temperature: float = 1.0, floor: float = -50.0) -> Tensor:
    """KL [states] with all logits in memory, differentiated by autograd."""
    logp = torch.log_softmax(given["student_hidden"] @ given["student_head"].T / temperature, -1)
    logq = torch.log_softmax(given["teacher_hidden"] @ given["teacher_head"].T / temperature, -1).clamp(min=floor)
    return (logp.exp() * (logp - logq)).sum(-1)


def gradients(loss: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (given["student_hidden"], given["student_head"]))


class LargestLogits(TorchDispatchMode):
    """Records the largest [rows, vocab] product of hidden states and a head; `hidden` rows are a head's gradient."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.vocab, self.hidden, self.found = vocab, hidden, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[1] == self.vocab and result.shape[0] != self.hidden:
            self.found = max(self.found, result.numel())
        return result


# --- reverse_kl ---


@quick
@given(logits_pairs())
def test_reverse_kl_is_never_negative(pair):
    assert float(reverse_kl(*pair)) >= -1e-12


@quick
@given(logits_pairs(), st.floats(0.2, 4.0))
def test_reverse_kl_is_zero_where_the_two_are_equal(pair, temperature):
    assert float(reverse_kl(pair[0], pair[0].clone(), temperature=temperature)) == 0.0


@quick
@given(logits_pairs(), st.floats(-50, 50), st.floats(-50, 50))
def test_reverse_kl_does_not_change_when_either_logits_are_shifted(pair, shift, other):
    student, teacher = pair
    assert float(reverse_kl(student + shift, teacher + other)) == pytest.approx(
        float(reverse_kl(student, teacher)), abs=1e-9, rel=1e-9
    )


def test_reverse_kl_weighs_by_the_student_and_not_by_the_teacher():
    student = torch.tensor([0.5, 0.5]).log()
    teacher = torch.tensor([0.9, 0.1]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert float(reverse_kl(student, teacher)) == pytest.approx(by_hand, rel=1e-6)
    assert float(reverse_kl(teacher, student)) != pytest.approx(by_hand, rel=1e-2)


def test_reverse_kl_applies_the_temperature_to_both():
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = reverse_kl(student / 0.7, teacher / 0.7)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature=0.7), expected)
    assert not torch.allclose(reverse_kl(student, teacher), expected)


def test_tokens_that_the_student_cannot_choose_contribute_nothing_to_the_reverse_kl():
    student, teacher = torch.tensor([0.3, -0.2, -INF]), torch.tensor([0.1, 0.4, -INF])
    assert float(reverse_kl(student, teacher)) == pytest.approx(float(reverse_kl(student[:2], teacher[:2])), rel=1e-6)


def test_tokens_that_the_student_cannot_choose_leave_the_gradient_of_the_reverse_kl_a_number():
    student = torch.tensor([0.3, -0.2, -INF], requires_grad=True)
    short = torch.tensor([0.3, -0.2], requires_grad=True)
    teacher = torch.tensor([0.1, 0.4, 0.2])
    reverse_kl(student, teacher).backward()
    # The third token takes teacher mass, which shifts log q of the others by a constant: no gradient.
    reverse_kl(short, teacher[:2]).backward()
    assert student.grad is not None
    assert short.grad is not None
    torch.testing.assert_close(student.grad[:2], short.grad)
    assert float(student.grad[2]) == 0.0


# --- exact_reverse_kl ---


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("max_logits", [1, 25, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_exact_reverse_kl_equals_the_dense_form_in_value_and_gradients(dtype, tolerance, max_logits, temperature):
    inputs = states(dtype)
    loss, kl, _, floored = exact_reverse_kl(**inputs, temperature=temperature, max_logits=max_logits)
    expected = dense_kl(inputs, temperature)
    close = {"atol": tolerance, "rtol": 10 * tolerance}
    torch.testing.assert_close(kl, expected.detach(), **close)
    torch.testing.assert_close(loss, (expected * inputs["weights"]).sum(), **close)
    for got, want in zip(gradients(loss, inputs), gradients((expected * inputs["weights"]).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, **close)
    assert not floored.any()


def test_exact_reverse_kl_agrees_with_reverse_kl_of_the_same_logits():
    inputs = states()
    logits = inputs["student_hidden"] @ inputs["student_head"].T
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    _, kl, _, _ = exact_reverse_kl(**inputs, temperature=0.8)
    torch.testing.assert_close(kl, reverse_kl(logits, teacher, temperature=0.8).detach())


def test_exact_reverse_kl_passes_gradcheck():
    inputs = states(count=3, vocab=5)
    rest = [inputs[name] for name in ("teacher_hidden", "teacher_head", "weights")]

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return exact_reverse_kl(hidden, head, *rest, temperature=0.7, max_logits=5)[0]

    assert torch.autograd.gradcheck(loss, (inputs["student_hidden"], inputs["student_head"]))


def test_the_gradient_of_exact_reverse_kl_scales_with_what_follows_it():
    inputs = states()
    single = gradients(exact_reverse_kl(**inputs)[0], inputs)
    triple = gradients(3.0 * exact_reverse_kl(**inputs)[0], inputs)
    for one, three in zip(single, triple, strict=True):
        torch.testing.assert_close(3.0 * one, three)


def test_exact_reverse_kl_differentiates_the_head_alone_and_the_states_alone():
    inputs = states()
    both = gradients(exact_reverse_kl(**inputs)[0], inputs)
    for index, name in enumerate(("student_hidden", "student_head")):
        other = {"student_hidden": "student_head", "student_head": "student_hidden"}[name]
        alone = inputs | {other: inputs[other].detach()}
        (got,) = torch.autograd.grad(exact_reverse_kl(**alone)[0], alone[name])
        torch.testing.assert_close(got, both[index])


def test_a_state_of_weight_zero_adds_nothing_to_the_exact_loss_or_its_gradient():
    inputs = states()
    loss, kl, _, _ = exact_reverse_kl(**inputs)
    hidden, _ = gradients(loss, inputs)
    assert float(inputs["weights"][1]) == 0.0
    assert float(kl[1]) > 0.0
    assert not hidden[1].any()
    zero = exact_reverse_kl(**(inputs | {"weights": torch.zeros(6, dtype=torch.float64)}))[0]
    assert float(zero.detach()) == 0.0


@pytest.mark.parametrize("max_logits", [1, 2**24])
def test_teacher_logprobs_below_the_floor_are_raised_to_it_and_their_student_mass_is_told(max_logits):
    inputs = states(count=2, vocab=4)
    # A head that is the identity makes the hidden states the logits themselves.
    inputs["teacher_head"] = torch.eye(4, dtype=torch.float64)
    inputs["teacher_hidden"] = torch.tensor([[0.0, 0.5, -1e6, 0.1], [0.0, 0.5, 0.2, 0.1]], dtype=torch.float64)
    inputs["weights"] = torch.ones(2, dtype=torch.float64)
    loss, kl, _, floored = exact_reverse_kl(**inputs, logprob_floor=-20.0, max_logits=max_logits)
    expected = dense_kl(inputs, floor=-20.0)
    p = torch.softmax(inputs["student_hidden"] @ inputs["student_head"].T, -1).detach()
    torch.testing.assert_close(kl, expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(floored, torch.stack([p[0, 2], torch.zeros_like(p[0, 2])]))
    for got, want in zip(gradients(loss, inputs), gradients(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_a_teacher_that_rules_a_token_out_gives_a_finite_exact_loss():
    inputs = states(torch.float32, count=2, vocab=4)
    inputs["teacher_head"] = torch.eye(4)
    inputs["teacher_hidden"] = torch.tensor([[0.0, 0.5, -3e38, 0.1], [0.0, -3e38, 0.2, 0.1]])
    loss, *_ = exact_reverse_kl(**inputs)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, inputs))


def test_exact_reverse_kl_tells_the_entropy_of_the_student():
    inputs = states()
    logp = torch.log_softmax(inputs["student_hidden"] @ inputs["student_head"].T / 1.3, -1).detach()
    _, _, entropy, _ = exact_reverse_kl(**inputs, temperature=1.3, max_logits=30)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))


def test_the_figures_beside_the_exact_loss_carry_no_gradient():
    loss, *figures = exact_reverse_kl(**states())
    assert loss.requires_grad
    assert not any(figure.requires_grad for figure in figures)


def test_exact_reverse_kl_of_no_states_is_zero():
    inputs = states(count=6)
    none = {name: value[:0] if "head" not in name else value for name, value in inputs.items()}
    loss, kl, _, _ = exact_reverse_kl(**none)
    assert float(loss.detach()) == 0.0
    assert kl.shape == (0,)


@pytest.mark.parametrize("max_logits", [11, 25])
def test_exact_reverse_kl_never_holds_more_logits_than_allowed(max_logits):
    with LargestLogits(vocab=11, hidden=4) as seen:
        exact_reverse_kl(**states(), max_logits=max_logits)[0].backward()
    assert 0 < seen.found <= max_logits


# --- token_logprobs ---


@pytest.mark.parametrize("max_logits", [1, 25, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_in_chunks_equal_the_dense_form_in_value_and_gradients(max_logits, temperature):
    inputs = states()
    ids = torch.tensor([3, 0, 10, 3, 7, 1])
    hidden, head = inputs["student_hidden"], inputs["student_head"]
    got = token_logprobs(hidden, head, ids, temperature=temperature, max_logits=max_logits)
    want = torch.log_softmax(hidden @ head.T / temperature, -1)[torch.arange(6), ids]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for a, b in zip(gradients(got @ weights, inputs), gradients(want @ weights, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_token_logprobs_without_gradients_are_the_same():
    inputs = states()
    ids = torch.tensor([3, 0, 10, 3, 7, 1])
    with torch.no_grad():
        plain = token_logprobs(inputs["student_hidden"], inputs["student_head"], ids, max_logits=25)
    tracked = token_logprobs(inputs["student_hidden"], inputs["student_head"], ids)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, tracked.detach(), atol=1e-12, rtol=0)


def test_token_logprobs_of_no_states_are_empty():
    inputs = states()
    empty = token_logprobs(inputs["student_hidden"][:0], inputs["student_head"], torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)


def test_token_logprobs_never_hold_more_logits_than_allowed():
    inputs = states()
    with LargestLogits(vocab=11, hidden=4) as seen:
        token_logprobs(
            inputs["student_hidden"], inputs["student_head"], torch.zeros(6, dtype=torch.long), max_logits=25
        ).sum().backward()
    assert 0 < seen.found <= 25


def test_logprobs_of_half_precision_logits_are_formed_in_float32():
    logits = torch.linspace(-4, 4, 1000).to(torch.bfloat16)
    got = gather_logprobs(logits, torch.tensor(17))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.log_softmax(logits.float(), -1)[17])


@quick
@given(logits_pairs(), st.floats(0.3, 3.0))
def test_the_logprobs_of_all_tokens_are_those_of_a_distribution(pair, temperature):
    every = gather_logprobs(pair[0].expand(5, 5), torch.arange(5), temperature=temperature)
    assert float(every.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(every, torch.log_softmax(pair[0] / temperature, -1), atol=1e-12, rtol=0)


# --- reinforce and ppo ---

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


# --- outcome ---

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.2, 0.5, 0.0])
GROUPS = torch.tensor([7, 3, 7, 3, 3, 9])  # 7: [1, 0.5], 3: [0, 0.2, 0.5], 9: [0]


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # 3: 0 - 0.35, 0.2 - 0.25, 0.5 - 0.1
    expected = torch.tensor([0.5, -0.35, -0.5, -0.05, 0.4, 0.0])
    torch.testing.assert_close(outcome(REWARDS, GROUPS, "leave_one_out"), expected, atol=1e-6, rtol=0)


def test_group_mean_compares_with_the_mean_of_all():
    mean = 0.7 / 3
    expected = torch.tensor([0.25, -mean, -0.25, 0.2 - mean, 0.5 - mean, 0.0])
    torch.testing.assert_close(outcome(REWARDS, GROUPS, "group_mean"), expected, atol=1e-6, rtol=0)


def test_grpo_divides_by_the_standard_deviation_of_the_group():
    mean = 0.7 / 3
    deviation = math.sqrt(((0 - mean) ** 2 + (0.2 - mean) ** 2 + (0.5 - mean) ** 2) / 3)
    expected = torch.tensor([1.0, -mean / deviation, -1.0, (0.2 - mean) / deviation, (0.5 - mean) / deviation, 0.0])
    torch.testing.assert_close(outcome(REWARDS, GROUPS, "grpo"), expected, atol=1e-5, rtol=0)


def test_without_a_baseline_the_outcome_is_the_reward():
    got = outcome(REWARDS, GROUPS, "none")
    assert torch.equal(got, REWARDS)
    assert got.data_ptr() != REWARDS.data_ptr()


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
def test_a_group_of_one_has_nothing_to_compare_with(baseline):
    assert float(outcome(torch.tensor([0.8]), torch.tensor([4]), baseline)) == 0.0


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
@quick
@given(reward=st.floats(0, 1, width=32), size=st.integers(1, 16))
def test_equal_rewards_give_no_advantage(baseline, reward, size):
    got = outcome(torch.full((size,), reward), torch.zeros(size, dtype=torch.long), baseline)
    assert float(got.abs().max()) <= 1e-6


@quick
@given(st.lists(st.tuples(st.floats(0, 1, width=16), st.integers(0, 3)), min_size=1, max_size=12))
def test_outcome_advantages_of_every_group_sum_to_zero(pairs):
    rewards, groups = torch.tensor([p[0] for p in pairs]).double(), torch.tensor([p[1] for p in pairs])
    for baseline in ("leave_one_out", "group_mean", "grpo"):
        got = outcome(rewards, groups, baseline)
        for group in groups.unique():
            assert float(got[groups == group].sum()) == pytest.approx(0.0, abs=1e-6)


@quick
@given(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=8))
def test_leave_one_out_is_group_mean_times_n_over_n_minus_one(rewards):
    values, n = torch.tensor(rewards).double(), len(rewards)
    group = torch.zeros(n, dtype=torch.long)
    torch.testing.assert_close(
        outcome(values, group, "leave_one_out"), outcome(values, group, "group_mean") * n / (n - 1)
    )


def test_the_outcome_of_no_rollouts_is_empty():
    for baseline in ("leave_one_out", "group_mean", "grpo", "none"):
        assert outcome(torch.zeros(0), torch.zeros(0, dtype=torch.long), baseline).shape == (0,)


def test_shapes_that_do_not_fit_are_refused_while_testing():
    with pytest.raises(TypeCheckError):
        immediate(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        reinforce(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
