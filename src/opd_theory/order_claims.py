"""A claim on the order of the variances: true near the teacher, false far from it."""

from math import log

import numpy as np
import torch
from torch import Tensor

from opd.objectives.advantages import immediate, kl_to_go, log_ratio_to_go
from opd_theory.claim import Claim
from opd_theory.estimators import mean_and_variance, trajectory_gradients
from opd_theory.tree import Policy, Problem, Tree, make_tree, random_problem, random_table
from opd_theory.written_out import WrittenOut, gap, written_out

_EXACT = 1e-9
_NEAR = 1e-4  # of the teacher's logits from the student's, in the limit


def reversal(instances: int = 200, *, sharpnesses: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0)) -> Claim:
    """Var(to-go) - Var(immediate) on random trees near and far, against the condition for its sign, and two limits.

    With F the log ratios to come, Var(to-go) - Var(immediate) = Var(G_F) + 2 Cov(G_immediate, G_F). Where no two states share a
    row it is

        sum_s d(s) sum_a pi_a n_a (Var(F|s,a) + K_a^2 - 2 r_a K_a) - |grad V|^2 + |g1|^2,

    K_a = -E[F|s,a] the KL to come after a. Only actions with r_a > K_a / 2 make it smaller: those that the teacher likes more than
    the student does and that lead to where the two differ.
    """
    worst: dict[str, float] = {}
    shares: dict[str, dict[str, float]] = {}
    for name, tree in {"2 x 2": make_tree(2, 2), "3 x 3": make_tree(3, 3)}.items():
        for sharpness in sharpnesses:
            ratios, nats = _random_ratios(tree, sharpness, instances, worst)
            shares[f"{name}, {nats:.3f} nats"] = {
                "reversed": float((ratios < 1).mean()),
                "smallest": float(ratios.min()),
                "median": float(np.median(ratios)),
            }
    limits = _near_the_teacher(instances)
    examples = {rare: _example(rare) for rare in (0.1, 0.01, 0.001)}
    near, *_, far = (found for name, found in shares.items() if name.startswith("2 x 2"))
    parts = {name: found < _EXACT for name, found in worst.items()} | limits | {
        "near the teacher no instance is reversed": near["reversed"] == 0.0,
        "far from it many are": far["reversed"] > 0.25,
        "the example is its closed form": all(abs(found - law) < _EXACT for found, law in examples.values()),
        "the example has no lower bound": examples[0.001][0] < examples[0.01][0] < examples[0.1][0] < 0.01,
    }  # fmt: skip
    shown = "; ".join(f"{name}: {100 * x['reversed']:.0f} % (least {x['smallest']:.2f})" for name, x in shares.items())
    return Claim(
        "3c", "Var(immediate) < Var(to-go) near the teacher; far from it the order reverses", "section 2.4, its table",
        "the difference is that of the condition; near the teacher above 1 in every instance; an example of ratio -> 0",
        f"reversed: {shown}; the example at pi = 0.1, 0.01, 0.001: "
        + ", ".join(f"{found:.1e}" for found, _ in examples.values()),
        all(parts.values()), {"shares": shares, "examples": {str(k): v[0] for k, v in examples.items()}}, parts,
    )  # fmt: skip


def _random_ratios(tree: Tree, sharpness: float, instances: int, worst: dict[str, float]) -> tuple[np.ndarray, float]:
    """(Var(to-go) / Var(immediate) [instances], the median KL of a visited state); adds to `worst` how far the condition is off."""
    ratios, nats = [], []
    for seed in range(instances):
        generator = torch.Generator().manual_seed(seed)
        problem = random_problem(tree, generator, sharpness=sharpness)
        policy = problem.policy(random_table(problem, generator, sharpness=sharpness))
        first, whole = _variances(policy)
        ratios.append(whole / first)
        nats.append(float(policy.occupancy @ policy.state_kl / policy.occupancy.sum()))
        if seed < 20:
            _condition_gaps(policy, worst)
    return np.array(ratios), float(np.median(nats))


def _gradients(policy: Policy) -> tuple[Tensor, Tensor]:
    """Each response's estimate from the immediate log ratio and from the log-ratio-to-go."""
    ratio, mask = policy.log_ratio, policy.problem.tree.mask
    return trajectory_gradients(policy, immediate(ratio, mask)), trajectory_gradients(
        policy, log_ratio_to_go(ratio, mask)
    )


def _variances(policy: Policy) -> tuple[float, float]:
    """(Var(immediate), Var(to-go))"""
    first, whole = (mean_and_variance(policy, found)[1] for found in _gradients(policy))
    return first, whole


def _condition_gaps(policy: Policy, worst: dict[str, float]) -> None:
    w = written_out(policy)
    first, whole = _gradients(policy)
    small, large = _variances(policy)
    future = whole - first
    mean, spread = mean_and_variance(policy, future)
    covariance = float(policy.chances @ (first * future).sum(-1) - mean_and_variance(policy, first)[0] @ mean)
    advantages = kl_to_go(policy.log_ratio, policy.reverse_kl, policy.problem.tree.mask)
    by_kl, spread_by_kl = mean_and_variance(policy, trajectory_gradients(policy, advantages))
    found = {
        "the KL of each state": gap(policy.state_kl, w.kl),
        "KL-to-go: mean": gap(by_kl, w.gradient()),
        "KL-to-go: variance": abs(spread_by_kl - w.variance(w.estimator("KL-to-go (iv)"))),
        "the variance of the immediate log ratio": abs(small - w.variance(w.estimator("immediate"))),
        "the variance of the log-ratio-to-go": abs(large - w.variance(w.estimator("log-ratio-to-go (ii)"))),
        "means": max(gap(policy.chances @ first, w.g1()), gap(policy.chances @ whole, w.gradient())),
        "the covariance": abs(large - small - spread - 2 * covariance),
        "the condition": abs(large - small - _condition(w)),
    }
    scale = max(1.0, small, large)
    for name, off in found.items():
        worst[name] = max(worst.get(name, 0.0), off / scale)


def _condition(w: WrittenOut) -> float:
    """sum_s d(s) sum_a pi_a n_a (Var(F|s,a) + K_a^2 - 2 r_a K_a) - |grad V|^2 + |g1|^2, by recursion from the ends."""
    moments, n = _future_moments(w), 1.0 - 2.0 * w.p + (w.p**2).sum(-1, keepdims=True)
    cost, spread = -moments[0][w.children], (moments[1] - moments[0] ** 2)[w.children]
    visits = w.occupancy(w.table)[:, None]
    total = (visits * w.p * n * (spread + cost**2 - 2 * w.ratio * cost)).sum()
    return float(total - (w.gradient() ** 2).sum() + (w.g1() ** 2).sum())


def _future_moments(w: WrittenOut) -> np.ndarray:
    """The mean and the mean square of the sum of log ratios from each state on, [2, states + 1]."""
    found = np.zeros((2, len(w.logq) + 1))
    for here in reversed(w.levels):
        later = found[:, w.children[here]]
        p, r = w.p[here], w.ratio[here]
        found[0, here] = (p * (r + later[0])).sum(-1)
        found[1, here] = (p * (r**2 + 2 * r * later[0] + later[1])).sum(-1)
    return found


def _near_the_teacher(instances: int) -> dict[str, bool]:
    """The teacher's logits are the student's plus e times a direction, e -> 0: r and F are of order e, K of order e^2.

    What is left of the condition is sum_s d(s) sum_a pi_a n_a Var(F|s,a), which is positive; that of KL-to-go vanishes.
    """
    smallest, to_go, kl = np.inf, 0.0, 0.0
    tree = make_tree(3, 3)
    for seed in range(min(instances, 20)):
        generator = torch.Generator().manual_seed(seed)
        table, direction = torch.randn(2, tree.num_states, tree.vocab, generator=generator, dtype=torch.float64)
        problem = Problem(tree, torch.log_softmax(table + _NEAR * direction, -1), torch.arange(tree.num_states))
        policy, w = problem.policy(table), written_out(problem.policy(table))
        moments, n = _future_moments(w), 1.0 - 2.0 * w.p + (w.p**2).sum(-1, keepdims=True)
        spread = (moments[1] - moments[0] ** 2)[w.children]
        first, whole = _variances(policy)
        limit = 1.0 + float((w.occupancy(w.table)[:, None] * w.p * n * spread).sum()) / first
        advantages = kl_to_go(policy.log_ratio, policy.reverse_kl, tree.mask)
        smallest = min(smallest, limit, whole / first)
        to_go = max(to_go, abs(whole / first - limit))
        kl = max(kl, abs(mean_and_variance(policy, trajectory_gradients(policy, advantages))[1] / first - 1.0))
    return {
        "near the teacher the ratio is its limit": to_go < 100 * _NEAR,
        "the limit is above 1": smallest > 1.0,
        "near the teacher KL-to-go has the variance of the immediate log ratio": kl < 100 * _NEAR,
    }


def _example(rare: float) -> tuple[float, float]:
    """(Var(to-go) / Var(immediate), its closed form) of an action that the student takes with probability `rare` and the teacher
    with a half, after which the student is sure of what the teacher does with probability 2 rare; otherwise both agree.

    To-go sees that the action costs later what it gains now, r = K = log(1 / (2 rare)), and gives it no credit.
    """
    sure = 1e-13  # what the student's certainty leaves
    student = torch.tensor([[1 - rare, rare], [0.5, 0.5], [1 - sure, sure]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5], [2 * rare, 1 - 2 * rare]], dtype=torch.float64)
    problem = Problem(make_tree(2, 2), teacher.log(), torch.arange(3))
    first, whole = _variances(problem.policy(student.log()))
    gain, loss = log(0.5 / rare), log(0.5 / (1 - rare))

    def variance(of_rare: float, of_other: float) -> float:
        # with two actions the score of a is (1 - pi_a) (1, -1): one number, doubled
        second = rare * (1 - rare) ** 2 * of_rare**2 + (1 - rare) * rare**2 * of_other**2
        return 2 * (second - (rare * (1 - rare) * (of_rare - of_other)) ** 2)

    return whole / first, variance(gain + log(2 * rare), loss) / variance(gain, loss)
