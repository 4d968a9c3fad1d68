"""From a packed batch to its advantages: masks, corrections, baselines. Pure functions of (config, batch).

A new type of objective is a name in `opd.config.objective`, a case of `_distillation` here, and its formula in
`opd.objectives.advantages`.
"""

from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from opd.batch import Batch
from opd.config import Config, CorrectionConfig, ObjectiveConfig
from opd.metrics import Max, Metrics, Sum, mean_of
from opd.objectives import advantages as adv
from opd.objectives import baselines, corrections
from opd.objectives.divergences import magnified
from opd.objectives.reduce import denominator, without_errors


def compute_advantages(config: Config, batch: Batch) -> tuple[Batch, Metrics]:
    """The batch with its masks and advantages, and what was left out of it.

    Rows are episodes: sums to go, baselines, sequence weights and masks run over all parts of one.
    A_t = w_t (coef_d A_t^distill / N_d + coef_o A^reward / N_o) N_d: the distillation part on `distill_mask`, whose normaliser is
    N_d, the reward part on `reward_mask`, whose normaliser is N_o; w_t is the correction's weight. The learner divides by N_d
    (`divisor`). Advantages are None when there is no sampled term. Raises ValueError when the objective needs student scores that
    the batch lacks.
    """
    batch, metrics = _masked(config, batch)
    mask = batch.padded(batch.loss_mask)
    total = _distillation(config, batch)
    if total is not None:
        total = config.objective.coef * total
    reward = None
    if config.reward.coef > 0:
        reward = config.reward.coef * _reward(config, batch)[:, None] * mask  # the same on every part of an episode
    if config.objective.correction.type != "none":
        weights, kept, more = _correction(config.objective.correction, batch, mask)
        kept = batch.flatten(kept)
        batch = replace(batch, distill_mask=batch.distill_mask & kept, reward_mask=batch.reward_mask & kept)
        total = None if total is None else total * weights
        reward = None if reward is None else reward * weights
        metrics |= more
    if reward is not None:
        share = divisor(config.objective, batch) / _normalizer(config.objective, batch, batch.reward_mask)
        total = share * reward if total is None else total + share * reward
    return replace(batch, advantages=None if total is None else batch.flatten(total)), metrics


def divisor(objective: ObjectiveConfig, batch: Batch) -> float:
    """What the learner divides the sum over the whole batch by: the distillation term's normaliser, or the reward's where no
    distillation is left."""
    mask = batch.distill_mask if bool(batch.distill_mask.any()) else batch.reward_mask
    return _normalizer(objective, batch, mask)


def _normalizer(objective: ObjectiveConfig, batch: Batch, mask: Tensor) -> float:
    return denominator(batch.padded(mask), objective.normalizer, constant=objective.constant)


def _masked(config: Config, batch: Batch) -> tuple[Batch, Metrics]:
    """Leave out of the distillation term what has no score, and what the recipe masks of episodes with format errors; a reward
    acts on every episode that has one."""
    kept = batch.scored
    metrics: Metrics = {}
    scope = config.mask.format_errors
    if scope != "off":
        whole = without_errors(batch.padded(batch.flagged), batch.padded(batch.turns), scope)
        masked = kept & ~batch.flatten(whole)
        metrics["mask/tokens/sum"] = Sum(int(masked.sum()))
        metrics["mask/rollouts/sum"] = Sum(int(batch.any_of(masked).sum()))
        kept = kept & ~masked
    if config.objective.coef == 0:
        kept = torch.zeros_like(kept)
    judged = torch.zeros_like(kept)
    if config.reward.coef > 0:
        verdict = ~torch.isnan(batch.rewards[batch.first_parts]) | _faulty(batch)
        judged = batch.flatten(batch.padded(batch.loss_mask) & verdict[:, None])
    return replace(batch, distill_mask=kept, reward_mask=judged), metrics


def _faulty(batch: Batch) -> Tensor:
    """The episodes that have a format error, [episodes] bool."""
    return batch.padded(batch.flagged).any(-1)


def _distillation(config: Config, batch: Batch) -> Tensor | None:
    """The sampled part of the distillation term, [episodes, tokens]; None when all of it is integrated in the loss."""
    objective = config.objective
    mask = batch.padded(batch.scored)
    log_ratio = adv.above_rounding(batch.padded(batch.log_ratio), mask, _rounding(config))
    discount = objective.discount or 0.0  # the types with a future part have one
    chunks = None if batch.chunks is None else batch.padded(batch.chunks)
    match objective.type:
        case "exact" | "top_k":
            # A teacher of another tokenizer has a distribution only where both sides chose the same token.
            alone = None if batch.compared is None else mask & ~batch.padded(batch.compared)
            if alone is None or not bool(alone.any()):
                return None
            total = adv.immediate(log_ratio, mask, chunks) * alone
        case "immediate":
            total = adv.immediate(log_ratio, mask, chunks)
        case "to_go":
            total = adv.log_ratio_to_go(log_ratio, mask, discount, chunks)
        case "kl_to_go":
            total = adv.kl_to_go(log_ratio, _needed(batch, "reverse_kl"), mask, discount)
        case "exact_to_go":
            total = adv.future_kl(_needed(batch, "reverse_kl"), mask, discount)
        case _:
            assert_never(objective.type)
    if chunks is not None and config.alignment.credit == "full":
        total = adv.whole_chunks(total, mask, chunks)
    return (total - _baseline(objective, batch, total, mask)) * batch.padded(batch.distill_mask)


def _rounding(config: Config) -> float:
    """How much larger than that of one model the rounding of a log ratio is."""
    past = config.objective.extrapolation
    return magnified(config.temperature, (past, 1.0 - past))


def _baseline(objective: ObjectiveConfig, batch: Batch, advantages: Tensor, mask: Tensor) -> Tensor:
    match objective.baseline:
        case "none":
            return torch.zeros_like(advantages)
        case "leave_one_out":
            # Steps are the actions of the episode, those without a score too: a part without one must not shift the later ones.
            groups, actions = batch.group_ids[batch.first_parts], batch.padded(batch.loss_mask)
            return baselines.leave_one_out(advantages, mask, groups, actions=actions)
        case "kl":
            return baselines.negative_kl(_needed(batch, "reverse_kl"), mask)
        case "score_weighted":
            return _needed(batch, "best_baseline") * mask
        case _:
            assert_never(objective.baseline)


def _reward(config: Config, batch: Batch) -> Tensor:
    """The reward's advantage [episodes]; 0 where an episode has no verdict."""
    rewards, groups = batch.rewards[batch.first_parts], batch.group_ids[batch.first_parts]
    rewards = torch.where(_faulty(batch), config.reward.format_error, rewards)
    known = ~torch.isnan(rewards)
    found = torch.zeros_like(rewards)
    found[known] = adv.reward_advantages(rewards[known], groups[known], config.reward.baseline)
    return found


def _correction(config: CorrectionConfig, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """(weights, the mask of what is kept, both [episodes, tokens]; how far sampled log-probabilities are from the student's, and
    how many actions a bound touched)."""
    mine, sampled = _needed(batch, "student_logprobs"), batch.padded(batch.rollout_logprobs)
    plain = corrections.importance_weights(mine, sampled, mask, config.level)
    used = batch.padded(batch.used)
    gaps = (mine - sampled)[used].double().abs().tolist()
    metrics: Metrics = {
        "correction/weight/mean": mean_of(plain[used].double().tolist()),
        "correction/gap/mean": mean_of(gaps),
        "correction/gap/max": Max(max(gaps, default=0.0)),
    }
    if config.type == "truncate":
        weights, kept = corrections.truncated(plain, mask, config.cap)
        metrics["correction/truncated/sum"] = Sum(int(((plain > config.cap) & used).sum()))
    else:
        weights, kept = corrections.rejected(plain, mask, config.low, config.high)
        metrics["correction/rejected/sum"] = Sum(int((used & ~kept).sum()))
    return weights, kept, metrics


def _needed(batch: Batch, name: str) -> Tensor:
    """A column that the learner fills before the update, [episodes, tokens]."""
    found = getattr(batch, name)
    if found is None:
        raise ValueError(f"this objective needs batch.{name}; call learner.score_student(batch) before")
    return batch.padded(found)
