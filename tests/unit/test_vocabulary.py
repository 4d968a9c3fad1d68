"""Laws of the losses over the whole vocabulary: chunked against dense, gradients, supports, mixtures, edges."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd.objectives.baselines import score_weighted
from opd.objectives.divergences import forward_kl, jsd, reverse_kl, tail_logprob, top_k_reverse_kl
from opd.objectives.tiles import tiles
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, state_statistics, vocabulary_loss

quick = settings(max_examples=40)
STATES, VOCAB = 5, 9


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def given_states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[TeacherStates], Tensor, Tensor]:
    """Student hidden states and head (both with gradient), two teachers of other widths, weights and sampled ids."""
    hidden, head = draw(STATES, 4, seed=0, dtype=dtype), draw(VOCAB, 4, seed=1, dtype=dtype)
    teachers = [
        TeacherStates(draw(STATES, 3, seed=2, dtype=dtype), draw(VOCAB, 3, seed=3, dtype=dtype), 0.7),
        TeacherStates(draw(STATES, 6, seed=4, dtype=dtype), draw(VOCAB, 6, seed=5, dtype=dtype), 0.3),
    ]
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25], dtype=dtype)
    return hidden.requires_grad_(), head.requires_grad_(), teachers, weights, torch.tensor([0, 8, 3, 3, 5])


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense(name: str, student: Tensor, teachers: list[TeacherStates], how: VocabularyLoss) -> Tensor:
    """The divergence [states] with all logits in memory; student [states, vocab] before its soft cap."""
    student = capped(student, how.softcap)
    parts = [
        t.weight * torch.log_softmax(capped(t.hidden @ t.head.T, t.softcap) / how.temperature, -1) for t in teachers
    ]
    target = torch.stack(parts).sum(0)
    if name == "reverse_kl":
        logp = torch.log_softmax(student / how.temperature, -1)
        return (logp.exp() * (logp - target)).sum(-1)
    logits = how.temperature * target  # the functions divide by the temperature again, and normalise
    if name == "forward_kl":
        return forward_kl(student, logits, temperature=how.temperature)
    return jsd(student, logits, beta=how.jsd_beta, temperature=how.temperature)


CASES = [
    {"divergence": "reverse_kl"},
    {"divergence": "reverse_kl", "temperature": 0.6},
    {"divergence": "forward_kl", "temperature": 1.4},
    {"divergence": "jsd", "jsd_beta": 0.3},
    {"divergence": "jsd", "jsd_beta": 0.9, "temperature": 0.8},
    {"divergence": "reverse_kl", "softcap": 0.9, "temperature": 0.6},
    {"divergence": "jsd", "jsd_beta": 0.3, "softcap": 1.5},
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("max_logits", [1, 2 * VOCAB, 10_000])
def test_chunked_equals_dense_in_value_and_gradient(
    options: dict[str, Any], max_logits: int, dtype: torch.dtype, tolerance: float
):
    hidden, head, teachers, weights, _ = given_states(dtype)
    how = VocabularyLoss(max_logits=max_logits, **options)
    if how.softcap is not None:  # one teacher has a cap of its own, the other none
        teachers[0] = teachers[0]._replace(softcap=0.7)
    loss, stats = vocabulary_loss(hidden, head, teachers, weights, how)
    wanted = dense(how.divergence, hidden @ head.T, teachers, how)
    torch.testing.assert_close(stats.divergence, wanted.detach(), rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(loss, (hidden, head))
    expected = torch.autograd.grad((weights * wanted).sum(), (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("max_logits", [1, 2 * VOCAB, 10_000])
def test_models_that_share_a_head_are_as_if_each_had_its_own(max_logits: int):
    hidden, head, teachers, weights, _ = given_states()
    how = VocabularyLoss(max_logits=max_logits)
    found = []
    for own in (head.detach(), head.detach().clone()):  # the student's very head, or another that is equal
        both = [TeacherStates(draw(STATES, 4, seed=6), own, 0.4), TeacherStates(*teachers[1][:2], 0.6)]
        loss, stats = vocabulary_loss(hidden, head, both, weights, how)
        found.append((stats.divergence, *torch.autograd.grad(loss, (hidden, head))))
        wanted = dense("reverse_kl", hidden @ head.T, both, how).detach()
        torch.testing.assert_close(stats.divergence, wanted, rtol=1e-12, atol=1e-12)
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, rtol=1e-12, atol=1e-12)


def test_a_shared_head_is_read_once_a_tile(monkeypatch: pytest.MonkeyPatch):
    hidden, head, _, _, _ = given_states()
    products: list[int] = []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: products.append(len(a)) or plain(a, b, out=out))
    for own, expected in ((head, [2, 2, 2, 2, 2]), (head.clone(), [1] * 10), (head[:-1], [1] * 10)):
        products.clear()
        for rows, (ours, theirs) in tiles([(hidden, head), (-hidden, own)], max_logits=VOCAB):
            torch.testing.assert_close(ours, (hidden @ head.T)[rows].detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(theirs, -(hidden @ own.T)[rows].detach(), rtol=1e-12, atol=1e-12)
        assert products == expected


@pytest.mark.parametrize(
    "options", [*CASES, {"top_k": 2}, {"top_k": 2, "temperature": 0.7, "softcap": 0.9}, {"top_k": VOCAB}], ids=str
)
def test_gradcheck(options: dict[str, Any]):
    hidden, head, teachers, weights, sampled = given_states()
    how = VocabularyLoss(max_logits=2 * VOCAB, **options)

    def loss(student: Tensor, table: Tensor) -> Tensor:
        return vocabulary_loss(student, table, teachers, weights, how, sampled_ids=sampled)[0]

    assert torch.autograd.gradcheck(loss, (hidden, head), eps=1e-6, atol=1e-8)


def bucketed(k: int, *, residual: bool = False, sampled: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(the gradient in the student's logits of each state, the divergence [states]) on a support."""
    hidden, head, teachers, _, ids = given_states()
    logits = (hidden @ head.T).detach().requires_grad_()
    how = VocabularyLoss(top_k=k, tail_residual=residual)
    loss, stats = vocabulary_loss(
        logits,
        torch.eye(VOCAB, dtype=torch.float64),
        [teachers[0]._replace(weight=1.0)],
        torch.ones(STATES, dtype=torch.float64),
        how,
        sampled_ids=ids if sampled is None else sampled,
    )
    return torch.autograd.grad(loss, logits)[0], stats.divergence


def one_teacher() -> tuple[Tensor, Tensor]:
    """(student logits, teacher logits), of the first teacher at full weight."""
    hidden, head, teachers, _, _ = given_states()
    return (hidden @ head.T).detach(), teachers[0].hidden @ teachers[0].head.T


def test_a_support_of_the_whole_vocabulary_is_the_reverse_kl():
    hidden, head, teachers, weights, sampled = given_states()
    found = vocabulary_loss(hidden, head, teachers, weights, VocabularyLoss(top_k=VOCAB), sampled_ids=sampled)
    whole = vocabulary_loss(hidden, head, teachers, weights, VocabularyLoss())
    torch.testing.assert_close(found[1].divergence, whole[1].reverse_kl, rtol=1e-12, atol=1e-12)
    assert found[1].tail.abs().max() == 0
    for ours, theirs in zip(
        torch.autograd.grad(found[0], (hidden, head)), torch.autograd.grad(whole[0], (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_a_support_with_its_tail_is_a_lower_bound_that_grows_with_k():
    student, teacher = one_teacher()
    teachers = [TeacherStates(teacher, torch.eye(VOCAB, dtype=torch.float64))]
    exact = reverse_kl(student, teacher)
    before = torch.zeros(STATES, dtype=torch.float64)
    for k in range(1, VOCAB + 1):
        _, stats = vocabulary_loss(
            student, torch.eye(VOCAB, dtype=torch.float64), teachers, torch.ones(STATES).double(),
            VocabularyLoss(top_k=k), sampled_ids=student.argmax(-1),
        )  # fmt: skip
        assert bool((stats.divergence <= exact + 1e-12).all())
        assert bool((stats.divergence >= before - 1e-12).all())
        torch.testing.assert_close(stats.reverse_kl, exact)
        before = stats.divergence


@quick
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_support_reverse_kl_is_the_kl_of_the_buckets(seed: int, k: int):
    logits = draw(2, VOCAB, seed=seed)
    logp, logq = torch.log_softmax(2 * logits, -1)
    chosen = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:k]
    p = torch.cat([logp[chosen].exp(), 1 - logp[chosen].exp().sum()[None]])
    q = torch.cat([logq[chosen].exp(), 1 - logq[chosen].exp().sum()[None]])
    wanted = (p * (p / q).log()).sum()
    assert float(top_k_reverse_kl(logp[chosen], logq[chosen])) == pytest.approx(float(wanted), abs=1e-9)
    assert float(wanted) <= float(reverse_kl(*(2 * logits))) + 1e-9


def test_the_gradient_on_a_support_is_that_of_the_bucketed_kl():
    student, teacher = one_teacher()
    chosen = torch.tensor([0, 3, 5])
    logits = student[0].clone().requires_grad_()
    logq = torch.log_softmax(teacher[0], -1)[chosen]
    (found,) = torch.autograd.grad(top_k_reverse_kl(torch.log_softmax(logits, -1)[chosen], logq), logits)
    p = torch.softmax(logits, -1)[chosen]
    buckets = torch.cat([p, 1 - p.sum()[None]])
    q = torch.cat([logq.exp(), 1 - logq.exp().sum()[None]])
    (wanted,) = torch.autograd.grad((buckets * (buckets / q).log()).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_support_of_everything_leaves_no_tail():
    logp, logq = torch.log_softmax(draw(2, VOCAB, seed=6), -1)
    assert float(top_k_reverse_kl(logp, logq)) == pytest.approx(float(reverse_kl(logp, logq)), abs=1e-12)
    assert float(tail_logprob(logp)) == -50.0


def test_the_tail_residual_makes_the_mean_gradient_that_of_the_reverse_kl():
    student, teacher = one_teacher()
    logits = student.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(reverse_kl(logits, teacher).sum(), logits)
    p = torch.softmax(student, -1)
    mean, plain = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for action in range(VOCAB):
        every = torch.full((STATES,), action)
        mean += p[:, action : action + 1] * bucketed(2, residual=True, sampled=every)[0]
        plain += p[:, action : action + 1] * bucketed(2, sampled=every)[0]
    torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-12)
    assert float((plain - wanted).abs().max()) > 1e-3


def test_a_mixtures_reverse_kl_is_the_weighted_mean_of_the_kls():
    hidden, head, teachers, weights, _ = given_states()
    _, stats = vocabulary_loss(hidden, head, teachers, weights, VocabularyLoss())
    logits = hidden @ head.T
    wanted = torch.stack([t.weight * reverse_kl(logits, t.hidden @ t.head.T) for t in teachers]).sum(0)
    torch.testing.assert_close(stats.reverse_kl, wanted.detach())


def test_an_extrapolated_target_moves_away_from_the_reference():
    hidden, head, teachers, weights, _ = given_states()
    apart = [teachers[0]._replace(weight=1.5), teachers[1]._replace(weight=-0.5)]
    loss, _ = vocabulary_loss(hidden, head, apart, weights, VocabularyLoss())
    logits = hidden @ head.T
    wanted = 1.5 * reverse_kl(logits, apart[0].hidden @ apart[0].head.T) - 0.5 * reverse_kl(
        logits, apart[1].hidden @ apart[1].head.T
    )
    torch.testing.assert_close(loss, (weights * wanted).sum())


def test_state_statistics_are_those_of_the_loss_with_the_best_baseline():
    hidden, head, teachers, weights, _ = given_states()
    how = VocabularyLoss(temperature=0.8, max_logits=VOCAB, top_k=3)
    found = state_statistics(hidden, head, teachers[:1], how, score_weighted=True)
    _, wanted = vocabulary_loss(hidden, head, teachers[:1], weights, VocabularyLoss(temperature=0.8))
    torch.testing.assert_close(found.reverse_kl, wanted.reverse_kl)
    torch.testing.assert_close(found.entropy, wanted.entropy)
    scaled = teachers[0].weight * torch.log_softmax(teachers[0].hidden @ teachers[0].head.T / 0.8, -1)
    student = torch.log_softmax((hidden @ head.T).detach() / 0.8, -1)
    n = 1 - 2 * student.exp() + student.exp().square().sum(-1, keepdim=True)
    weight = student.exp() * n
    torch.testing.assert_close(found.score_weighted, (weight * (scaled - student)).sum(-1) / weight.sum(-1))
    assert not any(column.requires_grad for column in found)
    assert torch.isnan(state_statistics(hidden, head, teachers, how).score_weighted).all()


def test_no_states_give_no_loss_and_empty_columns():
    empty = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    teachers = [TeacherStates(torch.zeros(0, 3, dtype=torch.float64), draw(VOCAB, 3, seed=3))]
    loss, stats = vocabulary_loss(empty, draw(VOCAB, 4, seed=1), teachers, torch.zeros(0).double(), VocabularyLoss())
    assert float(loss.detach()) == 0.0
    assert all(len(column) == 0 for column in stats)
    assert all(len(c) == 0 for c in state_statistics(empty, draw(VOCAB, 4, seed=1), teachers, VocabularyLoss()))


def test_a_teacher_without_support_costs_the_floor_and_is_counted():
    student = torch.zeros(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    # a head that gives these logits: the hidden state is the logits themselves, with -1e30 for minus infinity
    eye = torch.eye(3, dtype=torch.float64)
    states = [TeacherStates(teacher.clamp(min=-1e30), eye)]
    _, stats = vocabulary_loss(student, eye, states, torch.ones(1).double(), VocabularyLoss(logprob_floor=-20.0))
    by_hand = math.log(1 / 3) - (2 * math.log(0.5) - 20.0) / 3
    assert float(stats.reverse_kl) == pytest.approx(by_hand, abs=1e-9)
    assert float(stats.floored) == pytest.approx(1 / 3)


@quick
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_divergences_are_never_negative_and_zero_where_the_two_are_equal(seed: int, beta: float):
    student, teacher = 3 * draw(2, VOCAB, seed=seed)
    for found in (forward_kl(student, teacher), jsd(student, teacher, beta=beta)):
        assert float(found) >= -1e-12
    assert float(forward_kl(student, student.clone())) == 0.0
    assert abs(float(jsd(student, student + 3.0, beta=beta))) < 1e-12
    assert float(jsd(student, teacher)) <= math.log(2)
    assert float(jsd(student, teacher, beta=beta)) == pytest.approx(
        float(jsd(teacher, student, beta=1 - beta)), abs=1e-12
    )


def test_the_ends_of_the_jsd_are_the_two_kls():
    student, teacher = draw(2, VOCAB, seed=1)
    assert float(jsd(student, teacher, beta=1e-5)) / 1e-5 == pytest.approx(
        float(forward_kl(student, teacher)), rel=1e-3
    )
    assert float(jsd(student, teacher, beta=1 - 1e-5)) / 1e-5 == pytest.approx(
        float(reverse_kl(student, teacher)), rel=1e-3
    )


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_beta_at_the_ends_is_refused(beta: float):
    with pytest.raises(ValueError, match="its ends are forward_kl and reverse_kl"):
        jsd(torch.zeros(3), torch.zeros(3), beta=beta)


def test_score_weighted_is_the_baseline_of_least_variance():
    student, teacher = draw(2, 6, seed=2)
    p, r = torch.softmax(student, -1), torch.log_softmax(teacher, -1) - torch.log_softmax(student, -1)
    scores = torch.eye(6, dtype=torch.float64) - p

    def variance(baseline: float) -> float:
        estimates = (r - baseline)[:, None] * scores
        return float(p @ estimates.square().sum(-1) - (p @ estimates).square().sum())

    best = float(score_weighted(student, teacher))
    assert variance(best) < min(variance(best - 1e-3), variance(best + 1e-3))
    assert variance(best) < variance(0.0)


def test_score_weighted_is_zero_where_the_student_is_certain():
    student = torch.tensor([1000.0, 0.0, 0.0], dtype=torch.float64)
    assert float(score_weighted(student, torch.zeros(3, dtype=torch.float64))) == 0.0


@pytest.mark.parametrize(
    ("states", "sizes"),
    [
        (0, []),
        (1, [1]),
        (300, [256, 44]),
        (2048, [256] * 8),
        (3000, [320] * 9 + [120]),
        (4096, [512] * 8),
        (9000, [512] * 17 + [296]),
    ],
)
def test_tiles_grow_only_where_they_are_a_small_share(states: int, sizes: list[int]):
    hidden, head = torch.randn(states, 2), torch.randn(3, 2)
    found = []
    for rows, (logits,) in tiles([(hidden, head)], max_logits=2**20):
        found.append(rows.stop - rows.start)
        torch.testing.assert_close(logits, hidden[rows] @ head.T)
    assert found == sizes
