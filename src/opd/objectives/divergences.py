"""Divergences per position over the full vocabulary, from logits."""

import torch
from jaxtyping import Float
from torch import Tensor


def reverse_kl(
    student_logits: Float[Tensor, "*positions vocab"],
    teacher_logits: Float[Tensor, "*positions vocab"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*positions"]:
    """KL(student, teacher) = sum_a p_a (log p_a - log q_a): logits [..., vocab] -> [...], nats, differentiable.

    At least 0, 0 where the two are equal, unchanged when a constant is added to either's logits; tokens to which the
    student gives no probability contribute nothing. This is the dense form; training uses `losses.exact_reverse_kl`.
    """
    logp = torch.log_softmax(student_logits / temperature, dim=-1)
    logq = torch.log_softmax(teacher_logits / temperature, dim=-1)
    p = logp.exp()
    gap = torch.where(p > 0, logp, 0.0) - torch.where(p > 0, logq, 0.0)
    return (p * gap).sum(-1)
