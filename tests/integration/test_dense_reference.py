"""The library's gradient and figures under random recipes, beside a dense reference that shares no code with it."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dense_reference as dense
import numpy as np
import pytest
import torch
from benches import float64_norms
from dense_llama import Llama
from dense_records import Row
from factories import save_toy, toy_model
from random_recipes import WORLDS, chunk_logprobs, draw, in_chunks, sampled, sampled_rows
from torch import Tensor

import opd
from opd.batch import pack
from opd.config import Config
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.learner import LocalLearner
from opd.metrics import values
from opd.objective import compute_advantages
from opd.records import ChunkScore, FailedScore, Flag, Prompt, Rollout, ScoredRollout, TopKScore, Turn

NUM_RECIPES = 216
TOLERANCE = 1e-6


def test_the_forward_pass_written_out_is_that_of_transformers():
    tokens = tuple(range(40, 60))
    with torch.no_grad():
        plain = toy_model(3)(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(Llama(3)(tokens).float(), plain, rtol=1e-4, atol=1e-4)


def short(name: str) -> str:
    """The reference's name of one of the learner's weights."""
    plain = name.removeprefix("base_model.model.").removeprefix("model.")
    return plain.replace(".lora_A.student.weight", ".A").replace(".lora_B.student.weight", ".B")


@dataclass
class World:
    """A student and its teachers, in the library and written out; `rows` are what the student sampled."""

    backend: LocalBackend
    student: Llama
    models: dict[str, Llama]
    extrapolation: float
    reference: str | None
    logits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    teacher_logits: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def weights(self, learner: LocalLearner) -> dict[str, Tensor]:
        return {short(n): p.detach().clone().requires_grad_() for n, p in learner.weights().items()}

    def parts(self, row: Row) -> list[tuple[float, Tensor]]:
        """(weight in log q, logits [actions, vocab]) of each model of a row's target."""
        shares = {"both": {"even": 0.75, "odd": 0.25}}.get(row.teacher, {row.teacher: 1.0})
        found = [(self.extrapolation * w, self.speak(name, row)) for name, w in shares.items()]
        if self.reference is not None:
            found.append((1.0 - self.extrapolation, self.speak(self.reference, row)))
        return found

    @torch.no_grad()
    def speak(self, name: str, row: Row) -> Tensor:
        key = (name, row.tokens)
        if key not in self.teacher_logits:
            self.teacher_logits[key] = self.models[name](row.tokens)
        return self.teacher_logits[key][[place - 1 for place in row.actions]]


def make_world(folder: Path, trainable: str, extrapolation: float = 1.0, reference: str | None = None) -> World:
    config = opd.parse_config(
        {
            "student": save_toy(folder / "student", 0),
            "output": str(folder / "run"),
            "trainable": trainable,
            "lora": {"rank": 4, "alpha": 8},
            "teachers": {
                "even": {"model": save_toy(folder / "even", 1)},
                "odd": {"model": save_toy(folder / "odd", 2)},
                "both": {"weights": {"even": 3.0, "odd": 1.0}},
            },
            "tasks": {"task": {"type": "file", "path": "-", "teacher": "both", "checks": {"rules": ["truncated"]}}},
            "objective": {"extrapolation": extrapolation, "reference": reference},
            "compute": {"threads": 1, "device": "cpu"},
        }
    )
    backend = build(config)
    generator = torch.Generator().manual_seed(4)
    for policy in (backend.student, *backend.policies.values()):
        policy.network.base.double()
    with torch.no_grad():
        for name, parameter in backend.learner().weights().items():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    models = {"student": Llama(0), "even": Llama(1), "odd": Llama(2)}
    return World(backend, models["student"], models, extrapolation, reference)


@cache
def every_world() -> dict[str, World]:
    """Loaded once a process: weights are put back after every recipe."""
    with TemporaryDirectory() as folder:
        return {name: make_world(Path(folder) / name, *how) for name, how in WORLDS.items()}


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, World]]:
    with float64_norms():
        yield every_world()


def rollout_of(row: Row) -> Rollout:
    """The library's record of a row."""
    size = len(row.tokens)
    mask, logprobs = np.zeros(size, dtype=bool), np.zeros(size, dtype=np.float32)
    mask[list(row.actions)] = True
    logprobs[list(row.actions)] = row.sampled
    turns: list[Turn] = []
    at = 0
    for start, end in row.turns:
        turns += [Turn("observation" if turns else "prompt", at, start), Turn("student", start, end)]
        at = end
    prompt = Prompt(row.prompt, ({"role": "user", "content": "-"},), teacher=row.teacher, task="task")
    return Rollout(
        prompt=prompt, sample=row.sample, token_ids=np.array(row.tokens, dtype=np.int32), loss_mask=mask,
        rollout_logprobs=logprobs, turns=tuple(turns), messages=(*prompt.messages, {"role": "assistant", "content": "-"}),
        finish="end", policy_version=0, reward=row.reward, part=row.part,
        flags=tuple(Flag("truncated", a, b) for a, b in row.flags), failure="gone" if row.failed else None,
    )  # fmt: skip


@cache
def every_recipe() -> list[tuple[int, str, str, Config]]:
    """(seed, world, how scores come, configuration); what a configuration refuses is drawn again."""
    found = []
    for seed in itertools.count(1):
        name, scores, tree = draw(random.Random(seed))
        plain = every_world()[name].backend.config.model_dump(mode="json") | {"sampling": {"group_size": 3}}
        try:
            found.append((seed, name, scores, opd.parse_config(plain | tree)))
        except opd.OpdError:
            continue
        if len(found) == NUM_RECIPES:
            break
    return found


@pytest.mark.parametrize("number", range(NUM_RECIPES))
def test_the_gradient_of_a_random_recipe_is_that_of_the_dense_reference(worlds: dict[str, World], number: int):
    seed, name, scores, config = every_recipe()[number]
    faults = compare(worlds[name], seed, scores, config)
    assert not faults, f"recipe {seed} ({name}, {scores}): {'; '.join(faults)}\n{shown(config)}"


def test_every_option_occurs_in_the_random_recipes():
    seen: Counter[str] = Counter()
    for _, name, scores, config in every_recipe():
        objective, correction = config.objective, config.objective.correction
        seen.update([f"world {name}", f"scores {scores}", f"type {objective.type}", f"baseline {objective.baseline}"])
        seen.update([f"scope {config.mask.format_errors}", f"floor {objective.teacher_logprob_floor}"])
        seen.update(
            [f"temperature {config.temperature}", f"normalizer {objective.normalizer}", f"loss {objective.loss}"]
        )
        seen.update([f"correction {correction.type} {correction.level if correction.type != 'none' else ''}"])
        seen.update([f"reward {config.reward.baseline if config.reward.coef else 'off'}", f"coef {objective.coef}"])
        seen.update([f"epochs {objective.epochs}", f"dual {objective.clip_dual is not None}"])
        seen.update([f"divergence {objective.divergence}", f"residual {objective.tail_residual}"])
        seen.update([f"credit {config.alignment.credit}", f"passes of {config.compute.max_tokens}"])
        if objective.discount is not None:
            seen.update([f"discount {objective.discount} of {objective.type}"])
        if objective.type == "top_k":
            seen.update([f"top_k {objective.top_k}"])
    rare = {name: count for name, count in seen.items() if count < 2}
    assert not rare
    expected = {
        "world": 5, "scores": 4, "type": 6, "baseline": 4, "scope": 5, "floor": 3, "temperature": 3, "normalizer": 3, "loss": 2,
        "correction": 7, "reward": 5, "coef": 3, "epochs": 2, "dual": 2, "divergence": 3, "residual": 2, "credit": 2, "passes": 3,
        "discount": 12, "top_k": 4,
    }  # fmt: skip
    assert Counter(name.split()[0] for name in seen) == expected


def compare(world: World, seed: int, scores: str, config: Config) -> list[str]:
    """What the library and the reference say otherwise of one step, in words."""
    rng = random.Random(seed)
    tree = config.model_dump(mode="json")
    objective = config.objective
    recipe = {k: tree[k] for k in ("objective", "reward", "mask", "temperature")} | {"credit": config.alignment.credit}
    rows = scored_rows(rng, world, scores, recipe)
    own = world.weights(replace(world.backend, config=config).learner())
    logits = [world.student(row.tokens, own)[[place - 1 for place in row.actions]] for row in rows]
    noise = rng.choice([0.0, 0.2, 0.5])
    rows = [
        replace(row, sampled=sampled(rng, row, x, config.temperature, noise))
        for row, x in zip(rows, logits, strict=True)
    ]
    rows = [replace(row, chunks=in_chunks(rng, row)) if row.kind == "chunks" else row for row in rows]
    parts = [world.parts(row) for row in rows]
    student_scored = objective.needs_student_scores or rng.random() < 0.2
    facts = {
        "student_scored": student_scored,
        "distributions": scores == "whole" and (objective.integrated or student_scored),
        "chunk_logq": [chunk_logprobs(rng, row) for row in rows],
    }
    plan = dense.compute_advantages(recipe, rows, logits, parts, facts)

    backend = replace(world.backend, config=config)
    items = scored_by(backend, rows, scores, recipe, parts, facts)
    unscored = config.reward.coef > 0
    if not plan.actions:
        with pytest.raises(opd.OpdError, match="none of"):
            pack(items, logprob_floor=objective.teacher_logprob_floor, unscored=unscored)
        return []
    batch, _ = pack(items, logprob_floor=objective.teacher_logprob_floor, unscored=unscored)
    learner = backend.learner()
    if student_scored:
        batch = learner.score_student(batch)
    batch, followed = compute_advantages(config, batch)
    faults: list[str] = []
    with kept(learner) as weights:
        for epoch in range(objective.epochs):
            total, more = dense.loss(recipe, rows, plan, logits)
            wanted = torch.autograd.grad(total, list(own.values()), allow_unused=True, materialize_grads=True)
            found = values(learner.forward_backward(batch) | followed)
            faults += differences(dict(zip(own, wanted, strict=True)), weights)
            if epoch == 0:
                faults += figures(plan.metrics | more, found, recipe)
            learner.optim_step()
            if epoch + 1 < objective.epochs:
                own = world.weights(learner)
                logits = [world.student(row.tokens, own)[[place - 1 for place in row.actions]] for row in rows]
    return faults


def scored_rows(rng: random.Random, world: World, scores: str, recipe: Mapping[str, Any]) -> list[Row]:
    """Rows as this recipe has them: how they were scored, and which tokens a teacher named."""
    every = ["even", "odd", "both"] if scores in ("whole", "sampled") else ["even", "odd"]
    rows = sampled_rows(
        rng, teachers=[rng.choice(every) for _ in range(3)], flags=rng.choice([0.0, 0.3]), lost=rng.choice([0.0, 0.25])
    )
    rows = [row if row.kind == "none" else replace(row, kind=scores) for row in rows]
    if scores != "named":
        return rows
    k = recipe["objective"]["top_k"]
    found = []
    for row in rows:
        if row.kind == "none":
            found.append(row)
            continue
        logq = torch.log_softmax(world.parts(row)[0][1] / recipe["temperature"], -1).float()
        likeliest = logq.topk(min(k, 20)).indices.tolist()
        ids = [dict.fromkeys([*top, int(t)]) for top, t in zip(likeliest, row.targets, strict=True)]
        found.append(
            replace(row, named=tuple({i: float(at[i]) for i in some} for some, at in zip(ids, logq, strict=True)))
        )
    return found


def scored_by(
    backend: LocalBackend,
    rows: list[Row],
    scores: str,
    recipe: Mapping[str, Any],
    parts: list[Any],
    facts: dict[str, Any],
) -> list[ScoredRollout]:
    """The rows as the library's teachers score them; those that name tokens or score chunks are servers' and are made here."""
    rollouts = [rollout_of(row) for row in rows]
    plain = backend.teachers(keep_hidden=scores == "whole", followed=True).score(rollouts)
    found = []
    for i, (row, item) in enumerate(zip(rows, plain, strict=True)):
        if row.kind == "none":
            found.append(ScoredRollout(item.rollout, FailedScore(row.teacher, "lost")))
        elif row.kind in ("whole", "sampled"):
            found.append(item)
        else:
            spread = np.zeros(len(row.tokens), dtype=np.float32)
            places = list(row.actions)
            if row.kind == "chunks":
                spread[places] = facts["chunk_logq"][i]
                numbers = np.full(len(row.tokens), -1, dtype=np.int32)
                numbers[places] = row.chunks
                score = ChunkScore(row.teacher, spread, numbers, 5, {})
            else:
                logq = torch.log_softmax(parts[i][0][1] / recipe["temperature"], -1)
                spread[places] = logq.gather(-1, row.targets[:, None])[:, 0].numpy()
                width = max(map(len, row.named))
                ids = np.full((len(places), width), -1, dtype=np.int32)
                top_k_logprobs = np.full((len(places), width), -np.inf, dtype=np.float32)
                for k, named in enumerate(row.named):
                    ids[k, : len(named)] = list(named)
                    top_k_logprobs[k, : len(named)] = list(named.values())
                score = TopKScore(row.teacher, spread, ids, top_k_logprobs)
            found.append(ScoredRollout(item.rollout, score))
    return found


@contextmanager
def kept(learner: LocalLearner) -> Iterator[Mapping[str, Tensor]]:
    """The learner's weights, without a gradient; as they were before, afterwards."""
    weights = learner.weights()
    before = {name: p.detach().clone() for name, p in weights.items()}
    for parameter in weights.values():
        parameter.grad = None
    yield weights
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.grad = None
            parameter.copy_(before[name])


def differences(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Empty where the gradients are equal to the tolerance, relative to the whole gradient's norm."""
    gap = scale = 0.0
    for name, parameter in weights.items():
        expected = wanted[short(name)]
        found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        gap += float((found - expected).square().sum())
        scale += float(expected.square().sum())
    gap, scale = math.sqrt(gap), math.sqrt(scale)
    if gap <= TOLERANCE * max(scale, 1e-3):
        return []
    return [f"the gradient of norm {scale:.6g} is off by {gap / max(scale, 1e-12):.2g} of it"]


def figures(wanted: Mapping[str, float], found: Mapping[str, float], recipe: Mapping[str, Any]) -> list[str]:
    """Every figure that both have, and those that training must show."""
    must = {"kl/token/mean", "kl/sequence/mean", "loss/total/sum"} & wanted.keys()
    missing = [name for name in must if name not in found and not math.isnan(wanted[name])]
    wrong = [f"{name} is missing" for name in missing]
    for name, value in wanted.items():
        if name == "loss/total/sum" and recipe["objective"]["tail_residual"]:
            continue  # the residual is a term of the gradient alone
        if name in found and not math.isclose(found[name], value, rel_tol=2e-6, abs_tol=2e-6):
            wrong.append(f"{name} is {found[name]:.7g}, expected {value:.7g}")
    return wrong


def shown(config: Config) -> str:
    tree = config.model_dump(mode="json", exclude_defaults=True)
    return "    " + str({k: tree[k] for k in ("objective", "reward", "mask", "temperature", "alignment") if k in tree})
