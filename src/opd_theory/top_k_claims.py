"""Claims on estimates of one state's KL: top-k supports, right and wrong, and what differentiating k1, k2, k3 gives."""

from collections.abc import Callable
from itertools import pairwise
from math import e
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from opd.objectives.divergences import forward_kl, reverse_kl
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd_theory.claim import Claim
from opd_theory.law_claims import natural, settle
from opd_theory.written_out import gap, log_softmax, slope
from opd_theory.written_out import reverse_kl as plain_kl

_EXACT = 1e-10
_RATE = 2.0


def _pair(seed: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher, peaked as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    shared = -1.5 * torch.arange(1, vocab + 1, dtype=torch.float64).log()
    noise = torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    return shared + 0.9 * noise[0], shared + 0.9 * noise[1]


Loss: TypeAlias = Callable[[Tensor], Tensor]


def _slope(loss: Loss, logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


def _descend(loss: Loss, start: Tensor, *, steps: int) -> Tensor:
    return settle(lambda z: -_slope(loss, z), start, rate=_RATE, steps=steps)


def top_k_tails(*, vocab: int = 512, steps: int = 3000, sizes: tuple[int, ...] = (8, 16, 32)) -> Claim:
    """Gradient descent on one state's logits with each form of the KL; the full KL at the end is reported. Each loss and its slope
    are compared with the formula written out, at the start and at the end."""
    student, teacher = _pair(0, vocab)
    logq = log_softmax(teacher.numpy())
    most = max(sizes)
    losses: dict[str, tuple[Loss, Plain]] = {
        "full": (lambda z: reverse_kl(z, teacher), lambda z, at: plain_kl(z, logq)),
        **{f"union + bucket, k = {k}": _bucketed(teacher, k) for k in sizes},
        f"renormalised teacher top-k, k = {most}": _renormalised(teacher, most),
        f"unnormalised top-k, k = {most}": _unnormalised(teacher, most),
    }
    start = float(plain_kl(student.numpy(), logq))
    found: dict[str, float] = {}
    worst: dict[str, float] = {}
    for name, (loss, plain) in losses.items():
        end = _descend(loss, student, steps=steps)
        found[name] = float(plain_kl(end.numpy(), logq))
        for logits in (student, end):
            at = logits.numpy()
            off = abs(float(loss(logits)) - float(plain(at, at)))
            off = max(off, gap(_slope(loss, logits), slope(lambda z, f=plain, x=at: f(z, x), at)))
            worst[name] = max(worst.get(name, 0.0), off)
    full, *bucketed, renormalised, unnormalised = found.values()
    parts = {
        "the larger the support, the nearer the end": all(a < b for a, b in pairwise([full, *bucketed[::-1], start])),
        "renormalised ends above the bucket": renormalised > bucketed[0],
        "unnormalised ends above its start": unnormalised > max(start, bucketed[0]),
        "the bucket is a lower bound": all(
            float(losses[f"union + bucket, k = {k}"][0](student)) <= start for k in sizes
        ),
        **{f"{name}: loss and slope": off < _EXACT for name, off in worst.items()},
    }
    shown = "; ".join(f"{name} {kl:.3f}" for name, kl in found.items())
    return Claim(
        "9", "top-k supports need the tail's bucket", f"docs/concepts/objectives.md, top-k supports; one state, vocabulary {vocab}",
        f"full < k = {' < '.join(map(str, sizes[::-1]))} < start; both wrong forms end above k = {sizes[0]}, the unnormalised one "
        "above its start", f"start {start:.3f}; {shown}", all(parts.values()),
        {"start": start, "final": found}, parts,
    )  # fmt: skip


Plain: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (logits, the point at which a support is chosen)


def _bucketed(teacher: Tensor, k: int) -> tuple[Loss, Plain]:
    """The loss of training on the union of both models' k likeliest tokens and the sampled one, and its formula."""
    eye = torch.eye(len(teacher), dtype=torch.float64)
    logq = log_softmax(teacher.numpy())

    def loss(student: Tensor) -> Tensor:
        found, _ = vocabulary_loss(
            student[None], eye, [TeacherStates(teacher[None], eye)], torch.ones(1, dtype=torch.float64),
            VocabularyLoss(top_k=k), sampled_ids=student.detach().argmax()[None],
        )  # fmt: skip
        return found

    def plain(logits: np.ndarray, at: np.ndarray) -> np.ndarray:
        union = np.union1d(np.argsort(-at)[:k], np.argsort(-logq)[:k])
        tail = np.setdiff1d(np.arange(len(logq)), union)
        logp = log_softmax(logits)
        p = np.exp(logp)
        rest = p[..., tail].sum(-1)
        inside = (p[..., union] * (logp[..., union] - logq[union])).sum(-1)
        return inside + rest * (np.log(rest) - np.log(np.exp(logq[tail]).sum()))

    return loss, plain


def _renormalised(teacher: Tensor, k: int) -> tuple[Loss, Plain]:
    """The wrong form that forgets the student's mass off the teacher's k likeliest tokens."""
    chosen = teacher.topk(k).indices
    logits = teacher.numpy()
    best = np.argsort(-logits)[:k]
    return (
        lambda student: reverse_kl(student[chosen], teacher[chosen]),
        lambda z, at: plain_kl(z[..., best], log_softmax(logits[best])),
    )


def _unnormalised(teacher: Tensor, k: int) -> tuple[Loss, Plain]:
    """The wrong form sum_S p log(p / q), differentiated through p, without the tail."""
    chosen = teacher.topk(k).indices
    logq = log_softmax(teacher.numpy())
    best = np.argsort(-logq)[:k]

    def loss(student: Tensor) -> Tensor:
        logp, target = torch.log_softmax(student, -1)[chosen], torch.log_softmax(teacher, -1)[chosen]
        return (logp.exp() * (logp - target)).sum()

    def plain(logits: np.ndarray, at: np.ndarray) -> np.ndarray:
        logp = log_softmax(logits)[..., best]
        return (np.exp(logp) * (logp - logq[best])).sum(-1)

    return loss, plain


def biased_head() -> Claim:
    """The head differentiated through p log(p/q), the tail as a sampled log ratio without the +1: where it settles. Beside it the
    tail residual of training, in expectation over the sampled token."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    inside = torch.zeros(8, dtype=torch.bool)
    inside[teacher.topk(4).indices] = True
    logq = torch.log_softmax(teacher, -1)

    def loss(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        return head_by_autodiff(logp, logq, inside) + sampled_tail(logp, logq, ~inside)

    def residual(logits: Tensor) -> Tensor:
        return _with_residual(logits, teacher, 2)

    settled = settle(lambda z: -natural(_slope(loss, z), z), student, rate=0.3, steps=500)
    found = float(torch.softmax(settled, -1)[inside].sum())
    right = settle(lambda z: -natural(_slope(residual, z), z), student, rate=0.3, steps=500)
    mass = float(logq.exp()[inside].sum())
    law = (mass / e) / (mass / e + 1 - mass)
    true = slope(lambda z: plain_kl(z, logq.numpy()), student.numpy())
    parts = {
        "the law": abs(found - law) < 1e-6,
        "it is not the teacher": abs(law - mass) > 0.05,
        "the slope written out": gap(_slope(loss, student), _biased_slope(student, logq, inside)) < _EXACT,
        "with the residual: the slope of the KL": gap(_slope(residual, student), true) < _EXACT,
        "with the residual: the teacher": gap(torch.softmax(right, -1), logq.exp()) < 1e-6,
    }
    return Claim(
        "10", "a head by autodiff with a sampled tail is biased", "docs/concepts/objectives.md; four of eight tokens in the head",
        f"p(S) = (q_S / e) / (q_S / e + q_tail) = {law:.6f}; the teacher's is {mass:.4f}, and that of the tail residual",
        f"p(S) = {found:.6f}; with the residual {float(torch.softmax(right, -1)[inside].sum()):.6f}",
        all(parts.values()), {"law": law, "ascent": found, "teacher": mass}, parts,
    )  # fmt: skip


def head_by_autodiff(logp: Tensor, logq: Tensor, inside: Tensor) -> Tensor:
    """sum_S p log(p / q), differentiated through p."""
    return (logp.exp() * (logp - logq))[inside].sum()


def sampled_tail(logp: Tensor, logq: Tensor, outside: Tensor) -> Tensor:
    """The mean over a sampled token a of the tail of (log p_a - log q_a) log p_a, the first factor a constant."""
    constant = (logp.exp() * (logp - logq)).detach()
    return (constant * logp)[outside].sum()


def _biased_slope(student: Tensor, logq: Tensor, inside: Tensor) -> Tensor:
    """p_a (w_a - sum_b p_b w_b) with w_a = log p_a - log q_a, plus 1 in the head."""
    logp = torch.log_softmax(student, -1)
    weight = logp - logq + inside.double()
    return logp.exp() * (weight - logp.exp() @ weight)


def _with_residual(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """The loss of training on a support with the tail's residual, in expectation over the sampled token."""
    vocab = len(student)
    eye = torch.eye(vocab, dtype=torch.float64)
    chances = torch.softmax(student.detach(), -1)
    teachers = [TeacherStates(teacher.expand(vocab, -1), eye)]
    how = VocabularyLoss(top_k=k, tail_residual=True)
    return vocabulary_loss(student.expand(vocab, -1), eye, teachers, chances, how, sampled_ids=torch.arange(vocab))[0]


def k1(log_ratio: Tensor) -> Tensor:
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    return log_ratio.exp() - 1 - log_ratio


def k_estimators(instances: int = 5) -> Claim:
    """Expected values and gradients of k1, k2 and k3 differentiated through the sampled token's log-probability."""
    generator = torch.Generator().manual_seed(4)
    worst: dict[str, float] = {}
    for _ in range(instances):
        student, teacher = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        logq = log_softmax(teacher.numpy())
        p, q = np.exp(log_softmax(student.numpy())), np.exp(logq)
        reverse, forward = slope(lambda z, t=logq: plain_kl(z, t), student.numpy()), p - q
        values = {k: _expected_k(f, student, teacher) for k, f in (("k1", k1), ("k2", k2), ("k3", k3))}
        kl = float(plain_kl(student.numpy(), logq))
        found = {
            **{k: gap(values[k][1], g) for k, g in (("k1", 0.0 * reverse), ("k2", reverse), ("k3", forward))},
            "means of k1 and k3": max(abs(values[k][0] - kl) for k in ("k1", "k3")),
            "reverse_kl": max(
                abs(float(reverse_kl(student, teacher)) - kl),
                gap(_slope(lambda z, t=teacher: reverse_kl(z, t), student), reverse),
            ),
            "forward_kl": max(
                abs(float(forward_kl(student, teacher)) - float(q @ np.log(q / p))),
                gap(_slope(lambda z, t=teacher: forward_kl(z, t), student), forward),
            ),
        }
        worst = {name: max(worst.get(name, 0.0), off) for name, off in found.items()}
    parts = {name: off < 1e-12 for name, off in worst.items()}
    return Claim(
        "11", "differentiating k1, k2, k3", "docs/concepts/objectives.md; enumeration over six tokens",
        "k1: zero; k2: the reverse KL's gradient; k3: the forward KL's (to 1e-12), though k1 and k3 have the KL as their mean",
        "largest differences " + ", ".join(f"{name} {off:.1e}" for name, off in worst.items()),
        all(parts.values()), worst, parts,
    )  # fmt: skip


def _expected_k(k: Loss, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The mean of k over the sampled token, and the mean of its gradient."""
    logits = student.clone().requires_grad_()
    logp = torch.log_softmax(logits, -1)
    mean = logp.detach().exp() @ k(torch.log_softmax(teacher, -1) - logp)
    return float(mean.detach()), torch.autograd.grad(mean, logits)[0]
