"""A teacher behind a server gives the scores that it gives in process, whatever the server does on the way; else it says
why not."""

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import servers
from factories import byte_tokenizer, plain_logprobs, prompt, rollout, toy_model
from servers import ToyServer, changed, serving, status

from opd.config import RemoteConfig
from opd.errors import ModelError
from opd.records import FailedScore, Rollout, SampledScore
from opd.remote.client import Client, Endpoint
from opd.remote.teacher import RemoteTeacher, connect

PATIENT = RemoteConfig(timeout_s=60, attempts=3, first_wait_s=0.01, longest_wait_s=0.05, max_in_flight=4)


@pytest.fixture
def server() -> Iterator[ToyServer]:
    with serving(toy_model(7)) as found:
        yield found


@pytest.fixture
def client() -> Iterator[Client]:
    found = Client(PATIENT)
    yield found
    found.close()


def teacher_at(*servers: ToyServer, client: Client, **options: Any) -> RemoteTeacher:
    endpoint = Endpoint("teacher 't'", tuple(s.url for s in servers), **options)
    return connect("t", endpoint, client, byte_tokenizer())


def some_rollouts(count: int = 6) -> list[Rollout]:
    generator = np.random.default_rng(0)
    return [
        rollout(generator.integers(0, 258, 5 + i).tolist(), 3, prompt=prompt(f"p{i}"), sample=i) for i in range(count)
    ]


def test_scores_are_those_of_a_plain_forward_pass(server: ToyServer, client: Client):
    items = some_rollouts()
    for item, scored in zip(items, teacher_at(server, client=client).score(items), strict=True):
        assert scored.rollout is item
        assert isinstance(scored.score, SampledScore)
        assert scored.retries == 0
        np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], plain_logprobs(server.model, item), atol=1e-5)
        assert not scored.score.logprobs[~item.loss_mask].any()


SLOW = {"hang": servers.hang, "drip": servers.drip}
"""They are given up after the client's limit of one request."""
TRANSIENT = {
    "500": status(500),
    "429": status(429),
    "503 with a wait": status(503, **{"Retry-After": "0.04"}),
    "reset": servers.reset,
    **SLOW,
    "truncated": servers.truncated,
    "cut off": servers.cut_off,
    "rubbish": servers.rubbish,
    "another form": servers.other_form,
    "one token short": changed(lambda choice: choice["prompt_logprobs"].pop()),
    "other tokens": changed(lambda choice: choice["prompt_logprobs"].__setitem__(4, {"999": {"logprob": -1.0}})),
    "a nan": changed(lambda choice: choice["prompt_logprobs"].__setitem__(4, nan_for(choice["prompt_logprobs"][4]))),
    "a null": changed(lambda choice: choice["prompt_logprobs"].__setitem__(4, None)),
    "no scores": changed(lambda choice: choice.pop("prompt_logprobs")),
    "above zero": changed(lambda choice: choice["prompt_logprobs"][4].update(above_zero(choice["prompt_logprobs"][4]))),
}


def nan_for(entry: dict[str, Any]) -> dict[str, Any]:
    return {token: {"logprob": float("nan")} for token in entry}


def above_zero(entry: dict[str, Any]) -> dict[str, Any]:
    return {token: {"logprob": 0.5} for token in entry}


@pytest.fixture
def client_for(name: str, client: Client) -> Iterator[Client]:
    """A client that waits for a slow machine, or not long where the server is to be given up."""
    quick = Client(PATIENT.model_copy(update={"timeout_s": 1.0}))
    yield quick if name in SLOW else client
    quick.close()


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_request_that_fails_once_is_retried_and_counted(name: str, server: ToyServer, client_for: Client):
    server.faults = lambda number: TRANSIENT[name] if number == 1 else None
    items = some_rollouts(3)
    found = teacher_at(server, client=client_for).score(items)
    assert sum(scored.retries for scored in found) == 1
    for item, scored in zip(items, found, strict=True):
        assert isinstance(scored.score, SampledScore)
        np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], plain_logprobs(server.model, item), atol=1e-5)


@pytest.mark.parametrize("name", TRANSIENT)
def test_a_request_that_always_fails_becomes_a_failed_score_with_its_reason(
    name: str, server: ToyServer, client_for: Client
):
    bad = some_rollouts(3)[1]
    teacher = teacher_at(server, client=client_for)
    server.faults = lambda number: TRANSIENT[name] if server.asked[number]["prompt"] == bad.token_ids.tolist() else None
    found = teacher.score(some_rollouts(3))
    assert [isinstance(scored.score, FailedScore) for scored in found] == [False, True, False]
    score = found[1].score
    assert isinstance(score, FailedScore)
    assert score.lost
    assert found[1].retries == 2
    assert score.reason.startswith(f"teacher 't': {server.url} ") or f"no answer from {server.url}" in score.reason
    assert score.reason.endswith("(3 attempts)")


def test_a_refused_request_is_not_retried(server: ToyServer, client: Client):
    teacher = teacher_at(server, client=client)
    server.faults = lambda number: status(400)
    [scored] = teacher.score(some_rollouts(1))
    assert scored.retries == 0
    assert len(server.asked) == 1
    assert scored.score == FailedScore("t", f"teacher 't': {server.url} answers 400: not now", lost=True)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"choices": [{"prompt_logprobs": [null, {"5": {"logprob": NaN}}]}]}', "returns NaN or an infinity"),
        (b'{"choices": -Infinity}', "returns NaN or an infinity"),
        (b'\xef\xbb\xbf{"choices": []}', "returns no JSON"),  # a byte order mark
        (b'{"choices": [], "text": "\\ud800"}', "returns no JSON"),  # half of a character
        (b"[" * 100_000, "no JSON|another form"),
        (b"", "returns no JSON"),
    ],
)
def test_an_answer_that_is_not_json_says_what_is_wrong_with_it(
    server: ToyServer, client: Client, content: bytes, line: str
):
    teacher = teacher_at(server, client=client)
    server.faults = lambda number: lambda handler, body: handler.say_bytes(content)
    [scored] = teacher.score(some_rollouts(1))
    assert isinstance(scored.score, FailedScore)
    assert re.search(line, scored.score.reason), scored.score.reason


def test_a_wait_that_the_server_names_is_kept(server: ToyServer):
    client = Client(PATIENT.model_copy(update={"longest_wait_s": 1.0, "first_wait_s": 0.0}))
    try:
        teacher = teacher_at(server, client=client)
        server.faults = lambda number: status(429, **{"Retry-After": "0.4"}) if number == 0 else None
        start = time.perf_counter()
        [scored] = teacher.score(some_rollouts(1))
        assert time.perf_counter() - start >= 0.4
        assert scored.retries == 1
    finally:
        client.close()


def test_no_more_than_the_bound_is_in_flight(server: ToyServer, client: Client):
    def slow(handler: servers.Handler, body: dict[str, Any]) -> None:
        end = time.monotonic() + 30
        while server.most_in_flight < PATIENT.max_in_flight and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.05)  # for one too many
        handler.say(handler.answer(body))

    teacher = teacher_at(server, client=client)
    server.faults = lambda number: slow
    teacher.score(some_rollouts(12))
    assert server.most_in_flight == PATIENT.max_in_flight


def test_servers_of_one_teacher_share_the_work_and_stand_in_for_each_other(client: Client):
    with serving(toy_model(7)) as one, serving(toy_model(7)) as two:
        teacher = teacher_at(one, two, client=client)
        teacher.score(some_rollouts(8))
        assert len(one.asked) == len(two.asked) == 4
        one.faults = lambda number: servers.reset
        found = teacher.score(some_rollouts(4))
        assert all(isinstance(scored.score, SampledScore) for scored in found)


def test_a_rollout_longer_than_the_servers_context_fails_alone(client: Client):
    with serving(toy_model(7), context=8) as server:
        teacher = teacher_at(server, client=client)
        items = some_rollouts(4)
        found = teacher.score(items)
        assert [len(i.token_ids) for i in items] == [5, 6, 7, 8]
        assert [isinstance(scored.score, FailedScore) for scored in found] == [False, False, False, True]
        assert found[3].score == FailedScore("t", "8 tokens exceed the context of teacher 't' (7)")


def test_a_server_with_another_tokenizer_is_refused(server: ToyServer, client: Client):
    server.tokenizer.add_tokens(["café"])
    with pytest.raises(ModelError, match="another tokenizer than the student"):
        teacher_at(server, client=client)


def test_a_server_that_does_not_answer_is_one_line(server: ToyServer, client: Client):
    url = server.url
    server.server_close()
    with pytest.raises(ModelError, match=f"teacher 't': {url} cannot be reached.*3 attempts.*start the server"):
        connect("t", Endpoint("teacher 't'", (url,)), client, byte_tokenizer())


def test_servers_with_different_models_are_not_one_teacher(server: ToyServer, client: Client):
    with serving(toy_model(7), name="other") as other, pytest.raises(ModelError, match="hold different models"):
        teacher_at(server, other, client=client)


def test_a_model_that_the_server_does_not_hold_is_named(server: ToyServer, client: Client):
    with pytest.raises(ModelError, match=r"holds 'toy', not 'toi'; fix served_model$"):
        teacher_at(server, client=client, model="toi")


def test_a_server_with_an_adapter_beside_its_base_requires_a_name(server: ToyServer, client: Client):
    server.adapters["letters"] = server.model
    with pytest.raises(ModelError, match=r"holds 'toy', 'letters'; name one with served_model$"):
        teacher_at(server, client=client)
    assert teacher_at(server, client=client, model="letters").deployment.latest().adapter
    assert not teacher_at(server, client=client, model="toy").deployment.latest().adapter


def test_a_silent_server_is_given_up_sooner_at_the_start_than_for_scores(server: ToyServer):
    patient = Client(RemoteConfig(timeout_s=60, attempts=2, first_wait_s=0.01))
    with socket.create_server(("127.0.0.1", 0)) as silent, patch("opd.remote.teacher._FIRST_S", 0.2):
        endpoint = Endpoint("teacher 't'", (f"http://127.0.0.1:{silent.getsockname()[1]}",))
        begun = time.perf_counter()
        with pytest.raises(ModelError, match=r"no answer from .* in 0.2 s \(2 attempts\); start the server"):
            connect("t", endpoint, patient, byte_tokenizer())
    assert time.perf_counter() - begun < 50
    patient.close()


@pytest.mark.parametrize(
    ("refusal", "key_env", "line"),
    [
        ((401, {"error": "Unauthorized"}), "TOY_KEY", r"answers 401: Unauthorized; fix the API key in TOY_KEY$"),
        (
            (403, {}),
            None,
            r"answers 403: .*; the server requires an API key: name its environment variable in api_key_env$",
        ),
        (
            (404, None),
            None,
            r"answers 404: nothing; the server has no /v1/models: check url, and whether its kind is the one that `server` names$",
        ),
        ((400, {"message": "no"}), None, r"answers 400: no; start the server, or fix its url$"),
    ],
)
def test_a_refusal_at_the_start_says_what_to_fix(
    refusal: Any, key_env: str | None, line: str, server: ToyServer, client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TOY_KEY", "wrong")
    status, body = refusal
    text = b"" if body is None else json.dumps(body).encode()
    with (
        patch.object(servers.Handler, "do_GET", lambda handler: handler.say_bytes(text, status)),
        pytest.raises(ModelError, match=line),
    ):
        teacher_at(server, client=client, key_env=key_env)


SECRET = "sk-a-secret-that-nobody-may-see"


def test_the_key_is_sent_and_shown_nowhere(client: Client, monkeypatch: pytest.MonkeyPatch):
    with serving(toy_model(7), key=SECRET) as server:
        monkeypatch.setenv("TOY_KEY", SECRET)
        teacher = teacher_at(server, client=client, key_env="TOY_KEY")
        [scored] = teacher.score(some_rollouts(1))
        assert isinstance(scored.score, SampledScore)
        server.key = "another"  # the server now repeats what it was given
        [scored] = teacher.score(some_rollouts(1))
        assert isinstance(scored.score, FailedScore)
        assert scored.score.reason == f"teacher 't': {server.url} answers 401: bad key: Bearer ***"
        assert SECRET not in repr(teacher)
        monkeypatch.delenv("TOY_KEY")
        with pytest.raises(ModelError, match="environment variable TOY_KEY is not set"):
            teacher_at(server, client=client, key_env="TOY_KEY")
