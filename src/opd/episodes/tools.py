"""Tools that a student may call: each has a JSON schema, checked arguments and a time limit."""

import asyncio
import inspect
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.config import EpisodesConfig
from opd.episodes.environment import THREADS
from opd.errors import DataError, describe_error
from opd.records import Message
from opd.roles import Step
from opd.text.tool_calls import Call, check_tools, parse_calls


@dataclass(frozen=True)
class Tool:
    """A function that the student may call.

    Attributes:
        name: The name that the student writes.
        description: The text that the chat template shows.
        parameters: The JSON schema of its arguments.
        function: The function, async or not. Its result is shown as text.

    Raises:
        DataError: For a function that cannot be called, and for an invalid schema.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise DataError(f"tool '{self.name}': its function is {type(self.function).__name__}, expected a callable")
        if not isinstance(self.parameters, Mapping):
            raise DataError(
                f"tool '{self.name}': parameters is {type(self.parameters).__name__}, expected a JSON schema"
            )
        check_tools([self.schema])

    @property
    def schema(self) -> Mapping[str, Any]:
        """The description that a chat template shows to the student."""
        shown = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": shown}


class ToolEnvironment:
    """Runs the student's tool calls until a turn has none. `judge` gives that turn its reward.

    The student gets an error message, and the episode continues, if a call cannot be read, names an unknown tool or has wrong
    arguments, and if a tool raises or is too slow. The calls of one turn run one after the other and share the time of a step. A
    call without time left gets an error message too.

    Args:
        tools: The tools, with different names.
        judge: The final answer -> a reward in [0, 1] or None. It may be a coroutine function.
        limits: `config.episodes`.

    Raises:
        DataError: For two equal names.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        judge: Callable[[str], Awaitable[float | None] | float | None],
        limits: EpisodesConfig,
    ) -> None:
        if not isinstance(limits, EpisodesConfig):
            raise DataError(f"a tool environment's limits are {type(limits).__name__}, expected config.episodes")
        self._tools = {tool.name: tool for tool in tools}
        self._schemas = tuple(tool.schema for tool in tools)
        check_tools(self._schemas)
        self._judge = judge
        self._limits = limits

    async def reset(self) -> Sequence[Message]:
        return ()

    async def step(self, message: Message) -> Step:
        parsed = parse_calls(message["content"], self._schemas, syntax=self._limits.tool_syntax)
        if not parsed.calls and not parsed.errors:
            reward: Any = self._judge(parsed.content)
            return Step(reward=await reward if inspect.isawaitable(reward) else reward, done=True)
        events = Counter({"tool_calls": len(parsed.calls), "tool_calls_refused": len(parsed.errors)})
        found = [(e.start, f"error: {e.detail}") for e in parsed.errors]
        deadline = time.monotonic() + _FRACTION_OF_A_STEP * self._limits.step_timeout_s
        found += [(call.start, await self._call(call, deadline, events)) for call in parsed.calls]
        observations = [{"role": "tool", "content": text} for _, text in sorted(found, key=lambda item: item[0])]
        return Step(observations, events=events)

    async def _call(self, call: Call, deadline: float, events: Counter[str]) -> str:
        tool = self._tools[call.name]
        timeout = min(self._limits.tool_timeout_s, deadline - time.monotonic())
        if timeout <= 0:
            events["tool_timeouts"] += 1
            return f"error: {tool.name} was not called: the earlier calls used up the time of this turn"
        try:
            return await asyncio.wait_for(_in_thread(tool.function, call.arguments), timeout)
        except TimeoutError:
            events["tool_timeouts"] += 1
            # the remaining time is measured, and the tokens of the student must not depend on a clock
            whole = timeout == self._limits.tool_timeout_s
            limit = f"in {timeout:g} s" if whole else "in the time that was left of this turn"
            return f"error: {tool.name} gave no answer {limit}"
        except _ToolError as error:
            events["tool_errors"] += 1
            return f"error: {error}"


class _ToolError(Exception):
    """A tool raised; the message describes its error."""


_FRACTION_OF_A_STEP = 0.8  # of its time limit, for the calls; the rest is for the answers


async def _in_thread(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """The text of a call that runs in a daemon thread: a call that hangs blocks neither the others nor the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(method: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            method(value)

    def run() -> None:
        try:
            result = (future.set_result, _as_text(function(**arguments)))
        except BaseException as error:
            # StopIteration cannot be set on a future, and SystemExit must not end the run.
            result = (future.set_exception, _ToolError(describe_error(error)))
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *result)

    threading.Thread(target=run, daemon=True, name=f"{THREADS}tool").start()
    return await future


def _as_text(result: Any) -> str:
    """The result of a function as text: a string as it is, other values as JSON. A coroutine is run first."""
    if inspect.isawaitable(result):

        async def awaited() -> Any:
            return await result

        result = asyncio.run(awaited())
    return result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)
