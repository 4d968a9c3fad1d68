"""The roles that a training step is written in; embedded and distributed parts implement the same protocols."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

from opd.batch import Batch
from opd.metrics import Metrics
from opd.records import Message, Prompt, Rollout, ScoredRollout

Seed: TypeAlias = tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """What an environment makes of one turn of the student.

    observations: the messages that follow, of role "tool", "user" or "system"; reward: the outcome of the episode as it stands
    now, in [0, 1], or None for no verdict yet; done: no further turn. events: what happened that is worth counting, by name.
    """

    observations: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False
    events: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class Environment(Protocol):
    """One episode's counterpart of the student. A `close` method, if it has one, is called when the episode is over."""

    async def reset(self) -> Sequence[Message]:
        """The messages that follow the prompt before the student's first turn; often none."""
        ...

    async def step(self, message: Message) -> Step:
        """What follows the student's turn."""
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

    def state(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(tensors, plain values) from which `load_state` continues bit for bit."""
        ...

    def load_state(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None: ...


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
