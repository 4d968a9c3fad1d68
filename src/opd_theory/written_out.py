"""The formulas of the theory in numpy, without a function of training. Claims compare with them.

Values go from the ends of responses backwards and occupancies from the prompts forwards; derivatives are complex steps,
f'(x) = Im f(x + ih) / h, exact to rounding; advantages, baselines and estimates are loops over responses and their actions.
Of a `Policy` its table of logits is read, and of a `Problem` the target, the rows and the states that follow each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from torch import Tensor

from opd_theory.tree import Policy, Problem

_STEP = 1e-30  # of a complex step, which has no difference to cancel

Path: TypeAlias = Sequence[tuple[int, int]]  # the (state, action) pairs of a response


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of real or complex logits [..., vocab]."""
    logits = logits - np.real(logits).max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reverse_kl(logits: np.ndarray, logq: np.ndarray) -> np.ndarray:
    """sum_a p_a (log p_a - log q_a) [...]; log q may be unnormalised."""
    logp = log_softmax(logits)
    return (np.exp(logp) * (logp - logq)).sum(-1)


def slope(function: Callable[[np.ndarray], np.ndarray], point: np.ndarray) -> np.ndarray:
    """The gradient of a function at a real point, flat; it is called once with all its complex neighbours
    [point.size, *point.shape]."""
    moved = point + 1j * _STEP * np.eye(point.size).reshape(point.size, *point.shape)
    return np.imag(function(moved)) / _STEP


def best_baseline(p: np.ndarray, values: np.ndarray) -> float:
    """The b that minimises Var over a ~ p of (values_a - b) grad log p_a: the vertex of a parabola through three of its points."""
    low, middle, high = (sampled_variance(p, values - b) for b in (-1.0, 0.0, 1.0))
    bend = low + high - 2 * middle
    return float((low - high) / (2 * bend)) if bend > 0 else 0.0


def sampled_variance(p: np.ndarray, values: np.ndarray) -> float:
    """The total variance over a ~ p of values_a (e_a - p), the score in logit space."""
    each = values[:, None] * (np.eye(len(p)) - p)
    mean = p @ each
    return float(p @ ((each - mean) ** 2).sum(-1))


def leave_one_out(values: Sequence[Sequence[float]], *, per: str = "step") -> list[list[float]]:
    """The baseline of each action of the responses of one group, from the other responses alone.

    per "step": the mean of the others' values at that step, 0 where no other has one. per "prompt": of all their values.
    """
    found = []
    for i, own in enumerate(values):
        others = [v for j, v in enumerate(values) if j != i]
        row = []
        for t in range(len(own)):
            seen = [v[t] for v in others if len(v) > t] if per == "step" else [x for v in others for x in v]
            row.append(sum(seen) / len(seen) if seen else 0.0)
        found.append(row)
    return found


@dataclass(frozen=True)
class WrittenOut:
    """A student's table [rows, vocab] on a problem: logq [states, vocab], rows [states], and `children` [states, vocab], the state
    after each action, or the number of states where the response ends; `levels`, the states by the number of actions before;
    `paths`, every response."""

    table: np.ndarray
    logq: np.ndarray
    rows: np.ndarray
    children: np.ndarray
    levels: Sequence[np.ndarray]
    paths: Sequence[Path]

    @cached_property
    def p(self) -> np.ndarray:
        """pi(a|s) [states, vocab]."""
        return np.exp(log_softmax(self.table))[self.rows]

    @cached_property
    def ratio(self) -> np.ndarray:
        """log q - log pi [states, vocab]."""
        return self.logq - log_softmax(self.table)[self.rows]

    @cached_property
    def kl(self) -> np.ndarray:
        """KL(pi(.|s), q(.|s)) [states]."""
        return -(self.p * self.ratio).sum(-1)

    @cached_property
    def pulls(self) -> np.ndarray:
        """The slope of each state's KL in the logits of its own row [states, vocab]."""
        logits = self.table[self.rows]
        return np.stack([slope(lambda z, q=q: reverse_kl(z, q), x) for x, q in zip(logits, self.logq, strict=True)])

    @cached_property
    def state_values(self) -> np.ndarray:
        """V(s) [states]."""
        return self._backwards(self.table)[: len(self.logq)]

    @cached_property
    def best_baselines(self) -> np.ndarray:
        """b* of each state's log ratios [states]."""
        return np.array([best_baseline(p, r) for p, r in zip(self.p, self.ratio, strict=True)])

    @cached_property
    def chances(self) -> np.ndarray:
        """The probability of each path."""
        prompts = len(self.levels[0])
        return np.array([np.prod([self.p[step] for step in path]) / prompts for path in self.paths])

    def value(self, table: np.ndarray) -> np.ndarray:
        """V of tables [..., rows, vocab], [...]."""
        return self._backwards(table)[..., self.levels[0]].mean(-1)

    def occupancy(self, table: np.ndarray) -> np.ndarray:
        """The expected visits of each state [..., states] under tables [..., rows, vocab]."""
        p = np.exp(log_softmax(table))[..., self.rows, :]
        found = np.zeros((*p.shape[:-2], len(self.logq) + 1), dtype=p.dtype)
        found[..., self.levels[0]] = 1.0 / len(self.levels[0])
        for here in self.levels:
            for action in range(p.shape[-1]):
                found[..., self.children[here, action]] += found[..., here] * p[..., here, action]
            found[..., -1] = 0.0  # where responses end is no state
        return found[..., :-1]

    def gradient(self) -> np.ndarray:
        """grad V, [rows * vocab] like every gradient here."""
        return slope(self.value, self.table)

    def g1(self) -> np.ndarray:
        """The slope of -sum_s d(s) KL_s with d held fixed."""
        visits = self.occupancy(self.table)
        return slope(lambda z: -(visits * reverse_kl(z[..., self.rows, :], self.logq)).sum(-1), self.table)

    def occupancy_slope(self, f: np.ndarray) -> np.ndarray:
        """The slope of E_{s ~ d}[f(s)] for f [states]; of -KL it is g2."""
        return slope(lambda z: (self.occupancy(z) * f).sum(-1), self.table)

    def advantages(self, name: str, discount: float = 1.0) -> np.ndarray:
        """Of every action of every path [paths, steps], 0 behind the end."""
        found = np.zeros((len(self.paths), max(map(len, self.paths))))
        for number, path in enumerate(self.paths):
            for t in range(len(path)):
                found[number, t] = FORMULAS[name](self, path, t, discount)
        return found

    def later(self, f: np.ndarray) -> np.ndarray:
        """sum_{t' > t} f(s_t') for f [states], of every action of every path [paths, steps], 0 behind the end."""
        found = np.zeros((len(self.paths), max(map(len, self.paths))))
        for number, path in enumerate(self.paths):
            for t in range(len(path)):
                found[number, t] = sum(f[state] for state, _ in path[t + 1 :])
        return found

    def estimate(self, path: Path, advantages: Sequence[float] | np.ndarray, *, exact: bool = False) -> np.ndarray:
        """sum_t A_t grad log pi(a_t|s_t) of one path, less sum_t grad KL_t if `exact`, [rows * vocab]."""
        found = np.zeros_like(self.table)
        for t, (state, action) in enumerate(path):
            found[self.rows[state]] -= advantages[t] * self.p[state]
            found[self.rows[state], action] += advantages[t]
            if exact:
                found[self.rows[state]] -= self.pulls[state]
        return found.ravel()

    def estimates(self, advantages: np.ndarray, *, exact: bool) -> np.ndarray:
        """Of every path [paths, rows * vocab]."""
        return np.stack([self.estimate(y, a, exact=exact) for y, a in zip(self.paths, advantages, strict=True)])

    def estimator(self, name: str, discount: float = 1.0) -> np.ndarray:
        """The estimates of the estimator of that name in `opd_theory.estimators.family`, [paths, rows * vocab]."""
        return self.estimates(self.advantages(name, discount), exact=name.startswith("exact"))

    def variance(self, estimates: np.ndarray) -> float:
        """The total variance of one response's estimate."""
        centred = estimates - self.chances @ estimates
        return float(self.chances @ (centred**2).sum(-1))

    def pair_estimates(self, name: str, discount: float = 1.0, *, per: str = "step") -> tuple[np.ndarray, np.ndarray]:
        """(probability, mean estimate) of every pair of responses to one prompt, each with the other as leave-one-out baseline."""
        plain, exact = self.advantages(name, discount), name.startswith("exact")
        chances, found = [], []
        for i, one in enumerate(self.paths):
            for j, two in enumerate(self.paths):
                if one[0][0] != two[0][0]:  # the state of the prompt
                    continue
                values = [plain[i, : len(one)].tolist(), plain[j, : len(two)].tolist()]
                each = [
                    self.estimate(path, np.subtract(own, baseline), exact=exact)
                    for path, own, baseline in zip((one, two), values, leave_one_out(values, per=per), strict=True)
                ]
                chances.append(self.chances[i] * self.chances[j] * len(self.levels[0]))
                found.append(sum(each) / 2)
        return np.array(chances), np.stack(found)

    def _backwards(self, table: np.ndarray) -> np.ndarray:
        """The expected sum of log ratios from each state on [..., states + 1], the last of which is the end."""
        logp = log_softmax(table)[..., self.rows, :]
        p, ratio = np.exp(logp), self.logq - logp
        found = np.zeros((*p.shape[:-2], len(self.logq) + 1), dtype=p.dtype)
        for here in reversed(self.levels):
            found[..., here] = (p[..., here, :] * (ratio[..., here, :] + found[..., self.children[here]])).sum(-1)
        return found


def _later_ratios(w: WrittenOut, path: Path, t: int, discount: float) -> float:
    return sum(discount**k * w.ratio[step] for k, step in enumerate(path[t + 1 :], start=1))


def _later_kls(w: WrittenOut, path: Path, t: int, discount: float) -> float:
    return -sum(discount**k * w.kl[state] for k, (state, _) in enumerate(path[t + 1 :], start=1))


FORMULAS: Mapping[str, Callable[[WrittenOut, Path, int, float], float]] = {
    "full trajectory (i)": lambda w, y, t, g: sum(w.ratio[step] for step in y),
    "log-ratio-to-go (ii)": lambda w, y, t, g: w.ratio[y[t]] + _later_ratios(w, y, t, g),
    "log-ratio-to-go - V (iii)": lambda w, y, t, g: w.ratio[y[t]] + _later_ratios(w, y, t, g) - w.state_values[y[t][0]],
    "KL-to-go (iv)": lambda w, y, t, g: w.ratio[y[t]] + _later_kls(w, y, t, g),
    "KL-to-go - V (v)": lambda w, y, t, g: w.ratio[y[t]] + _later_kls(w, y, t, g) - w.state_values[y[t][0]],
    "immediate": lambda w, y, t, g: w.ratio[y[t]],
    "immediate + KL": lambda w, y, t, g: w.ratio[y[t]] + w.kl[y[t][0]],
    "immediate - b*": lambda w, y, t, g: w.ratio[y[t]] - w.best_baselines[y[t][0]],
    "exact": lambda w, y, t, g: 0.0,
    "exact + KL-to-go": _later_kls,
    "exact + KL-to-go - V": lambda w, y, t, g: (
        _later_kls(w, y, t, g) - (w.state_values[y[t][0]] + w.kl[y[t][0]])  # V(s) less the immediate part's mean
    ),
}


def written_out(policy: Policy) -> WrittenOut:
    """A policy on a tree, each of whose states is reached in one way."""
    return of_table(policy.problem, policy.table)


def of_table(problem: Problem, table: Tensor) -> WrittenOut:
    tree = problem.tree
    children = np.full((tree.num_states, tree.vocab), tree.num_states)
    steps = np.zeros(tree.num_states, dtype=int)
    paths = []
    for states, actions, mask in zip(tree.states.tolist(), tree.actions.tolist(), tree.mask.tolist(), strict=True):
        path = [(s, a) for s, a, acted in zip(states, actions, mask, strict=True) if acted]
        for t, ((state, action), (after, _)) in enumerate(pairwise(path), start=1):
            children[state, action], steps[after] = after, t
        paths.append(path)
    levels = [np.flatnonzero(steps == t) for t in range(int(steps.max()) + 1)]
    return WrittenOut(
        table.detach().double().numpy(), problem.logq.numpy(), problem.rows.numpy(), children, levels, paths
    )


def gap(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """The largest difference of two arrays of the same number of elements; inf where one is no number."""
    one, two = (np.asarray(x.detach() if isinstance(x, Tensor) else x).ravel() for x in (found, wanted))
    assert one.shape == two.shape, f"{one.shape} beside {two.shape}"
    worst = np.abs(one - two).max(initial=0.0)
    return float(worst) if np.isfinite(worst) else float("inf")
