"""Teachers in process: each rollout scored by its own, adapters on one set of weights, failures as data."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import merged_model, plain_logprobs, prompt, rollout, save_adapter, save_toy, toy_model, toy_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.batch import pack
from opd.config import ComputeConfig
from opd.data.tasks import PromptStream, make_tasks
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.teacher import LocalTeachers, Part, Policy
from opd.loop import Components, train_step
from opd.models import packing
from opd.models.loading import load_network
from opd.models.lora import add_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.records import FailedScore, HiddenScore, Rollout, SampledScore, ScoredRollout
from opd.rewards.judge import Judge

NAMES = ("left", "even", "right", "odd")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with two whole models and two adapters as teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    tree = toy_recipe(folder)
    adapters = {
        name: {"adapter": save_adapter(folder / name, tree["student"], seed)}
        for name, seed in (("left", 5), ("right", 6))
    }
    return tree | {"teachers": tree["teachers"] | adapters}


@pytest.fixture(scope="module")
def backend(tree: dict[str, Any]) -> LocalBackend:
    return build(opd.parse_config(tree))


@pytest.fixture(scope="module")
def rollouts(backend: LocalBackend) -> list[Rollout]:
    """Rollouts whose teachers alternate, some of one prompt's text, of different lengths."""
    prompts = [
        prompt(f"p{i}", text, teacher=NAMES[i % 4])
        for i, text in enumerate(["hi", "hi", "hi there", "hi", "what now", "hi there", "x", "well"])
    ]
    return backend.sampler().sample(prompts, num_samples=2, seed=(3,))


@pytest.fixture(scope="module")
def models(tree: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """Every teacher as a plain model of its own."""
    models: dict[str, torch.nn.Module] = {}
    for name, source in tree["teachers"].items():
        if "adapter" in source:
            models[name] = merged_model(tree["student"], source["adapter"])
        else:
            models[name] = AutoModelForCausalLM.from_pretrained(source["model"]).eval()
    return models


def actions(scored: ScoredRollout) -> np.ndarray:
    assert not isinstance(scored.score, FailedScore)
    return scored.score.logprobs[scored.rollout.loss_mask]


def base_weights(network: Network) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in network.base.named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer", ""), parameter


def num_weights(network: Network) -> int:
    return sum(p.numel() for p in network.model.parameters())


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_each_rollout_is_scored_by_its_own_teacher_in_the_order_given(
    backend: LocalBackend, rollouts: list[Rollout], models: dict[str, torch.nn.Module], keep_hidden: bool
):
    scored = backend.teachers(keep_hidden=keep_hidden).score(rollouts)
    assert [id(s.rollout) for s in scored] == [id(r) for r in rollouts]
    assert [s.score.teacher for s in scored] == [r.prompt.teacher for r in rollouts]
    for item in scored:
        expected = {name: plain_logprobs(model, item.rollout) for name, model in models.items()}
        own = expected.pop(item.score.teacher)
        np.testing.assert_allclose(actions(item), own, atol=1e-4)
        assert all(np.abs(actions(item) - other).max() > 1e-2 for other in expected.values())


def test_adapters_on_one_base_share_its_memory(backend: LocalBackend, tree: dict[str, Any]):
    left, right = backend.policies["left"], backend.policies["right"]
    assert left.network is right.network is backend.student.network
    plain = toy_model(0)
    own = {name for name, _ in base_weights(left.network)}
    assert own == {name for name, _ in plain.named_parameters()}
    student = sum(p.numel() for p in backend.learner().weights().values())
    files = [load_file(f"{tree['teachers'][name]['adapter']}/adapter_model.safetensors") for name in ("left", "right")]
    adapters = sum(t.numel() for file in files for t in file.values())
    assert num_weights(left.network) == sum(p.numel() for p in plain.parameters()) + student + adapters


def test_a_further_adapter_adds_only_its_own_weights(tree: dict[str, Any], tmp_path: Path):
    network = load_network(tree["student"], ComputeConfig(device="cpu"))
    add_adapter(network, tree["teachers"]["left"]["adapter"], teacher="left", name="a")
    places = {name: p.data_ptr() for name, p in base_weights(network)}
    before = num_weights(network)
    path = save_adapter(tmp_path / "third", tree["student"], 9, rank=2)
    add_adapter(network, path, teacher="third", name="b")
    third = sum(t.numel() for t in load_file(f"{path}/adapter_model.safetensors").values())
    assert num_weights(network) - before == third
    assert {name: p.data_ptr() for name, p in base_weights(network)} == places
    base = load_file(f"{tree['student']}/model.safetensors")
    for name, parameter in base_weights(network):
        assert torch.equal(parameter, base[name]), name


def test_when_the_whole_student_trains_adapter_teachers_share_one_frozen_copy(
    tree: dict[str, Any], rollouts: list[Rollout], models: dict[str, torch.nn.Module]
):
    backend = build(opd.parse_config(tree | {"trainable": "full"}))
    left, right = backend.policies["left"].network, backend.policies["right"].network
    assert left is right
    assert left is not backend.student.network
    student = {p.data_ptr() for p in backend.student.network.base.parameters()}
    assert student.isdisjoint(p.data_ptr() for _, p in base_weights(left))
    learner = backend.learner()
    assert set(learner.weights()) == {name for name, _ in backend.student.network.base.named_parameters()}
    with torch.no_grad():
        for parameter in learner.weights().values():
            parameter.add_(0.1)
    for item in backend.teachers(keep_hidden=False).score(rollouts):
        np.testing.assert_allclose(actions(item), plain_logprobs(models[item.score.teacher], item.rollout), atol=1e-4)


def test_a_teacher_may_be_called_like_the_students_own_adapter(tree: dict[str, Any], rollouts: list[Rollout]):
    plain = build(opd.parse_config(tree))
    teachers = tree["teachers"] | {"student": tree["teachers"]["left"], "a.b": tree["teachers"]["right"]}
    named = build(opd.parse_config(tree | {"teachers": teachers}))
    before, after = plain.learner().weights(), named.learner().weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    def scores(backend: LocalBackend, left: str, right: str) -> list[np.ndarray]:
        names = {"left": left, "right": right}
        chosen = [
            replace(r, prompt=replace(r.prompt, teacher=names[r.prompt.teacher]))
            for r in rollouts
            if r.prompt.teacher in names
        ]
        return [actions(s) for s in backend.teachers(keep_hidden=False).score(chosen)]

    ours, theirs = scores(plain, "left", "right"), scores(named, "student", "a.b")
    assert len(ours) == len(theirs) == 8
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kept_hidden_states_and_the_head_reproduce_the_logprobs(
    tree: dict[str, Any], rollouts: list[Rollout], models: dict[str, torch.nn.Module], temperature: float
):
    backend = build(opd.parse_config(tree | {"temperature": temperature}))
    teachers = backend.teachers(keep_hidden=True)
    for item in teachers.score(rollouts):
        assert isinstance(item.score, HiddenScore)
        [part] = item.score.parts
        logits = torch.tensor(part.hidden) @ backend.policies[part.model].network.head_weight().T
        targets = torch.tensor(item.rollout.token_ids[item.rollout.loss_mask].tolist())
        logprobs = torch.log_softmax(logits / temperature, -1).gather(-1, targets[:, None])[:, 0]
        np.testing.assert_allclose(actions(item), logprobs.detach().numpy(), atol=1e-5)
        plain = plain_logprobs(models[item.score.teacher], item.rollout, temperature=temperature)
        np.testing.assert_allclose(actions(item), plain, atol=1e-4)


def test_without_hidden_states_a_score_holds_the_sampled_tokens_alone(backend: LocalBackend, rollouts: list[Rollout]):
    sampled = backend.teachers(keep_hidden=False).score(rollouts)
    hidden = backend.teachers(keep_hidden=True).score(rollouts)
    for a, b in zip(sampled, hidden, strict=True):
        assert isinstance(a.score, SampledScore)
        assert isinstance(b.score, HiddenScore)
        assert np.array_equal(a.score.logprobs, b.score.logprobs)
        assert not a.score.logprobs[~a.rollout.loss_mask].any()
        assert [part.hidden.shape for part in b.score.parts] == [(a.rollout.num_actions, 32)]


@pytest.mark.parametrize("max_tokens", [1, 40, 100])
def test_the_size_of_a_pass_does_not_change_the_scores(backend: LocalBackend, rollouts: list[Rollout], max_tokens: int):
    def score(limit: int) -> list[ScoredRollout]:
        teachers = LocalTeachers(backend.targets, temperature=1.0, max_tokens=limit, keep_hidden=True)
        return teachers.score(rollouts)

    for a, b in zip(score(max_tokens), score(10_000), strict=True):
        assert isinstance(a.score, HiddenScore)
        assert isinstance(b.score, HiddenScore)
        np.testing.assert_allclose(a.score.logprobs, b.score.logprobs, atol=1e-5)
        np.testing.assert_allclose(a.score.parts[0].hidden, b.score.parts[0].hidden, atol=1e-4)


def test_a_padded_vocabulary_is_scored_over_the_shared_ids(tmp_path: Path, rollouts: list[Rollout]):
    tree = toy_recipe(tmp_path)
    tree["teachers"]["even"]["model"] = save_toy(tmp_path / "padded", 1, vocab_size=272)
    backend = build(opd.parse_config(tree))
    assert backend.vocab_size == 258
    mine = [replace(r, prompt=replace(r.prompt, teacher="even")) for r in rollouts]
    model = toy_model(1, vocab_size=272)
    for item in backend.teachers(keep_hidden=True).score(mine):
        np.testing.assert_allclose(actions(item), plain_logprobs(model, item.rollout, vocab_size=258), atol=1e-4)
        assert np.abs(actions(item) - plain_logprobs(model, item.rollout)).max() > 1e-3


def test_teacher_student_scores_and_every_epoch_pack_the_rollouts_once(
    backend: LocalBackend, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
):
    packed: list[int] = []

    def counted(sequences: Sequence[np.ndarray], **options: Any) -> Any:
        packed.append(len(sequences))
        return pack_trees(sequences, **options)

    mine = [replace(r, prompt=replace(r.prompt, teacher="even")) for r in rollouts]
    monkeypatch.setattr("opd.models.packing.pack_trees", counted)
    packing._packed.cache_clear()
    batch, _ = pack(backend.teachers(keep_hidden=True).score(mine), logprob_floor=-50.0)
    learner = backend.learner()
    batch = learner.score_student(batch)
    for _ in range(2):
        learner.forward_backward(batch)
    assert [count for count in packed if count] == [len(mine)]


def of_length(name: str, tokens: int, teacher: str) -> Rollout:
    return rollout([256, *range(97, 96 + tokens)], 4, prompt=prompt(name, teacher=teacher))


def test_a_rollout_over_the_context_is_a_failed_score_that_says_why(tmp_path: Path):
    short = load_network(save_toy(tmp_path / "short", 1, max_context=16), ComputeConfig(device="cpu"))
    long = load_network(save_toy(tmp_path / "long", 1), ComputeConfig(device="cpu"))
    targets = {name: (Part(name, Policy(network, None)),) for name, network in {"short": short, "long": long}.items()}
    teachers = LocalTeachers(targets, temperature=1.0, max_tokens=64, keep_hidden=False)
    sizes = [("a", 17, "short"), ("b", 16, "short"), ("c", 17, "long"), ("d", 30, "short")]
    scored = teachers.score([of_length(*size) for size in sizes])
    assert [isinstance(s.score, FailedScore) for s in scored] == [True, False, False, True]
    assert scored[3].score == FailedScore("short", "30 tokens exceed the context of teacher 'short' (16)")
    batch, counts = pack(scored, logprob_floor=-50.0)
    assert batch.rollout_ids == ("b/0", "c/0")
    assert counts["dropped"] == 2
    model = toy_model(1)
    for item in scored[1:3]:
        np.testing.assert_allclose(actions(item), plain_logprobs(model, item.rollout), atol=1e-4)


def lower_context(network: Network, limit: int) -> None:
    network.base.config.max_position_embeddings = limit


def test_a_step_counts_failed_scores_and_trains_on_the_others(tmp_path: Path):
    config = opd.parse_config(toy_recipe(tmp_path))
    backend = build(config)
    lower_context(backend.policies["even"].network, 8)  # shorter than any prompt
    prompts = {name: task.prompts("train") for name, task in make_tasks(config.tasks).items()}
    parts = Components(
        PromptStream(prompts, dict.fromkeys(prompts, 1.0), seed=0),
        backend.sampler(),
        backend.teachers(keep_hidden=True),
        backend.learner(),
        Judge(lambda prompt, response: None),
    )
    report = train_step(config, parts, 1)
    failed: Sequence[ScoredRollout] = [s for s in report.scored if isinstance(s.score, FailedScore)]
    assert {s.rollout.prompt.teacher for s in failed} == {"even"}
    assert report.values["failed/even/sum"] == report.values["batch/dropped/sum"] == len(failed) == 4
    assert report.values["batch/rollouts/sum"] == 8
    assert "kl/token/odd/mean" in report.values
    assert "kl/token/even/mean" not in report.values
    assert report.values["optim/grad_norm/mean"] > 0
