"""From a configuration to a finished run; the only file that puts the parts together."""

import base64
import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from opd import checkpoint
from opd.config import Config, config_changes, dump_config, moved_config
from opd.embedded import build as embedded
from opd.embedded.studio import EmbeddedStudio
from opd.embedded.warmup import warm_up
from opd.errors import CheckError, ConfigError, RunError, StalledError
from opd.evaluate import ParityRow
from opd.guards import preflight
from opd.guards.masks import mask_warning
from opd.guards.preflight import Finding
from opd.loop import StepReport, train_steps
from opd.measuring import Measuring
from opd.report.background import Background
from opd.report.console import ProgressLine
from opd.report.curves import draw_curves
from opd.report.run_folder import RunFolder, explain_io, read_metrics
from opd.report.writers import make_writers, require_installed
from opd.roles import Studio
from opd.startup import Material, make_parts, packing_findings, read_tasks, run_checks
from opd.tasks.episodes import MakeEnvironment
from opd.tasks.judge import Reward
from opd.watching import Watcher

_SAFE_DISCOUNT = 0.9
_DISCOUNT_WARNING = (
    "warning: objective.discount = {} lets a student that cannot match its teacher everywhere prefer short or empty branches: "
    "a branch of teacher probability 5 % can become 46 % in 32 steps at discount 1 (docs/objectives.md)"
)


@dataclass(frozen=True)
class Result:
    """What a run ended with: `finished` is False when it was interrupted; `parity` is empty without evaluation."""

    run: Path
    steps_done: int
    finished: bool
    parity: tuple[ParityRow, ...] = ()


def train(
    config: Config,
    *,
    reward: Reward | None = None,
    environment: MakeEnvironment | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Result:
    """Train a student by on-policy distillation, from a fresh run folder to the parity table.

    Args:
        config: the recipe, from `opd.load_config`.
        reward: (prompt, response) -> score in [0, 1] or None; takes the place of every task's own verifier.
        environment: prompt -> an `opd.Environment` for one episode, or None for a single turn; takes the place of the tasks' own.
        on_step: called after each update with what it did.

    Raises OpdError with one line when something does not fit; nothing is written over.
    """
    require_installed(config.logging.writers)
    RunFolder.require_absent(config.output)
    material = read_tasks(config, reward, environment)
    own = _own_code(reward, environment)
    return _Run(config, RunFolder(Path(config.output)), material, on_step, own_code=own).go(resume=False)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    reward: Reward | None = None,
    environment: MakeEnvironment | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Result:
    """Continue a run from its newest whole checkpoint; the result is that of a run that was never stopped.

    A run that was started with a reward function or environments of the user's own needs them again. overrides: where and how it
    goes on, such as "teachers.math.url=http://10.0.0.8:8000" or "cluster.learner_ranks=8"; config.json holds them from then on.
    Raises ConfigError for one that would change what is learnt.
    """
    folder = RunFolder.open(run)
    with folder.locked():  # before anything is read, which another process may be changing
        folder.require_own_code(_own_code(reward, environment))
        config = moved_config(folder.config(), overrides)
        _require_adapters(config, folder)
        require_installed(config.logging.writers)
        return _Run(config, folder, read_tasks(config, reward, environment), on_step).go(resume=True)


def check(config: Config, *, reward: Reward | None = None, environment: MakeEnvironment | None = None) -> list[Finding]:
    """Every start-up check on a recipe, with its figures; raises for a record that no run could use. reward and environment: as
    for `train`."""
    material = read_tasks(config, reward, environment)
    with closing(_studio(config.started(), material)) as studio:
        return run_checks(config, studio, material)


def evaluate_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    reward: Reward | None = None,
    environment: MakeEnvironment | None = None,
) -> list[ParityRow]:
    """Evaluate a run's student as it is in the newest checkpoint, and write its parity table anew. overrides: as for `resume`, and
    evaluation.num_prompts; config.json stays as it is.

    Raises RunError for a run without evaluation prompts, and for one that was started with a reward function and gets none.
    """
    folder = RunFolder.open(run)
    folder.require_own_code(_own_code(reward, environment))
    config = moved_config(folder.config(), overrides, evaluation=True)
    _require_adapters(config, folder)
    if not config.evaluation.num_prompts:
        raise RunError(
            f"run '{run}' has evaluation.num_prompts = 0; say on how many prompts of each task and split, such as "
            "evaluation.num_prompts=128"
        )
    return _Run(config, folder, read_tasks(config, reward, environment), None).evaluate_only()


def _studio(config: Config, material: Material) -> Studio:
    """The parts of a recipe, in this process or on a cluster."""
    if config.mode == "embedded":
        return embedded.build(config, material.make_environment)
    try:
        from opd.distributed.studio import build
    except ImportError as error:
        raise ConfigError(
            f"mode = 'distributed' needs more packages ({error.name} is missing): pip install 'opd[distributed]'"
        ) from None
    return build(config, material.make_environment)


def _require_adapters(config: Config, folder: RunFolder) -> None:
    """Raise RunError for a teacher's adapter that is not where it was: only a folder can be one."""
    for name, teacher in config.teachers.items():
        if teacher.adapter is not None and not Path(teacher.adapter).is_dir():
            raise RunError(
                f"run '{folder.path}': teachers.{name}.adapter = '{teacher.adapter}' is no folder here; if it has moved, say "
                f"where: teachers.{name}.adapter=PATH behind the run"
            )


def _own_code(reward: Reward | None, environment: MakeEnvironment | None) -> list[str]:
    """Which of a run's callables are the user's own."""
    given = {"reward": reward, "environment": environment}
    return [name for name, value in given.items() if value is not None]


class _Run:
    """One training run, in this process."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        material: Material,
        on_step: Callable[[StepReport], None] | None,
        *,
        own_code: Sequence[str] = (),
    ) -> None:
        self.own_code = own_code
        self.folder = folder
        self.prompts = material.prompts
        self.on_step = on_step
        started = config.started()
        self.studio = _studio(started, material)
        # a run keeps the moment where a template reads it
        config = self.config = started if self.studio.facts().reads_clock else config
        self.material = material
        self.say: Callable[[str], None] = print  # until there is a line to say it above
        try:
            self.parts = make_parts(config, self.studio, material, warn=lambda text: self.say(text))
        except BaseException:
            self.studio.close()
            raise
        self.measuring = Measuring(config, folder, self.studio, self.parts, material)
        self.cursor: Mapping[str, int] = dict(self.parts.stream.cursor)  # behind the last step that is done

    def go(self, *, resume: bool) -> Result:
        """Train to the end. resume: in a folder that is there, and locked."""
        with closing(self.studio), ProgressLine(self.config.steps) as line:
            self.say = line.say
            findings = run_checks(self.config, self.studio, self.material)
            preflight.require(findings)
            for finding in findings:
                if finding.warning and not resume:
                    line.say(f"warning: {finding.name}: {finding.detail}")
            if resume:
                return self._train(line, resume=True)
            # Only now, so that a recipe that is refused leaves nothing behind.
            RunFolder.create(self.folder.path, self.config, own_code=self.own_code)
            with self.folder.locked():
                return self._train(line, resume=False)

    def _train(self, line: ProgressLine, *, resume: bool) -> Result:
        config = self.config
        restored = self._restore(line.say) if resume else None
        start = restored or 0
        if start > config.steps:
            raise ConfigError(f"steps = {config.steps}: step {start} of this run is done; ask for as many or more")
        if resume:
            if start < config.steps:  # a run that is done was made as its configuration says
                self._note_changes(line.say)
            self.folder.truncate_metrics(start)
        if config.objective.discount is not None and config.objective.discount > _SAFE_DISCOUNT:
            line.say(_DISCOUNT_WARNING.format(config.objective.discount))
        about_mask = mask_warning(config)
        if about_mask is not None:
            line.say(about_mask)
        before = self.measuring.before(line, restored=restored is not None)
        if restored is None and config.warmup.steps:
            assert isinstance(self.studio, EmbeddedStudio)  # the recipe says so
            warm_up(self.studio, {name: splits["train"] for name, splits in self.prompts.items()}, line.say)
            self._save(0)
        done, interrupted = self._steps(line, start)
        if interrupted:
            line.say(
                f"stopped after step {done} of {config.steps}; continue with: opd train --resume {self.folder.path}"
            )
            return Result(self.folder.path, done, finished=False)
        with explain_io(self.folder.student):
            self.studio.export(self.folder.student)
            draw_curves(read_metrics(self.folder.path), self.folder.path / "curves.png", title=str(self.folder.path))
        rows = self.measuring.parity(before, line)
        return Result(self.folder.path, done, finished=True, parity=tuple(rows))

    def _note_changes(self, say: Callable[[str], None]) -> None:
        """Write where and how the run goes on into its folder, when that has changed."""
        changes = config_changes(self.folder.config(), self.config)
        for key, before, after in changes:
            say(f"changed: {key} = {json.dumps(after)}, was {json.dumps(before)}")
        if changes:
            self.folder.write_text("config.json", dump_config(self.config))

    def evaluate_only(self) -> list[ParityRow]:
        with closing(self.studio), ProgressLine(self.config.steps) as line:
            preflight.require(packing_findings(self.studio))
            if self._restore(line.say) is None:
                raise RunError(f"'{self.folder.path}' has no checkpoint to evaluate")
            return self.measuring.parity(self.measuring.kept(), line)

    def _steps(self, line: ProgressLine, start: int) -> tuple[int, bool]:
        """Train until the last step or an interrupt; returns the steps done, all of them saved, and whether it was one."""
        config, every = self.config, self.config.checkpoint.every
        self.parts.sampler.load_weights(self.parts.learner.weights(), policy_version=start)
        writers = make_writers(config, self.folder.path, start=start)
        watcher = Watcher(config.guards, self.folder, line.say)
        done, saved, stopped = start, start, False
        try:
            with (
                _interrupts() as interrupted,
                Background() as records,
                closing(train_steps(config, self.parts, start=start)) as reports,
            ):
                for report in reports:
                    done, self.cursor = report.step, report.cursor
                    values, alarmed = watcher.observe(done, {**report.values, **self.measuring.held_out(done)})
                    self._record(replace(report, values=values), line, records)
                    for writer in writers:
                        writer.write(done, values)
                    stopped = interrupted.is_set() or (alarmed and done < config.steps)
                    if done % every == 0 or done == config.steps or stopped:
                        records.wait()  # a checkpoint says that all before it is on disk
                        self._save(done)
                        saved = done
                    if stopped:
                        break
        except StalledError:
            if done > saved:
                self._save(done)
            raise
        finally:
            for writer in writers:
                writer.close()
        assert saved == done
        watcher.report()
        return done, stopped

    def _record(self, report: StepReport, line: ProgressLine, records: Background) -> None:
        records.start(partial(self.folder.write_rollouts, report.step, report.scored))
        self.folder.append_metrics(report.step, report.values)
        line.step(report.step, report.values)
        every = self.config.logging.samples_every
        if every and (report.step == 1 or report.step % every == 0):
            line.samples(report.scored)
        if self.on_step is not None:
            records.wait()  # it may read them
            self.on_step(report)

    def _save(self, step: int) -> None:
        state = {
            "cursor": self.cursor,
            "policy_version": step,
            "identities": self._identities(),
            "torch_rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        with explain_io(self.folder.checkpoints):
            keep = self.config.checkpoint.keep
            checkpoint.save(self.folder.checkpoints, step, self.parts.learner.save, state, keep=keep)

    def _restore(self, warn: Callable[[str], None]) -> int | None:
        """Load the newest whole checkpoint; returns its step (0: warmed up), None when there is none yet."""
        found = checkpoint.load_newest(self.folder.checkpoints, warn=warn)
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
        self.parts.learner.load(found.path, found.state["learner"])
        self.parts.stream.cursor = dict(found.state["cursor"])
        self.cursor = dict(found.state["cursor"])
        rng = bytearray(base64.b64decode(found.state["torch_rng"]))
        torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8).clone())
        return found.step

    def _identities(self) -> dict[str, str]:
        """What must not change under a run: its teachers, the student's base, their tokenizers and templates, the prompts."""
        named = dict(self.studio.identities)
        for task, splits in self.prompts.items():
            content = repr(
                [(p.id, [dict(m) for m in p.messages], p.teacher, p.answer, p.tools) for p in splits["train"]]
            )
            named[f"the training prompts of tasks.{task}"] = hashlib.sha256(content.encode()).hexdigest()[:32]
        return named


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second SIGINT stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
