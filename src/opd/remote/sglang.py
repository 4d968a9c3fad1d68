"""The protocol of SGLang servers: /generate, their own interface, with token ids in and out.

Written against the documentation and the source of SGLang 0.5.23. `input_token_logprobs` holds [log-probability, token id, text]
for every token of the prompt, null for the first's, under the model as it is: `sampling_params.temperature` does not touch them.
`logprob_start_len` = 0 asks for all of them; the server then computes the whole prompt, also the part in its prefix cache.
`input_top_logprobs` holds the k likeliest tokens at each place, in the same form, the token itself only if it is one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opd.remote.client import ANY_JSON, BadAnswer, Endpoint
from opd.remote.protocol_base import (
    FULL_DISTRIBUTION,
    RawScores,
    Sampled,
    SamplingParams,
    Scores,
    checked_sample,
    checked_scores,
)

_CLIPPED = 0  # the server lists the last id of its vocabulary as this id


class SglangProtocol:
    """The protocol of SGLang servers (`opd.remote.protocol_base.ServerProtocol`)."""

    path = "/generate"
    score_decoder = ANY_JSON

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        return {
            **_body(endpoint, token_ids),
            "logprob_start_len": 0,
            "top_logprobs_num": top,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }

    def read_scores(self, answer: Mapping[str, Any], *, token_ids: Sequence[int], top: int) -> Scores:
        meta = _meta_info(answer)
        found = meta.get("input_token_logprobs")
        likeliest = meta.get("input_top_logprobs") if top else [None] * len(token_ids)
        if not isinstance(found, list) or not isinstance(likeliest, list):
            missing = "input_top_logprobs" if isinstance(found, list) else "input_token_logprobs"
            raise BadAnswer(f"no {missing}; an SGLang server returns them")
        for what, row in (("log-probabilities", found), ("likeliest tokens", likeliest)):
            if len(row) != len(token_ids):
                raise BadAnswer(f"{what} of {len(row)} tokens, asked for {len(token_ids)}")
        highest = max(token_ids)
        for place, token in enumerate(token_ids):
            _, said, *_ = found[place]
            if said != token and not (said == _CLIPPED and token == highest):
                raise BadAnswer(f"a log-probability of token {said} at place {place}, asked for {token}")
        entries = [entry or [] for entry in likeliest[1:]]
        for place, entry in enumerate(entries, start=1):
            if len({name for _, name, *_ in entry}) < len(entry):
                raise BadAnswer(f"one token twice at place {place}")
            if len(entry) < top:
                raise BadAnswer(f"{len(entry)} of the likeliest tokens at place {place}, asked for {top}")
        raw = RawScores(
            [value for value, *_ in found[1:]],
            top_counts=[len(entry) for entry in entries],
            top_ids=[name for entry in entries for _, name, *_ in entry],
            top_logprobs=[value for entry in entries for value, *_ in entry],
        )
        return checked_scores(token_ids, raw, top=top)

    def sample_body(self, endpoint: Endpoint, token_ids: Sequence[int], params: SamplingParams) -> dict[str, Any]:
        return {
            **_body(endpoint, token_ids),
            "sampling_params": {
                **FULL_DISTRIBUTION,
                "max_new_tokens": params.max_tokens,
                "min_new_tokens": 0,
                "temperature": params.temperature,
                "sampling_seed": params.seed,  # has an effect with --enable-deterministic-inference only
                "stop": [],
                "stop_token_ids": sorted(params.end_ids),
                "ignore_eos": False,  # True would ignore stop_token_ids too
            },
        }

    def read_sample(self, answer: Mapping[str, Any], params: SamplingParams) -> Sampled:
        meta = _meta_info(answer)
        tokens, said, reason = answer.get("output_ids"), meta.get("output_token_logprobs"), meta.get("finish_reason")
        if not isinstance(tokens, list) or not isinstance(said, list) or not isinstance(reason, Mapping):
            raise BadAnswer(
                "no output_ids, no output_token_logprobs or no finish_reason; an SGLang server returns all three"
            )
        if [token for _, token, *_ in said] != tokens:
            raise BadAnswer("log-probabilities of other tokens than those of the response")
        # a server whose logits are NaN says so here, and ends the response with an arbitrary token
        if reason.get("type") == "stop" and tokens and reason.get("matched") != tokens[-1]:
            raise BadAnswer(f"a response that was stopped by {reason.get('matched')!r}")
        return checked_sample(tokens, [value for value, *_ in said], params, reason=reason.get("type"))


def _body(endpoint: Endpoint, token_ids: Sequence[int]) -> dict[str, Any]:
    body = {"input_ids": [int(i) for i in token_ids], "return_logprob": True, "stream": False}
    # a server has one model; a request names an adapter
    return {**body, "lora_path": endpoint.model} if endpoint.adapter else body


def _meta_info(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = answer.get("meta_info")
    if not isinstance(meta, Mapping):
        raise BadAnswer("an answer without its meta_info")
    reason = meta.get("finish_reason")
    if isinstance(reason, Mapping) and reason.get("type") == "abort":
        raise BadAnswer(f"an answer that was aborted ({reason.get('message')})")
    return meta
