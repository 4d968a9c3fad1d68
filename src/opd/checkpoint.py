"""Saving and resuming everything, atomically, and the whole steps of a run that ends for any reason.

A checkpoint is a folder `checkpoints/step-000040` with what the learner wrote (safetensors files), `state.json` and
`checksums.json`. It is written beside its place and renamed, so a kill at any moment leaves the one before whole.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from opd.batch import Batch
from opd.errors import CheckError, OpdError, RewardError, RunError, ScoreError, describe_error
from opd.metrics import Metrics
from opd.records import Prompt
from opd.roles import Learner

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
            path.chmod(0o644)  # safetensors writes files for their owner alone
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
            return _read(path)
        warn(f"checkpoint '{path}' is damaged ({fault}); falling back to the one before")
    if paths:
        raise RunError(
            f"all {len(paths)} checkpoints under '{folder}' are damaged; begin a new run with another output"
        )
    return None


def load_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step; raises RunError when there is none, or when it is damaged."""
    path = folder / f"step-{step:06d}"
    if not path.is_dir():
        kept = ", ".join(str(int(p.name.removeprefix("step-"))) for p in list_checkpoints(folder)) or "none"
        raise RunError(
            f"'{folder}' has no checkpoint of step {step}; it has: {kept} (checkpoint.keep says how many stay)"
        )
    if (fault := _fault(path)) is not None:
        raise RunError(f"checkpoint '{path}' is damaged ({fault}); choose another step")
    return _read(path)


def find_checkpoint(folder: Path, step: int | None, *, warn: Callable[[str], None]) -> Checkpoint:
    """The newest whole checkpoint, or that of `step`; raises RunError where there is none."""
    found = load_newest(folder, warn=warn) if step is None else load_step(folder, step)
    if found is None:
        raise RunError(f"'{folder}' holds no checkpoint yet")
    return found


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    return Checkpoint(state.pop("step"), path, state)


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


@contextmanager
def explain_io(path: Path) -> Iterator[None]:
    """Turn a failure of the disk into one line that names the file."""
    try:
        yield
    except RunError:
        raise
    except (OSError, SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(
            f"cannot write '{path}': {cause}; what was saved before is untouched; free space, or fix the permission"
        ) from None


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


class WholeSteps(Learner):
    """A learner that knows whether its weights are those behind a whole step: `whole` is False from its first update of a step
    until the run says that the step is done."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.whole = True

    def score_student(self, batch: Batch) -> Batch:
        return self._learner.score_student(batch)

    def forward_backward(self, batch: Batch) -> Metrics:
        return self._learner.forward_backward(batch)

    def optim_step(self) -> Metrics:
        before, self.whole = self.whole, False
        try:
            return self._learner.optim_step()
        except ScoreError:  # it leaves the weights as they are
            self.whole = before
            raise

    def weights(self) -> Any:
        return self._learner.weights()

    def save(self, folder: Path) -> Mapping[str, Any]:
        return self._learner.save(folder)

    def load(self, folder: Path, values: Mapping[str, Any]) -> None:
        self._learner.load(folder, values)


class Saver:
    """The whole steps of one run: `done` of them were made, `saved` of them are in a checkpoint; `cursor` is where the stream of
    prompts stood behind the last.

    `unrecorded` are the metrics of the last one until its line is in metrics.jsonl. A checkpoint that is saved before that keeps
    them, and a resumed run finishes the line.
    """

    def __init__(
        self,
        checkpoints: Path,
        learner: Learner,
        identities: Callable[[], Mapping[str, str]],
        *,
        steps: int,
        every: int,
        keep: int,
        how_to_resume: Callable[[], str],
    ) -> None:
        self.learner = WholeSteps(learner)
        self.done = self.saved = 0
        self.cursor: Mapping[str, int] = {}
        self.unrecorded: Mapping[str, float] | None = None
        self._checkpoints = checkpoints
        self._how_to_resume = how_to_resume
        self._identities = identities
        self._steps, self._every, self._keep = steps, every, keep

    def made(self, step: int, cursor: Mapping[str, int], values: Mapping[str, float]) -> None:
        """A whole step is done; its line of metrics is not written yet."""
        self.done, self.cursor, self.unrecorded = step, dict(cursor), values
        self.learner.whole = True

    @property
    def due(self) -> bool:
        """Whether the step that is done is one to save after."""
        return self.done % self._every == 0 or self.done == self._steps

    def save(self) -> Path:
        """Write a checkpoint of the steps that are done; returns its folder. Raises RunError when it cannot be written."""
        state = {
            "cursor": self.cursor,
            "policy_version": self.done,
            "identities": dict(self._identities()),
            "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        if self.unrecorded is not None:
            state["unrecorded"] = dict(self.unrecorded)
        with explain_io(self._checkpoints):
            written = save(self._checkpoints, self.done, self.learner.save, state, keep=self._keep)
        self.saved = self.done
        return written

    def restore(self, warn: Callable[[str], None], step: int | None = None) -> int | None:
        """Load the newest whole checkpoint, or that of `step`; returns its step (0: warmed up), None when there is none yet.

        Raises CheckError when something that must not change has changed since, RunError for a step without a whole checkpoint.
        """
        found = load_newest(self._checkpoints, warn=warn) if step is None else load_step(self._checkpoints, step)
        if found is None:
            return None
        require_same(found.state["identities"], self._identities())
        self.learner.load(found.path, found.state["learner"])
        self.done = self.saved = found.step
        self.cursor = dict(found.state["cursor"])
        self.unrecorded = found.state.get("unrecorded")
        rng = bytearray(base64.b64decode(found.state["torch_rng"]))
        torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8).clone())
        return found.step

    def rescue(self, say: Callable[[str], None]) -> None:
        """Save the last whole step if it is at hand and not saved yet; what prevents that is said: another error is on its way."""
        if self.done == self.saved or not self.learner.whole:
            return
        try:
            self.save()
        except Exception as error:
            text = str(error) if isinstance(error, OpdError) else describe_error(error)
            say(f"warning: step {self.done} is not saved: {text}")

    @contextmanager
    def explained(self, say: Callable[[str], None]) -> Iterator[None]:
        """Every error that ends the run says what is saved and how to go on: an OpdError in its own line, another one in a note."""
        try:
            yield
        except KeyboardInterrupt as error:
            error.add_note(f"{self.stopped}; {self._continue}")
            raise
        except OpdError as error:
            error.args = (f"{self._where(error)}{error}; {self._kept}: fix it, then {self._continue}",)
            raise
        except Exception as error:
            error.add_note(f"{self._kept}; {self._continue}")
            raise
        except SystemExit:  # Python shows no note of it
            say(f"{self.stopped}; {self._continue}")
            raise

    def _where(self, error: OpdError) -> str:
        """When a reward failed that belongs to an evaluation; one of a step names its step."""
        if not isinstance(error, RewardError) or str(error).startswith("step "):
            return ""
        return f"after step {self.done}: " if self.done else "before the first step: "

    @property
    def stopped(self) -> str:
        return f"stopped after step {self.saved} of {self._steps}"

    @property
    def _kept(self) -> str:
        if not self.saved:
            return "no step is saved"
        return f"all {self.saved} steps are saved" if self.saved == self._steps else f"step {self.saved} is saved"

    @property
    def _continue(self) -> str:
        return f"continue with: {self._how_to_resume()}"


def require_same(began: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise CheckError for the first thing by name that is not what a run began with."""
    for what, identity in now.items():
        before = began.get(what, identity)  # an older checkpoint may not name it
        if before != identity:
            be = "are" if what.startswith("the training prompts") else "is"
            raise CheckError(
                f"{what} {be} not what this run began with (identity {before}, now {identity}); give it what it began with, or "
                "start a new run"
            )


def identities_of(prompts: Mapping[str, Mapping[str, Sequence[Prompt]]]) -> dict[str, str]:
    """What tells the training prompts of each task from others."""
    named: dict[str, str] = {}
    for task, splits in prompts.items():
        content = repr([(p.id, [dict(m) for m in p.messages], p.teacher, p.answer, p.tools) for p in splits["train"]])
        named[f"the training prompts of tasks.{task}"] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return named
