"""Optional writers beside metrics.jsonl."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from opd.config import Config
from opd.errors import ConfigError


class Writer(Protocol):
    """Takes the plain metrics of each step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_writers(config: Config, folder: Path, *, start: int) -> list[Writer]:
    """The writers of `logging.writers`; steps after `start` that an interrupted run wrote are written anew."""
    return [_make(name, config, folder, start) for name in config.logging.writers]


def require_installed(names: Sequence[str]) -> None:
    """Raise ConfigError for a writer whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"logging.writers names '{name}', which is not installed: pip install 'opd[{name}]'")


def _make(name: str, config: Config, folder: Path, start: int) -> Writer:
    match name:
        case "tensorboard":
            return TensorboardWriter(folder / "tensorboard", start)
        case "trackio":
            return TrackioWriter(config, folder)
        case _:
            assert_never(name)  # type: ignore[arg-type]  # names are checked by the configuration


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
