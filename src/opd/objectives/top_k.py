"""Log-probabilities of a few ids at every state: what a teacher that names only its likeliest tokens is compared with."""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.objectives.tiles import blocks, soft_capped, tiles


def logprobs_at(
    hidden: Float[Tensor, "states width"],
    head: Float[Tensor, "vocab width"],
    ids: Int[Tensor, "states support"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_logits: int = 2**26,
) -> tuple[Float[Tensor, "states support"], Float[Tensor, " states"]]:
    """log softmax(hidden head^T / temperature) at `ids` [states, support], float32 or wider, and the entropy [states], which has no
    gradient. With a `softcap` c the logits are c tanh(hidden head^T / c) before the temperature.

    At most `max_logits` logits exist at once; the gradient makes them again, two products more than the one of the values.
    """
    return cast(tuple[Tensor, Tensor], _LogprobsAt.apply(hidden, head, ids, temperature, softcap, max_logits))


class _LogprobsAt(torch.autograd.Function):
    """d log p_i / d logits_a = 1[a = i] - p_a, so a gradient g_i makes g_a - p_a sum_i g_i."""

    @staticmethod
    def forward(ctx, hidden, head, ids, temperature, softcap, max_logits):  # type: ignore[override]  # torch declares (*args)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_empty(ids.shape, dtype=wide)
        entropy = hidden.new_empty(len(hidden), dtype=wide)
        for rows, [logits] in tiles([(hidden, head)], max_logits=max_logits):
            for place, which in blocks(rows, logits.shape[-1], logits.device):
                logp = (soft_capped(logits[place], softcap)[0] / temperature).log_softmax(-1)
                found[which] = logp.gather(-1, ids[which])
                entropy[which] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, head, ids)
        ctx.temperature, ctx.softcap, ctx.max_logits = temperature, softcap, max_logits
        ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[override]  # torch declares (*args)
        hidden, head, ids = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        for rows, [logits] in tiles([(hidden, head)], max_logits=ctx.max_logits):
            for place, which in blocks(rows, logits.shape[-1], logits.device):
                own, bend = soft_capped(logits[place], ctx.softcap)
                slope = (own / ctx.temperature).softmax(-1)
                slope.mul_(-grad[which].sum(-1, keepdim=True))
                slope.scatter_add_(-1, ids[which], grad[which])
                if bend is not None:
                    slope.mul_(bend)
                logits[place] = slope.div_(ctx.temperature).to(logits.dtype)
            if grad_hidden is not None:
                torch.mm(logits, head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(logits.T, hidden[rows])
        return grad_hidden, grad_head, None, None, None, None
