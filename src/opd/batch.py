"""The batch of a training step: scored rollouts as flat tensors over all their tokens."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import ScoreError
from opd.objectives.reduce import masked
from opd.objectives.target import target_logprobs
from opd.records import (
    ChunkScore,
    FailedScore,
    HiddenPart,
    HiddenScore,
    Rollout,
    SampledScore,
    Score,
    ScoredRollout,
    TopKScore,
)

_BY_ROLLOUT = frozenset({"lengths", "group_ids", "episodes", "rewards", "num_bytes"})


@dataclass(frozen=True)
class Batch:
    """Rollouts of one step, concatenated. `tokens` counts all their tokens, `actions` those that the student sampled.

    rollout_ids, teachers: one entry a rollout; lengths, group_ids [batch]; rewards [batch] (nan: none); episodes [batch]: equal
    for the parts of one episode, which follow each other in order; turns [tokens]: which of its episode's student turns an action
    belongs to; flagged [tokens]: where format errors lie;
    token_ids, rollout_logprobs, teacher_logprobs [tokens]; loss_mask [tokens]: the actions. distill_mask: those that the
    distillation term acts on (all, unless `opd.objective` leaves some out); reward_mask: those that a reward acts on.
    teacher_parts: of each rollout, or None when teachers gave sampled scores. compared [tokens]: the actions before which those
    parts have a state; None: all.
    top_k_ids, logprobs_at [tokens, support]: of teachers that gave their likeliest tokens, as in `TopKScore` (-1 and -inf
    where there is none).
    chunks [tokens] and num_bytes [batch]: with a teacher of another tokenizer, as in `ChunkScore` but with numbers of which no two
    rollouts share one, and with rollouts that have no score; a token that was scored by itself is a chunk of its own, and its
    rollout counts 0 bytes.
    A trajectory is an episode: `padded` has a row for each, over all its parts, and what is defined over a trajectory (sums to go,
    sequence weights, baselines, masks, normalisers) is computed on those rows.

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
    reward_mask: Tensor
    rollout_logprobs: Tensor
    teacher_logprobs: Tensor
    teacher_parts: tuple[tuple[HiddenPart, ...], ...] | None = None
    compared: Tensor | None = None
    top_k_ids: Tensor | None = None
    logprobs_at: Tensor | None = None
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
        return self.distill_mask | self.reward_mask

    @property
    def scored(self) -> Tensor:
        """The actions that have a teacher's score, [tokens] bool."""
        return self.loss_mask if self.chunks is None else self.loss_mask & (self.chunks >= 0)

    @property
    def used(self) -> Tensor:
        """The actions of rollouts that have a score or that a reward acts on, [tokens] bool; the others say of their episode
        alone what it is."""
        rows = self.any_of(self.scored | self.reward_mask)
        return self.loss_mask & torch.repeat_interleave(rows, self.lengths)

    @property
    def log_ratio(self) -> Tensor:
        """log q - log pi of the sampled tokens, [tokens] nats, exactly 0 where there is no score.

        The one place of its sign and mask: losses, advantages, metrics and detectors read it here. q has its floor (`pack`); pi is
        the student as the update finds it, or as it sampled where it was not scored again. In a chunk the teacher's part stands at
        the last token, so that the log ratios of a chunk's tokens sum to its own.
        """
        student = self.rollout_logprobs if self.student_logprobs is None else self.student_logprobs
        return masked(self.teacher_logprobs - student, self.scored)

    def any_of(self, flat: Tensor) -> Tensor:
        """Whether any token of each rollout is set: [tokens] bool -> [batch] bool."""
        return torch.stack([row.any() for row in torch.split(flat, self.lengths.tolist())])

    @cached_property
    def first_parts(self) -> Tensor:
        """The row of each episode's first rollout, [episodes]."""
        return torch.nonzero(torch.diff(self.episodes, prepend=self.episodes.new_tensor([-1])))[:, 0]

    @cached_property
    def leading(self) -> Tensor:
        """The first rollout with a score of every episode, [batch] bool: what is summed over episodes counts there."""
        found = torch.zeros(len(self), dtype=torch.bool)
        some = self.any_of(self.scored)
        seen: set[int] = set()
        for row in torch.nonzero(some)[:, 0].tolist():
            found[row] = int(self.episodes[row]) not in seen
            seen.add(int(self.episodes[row]))
        return found

    @property
    def offsets(self) -> list[int]:
        """Where each rollout's tokens start in the flat tensors, and where the last one ends."""
        return [0, *torch.cumsum(self.lengths, 0).tolist()]

    @cached_property
    def episode_lengths(self) -> list[int]:
        """How many tokens the parts of each episode have together, [episodes]."""
        starts = torch.tensor(self.offsets)[self.first_parts]
        return torch.diff(starts, append=torch.tensor([len(self.token_ids)])).tolist()

    def padded(self, flat: Tensor) -> Tensor:
        """[tokens] -> [episodes, longest], zeros (False) behind each row's end; `flatten` undoes it."""
        rows = torch.split(flat, self.episode_lengths)
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    def flatten(self, padded: Tensor) -> Tensor:
        """[episodes, longest] -> [tokens]; the inverse of `padded`."""
        return torch.cat([row[:length] for row, length in zip(padded, self.episode_lengths, strict=True)])


def trainable(scored: Sequence[ScoredRollout], *, unscored: bool = False) -> list[ScoredRollout]:
    """The rollouts with actions and a score; `unscored`: those too that no teacher could score and a reward acts on, for they
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

    Other parts of an episode that can be trained on are in the batch too, without a score: its format errors and its actions are
    the whole episode's. The log-probability of each model of a teacher is raised to `logprob_floor` before its weight, and
    "floored" counts the tokens at which one was. Raises ScoreError naming the rollout when a teacher's score is not a number, and
    when no rollout is left.
    """
    counted = trainable(scored, unscored=unscored)
    if not counted:
        reasons = sorted({s.score.reason for s in scored if isinstance(s.score, FailedScore)}) or ["no actions"]
        raise ScoreError(f"none of {len(scored)} rollouts can be trained on: {'; '.join(reasons)}")
    usable = _whole_episodes(scored, counted)
    columns: dict[str, list[np.ndarray]] = {"ids": [], "mask": [], "rollout": [], "teacher": []}
    floored = 0
    for item in usable:
        columns["ids"].append(item.rollout.token_ids)
        columns["mask"].append(item.rollout.loss_mask)
        columns["rollout"].append(item.rollout.rollout_logprobs)
        teacher, below = _teacher_logprobs(item, logprob_floor)
        columns["teacher"].append(teacher)
        floored += below
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    loss_mask = torch.from_numpy(flat["mask"])
    groups = _numbered((s.rollout.prompt.id, s.score.teacher) for s in usable)
    episodes = _numbered(_episode(s) for s in usable)
    batch = Batch(
        rollout_ids=tuple(s.rollout.id for s in usable),
        teachers=tuple(s.score.teacher for s in usable),
        lengths=torch.tensor([len(s.rollout.token_ids) for s in usable]),
        group_ids=torch.tensor([groups[s.rollout.prompt.id, s.score.teacher] for s in usable]),
        rewards=torch.tensor([np.nan if s.rollout.reward is None else s.rollout.reward for s in usable]),
        episodes=torch.tensor([episodes[_episode(s)] for s in usable]),
        turns=torch.from_numpy(np.concatenate(_turns(usable))),
        flagged=torch.from_numpy(np.concatenate([_flagged(s.rollout) for s in usable])),
        token_ids=torch.from_numpy(flat["ids"].astype(np.int64)),
        loss_mask=loss_mask,
        distill_mask=loss_mask,
        reward_mask=torch.zeros_like(loss_mask),
        rollout_logprobs=torch.from_numpy(flat["rollout"].astype(np.float32)),
        teacher_logprobs=torch.from_numpy(flat["teacher"].astype(np.float32)),
        teacher_parts=_parts(usable),
        **(_chunk_columns(usable) | _top_k_columns(usable)),
    )
    counts = {"dropped": len(scored) - len(counted), "floored": floored}
    if unscored:
        counts["unscored"] = sum(isinstance(s.score, FailedScore) for s in counted)
    return batch, counts


def _episode(item: ScoredRollout) -> tuple[str, str, int]:
    return item.rollout.prompt.id, item.score.teacher, item.rollout.sample


def _whole_episodes(scored: Sequence[ScoredRollout], counted: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """Every part of the episodes that something can be trained on, an episode's parts next to each other and in order."""
    place = _numbered(map(_episode, counted))
    parts = [s for s in scored if _episode(s) in place and s.rollout.num_actions and s.rollout.failure is None]
    return sorted(parts, key=lambda s: (place[_episode(s)], s.rollout.part))


def _teacher_logprobs(item: ScoredRollout, floor: float) -> tuple[np.ndarray, int]:
    """(log q of the sampled tokens [tokens], at how many of them a model was below the floor).

    The tokens of a chunk are the teacher's own; they had their floor, and were counted, where they were scored.
    """
    score, mask = item.score, item.rollout.loss_mask
    if isinstance(score, FailedScore):
        return np.zeros(len(mask)), 0
    models = _models(score)
    bad = np.logical_or.reduce([np.isnan(x) | np.isposinf(x) for _, x in models]) & mask
    if bad.any():
        raise ScoreError(
            f"rollout '{item.rollout.id}': {int(bad.sum())} of {int(mask.sum())} log-probabilities from teacher "
            f"'{score.teacher}' are NaN or +infinity; check the teacher's weights (opd check)"
        )
    if isinstance(score, ChunkScore):
        return np.where(mask, score.logprobs, 0.0), score.facts.get("floored", 0)
    own = ((torch.from_numpy(np.where(mask, x, 0.0)), weight) for weight, x in models)
    found, below = target_logprobs(own, floor)
    return found.numpy(), 0 if below is None else int(below.sum())


def _models(score: Score) -> Sequence[tuple[float, np.ndarray]]:
    """(weight, log-probabilities) of each model that a score is made of."""
    assert not isinstance(score, FailedScore)
    if isinstance(score, SampledScore | HiddenScore) and score.components:
        return score.components
    return [(1.0, score.logprobs)]


def split(batch: Batch, parts: int) -> list[Batch | None]:
    """The batch in consecutive parts of about as many tokens each, the parts of an episode together; None for a part of nothing.

    What the columns say of the whole batch (advantages, masks) is kept; group numbers keep their meaning.
    """
    bounds = consecutive(batch.lengths.tolist(), batch.episodes.tolist(), parts)
    return [_rows(batch, a, b) if b > a else None for a, b in bounds]


def consecutive(sizes: Sequence[int], together: Sequence[Hashable], parts: int) -> list[tuple[int, int]]:
    """Bounds [start, end) of `parts` stretches whose sizes sum to about the same; equal neighbours in `together` stay so."""
    ends, whole = np.cumsum(sizes), sum(sizes)
    bounds, start = [], 0
    for part in range(1, parts + 1):
        stop = int(np.searchsorted(ends, whole * part / parts - 1e-9)) + 1 if part < parts else len(sizes)
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


def _turns(scored: Sequence[ScoredRollout]) -> list[np.ndarray]:
    """Which of its episode's student turns each action belongs to, one [tokens] int64 for each rollout; 0 off the actions."""
    found, taken = [], dict.fromkeys(map(_episode, scored), 0)
    for item in scored:
        column = np.zeros(len(item.rollout.token_ids), dtype=np.int64)
        for turn in item.rollout.turns:
            if turn.author == "student":
                column[turn.start : turn.end] = taken[_episode(item)]
                taken[_episode(item)] += 1
        found.append(column)
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
    numbers, used = [], 0
    for item in scored:
        own = _chunks(item).astype(np.int64)
        numbers.append(np.where(own >= 0, own + used, -1))
        used += int(own.max(initial=-1)) + 1
    found = {
        "chunks": torch.from_numpy(np.concatenate(numbers)),
        "num_bytes": torch.tensor(sizes),
    }
    if _parts(scored) is not None:
        found["compared"] = torch.from_numpy(np.concatenate([_compared(s) for s in scored]))
    return found


def _top_k_columns(scored: Sequence[ScoredRollout]) -> dict[str, Tensor]:
    """The columns of teachers that gave their likeliest tokens; none where one gave something else."""
    if not scored or not all(isinstance(s.score, TopKScore | FailedScore) for s in scored):
        return {}
    known = [s.score.ids.shape[1] for s in scored if isinstance(s.score, TopKScore)]
    shape = sum(len(s.rollout.token_ids) for s in scored), max(known, default=1)
    ids, logprobs = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
    start = 0
    for item in scored:
        places = start + np.flatnonzero(item.rollout.loss_mask)
        if isinstance(item.score, TopKScore):
            width = item.score.ids.shape[1]
            ids[places, :width] = item.score.ids
            logprobs[places, :width] = item.score.top_k_logprobs
        start += len(item.rollout.token_ids)
    return {"top_k_ids": torch.from_numpy(ids), "logprobs_at": torch.from_numpy(logprobs)}
