"""Per-token advantages of on-policy distillation, and the outcome's.

Shapes: log_ratio, mask [batch, tokens]; log_ratio r_t = teacher_logprobs - student_logprobs of the sampled token, in
nats. Results are detached and exactly 0 off the mask. Discounts count actions: tokens off the mask (a prompt, an
observation between turns) neither discount nor contribute.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.objectives.reduce import masked


def immediate(
    log_ratio: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """The log ratio of the token itself: A_t = r_t.

    Its policy gradient has mean g1 = -sum_s d(s) grad KL_s and misses g2, the gradient of the state occupancy; biased for
    grad V, of low variance. Source: section 1.3, equation (7).
    """
    return masked(log_ratio, mask).detach()


def log_ratio_to_go(
    log_ratio: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], discount: float = 1.0
) -> Float[Tensor, "batch tokens"]:
    """The discounted sum of this and later log ratios: A_t = sum_{t' >= t} discount^(t' - t) r_t'.

    With discount 1 its policy gradient has mean grad V (Theorem 1, ii); with discount 0 it is `immediate`.
    Raises ValueError for a discount outside [0, 1].
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    rewards = masked(log_ratio, mask).detach()
    if discount == 0.0:
        return rewards
    to_go = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.sum(-1)
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = torch.where(mask[:, t], rewards[:, t] + discount * running, running)
        to_go[:, t] = running
    return masked(to_go, mask)


def outcome(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    baseline: Literal["leave_one_out", "group_mean", "grpo", "none"] = "leave_one_out",
) -> Float[Tensor, " batch"]:
    """The advantage of a whole response from its verified reward, [batch].

    leave_one_out: R_i - mean of the other rewards of the group (0 for a group of one: nothing to compare with).
    group_mean: R_i - mean of the group, (n-1)/n times leave_one_out.
    grpo: group_mean divided by the group's standard deviation + 1e-6.
    none: R_i.

    Args: rewards [batch]; group_ids [batch] integers, equal for samples of one prompt.
    """
    rewards = rewards.detach()
    if baseline == "none":
        return rewards.clone()
    _, group = torch.unique(group_ids, return_inverse=True)
    num_groups = int(group.max()) + 1 if len(group) else 0
    zeros = rewards.new_zeros(num_groups)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    # Summed in float64: the rounding of a float32 mean, divided by a deviation of 0, would be an advantage.
    total = zeros.double().index_add(0, group, rewards.double())
    centred = (rewards.double() - (total / count)[group]).to(rewards.dtype)
    if baseline == "group_mean":
        return centred
    if baseline == "grpo":
        variance = zeros.index_add(0, group, centred**2) / count
        return centred / (variance.sqrt()[group] + 1e-6)
    others = (count - 1).clamp(min=1)
    return centred * (count / others)[group]
