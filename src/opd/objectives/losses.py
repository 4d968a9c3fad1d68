"""Losses to descend. Shapes: student_logprobs, rollout_logprobs, advantages, mask [batch, tokens]; results are scalars.

Only `student_logprobs` (or hidden states and head) carry a gradient; advantages are taken as constants.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.objectives.reduce import Normalizer, denominator, masked


def reinforce(
    student_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    normalizer: Normalizer = "trajectory",
    *,
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """The policy-gradient loss: -sum_t A_t log pi(a_t | s_t), divided by the normaliser.

    `divisor` replaces the normaliser's own count where this is a part of a larger batch; the sum over the parts is then
    the loss of the whole. Source: equation (6).
    """
    total = (masked(advantages.detach(), mask) * masked(student_logprobs, mask)).sum()
    return -total / (divisor if divisor is not None else denominator(mask, normalizer))


def ppo(
    student_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    *,
    normalizer: Normalizer = "trajectory",
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate: -sum_t min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t), w_t = pi / pi_rollout.

    At w = 1 its gradient is that of `reinforce`. Returns (loss, the number of tokens where the clip removed the gradient).
    Source: Schulman et al. 2017, equation (7); asymmetric clip: Yu et al. 2025 (DAPO).
    """
    # Off the mask both are set equal so that no exponential can overflow there.
    log_weight = masked(student_logprobs - rollout_logprobs.detach(), mask)
    # e^20 is far beyond any clip; without the bound an overflow times an advantage of 0 would be no number.
    weight = log_weight.clamp(max=20.0).exp()
    advantages = masked(advantages.detach(), mask)
    plain = weight * advantages
    clipped = weight.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    total = masked(torch.minimum(plain, clipped), mask).sum()
    num_clipped = ((clipped < plain) & mask).sum()
    return -total / (divisor if divisor is not None else denominator(mask, normalizer)), num_clipped


def exact_reverse_kl(
    student_hidden: Float[Tensor, "states width"],
    student_head: Float[Tensor, "vocab width"],
    teacher_hidden: Float[Tensor, "states teacher_width"],
    teacher_head: Float[Tensor, "vocab teacher_width"],
    weights: Float[Tensor, " states"],
    *,
    temperature: float = 1.0,
    logprob_floor: float = -50.0,
    max_logits: int = 2**24,
) -> tuple[Float[Tensor, ""], Float[Tensor, " states"], Float[Tensor, " states"], Float[Tensor, " states"]]:
    """sum_i weights_i KL(student_i, teacher_i) over the full vocabulary, without ever holding [states, vocab] logits.

    The immediate term integrated over the action: its gradient has the mean g1 of the sampled immediate log ratio and
    none of the variance of drawing the action. One pass over chunks of states; gradients are formed in the same pass from
    the closed form d KL / d logits = p (log p - log q - KL), so memory is O(max_logits + states * hidden).

    Args:
        student_hidden: [states, hidden]; student_head: [vocab, hidden]; both may require gradients.
        teacher_hidden: [states, teacher_hidden]; teacher_head: [vocab, teacher_hidden]; constants.
        weights: [states], the weight of each state in the loss (1 / normaliser, times its multiplicity).
        logprob_floor: teacher log-probabilities below it are raised to it, so that a zero gives a finite KL.
        max_logits: how many logits of one model may exist at once.

    Returns:
        (loss, reverse_kl [states], entropy [states] of the student, floored [states]: the student's probability mass on
        tokens whose teacher log-probability was floored); the last three detached.

    Does not include the future part of grad V. Source: section 1.3 (g1).
    """
    return _ExactReverseKl.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, weights, (temperature, logprob_floor, max_logits)
    )  # type: ignore[return-value]


class _ExactReverseKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, weights, options):  # type: ignore[override]
        temperature, floor, max_logits = options
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head) if need_head else None
        kl, entropy, floored = (hidden.new_zeros(len(hidden), dtype=_wide(hidden)) for _ in range(3))
        for rows in torch.arange(len(hidden), device=hidden.device).split(max(1, max_logits // len(head))):
            logp = _log_softmax(hidden[rows] @ head.T, temperature)
            logq = _log_softmax(teacher_hidden[rows] @ teacher_head.T, temperature)
            p = logp.exp()
            if bool((logq < floor).any()):
                floored[rows] = (p * (logq < floor)).sum(-1)
                logq = logq.clamp(min=floor)
            entropy[rows] = -(p * logp).sum(-1)
            gap = logp.sub_(logq)
            kl[rows] = (p * gap).sum(-1)
            if need_hidden or need_head:
                grad = p.mul_(gap.sub_(kl[rows, None])).mul_((weights[rows] / temperature)[:, None]).to(head.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_head is not None:
                    grad_head.addmm_(grad.T, hidden[rows])
        ctx.gradients = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(kl, entropy, floored)
        return (kl * weights).sum(), kl, entropy, floored

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[override]
        scaled = tuple(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return *scaled, None, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    """float32 or wider: reductions over a vocabulary are never done in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits.to(_wide(logits)) / temperature, dim=-1)
