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
