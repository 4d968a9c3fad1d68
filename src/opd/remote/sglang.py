"""What an SGLang server is asked over /generate, its own interface, token ids in and out, and how its answers are read.

Written against the documentation and the source of SGLang 0.5.23. `input_token_logprobs` holds [log-probability, token id, text]
for every token of the prompt, null for the first's, under the model as it is: `sampling_params.temperature` does not touch them.
`logprob_start_len` = 0 asks for all of them, and the server then computes the whole prompt, whatever its prefix cache holds.
`input_top_logprobs` holds the k most probable at each place, in the same form, the token itself among them only if it is one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from opd.remote.client import ANYTHING, Endpoint, Unusable
from opd.remote.protocol import Named, Sampled, Scores, gathered, response

_CLIPPED = 0  # what the server calls the last id of its vocabulary where it lists the prompt's tokens


@dataclass(frozen=True)
class SglangForm:
    """The form of an SGLang server (`opd.remote.protocol.Form`)."""

    path: str = "/generate"
    scores: msgspec.json.Decoder[Any] = ANYTHING

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        return {
            **_asked(endpoint, token_ids),
            "logprob_start_len": 0,
            "top_logprobs_num": top,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }

    def read_scores(self, answer: Mapping[str, Any], *, token_ids: Sequence[int], top: int) -> Scores:
        about = _about(answer)
        found = about.get("input_token_logprobs")
        likeliest = about.get("input_top_logprobs") if top else [None] * len(token_ids)
        if not isinstance(found, list) or not isinstance(likeliest, list):
            missing = "input_top_logprobs" if isinstance(found, list) else "input_token_logprobs"
            raise Unusable(f"no {missing}; an SGLang server gives them")
        for what, row in (("log-probabilities", found), ("likeliest tokens", likeliest)):
            if len(row) != len(token_ids):
                raise Unusable(f"{what} of {len(row)} tokens, asked for {len(token_ids)}")
        highest = max(token_ids)
        for place, token in enumerate(token_ids):
            _, said, *_ = found[place]
            if said != token and not (said == _CLIPPED and token == highest):
                raise Unusable(f"a log-probability of token {said} at place {place}, asked for {token}")
        entries = [entry or [] for entry in likeliest[1:]]
        for place, entry in enumerate(entries, start=1):
            if len({name for _, name, *_ in entry}) < len(entry):
                raise Unusable(f"a token that is named twice at place {place}")
            if len(entry) < top:
                raise Unusable(f"{len(entry)} of the likeliest tokens at place {place}, asked for {top}")
        named = Named(
            own=[value for value, *_ in found[1:]],
            counts=[len(entry) for entry in entries],
            ids=[name for entry in entries for _, name, *_ in entry],
            values=[value for entry in entries for value, *_ in entry],
        )
        return gathered(token_ids, named, top=top)

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
        return {
            **_asked(endpoint, token_ids),
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": temperature,
                "sampling_seed": seed,  # heeded with --enable-deterministic-inference alone
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "min_new_tokens": 0,
                "stop": [],
                "stop_token_ids": sorted(end_ids),
                "ignore_eos": False,  # which would ignore stop_token_ids too
                "skip_special_tokens": False,
            },
        }

    def read_sample(self, answer: Mapping[str, Any], *, max_tokens: int, end_ids: Collection[int]) -> Sampled:
        about = _about(answer)
        tokens, said, reason = answer.get("output_ids"), about.get("output_token_logprobs"), about.get("finish_reason")
        if not isinstance(tokens, list) or not isinstance(said, list) or not isinstance(reason, Mapping):
            raise Unusable("no output_ids, no output_token_logprobs or no finish_reason; an SGLang server gives them")
        if [token for _, token, *_ in said] != tokens:
            raise Unusable("log-probabilities of other tokens than those of the response")
        stopped = reason.get("type") == "stop"
        # a server whose logits are no numbers says so here, and ends the response with a token of its own choice
        if stopped and tokens and reason.get("matched") != tokens[-1]:
            raise Unusable(f"a response that was stopped by {reason.get('matched')!r}")
        if reason.get("type") not in ("stop", "length"):
            raise Unusable(f"a response that finished by '{reason.get('type')}'")
        logprobs = [value for value, *_ in said]
        return response(tokens, logprobs, stopped=stopped, max_tokens=max_tokens, end_ids=end_ids)


SGLANG = SglangForm()


def _asked(endpoint: Endpoint, token_ids: Sequence[int]) -> dict[str, Any]:
    asked = {"input_ids": [int(i) for i in token_ids], "return_logprob": True, "stream": False}
    # a server has one model; its adapters are asked for by their names
    return {**asked, "lora_path": endpoint.model} if endpoint.adapter else asked


def _about(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    about = answer.get("meta_info")
    if not isinstance(about, Mapping):
        raise Unusable("an answer without its meta_info")
    reason = about.get("finish_reason")
    if isinstance(reason, Mapping) and reason.get("type") == "abort":
        raise Unusable(f"an answer that was broken off ({reason.get('message')})")
    return about
