"""From a packed batch to what the learner follows: masks, corrections and advantages. Pure functions of (config, batch)."""

from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from opd.batch import Batch
from opd.config import Config, CorrectionConfig, ObjectiveConfig
from opd.metrics import Metrics, Sum, mean_of
from opd.objectives import advantages as adv
from opd.objectives import baselines, corrections


def follow(config: Config, batch: Batch) -> tuple[Batch, Metrics]:
    """The batch with its masks and advantages, and what was left out of it.

    A_t = w_t (A_t^distill + coef * A^outcome): the distillation part on `distill_mask`, the outcome part on all that
    trains, w_t the correction's weight. Advantages are None when there is no sampled term. Raises ValueError when the
    objective needs student scores that the batch lacks.
    """
    batch, metrics = _masked(config, batch)
    mask = batch.padded(batch.loss_mask)
    total = _distillation(config, batch)
    if config.outcome.coef > 0:
        outcome = config.outcome.coef * _outcome(config, batch)[:, None] * mask
        total = outcome if total is None else total + outcome
    if config.objective.correction.type != "none":
        weights, kept, more = _correction(config.objective.correction, batch, mask)
        trained = batch.train_mask & batch.flatten(kept)
        batch = replace(batch, train_mask=trained, distill_mask=batch.distill_mask & trained)
        total = None if total is None else total * weights
        metrics |= more
    return replace(batch, advantages=None if total is None else batch.flatten(total)), metrics


def _masked(config: Config, batch: Batch) -> tuple[Batch, Metrics]:
    """Leave out of the distillation term what has no score, and truncated responses where the recipe says so; what has no
    outcome either has nothing left, so it leaves the normaliser too."""
    kept = batch.scored
    metrics: Metrics = {}
    if config.mask.truncated != "keep":
        kept = kept & ~torch.repeat_interleave(batch.truncated, batch.lengths)
        metrics["mask/truncated/sum"] = Sum(int(batch.truncated.sum()))
    verdict = ~torch.isnan(batch.rewards) if config.outcome.coef > 0 else torch.zeros_like(batch.truncated)
    trained = kept | (batch.loss_mask & torch.repeat_interleave(verdict, batch.lengths))
    return replace(batch, distill_mask=kept, train_mask=trained), metrics


def _distillation(config: Config, batch: Batch) -> Tensor | None:
    """The sampled part of the distillation term, [batch, tokens]; None when all of it is integrated in the loss."""
    objective = config.objective
    mask = batch.padded(batch.scored)
    current = batch.rollout_logprobs if batch.student_logprobs is None else batch.student_logprobs
    log_ratio = batch.padded(batch.teacher_logprobs - current)
    discount = objective.discount or 0.0  # the types with a future part have one
    chunks = None if batch.chunks is None else batch.padded(batch.chunks)
    match objective.type:
        case "exact" | "support":
            # A teacher of another tokenizer has a distribution only where both sides chose the same token.
            if chunks is None or batch.compared is None:
                return None
            total = adv.immediate(log_ratio, mask, chunks) * ~batch.padded(batch.compared)
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


def _baseline(objective: ObjectiveConfig, batch: Batch, advantages: Tensor, mask: Tensor) -> Tensor:
    match objective.baseline:
        case "none":
            return torch.zeros_like(advantages)
        case "leave_one_out":
            return baselines.leave_one_out(advantages, mask, batch.group_ids)
        case "kl":
            return baselines.negative_kl(_needed(batch, "reverse_kl"), mask)
        case "score_weighted":
            return _needed(batch, "best_baseline") * mask
        case _:
            assert_never(objective.baseline)


def _outcome(config: Config, batch: Batch) -> Tensor:
    """The outcome's advantage [batch], 0 where a response has no verdict."""
    rewards = torch.nan_to_num(batch.rewards, nan=0.0)
    known = ~torch.isnan(batch.rewards)
    result = adv.outcome(rewards[known], batch.group_ids[known], config.outcome.baseline)
    return torch.zeros_like(rewards).masked_scatter(known, result)


def _correction(config: CorrectionConfig, batch: Batch, mask: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """(weights, the mask of what is kept, both [batch, tokens], and how many actions a bound touched)."""
    plain = corrections.importance_weights(
        _needed(batch, "student_logprobs"), batch.padded(batch.rollout_logprobs), mask, config.level
    )
    metrics: Metrics = {"correction/weight/mean": mean_of(plain[mask].double().tolist())}
    if config.type == "truncate":
        weights, kept = corrections.truncated(plain, mask, config.cap)
        metrics["correction/truncated/sum"] = Sum(int(((plain > config.cap) & mask).sum()))
    else:
        weights, kept = corrections.rejected(plain, mask, config.low, config.high)
        metrics["correction/rejected/sum"] = Sum(int((mask & ~kept).sum()))
    return weights, kept, metrics


def _needed(batch: Batch, name: str) -> Tensor:
    """A column that the learner fills before the update, [batch, tokens]."""
    found = getattr(batch, name)
    if found is None:
        raise ValueError(f"this objective needs batch.{name}; call learner.score_student(batch) before")
    return batch.padded(found)
