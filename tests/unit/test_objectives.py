"""Laws of the divergences and log-probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd.objectives.divergences import reverse_kl
from opd.objectives.logprobs import gather_logprobs, token_logprobs
from opd.objectives.losses import exact_reverse_kl

quick = settings(max_examples=40)
INF = math.inf


def logits_pairs(size: int = 5) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Two float64 logit vectors."""
    vector = st.lists(st.floats(-30, 30), min_size=size, max_size=size).map(lambda v: torch.tensor(v).double())
    return st.tuples(vector, vector)


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
    """Records the largest [rows, vocab] tensor that any operation makes or fills; as many rows as a width are a head's."""

    def __init__(self, vocab: int, *widths: int) -> None:
        super().__init__()
        self.vocab, self.widths, self.found = vocab, widths, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        shape = result.shape if isinstance(result, Tensor) else ()
        if len(shape) == 2 and shape[1] == self.vocab and shape[0] not in self.widths:
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
    with LargestLogits(11, 4, 3) as seen:
        exact_reverse_kl(**states(), max_logits=max_logits)[0].backward()
    assert 0 < seen.found <= max_logits


# --- token_logprobs ---


@pytest.mark.parametrize("max_logits", [1, 25, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("softcap", [None, 0.9])
def test_token_logprobs_in_chunks_equal_the_dense_form_in_value_and_gradients(max_logits, temperature, softcap):
    inputs = states()
    ids = torch.tensor([3, 0, 10, 3, 7, 1])
    hidden, head = inputs["student_hidden"], inputs["student_head"]
    got = token_logprobs(hidden, head, ids, temperature=temperature, softcap=softcap, max_logits=max_logits)
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = torch.log_softmax(logits / temperature, -1)[torch.arange(6), ids]
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
    with LargestLogits(11, 4, 3) as seen:
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


def test_a_second_derivative_of_a_closed_form_is_refused():
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    losses = [
        token_logprobs(hidden, head, torch.tensor([1, 2, 3])).sum(),
        exact_reverse_kl(hidden, head, torch.randn(3, 4), head, torch.ones(3))[0],
    ]
    for loss in losses:
        [slope] = torch.autograd.grad(loss.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.sum().backward()
