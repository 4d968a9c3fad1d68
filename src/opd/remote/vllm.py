"""The protocol of vLLM servers: /v1/completions with token ids in and out.

Written against vLLM 0.32: `prompt_logprobs` holds, for every token of the prompt but the first, its log-probability under the model
as it is (no temperature) and the k likeliest tokens; `return_token_ids` returns the sampled tokens as ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from opd.remote.client import BadAnswer, Endpoint
from opd.remote.protocol_base import (
    FULL_DISTRIBUTION,
    RawScores,
    Sampled,
    SamplingParams,
    Scores,
    checked_sample,
    checked_scores,
)


class _Logprob(msgspec.Struct, gc=False):
    """A token at a place; its text and its rank are ignored."""

    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[int, _Logprob] | None] | None = None


class _Scored(msgspec.Struct):
    """An answer with scores."""

    choices: list[_Choice]


_NO_CHOICE = "an answer without its one choice"


class VllmProtocol:
    """The protocol of vLLM servers (`opd.remote.protocol_base.ServerProtocol`)."""

    path = "/v1/completions"
    score_decoder = msgspec.json.Decoder(_Scored)

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        # a server samples at least one token
        return _body(endpoint, token_ids) | {"prompt_logprobs": top, "max_tokens": 1, "temperature": 0.0}

    def read_scores(self, answer: _Scored, *, token_ids: Sequence[int], top: int) -> Scores:
        if len(answer.choices) != 1:
            raise BadAnswer(_NO_CHOICE)
        found = answer.choices[0].prompt_logprobs
        if found is None:
            raise BadAnswer("no prompt_logprobs; a vLLM server returns them")
        if len(found) != len(token_ids):
            raise BadAnswer(f"log-probabilities of {len(found)} tokens, asked for {len(token_ids)}")
        entries, own = [entry or {} for entry in found[1:]], []
        for place, (entry, token) in enumerate(zip(entries, token_ids[1:], strict=True), start=1):
            if token not in entry:
                raise BadAnswer(f"no log-probability of token {token} at place {place}")
            own.append(entry[token].logprob)
        raw = RawScores(
            own,
            top_counts=[len(entry) for entry in entries],
            top_ids=[name for entry in entries for name in entry],
            top_logprobs=[each.logprob for entry in entries for each in entry.values()],
        )
        return checked_scores(token_ids, raw, top=top, fix=" (--max-logprobs)")

    def sample_body(self, endpoint: Endpoint, token_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
        return {
            **_body(endpoint, token_ids),
            **FULL_DISTRIBUTION,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "stop_token_ids": sorted(params.end_ids),
            "logprobs": 0,
            "return_token_ids": True,
        }

    def read_sample(self, answer: Mapping[str, Any], params: SamplingParams) -> Sampled:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1:
            raise BadAnswer(_NO_CHOICE)
        tokens, reason = choices[0].get("token_ids"), choices[0].get("finish_reason")
        logprobs = (choices[0].get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list):
            raise BadAnswer("no token_ids or no logprobs; a vLLM server returns both")
        return checked_sample(tokens, logprobs, params, reason=reason)


def _body(endpoint: Endpoint, token_ids: Sequence[int]) -> dict[str, Any]:
    return {"model": endpoint.model, "prompt": [int(i) for i in token_ids], "add_special_tokens": False}
