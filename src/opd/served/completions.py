"""What a vLLM server is asked over /v1/completions, token ids in and out, and how its answers are read. Pure functions.

Written against vLLM 0.32: `prompt_logprobs` holds, for every token of the prompt but the first, the log-probability of that token
under the model as it is (no temperature), beside the k most probable; `return_token_ids` gives what was sampled as ids.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from opd.served.wire import Unusable

PATH = "/v1/completions"
_ABOVE_ZERO = 1e-2  # a log-probability that rounding put above 0; more is no log-probability


def score_body(model: str, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
    """Ask for the log-probability of every token of a sequence, and of the `top` likeliest at its place."""
    return {
        "model": model,
        "prompt": [int(i) for i in token_ids],
        "add_special_tokens": False,
        "prompt_logprobs": top,
        "max_tokens": 1,  # a server makes at least one
        "temperature": 0.0,
    }


@dataclass(frozen=True)
class Scores:
    """Of a sequence: the log-probability of each token given those before it [tokens], float32 nats, 0 for the first; and the ids
    and log-probabilities that were named at each place [tokens, top + 1], the token's own first (-1 and -inf where there are
    fewer).
    """

    logprobs: np.ndarray
    ids: np.ndarray
    named: np.ndarray


def read_scores(answer: Mapping[str, Any], *, token_ids: Sequence[int], top: int) -> Scores:
    """Raises Unusable for an answer about other tokens, or with fewer than `top` of the likeliest."""
    found = _choice(answer).get("prompt_logprobs")
    if not isinstance(found, list):
        raise Unusable("no prompt_logprobs; a vLLM server gives them")
    if len(found) != len(token_ids):
        raise Unusable(f"log-probabilities of {len(found)} tokens, asked for {len(token_ids)}")
    logprobs = np.zeros(len(token_ids), dtype=np.float32)
    ids = np.full((len(token_ids), top + 1), -1, dtype=np.int32)
    named = np.full((len(token_ids), top + 1), -np.inf, dtype=np.float32)
    for place, (entry, token) in enumerate(zip(found[1:], token_ids[1:], strict=True), start=1):
        own = entry.get(str(int(token))) if isinstance(entry, Mapping) else None
        if own is None:
            raise Unusable(f"no log-probability of token {int(token)} at place {place}")
        logprobs[place] = _logprob(own["logprob"], f"place {place}")
        others = {int(name): _logprob(each["logprob"], f"place {place}") for name, each in entry.items()}
        del others[int(token)]
        if len(others) < top - 1:
            raise Unusable(
                f"{len(others) + 1} of the likeliest tokens at place {place}, asked for {top} (--max-logprobs)"
            )
        # the token may be one of the likeliest, and takes the place of none
        rest = sorted(others.items(), key=lambda item: -item[1])[:top]
        ids[place, : 1 + len(rest)] = [int(token), *(name for name, _ in rest)]
        named[place, : 1 + len(rest)] = [logprobs[place], *(value for _, value in rest)]
    return Scores(logprobs, ids, named)


@dataclass(frozen=True)
class Sampled:
    """A response: its tokens, the end token among them where it ended, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["end", "length"]


def sample_body(
    model: str, token_ids: Sequence[int], *, max_tokens: int, temperature: float, seed: int, end_ids: Collection[int]
) -> dict[str, Any]:
    """Ask for one response from the full distribution, whatever the model's own generation config or the server's says."""
    return {
        "model": model,
        "prompt": [int(i) for i in token_ids],
        "add_special_tokens": False,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(end_ids),
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def read_sample(answer: Mapping[str, Any], *, max_tokens: int, end_ids: Collection[int]) -> Sampled:
    """One response. Raises Unusable for one whose parts do not fit each other."""
    choice = _choice(answer)
    tokens, reason = choice.get("token_ids"), choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(logprobs, list):
        raise Unusable("no token_ids or no logprobs; a vLLM server gives both")
    if not tokens or len(tokens) > max_tokens or len(logprobs) != len(tokens):
        raise Unusable(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities, asked for 1 to {max_tokens}")
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in tokens):
        raise Unusable("token ids that are no numbers from 0")
    ended = tokens[-1] in end_ids
    if any(t in end_ids for t in tokens[:-1]) or reason not in ("stop", "length") or (reason == "stop") != ended:
        last = f"token {tokens[-1]}, {'an' if ended else 'no'} end token"
        raise Unusable(f"a response that finished by '{reason}' after {last}")
    values = [_logprob(value, f"token {place}") for place, value in enumerate(logprobs)]
    return Sampled(tokens, values, "end" if ended else "length")


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise Unusable("an answer without its one choice")
    return choices[0]


def _logprob(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > _ABOVE_ZERO:
        raise Unusable(f"{value!r} as a log-probability at {where}")
    return min(float(value), 0.0)
