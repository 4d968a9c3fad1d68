"""Environments, which answer the student between its turns, and one that runs tools. A fault of an environment never ends a run.

An environment is the user's code, and its observations are untrusted text. It runs in its own thread, with limits of time and
size. A fault in it becomes the recorded failure of its episode.
"""

import asyncio
import concurrent.futures
import inspect
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from opd.config import EpisodesConfig
from opd.errors import DataError, describe_error, one_line, without_controls
from opd.records import Message
from opd.rewards.reward import number_of
from opd.roles import Environment, Step
from opd.text.tool_calls import Call, check_tools, parse_calls

_ROLES = ("system", "user", "tool")
_MAX_MESSAGES = 64  # of one step
_MAX_NAME = 64  # characters of an event's name
_FRACTION_OF_A_STEP = 0.8  # of the time limit of a step, for calls of tools; the rest is for the answers
THREADS = "opd-run-"
"""The beginning of the names of threads that run the user's code."""


class EnvironmentFault(Exception):
    """An environment raised, hung or broke its contract; the message says how, behind "the environment"."""


class HostedEnvironment:
    """An environment in its own daemon thread and event loop, so that one that hangs does not block the others."""

    def __init__(self, environment: Environment, limits: EpisodesConfig) -> None:
        self._environment = environment
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        # Tasks that an environment left running fail silently: asyncio would print their errors raw.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"{THREADS}environment")
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
            self._loop.close()

    def start_reset(self) -> "PendingAnswer":
        return self._ask(lambda: self._environment.reset())

    def start_step(self, message: Message) -> "PendingAnswer":
        return self._ask(lambda: self._environment.step(message))

    def _ask(self, question: Callable[[], Any]) -> "PendingAnswer":
        async def answered() -> Any:
            try:
                # called in this thread, so that a method that is not async does not block the others either
                found = question()
                return await found if inspect.isawaitable(found) else found
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:  # such as SystemExit, which would end the thread without an error
                raise EnvironmentFault(f"raised {describe_error(error)}") from None

        return PendingAnswer(self._submit(answered()), self._limits.step_timeout_s)

    def _submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """The future of a coroutine in the loop; it has failed where the user's code ended the loop."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(EnvironmentFault("ended the event loop that it runs in"))
            return failed

    def close(self) -> None:
        """Close the environment if it has `close`, and end the thread. A thread that hangs in the environment's code stays."""

        async def closed() -> None:
            try:
                close = getattr(self._environment, "close", None)
                found = close() if close is not None else None
                if inspect.isawaitable(found):
                    await asyncio.wait_for(found, self._limits.step_timeout_s)
            finally:
                self._loop.stop()

        if self._thread.is_alive():
            self._submit(closed())


class PendingAnswer:
    """An answer that an environment has not given yet."""

    def __init__(self, future: concurrent.futures.Future[Any], timeout_s: float) -> None:
        self._future = future
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def wait(self) -> Any:
        """The answer; raises EnvironmentFault where the environment raises or is too slow."""
        try:
            return self._future.result(max(0.0, self._deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            if self._future.done():  # its own TimeoutError, not ours
                raise EnvironmentFault("raised TimeoutError") from None
            self._future.cancel()
            raise EnvironmentFault(f"gave no answer in {self._timeout_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise EnvironmentFault("was cancelled") from None
        except EnvironmentFault:
            raise
        except Exception as error:
            raise EnvironmentFault(f"raised {describe_error(error)}") from None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns an error while reading the user's object into an EnvironmentFault; KeyboardInterrupt is the user's and passes."""
    try:
        yield
    except (EnvironmentFault, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise EnvironmentFault(f"gave {what} that cannot be read: {describe_error(error)}") from None


def checked_opening(messages: Any, limits: EpisodesConfig, events: Counter[str]) -> list[Message]:
    """The first messages of an environment, as `checked_messages` returns them; an error while reading them is a fault too."""
    with _reading("an opening"):
        return checked_messages(messages, limits, events)


def checked_messages(messages: Any, limits: EpisodesConfig, events: Counter[str]) -> list[Message]:
    """An environment's messages, cut to size and without control characters; `events` counts both changes.

    Raises EnvironmentFault for objects that are not messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise EnvironmentFault(f"gave {type(messages).__name__} for observations, expected a sequence of messages")
    found: list[Message] = []
    events["observation_cut"] += max(0, len(messages) - _MAX_MESSAGES)
    for message in itertools.islice(messages, _MAX_MESSAGES):
        good = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in _ROLES:
            raise EnvironmentFault(
                f"gave an observation that is no message with role ({', '.join(_ROLES)}) and string content"
            )
        text = message["content"].replace("\r\n", "\n").replace("\r", "\n")
        limit = limits.max_observation_chars
        if len(text) > limit:
            events["observation_cut"] += 1
            text = f"{text[:limit]}\n[{len(text) - limit} more characters cut]"
        plain = without_controls(text)
        events["control_characters"] += plain != text
        found.append(MappingProxyType({"role": message["role"], "content": plain}))
    return found


def checked_step(step: Any, limits: EpisodesConfig, events: Counter[str]) -> Step:
    """The step with checked observations and a reward in [0, 1] or None; raises EnvironmentFault.

    The fields of a step are the user's objects: an error while reading them is the environment's fault too.
    """
    if not isinstance(step, Step):
        raise EnvironmentFault(f"gave {type(step).__name__} for a step, expected opd.Step")
    with _reading("a step"):
        reward = _reward(step.reward)
        for name, count in dict(step.events).items():
            events[one_line(str(name))[:_MAX_NAME]] += _count(name, count)
        return Step(checked_messages(step.observations, limits, events), reward, bool(step.done))


def _count(name: Any, count: Any) -> int:
    good = isinstance(count, int | np.integer) or (isinstance(count, float) and count.is_integer())
    if not good or not 0 <= count < 2**53:
        raise EnvironmentFault(
            f"counted {count!r:.40} of the event {str(name)!a:.40}, expected a whole number from 0 to 2**53"
        )
    return int(count)


def _reward(found: Any) -> float | None:
    if inspect.iscoroutine(found):
        found.close()
    try:
        return number_of(found)
    except ValueError as error:
        raise EnvironmentFault(f"gave the reward {error}") from None


@dataclass(frozen=True)
class Tool:
    """A function that the student may call, async or not; `parameters` is the JSON schema of its arguments.

    Raises DataError for a function that cannot be called, and for an invalid schema.
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


class _ToolError(Exception):
    """A tool raised; the message describes its error."""


class ToolEnvironment:
    """Runs the tool calls of the student until it answers without a call; `judge` gives that answer its reward.

    The student is told the error, and the episode continues, where a call cannot be read, names an unknown tool or has wrong
    arguments, and where a tool raises or is too slow. The calls of one turn run one after the other and share the time of a step;
    a call for which no time is left is answered with an error too.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        judge: Callable[[str], Awaitable[float | None] | float | None],
        limits: EpisodesConfig,
    ) -> None:
        """judge: the final answer -> a reward in [0, 1] or None; limits: `config.episodes`.

        Raises DataError for two equal names.
        """
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
