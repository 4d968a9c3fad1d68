"""Claims on estimates of one state's KL: top-k supports, right and wrong, and what differentiating k1, k2, k3 gives."""

from collections.abc import Callable
from itertools import pairwise
from math import e

import torch
from torch import Tensor

from opd.objectives.divergences import forward_kl, reverse_kl
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd.theory.claim import Claim
from opd.theory.law_claims import settle

_VOCAB, _STEPS, _RATE = 512, 3000, 2.0


def _pair(seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher over 512 tokens, peaked as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    shared = -1.5 * torch.arange(1, _VOCAB + 1, dtype=torch.float64).log()
    noise = torch.randn(2, _VOCAB, generator=generator, dtype=torch.float64)
    return shared + 0.9 * noise[0], shared + 0.9 * noise[1]


def _descend(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    def gradient(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return -torch.autograd.grad(loss(logits), logits)[0]

    return settle(gradient, start, rate=_RATE, steps=_STEPS)


def supports() -> Claim:
    """Gradient descent on one state's logits with each form of the KL; what is reported is the full KL at the end."""
    student, teacher = _pair(0)
    losses: dict[str, Callable[[Tensor], Tensor]] = {"full": lambda z: reverse_kl(z, teacher)}
    for k in (8, 16, 32):
        losses[f"union + bucket, k = {k}"] = lambda z, k=k: _bucketed(z, teacher, k)
    losses["renormalised teacher top-k, k = 32"] = lambda z: _renormalised(z, teacher, 32)
    losses["unnormalised top-k, k = 32"] = lambda z: _unnormalised(z, teacher, 32)
    start = float(reverse_kl(student, teacher))
    found = {name: float(reverse_kl(_descend(loss, student), teacher)) for name, loss in losses.items()}
    ordered = list(found.values())
    rising = [ordered[0], *ordered[3:0:-1], start]
    right = all(a < b for a, b in pairwise(rising))
    wrong = min(ordered[-2:]) > ordered[1] and ordered[-1] > start
    shown = "; ".join(f"{name} {kl:.3f}" for name, kl in found.items())
    return Claim(
        "9", "top-k supports need the tail's bucket", "docs/objectives.md, top-k supports; one state, vocabulary 512",
        "full < k = 32 < 16 < 8 < start; both wrong forms end above k = 8, the unnormalised one above its start",
        f"start {start:.3f}; {shown}", right and wrong,
        {"start": start, "final": found},
    )  # fmt: skip


def _bucketed(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    eye = torch.eye(_VOCAB, dtype=torch.float64)
    loss, _ = vocabulary_loss(
        student[None], eye, [TeacherStates(teacher[None], eye)], torch.ones(1, dtype=torch.float64),
        VocabularyLoss(support=k), sampled_ids=student.detach().argmax()[None],
    )  # fmt: skip
    return loss


def _renormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The wrong form that forgets the student's mass off the teacher's k likeliest tokens."""
    chosen = teacher.topk(k).indices
    return reverse_kl(student[chosen], teacher[chosen])


def _unnormalised(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The wrong form sum_S p log(p / q), differentiated through p, without the tail."""
    chosen = teacher.topk(k).indices
    logp, logq = torch.log_softmax(student, -1)[chosen], torch.log_softmax(teacher, -1)[chosen]
    return (logp.exp() * (logp - logq)).sum()


def biased_head() -> Claim:
    """The head differentiated through p log(p/q), the tail as a sampled log ratio without the +1: where it settles."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[teacher.topk(4).indices] = True
    logq = torch.log_softmax(teacher, -1)

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        p = logp.exp()
        head = (p * (logp - logq))[inside].sum()
        tail = (p.detach() * (logp - logq).detach() * logp)[~inside].sum()  # E over a sampled token of r_a grad log p_a
        return head + tail

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return -torch.autograd.grad(loss(logits), logits)[0]

    found = float(torch.softmax(settle(gradient, student, rate=1.0, steps=5000), -1)[inside].sum())
    mass = float(logq.exp()[inside].sum())
    law = (mass / e) / (mass / e + 1 - mass)
    return Claim(
        "10", "a head by autodiff with a sampled tail is biased", "docs/objectives.md; four of eight tokens in the head",
        f"p(S) = (q_S / e) / (q_S / e + q_tail) = {law:.6f}; the teacher's is {mass:.4f}", f"p(S) = {found:.6f}",
        abs(found - law) < 1e-6, {"law": law, "ascent": found, "teacher": mass},
    )  # fmt: skip


def k_estimators() -> Claim:
    """Expected gradients of k1, k2 and k3 differentiated through the sampled token's log-probability."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def mean_gradient(k: Callable[[Tensor], Tensor]) -> Tensor:
        logits = student.clone().requires_grad_()
        logp = torch.log_softmax(logits, -1)
        log_ratio = torch.log_softmax(teacher, -1) - logp
        return torch.autograd.grad((logp.detach().exp() * k(log_ratio)).sum(), logits)[0]

    def true_gradient(divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logits = student.clone().requires_grad_()
        return torch.autograd.grad(divergence(logits, teacher), logits)[0]

    reverse, forward = true_gradient(reverse_kl), true_gradient(forward_kl)
    gaps = {
        "k1": float(mean_gradient(lambda r: -r).abs().max()),
        "k2": float((mean_gradient(lambda r: 0.5 * r.square()) - reverse).abs().max()),
        "k3": float((mean_gradient(lambda r: r.exp() - 1 - r) - forward).abs().max()),
    }
    return Claim(
        "11", "differentiating k1, k2, k3", "docs/objectives.md; enumeration over six tokens",
        "k1: zero; k2: the reverse KL's gradient; k3: the forward KL's (to 1e-12)",
        "largest differences " + ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()),
        max(gaps.values()) < 1e-12, gaps,
    )  # fmt: skip
