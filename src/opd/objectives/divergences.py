"""Divergences per position, from logits over the full vocabulary or from log-probabilities on a support."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from opd.objectives.target import raised


def reverse_kl(
    student_logits: Float[Tensor, "*positions vocab"],
    teacher_logits: Float[Tensor, "*positions vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*positions"]:
    """KL(student, teacher) = sum_a p_a (log p_a - log q_a).

    It is at least 0, and 0 where both are equal. A constant added to all logits of one model changes nothing. Tokens without
    probability under the student contribute nothing. This is the dense form; training uses `opd.objectives.vocabulary`.

    Args:
        student_logits: [..., vocab].
        teacher_logits: [..., vocab].
        temperature: Divides both.

    Returns:
        [...], nats, differentiable.
    """
    return _kl(torch.log_softmax(student_logits / temperature, -1), torch.log_softmax(teacher_logits / temperature, -1))


def forward_kl(
    student_logits: Float[Tensor, "*positions vocab"],
    teacher_logits: Float[Tensor, "*positions vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*positions"]:
    """KL(teacher, student) = sum_a q_a (log q_a - log p_a).

    It makes the student cover everything that the teacher does; the reverse KL makes it keep to likely actions. Arguments, result
    and laws are those of `reverse_kl`.
    """
    return _kl(torch.log_softmax(teacher_logits / temperature, -1), torch.log_softmax(student_logits / temperature, -1))


def jsd(
    student_logits: Float[Tensor, "*positions vocab"],
    teacher_logits: Float[Tensor, "*positions vocab"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "*positions"]:
    """beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p, student p and teacher q.

    It is symmetric at beta = 1/2, where it is at most log 2. Divided by beta it tends to the forward KL as beta tends to 0. Divided
    by 1 - beta it tends to the reverse KL as beta tends to 1. Other arguments and the result are those of `reverse_kl`.

    Raises:
        ValueError: For a beta outside (0, 1).

    Source: Agarwal et al. 2024 (GKD), equation (1).
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie in (0, 1), got {beta}; its ends are forward_kl and reverse_kl")
    logp = torch.log_softmax(student_logits / temperature, -1)
    logq = torch.log_softmax(teacher_logits / temperature, -1)
    logm = mixture(logp, logq, beta)
    return beta * _kl(logq, logm) + (1.0 - beta) * _kl(logp, logm)


def mixture(
    logp: Float[Tensor, "*positions vocab"], logq: Float[Tensor, "*positions vocab"], beta: float
) -> Float[Tensor, "*positions vocab"]:
    """log(beta q + (1 - beta) p), from log-probabilities [..., vocab]."""
    shares = torch.tensor([1.0 - beta, beta], dtype=logp.dtype, device=logp.device).log()
    return torch.logaddexp(logp + shares[0], logq + shares[1])


def top_k_reverse_kl(
    student_top_k_logprobs: Float[Tensor, "*positions support"],
    teacher_top_k_logprobs: Float[Tensor, "*positions support"],
    *,
    logprob_floor: float = -50.0,
    rounding: float = 1.0,
) -> Float[Tensor, "*positions"]:
    """The reverse KL with all tokens off the support as one bucket, [...], nats.

        sum_S p_a sg(log p_a - log q_a) + p_tail sg(log p_tail - log q_tail),  p_tail = 1 - sum_S p_a

    It is a lower bound of `reverse_kl` (data processing), equal to it on the whole vocabulary, and it grows with the support. The
    coefficients carry no gradient (sg). The gradient is that of the bucketed KL all the same, because the probabilities of the
    buckets sum to one. Renormalising over the support, or leaving out the tail, has other stationary points and is not offered.

    Args:
        student_top_k_logprobs: [..., k], log-probabilities on the support.
        teacher_top_k_logprobs: [..., k], constants.
        logprob_floor: Log-probabilities of the teacher, and of its tail, are raised to it.
        rounding: The result and its gradient are 0 where both differ by at most this factor times the `resolution`.
    """
    logp, logq = student_top_k_logprobs, teacher_top_k_logprobs.detach()
    p, eps = logp.exp(), torch.finfo(logp.dtype).eps
    gap = torch.where(p > 0, logp, 0.0).detach() - raised(logq, logprob_floor)
    log_tail_q = tail_logprob(logq, logprob_floor=logprob_floor)
    tail_p = 1.0 - p.sum(-1)
    left = tail_p.detach()
    tail_gap = torch.where(left > 4 * eps, left.log() - log_tail_q, 0.0)
    found = (p * gap).sum(-1) + tail_p * tail_gap
    # one minus a sum has an error that a small tail's logarithm magnifies
    sure = torch.where(left * tail_gap.abs() > 32 * eps, tail_gap, 0.0)
    every, gaps = torch.cat([p.detach(), left[..., None]], -1), torch.cat([gap, sure[..., None]], -1)
    mean = found.detach()
    return found * resolved(every, gaps - mean[..., None], mean, resolution(p.dtype) * rounding)


def tail_logprob(
    logprobs_at_top_k: Float[Tensor, "*positions support"], *, logprob_floor: float = -50.0
) -> Float[Tensor, "*positions"]:
    """log(1 - sum of the probabilities on the support), at least `logprob_floor`: [..., k] -> [...]."""
    inside = logprobs_at_top_k.double().exp().sum(-1)
    tail = raised((1.0 - inside).clamp(min=0.0).log(), logprob_floor)
    return tail.to(logprobs_at_top_k.dtype)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """sum p (log p - log q); what p gives no probability contributes nothing."""
    p = logp.exp()
    gap = torch.where(p > 0, logp, 0.0) - torch.where(p > 0, logq, 0.0)
    return (p * gap).sum(-1)


def resolution(dtype: torch.dtype) -> float:
    """The largest log ratio, in nats, that rounding alone may cause between two passes of one model.

    It is 1e-4 in float32, where SmolLM2-135M differs by at most 4e-5; this corresponds to a KL of 5e-9 nats. Adam divides a
    gradient by its own size, so it would follow rounding errors at the full learning rate.

    Args:
        dtype: float32 or wider.
    """
    return 1e-4 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def magnified(temperature: float, weights: Sequence[float] = (1.0,)) -> float:
    """The factor by which a temperature and a target of several models make rounding of a log ratio larger.

    The errors of the student and of each model add up, and a temperature below 1 divides them.

    Args:
        temperature: Of both distributions.
        weights: Of the models of the target.
    """
    return max(1.0, (1.0 + sum(map(abs, weights))) / 2.0) / min(1.0, temperature)


def resolved(p: Tensor, centred: Tensor, mean: Tensor, most: float) -> Tensor:
    """1 at each state where student and teacher differ by more than rounding, and 0 elsewhere: [...] in the dtype of `p`.

    They differ if the mean of the log ratios under p, or their standard deviation (which the gradient of the KL has), exceeds
    `most`.

    Args:
        p: [..., vocab], the student's probabilities.
        centred: [..., vocab], log ratios minus their mean under p.
        mean: [...], that mean.
        most: The bound in nats.
    """
    differ = mean.abs() > most
    # a CPU saves passes by asking; an accelerator would have to wait for the answer
    asked = ~differ if p.device.type == "cpu" else ...
    spread = torch.linalg.vecdot(p[asked] * centred[asked], centred[asked])
    differ[asked] = differ[asked] | (spread > most**2)
    return differ.to(p.dtype)
