"""The roles of a training step: the local and the Ray backend implement the same protocols."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from opd.batch import Batch
from opd.metrics import Metrics
from opd.records import Message, Prompt, Rollout, ScoredRollout

Seed: TypeAlias = tuple[int | str, ...]
"""A place in a run, such as (run's seed, "sample", step), to which random numbers belong."""

INITIAL_STUDENT = "the initial student"
"""The name of the student as it was before the first step, among those who score (`Backend.identities`)."""


def generator_of(*parts: int | str) -> torch.Generator:
    """A generator for one purpose, such as (run's seed, "sample", step).

    The parts are hashed: torch reads only the low 32 bits of a seed, so sums and products of parts would coincide.
    """
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@dataclass(frozen=True)
class Step:
    """An environment's answer to one turn of the student.

    Attributes:
        observations: The messages that follow, with role "tool", "user" or "system".
        reward: The reward of the episode so far, in [0, 1], or None for no verdict yet.
        done: Whether the episode is over.
        events: Counts of notable events, by name.
    """

    observations: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False
    events: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class Environment(Protocol):
    """The environment of one episode. opd calls its `close` method, if it has one, when the episode is over."""

    async def reset(self) -> Sequence[Message]:
        """The messages after the prompt, before the student's first turn; often none."""
        ...

    async def step(self, message: Message) -> Step:
        """Answer the student's turn."""
        ...


class Sampler(Protocol):
    """Samples responses from the student as it is now."""

    def sample(self, prompts: Sequence[Prompt], *, num_samples: int, seed: Seed) -> list[Rollout]:
        """`num_samples` rollouts a prompt, prompt by prompt; the same seed and weights give the same rollouts."""
        ...

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Sample from these weights from now on and stamp rollouts with this version."""
        ...


class Teacher(Protocol):
    """Scores rollouts, each by the teacher that its prompt names, in the order given."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]: ...


class Learner(Protocol):
    """Holds the student's trainable weights and their optimizer."""

    def score_student(self, batch: Batch) -> Batch:
        """The batch with the student's own log-probabilities, KLs and baselines at every action, as it is now."""
        ...

    def forward_backward(self, batch: Batch) -> Metrics:
        """Add the gradient of the loss of the whole batch."""
        ...

    def optim_step(self) -> Metrics:
        """Clip, step, advance the schedule, clear the gradient."""
        ...

    def weights(self) -> Any: ...

    def save(self, folder: Path) -> Mapping[str, Any]:
        """Write safetensors files into a folder and return plain values, from which `load` continues bit for bit."""
        ...

    def load(self, folder: Path, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class StandaloneSampler:
    """A sampler of one teacher by itself, and the tokenizer of its tokens."""

    sampler: Sampler
    tokenizer: Any


@dataclass(frozen=True)
class Limit:
    """The longest sequence that a model takes, in tokens, and why where that is not its context."""

    tokens: int
    cause: str = ""

    def of(self, who: str) -> str:
        """The limit in the words of an error line."""
        return (
            f"the limit of {who} ({self.tokens}: {self.cause})"
            if self.cause
            else f"the context of {who} ({self.tokens})"
        )


def smallest(limits: Iterable[Limit | None]) -> Limit | None:
    """The limit that acts where all of them do; None limits nothing."""
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)


@dataclass(frozen=True)
class OtherTemplate:
    """A teacher with a chat template that may differ from the student's: whether it reads its own prompts, and a
    short conversation as both render it; unknown: why they could not be compared."""

    own: bool
    student: str = ""
    teacher: str = ""
    unknown: str = ""


@dataclass(frozen=True)
class OwnReading:
    """A model that reads prompts in a template or tokens of its own. length: how many tokens a prompt then has (DataError where the
    template refuses it); limit: its longest sequence; room: the tokens of a response that must fit."""

    length: Callable[[Prompt], int]
    limit: Limit
    room: int


class PassGaps(NamedTuple):
    """What the check of a model's forward passes found (`opd.models.packing_check`).

    gaps: the differences by probe. padded_because: why the passes are padded; None: they are packed.
    """

    gaps: Mapping[str, float]
    padded_because: str | None = None


@dataclass(frozen=True)
class TeacherFacts:
    """Facts about the teachers for the start-up checks, by teacher.

    contexts: the longest sequence that it scores (None: nothing limits it). vocab_size: the ids that the student shares with
    teachers of its tokenizer. cross_tokenizer: the vocabulary of a teacher with another tokenizer. without_distributions: those
    that give no distributions over the student's tokens. unknown_tokenizers: of a teacher behind a server, why its tokenizer
    could not be compared ("" where it was). notes: lines about how the models were loaded. templates: teachers with a chat
    template that may differ. turn_ends: by model, how its chat template, tokenizer and generation config disagree on where a turn
    ends. reads_clock: whether a chat template reads the time. own_readings: models with a template or tokens of their own and a
    limit, which contexts leaves out.
    """

    contexts: Mapping[str, Limit | None]
    vocab_size: int
    cross_tokenizer: Mapping[str, int]
    without_distributions: frozenset[str]
    unknown_tokenizers: Mapping[str, str]
    notes: Sequence[str] = ()
    templates: Mapping[str, "OtherTemplate"] = field(default_factory=lambda: MappingProxyType({}))
    turn_ends: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    reads_clock: bool = False
    own_readings: Mapping[str, Sequence[OwnReading]] = field(default_factory=dict)


class Backend(Protocol):
    """The student, its teachers, and the parts made of them, wherever they live; `close` it when all is done."""

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        ...

    @property
    def student_context(self) -> Limit | None:
        """The longest sequence that the student takes; None: nothing limits it."""
        ...

    @property
    def identities(self) -> Mapping[str, str]:
        """Fingerprints of what must not change during a run: teachers, tokenizers, the student's base."""
        ...

    def facts(self) -> TeacherFacts: ...

    def sampler(self) -> Sampler:
        """Of the student as it is."""
        ...

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        """The teachers of the prompts; followed: the targets of training, which an extrapolation moves past the teachers."""
        ...

    def student_as_teacher(self) -> Teacher:
        """The student as the teacher of every prompt."""
        ...

    def models_as_teachers(self, names: Collection[str]) -> Teacher:
        """Single models as teachers, by name."""
        ...

    def model_names(self) -> Collection[str]:
        """The models in process that score the student's tokens."""
        ...

    def standalone_sampler(self, teacher: str) -> StandaloneSampler | None:
        """A sampler of one teacher by itself; None for a teacher that cannot generate, such as a mixture."""
        ...

    def learner(self) -> Learner: ...

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        """Of each teacher with distributions: the student's reverse KL in nats per token, and their top-k overlap."""
        ...

    def check_passes(self) -> Mapping[str, PassGaps]:
        """Compare each model's forward passes with its own (`opd.models.packing_check`)."""
        ...

    def export(self, folder: Path) -> None:
        """Write the student: a PEFT adapter, or a whole Hugging Face folder."""
        ...

    def close(self) -> None: ...


class Task(Protocol):
    """Where prompts come from and what a response is worth."""

    name: str

    def prompts(self, split: str) -> list[Prompt]:
        """The prompts of "train" or "held_out"."""
        ...

    def reward(self, prompt: Prompt, response: str) -> float | None:
        """The verifier's score in [0, 1], or None where the task has no verifier."""
        ...

    def grade(self, prompt: Prompt, response: str) -> float | None:
        """The score of another grader where the task has one, else `reward`."""
        ...

    def environment(self, prompt: Prompt) -> Environment | None:
        """A new environment for one episode on this prompt; None where one turn is all."""
        ...

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        """The turn that a perfect student would take now, or None where the task does not know."""
        ...
