"""All detectors of a run: what they measured at a step, and when they raise an alarm."""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from opd.config.detectors import Action, DetectorsConfig, ThresholdConfig
from opd.detectors.detectors import (
    Auroc,
    FlaggedAdvantage,
    FormatErrors,
    Goodhart,
    HeldOut,
    Length,
    Overlap,
    TeacherDrift,
)
from opd.detectors.statistics import Detector, Smoothed, Threshold, Values


class Alarm(NamedTuple):
    """One line for a person: what was measured against what, since when, and what to do."""

    step: int
    detector: str
    action: Action
    message: str


@dataclass
class _Watched:
    """A detector of a run, whether it has measured anything yet, and for how many measurements each of its aspects that has
    raised an alarm has been quiet since."""

    name: str
    state: Detector
    active: bool = False
    quiet: dict[str, int] = field(default_factory=dict)


class Monitor:
    """The detectors of a run. Its state depends on what it observed and on nothing else: a resumed run observes its
    metrics.jsonl again, and goes on as one that was never stopped."""

    def __init__(self, config: DetectorsConfig) -> None:
        self._rearm = config.rearm_steps
        every = _detectors(config) + _levels(config)
        self._watched = [_Watched(name, state) for name, state in every if state.config.action != "off"]
        self._measured: dict[str, float] = {}
        self._seen: set[str] = set()

    @property
    def values(self) -> dict[str, float]:
        """What the detectors measured at the last step, as metrics `detectors/DETECTOR[/ASPECT]/value`."""
        return dict(self._measured)

    @property
    def inactive(self) -> dict[str, str]:
        """The detectors that have measured nothing so far, and which metrics they lack, or that they need more steps."""
        active = {watched.name for watched in self._watched if watched.active}
        return {w.name: self._lacks(w.state.needs) for w in self._watched if w.name not in active}

    def _lacks(self, needs: str) -> str:
        """needs: metrics by name, TEACHER for any."""
        for metric in re.findall(r"[\w/]+/(?:mean|sum)", needs):
            pattern = re.compile(re.escape(metric).replace("TEACHER", "[^/]+"))
            if not any(pattern.fullmatch(name) for name in self._seen):
                return f"needs {needs}"
        return "more steps"

    def observe(self, step: int, values: Values) -> list[Alarm]:
        """Advance every detector by the plain metrics of a step; returns the alarms that are new.

        A cause that lasts raises one alarm, and the next one only after it has been gone for `rearm_steps`.
        """
        alarms = []
        self._measured = {}
        self._seen |= values.keys()
        for watched in self._watched:
            watched.state, readings = watched.state.observe(step, values)
            watched.active |= bool(readings)
            for aspect, reading in readings.items():
                if math.isfinite(reading.value):
                    self._measured["/".join(filter(None, ("detectors", watched.name, aspect, "value")))] = reading.value
                if reading.message is None:
                    if aspect in watched.quiet:
                        watched.quiet[aspect] += 1
                    continue
                if watched.quiet.get(aspect, self._rearm) >= self._rearm:
                    alarms.append(Alarm(step, watched.name, watched.state.config.action, reading.message))
                watched.quiet[aspect] = 0
        return alarms


def _detectors(config: DetectorsConfig) -> tuple[tuple[str, Detector], ...]:
    """The detectors that have a form of their own, as they are before the first step."""
    reward, gap = Smoothed(config.goodhart.memory), Smoothed(config.flagged_advantage.memory)
    length, column = Smoothed(config.truncation.memory), Smoothed(config.overlap.memory)
    train, held_out = Smoothed(config.goodhart.memory), Smoothed(config.held_out.memory)
    return (
        ("goodhart", Goodhart(config.goodhart, reward, (reward, reward))),
        ("log_ratio_reward_auroc", Auroc(config.log_ratio_reward_auroc)),
        ("flagged_advantage", FlaggedAdvantage(config.flagged_advantage, gap)),
        ("truncation", Length(config.truncation, length, length)),
        ("overlap", Overlap(config.overlap, column, column, column, column)),
        ("teacher_drift", TeacherDrift(config.teacher_drift)),
        ("format_errors", FormatErrors(config.format_errors, Smoothed(config.format_errors.memory))),
        ("held_out", HeldOut(config.held_out, train, held_out)),
    )


def _levels(config: DetectorsConfig) -> tuple[tuple[str, Detector], ...]:
    """The detectors of a share that must stay low, as they are before the first step."""

    def level(given: ThresholdConfig, metric: str, what: str, advice: str, beside: str | None = None) -> Threshold:
        return Threshold(given, Smoothed(given.memory), metric, what, advice, beside)

    loops = level(
        config.repetition, "detectors/looping/mean", "responses that are loops",
        "read them; lower objective.discount, or set reward.coef > 0 and the check 'repetition'",
    )  # fmt: skip
    cut = level(
        config.truncation, "response/truncated/mean", "responses cut at a limit of tokens",
        "raise sampling.max_new_tokens, or set reward.coef > 0 and the check 'truncated'",
    )  # fmt: skip
    windows = level(
        config.low_kl_windows, "detectors/low_kl/mean",
        "long responses with 256 tokens on which the teacher is five times nearer to the student than on the rest",
        "read them: the student may hide in passages of which the teacher is sure",
    )  # fmt: skip
    special = level(
        config.special_tokens, "detectors/special_tokens/mean", "special tokens with a log ratio beyond 15 nats",
        "where responses are whole, compare the tokenizers and chat templates (opd align); where they end early, lower "
        "objective.discount",
    )  # fmt: skip
    common = level(
        config.common_tokens, "detectors/common_gain/mean",
        "positive advantage on the five most common tokens, above their share of the tokens",
        "read the responses: a style may be learned instead of answers", "detectors/common_actions/mean",
    )  # fmt: skip
    return (
        ("repetition", loops),
        ("truncation", cut),
        ("low_kl_windows", windows),
        ("special_tokens", special),
        ("common_tokens", common),
    )
