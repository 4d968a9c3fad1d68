"""What every kind of server is asked, whatever its form, and the checks that its answers have in common. Pure functions."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from opd.remote.client import Endpoint, Unusable

_ABOVE_ZERO = 1e-2  # a log-probability that rounding put above 0; more is no log-probability


@dataclass(frozen=True)
class Scores:
    """Of a sequence: the log-probability of each token given those before it [tokens], float32 nats, 0 for the first; and the ids
    and log-probabilities that were named at each place [tokens, top + 1], the token's own first (-1 and -inf where there are
    fewer).
    """

    logprobs: np.ndarray
    ids: np.ndarray
    named: np.ndarray


@dataclass(frozen=True)
class Sampled:
    """A response: its tokens, the end token among them where it ended, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["end", "length"]


class Form(Protocol):
    """How a kind of server is asked, and how its answers are read. What reads raises Unusable for an answer to something else."""

    @property
    def path(self) -> str:
        """Where requests go."""
        ...

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        """Ask for the log-probability of every token of a sequence, and of the `top` likeliest at its place."""
        ...

    @property
    def scores(self) -> msgspec.json.Decoder[Any]:
        """What reads the JSON of an answer to that."""
        ...

    def read_scores(self, answer: Any, *, token_ids: Sequence[int], top: int) -> Scores:
        """The scores of that sequence."""
        ...

    def sample_body(
        self,
        endpoint: Endpoint,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        end_ids: Collection[int],
    ) -> dict[str, Any]:
        """Ask for one response from the full distribution, whatever the model's own generation config or the server's says."""
        ...

    def read_sample(self, answer: Mapping[str, Any], *, max_tokens: int, end_ids: Collection[int]) -> Sampled:
        """One response."""
        ...


@dataclass(frozen=True)
class Named:
    """What an answer says of every token but the first, as it came: the value of each; and of all places, one after the other, how
    many tokens are named there, their ids, and their values."""

    own: Sequence[object]
    counts: Sequence[int]
    ids: Sequence[int]
    values: Sequence[object]


def gathered(token_ids: Sequence[int], said: Named, *, top: int, fix: str = "") -> Scores:
    """The scores that an answer says. A token's own may be among those named at its place or not. mend: what may be done where
    fewer than `top` were named, which raises Unusable.

    All places at once: a driver reads every token that served teachers score, for `top` = 20 twenty-one values each.
    """
    tokens, every = np.asarray(token_ids, dtype=np.int64), np.arange(1, len(token_ids))
    logprobs = np.zeros(len(tokens), dtype=np.float32)
    logprobs[1:] = _as_logprobs(said.own, every)
    ids = np.full((len(tokens), top + 1), -1, dtype=np.int32)
    named = np.full((len(tokens), top + 1), -np.inf, dtype=np.float32)
    ids[1:, 0], named[1:, 0] = tokens[1:], logprobs[1:]
    if not top:
        return Scores(logprobs, ids, named)
    places = np.repeat(every, said.counts)
    values, names = _as_logprobs(said.values, places), np.array(said.ids, dtype=np.int64)
    if len(names) and not 0 <= names.min() <= names.max() <= np.iinfo(np.int32).max:
        raise Unusable("token ids that are no numbers from 0")
    # the token may be one of the likeliest, and takes the place of none
    others = names != tokens[places]
    places, values, names = places[others], values[others], names[others]
    counts = np.bincount(places, minlength=len(tokens))
    if np.any(few := counts[1:] < top - 1):
        place = 1 + int(few.argmax())
        raise Unusable(f"{counts[place] + 1} of the likeliest tokens at place {place}, asked for {top}{fix}")
    order = np.lexsort((-values, places))  # by place, the likeliest first; as named where they are equally so
    rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[places]
    kept = order[rank < top]
    rank = 1 + rank[rank < top]
    ids[places[kept], rank], named[places[kept], rank] = names[kept], values[kept]
    return Scores(logprobs, ids, named)


def response(
    tokens: list[int], logprobs: Sequence[object], *, stopped: bool, max_tokens: int, end_ids: Collection[int]
) -> Sampled:
    """A response whose parts fit each other; stopped: the server says that it ended, and not that it was cut."""
    if not tokens or len(tokens) > max_tokens or len(logprobs) != len(tokens):
        raise Unusable(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities, asked for 1 to {max_tokens}")
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise Unusable("token ids that are no numbers from 0")
    ended = tokens[-1] in end_ids
    if any(t in end_ids for t in tokens[:-1]) or stopped != ended:
        last = f"token {tokens[-1]}, {'an' if ended else 'no'} end token"
        raise Unusable(f"a response that {'ended' if stopped else 'was cut'} after {last}")
    values = [as_logprob(value, f"token {place}") for place, value in enumerate(logprobs)]
    return Sampled(tokens, values, "end" if ended else "length")


def _as_logprobs(values: Sequence[object], places: np.ndarray) -> np.ndarray:
    """Log-probabilities in nats, at most 0, of tokens at those places. Raises Unusable for the first that is none."""
    if set(map(type, values)) <= {float, int}:
        found = np.array(values, dtype=np.float64)
        if not np.any(np.isnan(found) | (found > _ABOVE_ZERO)):
            return np.minimum(found, 0.0)
    return np.array([as_logprob(value, f"place {place}") for value, place in zip(values, places, strict=True)])


def as_logprob(value: object, where: str) -> float:
    """A log-probability in nats, at most 0. Raises Unusable for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > _ABOVE_ZERO:
        raise Unusable(f"{value!r} as a log-probability at {where}")
    return min(float(value), 0.0)
