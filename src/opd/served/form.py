"""What every kind of server is asked, whatever its form, and the checks that its answers have in common. Pure functions."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from opd.served.wire import Endpoint, Unusable

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

    def read_scores(self, answer: Mapping[str, Any], *, token_ids: Sequence[int], top: int) -> Scores:
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


def gathered(
    token_ids: Sequence[int], places: Iterable[tuple[float, Mapping[int, float]]], *, top: int, mend: str = ""
) -> Scores:
    """Scores from what was said of each token but the first: its own log-probability, and those that were named at its place by id,
    its own among them or not. mend: what may be done where fewer than `top` were named, which raises Unusable."""
    logprobs = np.zeros(len(token_ids), dtype=np.float32)
    ids = np.full((len(token_ids), top + 1), -1, dtype=np.int32)
    named = np.full((len(token_ids), top + 1), -np.inf, dtype=np.float32)
    for place, (token, (own, said)) in enumerate(zip(token_ids[1:], places, strict=True), start=1):
        logprobs[place] = own
        others = {name: value for name, value in said.items() if name != token}
        if len(others) < top - 1:
            raise Unusable(f"{len(others) + 1} of the likeliest tokens at place {place}, asked for {top}{mend}")
        # the token may be one of the likeliest, and takes the place of none
        rest = sorted(others.items(), key=lambda item: -item[1])[:top]
        ids[place, : 1 + len(rest)] = [token, *(name for name, _ in rest)]
        named[place, : 1 + len(rest)] = [own, *(value for _, value in rest)]
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


def as_logprob(value: object, where: str) -> float:
    """A log-probability in nats, at most 0. Raises Unusable for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > _ABOVE_ZERO:
        raise Unusable(f"{value!r} as a log-probability at {where}")
    return min(float(value), 0.0)
