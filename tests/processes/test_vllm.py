"""A real vLLM server on the real model says what transformers says."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import merged_model, plain_logprobs
from transformers import AutoModelForCausalLM

from opd.config import EpisodesConfig, RemoteConfig
from opd.distributed.engine import Engine, EnginePlan
from opd.episodes.player import EpisodePlayer, one_turn
from opd.models.loading import load_tokenizer
from opd.records import Prompt, Rollout, TopKScore
from opd.remote.client import Client, Endpoint, StaticDeployment
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import RemoteTeacher, connect
from opd.text.chat import Chat
from opd.text.tokenizer import end_token_ids

# They count and kill processes by their names, so nothing of their kind may run beside them.
pytestmark = pytest.mark.processes

MODEL = Path("models/smollm2-135m-instruct").absolute()
EXPERT = Path("examples/merge/letters").absolute()
VLLM = Path(".venv-vllm/bin/python").absolute()
ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP = 16


def files_of(folder: Path) -> dict[str, np.ndarray]:
    files = (file for file in folder.iterdir() if file.is_file())
    return {file.name: np.frombuffer(file.read_bytes(), dtype=np.uint8) for file in files}


@contextmanager
def started(*args: str, **plan: Any) -> Iterator[Engine]:
    assert VLLM.exists(), "run `make vllm`"
    assert MODEL.is_dir(), "run `make model`"
    # a seed and a prompt in chunks crash vLLM 0.32 on a CPU
    common = ("--dtype", "float32", "--generation-config", "vllm", "--max-model-len", "512", "--enforce-eager")
    args = (*common, "--no-enable-chunked-prefill", *args)
    command = (str(VLLM), "-m", "vllm.entrypoints.openai.api_server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        found = Engine(EnginePlan(command, str(MODEL), "base", args, 300, **plan), "127.0.0.1")
        try:
            found.state()
            yield found
        finally:
            found.stop()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    args = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules", *ADAPTED)
    with started(*args, loads="adapters", max_versions=2) as found:
        yield found


@pytest.fixture(scope="module")
def teacher(engine: Engine) -> Iterator[RemoteTeacher]:
    client = Client(RemoteConfig(timeout_s=120, attempts=2))
    tokenizer = load_tokenizer(str(MODEL)).tokenizer
    yield connect("t", Endpoint("teacher 't'", (engine.state().url,), "base"), client, tokenizer, top=TOP)
    client.close()


def sampler_of(teacher: RemoteTeacher) -> RemoteSampler:
    loaded = load_tokenizer(str(MODEL))
    ends = end_token_ids(loaded.tokenizer, loaded.generation_config)
    player = EpisodePlayer(Chat(loaded.tokenizer), EpisodesConfig(), end_ids=ends, make_environment=one_turn)
    return RemoteSampler(
        teacher.deployment, teacher.client, temperature=1.0, max_new_tokens=16, context=None, player=player
    )


@pytest.fixture(scope="module")
def sampled(teacher: RemoteTeacher) -> list[Rollout]:
    sampler = sampler_of(teacher)
    prompts = [Prompt(str(i), ({"role": "user", "content": f"What is {i} + 3?"},), "t", "task") for i in range(4)]
    found = sampler.sample(prompts, num_samples=2, seed=(1,))
    again = sampler.sample(prompts, num_samples=2, seed=(1,))
    assert [r.failure for r in found] == [None] * 8
    assert [r.token_ids.tolist() for r in again] == [r.token_ids.tolist() for r in found]
    return found


@pytest.mark.real
def test_what_is_sampled_has_the_logprobs_that_transformers_gives(sampled: list[Rollout]):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert {r.finish for r in sampled} <= {"end", "length"}
    for item in sampled:
        ours = item.rollout_logprobs[item.loss_mask]
        np.testing.assert_allclose(ours, plain_logprobs(model, item), atol=2e-4)


@pytest.mark.real
def test_scores_and_likeliest_tokens_are_those_of_transformers(teacher: RemoteTeacher, sampled: list[Rollout]):
    assert teacher.unknown == ""
    assert teacher.context == 511
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for scored in teacher.score(sampled):
        item, score = scored.rollout, scored.score
        assert isinstance(score, TopKScore)
        np.testing.assert_allclose(score.logprobs[item.loss_mask], plain_logprobs(model, item), atol=2e-4)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(item.token_ids.tolist())[None]).logits[0].double()
        rows = logits.log_softmax(-1)[np.flatnonzero(item.loss_mask) - 1].numpy()
        known = score.ids >= 0
        assert known.sum(-1).min() >= TOP
        mine = np.take_along_axis(rows, np.where(known, score.ids, 0), axis=-1)
        np.testing.assert_allclose(score.top_k_logprobs[known], mine[known], atol=2e-4)
        best = np.sort(rows, axis=-1)[:, ::-1][:, :TOP]
        np.testing.assert_allclose(np.sort(mine, axis=-1)[:, ::-1][:, : TOP - 1], best[:, : TOP - 1], atol=2e-4)


@pytest.mark.real
def test_an_adapter_that_an_engine_was_given_speaks(engine: Engine, teacher: RemoteTeacher, sampled: list[Rollout]):
    engine.load("student-1", files_of(EXPERT))
    assert engine.state().versions == ("student-1",)
    adapted = replace(
        teacher, deployment=StaticDeployment(replace(teacher.deployment.latest(), model="student-1")), top=0
    )
    model = merged_model(str(MODEL), str(EXPERT))
    for scored in adapted.score(sampled[:2]):
        mask = scored.rollout.loss_mask
        found = scored.score.logprobs[mask]  # type: ignore[union-attr]  # a failed one has none, and fails here
        np.testing.assert_allclose(found, plain_logprobs(model, scored.rollout), atol=5e-4)


@pytest.mark.real
def test_weights_that_took_the_place_of_an_engines_own_speak(teacher: RemoteTeacher, sampled: list[Rollout]):
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with started(loads="weights", api_key="a key") as engine:
        endpoint = Endpoint("the student", (engine.state().url,), "base", api_key="a key")
        student = replace(teacher, deployment=StaticDeployment(endpoint), top=0)
        prompts = [item.prompt for item in sampled[::2]]  # their beginnings are cached when they come again
        for model in (base, merged_model(str(MODEL), str(EXPERT))):
            for scored in student.score(sampled[:4]):
                mask = scored.rollout.loss_mask
                found = scored.score.logprobs[mask]  # type: ignore[union-attr]  # a failed one has none, and fails here
                np.testing.assert_allclose(found, plain_logprobs(model, scored.rollout), atol=5e-4)
            for item in sampler_of(student).sample(prompts, num_samples=1, seed=(2,)):
                ours = item.rollout_logprobs[item.loss_mask]
                np.testing.assert_allclose(ours, plain_logprobs(model, item), atol=5e-4)
            engine.load("student-1", files_of(EXPERT))
