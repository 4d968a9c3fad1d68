"""The batch of a training step: scored rollouts as flat tensors over all their tokens."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import ScoreError
from opd.records import ChunkScore, FailedScore, HiddenPart, HiddenScore, Rollout, ScoredRollout, SupportScore

_BY_ROLLOUT = frozenset({"lengths", "group_ids", "episodes", "rewards", "num_bytes"})


@dataclass(frozen=True)
class Batch:
    """Rollouts of one step, concatenated. `tokens` counts all their tokens, `actions` those that the student sampled.

    rollout_ids, teachers: one entry a rollout; lengths, group_ids [batch]; rewards [batch] (nan: none); episodes [batch]: equal
    for the parts of one episode; turns [tokens]: which of the student's turns an action belongs to; flagged [tokens]: where
    format errors lie;
    token_ids, rollout_logprobs, teacher_logprobs [tokens]; loss_mask [tokens]: the actions. distill_mask: those that the
    distillation term acts on (all, unless `opd.signal` leaves some out); outcome_mask: those that an outcome acts on.
    teacher_parts: of each rollout, or None when teachers gave sampled scores. compared [tokens]: the actions before which those
    parts have a state; None: all.
    support_ids, support_logprobs [tokens, support]: of teachers that gave their likeliest tokens, as in `SupportScore` (-1 and -inf
    where there is none).
    chunks [tokens] and num_bytes [batch]: with a teacher of another tokenizer, as in `ChunkScore`, and with rollouts that have no
    score; a token that was scored by itself is a chunk of its own, and its rollout counts 0 bytes.

    Once computed, [tokens]: student_logprobs, reverse_kl, best_baseline (by the learner, before the update), and advantages.
    """

    rollout_ids: tuple[str, ...]
    teachers: tuple[str, ...]
    lengths: Tensor
    group_ids: Tensor
    episodes: Tensor
    rewards: Tensor
    token_ids: Tensor
    turns: Tensor
    flagged: Tensor
    loss_mask: Tensor
    distill_mask: Tensor
    outcome_mask: Tensor
    rollout_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_parts: tuple[tuple[HiddenPart, ...], ...] | None = None
    compared: Tensor | None = None
    support_ids: Tensor | None = None
    support_logprobs: Tensor | None = None
    chunks: Tensor | None = None
    num_bytes: Tensor | None = None
    student_logprobs: Tensor | None = None
    reverse_kl: Tensor | None = None
    best_baseline: Tensor | None = None
    advantages: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout_ids)

    @property
    def train_mask(self) -> Tensor:
        """The actions that any term trains on, [tokens] bool."""
        return self.distill_mask | self.outcome_mask

    @property
    def scored(self) -> Tensor:
        """The actions that have a teacher's score, [tokens] bool."""
        return self.loss_mask if self.chunks is None else self.loss_mask & (self.chunks >= 0)

    @cached_property
    def leading(self) -> Tensor:
        """The first rollout with a score of every episode, [batch] bool: what is summed over episodes counts there."""
        found = torch.zeros(len(self), dtype=torch.bool)
        some = torch.stack([part.any() for part in torch.split(self.scored, self.lengths.tolist())])
        seen: set[int] = set()
        for row in torch.nonzero(some)[:, 0].tolist():
            found[row] = int(self.episodes[row]) not in seen
            seen.add(int(self.episodes[row]))
        return found

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


def trainable(scored: Sequence[ScoredRollout], *, unscored: bool = False) -> list[ScoredRollout]:
    """The rollouts with actions and a score; `unscored`: those too that no teacher could score and an outcome acts on, for they
    have a verdict. One whose episode failed is never among them."""
    faulty = {(s.rollout.prompt.id, s.rollout.sample) for s in scored if s.rollout.flags}

    def counts(item: ScoredRollout) -> bool:
        rollout = item.rollout
        if not rollout.num_actions or rollout.failure is not None:
            return False
        judged = rollout.reward is not None or (rollout.prompt.id, rollout.sample) in faulty
        return not isinstance(item.score, FailedScore) or (unscored and judged)

    return [s for s in scored if counts(s)]


def pack(
    scored: Sequence[ScoredRollout], *, logprob_floor: float, unscored: bool = False
) -> tuple[Batch, dict[str, int]]:
    """One Batch from the rollouts that can be trained on (`trainable`), and the counts of what was left out or changed.

    Teacher log-probabilities below `logprob_floor` are raised to it and counted. Raises ScoreError naming the rollout
    when a teacher's score is not a number, and when no rollout is left.
    """
    usable = trainable(scored, unscored=unscored)
    floored = 0
    columns: dict[str, list[np.ndarray]] = {"ids": [], "mask": [], "rollout": [], "teacher": []}
    for item in usable:
        rollout, score = item.rollout, item.score
        columns["ids"].append(rollout.token_ids)
        columns["mask"].append(rollout.loss_mask)
        columns["rollout"].append(rollout.rollout_logprobs)
        if isinstance(score, FailedScore):
            columns["teacher"].append(np.zeros(len(rollout.token_ids)))
            continue
        on_mask = score.logprobs[rollout.loss_mask]
        faulty = np.isnan(on_mask) | np.isposinf(on_mask)
        if faulty.any():
            raise ScoreError(
                f"rollout '{rollout.id}': teacher '{score.teacher}' gave {int(faulty.sum())} of "
                f"{len(on_mask)} log-probabilities that are no numbers; check the teacher's weights (opd check)"
            )
        # A chunk's log-probability is a sum; what the floor did to its tokens has been counted where they were scored.
        chunked = isinstance(score, ChunkScore)
        floor = -np.inf if chunked else logprob_floor
        floored += score.facts.get("floored", 0) if chunked else int((on_mask < floor).sum())
        columns["teacher"].append(np.where(rollout.loss_mask, np.maximum(score.logprobs, floor), 0.0))
    if not usable:
        reasons = sorted({s.score.reason for s in scored if isinstance(s.score, FailedScore)}) or ["no actions"]
        raise ScoreError(f"none of {len(scored)} rollouts can be trained on: {'; '.join(reasons)}")
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    loss_mask = torch.from_numpy(flat["mask"])
    groups = _numbered((s.rollout.prompt.id, s.score.teacher) for s in usable)
    episodes = _numbered((s.rollout.prompt.id, s.score.teacher, s.rollout.sample) for s in usable)
    batch = Batch(
        rollout_ids=tuple(s.rollout.id for s in usable),
        teachers=tuple(s.score.teacher for s in usable),
        lengths=torch.tensor([len(s.rollout.token_ids) for s in usable]),
        group_ids=torch.tensor([groups[s.rollout.prompt.id, s.score.teacher] for s in usable]),
        rewards=torch.tensor([np.nan if s.rollout.reward is None else s.rollout.reward for s in usable]),
        episodes=torch.tensor([episodes[s.rollout.prompt.id, s.score.teacher, s.rollout.sample] for s in usable]),
        turns=torch.from_numpy(np.concatenate([_turns(s.rollout) for s in usable])),
        flagged=torch.from_numpy(np.concatenate([_flagged(s.rollout) for s in usable])),
        token_ids=torch.from_numpy(flat["ids"].astype(np.int64)),
        loss_mask=loss_mask,
        distill_mask=loss_mask,
        outcome_mask=torch.zeros_like(loss_mask),
        rollout_logprobs=torch.from_numpy(flat["rollout"].astype(np.float32)),
        teacher_logprobs=torch.from_numpy(flat["teacher"].astype(np.float32)),
        teacher_parts=_parts(usable),
        **(_chunk_columns(usable) | _support_columns(usable)),
    )
    counts = {"dropped": len(scored) - len(usable), "floored": floored}
    if unscored:
        counts["unscored"] = sum(isinstance(s.score, FailedScore) for s in usable)
    return batch, counts


def split(batch: Batch, parts: int) -> list[Batch | None]:
    """The batch in consecutive parts of about as many tokens each, the parts of an episode together; None for a part of nothing.

    What the columns say of the whole batch (advantages, masks) is kept; group numbers keep their meaning.
    """
    bounds = consecutive(batch.lengths.tolist(), batch.episodes.tolist(), parts)
    return [_rows(batch, a, b) if b > a else None for a, b in bounds]


def consecutive(sizes: Sequence[int], together: Sequence[Hashable], parts: int) -> list[tuple[int, int]]:
    """Bounds [start, end) of `parts` stretches whose sizes sum to about the same; equal neighbours in `together` stay so."""
    ends = np.cumsum(sizes) if len(sizes) else np.zeros(0)
    whole = float(ends[-1]) if len(sizes) else 0.0
    bounds, start = [], 0
    for part in range(1, parts + 1):
        stop = int(np.searchsorted(ends, whole * part / parts - 1e-9, side="left")) + 1 if part < parts else len(sizes)
        stop = max(start, min(stop, len(sizes)))
        while 0 < stop < len(sizes) and together[stop - 1] == together[stop]:
            stop += 1
        bounds.append((start, stop))
        start = stop
    return bounds


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """The rollouts [start, stop) of a batch."""
    first, last = batch.offsets[start], batch.offsets[stop]
    found: dict[str, Any] = {}
    for column in fields(batch):
        value = getattr(batch, column.name)
        if isinstance(value, Tensor) and column.name not in _BY_ROLLOUT:
            found[column.name] = value[first:last]
        elif value is not None:
            found[column.name] = value[start:stop]
    return Batch(**found)


def _numbered(keys: Iterable[Hashable]) -> dict[Hashable, int]:
    """A number from 0 for each distinct key, in order."""
    return {key: i for i, key in enumerate(dict.fromkeys(keys))}


def _turns(rollout: Rollout) -> np.ndarray:
    """Which of the student's turns each action belongs to, [tokens] int64; 0 elsewhere."""
    found = np.zeros(len(rollout.token_ids), dtype=np.int64)
    for number, turn in enumerate(t for t in rollout.turns if t.author == "student"):
        found[turn.start : turn.end] = number
    return found


def _flagged(rollout: Rollout) -> np.ndarray:
    """The actions in which format errors lie, [tokens] bool."""
    found = np.zeros(len(rollout.token_ids), dtype=bool)
    for flag in rollout.flags:
        found[flag.start : flag.end] = True
    return found & rollout.loss_mask


def _parts(scored: Sequence[ScoredRollout]) -> tuple[tuple[HiddenPart, ...], ...] | None:
    """The models of every rollout's score, none of one without a score; None unless each score has its own. Where there is no
    score at all, nothing contradicts a learner that asks for them."""
    found: list[tuple[HiddenPart, ...]] = []
    for item in scored:
        if isinstance(item.score, FailedScore):
            found.append(())
        elif isinstance(item.score, HiddenScore):
            found.append(item.score.parts)
        elif isinstance(item.score, ChunkScore) and item.score.part is not None:
            found.append((item.score.part,))
        else:
            return None
    return tuple(found)


def _compared(item: ScoredRollout) -> np.ndarray:
    """The actions before which a score has states [tokens]; none where it has no states."""
    if isinstance(item.score, HiddenScore):
        return item.rollout.loss_mask
    found = item.score.compared if isinstance(item.score, ChunkScore) else None
    return np.zeros_like(item.rollout.loss_mask) if found is None else found


def _chunks(item: ScoredRollout) -> np.ndarray:
    """The chunk of each token [tokens]: a token by itself is one, and without a score there is none."""
    num_tokens = len(item.rollout.token_ids)
    if isinstance(item.score, FailedScore):
        return np.full(num_tokens, -1)
    return item.score.chunks if isinstance(item.score, ChunkScore) else np.arange(num_tokens)


def _chunk_columns(scored: Sequence[ScoredRollout]) -> dict[str, Tensor]:
    """The columns that a teacher of another tokenizer adds, and rollouts without a score; none without such."""
    if not any(isinstance(s.score, ChunkScore | FailedScore) for s in scored):
        return {}
    sizes = [s.score.num_bytes if isinstance(s.score, ChunkScore) else 0 for s in scored]
    found = {
        "chunks": torch.from_numpy(np.concatenate([_chunks(s) for s in scored]).astype(np.int64)),
        "num_bytes": torch.tensor(sizes),
    }
    if _parts(scored) is not None:
        found["compared"] = torch.from_numpy(np.concatenate([_compared(s) for s in scored]))
    return found


def _support_columns(scored: Sequence[ScoredRollout]) -> dict[str, Tensor]:
    """The columns of teachers that gave their likeliest tokens; none where one gave something else."""
    if not scored or not all(isinstance(s.score, SupportScore | FailedScore) for s in scored):
        return {}
    known = [s.score.ids.shape[1] for s in scored if isinstance(s.score, SupportScore)]
    shape = sum(len(s.rollout.token_ids) for s in scored), max(known, default=1)
    ids, logprobs = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
    start = 0
    for item in scored:
        places = start + np.flatnonzero(item.rollout.loss_mask)
        if isinstance(item.score, SupportScore):
            width = item.score.ids.shape[1]
            ids[places, :width] = item.score.ids
            logprobs[places, :width] = item.score.on_support
        start += len(item.rollout.token_ids)
    return {"support_ids": torch.from_numpy(ids), "support_logprobs": torch.from_numpy(logprobs)}
