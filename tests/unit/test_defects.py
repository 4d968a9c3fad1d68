"""Defects of published code that concern the mathematics: the defective form fails the check that ours passes."""

from collections.abc import Callable

import pytest
import torch
from factories import prompt, rollout, scored
from torch import Tensor

from opd.batch import pack
from opd.objectives.advantages import immediate, log_ratio_to_go
from opd.objectives.baselines import leave_one_out
from opd.objectives.corrections import importance_weights, rejected
from opd.objectives.divergences import reverse_kl, top_k_reverse_kl
from opd.objectives.losses import reinforce
from opd.objectives.reduce import denominator
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss

VOCAB = 7


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher at one state."""
    student, teacher = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return student, teacher


def mean_gradient(loss_of: Callable[[Tensor, Tensor], Tensor], student: Tensor) -> Tensor:
    """The gradient in the logits, averaged over the sampled token; loss_of(log p [vocab], log p of the token) [vocab]."""
    free = student.clone().requires_grad_()
    logp = torch.log_softmax(free, -1)
    return torch.autograd.grad((logp.detach().exp() * loss_of(logp, logp)).sum(), free)[0]


def true_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    free = student.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl(free, teacher), free)[0]


def one_action(values: Tensor) -> tuple[Tensor, Tensor]:
    """Each token of the vocabulary as a response of one action: [vocab, 1] and its mask."""
    return values[:, None], torch.ones(len(values), 1, dtype=torch.bool)


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean gradient of the immediate log ratio as training computes it."""

    def loss(logp: Tensor, _: Tensor) -> Tensor:
        ratio, mask = one_action(torch.log_softmax(teacher, -1) - logp)
        advantage = immediate(ratio, mask)
        return torch.stack([reinforce(logp[i, None, None], advantage[[i]], mask[[i]]) for i in range(VOCAB)])

    return mean_gradient(loss, student)


def test_a_difference_of_log_probabilities_is_no_loss_it_forgets_its_teacher():
    student, teacher = logits()
    other = -teacher

    def defective(target: Tensor) -> Tensor:
        return mean_gradient(lambda _, chosen: chosen - torch.log_softmax(target, -1), student)

    torch.testing.assert_close(defective(teacher), defective(other))
    assert not torch.allclose(ours(student, teacher), ours(student, other), atol=1e-2)
    torch.testing.assert_close(ours(student, teacher), true_gradient(student, teacher))


def test_a_truncated_sum_clamped_at_zero_drops_the_gradient_where_it_acts():
    student = torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0, 0.0, 0.0]).double()
    teacher = torch.tensor([2.0, 1.5, -1.0, -1.0, -1.0, 0.0, 0.0]).double()
    chosen = teacher.topk(2).indices  # the student puts less than the teacher on both: the truncated sum is negative

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        free = student.clone().requires_grad_()
        value = loss(torch.log_softmax(free, -1)[chosen], torch.log_softmax(teacher, -1)[chosen])
        return torch.autograd.grad(value, free)[0]

    assert not gradient(lambda p, q: (p.exp() * (p - q)).sum().clamp(min=0.0)).any()
    found = gradient(lambda p, q: top_k_reverse_kl(p, q))
    assert float(found[chosen].max()) < 0  # descending raises both
    assert float(found.norm()) > 0.1


def test_a_states_divergence_as_the_advantage_of_the_token_drawn_there_teaches_nothing():
    student, teacher = logits()
    divergence = reverse_kl(student, teacher)
    found = mean_gradient(lambda _, chosen: divergence * chosen, student)
    assert float(found.abs().max()) < 1e-12  # a state's own figure is a baseline
    assert float(ours(student, teacher).norm()) > 0.1


def test_k3_is_no_advantage():
    student, teacher = logits()
    ratio = torch.log_softmax(teacher, -1) - torch.log_softmax(student, -1)
    k3 = ratio.exp() - 1 - ratio
    assert float((-k3).max()) <= 0.0  # whatever the token, it is pushed down
    assert float(ratio.max()) > 0.1
    assert float(ratio.min()) < -0.1
    found = mean_gradient(lambda _, chosen: k3 * chosen, student)
    assert not torch.allclose(found, true_gradient(student, teacher), atol=1e-2)


def test_two_bins_of_the_sampled_token_and_the_rest_are_not_the_reverse_kl():
    student, teacher = logits()
    q = torch.softmax(teacher, -1)

    def two_bins(logp: Tensor, _: Tensor) -> Tensor:
        p = logp.exp()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()

    found, wanted = mean_gradient(two_bins, student), true_gradient(student, teacher)
    assert float(found.norm() / wanted.norm()) < 0.7
    # ours with the smallest support and the tail residual has the right mean (every token sampled in turn)
    eye, total = torch.eye(VOCAB, dtype=torch.float64), torch.zeros_like(wanted)
    for token in range(VOCAB):
        free = student[None].clone().requires_grad_()
        loss, _ = vocabulary_loss(
            free, eye, [TeacherStates(teacher[None], eye)], torch.ones(1).double(),
            VocabularyLoss(top_k=1, tail_residual=True), sampled_ids=torch.tensor([token]),
        )  # fmt: skip
        total += torch.softmax(student, -1)[token] * torch.autograd.grad(loss, free)[0][0]
    torch.testing.assert_close(total, wanted)


def test_the_loss_is_divided_by_the_batchs_own_actions_and_not_by_the_data_sets_answers():
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    answers = 51  # tokens of the reference answers: nothing of the batch depends on them
    assert denominator(mask, "token") == 10 != answers


def test_discounts_do_not_count_absolute_positions():
    ratio = torch.ones(1, 6)
    late = torch.tensor([[False, False, False, True, True, True]])
    found = log_ratio_to_go(ratio, late, 0.5)[0, 3:]
    assert found.tolist() == [1.75, 1.5, 1.0]
    positions = torch.arange(6.0)
    defective = (late * 0.5**positions * ratio).flip(-1).cumsum(-1).flip(-1)[0, 3:]
    assert not torch.allclose(found, defective)


def test_padding_does_not_leak_into_advantages():
    ratio, mask = torch.tensor([[1.0, 2.0, 99.0]]), torch.tensor([[True, True, False]])
    assert log_ratio_to_go(ratio, mask).tolist() == [[3.0, 2.0, 0.0]]
    groups = torch.zeros(2, dtype=torch.long)
    found = leave_one_out(torch.tensor([[1.0, 99.0], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]]), groups)
    assert found.tolist() == [[3.0, 0.0], [1.0, 0.0]]


def test_the_end_of_turn_token_trains_although_it_is_the_padding_token_too():
    end = 257
    item = rollout([1, 2, 5, end], 2, prompt=prompt())
    batch, _ = pack([scored(item, [-0.5, -3.0])], logprob_floor=-50.0)
    assert batch.token_ids[batch.train_mask].tolist() == [5, end]
    defective = batch.train_mask & (batch.token_ids != end)
    assert int(defective.sum()) == 1


def test_rejected_tokens_leave_the_denominator():
    new, old = torch.tensor([[0.0, -1.0, -5.0]]), torch.tensor([[0.0, -1.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, kept = rejected(importance_weights(new, old, mask), mask)
    assert denominator(kept, "token") == 2.0
    assert denominator(mask, "token") == 3.0  # the defective one: what is left weighs a third less


def test_a_log_ratio_far_below_the_floor_is_bounded_and_counted():
    item = rollout([1, 2, 5], 2, prompt=prompt())
    batch, counts = pack([scored(item, [-400.0])], logprob_floor=-50.0)
    assert float(batch.teacher_logprobs[-1]) == -50.0
    assert counts["floored"] == 1


def test_a_prompt_with_three_teachers_does_not_weigh_three_times():
    student, teacher = logits()
    eye, one = torch.eye(VOCAB, dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    def gradient(weights: list[float]) -> Tensor:
        free = student[None].clone().requires_grad_()
        same = [TeacherStates(teacher[None], eye, weight) for weight in weights]
        return torch.autograd.grad(vocabulary_loss(free, eye, same, one, VocabularyLoss())[0], free)[0][0]

    torch.testing.assert_close(gradient([1 / 3] * 3), gradient([1.0]))
    defective = 3 * gradient([1.0])  # one loss a teacher, summed
    assert not torch.allclose(gradient([1 / 3] * 3), defective, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_student_and_teacher_are_taken_at_one_temperature(temperature: float):
    student, teacher = logits()
    found = reverse_kl(student, teacher, temperature=temperature)
    torch.testing.assert_close(found, reverse_kl(student / temperature, teacher / temperature))
    assert float(reverse_kl(student, student, temperature=temperature)) == 0.0
    assert float(reverse_kl(student / temperature, student)) > 1e-3  # a teacher at another temperature: not even itself
