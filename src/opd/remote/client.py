"""HTTP requests to model servers: retried with growing waits, bounded in flight; messages never hold an API key."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import httpx2
import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from opd.config import RemoteConfig
from opd.errors import ModelError, one_line

T = TypeVar("T")

ANY_JSON: msgspec.json.Decoder[Any] = msgspec.json.Decoder()

_RETRIED = frozenset({408, 409, 425, 429})  # and every 5xx
_SHOWN = 200  # characters of a server's message


class BadAnswer(Exception):
    """An answer that cannot be used. The request is retried."""


class Refused(Exception):
    """An answer that a retry will not change; fix: the remedy, where it is known."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.fix = fix


class _Failed(Exception):
    """A request that may succeed when it is retried; wait_s: the wait in seconds that the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Endpoint:
    """One model at one or several equal servers; who: its name in messages; model: its name at the servers.

    adapter: `model` names an adapter on the servers' base model. key_env: the environment variable that holds the API key, which is
    read for each request and never stored. api_key: the key of servers that this run started. context: the longest sequence that
    the servers take, in tokens, where they say so.
    """

    who: str
    urls: tuple[str, ...]
    model: str = ""
    key_env: str | None = None
    context: int | None = None
    api_key: str | None = field(default=None, repr=False)
    adapter: bool = False

    @property
    def inside(self) -> bool:
        """Whether this run started the servers, so that requests use no proxy."""
        return self.api_key is not None

    def key(self) -> str | None:
        """The API key. Raises ModelError when its variable is not set, or holds a value that no header can carry."""
        if self.key_env is None:
            return self.api_key
        found = os.environ.get(self.key_env, "").strip()
        if not found:
            raise ModelError(
                f"{self.who}: environment variable {self.key_env} is not set; it must hold the server's API key"
            )
        if not (found.isascii() and found.isprintable()):
            raise ModelError(
                f"{self.who}: environment variable {self.key_env} holds letters that no HTTP header can carry; set the key again"
            )
        return found


class Deployment:
    """A model behind servers. Engines of this run restart, load new weights and sleep; a user's servers stay as they are."""

    def latest(self) -> Endpoint:
        """Where the latest weights are served, for new work; engines of the student load them first."""
        raise NotImplementedError

    def relocate(self) -> Endpoint | None:
        """Where the servers are now, for requests that failed; None where servers never move."""
        return None

    def in_use(self) -> AbstractContextManager[Any]:
        """Held while requests are made: the model stays awake, and its weights do not change."""
        return nullcontext()

    def updating(self) -> AbstractContextManager[Any]:
        """Held while weights are loaded: where they replace the weights in use, requests wait."""
        return nullcontext()


@dataclass(frozen=True)
class StaticDeployment(Deployment):
    """Servers that stay where they are."""

    endpoint: Endpoint

    def latest(self) -> Endpoint:
        return self.endpoint


@dataclass(frozen=True)
class Request(Generic[T]):
    """A request; a GET without a body. The answer is decoded by `decoder`, then by `read`, which raises BadAnswer for an answer to
    another request. attempts, timeout_s: at most so many attempts and seconds each, where the recipe allows more."""

    endpoint: Endpoint
    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    attempts: int | None = None
    timeout_s: float | None = None
    decoder: msgspec.json.Decoder[Any] = ANY_JSON


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The value that a request got, or the reason why it got none; retries: attempts after the first; fix: as in `Refused`."""

    value: T | None
    reason: str = ""
    retries: int = 0
    fix: str = ""


class Client:
    """Makes requests from any thread. One event loop in a thread of its own holds the connections.

    At most `max_in_flight` requests wait for one server. Requests to an endpoint with several servers take turns among them, and a
    retry goes to the next server. `close` it at the end; requests in flight then fail.
    """

    def __init__(self, limits: RemoteConfig) -> None:
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._clients: dict[bool, httpx2.AsyncClient] = {}
        self._in_flight: dict[str, asyncio.Semaphore] = {}
        self._turn = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="opd-client", daemon=True)
        self._thread.start()

    def send(self, requests: Sequence[Request[T]]) -> list[Answer[T]]:
        """Make all requests at once; the answers in order. Raises ModelError for a missing API key, and nothing else."""
        for endpoint in dict.fromkeys(request.endpoint for request in requests):
            endpoint.key()  # raises before any request is made
        return asyncio.run_coroutine_threadsafe(self._gather(requests), self._loop).result()

    def send_to(self, deployment: Deployment, requests: Sequence[Request[T]]) -> list[Answer[T]]:
        """The same, and lost requests are made once more where the servers of their deployment are by then, if they moved."""
        answers = self.send(requests)
        lost = [i for i, answer in enumerate(answers) if answer.value is None]
        there = deployment.relocate() if lost else None
        if there is None:
            return answers
        repeated = [replace(requests[i], endpoint=replace(requests[i].endpoint, urls=there.urls)) for i in lost]
        for i, answer in zip(lost, self.send(repeated), strict=True):
            answers[i] = replace(answer, retries=answers[i].retries + 1 + answer.retries)
        return answers

    def close(self) -> None:
        """Drop every connection and end the thread. A second call does nothing."""
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

    async def _gather(self, requests: Sequence[Request[T]]) -> list[Answer[T]]:
        return list(await asyncio.gather(*(self._retried(request) for request in requests)))

    async def _retried(self, request: Request[T]) -> Answer[T]:
        """Make one request until it succeeds, is refused, or has used its attempts."""
        first = self._turn
        self._turn += 1
        made = 0

        async def attempt() -> T:
            nonlocal made
            made += 1
            return await self._once(request, request.endpoint.urls[(first + made - 1) % len(request.endpoint.urls)])

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Failed),
            stop=stop_after_attempt(request.attempts or self._limits.attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            return Answer(await retrying(attempt), retries=made - 1)
        except Refused as error:
            return Answer(None, f"{request.endpoint.who}: {error}", made - 1, error.fix)
        except _Failed as error:
            return Answer(None, f"{request.endpoint.who}: {error} ({made} attempts)", made - 1)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: random below a bound that doubles, and at least the wait that the server asks for."""
        longest = self._limits.longest_wait_s
        drawn = wait_random_exponential(multiplier=self._limits.first_wait_s, max=longest)(state)
        error = state.outcome.exception() if state.outcome else None
        return min(longest, max(drawn, error.wait_s if isinstance(error, _Failed) else 0.0))

    async def _once(self, request: Request[T], url: str) -> T:
        client = self._client_of(request.endpoint)
        key = request.endpoint.key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout_s = min(request.timeout_s or self._limits.timeout_s, self._limits.timeout_s)
        method = "GET" if request.body is None else "POST"
        async with self._in_flight.setdefault(url, asyncio.Semaphore(self._limits.max_in_flight)):
            try:
                # httpx2's own timeout starts again with every byte that a slow server sends
                async with asyncio.timeout(timeout_s):
                    answer = await client.request(method, url + request.path, json=request.body, headers=headers)
            except (httpx2.TimeoutException, TimeoutError):
                raise _Failed(f"no answer from {url} in {timeout_s:g} s") from None
            except (httpx2.TransportError, httpx2.DecodingError) as error:
                raise _Failed(f"{url} cannot be reached: {_message_of(error, key)}") from None
        return _read(request, url, answer, key)

    def _client_of(self, endpoint: Endpoint) -> httpx2.AsyncClient:
        """The connections to servers of this run, which use no proxy of the environment, or those to other servers."""
        if endpoint.inside not in self._clients:
            # `_in_flight` bounds the requests: a bound of the pool would count the wait for a connection towards the timeout
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self._limits.max_in_flight)
            self._clients[endpoint.inside] = httpx2.AsyncClient(
                timeout=self._limits.timeout_s, limits=limits, trust_env=not endpoint.inside
            )
        return self._clients[endpoint.inside]


def _read(request: Request[T], url: str, answer: httpx2.Response, key: str | None) -> T:
    if answer.status_code != 200:
        reason = f"{url} answers {answer.status_code}: {_message_of(_server_message(answer), key)}"
        if answer.status_code in _RETRIED or answer.status_code >= 500:
            raise _Failed(reason, _retry_after(answer))
        raise Refused(reason, _fix(request, answer))
    try:
        return request.read(request.decoder.decode(answer.content))
    except BadAnswer as error:
        raise _Failed(f"{url} returns {_message_of(error, key)}") from None
    except msgspec.ValidationError as error:
        raise _Failed(f"{url} returns JSON of another form ({_message_of(error, key)})") from None
    except msgspec.DecodeError as error:
        if _has_nan(answer):
            raise _Failed(f"{url} returns NaN or an infinity, which JSON does not have") from None
        raise _Failed(f"{url} returns no JSON ({_message_of(error, key)})") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise _Failed(
            f"{url} returns JSON of another form ({type(error).__name__}: {_message_of(error, key)})"
        ) from None


def _has_nan(answer: httpx2.Response) -> bool:
    """Whether the answer holds NaN or an infinity, which Python's own decoder reads."""
    found: list[str] = []
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(answer.content, parse_constant=found.append)
    return bool(found)


def _server_message(answer: httpx2.Response) -> str:
    """The message of an error, in any of the usual places."""
    try:
        found = answer.json()
        for name in ("error", "message", "detail"):
            found = found.get(name, found) if isinstance(found, dict) else found
        return str(found)
    except ValueError:
        return answer.text


def _fix(request: Request[Any], answer: httpx2.Response) -> str:
    """The remedy for a refusal, where its status code says it."""
    match answer.status_code:
        case 401 | 403 if env := request.endpoint.key_env:
            return f"fix the API key in {env}"
        case 401 | 403:
            return "the server requires an API key: name its environment variable in api_key_env"
        case 404:
            return f"the server has no {request.path}: check url, and whether its kind is the one that `server` names"
        case _:
            return ""


def _retry_after(answer: httpx2.Response) -> float:
    """Seconds, where the server gives a number; dates are ignored."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", "")))
    except ValueError:
        return 0.0


def _message_of(said: object, key: str | None) -> str:
    """Another program's message in one short line, without the API key that it may repeat."""
    text = str(said) or ("nothing" if isinstance(said, str) else type(said).__name__)
    if key:
        text = text.replace(key, "***")
    text = one_line(text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
