"""What the losses estimate, by enumerating every trajectory of a small tree in float64.

The policy is a table: vocabulary {0, 1, END}, at most three actions, one row of logits for each of the 7 prefixes that
can be reached, 15 trajectories. V = E_y[sum_t r_t] with r_t = log q - log pi of the sampled token.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opd.objectives.advantages import immediate, log_ratio_to_go
from opd.objectives.losses import exact_reverse_kl, reinforce
from opd.objectives.reduce import denominator

VOCAB, HORIZON, END = 3, 3, 2


@dataclass(frozen=True)
class Tree:
    """Every trajectory of the tree: states, actions [trajectories, horizon] and the mask of what was acted."""

    states: Tensor
    actions: Tensor
    mask: Tensor
    num_states: int


def make_tree() -> Tree:
    prefixes = [p for n in range(HORIZON) for p in itertools.product((0, 1), repeat=n)]
    index = {p: i for i, p in enumerate(prefixes)}
    finished = [(*p, END) for p in prefixes] + list(itertools.product((0, 1), repeat=HORIZON))
    states = torch.zeros(len(finished), HORIZON, dtype=torch.long)
    actions, mask = torch.zeros_like(states), torch.zeros_like(states, dtype=torch.bool)
    for row, y in enumerate(finished):
        for t, action in enumerate(y):
            states[row, t], actions[row, t], mask[row, t] = index[y[:t]], action, True
    return Tree(states, actions, mask, len(prefixes))


TREE = make_tree()


def policies(seed: int) -> tuple[Tensor, Tensor]:
    """Random logits [states, vocab] of a student (with gradient) and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(TREE.num_states, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), 1.5 * teacher


def logprobs(logits: Tensor) -> Tensor:
    """Log-probability of every action of every trajectory, [trajectories, horizon], 0 behind the end."""
    table = torch.log_softmax(logits, -1)[TREE.states, TREE.actions]
    return torch.where(TREE.mask, table, 0.0)


def value(student: Tensor, teacher: Tensor) -> Tensor:
    """V, differentiable in the student."""
    logp, logq = logprobs(student), logprobs(teacher)
    return (logp.sum(-1).exp() * (logq - logp).sum(-1)).sum()


def occupancy(student: Tensor) -> Tensor:
    """d(s): the expected number of visits of each state; sums to the mean length."""
    probability = logprobs(student).sum(-1).exp().detach()
    visits = torch.zeros(TREE.num_states, dtype=torch.float64)
    weight = probability[:, None].expand_as(TREE.mask)[TREE.mask]
    return visits.index_add(0, TREE.states[TREE.mask], weight)


def g1(student: Tensor, teacher: Tensor) -> Tensor:
    """-sum_s d(s) grad KL_s: the gradient of V with the visited states held fixed."""
    logp, logq = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return torch.autograd.grad(-(occupancy(student) * kl).sum(), student)[0]


def grad_v(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.autograd.grad(value(student, teacher), student)[0]


Estimator = Callable[[Tensor, Tensor, list[int]], Tensor]


def estimates(estimator: Estimator, student: Tensor, teacher: Tensor, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(probability [batches], descent direction [batches, states, vocab]) of every batch of that many trajectories."""
    probability = logprobs(student).sum(-1).exp().detach()
    chances, found = [], []
    for rows in itertools.product(range(len(TREE.mask)), repeat=batch):
        (gradient,) = torch.autograd.grad(estimator(student, teacher, list(rows)), student)
        chances.append(probability[list(rows)].prod())
        found.append(-gradient)
    return torch.stack(chances), torch.stack(found)


def mean_and_variance(chances: Tensor, found: Tensor) -> tuple[Tensor, float]:
    mean = torch.einsum("n,nsv->sv", chances, found)
    second = torch.einsum("n,nsv->", chances, found**2)
    return mean, float(second - (mean**2).sum())


def sampled(advantage: Callable[[Tensor, Tensor], Tensor], normalizer: str = "trajectory") -> Estimator:
    """The policy-gradient loss of a batch of trajectories as the loop computes it."""

    def loss(student: Tensor, teacher: Tensor, rows: list[int]) -> Tensor:
        new, mask = logprobs(student)[rows], TREE.mask[rows]
        # The log ratio is not detached here: the advantage must see to that itself.
        advantages = advantage(logprobs(teacher)[rows] - new, mask)
        return reinforce(new, advantages, mask, divisor=denominator(mask, normalizer, constant=1.0))  # type: ignore[arg-type]  # one of its names

    return loss


def exact(student: Tensor, teacher: Tensor, rows: list[int]) -> Tensor:
    """The exact immediate loss at the states that the trajectories visit; identity heads make the tables the logits."""
    visited = TREE.states[rows][TREE.mask[rows]]
    eye = torch.eye(VOCAB, dtype=torch.float64)
    weights = torch.full((len(visited),), 1 / len(rows), dtype=torch.float64)
    return exact_reverse_kl(student[visited], eye, teacher[visited], eye, weights)[0]


def to_go(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return log_ratio_to_go(log_ratio, mask, 1.0)


seeds = pytest.mark.parametrize("seed", range(4))


@seeds
def test_the_tree_holds_every_trajectory_once(seed):
    student, _ = policies(seed)
    assert len(TREE.mask) == 15
    probability = logprobs(student).sum(-1).exp().detach()
    assert float(probability.sum()) == pytest.approx(1.0, abs=1e-12)
    length = float((probability * TREE.mask.sum(-1)).sum())
    assert float(occupancy(student).sum()) == pytest.approx(length, abs=1e-12)


@seeds
def test_the_gradient_of_v_by_autograd_agrees_with_finite_differences(seed):
    student, teacher = policies(seed)
    numeric, step = torch.zeros_like(student), 1e-5
    with torch.no_grad():
        for s, a in itertools.product(range(TREE.num_states), range(VOCAB)):
            shift = torch.zeros_like(student)
            shift[s, a] = step
            numeric[s, a] = (value(student + shift, teacher) - value(student - shift, teacher)) / (2 * step)
    torch.testing.assert_close(grad_v(student, teacher), numeric, atol=1e-8, rtol=0)


@seeds
def test_log_ratio_to_go_estimates_the_gradient_of_v(seed):
    student, teacher = policies(seed)
    mean, _ = mean_and_variance(*estimates(sampled(to_go), student, teacher))
    torch.testing.assert_close(mean, grad_v(student, teacher), atol=1e-10, rtol=0)


@seeds
def test_immediate_estimates_g1_and_misses_the_rest(seed):
    student, teacher = policies(seed)
    mean, _ = mean_and_variance(*estimates(sampled(immediate), student, teacher))
    torch.testing.assert_close(mean, g1(student, teacher), atol=1e-10, rtol=0)
    assert float((mean - grad_v(student, teacher)).norm()) > 1e-3


@seeds
def test_the_exact_loss_estimates_g1_with_less_variance_than_the_sampled_one(seed):
    student, teacher = policies(seed)
    mean, variance = mean_and_variance(*estimates(exact, student, teacher))
    _, sampled_variance = mean_and_variance(*estimates(sampled(immediate), student, teacher))
    torch.testing.assert_close(mean, g1(student, teacher), atol=1e-10, rtol=0)
    assert 0.0 < variance < sampled_variance


@seeds
def test_discounts_between_zero_and_one_lie_on_a_curve_from_g1_to_the_gradient_of_v(seed):
    student, teacher = policies(seed)
    # The mean is a polynomial of degree horizon - 1 in the discount: three points fix it, a fourth must lie on it.
    means = {
        d: mean_and_variance(*estimates(sampled(lambda r, m, d=d: log_ratio_to_go(r, m, d)), student, teacher))[0]
        for d in (0.0, 0.25, 0.5, 1.0)
    }
    assert HORIZON == 3
    interpolated = (means[0.0] * (0.25 - 0.5) * (0.25 - 1.0) / 0.5
                    + means[0.5] * 0.25 * (0.25 - 1.0) / (0.5 * (0.5 - 1.0))
                    + means[1.0] * 0.25 * (0.25 - 0.5) / 0.5)  # fmt: skip
    torch.testing.assert_close(means[0.25], interpolated, atol=1e-10, rtol=0)
    torch.testing.assert_close(means[0.0], g1(student, teacher), atol=1e-10, rtol=0)
    torch.testing.assert_close(means[1.0], grad_v(student, teacher), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", range(2))
def test_only_the_trajectory_normaliser_is_unbiased_in_a_batch(seed):
    student, teacher = policies(seed)
    target = grad_v(student, teacher)
    by_trajectory, _ = mean_and_variance(*estimates(sampled(to_go), student, teacher, batch=2))
    by_token, _ = mean_and_variance(*estimates(sampled(to_go, "token"), student, teacher, batch=2))
    by_constant, _ = mean_and_variance(*estimates(sampled(to_go, "constant"), student, teacher, batch=2))
    torch.testing.assert_close(by_trajectory, target, atol=1e-10, rtol=0)
    torch.testing.assert_close(by_constant, 2 * target, atol=1e-10, rtol=0)  # a sum of two divided by 1
    cosine = float((by_token * target).sum() / by_token.norm() / target.norm())
    assert cosine < 1 - 1e-4  # not even the direction: no rescaling makes it unbiased


@seeds
def test_a_loss_with_gradient_through_k1_contains_no_teacher(seed):
    student, teacher = policies(seed)

    def k1(new: Tensor, constant: Tensor, rows: list[int]) -> Tensor:
        return (logprobs(new)[rows] - logprobs(constant)[rows]).sum() / len(rows)

    chances, naive = estimates(k1, student, teacher)
    _, opposite = estimates(k1, student, -teacher)
    assert torch.equal(naive, opposite)  # two opposite teachers, one gradient
    mean, _ = mean_and_variance(chances, naive)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)  # and none on average


@seeds
@pytest.mark.parametrize("estimator", [sampled(immediate), sampled(to_go), exact], ids=["immediate", "to_go", "exact"])
def test_every_estimator_contains_its_teacher(seed, estimator):
    student, teacher = policies(seed)
    mean, _ = mean_and_variance(*estimates(estimator, student, teacher))
    other, _ = mean_and_variance(*estimates(estimator, student, -teacher))
    assert float((mean - other).norm()) > 0.1
    # Where the student is the teacher nothing is left to follow on average.
    still, _ = mean_and_variance(*estimates(estimator, student, student.detach().clone()))
    torch.testing.assert_close(still, torch.zeros_like(still), atol=1e-12, rtol=0)


@seeds
def test_a_step_along_the_mean_log_ratio_to_go_raises_v(seed):
    student, teacher = policies(seed)
    mean, _ = mean_and_variance(*estimates(sampled(to_go), student, teacher))
    with torch.no_grad():
        assert float(value(student + 0.05 * mean, teacher)) > float(value(student, teacher))
