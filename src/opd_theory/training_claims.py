"""Claims on training: which estimator converges fastest, where each comes to rest, and what stale rollouts cost."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opd.objectives import baselines
from opd.objectives.advantages import future_kl, immediate, log_ratio_to_go
from opd.objectives.corrections import importance_weights
from opd_theory.claim import Claim
from opd_theory.estimators import trajectory_gradients
from opd_theory.tree import Problem, Tree, make_tree, random_problem, random_table
from opd_theory.written_out import FORMULAS, Path, WrittenOut, gap, leave_one_out, of_table

_EXACT = 1e-10
RATES = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Walks:
    """Sampled responses of many students at once: states, actions [runs, samples, horizon]."""

    states: Tensor
    actions: Tensor


@dataclass(frozen=True)
class Students:
    """Many tables of logits on one problem, trained side by side: tables [runs, rows, vocab]."""

    problem: Problem
    tables: Tensor

    @property
    def logp(self) -> Tensor:
        """[runs, states, vocab]"""
        return torch.log_softmax(self.tables, -1)[:, self.problem.rows]

    def sample(self, samples: int, generator: torch.Generator) -> Walks:
        children = _children(self.problem.tree)
        runs = torch.arange(len(self.tables)).repeat_interleave(samples)
        here = torch.zeros(len(runs), dtype=torch.long)
        states, actions = [], []
        p = self.logp.exp()
        for _ in range(self.problem.tree.horizon):
            action = torch.multinomial(p[runs, here], 1, generator=generator)[:, 0]
            states.append(here)
            actions.append(action)
            here = children[here, action]
        shape = (len(self.tables), samples, -1)
        return Walks(torch.stack(states, -1).reshape(shape), torch.stack(actions, -1).reshape(shape))

    def at(self, walks: Walks) -> tuple[Tensor, Tensor]:
        """(log ratio, reverse KL) of every action [runs * samples, horizon] under these students."""
        logp, logq = self.logp, self.problem.logq
        runs = torch.arange(len(logp))[:, None, None]
        kl = (logp.exp() * (logp - logq)).sum(-1)
        ratio = logq[walks.states, walks.actions] - logp[runs, walks.states, walks.actions]
        return ratio.flatten(0, 1), kl[runs, walks.states].flatten(0, 1)

    def action_logprobs(self, walks: Walks) -> Tensor:
        return self.logp[torch.arange(len(self.tables))[:, None, None], walks.states, walks.actions].flatten(0, 1)

    def ascend(self, walks: Walks, advantages: Tensor, rates: Tensor, *, exact: bool) -> "Students":
        """One step of each run: the mean over its samples of sum_t A_t grad log pi, with the exact term if asked for."""
        logp = self.logp
        runs = torch.arange(len(logp))[:, None, None]
        here = logp[runs, walks.states]  # [runs, samples, horizon, vocab]
        p = here.exp()
        score = (-p).scatter_add(-1, walks.actions[..., None], torch.ones_like(p[..., :1]))
        values = advantages.reshape(walks.states.shape)[..., None] * score
        if exact:
            gap = here - self.problem.logq[walks.states]
            values = values - p * (gap - (p * gap).sum(-1, keepdim=True))
        rows = self.problem.rows[walks.states].flatten(1)
        found = torch.zeros_like(self.tables)
        found.scatter_add_(1, rows[..., None].expand(-1, -1, found.shape[-1]), values.flatten(1, 2))
        return replace(self, tables=self.tables + rates[:, None, None] * found / walks.states.shape[1])

    def sequence_kl(self) -> Tensor:
        """KL(pi(.|x), q(.|x)) of each run [runs], exactly."""
        return torch.stack([-self.problem.policy(table).value for table in self.tables])


def _children(tree: Tree) -> Tensor:
    """The state that follows each state and action [states, vocab]; 0 behind the last step (never read)."""
    found = torch.zeros(tree.num_states, tree.vocab, dtype=torch.long)
    for t in range(tree.horizon - 1):
        found[tree.states[:, t], tree.actions[:, t]] = tree.states[:, t + 1]
    return found


OBJECTIVES = ("immediate", "log-ratio-to-go", "exact", "exact + KL-to-go, leave one out")


def signal(name: str, students: Students, walks: Walks) -> tuple[Tensor, bool]:
    """(advantages [runs * samples, horizon], whether the exact immediate term is added) of one objective."""
    ratio, kl = students.at(walks)
    mask = torch.ones(ratio.shape, dtype=torch.bool)
    if name == "immediate":
        return immediate(ratio, mask), False
    if name == "log-ratio-to-go":
        return log_ratio_to_go(ratio, mask), False
    if name == "exact":
        return torch.zeros_like(ratio), True
    groups = torch.arange(len(students.tables)).repeat_interleave(walks.states.shape[1])
    future = future_kl(kl, mask)
    return future - baselines.leave_one_out(future, mask, groups), True


def convergence(*, horizon: int = 6, steps: int = 300, samples: int = 4, seeds: int = 8) -> Claim:
    """SGD on a tree from a random start, the same numbers of samples, the best of one grid of rates for each. The first, the middle
    and the last step are compared with loops over their samples."""
    generator = torch.Generator().manual_seed(0)
    problem = random_problem(make_tree(3, horizon), generator, sharpness=1.0)
    start = random_table(problem, generator, sharpness=1.0)
    rates = torch.tensor(RATES, dtype=torch.float64).repeat_interleave(seeds)
    curves: dict[str, list[float]] = {}
    final: dict[str, float] = {}
    best: dict[str, float] = {}
    worst: dict[str, float] = {}
    for name in OBJECTIVES:
        students = Students(problem, start.repeat(len(rates), 1, 1))
        kls = []
        for step in range(steps):
            if step % 20 == 0:
                kls.append(students.sequence_kl())
            walks = students.sample(samples, generator)
            advantages, exact = signal(name, students, walks)
            moved = students.ascend(walks, advantages, rates, exact=exact)
            if step in (0, steps // 2, steps - 1):
                worst[name] = max(worst.get(name, 0.0), _step_gap(name, students, walks, moved, rates))
            students = moved
        kls.append(students.sequence_kl())
        history = torch.stack(kls).reshape(len(kls), len(RATES), seeds)
        chosen = int(torch.nan_to_num(history[-1].mean(-1), nan=torch.inf).argmin())
        best[name], final[name] = RATES[chosen], float(history[-1, chosen].mean())
        curves[name] = history[:, chosen].mean(-1).tolist()
    shown = "; ".join(f"{name} {kl:.3f} (rate {best[name]:g})" for name, kl in final.items())
    first = curves["exact"][0]
    parts = {
        "exact < immediate": final["exact"] < final["immediate"],
        "immediate < to-go": final["immediate"] < final["log-ratio-to-go"],
        "every objective learns": max(final.values()) < 0.75 * first,
        **{f"{name}: steps": gap < _EXACT for name, gap in worst.items()},
        **_sampling_parts(problem, start, first),
    }
    return Claim(
        "6", "the immediate log ratio converges faster than the log-ratio-to-go", "section 2.4; tree of 3^6, 4 samples a step",
        "final sequence KL: exact < immediate < to-go (0.08, 0.11, 0.36 on another tree)",
        f"from {first:.2f}: {shown}", all(parts.values()),
        {"final": final, "rates": best, "curves": curves, "every": 20, "steps": steps}, parts,
    )  # fmt: skip


def _step_gap(name: str, students: Students, walks: Walks, moved: Students, rates: Tensor) -> float:
    """How far the step of the first and the last run is from the objective written out on their samples."""
    worst = 0.0
    for run in (0, len(rates) - 1):
        w = of_table(students.problem, students.tables[run])
        paths = _paths(walks, run)
        formula = FORMULAS[_FORMULA[name]]
        each = [[formula(w, path, t, 1.0) for t in range(len(path))] for path in paths]
        if name.endswith("leave one out"):
            each = [np.subtract(a, b).tolist() for a, b in zip(each, leave_one_out(each), strict=True)]
        wanted = np.sum(
            [w.estimate(y, a, exact=name.startswith("exact")) for y, a in zip(paths, each, strict=True)], axis=0
        )
        step = (moved.tables[run] - students.tables[run]) / rates[run]
        worst = max(worst, gap(step, wanted / len(paths)))
    return worst


_FORMULA = {
    "immediate": "immediate",
    "log-ratio-to-go": "log-ratio-to-go (ii)",
    "exact": "exact",
    "exact + KL-to-go, leave one out": "exact + KL-to-go",
}


def _paths(walks: Walks, run: int) -> list[Path]:
    """The samples of one run as (state, action) pairs."""
    each = zip(walks.states[run].tolist(), walks.actions[run].tolist(), strict=True)
    return [list(zip(states, actions, strict=True)) for states, actions in each]


def _sampling_parts(problem: Problem, start: Tensor, first: float, *, samples: int = 4000) -> dict[str, bool]:
    """Whether the samples visit states as often as the student does, and what is measured is the KL."""
    w = of_table(problem, start)
    students = Students(problem, start[None])
    walks = students.sample(samples, torch.Generator().manual_seed(0))
    visits = np.bincount(walks.states.flatten().numpy(), minlength=problem.tree.num_states) / samples
    expected = w.occupancy(w.table)
    return {
        "samples are the student's": bool(
            (np.abs(visits - expected) < 5 * np.sqrt(expected / samples) + 2 / samples).all()
        ),
        "the sequence KL": abs(first + float(w.value(w.table))) < _EXACT
        and gap(students.sequence_kl(), -w.value(w.table)[None]) < _EXACT,
    }


TABULAR_TREES = (make_tree(3, 3), make_tree(2, 4, num_prompts=2), make_tree(3, 3, end=2, num_prompts=3))
ALIASED_TREES = (make_tree(3, 4), make_tree(3, 3, num_prompts=2), make_tree(3, 4, end=2, num_prompts=3))


def theorem_3(*, aliased: int = 12, tabular: int = 6, starts: int = 2) -> Claim:
    """Ascent on the mean of each estimate to rest, for random teachers, several prompts and several starts: in a table, and with
    states that share rows. At rest the gradient is taken by complex steps."""
    worst = {"KL": 0.0, "distance": 0.0, "gradient": 0.0, "mean": 0.0}
    for seed in range(tabular):
        tree = TABULAR_TREES[seed % len(TABULAR_TREES)]
        generator = torch.Generator().manual_seed(seed)
        problem = random_problem(tree, generator, sharpness=0.5 + 0.5 * (seed % 4))
        for _ in range(starts):
            start = random_table(problem, generator, sharpness=1.0)
            for discount in (0.0, 1.0):
                w = _at_rest(problem, start, discount, worst)
                worst["KL"] = max(worst["KL"], -float(w.value(w.table)))
                worst["distance"] = max(worst["distance"], float(np.abs(w.p - np.exp(w.logq)).max()))
    excess: dict[float, list[float]] = {0.0: [], 0.9: []}
    left = []
    for seed in range(aliased):
        for discount, values in _aliased(seed, starts, worst).items():
            if discount in excess:
                excess[discount].append(values[0] / values[1] - 1.0)
            if discount == 0.0:
                left.append(values[2])
    immediate_excess, discounted = excess[0.0], excess[0.9]
    parts = {
        "in a table the KL is 0 for both": worst["KL"] < 1e-12,
        "in a table every state is the teacher's": worst["distance"] < 1e-6,
        "they rest": worst["gradient"] < 1e-8,
        "at the start the means are g1 and grad V": worst["mean"] < _EXACT,
        "with shared rows the immediate log ratio is above the optimum": min(immediate_excess) > 1e-4,
        "there grad V is not 0": min(left) > 1e-4,
        "discount 0.9 within 1.5 %": max(discounted) < 0.015,
    }
    return Claim(
        "7", "at rest the immediate log ratio is optimal in a table, not with shared parameters", "Theorem 3; trees of 3^3 and 3^4",
        "tabular: sequence KL 0 for both; shared rows: immediate above the optimum in every instance, discount 0.9 within 1.5 %",
        f"tabular: at most {worst['KL']:.1e} over {tabular} problems of one to three prompts and {starts} starts; shared rows: "
        f"{100 * min(immediate_excess):.1f}-{100 * max(immediate_excess):.1f} % "
        f"above (median {100 * float(np.median(immediate_excess)):.1f} %), discount 0.9: median "
        f"{100 * float(np.median(discounted)):.2f} %, at most {100 * max(discounted):.2f} %; "
        f"largest slope of a mean estimate at rest {worst['gradient']:.0e}",
        all(parts.values()),
        {"tabular": worst["KL"], "immediate": immediate_excess, "discount 0.9": discounted, "gradient": worst["gradient"]}, parts,
    )  # fmt: skip


def _aliased(seed: int, starts: int, worst: dict[str, float]) -> dict[float, tuple[float, float, float]]:
    """By discount: the sequence KL at rest with shared rows, the lowest that to-go found from any start, and |grad V| there; the
    largest of the KLs over the starts."""
    generator = torch.Generator().manual_seed(seed)
    tree = ALIASED_TREES[seed % len(ALIASED_TREES)]
    rows = torch.unique(torch.randint(0, 8, (tree.num_states,), generator=generator), return_inverse=True)[1]
    problem = random_problem(tree, generator, sharpness=1.0, rows=rows)
    found: dict[float, list[tuple[float, float]]] = {0.0: [], 0.9: [], 1.0: []}
    for _ in range(starts):
        start = random_table(problem, generator, sharpness=0.3)
        for discount, values in found.items():
            w = _at_rest(problem, start, discount, worst)
            values.append((-float(w.value(w.table)), float(np.abs(w.gradient()).max())))
    optimum = min(kl for kl, _ in found[1.0])
    return {g: (min(kl for kl, _ in values), optimum, min(slope for _, slope in values)) for g, values in found.items()}


def _at_rest(
    problem: Problem, start: Tensor, discount: float, worst: dict[str, float], *, steps: int = 3000
) -> WrittenOut:
    """Where the mean of the log-ratio-to-go's estimate with this discount (0: the immediate log ratio's) comes to rest.

    Each logit's slope is divided by how often its action is taken (natural policy gradient). Adds to `worst` how far the mean at
    the start is from the one written out, and the largest slope of that one at rest.
    """
    table = start.clone()
    tree, rows = problem.tree, problem.rows
    for step in range(steps):
        policy = problem.policy(table)
        ratio = policy.log_ratio
        advantages = log_ratio_to_go(ratio, tree.mask, discount) if discount > 0 else immediate(ratio, tree.mask)
        mean = (policy.chances @ trajectory_gradients(policy, advantages)).reshape(table.shape)
        if step == 0:
            worst["mean"] = max(worst["mean"], gap(mean, _mean_slope(of_table(problem, table), discount)))
        visits = torch.zeros(len(table), dtype=torch.float64).index_add(0, rows, policy.occupancy)
        table = table + 0.5 * mean / (visits[:, None] * torch.softmax(table, -1)).clamp(min=1e-12)
        if float(mean.abs().max()) < 1e-13 or not bool(table.isfinite().all()):
            break
    w = of_table(problem, table)
    worst["gradient"] = max(worst["gradient"], float(np.abs(_mean_slope(w, discount)).max()))
    return w


def _mean_slope(w: WrittenOut, discount: float) -> np.ndarray:
    """g1 at discount 0, grad V at 1, between them the mean over all responses."""
    if discount in (0.0, 1.0):
        return w.gradient() if discount else w.g1()
    return w.chances @ w.estimator("log-ratio-to-go (ii)", discount)


STALE_SIGNALS = ("immediate, stale", "immediate, importance weights", "exact, stale", "exact, recomputed")


def staleness(*, steps: int = 200, seeds: int = 16, lags: tuple[int, ...] = (0, 4, 8, 16)) -> Claim:
    """Rollouts of the student k updates ago: the signal as it was then, corrected by importance weights, or made anew. Some updates
    are compared with loops over their samples."""
    generator = torch.Generator().manual_seed(1)
    problem = random_problem(make_tree(3, 5), generator, sharpness=1.0)
    start = random_table(problem, generator, sharpness=1.0)
    rates = torch.tensor((0.5, 1.0, 2.0), dtype=torch.float64).repeat_interleave(seeds)
    found: dict[str, dict[int, float]] = {name: {} for name in STALE_SIGNALS}
    worst: dict[str, float] = dict.fromkeys(found, 0.0)
    for lag in lags:
        for name, results in found.items():
            students = [Students(problem, start.repeat(len(rates), 1, 1))]
            for step in range(steps):
                old = students[max(0, len(students) - 1 - lag)]
                walks = old.sample(4, generator)
                moved = _stale_step(name, students[-1], old, walks, rates)
                if step in (lag + 1, steps - 1):
                    worst[name] = max(worst[name], _stale_gap(name, students[-1], old, walks, moved, rates))
                students = [*students[max(0, len(students) - lag) :], moved]
            final = students[-1].sequence_kl().reshape(3, seeds).mean(-1)
            results[lag] = float(torch.nan_to_num(final, nan=torch.inf).min())
    recomputed = found["exact, recomputed"]
    parts = {
        f"recomputed below {name}": all(recomputed[lag] < found[name][lag] for lag in lags if lag >= 4)
        for name in STALE_SIGNALS[:-1]
    } | {f"{name}: updates": off < _EXACT for name, off in worst.items()}
    shown = "; ".join(f"{n}: " + ", ".join(f"{kl:.3f}" for kl in r.values()) for n, r in found.items())
    return Claim(
        "19", "with stale prefixes, recompute the signal", f"k = {', '.join(map(str, lags))} updates old; best of 3 rates",
        "the exact term under the current student below the same under the old one, below stale advantages and below importance "
        "weights for k >= 4", f"final sequence KL {shown}", all(parts.values()), found, parts,
    )  # fmt: skip


def _stale_gap(name: str, students: Students, old: Students, walks: Walks, moved: Students, rates: Tensor) -> float:
    """How far the update of the last run is from the signal written out on its samples."""
    run = len(rates) - 1
    now, then = (of_table(students.problem, s.tables[run]) for s in (students, old))
    paths = _paths(walks, run)
    wanted = np.zeros(now.table.size)
    for path in paths:
        if name.startswith("exact"):
            judge = now if name == "exact, recomputed" else then
            wanted += judge.estimate(path, [0.0] * len(path), exact=True)
        elif name == "immediate, stale":
            wanted += now.estimate(path, [then.ratio[step] for step in path])
        else:
            wanted += now.estimate(path, [now.ratio[step] * now.p[step] / then.p[step] for step in path])
    return gap((moved.tables[run] - students.tables[run]) / rates[run], wanted / len(paths))


def _stale_step(name: str, students: Students, old: Students, walks: Walks, rates: Tensor) -> Students:
    """An update of the students on responses of the old ones."""
    nothing = torch.zeros(walks.states.shape, dtype=torch.float64)
    if name == "exact, recomputed":
        return students.ascend(walks, nothing, rates, exact=True)
    if name == "exact, stale":
        move = old.ascend(walks, nothing, rates, exact=True).tables - old.tables
        return replace(students, tables=students.tables + move)
    mask = torch.ones(walks.states.flatten(0, 1).shape, dtype=torch.bool)
    if name == "immediate, stale":
        return students.ascend(walks, immediate(old.at(walks)[0], mask), rates, exact=False)
    weights = importance_weights(students.action_logprobs(walks), old.action_logprobs(walks), mask)
    return students.ascend(walks, immediate(students.at(walks)[0], mask) * weights, rates, exact=False)
