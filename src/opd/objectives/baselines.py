"""Baselines: what is subtracted from an advantage without changing the mean of its policy gradient.

A baseline may depend on the state, and on the other samples of its prompt, but not on the action that it is subtracted
from. Shapes and laws as in `advantages`: results are detached and exactly 0 off the mask.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.objectives.reduce import masked


def leave_one_out(
    advantages: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    group_ids: Int[Tensor, " batch"],
    *,
    per: Literal["step", "prompt"] = "step",
    actions: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The mean advantage of the other samples of the group, an estimate of V(s_t) from independent responses.

    per "step": of the others' t-th actions, among those that have one. Steps count actions, so observations between turns
        do not shift them.
    per "prompt": of all their actions; the same number at every step of a response.

    0 where no other sample says anything: a group of one, or a response longer than the others'.

    Args: advantages, mask [batch, tokens]; group_ids [batch] integers, equal for samples of one prompt; actions [batch, tokens]:
    what counts as a step, where some actions have no advantage (default: the mask).
    """
    # Summed in float64: a sample's own part is taken out of the sum again.
    values = masked(advantages, mask).detach().double()
    _, group = torch.unique(group_ids, return_inverse=True)
    num_groups = int(group.max()) + 1 if len(group) else 0
    if per == "prompt":
        own, count = values.sum(-1), mask.sum(-1).double()
        total = values.new_zeros(num_groups).index_add(0, group, own)[group] - own
        others = values.new_zeros(num_groups).index_add(0, group, count)[group] - count
        found = (total / others.clamp(min=1)).unsqueeze(-1).expand_as(values)
        return masked(found, mask).to(advantages.dtype)
    # action[b, t]: how many actions row b has before token t
    action = ((mask if actions is None else actions).long().cumsum(-1) - 1).clamp(min=0)
    cell = group.unsqueeze(-1) * max(1, mask.shape[1]) + action
    size = num_groups * max(1, mask.shape[1])
    total = values.new_zeros(size).index_add(0, cell[mask], values[mask])
    count = values.new_zeros(size).index_add(0, cell[mask], torch.ones_like(values[mask]))
    found = (total[cell] - values) / (count[cell] - 1).clamp(min=1)
    return masked(found, mask & (count[cell] > 1)).to(advantages.dtype)


def negative_kl(
    reverse_kl: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """The mean of the log ratio at the state: b(s_t) = E_a[r_a | s_t] = -KL_t.

    Centres the sampled immediate term. It lowers the variance iff 0 < KL_t < -2 b* with b* of `score_weighted`, so not
    always (identity 1 of docs/concepts/objectives.md).
    """
    return masked(-reverse_kl, mask).detach()


def score_weighted(
    student_logits: Float[Tensor, "*positions vocab"], teacher_logits: Float[Tensor, "*positions vocab"]
) -> Float[Tensor, "*positions"]:
    """The baseline of least variance for the sampled immediate term: b* = sum_a pi_a r_a n_a / sum_a pi_a n_a, [...].

    n_a = 1 - 2 pi_a + ||pi||^2 is the squared norm of the score of action a in logit space. Detached; 0 where the
    student is certain, since there no action has a score. Divide logits by the temperature before.
    """
    logp = torch.log_softmax(student_logits.detach(), dim=-1)
    logq = torch.log_softmax(teacher_logits.detach(), dim=-1)
    return score_weighted_mean(logp, logq)


def score_weighted_mean(logp: Float[Tensor, "*positions vocab"], logq: Float[Tensor, "*positions vocab"]) -> Tensor:
    """`score_weighted` from log-probabilities; `logq` may be unnormalised."""
    p = logp.exp()
    weight = p * (1.0 - 2.0 * p + (p * p).sum(-1, keepdim=True)).clamp(min=0.0)
    ratio = torch.where(p > 0, logq - torch.where(p > 0, logp, 0.0), 0.0)
    total = weight.sum(-1)
    return torch.where(total > 0, (weight * ratio).sum(-1) / total.clamp(min=torch.finfo(p.dtype).tiny), 0.0)
