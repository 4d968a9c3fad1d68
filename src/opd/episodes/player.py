"""Episodes: the student's turns and its environment's answers, in step with each other, as rollouts.

Where the turns come from is the caller's: an engine that samples, or a script that demonstrates.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from opd.config import EpisodesConfig
from opd.data.conversations import order_fault
from opd.episodes.environment import THREADS, Asked, Faulty, Hosted, checked_opening, checked_step
from opd.errors import DataError, OpdError, RunError, describe_error
from opd.records import Finish, Message, Prompt, Rollout
from opd.roles import Environment
from opd.text.chat import Chat, Conversation, Stretch

_MAX_HANGING = 256  # threads of environments and tools that never came back; past this the process itself is in danger


@dataclass(frozen=True)
class Taken:
    """A turn of the student as it was sampled: tokens, their log-probabilities, and why it ended; failure: why there is none;
    retries: how often a server was asked again for it."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish
    failure: str | None = None
    retries: int = 0


TakeTurns: TypeAlias = Callable[[Sequence["Episode"]], list[Taken]]
"""One turn of each episode that goes on, in order."""

MakeEnvironment: TypeAlias = Callable[[Prompt], Environment | None]
"""An environment for one episode on a prompt; None where one turn is all."""


def numbered(prompts: Sequence[Prompt], num_samples: int) -> list[tuple[Prompt, int]]:
    """Every prompt with the numbers of its samples; one that stands twice goes on counting, so that ids stay unique."""
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
    """One episode while it is played: `row` is its place among all that were asked for."""

    row: int
    sample: int
    conversation: Conversation
    hosted: Hosted | None
    turn: int = 0
    message: Message = field(default_factory=dict)
    reward: float | None = None
    finish: Finish | None = None
    failure: str | None = None
    events: Counter[str] = field(default_factory=Counter)

    @property
    def token_ids(self) -> list[int]:
        """What the student is given for its next turn."""
        return self.conversation.token_ids

    def fail(self, error: Faulty) -> None:
        self.finish, self.failure = "failed", f"the environment {error}"
        self.events["failed"] += 1


def _unfit(error: DataError) -> Faulty:
    return Faulty(f"said what the student cannot be shown: {error}")


class EpisodePlayer:
    """Plays episodes: who writes, what limits hold, which tokens end a turn, and where environments come from."""

    def __init__(
        self, chat: Chat, limits: EpisodesConfig, *, end_ids: Sequence[int], make_environment: MakeEnvironment
    ) -> None:
        self.chat = chat
        self._limits = limits
        self.end_ids = frozenset(end_ids)
        self._make_environment = make_environment

    def play(self, prompts: Sequence[tuple[Prompt, int]], take_turns: TakeTurns, *, version: int) -> list[Rollout]:
        """The rollouts of every (prompt, sample), in order; an episode that its template split gives several.

        Raises RunError when so many environments hang that their threads would exhaust the process.
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
            episode.fail(Faulty(f"could not be made: it raised {describe_error(error)}"))
            return episode
        if environment is not None:
            try:
                episode.hosted = Hosted(environment, self._limits)
            except (OSError, RuntimeError) as error:  # out of files, out of threads
                raise RunError(
                    f"the system hosts no further environment: {describe_error(error)}; lower episodes.max_concurrent = "
                    f"{self._limits.max_concurrent}, or raise the limit ('ulimit -n')"
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
            except Faulty as error:
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
        """Ask every environment at once, then take the answers in order."""
        asked: list[tuple[Episode, Asked]] = []
        for episode in episodes:
            assert episode.hosted is not None
            asked.append((episode, episode.hosted.start_step(episode.message)))
        for episode, answer in asked:
            try:
                step = checked_step(answer.wait(), self._limits, episode.events)
            except Faulty as error:
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
            # those that are playing, and those that have just been closed, live too
            allowed = _MAX_HANGING + 2 * self._limits.max_concurrent
            alive = sum(thread.name.startswith(THREADS) for thread in threading.enumerate())
            if alive > allowed:
                raise RunError(
                    f"{alive} threads of environments and tools do not come back (the last: {episode.failure or 'a tool'}); give "
                    "their code a time limit of its own"
                )
        if episode.finish == "failed":
            return
        if episode.finish != "end" and episode.reward is None:
            episode.reward = 0.0  # it was not done with what it was asked

    def _rollouts(self, episode: Episode, version: int) -> list[Rollout]:
        stretches = episode.conversation.stretches
        # An episode that failed in its first reset has no turn at all; it still leaves a record.
        kept = [s for s in stretches if any(t.author == "student" for t in s.turns)] or stretches[:1]
        episode.events["rewritten"] += len(kept) - 1
        return [self._rollout(episode, part, stretch, version) for part, stretch in enumerate(kept)]

    def _rollout(self, episode: Episode, part: int, stretch: Stretch, version: int) -> Rollout:
        # An observation that nobody answered trains nothing.
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
