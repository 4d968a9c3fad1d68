"""Episodes in an environment of OpenEnv, on a server or in this process."""

import asyncio
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd.errors import describe_error
from opd.records import Message
from opd.roles import Step
from opd.text.chat import user_message

_NOT_SAID = frozenset({"done", "reward", "metadata"})


def say(observation: Any) -> str:
    """An observation as text: its only field if that is a string, else its fields as JSON; without done, reward and metadata."""
    if hasattr(observation, "model_dump"):
        observation = observation.model_dump()
    elif dataclasses.is_dataclass(observation) and not isinstance(observation, type):
        observation = dataclasses.asdict(observation)
    if not isinstance(observation, Mapping):
        return str(observation)
    fields = {key: value for key, value in observation.items() if key not in _NOT_SAID}
    if len(fields) == 1 and isinstance(only := next(iter(fields.values())), str):
        return only
    return json.dumps(fields, ensure_ascii=False, default=str)


class OpenEnvEpisode:
    """One episode, to be given to `opd.train(config, environment=...)`.

        def environment(prompt):
            return OpenEnvEpisode(
                lambda: GenericEnvClient(base_url="http://localhost:8000"),
                act=lambda text: {"message": text},
                reset={"seed": prompt.meta["seed"]},
            )

    connect: makes an object with `reset`, `step` and `close` for the episode: a client, asynchronous or not, or the environment
    itself. act: from the student's text to an action; the student is told of a ValueError, and the episode continues. say: from an
    observation to the text of a user message. reward: from the rewards of the steps so far to one in [0, 1]; the episode fails
    outside. reset: the arguments of `reset`, whose observation follows the prompt.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        act: Callable[[str], Any],
        say: Callable[[Any], str] = say,
        reward: Callable[[Sequence[float]], float] = sum,
        reset: Mapping[str, Any] | None = None,
    ) -> None:
        self._connect = connect
        self._act = act
        self._say = say
        self._reward = reward
        self._reset = dict(reset or {})
        self._rewards: list[float] = []

    async def reset(self) -> Sequence[Message]:
        self._client = self._connect()  # here, because a connection belongs to the event loop that it is made in
        self._session = asyncio.create_task(self._close_at_the_end())
        result = await _settled(self._client.reset(**self._reset))
        if result.done:
            raise ValueError("the environment was done before the first turn")
        return user_message(self._text(result))

    async def step(self, message: Message) -> Step:
        try:
            action = self._act(message["content"])
        except ValueError as error:
            return Step(user_message(f"error: {describe_error(error)}"), events={"invalid_actions": 1})
        result = await _settled(self._client.step(action))
        if result.reward is not None:
            self._rewards.append(float(result.reward))
        reward = self._reward(self._rewards) if self._rewards else None
        return Step(() if result.done else user_message(self._text(result)), reward=reward, done=bool(result.done))

    def _text(self, result: Any) -> str:
        return self._say(
            getattr(result, "observation", result)
        )  # an environment without a client returns the observation itself

    async def _close_at_the_end(self) -> None:
        """Wait until the event loop ends, then close the client: a server has few sessions."""
        try:
            await asyncio.Event().wait()
        finally:
            await _settled(self._client.close())


async def _settled(found: Any) -> Any:
    return await found if inspect.isawaitable(found) else found
