"""The detectors of a run: they see the metrics of every step, and their alarms are printed, written and obeyed."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opd.config.detectors import Action, DetectorsConfig
from opd.detectors.detectors import make_detectors
from opd.detectors.statistics import Detector, Values
from opd.logging.run_folder import RunFolder, read_metrics
from opd.step_metrics import matches

_ALARMS = "alarms.jsonl"


class Alarm(NamedTuple):
    """One line for the user: the value, the bound, the step since when, and what to do."""

    step: int
    detector: str
    action: Action
    message: str


@dataclass
class _Watched:
    """A detector of a run, and whether it has measured anything yet. quiet: for each aspect that has raised an alarm, the number
    of measurements without a cause since."""

    name: str
    detector: Detector[Any]
    active: bool = False
    quiet: dict[str, int] = field(default_factory=dict)


class Monitor:
    """The detectors of a run. Their state depends only on the metrics that they observed, in order."""

    def __init__(self, config: DetectorsConfig) -> None:
        self._rearm = config.rearm_steps
        made = ((name, detector) for name, detectors in make_detectors(config).items() for detector in detectors)
        self._watched = [_Watched(name, detector) for name, detector in made if detector.config.action != "off"]
        self._seen: set[str] = set()
        self.values: dict[str, float] = {}
        """The detectors' values at the last step, as metrics `detectors/DETECTOR[/ASPECT]/value`."""

    @property
    def inactive(self) -> dict[str, str]:
        """The detectors that have measured nothing so far: the metrics that each lacks, or that it needs more steps."""
        active = {watched.name for watched in self._watched if watched.active}
        return {w.name: self._lacks(w.detector) for w in self._watched if w.name not in active}

    def _lacks(self, detector: Detector[Any]) -> str:
        if all(any(matches(pattern, name) for name in self._seen) for pattern in detector.reads):
            return "more steps"
        return f"needs {', '.join(detector.reads)}" + (f" ({detector.where})" if detector.where else "")

    def observe(self, step: int, values: Values) -> list[Alarm]:
        """Advance every detector by the plain metrics of a step; returns the new alarms.

        A cause that lasts raises one alarm, and the next one only after it has been gone for `rearm_steps`.
        """
        alarms = []
        self.values = {}
        self._seen |= values.keys()
        for watched in self._watched:
            measurements = watched.detector.observe(step, values)
            watched.active |= bool(measurements)
            for aspect, (value, message) in measurements.items():
                if math.isfinite(value):
                    self.values["/".join(filter(None, ("detectors", watched.name, aspect, "value")))] = value
                if message is None:
                    if aspect in watched.quiet:
                        watched.quiet[aspect] += 1
                    continue
                if watched.quiet.get(aspect, self._rearm) >= self._rearm:
                    alarms.append(Alarm(step, watched.name, watched.detector.config.action, message))
                watched.quiet[aspect] = 0
        return alarms


class RunMonitor:
    """The monitor of a run folder, which keeps the alarms in alarms.jsonl.

    A resumed run replays its metrics.jsonl to the detectors, so that they continue as if it had never stopped.
    """

    def __init__(self, config: DetectorsConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._monitor = Monitor(config)
        self._folder = folder
        self._say = say
        self._alarms: list[Alarm] = []
        for line in read_metrics(folder.path):
            self._alarms += self._monitor.observe(line["step"], line)
        self._write()

    def observe(self, step: int, values: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        """Returns the step's metrics with the detectors' values, and whether a detector stops the run."""
        new = self._monitor.observe(step, values)
        for alarm in new:
            if alarm.action != "log":
                self._say(f"{'stopping' if alarm.action == 'stop' else 'warning'}: step {step}: {alarm.message}")
        if new:
            self._alarms += new
            self._write()
        return {**values, **self._monitor.values}, any(alarm.action == "stop" for alarm in new)

    def report(self) -> None:
        """Print the number of alarms, and how many detectors had no data to judge by."""
        inactive = self._monitor.inactive
        silent = f"; {len(inactive)} had too few steps or metrics: {', '.join(inactive)}" if inactive else ""
        self._say(f"detectors: {len(self._alarms)} alarms ({_ALARMS} in the run folder){silent}")

    def _write(self) -> None:
        text = "".join(json.dumps(alarm._asdict()) + "\n" for alarm in self._alarms)
        self._folder.write_text(_ALARMS, text)
