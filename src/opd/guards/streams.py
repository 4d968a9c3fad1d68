"""What the detectors are made of: smoothed streams that know how sure they are, and the form of a detector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

Values: TypeAlias = Mapping[str, float]
# Standard errors by which a mean must exceed the most extreme one of its run. A moving average wanders three or four of them from
# its mean within a run either way: of 40 stationary streams of 2,000 steps, bounds of 3, 5 and 6 found a change in 40, 10 and 0.
_SURE = 6.0


class Reading(NamedTuple):
    """What a detector measured at a step, and its message where that is a cause for alarm."""

    value: float
    message: str | None


Readings: TypeAlias = Mapping[str, Reading]
"""By aspect; "" for a detector that has one."""


class Detector(Protocol):
    """A state that steps advance. `needs` says in words which metrics it lives on."""

    @property
    def needs(self) -> str: ...

    def observe(self, step: int, values: Values) -> tuple["Detector", Readings]:
        """The next state, and what was measured; nothing where a metric is missing."""
        ...


@dataclass(frozen=True)
class Smoothed:
    """A moving average m += a (x - m), a = max(1 / count, 2 / (memory + 1)), and how sure it is.

    noise: the variance of a step about the trend, from successive differences, E (x_t - x_{t-1})^2 / 2 (von Neumann 1941), to
    which a slow trend adds little; over ten memories, or it would be small by chance just where a mean is extreme by chance.
    The variance of m is noise / min(count, memory).
    """

    memory: int
    count: int = 0
    mean: float = 0.0
    noise: float = 0.0
    last: float = 0.0

    def add(self, value: float) -> "Smoothed":
        count, least = self.count + 1, 2.0 / (self.memory + 1.0)
        mean = self.mean + max(1.0 / count, least) * (value - self.mean)
        change, noise = value - self.last, 0.0
        if self.count:
            noise = self.noise + max(1.0 / self.count, least / 10.0) * (change * change / 2.0 - self.noise)
        return Smoothed(self.memory, count, mean, noise, value)

    @property
    def ready(self) -> bool:
        """Whether the average has filled its memory."""
        return self.count >= self.memory

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(max(self.noise, 0.0) / max(1, min(self.count, self.memory)))


@dataclass(frozen=True)
class Mark:
    """A smoothed stream as it was at its best, at which step, and the means that stood beside it then."""

    stream: Smoothed
    step: int
    beside: tuple[float, ...] = ()


def above(now: Smoothed, then: Smoothed, by: float) -> bool:
    """Whether one mean exceeds the other by `by` and by six standard errors of their difference."""
    return now.mean - then.mean > max(by, _SURE * math.hypot(now.error, then.error))


def highest(mark: Mark | None, stream: Smoothed, step: int, *beside: float) -> Mark | None:
    """The mark of the largest mean since the average has filled its memory; None before."""
    better = stream.ready and (mark is None or stream.mean > mark.stream.mean)
    return Mark(stream, step, beside) if better else mark


def lowest(mark: Mark | None, stream: Smoothed, step: int, *beside: float) -> Mark | None:
    """The mark of the smallest mean since the average has filled its memory; None before."""
    better = stream.ready and (mark is None or stream.mean < mark.stream.mean)
    return Mark(stream, step, beside) if better else mark


def cusum(before: float, excess: float, slack: float) -> float:
    """S_t = max(0, S_{t-1} + z_t - slack), which is the largest sum_{i = j + 1 .. t} (z_i - slack) over j <= t.

    z_t: how far a figure lies above its reference, in standard errors. Source: Page 1954, the one-sided cumulative sum.
    """
    return max(0.0, before + excess - slack)


def began(since: int | None, step: int, lasting: bool) -> int | None:
    """At which step a condition that holds now began; None when it does not hold."""
    return (step if since is None else since) if lasting else None


def finite(values: Values, *names: str) -> tuple[float, ...] | None:
    """The named metrics; None unless all are there and are finite numbers."""
    found = tuple(values.get(name, math.nan) for name in names)
    return found if all(math.isfinite(value) for value in found) else None
