"""The base class of the detectors, and their statistics: moving averages with standard errors and extremes, cumulative sums;
and the detector of a fraction that must stay low."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from opd.config.detectors import DetectorConfig, ThresholdConfig

Values: TypeAlias = Mapping[str, float]
"""The plain metrics of a step, by name."""

# Standard errors by which a mean must leave the most extreme mean of its run. By chance alone a moving average comes three or four
# of them off to either side: of 40 stationary streams of 2,000 steps, bounds of 3, 5 and 6 found a change in 40, 7 and 0.
_STANDARD_ERRORS = 6.0


class Measurement(NamedTuple):
    """The value of a detector at a step, and the message of an alarm where the value is a cause for one."""

    value: float
    message: str | None


Measurements: TypeAlias = dict[str, Measurement]
"""By aspect; "" for a detector that has one."""


@dataclass(frozen=True)
class Smoothed:
    """A moving average m += a (x - m), a = max(1 / count, 2 / (memory + 1)), and its standard error.

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
    """A moving average at its most extreme, the step of that, and the means of other metrics at the same step."""

    stream: Smoothed
    step: int
    beside: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return self.stream.mean


def above(now: Smoothed, then: Smoothed, by: float) -> bool:
    """Whether one mean exceeds the other by `by` and by six standard errors of their difference, at the larger noise of the two:
    a young stream may not have seen its own."""
    noise = max(now.noise, then.noise, 0.0)
    return now.mean - then.mean > max(by, _STANDARD_ERRORS * math.sqrt(noise * (now.spread + then.spread)))


class Tracked:
    """A moving average and its most extreme mean so far: the largest, or with `lowest` the smallest.

    `extreme` is None until the average has filled its memory.
    """

    def __init__(self, memory: int, *, lowest: bool = False) -> None:
        self.now = Smoothed(memory)
        self.extreme: Mark | None = None
        self._sign = -1.0 if lowest else 1.0

    def add(self, value: float, step: int, *beside: float) -> Mark | None:
        """Average one more value; returns the most extreme mean. beside: means of other metrics, for its mark."""
        self.now = self.now.add(value)
        if self.now.ready and (self.extreme is None or self._sign * (self.now.mean - self.extreme.mean) > 0.0):
            self.extreme = Mark(self.now, step, beside)
        return self.extreme


def cusum(before: float, excess: float, slack: float) -> float:
    """S_t = max(0, S_{t-1} + z_t - slack), which is the largest sum_{i = j + 1 .. t} (z_i - slack) over j <= t.

    z_t: how far a value lies above its reference, in standard errors. Source: Page 1954, the one-sided cumulative sum.
    """
    return max(0.0, before + excess - slack)


def began(since: int | None, step: int, lasting: bool) -> int | None:
    """The step at which a condition that holds now began; None when it does not hold."""
    return (step if since is None else since) if lasting else None


def finite(values: Values, *names: str) -> tuple[float, ...] | None:
    """The named metrics; None unless all are there and are finite numbers."""
    found = tuple(values.get(name, math.nan) for name in names)
    return found if all(math.isfinite(value) for value in found) else None


Settings = TypeVar("Settings", bound=DetectorConfig)


class Detector(Generic[Settings]):
    """A detector as the steps so far have left it. reads: the metrics that it needs, TEACHER for any teacher; where: the runs that
    have these metrics, for a message."""

    reads: tuple[str, ...]
    where: str = ""

    def __init__(self, config: Settings) -> None:
        self.config = config

    def observe(self, step: int, values: Values) -> Measurements:
        """Take the metrics of the next step; returns the detector's values, nothing where a metric is missing."""
        found = finite(values, *self.reads)
        return {} if found is None else self.measure(step, *found)

    def measure(self, step: int, *found: float) -> Measurements:
        """The same from the values of `reads`, which are finite."""
        raise NotImplementedError  # of a detector with an `observe` of its own, which does not ask for it


class Threshold(Detector[ThresholdConfig]):
    """A fraction that has risen above its threshold, or has stayed there for long. Value: its moving average."""

    def __init__(self, config: ThresholdConfig, *reads: str, symptom: str, advice: str) -> None:
        """reads: the metric, and a metric that is subtracted from it, if any; symptom, advice: for the message."""
        super().__init__(config)
        self.reads = reads
        self._symptom, self._advice = symptom, advice
        self._fraction = Tracked(config.memory, lowest=True)
        self._since: int | None = None
        self._steps = 0

    def measure(self, step: int, *found: float) -> Measurements:
        threshold, low = self.config.threshold, self._fraction.add(found[0] - sum(found[1:]), step)
        now = self._fraction.now
        over = low is not None and now.mean > threshold
        self._since, self._steps = began(self._since, step, over), self._steps + 1 if over else 0
        message = None
        if low is not None and over:
            risen = above(now, low.stream, threshold / 2.0)
            if risen or self._steps >= self.config.patience:
                before = f" ({low.mean:.1%} at step {low.step})" if risen else ""
                level = f"{now.mean:.1%} (threshold {threshold:.0%}) since step {self._since}{before}"
                message = f"{self._symptom}: {level}; {self._advice}"
        return {"": Measurement(now.mean, message)}
