"""Every estimator on a real student and its teachers: the direction and the variance of its gradient, on one batch.

All estimators see the same responses, and go through the learner that trains. Gradients are kept as sketches (each weight
added with a random sign into one of `_SKETCH` places), which keeps inner products to about 1 / sqrt(_SKETCH) = 0.3 %.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.batch import Batch, pack
from opd.checks import startup
from opd.checks.startup import run_checks
from opd.config import Config, MaskConfig, ObjectiveConfig, RewardConfig
from opd.data.tasks import read_tasks
from opd.errors import DataError, ScoreError
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.learner import LocalLearner
from opd.local.loss_terms import Pass
from opd.objective import compute_advantages
from opd.records import FailedScore, Prompt, ScoredRollout

_SKETCH = 2**17
_REFERENCE = "exact"
ESTIMATORS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"type": "exact"},
    "support, k = 8": {"type": "top_k", "top_k": 8},
    "support, k = 16": {"type": "top_k", "top_k": 16},
    "support, k = 32": {"type": "top_k", "top_k": 32},
    "support, k = 64": {"type": "top_k", "top_k": 64},
    "support, k = 32, tail residual": {"type": "top_k", "top_k": 32, "tail_residual": True},
    "immediate": {"type": "immediate"},
    "immediate + KL": {"type": "immediate", "baseline": "kl"},
    "immediate - b*": {"type": "immediate", "baseline": "score_weighted"},
    "immediate, leave one out": {"type": "immediate", "baseline": "leave_one_out"},
    "exact_to_go, discount 0.9": {"type": "exact_to_go", "discount": 0.9, "baseline": "leave_one_out"},
    "exact_to_go, discount 1": {"type": "exact_to_go", "discount": 1.0, "baseline": "leave_one_out"},
    "kl_to_go, discount 1, leave one out": {"type": "kl_to_go", "discount": 1.0, "baseline": "leave_one_out"},
    "to_go, discount 1": {"type": "to_go", "discount": 1.0},
    "to_go, discount 1, leave one out": {"type": "to_go", "discount": 1.0, "baseline": "leave_one_out"},
}


@dataclass(frozen=True)
class ProbeRow:
    """One estimator, each figure with a 95 % bootstrap interval over prompts.

    cosine: of this batch's gradient with the exact immediate one of the same responses, noise included. mean_cosine: of the
    two mean gradients, from products of different prompts alone, in which noise has mean zero (it may leave [-1, 1]).
    variance: of one response's gradient around its prompt's mean, the sampled immediate log ratio's being 1 (with
    leave-one-out, within the group).
    """

    estimator: str
    cosine: float
    cosine_interval: tuple[float, float]
    mean_cosine: float
    mean_cosine_interval: tuple[float, float]
    variance: float
    variance_interval: tuple[float, float]


@dataclass(frozen=True)
class Probe:
    """What was probed, and the rows: prompts, samples a prompt, actions in all, reverse KL per token (nats)."""

    prompts: int
    samples: int
    actions: int
    kl_token: float
    rows: tuple[ProbeRow, ...]


def probe(config: Config, *, num_prompts: int = 16, samples: int = 4, repeats: int = 2000) -> Probe:
    """Measure every estimator on `num_prompts` prompts of the recipe, `samples` responses each, at the student as it is
    before the first step. Raises OpdError where the recipe does not fit."""
    task_data = read_tasks(config, None)
    prompt_sets = task_data.prompts
    if any(teacher.url is not None for teacher in config.teachers.values()):
        raise DataError(
            "a probe compares distributions, and a teacher with a url gives none; load it in process (model)"
        )
    backend = build(config, task_data.make_environment)
    startup.require(run_checks(config, backend, task_data))
    if backend.cross_tokenizer:
        names = ", ".join(f"'{name}'" for name in backend.cross_tokenizer)
        raise DataError(
            f"a probe compares distributions; teacher {names} has another tokenizer, so it has none over the student's tokens"
        )
    chosen = _spread([splits["train"] for splits in prompt_sets.values()], num_prompts)
    if len(chosen) < 2:
        raise DataError(f"a probe compares prompts: it needs 2 or more, the recipe has {len(chosen)}")
    rollouts = backend.sampler().sample(chosen, num_samples=samples, seed=(config.seed, "probe"))
    scored = backend.teachers(keep_hidden=True, followed=True).score(rollouts)
    # an episode that its template split is several rollouts
    groups = [list(group) for _, group in groupby(scored, key=lambda s: (s.rollout.prompt.task, s.rollout.prompt.id))]
    learners = {name: _learner(backend, options) for name, options in ESTIMATORS.items()}
    scorer = _learner(backend, {"type": "immediate", "baseline": "score_weighted"})  # it fills every column
    sketch = _Sketch(scorer)
    found = np.zeros((len(ESTIMATORS), len(groups), samples, _SKETCH), dtype=np.float32)
    kls: list[float] = []
    for g, group in enumerate(groups):
        batch = scorer.score_student(_packed(config, group))
        assert batch.reverse_kl is not None
        kls += batch.reverse_kl[batch.loss_mask].tolist()
        passes = list(
            scorer.passes(batch)
        )  # of one prompt's responses, for all estimators: a forward pass is half the work
        for e, (name, learner) in enumerate(learners.items()):
            followed = _followed(config, ESTIMATORS[name], batch)
            for i in range(samples):
                _backward(learner, passes, _only(followed, i))
                found[e, g, i] = sketch.take(learner)
    rows = tuple(_rows(found, list(ESTIMATORS), repeats))
    return Probe(len(groups), samples, len(kls), float(np.mean(kls)), rows)


def probe_text(found: Probe) -> str:
    """The table as Markdown."""
    lines = [
        f"{found.prompts} prompts x {found.samples} responses, {found.actions} actions, {found.kl_token:.3f} nats a token",
        "",
        "| estimator | cosine with the exact immediate gradient, this batch | of the mean gradients | variance, immediate = 1 |",
        "|---|---|---|---|",
    ]
    for row in found.rows:
        cells = [
            f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            for value, (low, high), digits in (
                (row.cosine, row.cosine_interval, 4),
                (row.mean_cosine, row.mean_cosine_interval, 2),
                (row.variance, row.variance_interval, 3),
            )
        ]
        lines.append(f"| {row.estimator} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_probe(found: Probe, folder: Path) -> list[Path]:
    """probe.json and probe.md."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, table = folder / "probe.json", folder / "probe.md"
    plain.write_text(json.dumps(_without_nan(asdict(found)), indent=1) + "\n", encoding="utf-8")
    table.write_text(probe_text(found) + "\n", encoding="utf-8")
    return [plain, table]


def _without_nan(value: Any) -> Any:
    """The same plain data with None for nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _spread(sets: Sequence[Sequence[Prompt]], count: int) -> list[Prompt]:
    """The first prompts of every task in turn."""
    longest = max(map(len, sets))
    every = [prompts[i] for i in range(longest) for prompts in sets if i < len(prompts)]
    return every[:count]


def _learner(backend: LocalBackend, options: Mapping[str, Any]) -> LocalLearner:
    floor = backend.config.objective.teacher_logprob_floor
    objective = ObjectiveConfig(**options, teacher_logprob_floor=floor)
    return replace(backend, config=backend.config.model_copy(update={"objective": objective})).learner()


def _packed(config: Config, group: Sequence[ScoredRollout]) -> Batch:
    """One prompt's responses as a batch; none may be missing."""
    for item in group:
        if isinstance(item.score, FailedScore):
            raise ScoreError(f"rollout '{item.rollout.id}' has no score: {item.score.reason}")
    return pack(group, logprob_floor=config.objective.teacher_logprob_floor)[0]


def _followed(config: Config, options: Mapping[str, Any], batch: Batch) -> Batch:
    """The batch as training with this estimator would follow it."""
    plain = {"objective": ObjectiveConfig(**options), "reward": RewardConfig(), "mask": MaskConfig()}
    return compute_advantages(config.model_copy(update=plain), batch)[0]


def _only(batch: Batch, episode: int) -> Batch:
    """The batch with one response that trains, all parts of it; the others stay in it as they are."""
    mine = torch.repeat_interleave(batch.episodes == episode, batch.lengths)
    return replace(batch, distill_mask=batch.distill_mask & mine)


def _backward(learner: LocalLearner, passes: Sequence[Pass], batch: Batch) -> None:
    """The gradient of one batch's loss, undivided, on forward passes that stay as they are."""
    losses = [learner.loss_of(replace(given, batch=batch), divisor=1.0)[0] for given in passes]
    torch.stack(losses).sum().backward(retain_graph=True)


class _Sketch:
    """A fixed random projection of the gradient of a learner's trainable weights."""

    def __init__(self, learner: LocalLearner) -> None:
        generator = torch.Generator().manual_seed(0)
        self._places: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        for name, weight in learner.weights().items():
            self._places[name] = torch.randint(0, _SKETCH, (weight.numel(),), generator=generator)
            self._signs[name] = 2.0 * torch.randint(0, 2, (weight.numel(),), generator=generator) - 1.0

    def take(self, learner: LocalLearner) -> np.ndarray:
        """The sketch [_SKETCH] of the gradient that the learner's weights hold; they hold none afterwards."""
        total = torch.zeros(_SKETCH)
        for name, weight in learner.weights().items():
            if weight.grad is not None:
                total.index_add_(
                    0, self._places[name], self._signs[name] * weight.grad.detach().float().cpu().flatten()
                )
            weight.grad = None
        return total.numpy()


def _rows(found: np.ndarray, names: list[str], repeats: int) -> Iterator[ProbeRow]:
    """Cosines and variances from sketches [estimators, prompts, samples, _SKETCH], bootstrapped over prompts."""
    means = found.mean(2)
    variances = ((found - means[:, :, None]) ** 2).sum(-1).sum(-1) / (found.shape[2] - 1)  # [estimators, prompts]
    reference, immediate = names.index(_REFERENCE), names.index("immediate")
    draws = np.random.default_rng(0).integers(0, found.shape[1], (repeats, found.shape[1]))
    whole = np.ones(found.shape[1])
    counts = np.stack([np.bincount(d, minlength=found.shape[1]) for d in draws]).astype(float)
    wide = means.astype(np.float64)
    for e, name in enumerate(names):
        pairs = [wide[a] @ wide[b].T for a, b in ((e, reference), (e, e), (reference, reference))]
        ratios = (counts @ variances[e]) / (counts @ variances[immediate])
        yield ProbeRow(
            name,
            _cosine(pairs, whole, apart=False),
            _interval([_cosine(pairs, c, apart=False) for c in counts]),
            _cosine(pairs, whole, apart=True),
            _interval([_cosine(pairs, c, apart=True) for c in counts]),
            float(variances[e].sum() / variances[immediate].sum()),
            _interval(ratios),
        )


def _cosine(pairs: list[np.ndarray], counts: np.ndarray, *, apart: bool) -> float:
    """The cosine of two sums of prompts' gradients, each prompt `counts` times, from their products [prompts, prompts];
    `apart` leaves out a prompt's product with itself. nan where a squared length comes out negative."""
    sums = []
    for products in pairs:
        total = float(counts @ products @ counts)
        sums.append(total - float(counts**2 @ np.diag(products)) if apart else total)
    inner, ours, theirs = sums
    return inner / (ours * theirs) ** 0.5 if ours > 0 and theirs > 0 else float("nan")


def _interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
