"""Every estimator on a real student and its teachers: the direction and the variance of its gradient, on one batch.

All estimators see the same responses, and go through the learner that trains. Gradients are kept as sketches (each weight
added with a random sign into one of `_SKETCH` places), which keeps inner products to about 1 / sqrt(_SKETCH) = 0.3 %.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.batch import Batch, pack
from opd.config import Config, ObjectiveConfig
from opd.embedded.build import Studio, build
from opd.embedded.learner import EmbeddedLearner
from opd.errors import DataError
from opd.launch import read_tasks
from opd.records import Prompt, ScoredRollout
from opd.signal import follow

_SKETCH = 2**17
_REFERENCE = "exact"
ESTIMATORS: Mapping[str, Mapping[str, Any]] = {
    "exact": {"type": "exact"},
    "support, k = 8": {"type": "support", "support": 8},
    "support, k = 16": {"type": "support", "support": 16},
    "support, k = 32": {"type": "support", "support": 32},
    "support, k = 64": {"type": "support", "support": 64},
    "support, k = 32, tail residual": {"type": "support", "support": 32, "tail_residual": True},
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
    """One estimator: the cosine of its mean gradient with the exact immediate one's, and the variance of one response's
    gradient around its prompt's mean, the sampled immediate log ratio's being 1; each with a 95 % bootstrap interval."""

    estimator: str
    cosine: float
    cosine_interval: tuple[float, float]
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
    prompt_sets, _ = read_tasks(config, None)
    studio = build(config)
    chosen = _spread([splits["train"] for splits in prompt_sets.values()], num_prompts)
    if len(chosen) < 2:
        raise DataError(f"a probe compares prompts: it needs 2 or more, the recipe has {len(chosen)}")
    rollouts = studio.sampler().sample(chosen, num_samples=samples, seed=(config.seed, "probe"))
    scored = studio.teachers(keep_hidden=True).score(rollouts)
    groups = [scored[i : i + samples] for i in range(0, len(scored), samples)]
    learners = {name: _learner(studio, options) for name, options in ESTIMATORS.items()}
    sketch = _Sketch(next(iter(learners.values())))
    found = np.zeros((len(ESTIMATORS), len(groups), samples, _SKETCH), dtype=np.float32)
    kls: list[float] = []
    for g, group in enumerate(groups):
        for e, (name, learner) in enumerate(learners.items()):
            batch = _followed(config, learner, ESTIMATORS[name], group)
            for i in range(samples):
                found[e, g, i] = sketch.of(learner, _only(batch, i))
            if name == "immediate + KL":
                assert batch.reverse_kl is not None
                kls += batch.reverse_kl[batch.loss_mask].tolist()
    rows = tuple(_rows(found, list(ESTIMATORS), repeats))
    return Probe(len(groups), samples, len(kls), float(np.mean(kls)), rows)


def probe_text(found: Probe) -> str:
    """The table as Markdown."""
    lines = [
        f"{found.prompts} prompts x {found.samples} responses, {found.actions} actions, {found.kl_token:.3f} nats a token",
        "",
        "| estimator | cosine with the exact immediate gradient | variance of one response, immediate = 1 |",
        "|---|---|---|",
    ]
    for row in found.rows:
        low, high = row.cosine_interval
        least, most = row.variance_interval
        lines.append(
            f"| {row.estimator} | {row.cosine:.4f} [{low:.4f}, {high:.4f}] | {row.variance:.3f} [{least:.3f}, {most:.3f}] |"
        )
    return "\n".join(lines)


def write_probe(found: Probe, folder: Path) -> list[Path]:
    """probe.json and probe.md."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, table = folder / "probe.json", folder / "probe.md"
    plain.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    table.write_text(probe_text(found) + "\n", encoding="utf-8")
    return [plain, table]


def _spread(sets: Sequence[Sequence[Prompt]], count: int) -> list[Prompt]:
    """The first prompts of every task in turn."""
    longest = max(map(len, sets))
    every = [prompts[i] for i in range(longest) for prompts in sets if i < len(prompts)]
    return every[:count]


def _learner(studio: Studio, options: Mapping[str, Any]) -> EmbeddedLearner:
    floor = studio.config.objective.teacher_logprob_floor
    objective = ObjectiveConfig(**options, normalizer="constant", constant=1.0, teacher_logprob_floor=floor)
    return replace(studio, config=studio.config.model_copy(update={"objective": objective})).learner()


def _followed(
    config: Config, learner: EmbeddedLearner, options: Mapping[str, Any], group: Sequence[ScoredRollout]
) -> Batch:
    """The batch of one prompt's responses as training would prepare it."""
    objective = ObjectiveConfig(**options)
    batch, _ = pack(group, logprob_floor=config.objective.teacher_logprob_floor)
    if objective.needs_student_scores:
        batch = learner.score_student(batch)
    plain = config.model_copy(
        update={"objective": objective, "outcome": config.outcome.model_copy(update={"coef": 0.0})}
    )
    return follow(plain, batch)[0]


def _only(batch: Batch, row: int) -> Batch:
    """The batch with one response that trains; the others stay in it as they are."""
    mine = torch.repeat_interleave(torch.arange(len(batch)) == row, batch.lengths)
    return replace(batch, train_mask=batch.train_mask & mine, distill_mask=batch.distill_mask & mine)


class _Sketch:
    """A fixed random projection of the gradient of a learner's trainable weights."""

    def __init__(self, learner: EmbeddedLearner) -> None:
        generator = torch.Generator().manual_seed(0)
        self._places: dict[str, Tensor] = {}
        self._signs: dict[str, Tensor] = {}
        for name, weight in learner.weights().items():
            self._places[name] = torch.randint(0, _SKETCH, (weight.numel(),), generator=generator)
            self._signs[name] = 2.0 * torch.randint(0, 2, (weight.numel(),), generator=generator) - 1.0

    def of(self, learner: EmbeddedLearner, batch: Batch) -> np.ndarray:
        """The sketch [_SKETCH] of the gradient of one batch's loss; nothing of it stays behind."""
        learner.forward_backward(batch)
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
    for e, name in enumerate(names):
        gram = {
            key: means[a].astype(np.float64) @ means[b].astype(np.float64).T
            for key, (a, b) in {"ee": (e, e), "er": (e, reference), "rr": (reference, reference)}.items()
        }

        def cosine(chosen: np.ndarray, gram: dict[str, np.ndarray] = gram) -> float:
            sums = {key: float(matrix[np.ix_(chosen, chosen)].sum()) for key, matrix in gram.items()}
            return sums["er"] / (sums["ee"] * sums["rr"]) ** 0.5

        ratios = [float(variances[e][d].sum() / variances[immediate][d].sum()) for d in draws]
        yield ProbeRow(
            name,
            cosine(np.arange(found.shape[1])),
            _interval([cosine(d) for d in draws]),
            float(variances[e].sum() / variances[immediate].sum()),
            _interval(ratios),
        )


def _interval(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
