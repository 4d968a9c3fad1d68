"""Environments, which answer the student between its turns. A fault of an environment never ends a run.

An environment is the user's code, and its observations are untrusted text. It runs in its own thread, with limits of time and
size. A fault in it becomes the recorded failure of its episode.
"""

import asyncio
import concurrent.futures
import inspect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from opd.config import EpisodesConfig
from opd.errors import describe_error, one_line, without_controls
from opd.records import Message
from opd.rewards.reward import number_of
from opd.roles import Environment, Step

_ROLES = ("system", "user", "tool")
_MAX_MESSAGES = 64  # of one step
_MAX_NAME = 64  # characters of an event's name


THREADS = "opd-run-"
"""How the names of threads begin that run the user's code."""


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
                found = (
                    question()
                )  # in this thread, so that a method that is not async does not block the others either
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
                found = self._environment.close() if hasattr(self._environment, "close") else None  # type: ignore[attr-defined]  # may be there
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
