"""What users can hook into a run: code that runs after a step, a checkpoint, an evaluation and at the end."""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from opd.data.tasks import require_callable
from opd.errors import CallbackError
from opd.rewards.reward import Raised, awaited

if TYPE_CHECKING:
    from opd.evaluate import ParityRow
    from opd.loop import StepReport
    from opd.run import Result

_METRIC = re.compile(r"[\w.-]+(/[\w.-]+)*")


@final
class Stop:
    """The type of `STOP`."""

    def __repr__(self) -> str:
        return "opd.STOP"


STOP: Final = Stop()
"""What a callback returns to end the run, as an interrupt would: the step is saved, and the run can be resumed."""

Answer: TypeAlias = Mapping[str, float] | Stop | None


class Callback:
    """Override what you need. Every method may be a coroutine function.

    An exception in a callback ends the run after the last whole step has been saved.
    """

    def on_step(self, report: "StepReport") -> Any:
        """After each update, once the rollouts of the step are on disk.

        Returns metrics to add to those of the step (names such as "mine/length", finite numbers), `opd.STOP` or None.
        """

    def on_checkpoint(self, step: int, folder: Path) -> Any:
        """After the checkpoint of a step has been written to `folder`. May return `opd.STOP`."""

    def on_evaluate(self, step: int, metrics: Mapping[str, float], parity: Sequence["ParityRow"]) -> Any:
        """After an evaluation: `metrics` of the held-out prompts during training, or the rows of the parity table at the end."""

    def on_end(self, result: "Result") -> Any:
        """After the last step, or after the step at which the run was stopped."""


class _EveryStep(Callback):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def on_step(self, report: "StepReport") -> Any:
        return self._function(report)


class Callbacks:
    """The callbacks of one run, called in their order. `stop`: whether one of them has returned `STOP`."""

    def __init__(self, callbacks: Sequence[Callback | Callable[["StepReport"], Any]] = ()) -> None:
        self._callbacks: list[Callback] = []
        for given in callbacks:
            if not isinstance(given, Callback):
                _require_function(given)
            self._callbacks.append(given if isinstance(given, Callback) else _EveryStep(given))
        self.stop = False

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def on_step(self, report: "StepReport") -> dict[str, float]:
        """The metrics that the callbacks add. Raises CallbackError for an answer that is neither metrics, STOP nor None."""
        added: dict[str, float] = {}
        for answer in self._call("on_step", report):
            for name, value in answer.items() if isinstance(answer, Mapping) else ():
                added[name] = _metric(name, value, known=report.values.keys() | added.keys())
        return added

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self._call("on_checkpoint", step, folder)

    def on_evaluate(self, step: int, metrics: Mapping[str, float], parity: Sequence["ParityRow"] = ()) -> None:
        if metrics or parity:
            self._call("on_evaluate", step, metrics, parity)

    def on_end(self, result: "Result") -> None:
        self._call("on_end", result)

    def _call(self, event: str, *args: Any) -> list[Answer]:
        answers = []
        for callback in self._callbacks:
            answer = getattr(callback, event)(*args)
            if inspect.isawaitable(answer):
                (answer,) = awaited([answer])
            if isinstance(answer, Raised):
                raise answer.error
            if answer is STOP:
                self.stop = True
            elif answer is not None and not (event == "on_step" and isinstance(answer, Mapping)):
                expected = "a mapping of metrics, opd.STOP or None" if event == "on_step" else "opd.STOP or None"
                raise CallbackError(f"a callback's {event} returned {type(answer).__name__}, expected {expected}")
            answers.append(answer)
        return answers


def _metric(name: Any, value: Any, *, known: Sequence[str] | set[str]) -> float:
    if not isinstance(name, str) or not _METRIC.fullmatch(name):
        raise CallbackError(f"a callback's metric is named {name!r}, expected a name such as 'mine/length'")
    if name in known or name == "step":
        raise CallbackError(f"a callback's metric is named '{name}', which the step already has; choose another name")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise CallbackError(f"a callback's metric '{name}' is {value!r:.60}, expected a finite number")
    return number


def _require_function(given: Any) -> None:
    if inspect.isclass(given) and issubclass(given, Callback):
        raise CallbackError(f"callbacks holds the class {given.__name__}, expected an object: write {given.__name__}()")
    require_callable("a callback", given, "report")
