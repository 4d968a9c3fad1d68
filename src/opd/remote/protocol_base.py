"""The interface of every kind of server, and the checks that their answers share. Pure functions."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from opd.remote.client import BadAnswer, Endpoint

FULL_DISTRIBUTION: Mapping[str, Any] = MappingProxyType(
    {
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "skip_special_tokens": False,
    }
)
"""Sampling parameters that vLLM and SGLang share. A server may take its defaults from the model's generation config."""

_MAX_LOGPROB = 1e-2  # rounding may put a log-probability this far above 0


@dataclass(frozen=True)
class Scores:
    """Of a sequence: the log-probability of each token given those before it [tokens], float32 nats, 0 for the first; and ids and
    log-probabilities at each place [tokens, top + 1], the token's own first (-1 and -inf where there are fewer).
    """

    logprobs: np.ndarray
    ids: np.ndarray
    top_k_logprobs: np.ndarray


@dataclass(frozen=True)
class Sampled:
    """A response: its tokens, the end token included where it ended, and their log-probabilities in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["end", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled: at most `max_tokens` tokens, up to one of `end_ids`."""

    max_tokens: int
    temperature: float
    seed: int
    end_ids: Collection[int]


class ServerProtocol(Protocol):
    """How a kind of server is asked, and how its answers are read. Readers raise BadAnswer for an answer to another request.

    path: of requests. score_decoder: decodes the JSON of an answer with scores.
    """

    path: str
    score_decoder: msgspec.json.Decoder[Any]

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        """Ask for the log-probability of every token of a sequence, and for the `top` likeliest tokens at its place."""
        ...

    def read_scores(self, answer: Any, *, token_ids: Sequence[int], top: int) -> Scores:
        """The scores of that sequence."""
        ...

    def sample_body(self, endpoint: Endpoint, token_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
        """Ask for one response from the full distribution, without the model's generation config."""
        ...

    def read_sample(self, answer: Mapping[str, Any], params: SamplingParams) -> Sampled:
        """One response."""
        ...


@dataclass(frozen=True)
class RawScores:
    """The unchecked values of an answer, for every token but the first: the log-probability of each token; and the likeliest tokens
    of all places in one list: how many there are at each place, their ids, and their log-probabilities."""

    logprobs: Sequence[object]
    top_counts: Sequence[int]
    top_ids: Sequence[int]
    top_logprobs: Sequence[object]


def checked_scores(token_ids: Sequence[int], raw: RawScores, *, top: int, fix: str = "") -> Scores:
    """The scores of an answer. The likeliest tokens may include the token itself. Raises BadAnswer where there are fewer than
    `top`; fix: the remedy for that.

    All places at once: the driver reads every token that remote teachers score, with `top` = 20 twenty-one values each.
    """
    tokens, every = np.asarray(token_ids, dtype=np.int64), np.arange(1, len(token_ids))
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    logprobs[1:] = _checked_logprobs(raw.logprobs, every)
    ids = np.full((len(tokens), top + 1), -1, dtype=np.int32)
    top_k_logprobs = np.full((len(tokens), top + 1), -np.inf, dtype=np.float32)
    ids[1:, 0], top_k_logprobs[1:, 0] = tokens[1:], logprobs[1:]
    if not top:
        return Scores(logprobs, ids, top_k_logprobs)
    places = np.repeat(every, raw.top_counts)
    values, names = _checked_logprobs(raw.top_logprobs, places), np.array(raw.top_ids, dtype=np.int64)
    if len(names) and not 0 <= names.min() <= names.max() <= np.iinfo(np.int32).max:
        raise BadAnswer("token ids that are not whole numbers from 0")
    # the token itself does not count among the likeliest
    others = names != tokens[places]
    places, values, names = places[others], values[others], names[others]
    counts = np.bincount(places, minlength=len(tokens))
    if np.any(few := counts[1:] < top - 1):
        place = 1 + int(few.argmax())
        raise BadAnswer(f"{counts[place] + 1} of the likeliest tokens at place {place}, asked for {top}{fix}")
    order = np.lexsort((-values, places))  # by place, the likeliest first; equally likely ones as the server lists them
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[places]
    kept = order[rank < top]
    rank = 1 + rank[rank < top]
    ids[places[kept], rank], top_k_logprobs[places[kept], rank] = names[kept], values[kept]
    return Scores(logprobs, ids, top_k_logprobs)


def checked_sample(tokens: list[int], logprobs: Sequence[object], params: SamplingParams, *, reason: object) -> Sampled:
    """A response, if its parts agree; reason: the server's finish reason, "stop" or "length". Raises BadAnswer."""
    if reason not in ("stop", "length"):
        raise BadAnswer(f"a response that finished by '{reason}'")
    if not tokens or len(tokens) > params.max_tokens or len(logprobs) != len(tokens):
        raise BadAnswer(
            f"{len(tokens)} tokens with {len(logprobs)} log-probabilities, asked for 1 to {params.max_tokens}"
        )
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise BadAnswer("token ids that are not whole numbers from 0")
    ended, stopped = tokens[-1] in params.end_ids, reason == "stop"
    if any(t in params.end_ids for t in tokens[:-1]) or stopped != ended:
        last = f"token {tokens[-1]}, {'an' if ended else 'no'} end token"
        raise BadAnswer(f"a response that {'ended' if stopped else 'was cut'} after {last}")
    values = [_checked_logprob(value, f"token {place}") for place, value in enumerate(logprobs)]
    return Sampled(tokens, values, "end" if ended else "length")


def _checked_logprobs(values: Sequence[object], places: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats, at most 0, of tokens at those places. Raises BadAnswer for the first value that is none."""
    if set(map(type, values)) <= {float, int}:
        found = np.array(values, dtype=np.float64)
        if not np.any(np.isnan(found) | (found > _MAX_LOGPROB)):
            return np.minimum(found, 0.0)
    return np.array([_checked_logprob(value, f"place {place}") for value, place in zip(values, places, strict=True)])


def _checked_logprob(value: object, where: str) -> float:
    """A log-probability in nats, at most 0. Raises BadAnswer for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > _MAX_LOGPROB:
        raise BadAnswer(f"{value!r} as a log-probability at {where}")
    return min(float(value), 0.0)
