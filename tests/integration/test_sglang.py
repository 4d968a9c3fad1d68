"""A teacher behind an SGLang server gives the scores that it gives in process; what it gets wrong is noticed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import byte_tokenizer, plain_logprobs, prompt, rollout, save_adapter, save_toy, toy_model, toy_recipe
from servers import SglangServer, serving, sglang_changed, status

import opd
from opd.config import EpisodesConfig, RemoteConfig
from opd.episodes.player import EpisodePlayer, one_turn
from opd.logging.run_folder import read_metrics
from opd.records import FailedScore, Rollout, SampledScore, TopKScore
from opd.remote.client import Client, Endpoint
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import RemoteTeacher, connect
from opd.text.chat import Chat

QUICK = RemoteConfig(timeout_s=60, attempts=2, first_wait_s=0.01, longest_wait_s=0.02)
TOP = 5
LAST = 257  # the last id of the toy vocabulary, which ends turns


@pytest.fixture
def server() -> Iterator[SglangServer]:
    with serving(toy_model(7), kind=SglangServer) as found:
        assert isinstance(found, SglangServer)
        yield found


@pytest.fixture
def client() -> Iterator[Client]:
    found = Client(QUICK)
    yield found
    found.close()


def teacher_at(server: SglangServer, client: Client, *, top: int = 0, **options: Any) -> RemoteTeacher:
    endpoint = Endpoint("teacher 't'", (server.url,), **options)
    return connect("t", endpoint, client, byte_tokenizer(), top=top, kind="sglang")


def some_rollouts() -> list[Rollout]:
    """Three, the last of which ends its turn, with a 0 among its tokens."""
    ids = np.random.default_rng(0).integers(1, LAST, (3, 7)).tolist()
    ids[2][4:] = [0, 5, LAST]
    return [rollout(row, 3, prompt=prompt(f"p{i}"), sample=i) for i, row in enumerate(ids)]


def test_scores_are_those_of_a_plain_forward_pass(server: SglangServer, client: Client):
    teacher = teacher_at(server, client)
    assert (teacher.context, teacher.unknown) == (255, "")
    for item, scored in zip(some_rollouts(), teacher.score(some_rollouts()), strict=True):
        assert isinstance(scored.score, SampledScore)
        assert scored.retries == 0
        np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], plain_logprobs(server.model, item), atol=1e-5)
        assert not scored.score.logprobs[~item.loss_mask].any()


def test_a_server_names_the_sampled_token_and_its_likeliest(server: SglangServer, client: Client):
    items = some_rollouts()
    with torch.no_grad():
        likely = int(server.model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    items.append(rollout([5, 6, 7, likely, 9], 3, prompt=prompt()))
    short = 0
    for item, scored in zip(items, teacher_at(server, client, top=TOP).score(items), strict=True):
        assert isinstance(scored.score, TopKScore)
        with torch.no_grad():
            every = server.model(input_ids=torch.tensor(item.token_ids.tolist())[None]).logits[0].double()
        for row, place in enumerate(np.flatnonzero(item.loss_mask)):
            logq, token = every[place - 1].log_softmax(-1), int(item.token_ids[place])
            wanted = [token, *(i for i in logq.topk(TOP).indices.tolist() if i != token)]
            known = scored.score.ids[row] >= 0
            assert scored.score.ids[row][known].tolist() == wanted
            np.testing.assert_allclose(scored.score.top_k_logprobs[row][known], logq[wanted], atol=1e-5)
            short += len(wanted) == TOP
    assert short  # a token that is one of the likeliest takes the place of none


def at_4(name: str, value: Any) -> Any:
    return lambda answer, meta: meta[name].__setitem__(4, value)


WRONG = {
    "one token short": (lambda answer, meta: meta["input_token_logprobs"].pop(), "log-probabilities of 6 tokens"),
    "another token": (at_4("input_token_logprobs", [-1.0, 256, None]), "token 256 at place 4, asked for"),
    "a token by the name of the last": (at_4("input_token_logprobs", [-1.0, 0, None]), "token 0 at place 4, asked for"),
    "an uncomputed one": (lambda answer, meta: meta["input_token_logprobs"][4].__setitem__(0, None), "None as a log-"),
    "a nan": (lambda answer, meta: meta["input_token_logprobs"][4].__setitem__(0, float("nan")), "NaN or an infinity"),
    "above zero": (lambda answer, meta: meta["input_token_logprobs"][4].__setitem__(0, 0.5), "0.5 as a log-prob"),
    "a null": (at_4("input_token_logprobs", None), "another form"),
    "no scores": (lambda answer, meta: meta.pop("input_token_logprobs"), "no input_token_logprobs; an SGLang server"),
    "no likeliest": (lambda answer, meta: meta.pop("input_top_logprobs"), "no input_top_logprobs; an SGLang server"),
    "likeliest too short": (lambda answer, meta: meta["input_top_logprobs"].pop(), "likeliest tokens of 6 tokens"),
    "fewer of the likeliest": (lambda answer, meta: meta["input_top_logprobs"][4].pop(), "4 of the likeliest tokens"),
    "none of the likeliest": (at_4("input_top_logprobs", None), "0 of the likeliest tokens at place 4, asked for 5"),
    "a bad one of the likeliest": (
        lambda answer, meta: meta["input_top_logprobs"][4][2].__setitem__(0, float("nan")),
        "NaN or an infinity",
    ),
    "broken off": (
        lambda answer, meta: meta.update(finish_reason={"type": "abort", "message": "weights change"}),
        "an answer that was aborted (weights change)",
    ),
    "no meta_info": (lambda answer, meta: answer.pop("meta_info"), "an answer without its meta_info"),
    "a list": (lambda answer, meta: answer.update(meta_info=[]), "an answer without its meta_info"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_answer_is_retried_and_then_becomes_a_failed_score(name: str, server: SglangServer, client: Client):
    change, reason = WRONG[name]
    teacher, items = teacher_at(server, client, top=TOP), some_rollouts()[:1]
    server.faults = lambda number: sglang_changed(change) if number == 0 else None
    [scored] = teacher.score(items)
    assert scored.retries == 1
    np.testing.assert_allclose(
        scored.score.logprobs[items[0].loss_mask],  # type: ignore[union-attr]  # a failed one has none, and fails here
        plain_logprobs(server.model, items[0]),
        atol=1e-5,
    )
    server.faults = lambda number: sglang_changed(change)
    [scored] = teacher.score(items)
    assert isinstance(scored.score, FailedScore)
    assert scored.score.lost
    assert scored.score.reason.startswith(f"teacher 't': {server.url} returns ")
    assert reason in scored.score.reason


def test_a_refused_prompt_is_not_retried(server: SglangServer, client: Client):
    teacher = teacher_at(server, client)
    server.faults = lambda number: lambda handler, body: handler.say({"error": {"message": "too long"}}, 400)
    [scored] = teacher.score(some_rollouts()[:1])
    assert scored.score == FailedScore("t", f"teacher 't': {server.url} answers 400: too long", lost=True)
    assert len(server.asked) == 1


def test_requests_name_the_adapter(tmp_path: Path, client: Client):
    base = save_toy(tmp_path / "base", 7)
    item = some_rollouts()[0]
    with serving(toy_model(7), kind=SglangServer) as server:
        assert isinstance(server, SglangServer)
        server.adapt("expert", save_adapter(tmp_path / "expert", base, 3), base)
        for name, model in (("toy", server.model), ("expert", server.adapters["expert"])):
            teacher = teacher_at(server, client, model=name)
            [scored] = teacher.score([item])
            assert isinstance(scored.score, SampledScore)
            np.testing.assert_allclose(scored.score.logprobs[item.loss_mask], plain_logprobs(model, item), atol=1e-5)
        assert teacher.context == 255  # of the model beneath


def sampler_at(server: SglangServer, client: Client) -> RemoteSampler:
    tokenizer = byte_tokenizer()
    player = EpisodePlayer(Chat(tokenizer), EpisodesConfig(), end_ids=(LAST,), make_environment=one_turn)
    teacher = teacher_at(server, client)
    return RemoteSampler(
        teacher.deployment,
        client,
        temperature=1.0,
        max_new_tokens=40,
        context=None,
        player=player,
        protocol=teacher.protocol,
    )


def test_sampled_logprobs_are_those_of_the_model(server: SglangServer, client: Client):
    sampler = sampler_at(server, client)
    sample = partial(sampler.sample, [prompt("a"), prompt("b", "you")], num_samples=8, seed=(1,))
    found, again = sample(), sample()
    assert [r.failure for r in found] == [None] * 16
    assert {r.finish for r in found} == {"end", "length"}
    assert [r.token_ids.tolist() for r in found] == [r.token_ids.tolist() for r in again]
    for item in found:
        np.testing.assert_allclose(item.rollout_logprobs[item.loss_mask], plain_logprobs(server.model, item), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda answer, meta: answer["output_ids"].pop(), "of other tokens than those of the response"),
        (lambda answer, meta: answer.pop("output_ids"), "no output_ids, no output_token_logprobs or no finish_reason"),
        (
            lambda answer, meta: meta.update(finish_reason={"type": "stop", "matched": "NaN happened"}),
            "was stopped by 'NaN happened'",
        ),
        (lambda answer, meta: meta.update(finish_reason={"type": "odd"}), "a response that finished by 'odd'"),
        (
            lambda answer, meta: meta.update(finish_reason={"type": "stop", "matched": answer["output_ids"][-1]}),
            "a response that ended after token",
        ),
        (lambda answer, meta: meta["output_token_logprobs"][0].__setitem__(0, None), "None as a log-probability"),
        (lambda answer, meta: meta.update(finish_reason={"type": "abort", "message": "x"}), "was aborted (x)"),
    ],
)
def test_a_response_whose_parts_do_not_fit_is_lost_with_its_reason(
    change: Any, reason: str, server: SglangServer, client: Client
):
    server.faults = lambda number: sglang_changed(change)
    sampler = sampler_at(server, client)
    items = sampler.sample([prompt("a")], num_samples=8, seed=(1,))
    cut = [r for r in items if reason in (r.failure or "")]
    assert cut
    assert all(r.events["lost"] for r in cut)


def test_a_run_with_a_teacher_behind_sglang_is_that_with_the_same_teacher_in_process(tmp_path: Path):
    trees = [
        toy_recipe(tmp_path / name, objective={"type": "immediate"}, evaluation={"num_prompts": 2})
        for name in ("here", "there")
    ]
    with serving(toy_model(2), kind=SglangServer) as server:
        trees[1]["teachers"]["odd"] = {"url": server.url, "server": "sglang"}
        results = [opd.train(opd.parse_config(tree)) for tree in trees]
    ours, theirs = (read_metrics(result.run) for result in results)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss/total/sum", "optim/grad_norm/mean", "kl/token/mean", "kl/token/odd/mean"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    assert {row.teacher: row for row in results[1].parity}["odd"].expert is not None
    assert any("logprob_start_len" not in body for body in server.asked)  # it was asked for answers too


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_of_another_kind_is_refused_before_the_first_step(kind: str, tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"type": "immediate"})
    options = {} if kind == "sglang" else {"kind": SglangServer}
    with serving(toy_model(2), **options) as server:
        tree["teachers"]["odd"] = {"url": server.url, "server": kind}
        with pytest.raises(
            opd.errors.OpdError,
            match=r"teacher 'odd' can score what the student writes' failed: .*answers 404: Not Found",
        ):
            opd.train(opd.parse_config(tree))
    assert not Path(tree["output"]).exists()


def test_a_request_to_a_busy_server_is_retried(server: SglangServer, client: Client):
    teacher = teacher_at(server, client)
    server.faults = lambda number: status(503) if number == 0 else None
    [scored] = teacher.score(some_rollouts()[:1])
    assert scored.retries == 1
    assert isinstance(scored.score, SampledScore)
    assert replace(scored, retries=0).mask.any()
