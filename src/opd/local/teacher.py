"""Teachers in process: adapters on the student's base, or models of their own, with the student's tokenizer or another.

A teacher of the student's tokenizer scores the student's tokens. One with another tokenizer reads the text in its own tokens, and
its score comes back in chunks. Both read tokens in the same packed passes (`read_logprobs`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from opd.errors import DataError
from opd.models.network import Network
from opd.objectives.logprobs import token_logprobs
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
)
from opd.text.alignment import TurnPair, chunk_score, pair_turns, same_tokens
from opd.text.student_text import StudentSide
from opd.text.teacher_prompt import OwnPrompt, Shown, as_sampled
from opd.text.teacher_text import TeacherSide
from opd.text.tokenizer import SharedVocabulary, described_token
from opd.text.tool_calls import Syntax


@dataclass(frozen=True)
class Policy:
    """A distribution over next tokens: a network, and the adapter that is active on it (None: the network's own weights).

    prompts: how a teacher renders the prompts of rollouts in its own chat template; None: it reads them as the student did.
    """

    network: Network
    adapter: str | None
    prompts: OwnPrompt | None = None

    def inputs(self, rollout: Rollout) -> list[Shown]:
        """The sequences that the network reads of a rollout. Raises DataError when its chat template refuses the conversation."""
        return as_sampled(rollout) if self.prompts is None else self.prompts.read(rollout)


@dataclass(frozen=True)
class CrossTokenizerPolicy:
    """A teacher with another tokenizer: its network and adapter, how it reads text, and how the student writes it.

    logprob_floor: the least log-probability of a token, in nats; mask_non_canonical: leave out student tokens that its tokenizer
    would not write; shared_vocabulary: with it, scores carry the teacher's states where both sides chose the same token;
    own_syntax: the student's syntax of tool calls, where the teacher reads them as its own template writes them.
    """

    network: Network
    adapter: str | None
    teacher_side: TeacherSide
    student_side: StudentSide
    logprob_floor: float
    mask_non_canonical: bool = False
    shared_vocabulary: SharedVocabulary | None = None
    own_syntax: Syntax | None = None

    @property
    def prompts(self) -> TeacherSide:
        """It always renders prompts itself."""
        return self.teacher_side


@dataclass(frozen=True)
class Part:
    """One policy of a target: the name of its head, the policy, and its weight in log q."""

    name: str
    policy: Policy
    weight: float = 1.0


Target: TypeAlias = tuple[Part, ...] | CrossTokenizerPolicy
"""A teacher: log q = sum_k weight_k log q_k over its parts, one for an ordinary teacher; or a teacher with another tokenizer."""


@dataclass(frozen=True)
class ReadSequence:
    """A policy's scores of the actions of one sequence: logprobs [actions] float64 nats; hidden [actions, width] float32, its
    states before them, or [0, width] where they are not kept."""

    logprobs: np.ndarray
    hidden: np.ndarray


@torch.no_grad()
def read_logprobs(
    policy: Policy | CrossTokenizerPolicy,
    sequences: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    temperature: float,
    max_tokens: int,
    keep_hidden: bool,
    ends: Sequence[Collection[int]] = (),
) -> list[ReadSequence]:
    """A policy's log-probabilities of the actions (masks [tokens] bool) of sequences [tokens], in packed passes.

    ends: of each sequence, the tokens that its last one stands for: the event that the turn ends, by any of them.
    """
    network, head = policy.network, policy.network.head_weight()
    how = {"temperature": temperature, "softcap": network.softcap}
    nothing = ReadSequence(np.zeros(0), np.zeros((0, head.shape[1]), dtype=np.float32))
    found = [nothing] * len(sequences)
    every_end = sorted(set().union(*ends))
    end_ids = torch.tensor(every_end, dtype=torch.long, device=network.device)
    last_places = np.array([len(s) - 1 for s in sequences])
    for micro in network.synchronised_passes(sequences, masks, max_tokens=max_tokens):
        nodes, inverse = (torch.from_numpy(a).to(network.device) for a in np.unique(micro.states, return_inverse=True))
        hidden = network.hidden_states(micro.tree)[nodes][inverse]
        targets = torch.from_numpy(micro.targets).to(network.device)
        logprobs = token_logprobs(hidden, head, targets, **how)
        last = np.flatnonzero(micro.places == last_places[micro.owners])
        if every_end and len(last):
            where = torch.from_numpy(last).to(network.device)
            states = hidden[where].repeat_interleave(len(every_end), 0)
            each = token_logprobs(states, head, end_ids.repeat(len(where)), **how)
            others = torch.tensor([[i not in ends[owner] for i in every_end] for owner in micro.owners[last]])
            meant = each.view(len(where), -1).masked_fill(others.to(network.device), -torch.inf)
            logprobs[where] = meant.logsumexp(-1)  # ending is one event, by any of the tokens
        values = micro.by_member(logprobs.double().cpu().numpy())
        kept = micro.by_member(hidden.float().cpu().numpy()) if keep_hidden else [nothing.hidden] * len(values)
        for member, *own in zip(micro.members, values, kept, strict=True):
            found[member] = ReadSequence(*own)
    return found


@dataclass(frozen=True)
class LocalTeachers:
    """Scores each rollout by the teacher that its prompt names.

    With `keep_hidden` a score carries the teacher's hidden states before each action, from which the heads give the
    full distribution; without, the sampled tokens' log-probabilities alone. Teachers with another tokenizer score in chunks.
    """

    targets: Mapping[str, Target]
    _: KW_ONLY
    temperature: float
    max_tokens: int
    keep_hidden: bool

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given; a `FailedScore` says why there is none."""
        scores: dict[int, Score] = {}
        # All teachers, in their order: the ranks of a sharded teacher ask it together, whether they have rollouts for it or not.
        for teacher, target in self.targets.items():
            places = [i for i, r in enumerate(rollouts) if r.prompt.teacher == teacher]
            found = self._scores_of(teacher, target, [rollouts[i] for i in places])
            scores.update(zip(places, found, strict=True))
        return [ScoredRollout(r, scores[i]) for i, r in enumerate(rollouts)]

    def _scores_of(self, teacher: str, target: Target, rollouts: Sequence[Rollout]) -> list[Score]:
        if isinstance(target, CrossTokenizerPolicy):
            return score_cross_tokenizer(
                teacher, target, rollouts, temperature=self.temperature, max_tokens=self.max_tokens
            )
        scores: list[Score | None] = [None] * len(rollouts)
        inputs: dict[int, list[list[Shown]]] = {}
        for i, rollout in enumerate(rollouts):
            try:
                inputs[i] = _inputs(teacher, target, rollout)
            except DataError as error:
                scores[i] = FailedScore(teacher, str(error))
        readable = [rollouts[i] for i in inputs]
        parts = [
            (part, self._read(part.policy, readable, [each[k] for each in inputs.values()]))
            for k, part in enumerate(target)
        ]
        for place, i in enumerate(inputs):
            scores[i] = self._score(teacher, [(part, *read[place]) for part, read in parts])
        return [score for score in scores if score is not None]

    def _score(self, teacher: str, parts: Sequence[tuple[Part, np.ndarray, np.ndarray]]) -> Score:
        """The score of one rollout. parts: of each its log-probabilities [tokens] and its hidden states [actions, width]."""
        logprobs = np.zeros(len(parts[0][1]), dtype=np.float32)
        for part, values, _ in parts:
            logprobs += np.float32(part.weight) * values
        components = tuple((part.weight, values) for part, values, _ in parts) if len(parts) > 1 else ()
        if not self.keep_hidden:
            return SampledScore(teacher, logprobs, components)
        states = tuple(HiddenPart(part.name, part.weight, hidden) for part, _, hidden in parts)
        return HiddenScore(teacher, logprobs, states, components)

    def _read(
        self, policy: Policy, rollouts: Sequence[Rollout], inputs: Sequence[Sequence[Shown]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each rollout one policy's log-probabilities [tokens] float32 and its hidden states [actions, width]."""
        policy.network.activate(policy.adapter)
        shown = [each for sequences in inputs for each in sequences]
        read = iter(
            read_logprobs(
                policy,
                [each.token_ids for each in shown],
                [each.mask for each in shown],
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                keep_hidden=self.keep_hidden,
            )
        )
        found = []
        for rollout, sequences in zip(rollouts, inputs, strict=True):
            own = [next(read) for _ in sequences]
            values = np.zeros(len(rollout.token_ids), dtype=np.float32)
            values[rollout.loss_mask] = np.concatenate([each.logprobs for each in own])
            found.append((values, np.concatenate([each.hidden for each in own])))
        return found


def _inputs(teacher: str, target: Sequence[Part], rollout: Rollout) -> list[list[Shown]]:
    """The sequences that each part of a target reads of a rollout. Raises DataError for a rollout that one cannot read."""
    found = []
    for part in target:
        found.append(part.policy.inputs(rollout))
        _require_room(part.policy.network, max(len(each.token_ids) for each in found[-1]), teacher)
    return found


def _require_room(network: Network, longest: int, teacher: str) -> None:
    """Raise DataError for a sequence of more tokens than a teacher takes."""
    if network.limit is not None and longest > network.limit.tokens:
        who = f"teacher '{teacher}'"
        raise DataError(f"{longest} tokens exceed {network.limit.of(who)}")


def score_cross_tokenizer(
    teacher: str, policy: CrossTokenizerPolicy, rollouts: Sequence[Rollout], *, temperature: float, max_tokens: int
) -> list[Score]:
    """Each rollout's score in chunks; a `FailedScore` says why there is none."""
    scores: list[Score | None] = [None] * len(rollouts)
    turns: dict[int, list[TurnPair]] = {}
    for i, rollout in enumerate(rollouts):
        try:
            turns[i] = _paired_turns(teacher, policy, rollout)
        except DataError as error:
            scores[i] = FailedScore(teacher, str(error))
    network, end_ids = policy.network, policy.teacher_side.end_ids
    network.activate(policy.adapter)
    every = [turn for own in turns.values() for turn in own]
    read = iter(
        read_logprobs(
            policy,
            [np.append(turn.teacher_text.token_ids, end_ids[0]) for turn in every],
            [_scored_tokens(turn) for turn in every],
            temperature=temperature,
            max_tokens=max_tokens,
            keep_hidden=policy.shared_vocabulary is not None,
            ends=[turn.end_ids for turn in every],
        )
    )
    for i, own in turns.items():
        scores[i] = _chunk_score(teacher, policy, rollouts[i], own, [next(read) for _ in own])
    return [score for score in scores if score is not None]


def _paired_turns(teacher: str, policy: CrossTokenizerPolicy, rollout: Rollout) -> list[TurnPair]:
    """The student's turns beside the teacher's tokens for them. Raises DataError for a rollout that the teacher cannot read."""
    if not rollout.num_actions:
        raise DataError("no turn of the student")
    turns = pair_turns(
        rollout,
        policy.student_side,
        policy.teacher_side,
        mask_non_canonical=policy.mask_non_canonical,
        own_syntax=policy.own_syntax,
    )
    _require_room(policy.network, max(len(t.teacher_text.token_ids) + 1 for t in turns), teacher)
    ids = np.concatenate([t.teacher_text.token_ids for t in turns])
    beyond = ids[ids >= policy.network.vocab_size]
    if len(beyond):
        token = described_token(policy.teacher_side.tokenizer, int(beyond[0]))
        raise DataError(f"the text needs token {token}, for which teacher '{teacher}' has no embedding")
    return turns


def _scored_tokens(turn: TurnPair) -> np.ndarray:
    """Which tokens of the teacher's sequence are scored: those of the response, and the end where the student chose it."""
    mask = np.arange(len(turn.teacher_text.token_ids) + 1) >= turn.teacher_text.first
    mask[-1] = turn.ends_turn
    return mask


def _chunk_score(
    teacher: str,
    policy: CrossTokenizerPolicy,
    rollout: Rollout,
    turns: Sequence[TurnPair],
    read: Sequence[ReadSequence],
) -> ChunkScore:
    # The floor is per token, as for other teachers; a chunk's sum may be lower, so the floor is applied before the sum.
    logprobs, floored = [], 0
    for each in read:
        found, below = target_logprobs([(torch.from_numpy(each.logprobs), 1.0)], policy.logprob_floor)
        logprobs.append(found.numpy())
        floored += 0 if below is None else int(below.sum())
    score = chunk_score(teacher, rollout, turns, logprobs)
    score = replace(score, facts={**score.facts, "floored": floored})
    if policy.shared_vocabulary is None:
        return score
    compared = np.zeros(len(rollout.token_ids), dtype=bool)
    states = []
    for turn, each in zip(turns, read, strict=True):
        theirs = np.append(turn.teacher_text.token_ids[turn.teacher_text.first :], [policy.teacher_side.end_ids[0]])
        ours = rollout.token_ids[turn.start : turn.stop].astype(np.int64)
        pairs = same_tokens(turn, ours, theirs, policy.shared_vocabulary)
        compared[turn.start + pairs[:, 0]] = True
        states.append(each.hidden[pairs[:, 1]])
    return replace(score, compared=compared, part=HiddenPart(teacher, 1.0, np.concatenate(states)))
