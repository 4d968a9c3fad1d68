"""Saving the whole steps of a run when it ends for any reason, and the line that says how to continue."""

import base64
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from opd import checkpoint
from opd.batch import Batch
from opd.errors import CheckError, OpdError, RewardError, ScoreError, describe_error
from opd.logging.run_folder import RunFolder, explain_io
from opd.metrics import Metrics
from opd.records import Prompt
from opd.roles import Learner


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
        folder: RunFolder,
        learner: Learner,
        identities: Callable[[], Mapping[str, str]],
        *,
        steps: int,
        every: int,
        keep: int,
    ) -> None:
        self.learner = WholeSteps(learner)
        self.done = self.saved = 0
        self.cursor: Mapping[str, int] = {}
        self.unrecorded: Mapping[str, float] | None = None
        self._folder = folder
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

    def save(self) -> None:
        """A checkpoint of the steps that are done. Raises RunError where it cannot be written."""
        state = {
            "cursor": self.cursor,
            "policy_version": self.done,
            "identities": dict(self._identities()),
            "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        if self.unrecorded is not None:
            state["unrecorded"] = dict(self.unrecorded)
        with explain_io(self._folder.checkpoints):
            checkpoint.save(self._folder.checkpoints, self.done, self.learner.save, state, keep=self._keep)
        self.saved = self.done

    def restore(self, warn: Callable[[str], None]) -> int | None:
        """Load the newest whole checkpoint; returns its step (0: warmed up), None when there is none yet.

        Raises CheckError where something that must not change has changed since.
        """
        found = checkpoint.load_newest(self._folder.checkpoints, warn=warn)
        if found is None:
            return None
        for what, identity in self._identities().items():
            began = found.state["identities"].get(what, identity)  # an older checkpoint may not name it
            if began != identity:
                be = "are" if what.startswith("the training prompts") else "is"
                raise CheckError(
                    f"{what} {be} not what this run began with (identity {began}, now {identity}); give it what it began with, or "
                    "start a new run"
                )
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
        return f"continue with: {self._folder.how_to_resume()}"


def identities_of(prompts: Mapping[str, Mapping[str, Sequence[Prompt]]]) -> dict[str, str]:
    """What tells the training prompts of each task from others."""
    named: dict[str, str] = {}
    for task, splits in prompts.items():
        content = repr([(p.id, [dict(m) for m in p.messages], p.teacher, p.answer, p.tools) for p in splits["train"]])
        named[f"the training prompts of tasks.{task}"] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return named


class Interrupts:
    """SIGINT and SIGTERM: `stop` is True from the first on, and the run ends behind its step.

    A second SIGINT raises KeyboardInterrupt at once, but not while the weights move: then the step ends first, because otherwise
    there would be none to save. A third one raises it always.
    """

    def __init__(self, learner: WholeSteps) -> None:
        self.stop = False
        self._learner = learner
        self._pressed = 0

    @contextmanager
    def heeded(self) -> Iterator["Interrupts"]:
        """Within the context; outside the main thread nothing is heeded."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.stop and number == signal.SIGINT
        self.stop = True
        self._pressed += again
        if again and (self._learner.whole or self._pressed > 1):
            raise KeyboardInterrupt
