"""Claims on stationary points: where a student ends, found by following expected gradients, against the closed forms."""

from collections.abc import Callable
from math import exp, log

import torch
from torch import Tensor

from opd.objectives.advantages import kl_to_go
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd.theory.claim import Claim
from opd.theory.tree import Problem, make_tree

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


def branch_law() -> Claim:
    """A student that is free to enter a branch, whose other way costs `_IRREDUCIBLE` nats a step that it cannot mend."""
    cases, worst = [], 0.0
    for horizon in (32, 128):
        for discount in (0.0, 0.9, 1.0):
            future = _IRREDUCIBLE * sum(discount**t for t in range(1, horizon + 1))
            expected = _ENTRY / (_ENTRY + (1 - _ENTRY) * exp(-future))
            found = _branch_by_ascent(horizon, discount)
            worst = max(worst, abs(found - expected))
            cases.append({"horizon": horizon, "discount": discount, "law": expected, "ascent": found})
    shown = ", ".join(f"T {c['horizon']} discount {c['discount']:g}: {c['ascent']:.4f}" for c in cases)
    return Claim(
        "8", "branch law: pi(branch) ~ q(branch) exp(-K of the branch)", "docs/objectives.md, discounts",
        "ascent on KL-to-go ends at the law, four digits; 0.05 becomes 0.46 at T = 32, discount 1", shown, worst < 5e-5,
        {"cases": cases},
    )  # fmt: skip


def _branch_by_ascent(horizon: int, discount: float) -> float:
    """Follow the expected gradient of `kl_to_go` at the first action; its two actions lead to two known futures."""
    mask = torch.ones(2, horizon + 1, dtype=torch.bool)
    mask[0, 1:] = False  # the branch ends at once
    reverse_kl = torch.full((2, horizon + 1), _IRREDUCIBLE, dtype=torch.float64)
    entry = torch.tensor([log(_ENTRY), log(1 - _ENTRY)], dtype=torch.float64)

    def gradient(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        log_ratio = torch.zeros(2, horizon + 1, dtype=torch.float64)
        log_ratio[:, 0] = entry - logp
        advantage = kl_to_go(log_ratio, reverse_kl, mask, discount)[:, 0]
        weight = logp.exp() * advantage
        return weight - logp.exp() * weight.sum()

    return float(torch.softmax(settle(gradient, torch.zeros(2, dtype=torch.float64), rate=1.0, steps=4000), -1)[0])


def _follow(teachers: list[tuple[Tensor, float]], start: Tensor, *, steps: int = 4000, rate: float = 2.0) -> Tensor:
    """Descend `vocabulary_loss` on one state whose logits are free; identity heads make hidden states the logits."""
    eye = torch.eye(len(start), dtype=torch.float64)
    states = [TeacherStates(logits[None], eye, weight) for logits, weight in teachers]
    one = torch.ones(1, dtype=torch.float64)

    def gradient(logits: Tensor) -> Tensor:
        hidden = logits[None].detach().requires_grad_()
        loss, _ = vocabulary_loss(hidden, eye, states, one, VocabularyLoss())
        return -torch.autograd.grad(loss, hidden)[0][0]

    return settle(gradient, start, rate=rate, steps=steps)


def several_teachers() -> Claim:
    """Two teachers on one prompt end at their normalised geometric mean; on two prompts at each of them."""
    generator = torch.Generator().manual_seed(0)
    start, one, two = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    mean = torch.softmax(0.5 * torch.log_softmax(one, -1) + 0.5 * torch.log_softmax(two, -1), -1)
    overlap = float((torch.softmax(_follow([(one, 0.5), (two, 0.5)], start), -1) - mean).abs().max())
    # One student, two prompts of one action each, every prompt with a teacher of its own.
    problem = Problem(make_tree(6, 1, num_prompts=2), torch.log_softmax(torch.stack([one, two]), -1), torch.arange(2))
    table = settle(lambda t: problem.policy(t).gradient(), torch.stack([start, start]), rate=4.0, steps=4000)
    disjoint = float((torch.log_softmax(table, -1).exp() - problem.logq.exp()).abs().max())
    return Claim(
        "14", "several teachers", "model merging; weights that sum to one",
        "same prompt: the normalised geometric mean; prompts of their own: each matched (to 1e-6)",
        f"largest difference {overlap:.1e} and {disjoint:.1e}", max(overlap, disjoint) < 1e-6,
        {"overlapping": overlap, "disjoint": disjoint},
    )  # fmt: skip


def extrapolation(scale: float = 1.5) -> Claim:
    """lambda (log q - log ref) - (log pi - log ref) ends at ref^(1 - lambda) q^lambda, normalised."""
    generator = torch.Generator().manual_seed(1)
    start, teacher, reference = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    logq, logr = torch.log_softmax(teacher, -1), torch.log_softmax(reference, -1)
    wanted = torch.softmax(scale * logq + (1 - scale) * logr, -1)
    found = torch.softmax(_follow([(teacher, scale), (reference, 1 - scale)], start), -1)
    gap = float((found - wanted).abs().max())
    return Claim(
        "15", "reward extrapolation moves past the teacher", "lambda = 1.5, a reference policy",
        "the optimum is ref^(1 - lambda) q^lambda, normalised (to 1e-6)", f"largest difference {gap:.1e}", gap < 1e-6,
        {"gap": gap},
    )  # fmt: skip
