"""Metric values that merge, so that a mean over parts is the mean over the whole (no mean of means).

Names are `area/name/stat`. A `Metrics` is a plain dict of them; `merge` joins those of micro-batches or ranks.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Mean:
    """A weighted mean: total / weight (nan when nothing was counted)."""

    total: float
    weight: float = 1.0

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class Sum:
    """A count or a sum."""

    value: float

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)


@dataclass(frozen=True)
class Max:
    """The largest value seen."""

    value: float

    def __add__(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))


Metric: TypeAlias = Mean | Sum | Max
Metrics: TypeAlias = dict[str, Metric]


def mean_of(values: Iterable[float]) -> Mean:
    """The plain mean of some numbers as a mergeable value."""
    items = [float(v) for v in values]
    return Mean(math.fsum(items), len(items))


def merge(parts: Iterable[Metrics]) -> Metrics:
    """One Metrics from several; values under one name must be of one kind."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            before = merged.get(name)
            assert before is None or type(before) is type(value), f"{name}: {before} and {value} do not merge"
            merged[name] = value if before is None else before + value  # type: ignore[operator]  # the assert holds
    return merged


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The plain numbers, sorted by name, without means of nothing."""
    plain = {name: float(metric.value) for name, metric in sorted(metrics.items())}
    return {name: value for name, value in plain.items() if not math.isnan(value)}


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): ((p + z^2/2n) -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).

    Returns (0, 1) when nothing was tried.
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_interval(mean: float, deviation: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a mean of `count` numbers in [0, 1] with this standard deviation: m -+ z s / sqrt(n), of the numbers and
    two more 0s and two more 1s, so that equal numbers do not look certain.

    Of numbers that are all 0 or 1 it is the interval of Agresti and Coull (1998, their "plus four") of a share. Returns (0, 1) when
    there are none.
    """
    if count == 0:
        return 0.0, 1.0
    n = count + 4
    centre = (count * mean + 2) / n
    square = (count * (deviation * deviation + mean * mean) + 2) / n
    spread = z * math.sqrt(max(0.0, square - centre * centre) / n)
    return max(0.0, centre - spread), min(1.0, centre + spread)
