"""Advantages of the sampled tokens, and of the verified reward.

`log_ratio` is r_t = teacher_logprobs - student_logprobs of the sampled token, in nats. Results are detached and exactly 0 off the
mask. Discounts count actions: tokens off the mask (a prompt, an observation between turns) neither discount nor contribute.

With a teacher of another tokenizer an action is a chunk: neighbouring tokens with one number in `chunks` [batch, tokens]. The
teacher's log-probability of the chunk stands at its last token and is 0 at the others, so that the log ratios of its tokens sum
to the chunk's own. A token is credited with the open rest of its chunk, log q(chunk) - sum_{i' >= i} log pi_i', because the
tokens before it are given. A discount counts chunks.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.objectives.divergences import resolution
from opd.objectives.reduce import masked


def above_rounding(
    log_ratio: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], rounding: float = 1.0
) -> Float[Tensor, "batch tokens"]:
    """The log ratios without rounding errors: 0 in each row in which none exceeds the `resolution`.

    In such a row student and teacher are one model.

    Args:
        log_ratio: [batch, tokens], nats.
        mask: [batch, tokens].
        rounding: A factor of the resolution (`divergences.magnified`).
    """
    differ = (masked(log_ratio, mask).abs() > rounding * resolution(log_ratio.dtype)).any(-1, keepdim=True)
    return log_ratio * differ


def immediate(
    log_ratio: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    chunks: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The log ratio of the token itself: A_t = r_t. In a chunk: of the token and the chunk's later ones.

    Its policy gradient has the mean g1 = -sum_s d(s) grad KL_s. It lacks g2, the gradient of the state occupancy, so it is biased
    for grad V. Its variance is low.

    Source: section 1.3, equation (7).
    """
    return log_ratio_to_go(log_ratio, mask, 0.0, chunks)


def full_trajectory(
    log_ratio: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """The log ratio of the whole response on every token: A_t = sum_{t'} r_t'.

    Its policy gradient has the mean grad V and the highest variance of all: everything before an action is noise to it.

    Source: Theorem 1 (i), log(pi_T(y|x) / pi(y|x)).
    """
    rewards = masked(log_ratio, mask).detach()
    return masked(rewards.sum(dim=-1, keepdim=True).expand_as(rewards), mask)


def log_ratio_to_go(
    log_ratio: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    discount: float = 1.0,
    chunks: Int[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """The discounted sum of this and later log ratios: A_t = sum_{t' >= t} discount^(t' - t) r_t'.

    With discount 1 its policy gradient has the mean grad V. With discount 0 it is `immediate`.

    Raises:
        ValueError: For a discount outside [0, 1].

    Source: Theorem 1 (ii).
    """
    rewards = masked(log_ratio, mask).detach()
    return rewards + _later(rewards, mask, discount, chunks)


def whole_chunks(
    advantages: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], chunks: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Every token of a chunk with the advantage of the chunk's first token ("full" credit).

    It is noisier than the causal credit: the tokens before a token are given when it is chosen, so their cost is noise to it.
    """
    found = masked(advantages, mask).detach()
    for t in range(1, found.shape[1]):
        inside = mask[:, t] & mask[:, t - 1] & (chunks[:, t] == chunks[:, t - 1])
        found[:, t] = torch.where(inside, found[:, t - 1], found[:, t])
    return found


def kl_to_go(
    log_ratio: Float[Tensor, "batch tokens"],
    reverse_kl: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    discount: float = 1.0,
) -> Float[Tensor, "batch tokens"]:
    """This log ratio minus the KLs of later states: A_t = r_t - sum_{t' > t} discount^(t' - t) KL_t'.

    KL_t = KL(pi(.|s_t), pi_T(.|s_t)) = -E_a[r_a | s_t]. The future part is integrated over the action, so the mean is that of
    `log_ratio_to_go` with less noise.

    Raises:
        ValueError: For a discount outside [0, 1].

    Source: Theorem 1 (iv).
    """
    return immediate(log_ratio, mask) + future_kl(reverse_kl, mask, discount)


def future_kl(
    reverse_kl: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"], discount: float = 1.0
) -> Float[Tensor, "batch tokens"]:
    """The future part alone: A_t = -sum_{t' > t} discount^(t' - t) KL_t'.

    It belongs to the exact immediate term, which has the immediate part already: at discount 1 the two together have the mean
    grad V. It is never positive where `reverse_kl` is a KL, so it needs a baseline.

    Raises:
        ValueError: For a discount outside [0, 1].
    """
    return _later(masked(-reverse_kl, mask).detach(), mask, discount)


def _later(values: Tensor, mask: Tensor, discount: float, chunks: Tensor | None = None) -> Tensor:
    """sum_{t' > t} discount^(t' - t) values_t' over the actions, [batch, tokens]; `values` is 0 off the mask.

    With `chunks` the exponent counts the chunks that begin in between.
    """
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount must lie in [0, 1], got {discount}")
    later = torch.zeros_like(values)
    if discount == 0.0 and chunks is None:
        return later
    running = values.new_zeros(len(values))
    following = None if chunks is None else torch.full_like(chunks[:, 0], -1)  # the chunk of the next action
    for t in range(values.shape[1] - 1, -1, -1):
        carried = discount * running
        if chunks is not None and following is not None:
            carried = torch.where(chunks[:, t] == following, running, carried)
            following = torch.where(mask[:, t], chunks[:, t], following)
        later[:, t] = carried
        running = torch.where(mask[:, t], values[:, t] + carried, running)
    return masked(later, mask)


def reward_advantages(
    rewards: Float[Tensor, " batch"],
    group_ids: Int[Tensor, " batch"],
    baseline: Literal["leave_one_out", "group_mean", "grpo", "none"] = "leave_one_out",
) -> Float[Tensor, " batch"]:
    """The advantage of a whole response from its verified reward.

    - leave_one_out: R_i - mean of the other rewards of the group; 0 in a group of one.
    - group_mean: R_i - mean of the group, which is (n - 1) / n times leave_one_out.
    - grpo: group_mean divided by (standard deviation of the group + 1e-6).
    - none: R_i.

    Args:
        rewards: [batch].
        group_ids: [batch] integers, equal for the samples of one prompt.
        baseline: One of the four.

    Returns:
        [batch], detached.
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
