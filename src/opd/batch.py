"""The batch of a training step: scored rollouts as flat tensors over all their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.errors import ScoreError
from opd.records import FailedScore, HiddenScore, ScoredRollout


@dataclass(frozen=True)
class Batch:
    """Rollouts of one step, concatenated. `tokens` counts all their tokens, `actions` those that the student sampled.

    rollout_ids, teachers: one entry a rollout; lengths, group_ids [batch]; rewards [batch] (nan: none);
    token_ids, loss_mask, rollout_logprobs, teacher_logprobs [tokens]; teacher_hidden: one [actions_i, hidden] array a
    rollout, or None when teachers gave sampled scores; advantages [tokens] once computed.
    """

    rollout_ids: tuple[str, ...]
    teachers: tuple[str, ...]
    lengths: Tensor
    group_ids: Tensor
    rewards: Tensor
    token_ids: Tensor
    loss_mask: Tensor
    rollout_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_hidden: tuple[np.ndarray, ...] | None = None
    advantages: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout_ids)

    @property
    def offsets(self) -> list[int]:
        """Where each rollout's tokens start in the flat tensors, and where the last one ends."""
        return [0, *torch.cumsum(self.lengths, 0).tolist()]

    def padded(self, flat: Tensor) -> Tensor:
        """[tokens] -> [batch, longest], zeros (False) behind each row's end; `flatten` undoes it."""
        rows = torch.split(flat, self.lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    def flatten(self, padded: Tensor) -> Tensor:
        """[batch, longest] -> [tokens]; the inverse of `padded`."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths.tolist(), strict=True)])


def pack(scored: Sequence[ScoredRollout], *, logprob_floor: float) -> tuple[Batch, dict[str, int]]:
    """One Batch from the rollouts that have a score, and the counts of what was left out or changed.

    Teacher log-probabilities below `logprob_floor` are raised to it and counted. Raises ScoreError naming the rollout
    when a teacher's score is not a number, and when no rollout is left.
    """
    usable = [s for s in scored if not isinstance(s.score, FailedScore) and s.rollout.num_actions > 0]
    floored = 0
    columns: dict[str, list[np.ndarray]] = {"ids": [], "mask": [], "rollout": [], "teacher": []}
    hidden: list[np.ndarray] = []
    for item in usable:
        rollout, score = item.rollout, item.score
        assert not isinstance(score, FailedScore)
        on_mask = score.logprobs[rollout.loss_mask]
        faulty = np.isnan(on_mask) | np.isposinf(on_mask)
        if faulty.any():
            raise ScoreError(
                f"rollout '{rollout.id}': teacher '{score.teacher}' gave {int(faulty.sum())} of "
                f"{len(on_mask)} log-probabilities that are no numbers; check the teacher's weights (opd check)"
            )
        floored += int((on_mask < logprob_floor).sum())
        columns["ids"].append(rollout.token_ids)
        columns["mask"].append(rollout.loss_mask)
        columns["rollout"].append(rollout.rollout_logprobs)
        columns["teacher"].append(np.where(rollout.loss_mask, np.maximum(score.logprobs, logprob_floor), 0.0))
        if isinstance(score, HiddenScore):
            hidden.append(score.hidden)
    if not usable:
        reasons = sorted({s.score.reason for s in scored if isinstance(s.score, FailedScore)}) or ["no actions"]
        raise ScoreError(f"none of {len(scored)} rollouts can be trained on: {'; '.join(reasons)}")
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    groups = {p: i for i, p in enumerate(dict.fromkeys((s.rollout.prompt.id, s.score.teacher) for s in usable))}
    batch = Batch(
        rollout_ids=tuple(s.rollout.id for s in usable),
        teachers=tuple(s.score.teacher for s in usable),
        lengths=torch.tensor([len(s.rollout.token_ids) for s in usable]),
        group_ids=torch.tensor([groups[s.rollout.prompt.id, s.score.teacher] for s in usable]),
        rewards=torch.tensor([np.nan if s.rollout.reward is None else s.rollout.reward for s in usable]),
        token_ids=torch.from_numpy(flat["ids"].astype(np.int64)),
        loss_mask=torch.from_numpy(flat["mask"]),
        rollout_logprobs=torch.from_numpy(flat["rollout"].astype(np.float32)),
        teacher_logprobs=torch.from_numpy(flat["teacher"].astype(np.float32)),
        teacher_hidden=tuple(hidden) if len(hidden) == len(usable) else None,
    )
    return batch, {"dropped": len(scored) - len(usable), "floored": floored}
