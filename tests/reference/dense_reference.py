"""The loss of a step as the theory defines it: float64, one sequence at a time, plain autograd, loops over actions.

Nothing of the library is imported here. `Row` is one sampled sequence; `Recipe` is plain data. `follow` fixes what does not move
during an update (advantages, masks, weights); `loss` is then a function of the student's logits.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dense_records import Action, Episode, Row
from torch import Tensor

Recipe: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What an update keeps fixed: the actions that train, the divisor of the integrated term, and figures."""

    actions: list[Action]
    divisor: float
    metrics: dict[str, float]
    targets: list[Tensor | None]


def target_of(parts: Sequence[tuple[float, Tensor]], *, temperature: float, floor: float) -> Tensor:
    """log q = sum_k w_k max(log q_k, floor), [actions, vocab]; not normalised."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, logits in parts:
        total = total + weight * torch.log_softmax(logits / temperature, -1).clamp(min=floor)
    return total


def compute_advantages(
    recipe: Recipe, rows: Sequence[Row], logits: Sequence[Tensor], parts: Sequence[Any], facts: Recipe
) -> Plan:
    """The plan of one update. logits: the student's before it, [actions, vocab] a row; parts: each row's teachers (weight, logits);
    facts: `student_scored`, whether the student's own log-probabilities are known, and `chunk_logq`, `named_logq` by row."""
    objective = recipe["objective"]
    how = {"temperature": recipe["temperature"], "floor": objective["teacher_logprob_floor"]}
    targets: list[Tensor | None] = [
        target_of(p, **how) if r.kind != "none" else None for p, r in zip(parts, rows, strict=True)
    ]
    episodes = _episodes(recipe, rows)
    for episode in episodes:
        for action in episode.used:
            _fill(action, rows[action.row], logits[action.row].detach(), targets[action.row], recipe, facts)
    for episode in episodes:
        _advantages(objective, recipe.get("credit", "causal"), episode)
    _baselines(objective, episodes)
    _masks(recipe, rows, episodes)
    _rewards(recipe, rows, episodes)
    metrics = _corrections(objective["correction"], episodes)
    by_distillation = _normaliser(objective, episodes, "distilled")
    by_reward = _normaliser(objective, episodes, "judged")
    for episode in episodes:
        for a in episode.used:
            if a.distilled:
                a.pull += objective["coef"] * (a.advantage - a.baseline) / by_distillation
            if a.judged:
                a.pull += recipe["reward"]["coef"] * episode.reward / by_reward
            a.pull *= a.weight
    metrics |= _figures(recipe, rows, episodes, logits, parts, facts)
    return Plan([a for e in episodes for a in e.seen], by_distillation, metrics, targets)


def loss(recipe: Recipe, rows: Sequence[Row], plan: Plan, logits: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The loss at these logits of the student, and figures of it."""
    objective, temperature = recipe["objective"], recipe["temperature"]
    logps = [torch.log_softmax(x / temperature, -1) for x in logits]
    total = 0.0 * torch.stack([x.sum() for x in logits]).sum()  # nothing may train, and has a gradient of zero
    divergences: list[float] = []
    tails: list[float] = []
    trained = clipped = 0
    nll: list[float] = []
    for a in plan.actions:
        row, logp = rows[a.row], logps[a.row][a.k]
        token = row.tokens[row.actions[a.k]]
        if objective["type"] in ("exact", "top_k", "exact_to_go") and a.scored:
            logq = plan.targets[a.row]
            assert logq is not None
            if row.kind == "named":
                value, residual, tail = _named(objective, logp, row.named[a.k])
            else:
                value, residual, tail = _divergence(objective, logp, logq[a.k], token)
            divergences.append(float(value.detach()))
            tails.append(tail)
            if a.distilled:
                total = total + objective["coef"] * (value + residual) / plan.divisor
        nll.append(-float(logp[token].detach()))
        if a.distilled or a.judged:
            term, was_clipped = _surrogate(objective, logp[token], a)
            total = total - term
            trained += 1
            clipped += was_clipped
    metrics = {"loss/total/sum": float(total.detach()), "student/nll/mean": _mean(nll)}
    if objective["type"] in ("exact", "top_k", "exact_to_go"):
        metrics |= {"divergence/token/mean": _mean(divergences), "top_k/tail_mass/mean": _mean(tails)}
    if objective["loss"] == "ppo":
        metrics["loss/clipped/mean"] = clipped / trained if trained else math.nan
    return total, metrics


def _episodes(recipe: Recipe, rows: Sequence[Row]) -> list[Episode]:
    found: dict[tuple[str, str, int], Episode] = {}
    for i, row in enumerate(rows):
        key = (row.prompt, row.teacher, row.sample)
        found.setdefault(key, Episode(key, [])).rows.append(i)
    for episode in found.values():
        faulty = any(rows[i].flags for i in episode.rows)
        verdicts = [rows[i].reward for i in episode.rows if rows[i].reward is not None]
        episode.verdict = recipe["reward"]["format_error"] if faulty else (verdicts[0] if verdicts else None)
        t = 0
        for i in episode.rows:
            row = rows[i]
            for k, place in enumerate(row.actions):
                turn = next(n for n, (start, end) in enumerate(row.turns) if start <= place < end)
                flagged = any(start <= place < end for start, end in row.flags)
                chunk = row.chunks[k] if row.kind == "chunks" else k
                scored = row.kind != "none" and chunk >= 0
                episode.actions.append(Action(i, k, t, turn, flagged, scored, chunk))
                t += 1
        judged = recipe["reward"]["coef"] > 0 and episode.verdict is not None
        trains = any(not rows[i].failed and (rows[i].kind != "none" or judged) for i in episode.rows)
        episode.used = episode.actions if trains else []
    return list(found.values())


def _fill(a: Action, row: Row, logits: Tensor, logq: Tensor | None, recipe: Recipe, facts: Recipe) -> None:
    logp = torch.log_softmax(logits[a.k] / recipe["temperature"], -1)
    token = row.tokens[row.actions[a.k]]
    a.sampled = row.sampled[a.k]
    a.cur = float(logp[token]) if facts["student_scored"] else a.sampled
    if row.kind == "chunks":
        a.logq = facts["chunk_logq"][a.row][a.k]
    elif logq is not None and a.scored:
        a.logq = float(logq[a.k, token].float())  # a score is kept in float32
    if row.kind == "whole" and logq is not None:
        p, gap = logp.exp(), logq[a.k] - logp
        share = p * (1 - 2 * p + (p * p).sum())
        a.kl = -float((p * gap).sum())
        a.best = float((share * gap).sum() / share.sum())


def _advantages(objective: Recipe, credit: str, episode: Episode) -> None:
    """The sampled part of the distillation term, before its baseline, on scored actions."""
    kind, discount = objective["type"], objective["discount"] or 0.0
    if kind in ("exact", "top_k"):
        return
    units = list(_units(episode.scored))
    for u, unit in enumerate(units):
        later = 0.0
        for v in range(u + 1, len(units)):
            if kind == "to_go":
                later += discount ** (v - u) * sum(a.logq - a.cur for a in units[v])
            elif kind in ("kl_to_go", "exact_to_go"):
                later -= discount ** (v - u) * sum(a.kl for a in units[v])
        for i, a in enumerate(unit):
            open_yet = unit if credit == "full" else unit[i:]
            now = 0.0 if kind == "exact_to_go" else sum(b.logq - b.cur for b in open_yet)
            a.advantage = now + later


def _units(actions: Sequence[Action]) -> Iterator[list[Action]]:
    """What a discount counts: actions, or the chunks of one part."""
    unit: list[Action] = []
    for a in actions:
        if unit and (a.row, a.chunk) != (unit[-1].row, unit[-1].chunk):
            yield unit
            unit = []
        unit.append(a)
    if unit:
        yield unit


def _baselines(objective: Recipe, episodes: Sequence[Episode]) -> None:
    for mine in episodes:
        for a in mine.scored:
            match objective["baseline"]:
                case "leave_one_out":
                    others = [
                        b.advantage
                        for other in episodes
                        if other.key[:2] == mine.key[:2] and other is not mine
                        for b in other.scored
                        if b.t == a.t
                    ]
                    a.baseline = sum(others) / len(others) if others else 0.0
                case "kl":
                    a.baseline = -a.kl
                case "score_weighted":
                    a.baseline = a.best


def _masks(recipe: Recipe, rows: Sequence[Row], episodes: Sequence[Episode]) -> None:
    scope = recipe["mask"]["format_errors"]
    for episode in episodes:
        faulty = any(rows[i].flags for i in episode.rows)
        first = min((a.t for a in episode.actions if a.flagged), default=math.inf)
        turns = {(a.row, a.turn) for a in episode.actions if a.flagged}
        for a in episode.used:
            kept = {
                "off": True,
                "trajectory": not faulty,
                "suffix": a.t < first,
                "turn": (a.row, a.turn) not in turns,
                "span": not a.flagged,
            }[scope]
            a.distilled = a.scored and kept and recipe["objective"]["coef"] > 0


def _rewards(recipe: Recipe, rows: Sequence[Row], episodes: Sequence[Episode]) -> None:
    reward = recipe["reward"]
    if reward["coef"] == 0:
        return
    for mine in episodes:
        if mine.verdict is None:
            continue
        group = [e for e in episodes if e.key[:2] == mine.key[:2] and e.used and e.verdict is not None]
        every = [float(e.verdict) for e in group if e.verdict is not None]
        others = [float(e.verdict) for e in group if e is not mine and e.verdict is not None]
        mean = sum(every) / len(every) if every else 0.0
        deviation = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every)) if every else 0.0
        mine.reward = {
            "none": mine.verdict,
            "group_mean": mine.verdict - mean,
            "grpo": (mine.verdict - mean) / (deviation + 1e-6),
            "leave_one_out": mine.verdict - sum(others) / len(others) if others else 0.0,
        }[reward["baseline"]]
        for a in mine.used:
            a.judged = True


def _corrections(correction: Recipe, episodes: Sequence[Episode]) -> dict[str, float]:
    if correction["type"] == "none":
        return {}
    plain: list[float] = []
    gaps: list[float] = []
    touched = 0
    for episode in episodes:
        gap = [a.cur - a.sampled for a in episode.used]
        seen = episode.seen
        for a, own in zip(episode.used, gap, strict=True):
            level = {"token": own, "geometric": sum(gap) / len(gap), "sequence": sum(gap)}[correction["level"]]
            weight = math.exp(level)
            outside = False
            if correction["type"] == "truncate":
                outside = weight > correction["cap"]
                a.weight = min(weight, correction["cap"])
            elif not correction["low"] <= weight <= correction["high"]:
                a.distilled = a.judged = False
                outside = True
            else:
                a.weight = weight
            if a in seen:
                plain.append(weight)
                gaps.append(abs(own))
                touched += outside
    return {
        "correction/weight/mean": _mean(plain),
        "correction/gap/mean": _mean(gaps),
        "correction/gap/max": max(gaps, default=0.0),
        f"correction/{'truncated' if correction['type'] == 'truncate' else 'rejected'}/sum": touched,
    }


def _normaliser(objective: Recipe, episodes: Sequence[Episode], which: str) -> float:
    counts = [sum(getattr(a, which) for a in e.used) for e in episodes]
    if objective["normalizer"] == "constant":
        return objective["constant"]
    count = sum(counts) if objective["normalizer"] == "token" else sum(c > 0 for c in counts)
    return max(1.0, float(count))


def _named(objective: Recipe, logp: Tensor, named: Mapping[int, float]) -> tuple[Tensor, Tensor, float]:
    """The same where the teacher named a few tokens: what it did not name is one bucket, of what is left of its probability."""
    floor, inside = objective["teacher_logprob_floor"], sorted(named)
    p = logp.exp()
    outside = [i for i in range(len(logp)) if i not in named]
    left = 1.0 - math.fsum(math.exp(named[i]) for i in inside)
    value = sum((p[i] * (logp[i] - max(named[i], floor)) for i in inside), torch.zeros((), dtype=torch.float64))
    if not outside:
        return value, torch.zeros_like(value), 0.0
    log_q = max(math.log(left), floor) if left > 0 else floor
    tail = p[outside].sum()
    return value + tail * (tail.log() - log_q), torch.zeros_like(value), float(tail.detach())


def _divergence(objective: Recipe, logp: Tensor, logq: Tensor, token: int) -> tuple[Tensor, Tensor, float]:
    """(the divergence of one state, the residual's policy term, the student's mass in the bucket)."""
    nothing = torch.zeros((), dtype=torch.float64)
    if objective["type"] == "top_k":
        k = min(objective["top_k"], len(logp))
        inside = {*logp.topk(k).indices.tolist(), *logq.topk(k).indices.tolist()}
        inside |= set() if objective["tail_residual"] else {token}
        outside = [i for i in range(len(logp)) if i not in inside]
        chosen = sorted(inside)
        value = (logp[chosen].exp() * (logp[chosen] - logq[chosen])).sum()
        if not outside:
            return value, nothing, 0.0
        log_p, log_q = logp[outside].logsumexp(0), logq[outside].logsumexp(0)
        value = value + log_p.exp() * (log_p - log_q)
        residual = nothing
        if objective["tail_residual"] and token in outside:
            hidden = (logp[token] - logq[token]) - (log_p - log_q)
            residual = hidden.detach() * (logp[token] - logp[token].detach())
        return value, residual, float(log_p.detach().exp())
    if objective["divergence"] == "reverse_kl" or objective["type"] == "exact_to_go":
        return (logp.exp() * (logp - logq)).sum(), nothing, 0.0
    logq = torch.log_softmax(logq, -1)
    q = logq.exp()
    if objective["divergence"] == "forward_kl":
        return (q * (logq - logp)).sum(), nothing, 0.0
    beta = objective["jsd_beta"]
    logm = (beta * q + (1 - beta) * logp.exp()).log()
    return beta * (q * (logq - logm)).sum() + (1 - beta) * (logp.exp() * (logp - logm)).sum(), nothing, 0.0


def _surrogate(objective: Recipe, logprob: Tensor, a: Action) -> tuple[Tensor, bool]:
    """What one action adds to the objective, and whether a clip took its gradient."""
    if objective["loss"] == "reinforce":
        return a.pull * logprob, False
    before = a.sampled if objective["correction"]["type"] == "none" else a.cur
    ratio = (logprob - before).exp()
    plain = ratio * a.pull
    value = torch.minimum(plain, ratio.clamp(1 - objective["clip_low"], 1 + objective["clip_high"]) * a.pull)
    clipped = bool(value.detach() < plain.detach())
    if objective["clip_dual"] is not None and a.pull < 0:
        bound = torch.tensor(objective["clip_dual"] * a.pull, dtype=torch.float64)
        clipped = clipped or bool(bound > value.detach())
        value = torch.maximum(value, bound)
    return value, clipped


def _figures(
    recipe: Recipe,
    rows: Sequence[Row],
    episodes: Sequence[Episode],
    logits: Sequence[Tensor],
    parts: Sequence[Any],
    facts: Recipe,
) -> dict[str, float]:
    objective, temperature = recipe["objective"], recipe["temperature"]
    scored = [a for e in episodes for a in e.scored]
    kl = [a.kl if not math.isnan(a.kl) and facts["distributions"] else a.cur - a.logq for a in scored]
    found = {
        "kl/token/mean": _mean(kl),
        "kl/sequence/mean": sum(kl) / max(1, sum(bool(e.scored) for e in episodes)),
    }
    for teacher in {rows[a.row].teacher for a in scored}:
        found[f"kl/token/{teacher}/mean"] = _mean(
            [x for x, a in zip(kl, scored, strict=True) if rows[a.row].teacher == teacher]
        )
    if (
        recipe["mask"]["format_errors"] != "off"
        and objective["coef"] > 0
        and objective["correction"]["type"] != "reject"
    ):
        masked = [a for a in scored if not a.distilled]
        found |= {"mask/tokens/sum": len(masked), "mask/rollouts/sum": len({a.row for a in masked})}
    if objective["type"] in ("exact", "top_k", "exact_to_go"):
        entropies, floored = [], []
        for a in scored:
            logp = torch.log_softmax(logits[a.row][a.k].detach() / temperature, -1)
            entropies.append(-float((logp.exp() * logp).sum()))
            below = torch.zeros(len(logp), dtype=torch.bool)
            for _, own in parts[a.row]:
                below |= torch.log_softmax(own[a.k] / temperature, -1) < objective["teacher_logprob_floor"]
            floored.append(float(logp.exp()[below].sum()))
        found |= {"student/entropy/mean": _mean(entropies), "teacher/floored_mass/mean": _mean(floored)}
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
