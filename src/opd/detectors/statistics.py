"""What the detectors are made of: smoothed streams that know how sure they are, and the form of a detector."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias

from opd.config.detectors import DetectorConfig, ThresholdConfig

Values: TypeAlias = Mapping[str, float]
# Standard errors by which a mean must leave the most extreme one of its run. By chance alone a moving average comes three or four
# of them off to either side: of 40 stationary streams of 2,000 steps, bounds of 3, 5 and 6 found a change in 40, 7 and 0.
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
    def config(self) -> DetectorConfig: ...

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
    def spread(self) -> float:
        """The variance of the mean, for noise of variance 1."""
        return 1.0 / max(1, min(self.count, self.memory))

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(max(self.noise, 0.0) * self.spread)


@dataclass(frozen=True)
class Mark:
    """A smoothed stream as it was at its best, at which step, and the means that stood beside it then."""

    stream: Smoothed
    step: int
    beside: tuple[float, ...] = ()


def above(now: Smoothed, then: Smoothed, by: float) -> bool:
    """Whether one mean exceeds the other by `by` and by six standard errors of their difference, at the larger noise of the two:
    a young stream may not have seen its own."""
    noise = max(now.noise, then.noise, 0.0)
    return now.mean - then.mean > max(by, _SURE * math.sqrt(noise * (now.spread + then.spread)))


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


@dataclass(frozen=True)
class Threshold:
    """The detector of a share that has risen above its threshold, or has stayed there for long. Value: its moving average.

    needs: the metric; beside: one that is subtracted from it; what, advice: for the message.
    """

    config: ThresholdConfig
    stream: Smoothed
    needs: str
    what: str
    advice: str
    beside: str | None = None
    low: Mark | None = None
    since: int | None = None
    steps: int = 0

    def observe(self, step: int, values: Values) -> tuple["Threshold", Readings]:
        found = finite(values, self.needs, *filter(None, [self.beside]))
        if found is None:
            return self, {}
        stream = self.stream.add(found[0] - sum(found[1:]))
        low = lowest(self.low, stream, step)
        over = low is not None and stream.mean > self.config.threshold
        since, steps = began(self.since, step, over), self.steps + 1 if over else 0
        message = None
        if low is not None and over:
            risen = above(stream, low.stream, self.config.threshold / 2.0)
            if risen or steps >= self.config.patience:
                before = f" ({low.stream.mean:.1%} at step {low.step})" if risen else ""
                message = (
                    f"{self.what}: {stream.mean:.1%} against {self.config.threshold:.0%} since step {since}{before}; "
                    f"{self.advice}"
                )
        return replace(self, stream=stream, low=low, since=since, steps=steps), {"": Reading(stream.mean, message)}
