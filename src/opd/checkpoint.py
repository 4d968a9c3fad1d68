"""Saving and resuming everything, atomically.

A checkpoint is a folder `checkpoints/step-000040` with what the learner wrote (safetensors files), `state.json` and
`checksums.json`. It is written beside its place and renamed, so a kill at any moment leaves the one before whole.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd.errors import RunError

_STATE, _SUMS = "state.json", "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from: `step` steps are done; `path` holds the learner's files, `state` is as it was saved."""

    step: int
    path: Path
    state: Mapping[str, Any]


def save(
    folder: Path, step: int, write: Callable[[Path], Mapping[str, Any]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write checkpoint `step` under `folder`, then remove all but the newest `keep`.

    write: puts the learner's files into a folder that it is given, and returns plain values, which `state["learner"]` keeps.
    Raises OSError (a full disk, say) with nothing of the earlier checkpoints touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    staging = folder / f".{target.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        values = _plainly(write, staging)
        text = json.dumps({"step": step, **state, "learner": dict(values)}, indent=1)
        (staging / _STATE).write_text(text, encoding="utf-8")
        sums = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        (staging / _SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    done = list_checkpoints(folder)
    # Later ones were found damaged when the run was resumed from before them.
    past = [path for path in done if path.name <= target.name]
    for old in (*past[:-keep], *(path for path in done if path.name > target.name)):
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load_newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none at all.

    A damaged one is passed over, with a line to `warn` that says what is wrong with it. Raises RunError when every
    checkpoint is damaged.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        fault = _fault(path)
        if fault is None:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            return Checkpoint(state.pop("step"), path, state)
        warn(f"checkpoint '{path}' is damaged ({fault}); falling back to the one before")
    if paths:
        raise RunError(
            f"all {len(paths)} checkpoints under '{folder}' are damaged; begin a new run with another output"
        )
    return None


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path`, then put it in place, so that a reader or a kill never sees half of it."""
    staging = path.with_name(f".{path.name}.partial")
    try:
        _plainly(write, staging)
        _sync(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as one safetensors file, from wherever they lie."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _plainly(write: Callable[[Path], Any], path: Path) -> Any:
    try:
        return write(path)
    except SafetensorError as error:  # its I/O errors hide the errno
        raise OSError(f"cannot write '{path}': {error}") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / _SUMS).read_text(encoding="utf-8"))
        for name in dict.fromkeys([*sums, _STATE]):
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != sums.get(name):
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{_SUMS} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        return f"{_SUMS} is unreadable"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
