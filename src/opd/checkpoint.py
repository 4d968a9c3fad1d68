"""Saving and resuming everything, atomically.

A checkpoint is a folder `checkpoints/step-000040` with `tensors.safetensors`, `state.json` and `checksums.json`. It is
written beside its place and renamed, so a kill at any moment leaves the one before whole.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import RunError

_FILES = ("tensors.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """What a run continues from: `step` steps are done; `tensors` and `state` are as they were saved."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int) -> Path:
    """Write checkpoint `step` under `folder`, then remove all but the newest `keep`.

    Raises OSError (a full disk, say) with nothing of the earlier checkpoints touched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    staging = folder / f".{target.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        _write(staging / _FILES[0], lambda path: save_file(contiguous, path))
        text = json.dumps({"step": step, **state}, indent=1)
        _write(staging / _FILES[1], lambda path: path.write_text(text, encoding="utf-8"))
        sums = json.dumps({name: _sha256(staging / name) for name in _FILES}, indent=1)
        _write(staging / "checksums.json", lambda path: path.write_text(sums, encoding="utf-8"))
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
            state = json.loads((path / _FILES[1]).read_text(encoding="utf-8"))
            return Checkpoint(state.pop("step"), load_file(path / _FILES[0]), state)
        warn(f"checkpoint '{path}' is damaged ({fault}); falling back to the one before")
    if paths:
        raise RunError(f"all {len(paths)} checkpoints under '{folder}' are damaged; start the run anew")
    return None


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside `path`, then put it in place, so that a reader or a kill never sees half of it."""
    staging = path.with_name(f".{path.name}.partial")
    try:
        _write(staging, write)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except SafetensorError as error:  # its I/O errors hide the errno
        raise OSError(f"cannot write '{path}': {error}") from None
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        for name in _FILES:
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != sums.get(name):
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "checksums.json is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "checksums.json is unreadable"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
