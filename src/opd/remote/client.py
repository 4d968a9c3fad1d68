"""Requests to servers: retried with growing waits, bounded in flight, and never a secret in what they say."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import httpx2
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from opd.config import RemoteConfig
from opd.errors import ModelError, one_line

T = TypeVar("T")

ANYTHING: msgspec.json.Decoder[Any] = msgspec.json.Decoder()

_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx
_SHOWN = 200  # characters of a server's own words


class Unusable(Exception):
    """An answer that came and cannot be used; asking again may help."""


class Refused(Exception):
    """An answer that no repetition will change; `mend` is what would, where that is known."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


class _Failed(Exception):
    """A request that may succeed when it is made again; `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Endpoint:
    """One model at one or more servers that serve the same: who it is in messages, their addresses, its name there.

    adapter: the name is that of an adapter on the model that the servers hold.

    key_env: the environment variable that holds the servers' key; the key itself is read when a request is made, and kept nowhere.
    secret: the key of servers that this run started. context: the longest sequence that they take, where they said so.
    """

    who: str
    urls: tuple[str, ...]
    model: str = ""
    key_env: str | None = None
    context: int | None = None
    secret: str | None = field(default=None, repr=False)
    adapter: bool = False

    @property
    def inside(self) -> bool:
        """Whether this run started the servers, so that no proxy stands between."""
        return self.secret is not None

    def key(self) -> str | None:
        """The key. Raises ModelError when the variable is named and not set, or holds what no header can carry."""
        if self.key_env is None:
            return self.secret
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise ModelError(
                f"{self.who}: environment variable {self.key_env} is not set; it must hold the server's key"
            )
        if not (found.isascii() and found.isprintable()):
            raise ModelError(
                f"{self.who}: environment variable {self.key_env} holds letters that no HTTP header can carry; set the key again"
            )
        return found


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read: decoded from JSON, then by `read`, which raises Unusable for one that is not what was
    asked for. Without a body it is a GET. attempts: how often it is made, where that is not what the recipe says; timeout_s: how
    long it waits at most, where that is less than the recipe's."""

    endpoint: Endpoint
    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    attempts: int | None = None
    timeout_s: float | None = None
    decoder: msgspec.json.Decoder[Any] = ANYTHING


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a call brought: its value, or in words why there is none, and what to do, where that is known; retries: how often it
    was made again."""

    value: T | None
    reason: str = ""
    retries: int = 0
    fix: str = ""


class Client:
    """Makes calls from any thread: one event loop in a thread of its own, whose connections last as long as it does.

    At most `max_in_flight` calls wait for one server; those of an endpoint with several go to them in turns, and what fails at
    one is asked of the next. Close it when nothing is to be asked any more; calls that are in flight then fail.
    """

    def __init__(self, limits: RemoteConfig) -> None:
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._clients: dict[bool, httpx2.AsyncClient] = {}
        self._places: dict[str, asyncio.Semaphore] = {}
        self._turn = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="opd-wire", daemon=True)
        self._thread.start()

    def ask(self, calls: Sequence[Call[T]]) -> list[Answer[T]]:
        """Make all calls at once; their answers in order, none of which raises but for a missing key."""
        return self.start(calls).result()

    def start(self, calls: Sequence[Call[T]]) -> "Future[list[Answer[T]]]":
        """The same, without waiting."""
        for endpoint in dict.fromkeys(call.endpoint for call in calls):
            endpoint.key()  # a missing key is the user's to mend, before anything is asked
        return asyncio.run_coroutine_threadsafe(self._gather(calls), self._loop)

    def ask_again(
        self, calls: Sequence[Call[T]], answers: Sequence[Answer[T]], again: Callable[[], Endpoint | None]
    ) -> list[Answer[T]]:
        """The answers, with what was lost asked once more where `again` says that the servers are by then, if they moved."""
        found = list(answers)
        lost = [i for i, answer in enumerate(found) if answer.value is None]
        there = again() if lost else None
        if there is None:
            return found
        repeated = [replace(calls[i], endpoint=replace(calls[i].endpoint, urls=there.urls)) for i in lost]
        for i, answer in zip(lost, self.ask(repeated), strict=True):
            found[i] = replace(answer, retries=found[i].retries + 1 + answer.retries)
        return found

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine on the wire's loop, from which it may await `call`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Drop every connection and end the thread. A second time it does nothing."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for client in self._clients.values():
            await client.aclose()

    async def _gather(self, calls: Sequence[Call[T]]) -> list[Answer[T]]:
        return list(await asyncio.gather(*(self.call(call) for call in calls)))

    async def call(self, call: Call[T]) -> Answer[T]:
        """Make one call until it succeeds, is refused, or has been made often enough. For use on the wire's loop (`run`)."""
        attempts = call.attempts or self._limits.attempts
        first = self._turn
        self._turn += 1
        made = 0
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_Failed),
                stop=stop_after_attempt(attempts),
                wait=self._wait,
                reraise=True,
            ):
                with attempt:
                    made = attempt.retry_state.attempt_number
                    url = call.endpoint.urls[(first + made - 1) % len(call.endpoint.urls)]
                    return Answer(await self._once(call, url), retries=made - 1)
        except Refused as error:
            return Answer(None, f"{call.endpoint.who}: {error}", made - 1, error.fix)
        except _Failed as error:
            return Answer(None, f"{call.endpoint.who}: {error} ({made} attempts)", made - 1)
        raise AssertionError("unreachable")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: random below a bound that doubles, and not below what the server asked for."""
        longest = self._limits.longest_wait_s
        drawn = wait_random_exponential(multiplier=self._limits.first_wait_s, max=longest)(state)
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait_s if isinstance(error, _Failed) else 0.0
        return min(longest, max(drawn, asked))

    async def _once(self, call: Call[T], url: str) -> T:
        client = self._client_of(call.endpoint)
        place = self._places.setdefault(url, asyncio.Semaphore(self._limits.max_in_flight))
        key = call.endpoint.key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        most_s = min(call.timeout_s or self._limits.timeout_s, self._limits.timeout_s)
        async with place:
            try:
                # a server that sends a byte now and then must not hold a place for ever
                async with asyncio.timeout(most_s):
                    answer = await client.request(
                        "GET" if call.body is None else "POST", url + call.path, json=call.body, headers=headers
                    )
            except (httpx2.TimeoutException, TimeoutError):
                raise _Failed(f"no answer from {url} in {most_s:g} s") from None
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                raise _Failed(f"{url} cannot be asked: {_words(error, key)}") from None
        return _read(call, url, answer, key)

    def _client_of(self, endpoint: Endpoint) -> httpx2.AsyncClient:
        """The connections to servers of this run, which no proxy of the environment stands before, or those to others."""
        if endpoint.inside not in self._clients:
            # the bound on what is in flight is the wire's own: a pool's would count the wait for a place as time
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._limits.max_in_flight)
            self._clients[endpoint.inside] = httpx2.AsyncClient(
                timeout=self._limits.timeout_s, limits=limits, trust_env=not endpoint.inside
            )
        return self._clients[endpoint.inside]


def _read(call: Call[T], url: str, answer: httpx2.Response, key: str | None) -> T:
    if answer.status_code != 200:
        words = f"{url} answers {answer.status_code}: {_words(_message(answer), key)}"
        if answer.status_code in _AGAIN or answer.status_code >= 500:
            raise _Failed(words, _retry_after(answer))
        raise Refused(words, _fix(call, answer))
    try:
        return call.read(call.decoder.decode(answer.content))
    except Unusable as error:
        raise _Failed(f"{url} gives {_words(error, key)}") from None
    except msgspec.DecodeError as error:
        if isinstance(error, msgspec.ValidationError):
            raise _Failed(f"{url} gives an answer of another form ({_words(error, key)})") from None
        if _has_no_number(answer):
            raise _Failed(f"{url} gives NaN or an infinity, which JSON does not have") from None
        raise _Failed(f"{url} answers what is not JSON ({_words(error, key)})") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise _Failed(f"{url} gives an answer of another form ({type(error).__name__}: {_words(error, key)})") from None


def _has_no_number(answer: httpx2.Response) -> bool:
    """Whether there is NaN or an infinity in it, which Python's own reader knows."""
    found: list[str] = []
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(answer.content, parse_constant=found.append)
    return bool(found)


def _message(answer: httpx2.Response) -> str:
    """What a server says of its refusal, wherever it says it."""
    try:
        found = answer.json()
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        return str(found)
    except ValueError:
        return answer.text


def _fix(call: Call[Any], answer: httpx2.Response) -> str:
    """What to do about a refusal, where its number says it."""
    if answer.status_code in (401, 403):
        env = call.endpoint.key_env
        return f"mend the key in {env}" if env else "it wants a key: name its environment variable with api_key_env"
    return f"is a vLLM or SGLang server there? it has no {call.path}" if answer.status_code == 404 else ""


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds, where the server names them; dates are not read."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", "")))
    except ValueError:
        return 0.0


def _words(said: object, key: str | None) -> str:
    """Somebody else's words in one short line, without the key that they may repeat."""
    text = str(said) or ("nothing" if isinstance(said, str) else type(said).__name__)
    if key:
        text = text.replace(key, "***")
    text = one_line(text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
