"""What answers of servers say, read for all places at once, beside a reading of one place after the other."""

import json
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.config.teachers import ServerKind
from opd.remote.client import BadAnswer
from opd.remote.protocol_base import Scores, ServerProtocol
from opd.remote.protocols import protocol_of
from opd.remote.sglang import SglangProtocol
from opd.remote.vllm import VllmProtocol

TOP = 3
VLLM, SGLANG = VllmProtocol(), SglangProtocol()
# few values, so that many are equally likely; a server in float16 rounds to a little above 0
VALUES = st.sampled_from([0.004, 0.0, -0.5, -0.5, -1.25, -1.25, -7.0, -3, -9999.0])


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], list[tuple[float, dict[int, float]]]]:
    """A sequence, and of each place but the first its token's value and those named there, in any order."""
    tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    places = []
    for token in tokens[1:]:
        others = draw(
            st.lists(
                st.integers(0, 9).filter(lambda t, own=token: t != own), min_size=TOP, max_size=TOP + 1, unique=True
            )
        )
        own = draw(VALUES)
        named = {name: draw(VALUES) for name in others} | {token: own}
        places.append((own, {name: named[name] for name in draw(st.permutations(list(named)))}))
    return tokens, places


def one_by_one(
    tokens: list[int], places: list[tuple[float, dict[int, float]]]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The token, then the likeliest others in the order in which they were named."""
    logprobs, ids, named = [0.0], [[-1] * (TOP + 1)], [[-np.inf] * (TOP + 1)]
    for token, (own, said) in zip(tokens[1:], places, strict=True):
        rest = [(name, min(value, 0.0)) for name, value in said.items() if name != token]
        rest = sorted(rest, key=lambda item: -item[1])[:TOP]
        logprobs.append(min(own, 0.0))
        ids.append([token, *(name for name, _ in rest)])
        named.append([min(own, 0.0), *(value for _, value in rest)])
    return logprobs, ids, named


def vllm_says(places: list[tuple[float, dict[int, float]]]) -> dict[str, Any]:
    found = [{str(name): {"logprob": value, "rank": 1} for name, value in said.items()} for _, said in places]
    return {"choices": [{"prompt_logprobs": [None, *found]}]}


def sglang_says(tokens: list[int], places: list[tuple[float, dict[int, float]]]) -> dict[str, Any]:
    own = [
        [None, tokens[0], None],
        *([value, token, None] for token, (value, _) in zip(tokens[1:], places, strict=True)),
    ]
    top = [None, *([[value, name, None] for name, value in said.items()] for _, said in places)]
    return {"meta_info": {"input_token_logprobs": own, "input_top_logprobs": top}}


def read(protocol: ServerProtocol, answer: dict[str, Any], *, token_ids: list[int], top: int) -> Scores:
    return protocol.read_scores(
        protocol.score_decoder.decode(json.dumps(answer).encode()), token_ids=token_ids, top=top
    )


@given(answers())
def test_places_read_together_are_those_read_one_by_one(case: tuple[list[int], list[tuple[float, dict[int, float]]]]):
    tokens, places = case
    logprobs, ids, named = one_by_one(tokens, places)
    for protocol, answer in ((VLLM, vllm_says(places)), (SGLANG, sglang_says(tokens, places))):
        found = read(protocol, answer, token_ids=tokens, top=TOP)
        assert (found.logprobs.dtype, found.ids.dtype, found.top_k_logprobs.dtype) == (np.float32, np.int32, np.float32)
        np.testing.assert_array_equal(found.logprobs, np.array(logprobs, dtype=np.float32))
        np.testing.assert_array_equal(found.ids, np.array(ids, dtype=np.int32))
        np.testing.assert_array_equal(found.top_k_logprobs, np.array(named, dtype=np.float32))
        assert read(protocol, answer, token_ids=tokens, top=0).top_k_logprobs.shape == (len(tokens), 1)


GOOD: list[tuple[float, dict[int, float]]] = [(-1.0, {5: -1.0, 6: -0.5, 7: -2.0}), (-2.0, {6: -2.0, 1: -0.1, 2: -3.0})]


@pytest.mark.parametrize(
    ("value", "line", "typed"),
    [
        (0.5, "0.5 as a log-probability at place 2", None),
        (True, "True as a log-probability at place 2", "got `bool`"),
        (None, "None as a log-probability at place 2", "got `null`"),
        ("-1", "'-1' as a log-probability at place 2", "got `str`"),
    ],
)
def test_what_is_no_log_probability_is_named_with_its_place(value: Any, line: str, typed: str | None):
    places = [GOOD[0], (-2.0, GOOD[1][1] | {1: value})]
    with pytest.raises(BadAnswer, match=line):
        read(SGLANG, sglang_says([4, 5, 6], places), token_ids=[4, 5, 6], top=TOP)
    at = rf"Expected `float`, {typed} - at `\$.choices\[0*\.*\].prompt_logprobs"
    with pytest.raises(msgspec.ValidationError if typed else BadAnswer, match=at if typed else line):
        read(VLLM, vllm_says(places), token_ids=[4, 5, 6], top=TOP)


def test_numbers_that_json_does_not_have_are_none():
    answer = {"meta_info": {"input_token_logprobs": [[None, 4, None], [float("nan"), 5, None]]}}
    with pytest.raises(BadAnswer, match="nan as a log-probability at place 1"):
        SGLANG.read_scores(answer, token_ids=[4, 5], top=0)
    for protocol in (VLLM, SGLANG):
        with pytest.raises(msgspec.DecodeError):
            protocol.score_decoder.decode(json.dumps(answer).encode())


@pytest.mark.parametrize("name", [-1, 2**31, 2**40])
def test_ids_that_no_vocabulary_has_are_refused(name: int):
    places = [GOOD[0], (-2.0, {6: -2.0, name: -0.1, 2: -3.0})]
    for protocol, answer in ((VLLM, vllm_says(places)), (SGLANG, sglang_says([4, 5, 6], places))):
        with pytest.raises(BadAnswer, match="not whole numbers from 0"):
            read(protocol, answer, token_ids=[4, 5, 6], top=TOP)


def test_fewer_than_asked_for_are_named_with_their_place():
    places = [GOOD[0], (-2.0, {6: -2.0, 2: -3.0})]
    with pytest.raises(BadAnswer, match=r"2 of the likeliest tokens at place 2, asked for 3 \(--max-logprobs\)"):
        read(VLLM, vllm_says(places), token_ids=[4, 5, 6], top=TOP)
    with pytest.raises(BadAnswer, match="2 of the likeliest tokens at place 2, asked for 3"):
        read(SGLANG, sglang_says([4, 5, 6], places), token_ids=[4, 5, 6], top=TOP)


def test_a_token_that_is_named_twice_is_refused():
    answer = sglang_says([4, 5, 6], GOOD)
    answer["meta_info"]["input_top_logprobs"][2].append([-0.2, 1, None])
    with pytest.raises(BadAnswer, match="one token twice at place 2"):
        read(SGLANG, answer, token_ids=[4, 5, 6], top=TOP)


def test_every_kind_of_server_has_its_protocol_and_no_other_kind_is_taken_for_one():
    kinds = get_args(ServerKind)
    assert len({type(protocol_of(kind)) for kind in kinds}) == len(kinds)
    with pytest.raises(AssertionError, match="tgi"):
        protocol_of("tgi")  # type: ignore[arg-type]  # pyright refuses it, too
