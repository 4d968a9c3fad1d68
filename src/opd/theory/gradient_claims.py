"""Claims on means and variances of gradients: Theorems 1 and 2, the variance order, the horizon, the KL baseline."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opd.objectives.advantages import future_kl
from opd.objectives.baselines import score_weighted
from opd.theory.claim import Claim
from opd.theory.estimators import IMMEDIATE, UNBIASED, Estimator, family, mean_and_variance, simulate_groups
from opd.theory.tree import Policy, Problem, Tree, make_tree, random_problem, random_table

_EXACT = 1e-10


def instance(tree: Tree, seed: int, *, sharpness: float = 0.5) -> Policy:
    """A random student on a random teacher, logits of standard deviation `sharpness`: 0.5 makes 0.18 nats a state."""
    generator = torch.Generator().manual_seed(seed)
    problem = random_problem(tree, generator, sharpness=sharpness)
    return problem.policy(random_table(problem, generator, sharpness=sharpness))


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted.flatten()).abs().max())


def theorem_1() -> Claim:
    """Means of (i)-(v) and of the exact term with KL-to-go, over trees with and without an end token and several prompts."""
    trees = [make_tree(4, 5), make_tree(3, 6), make_tree(4, 4, end=3), make_tree(3, 4, end=2, num_prompts=2)]
    worst = dict.fromkeys(UNBIASED, 0.0)
    for seed, tree in enumerate(trees):
        policy = instance(tree, seed)
        gradient = policy.gradient()
        for name in UNBIASED:
            mean, _ = mean_and_variance(policy, family()[name].gradients(policy))
            worst[name] = max(worst[name], _gap(mean, gradient))
    largest = max(worst.values())
    return Claim(
        "1", "every estimator of Theorem 1 has mean grad V", "Theorem 1; exact + KL-to-go", f"|mean - grad V| < {_EXACT}",
        f"at most {largest:.1e} over {len(trees)} trees and {len(UNBIASED)} estimators", largest < _EXACT, worst,
    )  # fmt: skip


def theorem_2() -> Claim:
    """grad V = g1 + g2; the immediate estimators have mean g1; how far g1 is from grad V."""
    worst, biases = 0.0, []
    for seed in range(20):
        policy = instance(make_tree(4, 4, end=3 if seed % 2 else None), seed)
        gradient, g1, g2 = policy.gradient(), policy.g1(), policy.g2()
        worst = max(worst, float((g1 + g2 - gradient).abs().max()))
        for name in IMMEDIATE:
            worst = max(worst, _gap(mean_and_variance(policy, family()[name].gradients(policy))[0], g1))
        biases.append(float((g1 - gradient).norm() / gradient.norm()))
    low, middle, high = np.quantile(biases, [0.05, 0.5, 0.95])
    return Claim(
        "2", "grad V = g1 + g2, and the immediate log ratio has mean g1", "Lemma 1, Theorem 2, section 1.3",
        f"|difference| < {_EXACT}; the bias of g1 is reported",
        f"at most {worst:.1e}; |g1 - grad V| / |grad V|: median {middle:.2f} (5-95 %: {low:.2f}-{high:.2f})",
        worst < _EXACT, {"largest_gap": worst, "relative_bias": biases},
    )  # fmt: skip


ORDER = (
    "exact",
    "exact + KL-to-go - V",
    "immediate",
    "KL-to-go (iv)",
    "log-ratio-to-go - V (iii)",
    "log-ratio-to-go (ii)",
    "full trajectory (i)",
)


def variance_order(instances: int = 100) -> Claim:
    """Variances relative to the immediate log ratio's on random instances, and with leave-one-out baselines of groups."""
    ratios: dict[str, list[float]] = {name: [] for name in family()}
    for seed in range(instances):
        policy = instance(make_tree(4, 4 + seed % 2), seed)
        variances = {n: mean_and_variance(policy, e.gradients(policy))[1] for n, e in family().items()}
        for name, variance in variances.items():
            ratios[name].append(variance / variances["immediate"])
    medians = {name: float(np.median(found)) for name, found in ratios.items()}
    groups: dict[str, list[float]] = {}
    for seed in range(8):
        policy = instance(make_tree(4, 4), seed)
        reference = mean_and_variance(policy, family()["immediate"].gradients(policy))[1]
        for size in (2, 4, 8, 16):
            found = simulate_groups(
                policy, lambda p: future_kl(p.reverse_kl, p.problem.tree.mask), size=size, batches=2000, exact=True,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            groups.setdefault(str(size), []).append(found.variance / reference)
    ordered = all(
        medians[a] < medians[b] or (a == "immediate" and medians[a] <= medians[b]) for a, b in pairwise(ORDER)
    )
    shown = ", ".join(f"{name} {medians[name]:.2f}" for name in ORDER)
    grouped = "; ".join(f"{size}: {min(found):.2f}-{max(found):.2f}" for size, found in groups.items())
    return Claim(
        "3", "order of the variances", "docs/objectives.md; medians of random trees of horizon 4 and 5",
        "exact < exact + KL-to-go - V < immediate <= (iv) < (iii) < (ii) < (i)",
        f"immediate = 1: {shown}; exact + KL-to-go with a leave-one-out baseline of 2, 4, 8, 16 samples: {grouped}",
        ordered, {"ratios": ratios, "medians": medians, "leave_one_out": groups},
    )  # fmt: skip


def growth(horizons: tuple[int, ...] = (3, 4, 5, 6, 7, 8)) -> Claim:
    """Variance against the horizon when states depend on the step alone: slopes of log variance on log horizon."""
    names = ("full trajectory (i)", "log-ratio-to-go (ii)", "immediate", "exact")
    found: dict[str, list[float]] = {name: [] for name in names}
    for horizon in horizons:
        sums = dict.fromkeys(names, 0.0)
        for seed in range(6):
            policy = _by_step(3, horizon, seed)
            for name in names:
                sums[name] += mean_and_variance(policy, family()[name].gradients(policy))[1] / 6
        for name in names:
            found[name].append(sums[name])
    slopes = {n: float(np.polyfit(np.log(horizons), np.log(found[n]), 1)[0]) for n in names if min(found[n]) > 1e-12}
    largest_exact = max(found["exact"])
    wanted = {"full trajectory (i)": 2.6, "log-ratio-to-go (ii)": 2.4, "immediate": 1.0}
    holds = largest_exact < _EXACT and all(abs(slopes[name] - slope) < 0.3 for name, slope in wanted.items())
    shown = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    return Claim(
        "4", "growth of the variance with the horizon", "section 1.4; states that depend on the step alone",
        "slopes (i) 2.6, (ii) 2.4, immediate 1.0 (each within 0.3), exact 0",
        f"slopes {shown}; exact: variance at most {largest_exact:.1e}", holds,
        {"horizons": list(horizons), "variances": found, "slopes": slopes},
    )  # fmt: skip


def _by_step(vocab: int, horizon: int, seed: int) -> Policy:
    """A student and a teacher whose distributions are the same at every step, with parameters of its own for each."""
    tree = make_tree(vocab, horizon)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = 0.5 * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    problem = Problem(tree, torch.log_softmax(teacher, -1).expand(tree.num_states, -1), tree.steps)
    return problem.policy(student.expand(horizon, -1))


def kl_baseline(instances: int = 2000) -> Claim:
    """The variance of the sampled immediate term at one state with baseline b = -KL, against b = 0, computed directly."""
    agree, helps, identity = 0, 0, 0.0
    generator = torch.Generator().manual_seed(0)
    for index in range(instances):
        vocab = 2 + index % 7
        logp, logq = torch.log_softmax(torch.randn(2, vocab, generator=generator, dtype=torch.float64), -1)
        p, r = logp.exp(), logq - logp
        kl = float(-(p @ r))
        best = float(score_weighted(logp, logq))
        plain, centred = _sampled_variance(p, r, 0.0), _sampled_variance(p, r, -kl)
        identity = max(identity, abs(_identity_1(p, r, -kl) - centred))
        # r = -D: the condition 0 < KL < 2 b* is on the costs, whose best baseline is -b*.
        predicted = 0.0 < kl < -2.0 * best
        agree += predicted == (centred < plain)
        helps += centred < plain
    share = helps / instances
    return Claim(
        "5", "the KL baseline helps iff 0 < KL < 2 b* (b* of the costs -r)", "docs/objectives.md, identity 1",
        "an equivalence; identity 1 to 1e-10; the share of cases that it helps is reported",
        f"{agree} of {instances} agree; identity to {identity:.1e}; helps in {100 * share:.0f} %",
        agree == instances and identity < _EXACT, {"agree": agree, "instances": instances, "helps": share},
    )  # fmt: skip


def _sampled_variance(p: Tensor, r: Tensor, baseline: float) -> float:
    """Var over a ~ p of (r_a - b) grad log p_a in logit space, by enumeration."""
    scores = torch.eye(len(p), dtype=p.dtype) - p
    found = (r - baseline)[:, None] * scores
    mean = p @ found
    return float(p @ found.square().sum(-1) - mean.square().sum())


def _identity_1(p: Tensor, r: Tensor, baseline: float) -> float:
    """sum_a p_a (D_a - b)^2 n_a - ||p (D - KL)||^2."""
    n = 1.0 - 2.0 * p + p.square().sum()
    mean = p * (r - p @ r)
    return float((p * (r - baseline).square() * n).sum() - mean.square().sum())


def discount_frontier(
    discounts: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0),
) -> dict[str, list[float]]:
    """Bias and variance over the discount, relative to |grad V|^2, medians of random trees: for the pictures."""
    kinds: dict[str, Callable[[float], Estimator]] = {
        "log-ratio-to-go": lambda g: family(g)["log-ratio-to-go (ii)"],
        "KL-to-go": lambda g: family(g)["KL-to-go (iv)"],
        "exact + KL-to-go": lambda g: family(g)["exact + KL-to-go"],
    }
    found: dict[str, list[float]] = {"discount": list(discounts)}
    policies = [instance(make_tree(3, 6), seed) for seed in range(10)]
    for name, make in kinds.items():
        for discount in discounts:
            biases, variances = [], []
            for policy in policies:
                gradient = policy.gradient().flatten()
                mean, variance = mean_and_variance(policy, make(discount).gradients(policy))
                biases.append(float((mean - gradient).square().sum() / gradient.square().sum()))
                variances.append(variance / float(gradient.square().sum()))
            found.setdefault(f"{name}: squared bias", []).append(float(np.median(biases)))
            found.setdefault(f"{name}: variance", []).append(float(np.median(variances)))
    return found
