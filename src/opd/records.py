"""The records that flow through a step: Prompt -> Rollout -> ScoredRollout.

All are frozen; each stage makes a new object, so a missing score cannot be represented. Arrays are read-only numpy.

One worked example, a prompt of 3 tokens and a response of 2 (the second is the end-of-turn token):

    token_ids         [ 11,  12,  13,   27,    2]
    loss_mask         [  F,   F,   F,    T,    T]     True where the student sampled the token
    rollout_logprobs  [  0,   0,   0, -0.3, -0.1]     as sampled, nats, at the run's temperature
    score.logprobs    [  0,   0,   0, -0.9, -0.1]     the teacher's, of the same tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

Message: TypeAlias = Mapping[str, Any]
"""One message of a conversation: "role" and "content", strings."""

Finish: TypeAlias = Literal["end", "length", "turns", "context", "failed"]
"""Why a rollout ended: the student or its environment ended it, its last turn was cut at the token limit, no turn was left, no
room was left in the student's context, or its environment failed."""

TRUNCATED: frozenset[Finish] = frozenset({"length", "context"})


def read_only(array: np.ndarray) -> np.ndarray:
    """The same array with writing forbidden."""
    array.setflags(write=False)
    return array


@dataclass(frozen=True)
class Prompt:
    """One prompt x and the name of its teacher T(x).

    Attributes:
        id: Unique in its task.
        messages: The conversation that the student answers.
        teacher: The name of its teacher.
        task: The name of its task.
        answer: The reference answer of the verifier.
        meta: Other fields of its record.
        tools: JSON schemas of the functions that the student may call; its chat template shows them.
        demonstration: The messages after the prompt, for fine-tuning. The first and the last are the student's.
    """

    id: str
    messages: tuple[Message, ...]
    teacher: str
    task: str
    answer: str | None = None
    meta: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    tools: tuple[Mapping[str, Any], ...] = ()
    demonstration: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Flag:
    """A format error: the rule that found it, and the tokens [start, end) of the rollout in which it lies."""

    rule: str
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """Tokens [start, end) of a rollout that one author wrote: "prompt", "student" or "observation"."""

    author: Literal["prompt", "student", "observation"]
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One flat token sequence that the student sampled, and its conversation.

    Arrays have the shape [tokens]. The end-of-turn token of a turn is an action and part of the sequence. An episode is one rollout
    as long as the chat template keeps earlier turns. Where it rewrites them, the episode continues in another rollout, which begins
    with the rewritten conversation.

    Attributes:
        prompt: The prompt.
        sample: The number of this response to the prompt, from 0.
        token_ids: Prompt, turns of the student, and observations.
        loss_mask: True where the student sampled the token.
        rollout_logprobs: Log-probabilities of the sampled tokens at the run's temperature, in nats; 0 off the loss mask.
        turns: The ranges of tokens by author.
        messages: The conversation.
        finish: Why it ended: "end", "length", "turns", "context" or "failed".
        policy_version: The number of updates of the student that sampled it.
        reward: In [0, 1], or None for no verdict.
        part: The number of this rollout within its episode, from 0.
        flags: Its format errors.
        events: Counts of notable events in its environment, by name.
        failure: Why it must not be trained on, or None.
        opened: The thinking tag at the end of the last generation prompt; "" for none.
    """

    prompt: Prompt
    sample: int
    token_ids: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    finish: Finish
    policy_version: int
    reward: float | None = None
    part: int = 0
    flags: tuple[Flag, ...] = ()
    events: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    failure: str | None = None
    opened: str = ""

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.loss_mask.shape == self.rollout_logprobs.shape, self.id
        for array in (self.token_ids, self.loss_mask, self.rollout_logprobs):
            read_only(array)

    @property
    def id(self) -> str:
        return f"{self.prompt.id}/{self.sample}" + (f".{self.part}" if self.part else "")

    @property
    def response(self) -> str:
        """The text of the student's last turn; empty where it had none."""
        return self.messages[-1]["content"] if self.num_actions else ""

    @property
    def truncated(self) -> bool:
        return self.finish in TRUNCATED

    @property
    def num_actions(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class SampledScore:
    """The teacher's log-probability of each sampled token.

    Attributes:
        teacher: The name of the teacher.
        logprobs: [tokens], nats, 0 off the loss mask, without the objective's floor.
        components: For a mixture of models, (weight, log-probabilities [tokens]) of each; `logprobs` is their weighted sum.
    """

    teacher: str
    logprobs: np.ndarray
    components: tuple[tuple[float, np.ndarray], ...] = ()


@dataclass(frozen=True)
class TopKScore:
    """The teacher's log-probabilities of a few tokens before each action. All other tokens are one bucket.

    Attributes:
        teacher: The name of the teacher.
        logprobs: As in `SampledScore`.
        ids: [actions, k] int32, the sampled token among them; -1 where there are fewer.
        top_k_logprobs: [actions, k], nats; -inf where there are fewer.
    """

    teacher: str
    logprobs: np.ndarray
    ids: np.ndarray
    top_k_logprobs: np.ndarray


@dataclass(frozen=True)
class HiddenPart:
    """One model of a score: its final hidden state before each action [actions, hidden], and its weight in log q.

    `model` names the head that turns a state into a distribution when the learner needs it.
    """

    model: str
    weight: float
    hidden: np.ndarray


@dataclass(frozen=True)
class HiddenScore:
    """A score over the whole vocabulary, in process: log q = sum_k weight_k log q_k over its parts.

    Attributes:
        teacher: The name of the teacher.
        logprobs: As in `SampledScore`.
        parts: The final hidden states of each model before each action; an ordinary teacher has one part.
        components: As in `SampledScore`.
    """

    teacher: str
    logprobs: np.ndarray
    parts: tuple[HiddenPart, ...]
    components: tuple[tuple[float, np.ndarray], ...] = ()


@dataclass(frozen=True)
class ChunkScore:
    """The score of a teacher with another tokenizer. A chunk ends where tokens of both models end at the same byte.

    Attributes:
        teacher: The name of the teacher.
        logprobs: [tokens], nats: the teacher's log-probability of a chunk at the chunk's last token, 0 elsewhere.
        chunks: [tokens], the number of the chunk of each action, from 0; -1 off the loss mask and for masked tokens.
        num_bytes: The bytes of text in chunks.
        facts: Counts of the alignment by name (`opd.text.alignment.turn_facts`), with "masked/REASON" for masked tokens.
        compared: [tokens] bool, with `part`: the actions at which both models chose the same token, so that their distributions can
            be compared.
        part: The teacher's hidden states before these actions.
    """

    teacher: str
    logprobs: np.ndarray
    chunks: np.ndarray
    num_bytes: int
    facts: Mapping[str, int]
    compared: np.ndarray | None = None
    part: HiddenPart | None = None


@dataclass(frozen=True)
class FailedScore:
    """The reason why a teacher could not score a rollout. opd counts it and never trains on it.

    Attributes:
        teacher: The name of the teacher.
        reason: Why there is no score.
        lost: Whether only a server's missing answer is the reason.
    """

    teacher: str
    reason: str
    lost: bool = False


Score: TypeAlias = SampledScore | TopKScore | HiddenScore | ChunkScore | FailedScore


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout and its teacher's score.

    Attributes:
        rollout: The rollout.
        score: The score, or the reason why there is none.
        cached: Whether the score was made earlier, for an equal rollout.
        retries: How often the request to a server was repeated.
    """

    rollout: Rollout
    score: Score
    cached: bool = False
    retries: int = 0

    def __post_init__(self) -> None:
        score, who = self.score, self.rollout.id
        if isinstance(score, FailedScore):
            return
        by_token, by_action = [score.logprobs], list[np.ndarray]()
        match score:
            case SampledScore():
                by_token += [logprobs for _, logprobs in score.components]
            case HiddenScore():
                by_token += [logprobs for _, logprobs in score.components]
                by_action += [part.hidden for part in score.parts]
            case TopKScore():
                by_action += [score.ids, score.top_k_logprobs]
                assert score.ids.shape == score.top_k_logprobs.shape, who
            case ChunkScore():
                by_token.append(score.chunks)
                assert (score.compared is None) == (score.part is None), who
                if score.compared is not None and score.part is not None:
                    by_token.append(score.compared)
                    assert len(score.part.hidden) == score.compared.sum(), who
                    assert not (score.compared & ~self.rollout.loss_mask).any(), who
                    read_only(score.part.hidden)
        assert all(array.shape == self.rollout.token_ids.shape for array in by_token), who
        assert all(len(array) == self.rollout.num_actions for array in by_action), who
        for array in (*by_token, *by_action):
            read_only(array)

    @property
    def mask(self) -> np.ndarray:
        """The actions that have a score, [tokens] bool."""
        if isinstance(self.score, FailedScore):
            return np.zeros(len(self.rollout.token_ids), dtype=bool)
        mask = self.rollout.loss_mask
        return mask & (self.score.chunks >= 0) if isinstance(self.score, ChunkScore) else mask
