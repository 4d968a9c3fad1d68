"""Environments: what answers the student between its turns. Whatever they do, a run goes on.

An environment is somebody's code and its observations are somebody's text. It lives in a thread of its own, has limits of
time and size, and what goes wrong in it is data with a reason.
"""

import asyncio
import concurrent.futures
import inspect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
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
"""How the names of the threads begin in which somebody's code runs."""


class Faulty(Exception):
    """An environment that raised, hung or broke its contract, and how."""


class Hosted:
    """An environment in a daemon thread and an event loop of its own, so that one that hangs holds up nobody else."""

    def __init__(self, environment: Environment, limits: EpisodesConfig) -> None:
        self._environment = environment
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        # Tasks that an environment left behind fail unheard; what they had to say is in no answer, and asyncio would print it raw.
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

    def start_reset(self) -> "Asked":
        return self._ask(lambda: self._environment.reset())

    def start_step(self, message: Message) -> "Asked":
        return self._ask(lambda: self._environment.step(message))

    def _ask(self, question: Callable[[], Any]) -> "Asked":
        async def answered() -> Any:
            try:
                found = question()  # in this thread, so that even a method that is not async holds up nobody else
                return await found if inspect.isawaitable(found) else found
            except (Exception, asyncio.CancelledError):
                raise
            except BaseException as error:  # SystemExit, say: would end the thread with nothing said
                raise Faulty(f"raised {describe_error(error)}") from None

        return Asked(self._submit(answered()), self._limits.step_timeout_s)

    def _submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """The future of something to be done in the loop; one that has failed where somebody's code has ended the loop."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(Faulty("ended the event loop that it lives in"))
            return failed

    def close(self) -> None:
        """Close the environment where it can be closed, and let the thread end; one that hangs in the environment's own code is
        left behind."""

        async def closed() -> None:
            try:
                found = self._environment.close() if hasattr(self._environment, "close") else None  # type: ignore[attr-defined]  # may be there
                if inspect.isawaitable(found):
                    await asyncio.wait_for(found, self._limits.step_timeout_s)
            finally:
                self._loop.stop()

        if self._thread.is_alive():
            self._submit(closed())


class Asked:
    """An answer that an environment owes."""

    def __init__(self, future: concurrent.futures.Future[Any], timeout_s: float) -> None:
        self._future = future
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def wait(self) -> Any:
        """The answer; raises Faulty where there is none in time, and where the environment raises."""
        try:
            return self._future.result(max(0.0, self._deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            if self._future.done():  # its own TimeoutError, not ours
                raise Faulty("raised TimeoutError") from None
            self._future.cancel()
            raise Faulty(f"gave no answer in {self._timeout_s:g} s") from None
        except concurrent.futures.CancelledError:
            raise Faulty("was cancelled") from None
        except Faulty:
            raise
        except Exception as error:
            raise Faulty(f"raised {describe_error(error)}") from None


def checked_opening(messages: Any, limits: EpisodesConfig, events: Counter[str]) -> list[Message]:
    """What an environment says first, as `checked_messages` has it; raises Faulty also where reading it raises."""
    try:
        return checked_messages(messages, limits, events)
    except Faulty:
        raise
    except BaseException as error:
        raise _unreadable(error, "an opening") from None


def checked_messages(messages: Any, limits: EpisodesConfig, events: Counter[str]) -> list[Message]:
    """An environment's messages, cut to size and without control characters, both counted in `events`.

    Raises Faulty where they are no messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Faulty(f"gave {type(messages).__name__} for observations, expected a sequence of messages")
    found: list[Message] = []
    events["observation_cut"] += max(0, len(messages) - _MAX_MESSAGES)
    for message in itertools.islice(messages, _MAX_MESSAGES):
        good = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not good or message.get("role") not in _ROLES:
            raise Faulty(f"gave an observation that is no message with role ({', '.join(_ROLES)}) and string content")
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
    """A step whose observations are fit to be shown and whose reward is a number in [0, 1]; raises Faulty where it has none.

    A step's fields are somebody's objects: whatever reading them raises is the environment's fault.
    """
    if not isinstance(step, Step):
        raise Faulty(f"gave {type(step).__name__} for a step, expected opd.Step")
    try:
        reward = _reward(step.reward)
        for name, count in dict(step.events).items():
            events[one_line(str(name))[:_MAX_NAME]] += _count(name, count)
        return Step(checked_messages(step.observations, limits, events), reward, bool(step.done))
    except Faulty:
        raise
    except BaseException as error:
        raise _unreadable(error, "a step") from None


def _count(name: Any, count: Any) -> int:
    good = isinstance(count, int | np.integer) or (isinstance(count, float) and count.is_integer())
    if not good or not 0 <= count < 2**53:
        raise Faulty(f"counted {count!r:.40} of the event {str(name)!a:.40}, expected a whole number from 0 to 2**53")
    return int(count)


def _unreadable(error: BaseException, what: str) -> Faulty:
    """The fault of an object that raises when it is read; the user's own interrupt is none."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    return Faulty(f"gave {what} that cannot be read: {describe_error(error)}")


def _reward(found: Any) -> float | None:
    if inspect.iscoroutine(found):
        found.close()
    try:
        return number_of(found)
    except ValueError as error:
        raise Faulty(f"gave the reward {error}") from None
