"""A bench for the learner: a student in float64, its scored rollouts, and gradients written out rollout by rollout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import prompt, toy_recipe
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import opd
from opd.batch import Batch, pack
from opd.config import Config, ObjectiveConfig, OptimizerConfig
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.learner import LocalLearner
from opd.metrics import values
from opd.objectives.vocabulary import SharedVocabularyIds, TeacherHead
from opd.records import Prompt, ScoredRollout

TEMPERATURE = 0.8
# Several samples of one prompt, and one text asked of both teachers.
PROMPTS = [
    prompt("p0", "hi", teacher="even"),
    prompt("p1", "hi", teacher="odd"),
    prompt("p2", "hi there", teacher="even"),
    prompt("p3", "and now", teacher="odd"),
]


def norm_in_its_inputs_width(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@contextmanager
def float64_norms() -> Iterator[None]:
    """Llama takes its norms in float32 whatever its weights are; float64 throughout tells a wrong formula from rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", norm_in_its_inputs_width)
        yield


@dataclass(frozen=True)
class Bench:
    """A student with non-zero weights in float64, its rollouts scored by two teachers, and the batch made of them."""

    backend: LocalBackend
    scored: list[ScoredRollout]
    batch: Batch

    def learner(self, *, max_tokens: int = 10_000, steps: int = 10, **options: Any) -> LocalLearner:
        optimizer = options.pop("optimizer", OptimizerConfig(lr=1e-2, warmup_steps=1))
        student = self.backend.student
        return LocalLearner(
            student.network,
            adapter=student.adapter,
            objective=ObjectiveConfig(**options),
            optimizer=optimizer,
            steps=steps,
            heads={n: TeacherHead(head) for n, head in heads_of(self.backend, student.network.base.dtype).items()},
            temperature=TEMPERATURE,
            max_tokens=max_tokens,
        )

    def gradient(self, batch: Batch | None = None, **options: Any) -> dict[str, Tensor]:
        return self.gradient_and_loss(batch, **options)[0]

    def gradient_and_loss(self, batch: Batch | None = None, **options: Any) -> tuple[dict[str, Tensor], float]:
        """The gradient by name and the loss of one call; nothing of it stays behind."""
        learner = self.learner(**options)
        weights = learner.weights()
        for parameter in weights.values():
            parameter.grad = None
        metrics = values(learner.forward_backward(batch or self.batch))
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in weights.items()}
        for parameter in weights.values():
            parameter.grad = None
        return found, metrics["loss/total/sum"]


def heads_of(backend: LocalBackend, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: policy.network.head_weight().to(dtype) for name, policy in backend.policies.items()}


def make_bench(folder: Path, prompts: Sequence[Prompt] = PROMPTS, *, wide: bool = True, **changes: Any) -> Bench:
    config = opd.parse_config(toy_recipe(folder, temperature=TEMPERATURE, **changes))
    backend = build(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in backend.learner().weights().items():
            if "lora_" in name:  # a fresh adapter is the identity, and half of its gradient is 0
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    rollouts = backend.sampler().sample(prompts, num_samples=2, seed=(5,))
    scored = backend.teachers(keep_hidden=True, followed=True).score(rollouts)
    batch, counts = pack(scored, logprob_floor=-50.0)
    assert counts["dropped"] == 0
    if wide:
        backend.student.network.base.double()
    return Bench(backend, scored, batch)


# Fixtures: a file whose tests take them imports them as themselves (`bench as bench`).


@pytest.fixture(autouse=True, scope="module")
def in_float64() -> Iterator[None]:
    with float64_norms():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"))


def with_advantages(batch: Batch, seed: int = 0) -> Batch:
    """The batch with advantages of both signs on its actions, and rollouts of a policy that has moved since."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(batch.token_ids), generator=generator)
    moved = batch.rollout_logprobs + 0.2 * torch.randn(len(batch.token_ids), generator=generator) * batch.loss_mask
    return replace(batch, advantages=noise * batch.loss_mask, rollout_logprobs=moved)


def largest(gradient: dict[str, Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradient.values())


def assert_same_gradient(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    scale = largest(expected)
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * max(1.0, scale), name


Loss = Callable[[Tensor, Tensor, slice, int], Tensor]


def dense_gradient(bench: Bench, batch: Batch, loss_of_row: Loss) -> dict[str, Tensor]:
    """The gradient by autograd of one plain forward pass a rollout.

    loss_of_row: (student logits [actions, vocab], targets [actions], the rollout's actions within the batch, its index).
    """
    network = bench.backend.student.network
    weights = bench.learner().weights()
    total = torch.zeros((), dtype=torch.float64)
    for row, (start, end) in enumerate(zip(batch.offsets, batch.offsets[1:], strict=False)):
        ids = batch.token_ids[start:end]
        places = batch.loss_mask[start:end].nonzero()[:, 0]
        logits = network.base(input_ids=ids[None]).logits[0, places - 1] / TEMPERATURE
        total = total + loss_of_row(logits, ids[places], start + places, row)
    gradients = torch.autograd.grad(total, list(weights.values()))
    return dict(zip(weights, gradients, strict=True))


def config_of(bench: Bench, objective: dict[str, Any], **tables: Any) -> Config:
    return opd.parse_config(bench.backend.config.model_dump(mode="json") | {"objective": objective} | tables)


def random_case(states: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor, SharedVocabularyIds]:
    g = torch.Generator().manual_seed(0)
    wide = {"dtype": torch.float64, "generator": g}
    hidden, head = torch.randn(states, 4, **wide), torch.randn(11, 4, **wide)
    teacher, theirs = torch.randn(states, 3, **wide), torch.randn(14, 3, **wide)
    # 6 cells and the last, which holds what has none; one cell has no id of the teacher's
    ours = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 1, 6, 6])
    others = torch.tensor([0, 1, 2, 3, 4, 4, 0, 2, 3, 3, 6, 6, 6, 1])
    return hidden.requires_grad_(), head.requires_grad_(), teacher, theirs, SharedVocabularyIds(ours, others, 7)
