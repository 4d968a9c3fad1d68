"""Importance weights for rollouts that another policy sampled: an engine that rounds otherwise, or an older student.

w_t = pi(a_t|s_t) / pi_rollout(a_t|s_t), at one of three levels. Weights are constants (detached), exactly 0 off the mask,
and 1 where the two policies agree, so that on-policy every correction is the identity.
"""

from typing import Literal, TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor

from opd.objectives.reduce import masked

Level: TypeAlias = Literal["token", "geometric", "sequence"]


def importance_weights(
    student_logprobs: Float[Tensor, "batch tokens"],
    rollout_logprobs: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    level: Level = "token",
) -> Float[Tensor, "batch tokens"]:
    """The weight of every action, [batch, tokens].

    token: w_t. geometric: (prod_t w_t)^(1/|y|) on every action of the response. sequence: prod_t w_t on every action; the
    only one that corrects the visited states too, at a variance that grows with the length.
    """
    gap = masked(student_logprobs - rollout_logprobs, mask).detach()
    if level == "token":
        log_weight = gap
    else:
        total = gap.sum(-1, keepdim=True)
        if level == "geometric":
            total = total / mask.sum(-1, keepdim=True).clamp(min=1)
        log_weight = total.expand_as(gap)
    # e^40 is beyond any cap; the bound keeps inf * 0 out
    return masked(log_weight.clamp(max=40.0).exp(), mask)


def truncated(
    weights: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], cap: float = 2.0
) -> tuple[Float[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """(min(w, cap), mask): truncated importance sampling; every action stays. Source: Yao et al. 2025 (TIS)."""
    return masked(weights.clamp(max=cap), mask), mask


def rejected(
    weights: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    low: float = 0.5,
    high: float = 2.0,
) -> tuple[Float[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """(w where low <= w <= high else 0, the mask without the rejected actions): masked importance sampling.

    Rejected actions leave the normaliser too: take it over the returned mask. Source: Ling team 2025 (IcePop).
    """
    kept = mask & (weights >= low) & (weights <= high)
    return masked(weights, kept), kept
