"""Claims on means and variances of gradients: Theorems 1 and 2, the variance order, the horizon, the KL baseline."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opd.objectives import baselines
from opd.objectives.advantages import future_kl, immediate, kl_to_go, log_ratio_to_go
from opd.objectives.baselines import negative_kl, score_weighted
from opd.objectives.losses import exact_reverse_kl, reinforce
from opd_theory.claim import Claim
from opd_theory.estimators import (
    IMMEDIATE,
    UNBIASED,
    Estimator,
    GroupEstimate,
    exact_gradients,
    family,
    mean_and_variance,
    simulate_groups,
    trajectory_gradients,
)
from opd_theory.tree import Policy, Problem, Tree, make_tree, random_problem, random_table
from opd_theory.written_out import WrittenOut, best_baseline, gap, log_softmax, sampled_variance, written_out

_EXACT = 1e-10


def instance(tree: Tree, seed: int, *, sharpness: float = 0.5) -> Policy:
    """A random student on a random teacher, logits of standard deviation `sharpness`: 0.5 makes 0.18 nats a state."""
    generator = torch.Generator().manual_seed(seed)
    problem = random_problem(tree, generator, sharpness=sharpness)
    return problem.policy(random_table(problem, generator, sharpness=sharpness))


def _share_rows(policy: Policy, seed: int) -> Policy:
    """Another random student on the same problem, whose states share a third as many rows."""
    generator = torch.Generator().manual_seed(seed)
    tree, logq = policy.problem.tree, policy.problem.logq
    problem = Problem(tree, logq, torch.arange(tree.num_states) % (tree.num_states // 3 + 1))
    return problem.policy(random_table(problem, generator))


def _worst(found: dict[str, float], name: str, gap: float) -> None:
    found[name] = max(found.get(name, 0.0), gap)


THEOREM_1_TREES = (make_tree(4, 5), make_tree(3, 6), make_tree(4, 4, end=3), make_tree(3, 4, end=2, num_prompts=2))


def theorem_1(trees: Sequence[Tree] = THEOREM_1_TREES, *, random_baselines: int = 3) -> Claim:
    """(i)-(v), (iii) and (v) with random baselines too, and the exact term with KL-to-go: each response's advantages against the
    formula, means against complex steps of V, students with a row for each state and with shared rows."""
    worst: dict[str, float] = {}
    for seed, tree in enumerate(trees):
        policy = instance(tree, seed)
        for student in (policy, _share_rows(policy, seed)):
            _theorem_1_gaps(student, worst, random_baselines=random_baselines, seed=seed)
    largest = max(worst.values())
    parts = {name: gap < _EXACT for name, gap in worst.items()}
    return Claim(
        "1", "every estimator of Theorem 1 has mean grad V", "Theorem 1, equation (6); exact + KL-to-go",
        f"|mean - grad V| < {_EXACT}, with random state baselines too; advantages as the formulas say",
        f"at most {largest:.1e} over {2 * len(trees)} students and {len(UNBIASED)} estimators", all(parts.values()), worst, parts,
    )  # fmt: skip


def _theorem_1_gaps(policy: Policy, worst: dict[str, float], *, random_baselines: int, seed: int) -> None:
    """Add to `worst` how far each object of Theorem 1 is off on one student."""
    w = written_out(policy)
    gradient, mask = w.gradient(), policy.problem.tree.mask
    _worst(worst, "probabilities sum to one", abs(float(policy.chances.sum()) - 1.0))
    _worst(worst, "autograd finds the slope of V", gap(policy.gradient(), gradient))
    for name in UNBIASED:
        estimator = family()[name]
        advantages, found = estimator.advantages(policy), estimator.gradients(policy)
        _worst(worst, f"{name}: advantages", gap(advantages, w.advantages(name)))
        _worst(worst, f"{name}: each response", gap(found, w.estimator(name)))
        _worst(worst, f"{name}: mean", gap(mean_and_variance(policy, found)[0], gradient))
        _worst(worst, f"{name}: equation (6)", gap(_descended(policy, estimator), gradient))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(random_baselines):
        b = 3 * torch.randn(policy.problem.tree.num_states, generator=generator, dtype=torch.float64)
        at = torch.where(mask, b[policy.problem.tree.states], 0.0)
        for name, advantages in {
            "(iii)": log_ratio_to_go(policy.log_ratio, mask) - at,
            "(v)": kl_to_go(policy.log_ratio, policy.reverse_kl, mask) - at,
        }.items():
            mean, _ = mean_and_variance(policy, trajectory_gradients(policy, advantages))
            _worst(worst, f"{name} with random state baselines: mean", gap(mean, gradient))


def _descended(policy: Policy, estimator: Estimator) -> Tensor:
    """What descent on the expected loss of training follows, [rows * vocab]: `reinforce` and `exact_reverse_kl`."""
    tree, table = policy.problem.tree, policy.table.detach().clone().requires_grad_()
    moved = policy.problem.policy(table)
    weighted = policy.chances[:, None] * estimator.advantages(policy)
    loss = reinforce(moved.action_logprobs, weighted, tree.mask, divisor=1.0)
    if estimator.exact:
        eye = torch.eye(tree.vocab, dtype=torch.float64)
        states = table[policy.problem.rows]
        loss = loss + exact_reverse_kl(states, eye, policy.problem.logq, eye, policy.occupancy)[0]
    return -torch.autograd.grad(loss, table)[0]


def theorem_2(instances: int = 20, *, horizon: int = 4) -> Claim:
    """Lemma 1 and Theorem 2 for random f, and for the future log ratios and KLs, which make g2; grad V = g1 + g2; the immediate
    estimators have mean g1; how far g1 is from grad V. Against forward recursion and complex steps."""
    worst: dict[str, float] = {}
    biases = []
    for seed in range(instances):
        policy = instance(
            make_tree(4 if seed % 4 < 2 else 3, horizon, end=2 if seed % 2 else None, num_prompts=1 + seed % 2), seed
        )
        policy = _share_rows(policy, seed) if seed % 3 == 2 else policy
        w = written_out(policy)
        gradient, g1, g2 = w.gradient(), w.g1(), w.occupancy_slope(-w.kl)
        _worst(worst, "g1", gap(policy.g1(), g1))
        _worst(worst, "g2", gap(policy.g2(), g2))
        _worst(
            worst, "g1 + g2 = grad V", max(gap(g1 + g2, gradient), gap(policy.g1() + policy.g2(), policy.gradient()))
        )
        _future_gaps(policy, w, worst, seed=seed)
        for name in IMMEDIATE:
            estimator = family()[name]
            mean, _ = mean_and_variance(policy, estimator.gradients(policy))
            _worst(worst, f"{name}: mean g1", gap(mean, g1))
            _worst(worst, f"{name}: advantages", gap(estimator.advantages(policy), w.advantages(name)))
        for name in UNBIASED:
            mean, _ = mean_and_variance(policy, family()[name].gradients(policy))
            _worst(worst, f"{name}: mean g1 + g2", gap(mean, g1 + g2))
        biases.append(float(np.linalg.norm(g1 - gradient) / np.linalg.norm(gradient)))
    low, middle, high = np.quantile(biases, [0.05, 0.5, 0.95])
    parts = {name: found < _EXACT for name, found in worst.items()} | {"g1 is not grad V": min(biases) > 1e-3}
    return Claim(
        "2", "grad V = g1 + g2, and the immediate log ratio has mean g1", "Lemma 1, Theorem 2, section 1.3",
        f"|difference| < {_EXACT}, for random f too; the bias of g1 is reported",
        f"at most {max(worst.values()):.1e}; |g1 - grad V| / |grad V|: median {middle:.2f} (5-95 %: {low:.2f}-{high:.2f})",
        all(parts.values()), {"largest_gap": max(worst.values()), "relative_bias": biases}, parts,
    )  # fmt: skip


def _future_gaps(policy: Policy, w: WrittenOut, worst: dict[str, float], *, seed: int) -> None:
    """Lemma 1, and Theorem 2 by each function of training that sums what comes later."""
    tree = policy.problem.tree
    futures: dict[str, Callable[[Tensor], Tensor]] = {
        "future_kl": lambda f: future_kl(-f, tree.mask),
        "kl_to_go": lambda f: kl_to_go(f, -f, tree.mask) - immediate(f, tree.mask),
        "log_ratio_to_go": lambda f: log_ratio_to_go(f, tree.mask) - immediate(f, tree.mask),
    }
    generator = torch.Generator().manual_seed(seed)
    for f in torch.randn(2, tree.num_states, generator=generator, dtype=torch.float64):
        visited = torch.where(tree.mask, f[tree.states], 0.0)
        by_responses = float(policy.chances @ visited.sum(-1))
        by_states = float(w.occupancy(w.table) @ f.numpy())
        _worst(worst, "Lemma 1", max(abs(by_responses - by_states), abs(float(policy.occupancy @ f) - by_states)))
        for name, future in futures.items():
            _worst(worst, f"the sum over later states, {name}", gap(future(visited), w.later(f.numpy())))
            mean, _ = mean_and_variance(policy, trajectory_gradients(policy, future(visited)))
            _worst(worst, f"Theorem 2, random f, {name}", gap(mean, w.occupancy_slope(f.numpy())))
    g2 = w.occupancy_slope(-w.kl)
    log_ratio, kl, mask = policy.log_ratio, policy.reverse_kl, tree.mask
    for name, advantages in {
        "future_kl": future_kl(kl, mask),
        "kl_to_go": kl_to_go(log_ratio, kl, mask) - immediate(log_ratio, mask),
        "log_ratio_to_go": log_ratio_to_go(log_ratio, mask) - immediate(log_ratio, mask),
    }.items():
        mean, _ = mean_and_variance(policy, trajectory_gradients(policy, advantages))
        _worst(worst, f"the future part of {name} has mean g2", gap(mean, g2))


ORDER = (
    "exact",
    "exact + KL-to-go - V",
    "immediate",
    "KL-to-go (iv)",
    "log-ratio-to-go - V (iii)",
    "log-ratio-to-go (ii)",
    "full trajectory (i)",
)


def variance_order(
    instances: int = 100, *, tree: Tree | None = None, written: int = 2, groups: int = 8, batches: int = 2000
) -> Claim:
    """Variances relative to the immediate log ratio's on random instances, and with leave-one-out baselines of groups.

    Means are compared with grad V and g1 on every instance, variances with sums over responses on the first `written`.
    """
    ratios: dict[str, list[float]] = {name: [] for name in family()}
    worst: dict[str, float] = {}
    for seed in range(instances):
        policy = instance(tree or make_tree(4, 4 + seed % 2), seed)
        variances = _checked_variances(policy, worst, written=seed < written)
        for name, variance in variances.items():
            ratios[name].append(variance / variances["immediate"])
    medians = {name: float(np.median(found)) for name, found in ratios.items()}
    grouped: dict[str, list[float]] = {}
    for seed in range(groups):
        policy = instance(tree or make_tree(4, 4), seed)
        reference = mean_and_variance(policy, family()["immediate"].gradients(policy))[1]
        for size in (2, 4, 8, 16):
            generator = torch.Generator().manual_seed(seed)
            found = _simulated(policy, size=size, batches=batches, generator=generator)
            grouped.setdefault(str(size), []).append(found.variance / reference)
    parts = {
        "the order": all(medians[a] < medians[b] for a, b in pairwise(ORDER)),
        **{name: gap < _EXACT for name, gap in worst.items()},
        **_leave_one_out_parts(batches),
    }
    shown = ", ".join(f"{name} {medians[name]:.2f}" for name in ORDER)
    spans = "; ".join(f"{size}: {min(found):.2f}-{max(found):.2f}" for size, found in grouped.items())
    return Claim(
        "3", "order of the variances near the teacher", "docs/concepts/objectives.md; medians of random trees of horizon 4 and 5",
        "exact < exact + KL-to-go - V < immediate < (iv) < (iii) < (ii) < (i), means grad V or g1; not a theorem (3c)",
        f"immediate = 1: {shown}; exact + KL-to-go with a leave-one-out baseline of 2, 4, 8, 16 samples: {spans}",
        all(parts.values()), {"ratios": ratios, "medians": medians, "leave_one_out": grouped}, parts,
    )  # fmt: skip


def _checked_variances(policy: Policy, worst: dict[str, float], *, written: bool) -> dict[str, float]:
    """The variance of each estimator; adds to `worst` how far means and, if `written`, variances and true gradients are off."""
    gradient, g1 = policy.gradient().flatten(), policy.g1().flatten()
    w = written_out(policy) if written else None
    if w is not None:
        _worst(worst, "the true gradients", max(gap(gradient, w.gradient()), gap(g1, w.g1())))
    found = {}
    for name, estimator in family().items():
        mean, found[name] = mean_and_variance(policy, estimator.gradients(policy))
        _worst(worst, f"{name}: mean", gap(mean, g1 if name in IMMEDIATE else gradient))
        if w is not None:
            _worst(worst, f"{name}: variance", abs(found[name] - w.variance(w.estimator(name))))
    return found


def _simulated(policy: Policy, *, size: int, batches: int, generator: torch.Generator) -> GroupEstimate:
    return simulate_groups(
        policy, lambda p: future_kl(p.reverse_kl, p.problem.tree.mask), size=size, batches=batches, exact=True,
        generator=generator,
    )  # fmt: skip


def _leave_one_out_parts(batches: int) -> dict[str, bool]:
    """The exact term with KL-to-go minus the leave-one-out baseline, over every pair of responses of a small tree."""
    policy = instance(make_tree(3, 2, end=2), 5, sharpness=1.0)
    chances, wanted = written_out(policy).pair_estimates("exact + KL-to-go")
    count, mask = len(policy.problem.tree), policy.problem.tree.mask
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count)).flatten()
    future = future_kl(policy.reverse_kl, mask)[pairs]
    future = future - baselines.leave_one_out(future, mask[pairs], torch.arange(count * count).repeat_interleave(2))
    found = trajectory_gradients(policy, future, pairs) + exact_gradients(policy)[pairs]
    mean = chances @ wanted
    variance = 2 * float(chances @ ((wanted - mean) ** 2).sum(-1))
    simulated = _simulated(policy, size=2, batches=10 * batches, generator=torch.Generator().manual_seed(0))
    return {
        "leave-one-out: each pair": gap(found.reshape(count * count, 2, -1).mean(1), wanted) < _EXACT,
        "leave-one-out: mean grad V": gap(mean, policy.gradient()) < _EXACT,
        "leave-one-out: the simulated variance": abs(simulated.variance - variance) < 4 * simulated.error,
    }


def growth(horizons: tuple[int, ...] = (3, 4, 5, 6, 7, 8), *, seeds: int = 6) -> Claim:
    """Variance against the horizon when states depend on the step alone: slopes of log variance on log horizon, and every
    variance against its closed form."""
    names = ("full trajectory (i)", "log-ratio-to-go (ii)", "immediate", "exact")
    found: dict[str, list[float]] = {name: [] for name in names}
    worst: dict[str, float] = {}
    for horizon in horizons:
        sums = dict.fromkeys(names, 0.0)
        for seed in range(seeds):
            policy = _by_step(3, horizon, seed)
            expected = _by_step_variances(policy, horizon)
            for name in names:
                mean, variance = mean_and_variance(policy, family()[name].gradients(policy))
                sums[name] += variance / seeds
                _worst(worst, f"{name}: closed form", abs(variance - expected[name]))
                _worst(worst, f"{name}: mean", gap(mean, policy.gradient()))  # g2 is 0 where all states have one KL
        for name in names:
            found[name].append(sums[name])
    slopes = {n: float(np.polyfit(np.log(horizons), np.log(found[n]), 1)[0]) for n in names[:-1]}
    wanted = {"full trajectory (i)": 2.6, "log-ratio-to-go (ii)": 2.4, "immediate": 1.0}
    parts = {name: gap < _EXACT for name, gap in worst.items()} | {
        f"{name}: slope": abs(slopes[name] - slope) < 0.3 for name, slope in wanted.items()
    }
    shown = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    return Claim(
        "4", "growth of the variance with the horizon", "section 1.4; states that depend on the step alone",
        "slopes (i) 2.6, (ii) 2.4, immediate 1.0 (each within 0.3), exact 0; variances as their closed forms",
        f"slopes {shown}; exact: variance at most {max(found['exact']):.1e}; closed forms met to {max(worst.values()):.0e}",
        all(parts.values()), {"horizons": list(horizons), "variances": found, "slopes": slopes}, parts,
    )  # fmt: skip


def _by_step_variances(policy: Policy, horizon: int) -> dict[str, float]:
    """Closed forms where every step is drawn alike. With m other log ratios of mean mu and variance s^2 beside its own, a step has
    the second moment E[r^2 n] + 2 m mu E[r n] + (m s^2 + m^2 mu^2) E[n], and its mean is E[r psi] for every m."""
    logp = log_softmax(policy.table[0].numpy())
    p, r = np.exp(logp), policy.problem.logq[0].numpy() - logp
    n = 1.0 - 2.0 * p + (p**2).sum()
    mu = float(p @ r)
    spread = float(p @ (r - mu) ** 2)
    squared_mean = float(((p * (r - mu)) ** 2).sum())

    def step(others: int) -> float:
        rest = (others * spread + (others * mu) ** 2) * (p @ n)
        return float(p @ (r**2 * n) + 2 * others * mu * (p @ (r * n)) + rest) - squared_mean

    return {
        "full trajectory (i)": horizon * step(horizon - 1),
        "log-ratio-to-go (ii)": sum(step(later) for later in range(horizon)),
        "immediate": horizon * step(0),
        "exact": 0.0,
    }


def _by_step(vocab: int, horizon: int, seed: int) -> Policy:
    """A student and a teacher whose distributions are the same at every step, with parameters of its own for each."""
    tree = make_tree(vocab, horizon)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = 0.5 * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    problem = Problem(tree, torch.log_softmax(teacher, -1).expand(tree.num_states, -1), tree.steps)
    return problem.policy(student.expand(horizon, -1))


def kl_baseline(instances: int = 2000) -> Claim:
    """The variance of the sampled immediate term at one state with baseline b = -KL, against b = 0, computed directly; b* against
    the vertex of the variance, which is a parabola in b."""
    agree, helps = 0, 0
    worst: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for index in range(instances):
        vocab = 2 + index % 7
        logp, logq = torch.log_softmax(torch.randn(2, vocab, generator=generator, dtype=torch.float64), -1)
        p, r = logp.exp().numpy(), (logq - logp).numpy()
        kl, best = float(-(p @ r)), float(score_weighted(logp, logq))
        baseline = float(negative_kl(torch.tensor([[kl]], dtype=torch.float64), torch.tensor([[True]])))
        plain, centred = sampled_variance(p, r), sampled_variance(p, r - baseline)
        _worst(worst, "b*", abs(best - best_baseline(p, r)))
        _worst(worst, "the KL baseline is the mean of the log ratio", abs(baseline - float(p @ r)))
        _worst(worst, "identity 1", abs(_identity_1(p, r, baseline) - centred))
        # r = -D: the condition 0 < KL < 2 b* is on the costs, whose best baseline is -b*.
        predicted = 0.0 < kl < -2.0 * best
        agree += predicted == (centred < plain)
        helps += centred < plain
    share = helps / instances
    parts = {name: found < _EXACT for name, found in worst.items()} | {
        "the equivalence": agree == instances,
        "it neither always helps nor never": 0 < helps < instances,
    }
    return Claim(
        "5", "the KL baseline helps iff 0 < KL < 2 b* (b* of the costs -r)", "docs/concepts/objectives.md, identity 1",
        "an equivalence; identity 1 and b* to 1e-10; the share of cases that it helps is reported",
        f"{agree} of {instances} agree; identity to {worst['identity 1']:.1e}, b* to {worst['b*']:.1e}; "
        f"helps in {100 * share:.0f} %",
        all(parts.values()), {"agree": agree, "instances": instances, "helps": share}, parts,
    )  # fmt: skip


def _identity_1(p: np.ndarray, r: np.ndarray, baseline: float) -> float:
    """sum_a p_a (D_a - b)^2 n_a - ||p (D - KL)||^2."""
    n = 1.0 - 2.0 * p + (p**2).sum()
    mean = p * (r - p @ r)
    return float((p * (r - baseline) ** 2 * n).sum() - (mean**2).sum())


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
