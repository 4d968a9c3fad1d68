"""Gradients of every weight that trains, by opd's passes and by the model's own over one sequence after the other."""

import torch
from torch import Tensor

from opd.models.architecture import causal_model
from opd.models.attention import own_attention
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.objectives.logprobs import token_logprobs

SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [5, 6, 7, 20, 21], [30], [5, 6, 7, 8, 9, 10]]


def gradients(network: Network, *, by_passes: bool) -> dict[str, Tensor]:
    """Of weighted log-probabilities of all tokens, for every weight that trains."""
    [(_, tree)] = pack_trees(SEQUENCES, max_tokens=100)
    total = torch.zeros(())
    hidden = network.hidden_states(tree) if by_passes else torch.empty(0)
    for i, (sequence, path) in enumerate(zip(SEQUENCES, tree.paths, strict=True)):
        targets = torch.tensor([*sequence[1:], sequence[0]])
        if by_passes:
            states, head = hidden[torch.from_numpy(path)], network.head_weight()
            found = token_logprobs(states, head, targets, temperature=0.8, softcap=network.softcap)
        else:
            with own_attention(network.base):
                logits = causal_model(network.base)(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
            found = (logits / 0.8).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        total = total + (found * torch.linspace(-1.0, 2.0 + i, len(found))).sum()
    named = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(named, grads, strict=True)}
