"""What a vLLM server is asked over /v1/completions, token ids in and out, and how its answers are read.

Written against vLLM 0.32: `prompt_logprobs` holds, for every token of the prompt but the first, the log-probability of that token
under the model as it is (no temperature), beside the k most probable; `return_token_ids` gives what was sampled as ids.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from opd.remote.client import Endpoint, Unusable
from opd.remote.protocol import Named, Sampled, Scores, gathered, response


class _Named(msgspec.Struct, gc=False):
    """A token that is named at a place; its text and its rank are not read."""

    logprob: float


class _Choice(msgspec.Struct):
    prompt_logprobs: list[dict[int, _Named] | None] | None = None


class _Scored(msgspec.Struct):
    """An answer with scores."""

    choices: list[_Choice]


_SCORED = msgspec.json.Decoder(_Scored)
_NO_CHOICE = "an answer without its one choice"


@dataclass(frozen=True)
class VllmForm:
    """The form of a vLLM server (`opd.remote.protocol.Form`)."""

    path: str = "/v1/completions"
    scores: msgspec.json.Decoder[Any] = _SCORED

    def score_body(self, endpoint: Endpoint, token_ids: Sequence[int], *, top: int) -> dict[str, Any]:
        return {
            "model": endpoint.model,
            "prompt": [int(i) for i in token_ids],
            "add_special_tokens": False,
            "prompt_logprobs": top,
            "max_tokens": 1,  # a server makes at least one
            "temperature": 0.0,
        }

    def read_scores(self, answer: _Scored, *, token_ids: Sequence[int], top: int) -> Scores:
        if len(answer.choices) != 1:
            raise Unusable(_NO_CHOICE)
        found = answer.choices[0].prompt_logprobs
        if found is None:
            raise Unusable("no prompt_logprobs; a vLLM server gives them")
        if len(found) != len(token_ids):
            raise Unusable(f"log-probabilities of {len(found)} tokens, asked for {len(token_ids)}")
        entries, own = [entry or {} for entry in found[1:]], []
        for place, (entry, token) in enumerate(zip(entries, token_ids[1:], strict=True), start=1):
            if token not in entry:
                raise Unusable(f"no log-probability of token {token} at place {place}")
            own.append(entry[token].logprob)
        named = Named(
            own,
            counts=[len(entry) for entry in entries],
            ids=[name for entry in entries for name in entry],
            values=[each.logprob for entry in entries for each in entry.values()],
        )
        return gathered(token_ids, named, top=top, fix=" (--max-logprobs)")

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
            "model": endpoint.model,
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

    def read_sample(self, answer: Mapping[str, Any], *, max_tokens: int, end_ids: Collection[int]) -> Sampled:
        choice = _choice(answer)
        tokens, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(tokens, list) or not isinstance(logprobs, list):
            raise Unusable("no token_ids or no logprobs; a vLLM server gives both")
        if reason not in ("stop", "length"):
            raise Unusable(f"a response that finished by '{reason}'")
        return response(tokens, logprobs, stopped=reason == "stop", max_tokens=max_tokens, end_ids=end_ids)


VLLM = VllmForm()


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise Unusable(_NO_CHOICE)
    return choices[0]
