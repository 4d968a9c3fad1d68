"""All detectors of a run: what they measured at a step, and when they raise an alarm."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from opd.config.guards import Action, GuardsConfig, LevelConfig
from opd.guards.detectors import (
    Auroc,
    FlaggedAdvantage,
    FormatErrors,
    Goodhart,
    HeldOut,
    Length,
    Level,
    Overlap,
    TeacherDrift,
)
from opd.guards.streams import Detector, Smoothed, Values, finite


class Alarm(NamedTuple):
    """One line for a person: what was measured against what, since when, and what to do."""

    step: int
    detector: str
    action: Action
    message: str


@dataclass
class _Watched:
    """A detector of a run, whether it has measured anything yet, and for how many steps each of its aspects that has raised an
    alarm has been quiet since."""

    name: str
    action: Action
    state: Detector
    active: bool = False
    quiet: dict[str, int] = field(default_factory=dict)


class Watch:
    """The detectors of a run. Its state depends on what it observed and on nothing else: a resumed run observes its
    metrics.jsonl again, and goes on as one that was never stopped."""

    def __init__(self, config: GuardsConfig) -> None:
        self._rearm = config.rearm_steps
        self._watched = [_Watched(*entry) for entry in _detectors(config) if entry[1] != "off"]
        self._measured: dict[str, float] = {}

    @property
    def values(self) -> dict[str, float]:
        """What the detectors measured at the last step, as metrics `guard/DETECTOR[/ASPECT]/value`."""
        return dict(self._measured)

    @property
    def inactive(self) -> dict[str, str]:
        """The detectors that have measured nothing so far, and which metrics they lack."""
        active = {watched.name for watched in self._watched if watched.active}
        return {w.name: f"needs {w.state.needs}" for w in self._watched if w.name not in active}

    def observe(self, step: int, values: Values) -> list[Alarm]:
        """Advance every detector by the plain metrics of a step; returns the alarms that are new.

        A cause that lasts raises one alarm, and the next one only after it has been gone for `rearm_steps`.
        """
        alarms = []
        self._measured = {}
        for watched in self._watched:
            watched.state, readings = watched.state.observe(step, values)
            watched.active |= bool(readings)
            for aspect, reading in readings.items():
                if math.isfinite(reading.value):
                    self._measured["/".join(filter(None, ("guard", watched.name, aspect, "value")))] = reading.value
                if reading.message is None:
                    if aspect in watched.quiet:
                        watched.quiet[aspect] += 1
                    continue
                if watched.quiet.get(aspect, self._rearm) >= self._rearm:
                    alarms.append(Alarm(step, watched.name, watched.action, reading.message))
                watched.quiet[aspect] = 0
        return alarms


def _detectors(config: GuardsConfig) -> Iterator[tuple[str, Action, Detector]]:
    """Every detector as it is before the first step."""
    goodhart, flagged, truncation, overlap = (
        config.goodhart,
        config.flagged_advantage,
        config.truncation,
        config.overlap,
    )
    errors, held_out = config.format_errors, config.held_out
    kl = (Smoothed(goodhart.memory), Smoothed(goodhart.memory))
    yield "goodhart", goodhart.action, Goodhart(goodhart, Smoothed(goodhart.memory), kl)
    yield "reward_outcome_auroc", config.reward_outcome_auroc.action, Auroc(config.reward_outcome_auroc)
    yield "flagged_advantage", flagged.action, FlaggedAdvantage(flagged, Smoothed(flagged.memory))
    length, kl_beside = Smoothed(truncation.memory), Smoothed(truncation.memory)
    yield "truncation", truncation.action, Length(truncation, length, kl_beside)
    columns = [Smoothed(overlap.memory) for _ in range(4)]
    yield "overlap", overlap.action, Overlap(overlap, *columns)
    yield "teacher_drift", config.teacher_drift.action, TeacherDrift(config.teacher_drift)
    yield "format_errors", errors.action, FormatErrors(errors, Smoothed(errors.memory))
    yield "held_out", held_out.action, HeldOut(held_out, Smoothed(10), Smoothed(held_out.memory))
    yield from _levels(config)


def _levels(config: GuardsConfig) -> Iterator[tuple[str, Action, Detector]]:
    """The detectors of a share that must stay low."""

    def level(given: LevelConfig, name: str, what: str, advice: str, *, beside: str | None = None) -> Level:
        def measure(values: Values) -> float | None:
            found = finite(values, name, *(() if beside is None else (beside,)))
            return None if found is None else found[0] - sum(found[1:])

        return Level(given, measure, what, advice, name, Smoothed(given.memory))

    yield (
        "repetition",
        config.repetition.action,
        level(
            config.repetition,
            "guard/looping/mean",
            "responses that are loops",
            "read them; lower objective.discount, or set outcome.coef > 0 and the format check of repetition",
        ),
    )
    yield (
        "truncation",
        config.truncation.action,
        level(
            config.truncation,
            "response/truncated/mean",
            "responses cut at a limit of tokens",
            "raise sampling.max_new_tokens, or set outcome.coef > 0 and the format check of truncation",
        ),
    )
    yield (
        "low_kl_windows",
        config.low_kl_windows.action,
        level(
            config.low_kl_windows,
            "guard/low_kl/mean",
            "long responses with 256 tokens that the teacher finds five times likelier than the rest",
            "read them: the student may hide in passages that the teacher is sure of",
        ),
    )
    yield (
        "special_tokens",
        config.special_tokens.action,
        level(
            config.special_tokens,
            "guard/special_tokens/mean",
            "special tokens with a log ratio beyond 15 nats",
            "if responses are whole, the tokenizers or chat templates differ (opd align); if they end early, lower "
            "objective.discount",
        ),
    )
    yield (
        "common_tokens",
        config.common_tokens.action,
        level(
            config.common_tokens,
            "guard/common_gain/mean",
            "positive advantage on the five most common tokens, above their share of the tokens",
            "a style may be learned instead of answers; read the responses",
            beside="guard/common_actions/mean",
        ),
    )
