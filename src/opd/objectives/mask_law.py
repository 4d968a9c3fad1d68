"""The course of P(error) when errors are masked and a reward is added to the distillation term.

A student of one choice: an error with probability p, else a response without one, which a mask keeps; x = 1 - p. In large batches
training moves the logit of p by

    p x / s * D - c * pull(p) / o

for the plain sampled advantage. D = kl + log x is what a kept response pays, the mean of -A over kept responses; c is
reward.coef * (reward of a kept response - reward.format_error) / objective.coef ("grpo": without the difference). s and o are
the normalisers of the two parts for each episode: the kept episodes and all of them ("trajectory"), their tokens ("token"), or
one number for both ("constant").
With a leave-one-out baseline pull(p) = p x, so that errors fade where

    trajectory: c x > D        token: c x / (x + length * p) > D        constant: c > D

Source: the expectation of `compute_advantages` and `opd.objectives.losses.reinforce` over batches; claim 12 enumerates it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import comb, exp, log, sqrt
from typing import Literal, TypeAlias

from opd.objectives.reduce import Normalizer

RewardBaseline: TypeAlias = Literal["leave_one_out", "group_mean", "grpo", "none"]
_GRID = 1000


def reward_pull(error: float, baseline: RewardBaseline = "leave_one_out", group_size: int = 4) -> float:
    """How fast a reward of weight 1 moves the logit of P(error) down: -E[A d log pi / d logit] in groups of `group_size`.

    p (1 - p) for "leave_one_out" and "none", (n - 1) / n of it for "group_mean"; for "grpo", which divides by the group's standard
    deviation, E[sqrt(k (n - k))] / n over the number k of errors of a group, whatever the rewards differ by.
    """
    plain = error * (1.0 - error)
    if baseline == "group_mean":
        return plain * (group_size - 1) / group_size
    if baseline != "grpo":
        return plain
    sizes = range(1, group_size)
    chances = [comb(group_size, k) * error**k * (1.0 - error) ** (group_size - k) for k in sizes]
    return sum(chance * sqrt(k * (group_size - k)) for chance, k in zip(chances, sizes, strict=True)) / group_size


@dataclass(frozen=True)
class Choice:
    """A choice between an error and a response, under one recipe.

    kl: KL(student, teacher) in nats of a student that makes no error. teacher_error: the teacher's probability of the error.
    distillation: the sampled advantage as it is, with the KL baseline, or integrated. weight: c of the module's text.
    length: tokens of an error for each token of a kept response. batch: episodes of a step; None: very many. masked: False for a
    recipe without a mask.
    """

    kl: float
    teacher_error: float = 0.02
    distillation: Literal["uncentred", "kl", "exact"] = "uncentred"
    weight: float = 0.0
    normalizer: Normalizer = "trajectory"
    baseline: RewardBaseline = "leave_one_out"
    group_size: int = 4
    length: float = 1.0
    batch: int | None = None
    masked: bool = True

    def flow(self, error: float) -> float:
        """The expected step of the logit of P(error), for one unit of learning rate."""
        kept = 1.0 - error
        paid = self.kl + log(kept)  # by a kept response
        saved = paid + log(self.teacher_error / error)  # by an error, against a kept response
        all_tokens = kept + self.length * error
        share, whole = {
            "trajectory": (kept, 1.0),
            "token": (kept, all_tokens),
            "constant": (1.0, 1.0),
        }[self.normalizer]
        if not self.masked:
            distilled = error * kept * saved / whole
        else:
            factor = {"uncentred": paid, "kl": error * saved, "exact": kept * saved}[self.distillation]
            distilled = error * kept * factor / share
            if self.batch is not None and self.normalizer != "constant":
                distilled *= 1.0 - error**self.batch  # a batch of errors alone has no kept episode
        return distilled - self.weight * reward_pull(error, self.baseline, self.group_size) / whole

    def rests(self) -> list[tuple[float, bool]]:
        """(P(error), whether it is stable) of every rest point between 0 and 1, in order; P(error) = 0 is one too."""
        return [(root, before > 0) for root, before in _sign_changes(self.flow)]

    def end(self, start: float) -> float:
        """Where P(error) goes from `start`: the next stable rest point; 0 where errors die out."""
        if self.flow(start) > 0:
            return min([root for root, stable in self.rests() if stable and root > start], default=1.0)
        below = [(root, stable) for root, stable in self.rests() if root < start]
        return below[-1][0] if below else 0.0


def largest_kl(
    weight: float,
    normalizer: Normalizer,
    *,
    baseline: RewardBaseline = "leave_one_out",
    group_size: int = 4,
    length: float = 1.0,
) -> tuple[float, float]:
    """(from every start, from a start without errors): the KL of a kept response up to which errors fade, in nats.

    The minimum, and the value at P(error) = 0, of c * pull(p) s / (p x o) - log x over p. For "leave_one_out": both are c for
    "constant"; for "trajectory" c up to c = 1, above it 1 + log c, and c.
    """

    def bound(error: float) -> float:
        choice = Choice(
            0.0, weight=weight, normalizer=normalizer, baseline=baseline, group_size=group_size, length=length
        )
        # flow = p x / s (kl + log x) - ..., so flow vanishes at kl = -flow(kl = 0) * s / (p x)
        kept = 1.0 - error
        share = 1.0 if normalizer == "constant" else kept
        return -choice.flow(error) * share / (error * kept)

    start = bound(1e-9)
    return min(start, *(bound(_at(i)) for i in range(_GRID))), start


def _at(index: int) -> float:
    """Points of (0, 1), even in the logit."""
    return 1.0 / (1.0 + exp(-(30.0 * (index + 0.5) / _GRID - 15.0)))


def _sign_changes(function: Callable[[float], float]) -> list[tuple[float, float]]:
    """(where a function on (0, 1) changes its sign, its value just before)."""
    points = [_at(i) for i in range(_GRID)]
    found = []
    for low, high in pairwise(points):
        before = function(low)
        if (before > 0) == (function(high) > 0):
            continue
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (function(middle) > 0) == (before > 0) else (low, middle)
        found.append((low, before))
    return found
