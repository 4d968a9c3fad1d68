"""The output of a run: a progress bar in a terminal, otherwise plain lines."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from opd.batch import pack, trainable
from opd.records import ScoredRollout

# C0 and C1 controls, bidirectional overrides: model output must not steer the terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SHORT = {"mask/rollouts/sum": "masked", "episode/failed/sum": "episodes failed"}


def printable(text: str, limit: int = 160) -> str:
    """Model output made safe for a terminal: controls shown as escapes, long text cut, markup taken literally."""
    shown = _CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode(), text)
    return escape(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def summary(values: Mapping[str, float]) -> str:
    """The step in one line: reverse KL, mean reward, speed, seconds by phase, and counts of rollouts left out."""
    parts = [f"kl/token {values['kl/token/mean']:.4f}"] if "kl/token/mean" in values else []
    if "student/nll/mean" in values and not parts:
        parts.append(f"nll/token {values['student/nll/mean']:.4f}")
    if "reward/mean" in values:
        parts.append(f"reward {values['reward/mean']:.3f}")
    if values.get("format/errors/mean"):
        parts.append(f"format errors {100 * values['format/errors/mean']:.0f} %")
    if "time/tokens_per_s/mean" in values:
        parts.append(f"{values['time/tokens_per_s/mean']:.0f} tok/s")
    phases = [
        f"{p} {values[f'time/{p}_s/sum']:.1f}"
        for p in ("sample", "score", "update", "wait")
        if f"time/{p}_s/sum" in values
    ]
    if phases:
        parts.append(" + ".join(phases) + " s")
    counted = ("batch/dropped/sum", "batch/floored/sum", "mask/rollouts/sum", "episode/failed/sum")
    parts += [f"{_SHORT.get(name, name.split('/')[1])} {values[name]:.0f}" for name in counted if values.get(name)]
    return "  ".join(parts)


def _shows_bars(console: Console) -> bool:
    """Whether rich can draw a progress bar: in a terminal, and in a notebook that has ipywidgets."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class ProgressLine:
    """Prints the progress of a run, and sampled responses."""

    def __init__(self, total: int, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = total
        self._progress: Progress | None = None
        if _shows_bars(self._console):
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn())
            self._progress = Progress(
                *columns,
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "ProgressLine":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line of opd's own text, above the progress bar."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._progress:
            self._progress.update(self._task, completed=step, description=summary(values))
        else:
            self.say(f"step {step}/{self._total}  {summary(values)}")

    def samples(self, scored: Sequence[ScoredRollout], count: int = 4, *, logprob_floor: float) -> None:
        """A table of a few responses, first of each task, with the mean log ratio that training follows (`Batch.log_ratio`)."""
        table = Table("prompt", "response", "answer", "reward", "log ratio/token", title="sampled responses")
        chosen = sorted(enumerate(scored), key=lambda item: (_rank(scored, item[0]), item[0]))[:count]
        for _, item in chosen:
            rollout = item.rollout
            ratio = "-"
            if trainable([item]) and item.mask.any():
                batch, _ = pack([item], logprob_floor=logprob_floor)
                ratio = f"{float(batch.log_ratio[batch.scored].mean()):+.3f}"
            reward = "-" if rollout.reward is None else f"{rollout.reward:.2f}"
            texts = (rollout.prompt.messages[-1]["content"], rollout.response, rollout.prompt.answer or "-")
            table.add_row(*(printable(t, 60) for t in texts), reward, ratio)
        self._console.print(table)


def _rank(scored: Sequence[ScoredRollout], index: int) -> int:
    """The number of earlier rollouts of the same task."""
    task = scored[index].rollout.prompt.task
    return sum(s.rollout.prompt.task == task for s in scored[:index])
