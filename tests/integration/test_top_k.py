"""A teacher that names its likeliest tokens: the loss over those and one bucket, its gradient, and what a server gives of them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import Bench, assert_same_gradient, dense_gradient, float64_norms, make_bench
from factories import byte_tokenizer, prompt, rollout, toy_model, toy_recipe
from servers import changed, serving
from torch import Tensor

import opd
from opd.batch import pack, split
from opd.config import RemoteConfig
from opd.objectives.divergences import top_k_reverse_kl
from opd.objectives.top_k import logprobs_at
from opd.records import FailedScore, HiddenScore, ScoredRollout, TopKScore
from opd.remote.client import Client, Endpoint
from opd.remote.teacher import connect


@pytest.mark.parametrize("max_logits", [1, 90, 2**20])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (0.7, 0.9)])
def test_logprobs_on_a_support_are_those_of_the_whole_distribution(
    max_logits: int, temperature: float, softcap: float | None
):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 11, (7, 3), generator=generator)

    def chunked(hidden: Tensor, head: Tensor) -> Tensor:
        return logprobs_at(hidden, head, ids, temperature=temperature, softcap=softcap, max_logits=max_logits)[0]

    found, entropy = logprobs_at(hidden, head, ids, temperature=temperature, softcap=softcap, max_logits=max_logits)
    logits = hidden @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    dense = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(found, dense.gather(-1, ids), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1), rtol=0, atol=1e-12)
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(chunked, (hidden, head))
    assert torch.autograd.gradcheck(chunked, (hidden, head.detach()))
    assert torch.autograd.gradcheck(chunked, (hidden.detach(), head))
    if temperature == 1.0:
        torch.testing.assert_close(logprobs_at(hidden, head, ids)[0], found)


def test_logprobs_of_bfloat16_states_are_those_of_their_logits_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator).bfloat16().requires_grad_()
    head = torch.randn(300, 5, generator=generator).bfloat16().requires_grad_()
    ids = torch.randint(0, 300, (7, 3), generator=generator)
    found, entropy = logprobs_at(hidden, head, ids, temperature=0.7)
    dense = ((hidden @ head.T).float() / 0.7).log_softmax(-1)
    assert found.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(found, dense.gather(-1, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1), rtol=0, atol=1e-5)
    mine = torch.autograd.grad(found.sum(), (hidden, head))
    for one, other in zip(mine, torch.autograd.grad(dense.gather(-1, ids).sum(), (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with float64_norms():
        yield make_bench(tmp_path_factory.mktemp("bench"))


TOP = 5


def named(bench: Bench, item: ScoredRollout) -> TopKScore:
    """What a server would say of a rollout: the sampled token, and its `TOP` likeliest others."""
    assert isinstance(item.score, HiddenScore)
    [part] = item.score.parts
    head = bench.backend.policies[part.model].network.head_weight().double()
    every = (torch.tensor(part.hidden).double() @ head.T / 0.8).log_softmax(-1)
    ids = np.full((len(every), TOP + 1), -1, dtype=np.int32)
    values = np.full((len(every), TOP + 1), -np.inf, dtype=np.float32)
    for row, (logq, token) in enumerate(zip(every, item.rollout.token_ids[item.rollout.loss_mask], strict=True)):
        chosen = [int(token), *(i for i in logq.topk(TOP).indices.tolist() if i != token)]
        ids[row, : len(chosen)] = chosen
        values[row, : len(chosen)] = logq[chosen]
    return TopKScore(item.score.teacher, item.score.logprobs, ids, values)


def test_the_gradient_is_that_of_the_buckets_whatever_the_packing(bench: Bench):
    scored = [replace(item, score=named(bench, item)) for item in bench.scored]
    batch, _ = pack(scored, logprob_floor=-50.0)
    assert batch.top_k_ids is not None
    assert bool((batch.top_k_ids[batch.loss_mask][:, -1] < 0).any())  # some rows are shorter than others
    mask = batch.loss_mask.clone()
    mask[batch.loss_mask.nonzero()[3]] = False
    batch = replace(batch, distill_mask=mask)

    def loss_of_row(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logp = logits.double().log_softmax(-1)
        total = logp.new_zeros(())
        for at, place in enumerate(places):
            ids = batch.top_k_ids[place]
            known = ids >= 0
            bucketed = top_k_reverse_kl(logp[at, ids[known]], batch.logprobs_at[place][known].double())
            total = total + batch.distill_mask[place] * bucketed
        return total / len(batch)

    wanted = dense_gradient(bench, batch, loss_of_row)
    losses = []
    for max_tokens in (1, 40, 10_000):
        found, loss = bench.gradient_and_loss(batch, type="top_k", top_k=TOP, max_tokens=max_tokens)
        assert_same_gradient(found, wanted, 1e-6)
        losses.append(loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_rollout_without_a_score_takes_nothing_from_its_siblings(bench: Bench):
    scored = [replace(item, score=named(bench, item)) for item in bench.scored]
    first = scored[0]
    twin = replace(
        first, score=FailedScore(first.score.teacher, "gone"), rollout=replace(first.rollout, sample=9, reward=1.0)
    )
    alone, _ = pack(scored, logprob_floor=-50.0)
    both, _ = pack([twin, *scored], logprob_floor=-50.0, unscored=True)
    both = replace(both, distill_mask=both.scored)
    assert len(both) == len(alone) + 1
    wanted, found = (
        bench.gradient(b, type="top_k", top_k=TOP, normalizer="constant", constant=1.0) for b in (alone, both)
    )
    assert_same_gradient(found, wanted, 1e-6)


def test_parts_of_a_batch_keep_their_columns(bench: Bench):
    scored = [replace(item, score=named(bench, item)) for item in bench.scored]
    scored[2] = replace(scored[2], score=FailedScore(scored[2].score.teacher, "gone", lost=True))
    batch, counts = pack(scored, logprob_floor=-50.0)
    assert counts["dropped"] == 1
    for parts in (1, 2, 3, 20):
        found = split(batch, parts)
        assert len(found) == parts
        some = [part for part in found if part is not None]
        assert [r for part in some for r in part.rollout_ids] == list(batch.rollout_ids)
        for name in ("token_ids", "top_k_ids", "logprobs_at", "lengths", "group_ids", "teacher_logprobs"):
            joined = torch.cat([getattr(part, name) for part in some])
            torch.testing.assert_close(joined, getattr(batch, name), rtol=0, atol=0)
        for part in some:
            assert all(part.offsets[a] < part.offsets[b] for a, b in pairwise(range(len(part) + 1)))


@pytest.fixture
def client() -> Iterator[Client]:
    found = Client(RemoteConfig(timeout_s=60, attempts=2, first_wait_s=0.01, longest_wait_s=0.02))
    yield found
    found.close()


def test_a_server_names_the_sampled_token_and_its_likeliest(client: Client):
    model = toy_model(7)
    item = rollout([5, 17, 80, 33, 200, 1], 2, prompt=prompt())
    with serving(model) as server:
        teacher = connect("t", Endpoint("teacher 't'", (server.url,)), client, byte_tokenizer(), top=TOP)
        [scored] = teacher.score([item])
    assert isinstance(scored.score, TopKScore)
    with torch.no_grad():
        every = model(input_ids=torch.tensor(item.token_ids.tolist())[None]).logits[0].double().log_softmax(-1)
    for row, place in enumerate(range(2, 6)):
        logq, token = every[place - 1], int(item.token_ids[place])
        ids = scored.score.ids[row]
        wanted = [i for i in logq.topk(TOP).indices.tolist() if i != token]
        assert ids[0] == token
        assert ids[1 : 1 + len(wanted)].tolist() == wanted
        known = ids >= 0
        np.testing.assert_allclose(scored.score.top_k_logprobs[row][known], logq[ids[known]], atol=1e-5)


def test_a_server_that_names_too_few_is_no_answer(client: Client):
    with serving(toy_model(7)) as server:
        teacher = connect("t", Endpoint("teacher 't'", (server.url,)), client, byte_tokenizer(), top=TOP)

        def fewer(choice: dict[str, Any]) -> None:
            for token in list(choice["prompt_logprobs"][3])[1:3]:
                del choice["prompt_logprobs"][3][token]

        server.faults = lambda number: changed(fewer)
        [scored] = teacher.score([rollout([5, 17, 80, 33], 2, prompt=prompt())])
    assert isinstance(scored.score, FailedScore)
    assert f"of the likeliest tokens at place 3, asked for {TOP} (--max-logprobs)" in scored.score.reason


def remote(folder: Path, urls: dict[str, str], **changes: Any) -> dict[str, Any]:
    tree = toy_recipe(folder, evaluation={"num_prompts": 2}, **changes)
    tree["teachers"] = {name: {"url": url} for name, url in urls.items()}
    return tree


def test_a_run_follows_named_tokens_toward_its_teachers(tmp_path: Path):
    objective = {"type": "top_k", "top_k": 12}
    with serving(toy_model(1)) as even, serving(toy_model(2)) as odd:
        tree = remote(tmp_path, {"even": even.url, "odd": odd.url}, objective=objective, steps=40)
        tree["sampling"] |= {"prompts_per_step": 8, "group_size": 2}
        result = opd.train(opd.parse_config(tree))
    lines = opd.read_metrics(result.run)
    assert lines[-1]["divergence/token/mean"] < 0.8 * lines[0]["divergence/token/mean"]
    assert lines[-1]["kl/token/mean"] < lines[0]["kl/token/mean"]
    assert 0 < lines[-1]["top_k/tail_mass/mean"] < 1


def test_top_k_and_whole_distributions_do_not_mix(tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"type": "top_k"})
    tree["teachers"]["odd"] = {"url": "http://127.0.0.1:1"}
    with pytest.raises(
        opd.errors.ConfigError,
        match=r"teacher 'even' is loaded in this process; .* put all teachers on servers, or none",
    ):
        opd.parse_config(tree)
