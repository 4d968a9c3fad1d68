"""Supervised fine-tuning as a special case of the learner: every advantage is 1, the tokens are those of given answers."""

from collections.abc import Sequence

import numpy as np
import torch

from opd.batch import Batch
from opd.records import Rollout


def imitation_batch(rollouts: Sequence[Rollout]) -> Batch:
    """A Batch whose actions are the turns of these rollouts, whoever took them.

    The policy-gradient loss of unit advantages is the negative log-likelihood.
    """
    mask = torch.from_numpy(np.concatenate([r.loss_mask for r in rollouts]))
    zeros = torch.zeros(len(mask))
    return Batch(
        rollout_ids=tuple(r.id for r in rollouts),
        teachers=tuple(r.prompt.teacher for r in rollouts),
        lengths=torch.tensor([len(r.token_ids) for r in rollouts]),
        group_ids=torch.arange(len(rollouts)),
        episodes=torch.arange(len(rollouts)),
        rewards=torch.full((len(rollouts),), float("nan")),
        token_ids=torch.from_numpy(np.concatenate([r.token_ids for r in rollouts]).astype(np.int64)),
        turns=torch.zeros(len(mask), dtype=torch.long),
        flagged=torch.zeros_like(mask),
        loss_mask=mask,
        distill_mask=mask,
        reward_mask=torch.zeros_like(mask),
        rollout_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=mask.float(),
    )
