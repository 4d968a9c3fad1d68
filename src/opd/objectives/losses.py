"""Losses to minimise. Arguments have the shape [batch, tokens]; a loss is a scalar.

Only `student_logprobs` carry a gradient; advantages are constants. `opd.objectives.vocabulary` holds the losses over the whole
vocabulary; `exact_reverse_kl` is one of them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.objectives.reduce import Normalizer, denominator, masked
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss


def reinforce(
    student_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    normalizer: Normalizer = "trajectory",
    *,
    divisor: float | None = None,
) -> Float[Tensor, ""]:
    """The policy-gradient loss: -sum_t A_t log pi(a_t | s_t), divided by the normaliser.

    Args:
        student_logprobs: Log-probabilities of the sampled tokens.
        advantages: Advantages of these tokens.
        mask: The tokens that train.
        normalizer: "trajectory" or "token": the count that divides the sum.
        divisor: Replaces that count if this is a part of a larger batch. The losses of the parts then sum to that of the whole.

    Source: equation (6).
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
    clip_dual: float | None = None,
    divisor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate: -sum_t min(w_t A_t, clip(w_t, 1 - clip_low, 1 + clip_high) A_t), w_t = pi / pi_rollout.

    At w = 1 its gradient is that of `reinforce`.

    Args:
        student_logprobs: Log-probabilities of the sampled tokens under the student.
        rollout_logprobs: The same under the policy that sampled them.
        advantages: Advantages of these tokens.
        mask: The tokens that train.
        clip_low: Ratios below 1 - clip_low are clipped.
        clip_high: Ratios above 1 + clip_high are clipped.
        clip_dual: Above 1: a negative advantage counts at most so many times, so that a token that became far likelier since it
            was sampled cannot take over the batch.
        divisor: Divides the sum; by default the number of trajectories.

    Returns:
        (loss, number of tokens at which a clip removed the gradient).

    Raises:
        ValueError: For a dual clip of 1 or less.

    Source: Schulman et al. 2017, equation (7); asymmetric clip: Yu et al. 2025 (DAPO); dual clip: Ye et al. 2020.
    """
    if clip_dual is not None and clip_dual <= 1.0:
        raise ValueError(f"clip_dual must be above 1, got {clip_dual}")
    # Off the mask both are set equal so that no exponential can overflow there.
    log_weight = masked(student_logprobs - rollout_logprobs.detach(), mask)
    # e^20 is far beyond any clip; without the bound an overflow times an advantage of 0 would be no number.
    weight = log_weight.clamp(max=20.0).exp()
    advantages = masked(advantages.detach(), mask)
    plain = weight * advantages
    clipped = weight.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    surrogate = torch.minimum(plain, clipped)
    inactive = clipped < plain
    if clip_dual is not None:
        bound = torch.where(advantages < 0, clip_dual * advantages, -torch.inf)
        inactive = inactive | (bound > surrogate)
        surrogate = torch.maximum(surrogate, bound)
    total = masked(surrogate, mask).sum()
    num_clipped = (inactive & mask).sum()
    return -total / (divisor if divisor is not None else denominator(mask)), num_clipped


def exact_reverse_kl(
    student_hidden: Float[Tensor, "states width"],
    student_head: Float[Tensor, "vocab width"],
    teacher_hidden: Float[Tensor, "states teacher_width"],
    teacher_head: Float[Tensor, "vocab teacher_width"],
    weights: Float[Tensor, " states"],
    *,
    temperature: float = 1.0,
    logprob_floor: float = -50.0,
    max_logits: int = 2**26,
) -> tuple[Float[Tensor, ""], Float[Tensor, " states"], Float[Tensor, " states"], Float[Tensor, " states"]]:
    """sum_i weights_i KL(student_i, teacher_i) over the full vocabulary, without logits of shape [states, vocab].

    The immediate term integrated over the action: its gradient has the mean g1 of the sampled immediate log ratio, without the
    variance of the draw and without the future part of grad V. Memory is O(max_logits + states * width).

    Args:
        student_hidden: [states, width]; may require a gradient.
        student_head: [vocab, width]; may require a gradient.
        teacher_hidden: [states, teacher_width], constants.
        teacher_head: [vocab, teacher_width], constants.
        weights: [states], the weight of each state in the loss: 1 / normaliser, times its multiplicity.
        temperature: Divides the logits of both.
        logprob_floor: Lower log-probabilities of the teacher are raised to it (`opd.objectives.target`).
        max_logits: The most logits of one model that exist at once.

    Returns:
        (loss, reverse_kl, the student's entropy, its probability of floored tokens). The last three are [states] and detached.

    Source: section 1.3 (g1).
    """
    how = VocabularyLoss(temperature=temperature, logprob_floor=logprob_floor, max_logits=max_logits)
    teachers = [TeacherStates(teacher_hidden, teacher_head)]
    loss, stats = vocabulary_loss(student_hidden, student_head, teachers, weights, how)
    return loss, stats.reverse_kl, stats.entropy, stats.floored
