"""Claims on stationary points: where a student ends, found by following expected gradients, against the closed forms."""

from collections.abc import Callable
from math import exp, log

import numpy as np
import torch
from torch import Tensor

from opd.objectives.advantages import kl_to_go, log_ratio_to_go
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd_theory.claim import Claim
from opd_theory.tree import Problem, make_tree
from opd_theory.written_out import gap, log_softmax, of_table, slope
from opd_theory.written_out import reverse_kl as plain_kl

_ENTRY, _IRREDUCIBLE = 0.05, 0.087  # the teacher's probability of the branch; nats a step where it is not taken


def settle(gradient: Callable[[Tensor], Tensor], start: Tensor, *, rate: float, steps: int) -> Tensor:
    """Where gradient ascent from `start` ends: when it no longer moves, after `steps` at the latest."""
    point = start.clone()
    for _ in range(steps):
        move = rate * gradient(point)
        point = point + move
        if float(move.abs().max()) < 1e-12:
            break
    return point


def branch_law(horizons: tuple[int, ...] = (32, 128), discounts: tuple[float, ...] = (0.0, 0.9, 1.0)) -> Claim:
    """A student may enter a branch; the other way costs `_IRREDUCIBLE` nats a step that it cannot change.

    It follows `kl_to_go`, and `log_ratio_to_go` with the mean of each later log ratio.
    """
    cases, worst = [], {"KL-to-go": 0.0, "log-ratio-to-go": 0.0}
    for horizon in horizons:
        for discount in discounts:
            future = _IRREDUCIBLE * sum(discount**t for t in range(1, horizon + 1))
            expected = _ENTRY / (_ENTRY + (1 - _ENTRY) * exp(-future))
            found = {name: _branch_by_ascent(name, horizon, discount) for name in worst}
            worst = {name: max(worst[name], abs(found[name] - expected)) for name in worst}
            cases.append({"horizon": horizon, "discount": discount, "law": expected, "ascent": found["KL-to-go"]})
    shown = ", ".join(f"T {c['horizon']} discount {c['discount']:g}: {c['ascent']:.4f}" for c in cases)
    parts = {name: off < 5e-5 for name, off in worst.items()}
    return Claim(
        "8", "branch law: pi(branch) ~ q(branch) exp(-K of the branch)", "docs/concepts/objectives.md, discounts",
        "ascent on KL-to-go ends at the law, four digits; 0.05 becomes 0.46 at T = 32, discount 1", shown, all(parts.values()),
        {"cases": cases}, parts,
    )  # fmt: skip


def _branch_by_ascent(estimator: str, horizon: int, discount: float) -> float:
    """Follow the expected natural gradient at the first action; its two actions lead to two known futures."""
    mask = torch.ones(2, horizon + 1, dtype=torch.bool)
    mask[0, 1:] = False  # the branch ends at once
    reverse_kl = torch.full((2, horizon + 1), _IRREDUCIBLE, dtype=torch.float64)
    entry = torch.tensor([log(_ENTRY), log(1 - _ENTRY)], dtype=torch.float64)

    def gradient(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        log_ratio = -reverse_kl
        log_ratio[:, 0] = entry - logp
        if estimator == "KL-to-go":
            advantage = kl_to_go(log_ratio, reverse_kl, mask, discount)[:, 0]
        else:
            advantage = log_ratio_to_go(log_ratio, mask, discount)[:, 0]
        return advantage - logp.exp() @ advantage  # the plain gradient, divided by how often each action is taken

    return float(torch.softmax(settle(gradient, torch.zeros(2, dtype=torch.float64), rate=0.5, steps=400), -1)[0])


def natural(slopes: Tensor, logits: Tensor) -> Tensor:
    """Slopes in the logits [..., vocab] divided by each action's probability: the natural gradient, with the same rest points."""
    return slopes / torch.softmax(logits, -1)


def _follow(teachers: list[tuple[Tensor, float]], start: Tensor) -> Tensor:
    """Descend `vocabulary_loss` on one state whose logits are free."""
    return settle(lambda z: -natural(_loss_and_slope(teachers, z)[1], z), start, rate=0.5, steps=200)


def _loss_and_slope(teachers: list[tuple[Tensor, float]], logits: Tensor) -> tuple[float, Tensor]:
    """`vocabulary_loss` of one state; identity heads make hidden states the logits."""
    eye = torch.eye(len(logits), dtype=torch.float64)
    states = [TeacherStates(given[None], eye, weight) for given, weight in teachers]
    hidden = logits[None].detach().requires_grad_()
    loss, _ = vocabulary_loss(hidden, eye, states, torch.ones(1, dtype=torch.float64), VocabularyLoss())
    return float(loss.detach()), torch.autograd.grad(loss, hidden)[0][0]


def _loss_gap(teachers: list[tuple[Tensor, float]], logits: Tensor) -> float:
    """How far loss and slope are from KL(pi, prod_k q_k^weight_k), written out."""
    target = np.sum([weight * log_softmax(given.numpy()) for given, weight in teachers], axis=0)
    loss, found = _loss_and_slope(teachers, logits)
    return max(
        abs(loss - float(plain_kl(logits.numpy(), target))),
        gap(found, slope(lambda z: plain_kl(z, target), logits.numpy())),
    )


def several_teachers(instances: int = 3) -> Claim:
    """Two teachers on one prompt end at their normalised geometric mean; on two prompts at each of them."""
    generator = torch.Generator().manual_seed(0)
    overlap = disjoint = formula = 0.0
    for seed in range(instances):
        start, one, two = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        share = 0.5 if seed == 0 else float(torch.rand((), generator=generator))
        teachers = [(one, share), (two, 1 - share)]
        mean = np.exp(log_softmax(share * log_softmax(one.numpy()) + (1 - share) * log_softmax(two.numpy())))
        overlap = max(overlap, gap(torch.softmax(_follow(teachers, start), -1), mean))
        formula = max(formula, _loss_gap(teachers, start))
        # One student, two prompts of one action each, every prompt with a teacher of its own.
        problem = Problem(
            make_tree(6, 1, num_prompts=2), torch.log_softmax(torch.stack([one, two]), -1), torch.arange(2)
        )
        table = torch.stack([start, start])
        formula = max(formula, gap(problem.policy(table).gradient(), of_table(problem, table).gradient()))
        table = settle(lambda t, p=problem: natural(p.policy(t).gradient(), t), table, rate=1.0, steps=200)
        disjoint = max(disjoint, gap(torch.softmax(table, -1), problem.logq.exp()))
    parts = {
        "same prompt": overlap < 1e-6,
        "prompts of their own": disjoint < 1e-6,
        "loss and slope": formula < 1e-10,
    }
    return Claim(
        "14", "several teachers", "model merging; weights that sum to one",
        "same prompt: the normalised geometric mean; prompts of their own: each matched (to 1e-6)",
        f"largest difference {overlap:.1e} and {disjoint:.1e}", all(parts.values()),
        {"overlapping": overlap, "disjoint": disjoint}, parts,
    )  # fmt: skip


def extrapolation(scales: tuple[float, ...] = (1.5, 0.5, 3.0)) -> Claim:
    """lambda (log q - log ref) - (log pi - log ref) ends at ref^(1 - lambda) q^lambda, normalised."""
    generator = torch.Generator().manual_seed(1)
    off = formula = 0.0
    for scale in scales:
        start, teacher, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        teachers = [(teacher, scale), (reference, 1 - scale)]
        logq, logr = log_softmax(teacher.numpy()), log_softmax(reference.numpy())
        wanted = np.exp(log_softmax(scale * logq + (1 - scale) * logr))
        off = max(off, gap(torch.softmax(_follow(teachers, start), -1), wanted))
        formula = max(formula, _loss_gap(teachers, start))
    parts = {"the optimum": off < 1e-6, "loss and slope": formula < 1e-10}
    return Claim(
        "15", "reward extrapolation moves past the teacher", f"lambda = {', '.join(f'{s:g}' for s in scales)}; a reference policy",
        "the optimum is ref^(1 - lambda) q^lambda, normalised (to 1e-6)", f"largest difference {off:.1e}", all(parts.values()),
        {"gap": off}, parts,
    )  # fmt: skip
