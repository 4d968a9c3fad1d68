"""How the estimators' variances grow with the horizon, where states repeat: a Markov chain with shared rows, simulated.

The state is the last token, so that responses of any length have few parameters; variances come from many batches of
`size` samples of one prompt, as in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.objectives import baselines
from opd.objectives.advantages import future_kl, immediate
from opd_theory.claim import Claim
from opd_theory.tree import Problem, make_tree
from opd_theory.written_out import WrittenOut, gap, of_table


@dataclass(frozen=True)
class Chain:
    """Student and teacher log-probabilities [states, vocab] with states = vocab: the last token."""

    logp: Tensor
    logq: Tensor

    @property
    def kl(self) -> Tensor:
        return (self.logp.exp() * (self.logp - self.logq)).sum(-1)

    def future(self, horizon: int, discount: float) -> Tensor:
        """The expected discounted sum of later KLs, negated, before each step [horizon, states]."""
        values, later = [], torch.zeros_like(self.kl)
        for _ in range(horizon):
            values.append(later)
            later = discount * self.logp.exp() @ (later - self.kl) if len(values) < horizon else later
        return torch.stack(values[::-1])


def make_chain(vocab: int, sharpness: float, *, seed: int) -> Chain:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocab, vocab, generator=generator, dtype=torch.float64)
    shared = 1.5 * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64)
    student, teacher = torch.log_softmax(shared + sharpness * logits, -1)
    return Chain(student, teacher)


def variances(
    chain: Chain, horizon: int, *, discounts: tuple[float, ...], size: int = 4, batches: int = 2000, seed: int = 0
) -> dict[str, float]:
    """The variance of a batch's mean gradient, by estimator; exact + KL-to-go by discount and baseline."""
    generator = torch.Generator().manual_seed(seed)
    states, actions = walk(chain, horizon, batches * size, generator)
    groups = torch.arange(batches).repeat_interleave(size)
    return {n: _variance(x, size)[0] for n, x in estimates(chain, states, actions, groups, discounts)}


def estimates(
    chain: Chain, states: Tensor, actions: Tensor, groups: Tensor, discounts: tuple[float, ...]
) -> Iterator[tuple[str, Tensor]]:
    """(name, the estimate of every response [responses, states * vocab]) of responses with states and actions [responses, horizon];
    `groups` [responses] are the samples of one prompt."""
    mask = torch.ones(states.shape, dtype=torch.bool)
    kl = chain.kl[states]
    exact = _rows(chain, states, -_pull(chain)[states])
    yield "immediate", _scores(chain, states, actions, immediate(_ratio(chain, states, actions), mask))
    yield "exact", exact
    horizon = states.shape[1]
    for discount in discounts:
        future = future_kl(kl, mask, discount)
        truth = chain.future(horizon, discount)[torch.arange(horizon).expand_as(states), states]
        for name, baseline in {
            "none": torch.zeros_like(future),
            "leave one out, per step": baselines.leave_one_out(future, mask, groups),
            "leave one out, per prompt": baselines.leave_one_out(future, mask, groups, per="prompt"),
            "true value": truth,
        }.items():
            total = exact + _scores(chain, states, actions, future - baseline)
            yield f"exact + KL-to-go, discount {discount:g}, {name}", total


def walk(chain: Chain, horizon: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    here = torch.zeros(count, dtype=torch.long)
    states, actions = [], []
    p = chain.logp.exp()
    for _ in range(horizon):
        states.append(here)
        here = torch.multinomial(p[here], 1, generator=generator)[:, 0]
        actions.append(here)
    return torch.stack(states, -1), torch.stack(actions, -1)


def _ratio(chain: Chain, states: Tensor, actions: Tensor) -> Tensor:
    return (chain.logq - chain.logp)[states, actions]


def _pull(chain: Chain) -> Tensor:
    """grad KL of each state in its logits [states, vocab]."""
    gap = chain.logp - chain.logq
    return chain.logp.exp() * (gap - chain.kl[:, None])


def _scores(chain: Chain, states: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """sum_t A_t grad log pi(a_t|s_t) of each response, [responses, states * vocab]."""
    p = chain.logp.exp()
    score = (-p[states]).scatter_add(-1, actions[..., None], torch.ones(*actions.shape, 1, dtype=p.dtype))
    return _rows(chain, states, advantages[..., None] * score)


def _rows(chain: Chain, states: Tensor, values: Tensor) -> Tensor:
    found = torch.zeros(len(states), *chain.logp.shape, dtype=values.dtype)
    return found.scatter_add_(1, states[..., None].expand_as(values), values).flatten(1)


def _variance(gradients: Tensor, size: int) -> tuple[float, float]:
    """The total variance of the mean over `size` consecutive responses, and its standard error."""
    means = gradients.reshape(-1, size, gradients.shape[-1]).mean(1)
    centred = (means - means.mean(0)).square().sum(-1)
    return float(centred.sum() / (len(means) - 1)), float(centred.std() / len(means) ** 0.5)


def crossover(
    horizons: tuple[int, ...] = (4, 8, 16, 32, 64, 128),
    discounts: tuple[float, ...] = (0.9, 0.97, 1.0),
    *,
    vocab: int = 5,
    sharpness: float = 0.5,
    seeds: int = 3,
    responses: int = 80_000,
) -> dict[str, list[float]]:
    """Variances relative to the sampled immediate log ratio's by horizon, means over random chains."""
    found: dict[str, list[float]] = {"horizon": [float(h) for h in horizons]}
    for horizon in horizons:
        sums: dict[str, float] = {}
        for seed in range(seeds):
            chain = make_chain(vocab, sharpness, seed=seed)
            batches = max(200, responses // (4 * horizon))
            for name, variance in variances(chain, horizon, discounts=discounts, batches=batches, seed=seed).items():
                sums[name] = sums.get(name, 0.0) + variance
        for name, total in sums.items():
            found.setdefault(name, []).append(total / sums["immediate"])
    return found


def crossover_claim(
    horizons: tuple[int, ...] = (4, 8, 16, 32, 64, 128), *, seeds: int = 3, responses: int = 80_000
) -> Claim:
    """Where the unbiased estimator with a leave-one-out baseline overtakes the biased immediate one's variance; every estimate of a
    short chain is compared with a sum over its responses."""
    by_kl: dict[str, dict[str, list[float]]] = {}
    shown, crossings, discounted = [], {}, []
    for sharpness in (0.15, 0.5):
        kl = float(torch.stack([make_chain(5, sharpness, seed=s).kl.mean() for s in range(seeds)]).mean())
        found = crossover(horizons, sharpness=sharpness, seeds=seeds, responses=responses)
        by_kl[f"{kl:.3f}"] = found
        per_step = {d: found[f"exact + KL-to-go, discount {d}, leave one out, per step"] for d in ("1", "0.97", "0.9")}
        crossing = next((h for h, r in zip(found["horizon"], per_step["1"], strict=True) if r > 1), None)
        crossings[sharpness] = crossing
        discounted += [*per_step["0.9"], *per_step["0.97"]]
        shown.append(
            f"{kl:.3f} nats a token: crosses at T {'> 128' if crossing is None else f'<= {crossing:.0f}'}; at T = {horizons[-1]} "
            + ", ".join(f"{ratios[-1]:.2f} with discount {d}" for d, ratios in per_step.items())
        )
    far = by_kl[list(by_kl)[-1]]
    parts = {
        "at discount 1 the larger KL crosses": crossings[0.5] is not None,
        "at discount 1 the smaller KL does not": crossings[0.15] is None,
        "at 0.9 and 0.97 there is no crossing": max(discounted) < 1,
        "a number a prompt is no baseline": far["exact + KL-to-go, discount 1, leave one out, per prompt"][-1]
        > 10 * far["exact + KL-to-go, discount 1, leave one out, per step"][-1],
        **_written_out_parts(),
    }
    return Claim(
        "3b", "exact + KL-to-go against the immediate log ratio as the horizon grows", "Markov chains, 4 samples a prompt",
        "at discount 1 a crossover by T = 128 for the larger KL; none at 0.97 and 0.9 (variances relative to immediate)",
        "; ".join(shown), all(parts.values()), by_kl, parts,
    )  # fmt: skip


def _written_out_parts(*, vocab: int = 3, horizon: int = 3, batches: int = 8_000) -> dict[str, bool]:
    """A short chain as a tree whose states share a row where their last tokens are one: all pairs of its responses."""
    chain = make_chain(vocab, 0.5, seed=0)
    tree = make_tree(vocab, horizon)
    rows = torch.zeros(tree.num_states, dtype=torch.long)
    rows[tree.states[:, 1:]] = tree.actions[:, :-1]
    w = of_table(Problem(tree, chain.logq[rows], rows), chain.logp)
    pairs = torch.cartesian_prod(torch.arange(len(tree)), torch.arange(len(tree))).flatten()
    groups = torch.arange(len(tree) ** 2).repeat_interleave(2)
    discounts = (0.9, 1.0)
    walked, taken = walk(chain, horizon, 2 * batches, torch.Generator().manual_seed(0))
    simulated = dict(estimates(chain, walked, taken, torch.arange(batches).repeat_interleave(2), discounts))
    parts = {}
    for name, found in estimates(chain, rows[tree.states][pairs], tree.actions[pairs], groups, discounts):
        chances, wanted = _pairs(w, name)
        mean = chances @ wanted
        variance = float(chances @ ((wanted - mean) ** 2).sum(-1))
        spread, error = _variance(simulated[name], 2)
        true = w.g1() if name in ("immediate", "exact") else w.gradient()
        parts[f"{name}: each pair"] = gap(found.reshape(len(wanted), 2, -1).mean(1), wanted) < 1e-10
        parts[f"{name}: simulated"] = abs(spread - variance) < 4 * error
        if "0.9" not in name:
            parts[f"{name}: mean"] = gap(mean, true) < 1e-10
    return parts


def _pairs(w: WrittenOut, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(probability, mean estimate) of every pair of responses, by formulas written out."""
    kind, *rest = name.split(", ")
    discount = float(rest[0].removeprefix("discount ")) if rest else 1.0
    if "leave one out" in rest:
        return w.pair_estimates(kind, discount, per=rest[-1].removeprefix("per "))
    advantages = w.advantages(kind, discount)
    if "true value" in rest:
        # the mean of the discounted future over all responses that reach the same step with the same last token
        for t in range(advantages.shape[1]):
            row = np.array([w.rows[path[t][0]] for path in w.paths])
            for here in np.unique(row):
                reached = row == here
                advantages[reached, t] -= np.average(advantages[reached, t], weights=w.chances[reached])
    each = w.estimates(advantages, exact=kind.startswith("exact"))
    count = len(w.paths)
    return np.outer(w.chances, w.chances).ravel(), ((each[:, None] + each[None]) / 2).reshape(count * count, -1)
