"""Log-probabilities of given tokens, from logits or from hidden states and a head."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    max_logits: int = 2**24,
) -> Float[Tensor, " states"]:
    """The same from hidden states [states, hidden] and a head [vocab, hidden], token_ids [states] -> [states].

    At most `max_logits` logits exist at once; with gradients each chunk is recomputed in the backward pass.
    """

    def of_chunk(chunk: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return gather_logprobs(chunk @ weight.T, ids, temperature=temperature)

    size = max(1, max_logits // len(head))
    parts = []
    for chunk, ids in zip(hidden.split(size), token_ids.split(size), strict=True):
        if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
            parts.append(checkpoint(of_chunk, chunk, head, ids, use_reentrant=False))
        else:
            parts.append(of_chunk(chunk, head, ids))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
