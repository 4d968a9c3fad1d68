"""Log-probabilities of given tokens, from logits or from hidden states and a head."""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.objectives.tiles import blocks, soft_capped, tiles


def gather_logprobs(
    logits: Float[Tensor, "*positions vocab"], token_ids: Int[Tensor, "*positions"], *, temperature: float = 1.0
) -> Float[Tensor, "*positions"]:
    """log softmax(logits / temperature)[token]: logits [..., vocab], token_ids [...] -> [...], float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    chosen = wide.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - wide.logsumexp(dim=-1)


def token_logprobs(
    hidden: Float[Tensor, "states width"],
    head: Float[Tensor, "vocab width"],
    token_ids: Int[Tensor, " states"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_logits: int = 2**26,
) -> Float[Tensor, " states"]:
    """The same from hidden states [states, hidden] and a head [vocab, hidden], token_ids [states] -> [states]. The logits are
    c tanh(hidden head^T / c) with a `softcap` c.

    At most `max_logits` logits exist at once. The gradient to the hidden states is formed with the logits, in one pass; that to
    the head, where it is asked for, takes another.
    """
    return cast(Tensor, _TokenLogprobs.apply(hidden, head, token_ids, temperature, softcap, max_logits))


class _TokenLogprobs(torch.autograd.Function):
    """d log p_token / d logits_a = 1[a = token] - p_a."""

    @staticmethod
    def forward(ctx, hidden, head, token_ids, temperature, softcap, max_logits):  # type: ignore[override]  # torch declares (*args)
        found = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows, [logits] in tiles([(hidden, head)], max_logits=max_logits):
            for place, which in blocks(rows, logits.shape[-1], logits.device):
                found[which] = _slopes_in_place(
                    logits[place], token_ids[which], temperature, softcap, wanted=slopes is not None
                )
            if slopes is not None:
                torch.mm(logits, head, out=slopes[rows])
        ctx.save_for_backward(slopes, hidden, head, token_ids)
        ctx.temperature, ctx.softcap, ctx.max_logits = temperature, softcap, max_logits
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        slopes, hidden, head, token_ids = ctx.saved_tensors
        grad_hidden = None if slopes is None else slopes * grad[:, None].to(slopes.dtype)
        grad_head = None
        if ctx.needs_input_grad[1]:
            grad_head = torch.zeros_like(head)
            for rows, [logits] in tiles([(hidden, head)], max_logits=ctx.max_logits):
                for place, which in blocks(rows, logits.shape[-1], logits.device):
                    _slopes_in_place(logits[place], token_ids[which], ctx.temperature, ctx.softcap, wanted=True)
                grad_head.addmm_(logits.T, hidden[rows] * grad[rows, None].to(hidden.dtype))
        return grad_hidden, grad_head, None, None, None, None


def _slopes_in_place(
    logits: Tensor, token_ids: Tensor, temperature: float, softcap: float | None, *, wanted: bool
) -> Tensor:
    """The tokens' log-probabilities [states]; if `wanted`, their gradients take the place of the logits [states, vocab]."""
    wide, bend = soft_capped(logits, softcap)
    if temperature != 1.0:
        wide = wide / temperature
    place = token_ids.unsqueeze(-1)
    total = wide.logsumexp(-1, keepdim=True)
    found = (wide.gather(-1, place) - total).squeeze(-1)
    if wanted:
        slope = (wide - total).exp_().neg_()
        slope.scatter_add_(-1, place, torch.ones_like(total))
        if bend is not None:
            slope.mul_(bend)
        logits.copy_(slope if temperature == 1.0 else slope.div_(temperature))
    return found
