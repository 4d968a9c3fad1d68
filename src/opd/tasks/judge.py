"""What episodes are worth, and which format errors they have."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from opd.config import ChecksConfig
from opd.errors import DataError
from opd.records import Prompt, Rollout
from opd.tasks.flags import flag_errors
from opd.text.token_bytes import token_bytes

Reward: TypeAlias = Callable[[Prompt, str], float | None]


class Judge:
    """Gives rollouts their outcome and their flags.

    checks: by task; they need the tokenizer that the rollouts were sampled with. own: the tasks in which `reward` takes the place
    of an outcome that an environment gave. own_code: `reward` is the user's, and gets a response as it was sampled; a verifier gets
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
        """The rollouts in their order; raises DataError for a reward that is no number in [0, 1]."""
        last = {(r.prompt.id, r.sample): r.part for r in rollouts}  # parts of an episode come in order
        judged = [self._rewarded(r) for r in rollouts]
        # An episode that its template split is worth what its last part is.
        worth = {(r.prompt.id, r.sample): r.reward for r in judged}
        judged = [replace(r, reward=worth[r.prompt.id, r.sample]) for r in judged]
        return [self._flagged(r, final=r.part == last[r.prompt.id, r.sample]) for r in judged]

    def _rewarded(self, rollout: Rollout) -> Rollout:
        if rollout.failure is not None or (rollout.reward is not None and rollout.prompt.task not in self._own):
            return rollout
        found = self._reward(rollout.prompt, ("" if self._own_code else rollout.opened) + rollout.response)
        value = None if found is None else float(found)
        if value is not None and not 0.0 <= value <= 1.0:
            raise DataError(
                f"prompt '{rollout.prompt.id}': the reward of a response is {value}, expected a number in [0, 1] or None"
            )
        return replace(rollout, reward=value)

    def _flagged(self, rollout: Rollout, *, final: bool) -> Rollout:
        checks = self._checks.get(rollout.prompt.task)
        if checks is None or self._table is None or rollout.failure is not None:
            return rollout
        return flag_errors(rollout, checks, self._table, syntax=self._tool_syntax, final=final)
