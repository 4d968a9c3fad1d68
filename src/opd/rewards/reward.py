"""Rewards as numbers: how a reward function is called, awaited and checked."""

import asyncio
import concurrent.futures
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from opd.errors import RewardError, describe_error, one_line
from opd.records import Prompt, Rollout

Reward: TypeAlias = Callable[[Prompt, str], Awaitable[float | None] | float | None]
"""A reward function: (prompt, response) -> a number in [0, 1], or None for no verdict.

opd calls it for one response at a time, not for a batch. `response` is the whole text, thoughts included. For an episode of several
turns opd calls it once: `response` is the student's last turn, and `prompt.messages` are those of the start. A bool and a numpy or
torch scalar are numbers; a text is not. No reward trains on a response without a verdict.

It may be async. opd then awaits the rewards of a step together, at most 64 at a time, in one event loop of the process.
"""

_MOST_AT_ONCE = 64  # async rewards that run at the same time; a step may have thousands
_LOOK_S = 0.5  # how often it is checked that the thread of the event loop lives


class TimedOut(float):
    """The reward 0 of a response that its verifier did not compare in time; runs count it."""


TIMEOUTS = "verifier_timeouts"
"""The event of a rollout whose reward is `TimedOut`."""


def number_of(found: Any) -> float | None:
    """A reward as a float in [0, 1], or None where it is None.

    A bool, a numpy or torch scalar and an array of one element are numbers; text is none, not even "0.5". Raises ValueError with
    the value and its type, and what was expected.
    """
    if found is None or isinstance(found, TimedOut):
        return found
    plain: Any = found
    if callable(getattr(found, "item", None)):
        try:
            plain = found.item()
        except Exception:  # an array of several elements
            plain = None
    number = hasattr(type(plain), "__float__") or hasattr(type(plain), "__index__")
    try:
        value = float(plain) if number else float("nan")
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        kind = "" if type(found) in (int, float) else f" ({type(found).__name__})"
        raise ValueError(f"{_shown(found)}{kind}, expected a number in [0, 1] or None")
    return value


def rewards_of(reward: Reward, rollouts: Sequence[Rollout], *, opened: bool = False) -> list[float | None]:
    """The reward of each rollout; opened: its response behind the thinking tag that its prompt opened.

    What is awaitable is awaited, all of the rollouts at the same time, in a thread of its own: the caller's thread may already run
    an event loop, as in a notebook.

    Raises RewardError that names prompt and sample where the reward raises, and where it is no number in [0, 1].
    """
    found: list[Any] = []
    try:
        for rollout in rollouts:
            try:
                value = reward(rollout.prompt, (rollout.opened if opened else "") + rollout.response)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: a reward does not end the run unheard
                raise _failed(rollout, error) from error
            found.append(value if inspect.isawaitable(value) else _checked(rollout, value))
        waiting = [i for i, value in enumerate(found) if inspect.isawaitable(value)]
        for i, value in zip(waiting, awaited([found[i] for i in waiting]), strict=True):
            if isinstance(value, Raised):
                if not value.cancelled:
                    raise _failed(rollouts[i], value.error) from value.error
            else:
                found[i] = _checked(rollouts[i], value)
    finally:
        for value in found:
            if inspect.iscoroutine(value) and inspect.getcoroutinestate(value) == inspect.CORO_CREATED:
                value.close()
    return found


@dataclass(frozen=True)
class Raised:
    """The error of an awaitable; cancelled: because another one had raised before."""

    error: BaseException
    cancelled: bool = False


def awaited(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """The result of each awaitable, or a `Raised`; once one has raised, those that are not done are cancelled.

    They share one event loop, which lives as long as the process: a client that a user's code keeps between calls stays usable.
    """
    if not awaitables:
        return []
    loop, thread = _loop()
    future = asyncio.run_coroutine_threadsafe(_gathered(awaitables), loop)
    while True:
        try:
            return future.result(_LOOK_S)
        except concurrent.futures.TimeoutError:
            if not thread.is_alive():
                _loop.cache_clear()
                raise RewardError(
                    "async code ended the event loop that it runs in; it must not stop the loop"
                ) from None
        except BaseException:
            future.cancel()
            raise


@functools.cache
def _loop() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="opd-async")
    thread.start()
    return loop, thread


async def _gathered(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    gate = asyncio.Semaphore(_MOST_AT_ONCE)
    failed = asyncio.Event()

    async def one(awaitable: Awaitable[Any]) -> Any:
        async with gate:
            try:
                return await awaitable
            except BaseException as error:  # a SystemExit would end the loop's thread
                cancelled = failed.is_set()
                failed.set()
                return Raised(error, cancelled=cancelled)

    tasks = [asyncio.create_task(one(awaitable)) for awaitable in awaitables]
    stop = asyncio.create_task(failed.wait())
    every = asyncio.gather(*tasks, return_exceptions=True)
    try:
        await asyncio.wait([every, stop], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        for task in tasks:
            task.cancel()
    found = await every
    return [Raised(value, cancelled=True) if isinstance(value, BaseException) else value for value in found]


def _checked(rollout: Rollout, value: Any) -> float | None:
    try:
        return number_of(value)
    except ValueError as error:
        raise RewardError(f"{_name(rollout)}: the reward is {error}") from None
    except Exception as error:  # somebody's object
        raise RewardError(f"{_name(rollout)}: the reward cannot be read: {describe_error(error)}") from error


def _failed(rollout: Rollout, error: BaseException) -> RewardError:
    return RewardError(f"{_name(rollout)}: the reward raised {describe_error(error)}")


def _name(rollout: Rollout) -> str:
    return f"prompt '{rollout.prompt.id}', sample {rollout.sample}"


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value))[:60]
    except Exception:
        return "an object that cannot be shown"
