"""Episodes: turns of the student and answers of its environment, in alternation, as rollouts.

The caller provides the turns: an engine samples them, or a script demonstrates them.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from opd.config import EpisodesConfig
from opd.data.conversations import order_fault
from opd.episodes.environment import (
    THREADS,
    EnvironmentFault,
    HostedEnvironment,
    PendingAnswer,
    checked_opening,
    checked_step,
)
from opd.errors import DataError, OpdError, RunError, describe_error
from opd.records import Finish, Message, Prompt, Rollout
from opd.roles import Environment, Step
from opd.text.chat import Chat, Conversation, Stretch

_MAX_HANGING = 256  # threads of environments and tools that never return; more would exhaust the process


@dataclass(frozen=True)
class Taken:
    """A sampled turn of the student: tokens, their log-probabilities, and why it ended.

    failure: why there is no turn; retries: how often the request to a server was repeated.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    failure: str | None = None
    retries: int = 0


TakeTurns: TypeAlias = Callable[[Sequence["Episode"]], list[Taken]]
"""From the episodes that continue to one turn of each, in order."""

MakeEnvironment: TypeAlias = Callable[[Prompt], Environment | None]
"""An environment for one episode on a prompt; None for an episode of one turn."""


def turns_with_room(
    episodes: Sequence["Episode"],
    take: Callable[[Sequence["Episode"], Sequence[int]], Sequence[Taken]],
    *,
    context: int | None,
    max_new_tokens: int,
) -> list[Taken]:
    """One turn of each episode. context: the longest sequence of the model, in tokens; an episode without room for a turn ends.

    take: samples the turns of the other episodes, each of at most so many tokens.
    """
    room = [max_new_tokens if context is None else min(max_new_tokens, context - len(e.token_ids)) for e in episodes]
    fits = [i for i, left in enumerate(room) if left > 0]
    turns = [Taken([], [], "context")] * len(episodes)
    for i, turn in zip(fits, take([episodes[i] for i in fits], [room[i] for i in fits]), strict=True):
        cut = turn.finish == "length" and room[i] < max_new_tokens
        turns[i] = replace(turn, finish="context") if cut else turn
    return turns


def numbered(prompts: Sequence[Prompt], num_samples: int) -> list[tuple[Prompt, int]]:
    """Every prompt with the numbers of its samples. A prompt that occurs twice continues its numbers: ids stay unique."""
    seen: Counter[str] = Counter()
    rows: list[tuple[Prompt, int]] = []
    for prompt in prompts:
        rows += [(prompt, seen[prompt.id] + k) for k in range(num_samples)]
        seen[prompt.id] += num_samples
    return rows


def one_turn(prompt: Prompt) -> None:
    """No environment."""


@dataclass
class Episode:
    """One episode while it is played; row: its place among the requested episodes."""

    row: int
    sample: int
    conversation: Conversation
    hosted: HostedEnvironment | None
    turn: int = 0
    message: Message = field(default_factory=dict)
    reward: float | None = None
    finish: Finish | None = None
    failure: str | None = None
    events: Counter[str] = field(default_factory=Counter)

    @property
    def token_ids(self) -> list[int]:
        """The context of the student's next turn."""
        return self.conversation.token_ids

    def fail(self, error: EnvironmentFault) -> None:
        self.finish, self.failure = "failed", f"the environment {error}"
        self.events["failed"] += 1


def _unfit(error: DataError) -> EnvironmentFault:
    return EnvironmentFault(f"gave messages that the student cannot be shown: {error}")


class EpisodePlayer:
    """Plays episodes of one chat template, under the limits of `episodes`.

    end_ids: the tokens that end a turn of the student.
    """

    def __init__(
        self, chat: Chat, limits: EpisodesConfig, *, end_ids: Sequence[int], make_environment: MakeEnvironment
    ) -> None:
        self.chat = chat
        self._limits = limits
        self.end_ids = frozenset(end_ids)
        self._make_environment = make_environment

    def play(self, prompts: Sequence[tuple[Prompt, int]], take_turns: TakeTurns, *, version: int) -> list[Rollout]:
        """The rollouts of every (prompt, sample), in order; an episode gives several where the chat template rewrites it.

        Raises RunError when the threads of hanging environments would exhaust the process.
        """
        rollouts: list[Rollout] = []
        waiting = list(enumerate(prompts))[::-1]
        while waiting:
            episodes: list[Episode] = []
            while waiting and sum(e.hosted is not None for e in episodes) < self._limits.max_concurrent:
                row, (prompt, sample) = waiting.pop()
                episodes.append(self._begin(row, prompt, sample))
            self._open([e for e in episodes if e.finish is None])
            while going := [e for e in episodes if e.finish is None]:
                for episode, taken in zip(going, take_turns(going), strict=True):
                    self._take(episode, taken)
                self._answer([e for e in going if e.finish is None])
            for episode in episodes:
                self._end(episode)
                rollouts += self._rollouts(episode, version)
        return rollouts

    def _begin(self, row: int, prompt: Prompt, sample: int) -> Episode:
        episode = Episode(row, sample, Conversation(self.chat, prompt), None)
        try:
            environment = self._make_environment(prompt)
        except OpdError:
            raise
        except Exception as error:
            episode.fail(EnvironmentFault(f"could not be made: it raised {describe_error(error)}"))
            return episode
        if environment is not None:
            try:
                episode.hosted = HostedEnvironment(environment, self._limits)
            except (OSError, RuntimeError) as error:  # out of files, out of threads
                raise RunError(
                    f"the operating system cannot start another environment: {describe_error(error)}; lower "
                    f"episodes.max_concurrent = {self._limits.max_concurrent}, or raise the limit ('ulimit -n')"
                ) from None
        return episode

    def _open(self, episodes: Sequence[Episode]) -> None:
        asked = [(e, e.hosted.start_reset()) for e in episodes if e.hosted is not None]
        for episode, answer in asked:
            try:
                messages = checked_opening(answer.wait(), self._limits, episode.events)
                if messages:
                    episode.conversation.open_with(messages)
                if fault := order_fault(episode.conversation.messages):
                    raise DataError(fault)
            except EnvironmentFault as error:
                episode.fail(error)
            except DataError as error:
                episode.fail(_unfit(error))

    def _take(self, episode: Episode, taken: Taken) -> None:
        episode.events["retried"] += taken.retries
        if taken.failure is not None:
            episode.finish, episode.failure = "failed", taken.failure
            episode.events["lost"] += 1
            return
        if taken.finish == "context" and not taken.token_ids:
            episode.finish = "context"
            return
        episode.turn += 1
        episode.message = episode.conversation.answer(taken.token_ids, taken.logprobs, self.end_ids)
        if taken.finish != "end" or episode.hosted is None:
            episode.finish = taken.finish

    def _answer(self, episodes: Sequence[Episode]) -> None:
        """Start the step of every environment, then read the answers in order."""
        asked: list[tuple[Episode, PendingAnswer]] = []
        for episode in episodes:
            assert episode.hosted is not None
            asked.append((episode, episode.hosted.start_step(episode.message)))
        for episode, answer in asked:
            try:
                step = checked_step(answer.wait(), self._limits, episode.events)
            except EnvironmentFault as error:
                episode.fail(error)
                continue
            episode.reward = episode.reward if step.reward is None else step.reward
            if step.done:
                episode.finish = "end"
            elif episode.turn >= self._limits.max_turns:
                episode.finish = "turns"
            else:
                try:
                    episode.conversation.observe(step.observations)
                except DataError as error:
                    episode.fail(_unfit(error))

    def _end(self, episode: Episode) -> None:
        hosted = episode.hosted
        if hosted is None:
            return
        hosted.close()
        if episode.finish == "failed" or episode.events["tool_timeouts"]:
            # threads of environments that play now, or have just been closed, are alive too
            allowed = _MAX_HANGING + 2 * self._limits.max_concurrent
            alive = sum(thread.name.startswith(THREADS) for thread in threading.enumerate())
            if alive > allowed:
                raise RunError(
                    f"{alive} threads of environments and tools do not return (the last: {episode.failure or 'a tool'}); give "
                    "their code its own time limit"
                )
        if episode.finish == "failed":
            return
        if episode.finish != "end" and episode.reward is None:
            episode.reward = 0.0  # the episode ended before its environment was done

    def _rollouts(self, episode: Episode, version: int) -> list[Rollout]:
        stretches = episode.conversation.stretches
        # An episode that failed in its first reset has no turn at all; it still leaves a record.
        kept = [s for s in stretches if any(t.author == "student" for t in s.turns)] or stretches[:1]
        episode.events["rewritten"] += len(kept) - 1
        return [self._rollout(episode, part, stretch, version) for part, stretch in enumerate(kept)]

    def _rollout(self, episode: Episode, part: int, stretch: Stretch, version: int) -> Rollout:
        # An observation without an answer trains nothing.
        last = max((i for i, t in enumerate(stretch.turns) if t.author == "student"), default=0)
        turns = tuple(stretch.turns[: last + 1])
        mask = np.zeros(turns[-1].end, dtype=bool)
        for turn in turns:
            mask[turn.start : turn.end] = turn.author == "student"
        assert episode.finish is not None
        return Rollout(
            prompt=episode.conversation.prompt_of(stretch),
            sample=episode.sample,
            token_ids=np.array(stretch.token_ids[: len(mask)], dtype=np.int32),
            loss_mask=mask,
            rollout_logprobs=np.array(stretch.logprobs[: len(mask)], dtype=np.float32),
            turns=turns,
            messages=stretch.messages,
            finish=episode.finish,
            policy_version=version,
            reward=None if episode.failure else episode.reward,
            part=part,
            events=MappingProxyType({k: n for k, n in episode.events.items() if n and part == 0}),
            failure=episode.failure,
            opened=stretch.opened,
        )


Solution: TypeAlias = Callable[[Prompt, Sequence[Message]], str | None]
"""The next turn of a perfect student, from the conversation so far; None where it is not known."""


class Demonstrator:
    """Writes the student's turns from a solution, in the tokens of the student's tokenizer."""

    def __init__(self, chat: Chat, solution: Solution) -> None:
        self._chat = chat
        self._solution = solution

    def take_turns(self, episodes: Sequence[Episode]) -> list[Taken]:
        """One turn of each episode, with its end token; raises DataError that names a prompt without an answer."""
        return [self._turn(episode.conversation.prompt, episode.conversation.messages) for episode in episodes]

    def _turn(self, prompt: Prompt, messages: Sequence[Message]) -> Taken:
        text = self._solution(prompt, messages)
        if not text:
            raise DataError(f"prompt '{prompt.id}' has no answer to learn from; add \"answer\" to the record")
        ids = [*self._chat.encode_turn(text, record=f"prompt '{prompt.id}'"), self._chat.end.written]
        return Taken(ids, [0.0] * len(ids), "end")


class Replay:
    """An environment that repeats its messages of a recorded conversation, which begins with a turn of the student."""

    def __init__(self, recorded: Sequence[Message]) -> None:
        self._recorded = list(recorded)
        self._place = 0

    async def reset(self) -> Sequence[Message]:
        return ()

    async def step(self, message: Message) -> Step:
        self._place += 1  # past the student's turn
        first = self._place
        while self._place < len(self._recorded) and self._recorded[self._place]["role"] != "assistant":
            self._place += 1
        return Step(self._recorded[first : self._place], done=self._place == len(self._recorded))


def recorded_turn(recorded: Sequence[Message], num_messages: int) -> str | None:
    """The student's turn that follows the first `num_messages` of a recorded conversation."""
    return recorded[num_messages]["content"] if num_messages < len(recorded) else None
