"""Optional writers of metrics beside metrics.jsonl.

To add one, write its class, name it in `opd.config.tree.WriterName` and make it in `_make`.
"""

import importlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, assert_never

from opd.config import Config
from opd.config.tree import WriterName
from opd.errors import ConfigError, RunError, describe_error
from opd.logging.run_folder import RunFolder, explain_io, read_metrics


class Writer(Protocol):
    """Writes the plain metrics of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Writers:
    """The writers of `logging.writers`. Steps after `start` that an interrupted run has written are written again.

    Raises RunError with one line when a writer fails.
    """

    def __init__(self, config: Config, folder: Path, *, start: int) -> None:
        self._names = config.logging.writers
        self._writers: dict[str, Writer] = {}
        for name in self._names:
            with self._explained(name):
                self._writers[name] = _make(name, config, folder, start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Give the plain metrics of a step to every writer."""
        for name, writer in self._writers.items():
            with self._explained(name):
                writer.write(step, values)

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close every writer. After an error in the context, a writer's own failure is not raised."""
        with ExitStack() as every:
            if error is not None:
                every.enter_context(suppress(RunError))
            for name, writer in self._writers.items():
                every.callback(self._close, name, writer)

    def _close(self, name: str, writer: Writer) -> None:
        with self._explained(name):
            writer.close()

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            rest = json.dumps([other for other in self._names if other != name])
            raise RunError(
                f"logging.writers: '{name}' fails: {describe_error(error)}; to continue without it, add "
                f"'logging.writers={rest}' to the command that resumes the run"
            ) from error


def require_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a writer whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"logging.writers names '{name}', which is not installed: pip install 'opd[{name}]'")


def _make(name: WriterName, config: Config, folder: Path, start: int) -> Writer:
    match name:
        case "tensorboard":
            return TensorboardWriter(folder / "tensorboard", start)
        case "trackio":
            return TrackioWriter(config, folder)
        case _:
            assert_never(name)


class TensorboardWriter:
    """Scalars for TensorBoard, under the run folder."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class TrackioWriter:
    """A trackio run named after the run folder, in project "opd"."""

    def __init__(self, config: Config, folder: Path) -> None:
        trackio = importlib.import_module("trackio")

        self._trackio: Any = trackio
        trackio.init(project="opd", name=folder.name, config=config.model_dump(mode="json"), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        self._trackio.finish()


def draw_run(folder: RunFolder) -> None:
    """Draw curves.png of a run folder; raises RunError with one line on failure."""
    path = folder.path / "curves.png"
    with explain_io(path):
        try:
            draw_curves(read_metrics(folder.path), path, title=str(folder.path))
        except OSError:
            raise
        except Exception as error:  # of a font or a backend
            raise RunError(
                f"cannot draw '{path}': {describe_error(error)}; metrics.jsonl holds the numbers; check matplotlib"
            ) from error


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw reverse KL, likelihood, reward, gradient norm and seconds a step as one PNG; without such metrics, no file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for line in metrics for name in line})
    curves = {
        "reverse KL, nats per token": [n for n in names if n.startswith("kl/token/")],
        "negative log-likelihood, nats per token": [n for n in names if n == "student/nll/mean"],
        "reward (mean reward of the samples)": [n for n in names if n.startswith("reward/")],
        "gradient norm before clipping": [n for n in names if n == "optim/grad_norm/mean"],
    }
    shown = {title: chosen for title, chosen in curves.items() if chosen}
    phases = [n for n in (f"time/{p}_s/sum" for p in ("sample", "score", "update", "wait")) if n in names]
    panels = len(shown) + bool(phases)
    if not panels:
        return
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.5 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, chosen) in zip(axes, shown.items(), strict=False):
        _lines(axis, metrics, chosen, name, log="KL" in name or "norm" in name or "likelihood" in name)
    if phases:
        axis = axes[len(shown)]
        steps = [line["step"] for line in metrics]
        seconds = [[line.get(p, 0.0) for line in metrics] for p in phases]
        axis.stackplot(steps, seconds, labels=[p.split("/")[1].removesuffix("_s") for p in phases], alpha=0.8)
        axis.set_title("seconds per step")
        axis.legend(fontsize=8)
    for axis in axes[:panels]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")


def _lines(
    axis: Any, metrics: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, *, log: bool = False
) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        label = "/".join(part for part in name.split("/")[1:-1] if part != "token") or "all"
        axis.plot([s for s, _ in points], [v for _, v in points], label=label, linewidth=1.2)
    axis.set_title(title)
    if log and any(line.get(n, 0) > 0 for line in metrics for n in names):
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=8)
