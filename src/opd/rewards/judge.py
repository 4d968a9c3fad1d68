"""Rewards and format errors of rollouts."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from opd.config import ChecksConfig
from opd.records import Rollout
from opd.rewards.format_checks import flag_errors
from opd.rewards.reward import TIMEOUTS, Reward, TimedOut, rewards_of
from opd.text.tokenizer import token_bytes


class Judge:
    """Gives rollouts their reward and their flags.

    The reward is asked once an episode, also where the chat template split it: it gets the prompt of the first part and the
    response of the last one.

    checks: by task; they need the tokenizer that the rollouts were sampled with. own: the tasks in which `reward` takes the place
    of a reward that an environment gave. own_code: `reward` is the user's, and gets a response as it was sampled; a verifier gets
    it behind the thinking tag that the prompt has opened.
    """

    def __init__(
        self,
        reward: Reward,
        checks: Mapping[str, ChecksConfig] = MappingProxyType({}),
        *,
        tokenizer: Any = None,
        tool_syntax: Literal["hermes", "json"] = "hermes",
        own: Collection[str] = (),
        own_code: bool = False,
    ) -> None:
        self._reward = reward
        self._checks = {task: each for task, each in checks.items() if each.rules}
        self._table = token_bytes(tokenizer) if self._checks else None
        self._tool_syntax: Literal["hermes", "json"] = tool_syntax
        self._own = frozenset(own)
        self._own_code = own_code

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts in their order; raises RewardError for a reward that raises or is no number in [0, 1]."""
        episodes: dict[tuple[str, int], list[Rollout]] = {}
        for rollout in rollouts:
            episodes.setdefault((rollout.prompt.id, rollout.sample), []).append(rollout)  # parts come in order
        ends = {key: replace(parts[-1], prompt=parts[0].prompt) for key, parts in episodes.items()}
        asked = [key for key, end in ends.items() if self._asks(end)]
        found = rewards_of(self._reward, [ends[key] for key in asked], opened=not self._own_code)
        worth = {key: end.reward for key, end in ends.items()} | dict(zip(asked, found, strict=True))
        judged = []
        for rollout in rollouts:
            key = rollout.prompt.id, rollout.sample
            events = dict(rollout.events)
            if rollout.part == 0 and isinstance(worth[key], TimedOut):
                events[TIMEOUTS] = 1
            rewarded = replace(rollout, reward=worth[key], events=MappingProxyType(events))
            judged.append(self._flagged(rewarded, final=rollout is episodes[key][-1]))
        return judged

    def _asks(self, rollout: Rollout) -> bool:
        return rollout.failure is None and (rollout.reward is None or rollout.prompt.task in self._own)

    def _flagged(self, rollout: Rollout, *, final: bool) -> Rollout:
        checks = self._checks.get(rollout.prompt.task)
        if checks is None or self._table is None or rollout.failure is not None:
            return rollout
        return flag_errors(rollout, checks, self._table, syntax=self._tool_syntax, final=final)
