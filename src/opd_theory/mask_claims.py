"""Claims on masks and rewards: batches of a student of three actions, through the functions that training calls.

Action 0 is an error; the other two are responses whose shares the student cannot move, so that a KL remains. The one free number
is the logit of P(error). An error may be longer than a response by tokens that both models are sure of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import exp, factorial, log, prod

import numpy as np
import torch
from torch import Tensor

from opd.batch import Batch, pack
from opd.config import Config, parse_config
from opd.objective import compute_advantages, divisor
from opd.objectives.losses import reinforce
from opd.objectives.mask_law import Choice
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd.records import Flag, Prompt, Rollout, SampledScore, ScoredRollout, Turn
from opd_theory.claim import Claim

_Q_ERROR, _K_OK = 0.02, 0.2556  # the example: q(error), and the KL that remains among the good actions
_KL = _K_OK - log(1 - _Q_ERROR)  # of a student without errors
_FORMAT_ERROR = -1.0
_EPISODES = 200  # of a batch that stands for very many


@cache
def recipe(choice: Choice, num_episodes: int) -> Config:
    """The configuration that trains a choice; a response without an error has the reward 1."""
    kind: dict[str, object] = {"type": "exact" if choice.distillation == "exact" else "immediate"}
    if choice.distillation == "kl":
        kind["baseline"] = "kl"
    kind["normalizer"] = choice.normalizer
    if choice.normalizer == "constant":
        kind["constant"] = num_episodes
    # what the rewards of a group differ by, which "grpo" divides by
    differ = 1.0 if choice.baseline == "grpo" else 1.0 - _FORMAT_ERROR
    config = parse_config(
        {
            "student": "three actions",
            "output": "unused",
            "teachers": {"t": {"model": "unused"}},
            "tasks": {"task": {"type": "file", "path": "unused", "teacher": "t", "checks": {"rules": ["truncated"]}}},
            "sampling": {"group_size": max(2, choice.group_size)},
            "objective": kind,
            "reward": {"coef": choice.weight / differ, "format_error": _FORMAT_ERROR, "baseline": choice.baseline},
        }
    )
    # set behind the checks: the claim also shows recipes that `opd` refuses
    scope = "trajectory" if choice.masked else "off"
    return config.model_copy(update={"mask": config.mask.model_copy(update={"format_errors": scope})})


@dataclass(frozen=True)
class Three:
    """A student of three actions at one P(error), and its teacher; [3] float64 each."""

    logit: Tensor
    logp: Tensor
    logq: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.logq - self.logp.detach()


def three(choice: Choice, error: float) -> Three:
    """The student whose logit of P(error) has a gradient."""
    logit = torch.tensor(log(error) - log(1 - error), dtype=torch.float64, requires_grad=True)
    # two good actions of the student's share 1/2 each, whose teacher's shares make the KL that remains
    remaining = choice.kl + log(1 - choice.teacher_error)
    tilt = 0.5 * (1 + (1 - exp(-2 * remaining)) ** 0.5)
    q = torch.tensor([tilt, 1 - tilt], dtype=torch.float64)
    good = torch.nn.functional.logsigmoid(-logit) - log(2)
    logp = torch.stack([torch.nn.functional.logsigmoid(logit), good, good])
    logq = torch.cat([torch.tensor([choice.teacher_error], dtype=torch.float64).log(), (1 - choice.teacher_error) * q])
    return Three(logit, logp, torch.cat([logq[:1], logq[1:].log()]))


@cache
def _packed(counts: tuple[int, int, int], length: int, group_size: int) -> tuple[Batch, Tensor]:
    """A batch with so many episodes of each action, in groups of consecutive ones, and the action of each."""
    actions = [action for action, count in enumerate(counts) for _ in range(count)]
    scored = []
    for number, action in enumerate(actions):
        size = length if action == 0 else 1
        prompt = Prompt(str(number // group_size), (), teacher="t", task="task")
        flags = (Flag("truncated", 1, 1 + size),) if action == 0 else ()
        rollout = Rollout(
            prompt=prompt,
            sample=number % group_size,
            token_ids=np.arange(1 + size, dtype=np.int32),
            loss_mask=np.arange(1 + size) > 0,
            rollout_logprobs=np.zeros(1 + size, dtype=np.float32),
            turns=(Turn("prompt", 0, 1), Turn("student", 1, 1 + size)),
            messages=(),
            finish="end",
            policy_version=0,
            reward=float(action != 0),
            flags=flags,
        )
        scored.append(ScoredRollout(rollout, SampledScore("t", np.zeros(1 + size, dtype=np.float32))))
    return pack(scored, logprob_floor=-50.0)[0], torch.tensor(actions)


def batch_gradient(choice: Choice, error: float, counts: tuple[int, int, int], group_size: int) -> float:
    """The step of the logit of P(error) that training makes of a batch with so many episodes of each action."""
    student = three(choice, error)
    batch, actions = _packed(counts, round(choice.length), group_size)
    first = torch.tensor(batch.offsets[:-1]) + 1  # the choice is the token behind the prompt

    def column(values: Tensor) -> Tensor:
        return torch.zeros(len(batch.token_ids), dtype=torch.float64).index_add(0, first, values)

    kl = -(student.logp.detach().exp() @ student.log_ratio)
    batch = replace(
        batch,
        rollout_logprobs=column(student.logp.detach()[actions]),
        teacher_logprobs=column(student.logq[actions]),
        student_logprobs=column(student.logp.detach()[actions]),
        reverse_kl=column(kl.expand(len(actions))),
        rewards=batch.rewards.double(),
    )
    config = recipe(choice, len(actions))
    batch, _ = compute_advantages(config, batch)
    shared = divisor(config.objective, batch)
    loss = torch.zeros((), dtype=torch.float64)
    if batch.advantages is not None:
        logprobs = column(student.logp[actions])
        loss = loss + reinforce(logprobs[None], batch.advantages[None], batch.train_mask[None], divisor=shared)
    if config.objective.integrated:
        eye = torch.eye(3, dtype=torch.float64)
        weight = batch.distill_mask[first].double().sum()[None] / shared
        target = TeacherStates(student.logq[None], eye)
        loss = loss + vocabulary_loss(student.logp[None], eye, [target], weight, VocabularyLoss())[0]
    return -float(torch.autograd.grad(loss, student.logit)[0])


def enumerated(choice: Choice, error: float, episodes: int) -> float:
    """The mean of `batch_gradient` over all batches of one group of `episodes`."""
    p = [error, (1 - error) / 2, (1 - error) / 2]
    total = 0.0
    for errors, first in product(range(episodes + 1), repeat=2):
        if errors + first <= episodes:
            counts = (errors, first, episodes - errors - first)
            ways = factorial(episodes) / prod(map(factorial, counts))
            chance = ways * prod(x**n for x, n in zip(p, counts, strict=True))
            total += chance * batch_gradient(choice, error, counts, episodes)
    return total


def large(choice: Choice, errors: int) -> float:
    """The step of a batch that has `errors` errors, an even number, among `_EPISODES`, at this P(error), over p (1 - p)."""
    good, share = (_EPISODES - errors) // 2, errors / _EPISODES
    # in the mean over batches a group's baseline changes nothing; in this one batch it would, by 1 / (n - 1)
    alone = replace(choice, baseline="none")
    return batch_gradient(alone, share, (errors, good, good), _EPISODES) / (share * (1 - share))


def trained_end(choice: Choice, start: float) -> float:
    """Where P(error) comes to rest from `start` in training's large batches; 0 where errors die out."""
    here, stride = 2 * round(start * _EPISODES / 2), 20
    value = large(choice, here)
    way = 1 if value > 0 else -1
    there, after = here, value
    while (after > 0) == (value > 0):
        here, value = there, after
        there = min(max(here + way * stride, 2), _EPISODES - 2)
        if there == here:
            return 0.0 if way < 0 else 1.0
        after = large(choice, there)
    while abs(there - here) > 2:
        middle = 2 * ((here + there) // 4)
        found = large(choice, middle)
        if (found > 0) == (value > 0):
            here, value = middle, found
        else:
            there, after = middle, found
    return (here + (there - here) * value / (value - after)) / _EPISODES


_CASES: dict[str, tuple[Choice, float]] = {
    "masked": (Choice(_KL), 0.5),
    "masked, KL baseline": (Choice(_KL, distillation="kl"), 0.5),
    "masked, exact": (Choice(_KL, distillation="exact"), 0.5),
    "not masked": (Choice(_KL, masked=False), 0.5),
    "masked, reward 0.1": (Choice(_KL, weight=0.1), 0.5),
    "the same, divided by a constant": (Choice(_KL, weight=0.1, normalizer="constant"), 0.5),
    **{
        f"KL 2, reward 2.5, from {start}": (Choice(2.0 - log(1 - _Q_ERROR), weight=2.5), start)
        for start in (0.02, 0.5, 0.8)
    },
    "divided by tokens, errors of 4": (
        Choice(2.0 - log(1 - _Q_ERROR), weight=2.5, normalizer="token", length=4.0),
        0.3,
    ),
    "divided by a constant, from 0.8": (Choice(2.0 - log(1 - _Q_ERROR), weight=2.5, normalizer="constant"), 0.8),
}  # fmt: skip


def mask_law() -> Claim:
    """An uncentred advantage behind a mask rewards errors; a reward stops that from starts with few of them.

    Dies when a normaliser counts other episodes, when masked episodes stay in the distillation term or leave the reward, when the
    KL baseline has another sign, and when a reward is not centred by the others of its group.
    """
    found = {name: trained_end(choice, start) for name, (choice, start) in _CASES.items()}
    laws = {name: choice.end(start) for name, (choice, start) in _CASES.items()}
    gap = max(abs(found[name] - law) for name, law in laws.items())
    mean_gap = max(
        abs(enumerated(choice, error, 3) - replace(choice, batch=3).flow(error))
        for choice, _ in _CASES.values()
        if choice.normalizer != "token"
        for error in (0.1, 0.6)
    )
    shown = "; ".join(f"{name}: {found[name]:.3f}" for name in _CASES)
    return Claim(
        "12", "masking errors with an uncentred sampled advantage rewards them", "docs/concepts/safeguards.md, the trap",
        "P(error) where training's functions come to rest: 0.241 behind a mask (the teacher's: 0.02), 0.026 with the KL baseline; "
        "0.176 beside a reward of 0.1 (0.161 with a constant normaliser); KL 2 beside a reward of 2.5 ends at 0 from 0.02 and "
        "at 0.756 from 0.5 and 0.8 (at 0 with a constant); each by the law of `opd.objectives.mask_law`",
        f"{shown}; laws met to {gap:.0e}, means over all batches of 3 to {mean_gap:.0e}",
        gap < 1e-3 and mean_gap < 1e-9 and _as_written(found),
        {"trained": found, "laws": laws, "gap": gap, "mean_gap": mean_gap},
    )  # fmt: skip


def _as_written(found: dict[str, float]) -> bool:
    expected: Sequence[float] = (0.241, 0.026, 0.026, 0.026, 0.176, 0.161, 0.0, 0.756, 0.756, 0.853, 0.0)
    return all(abs(found[name] - end) < 1.5e-3 for name, end in zip(_CASES, expected, strict=True))


def tilt_law() -> Claim:
    """Distillation and a reward together: the optimum is q exp(alpha R), here with the example of the mask law.

    Dies when the reward's share of a batch is another one, its baseline is wrong or the immediate advantage is.
    """
    law = 1 / (1 + (1 - _Q_ERROR) / _Q_ERROR * exp(3.0 - _K_OK))
    found = {
        name: _rest(choice, 0.5 * law, 2.0 * law)
        for name, choice in {
            "not masked": Choice(_KL, weight=3.0, masked=False),
            "masked, exact": Choice(_KL, weight=3.0, distillation="exact"),
        }.items()
    }
    return Claim(
        "13", "tilt law: the optimum of distillation and reward is q exp(alpha R)", "docs/concepts/objectives.md, masks",
        f"2 % becomes {100 * law:.3f} % at alpha = 3 with K = {_K_OK} nats that remain among the good actions",
        "; ".join(f"{name}: {100 * rate:.3f} %" for name, rate in found.items()),
        all(abs(rate - law) < 5e-6 for rate in found.values()), {"law": law, **found},
    )  # fmt: skip


def _rest(choice: Choice, low: float, high: float) -> float:
    """The P(error) between two at which the mean step over all batches of 3 vanishes; nan where it has one sign at both."""
    if enumerated(choice, low, 3) <= 0 or enumerated(choice, high, 3) >= 0:
        return float("nan")
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if enumerated(choice, middle, 3) > 0 else (low, middle)
    return low
