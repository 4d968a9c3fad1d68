"""A run under watch: the detectors of reward hacking see every step, and their alarms are shown, kept and obeyed."""

import json
from collections.abc import Callable, Mapping

from opd.config import DetectorsConfig
from opd.detectors.monitor import Alarm, Monitor
from opd.logging.run_folder import RunFolder, read_metrics

_ALARMS = "alarms.jsonl"


class Watcher:
    """The detectors of one run. A resumed run shows them its metrics again, and they go on as if it had never stopped."""

    def __init__(self, config: DetectorsConfig, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._watch = Monitor(config)
        self._folder = folder
        self._say = say
        self._alarms: list[Alarm] = []
        for line in read_metrics(folder.path):
            self._alarms += self._watch.observe(line["step"], line)
        self._write()

    def observe(self, step: int, values: Mapping[str, float]) -> tuple[dict[str, float], bool]:
        """The step's metrics with what the detectors measured, and whether one of them asks the run to stop."""
        new = self._watch.observe(step, values)
        for alarm in new:
            if alarm.action != "log":
                self._say(f"{'stopping' if alarm.action == 'stop' else 'warning'}: step {step}: {alarm.message}")
        if new:
            self._alarms += new
            self._write()
        return {**values, **self._watch.values}, any(alarm.action == "stop" for alarm in new)

    def report(self) -> None:
        """Say how many alarms there were, and which detectors had nothing to go by."""
        idle = ", ".join(f"{name} ({why})" for name, why in self._watch.inactive.items())
        self._say(
            f"detectors: {len(self._alarms)} alarms ({_ALARMS} in the run folder)" + (f"; idle: {idle}" if idle else "")
        )

    def _write(self) -> None:
        text = "".join(json.dumps(alarm._asdict()) + "\n" for alarm in self._alarms)
        self._folder.write_text(_ALARMS, text)
