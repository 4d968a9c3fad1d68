"""From a configuration to a finished run; the only file that puts the parts together."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from opd import checkpoint
from opd.checks import findings as preflight
from opd.checks.findings import Finding
from opd.checks.masks import mask_warning
from opd.checks.no_effect import REWARD
from opd.config import Config, config_changes, dump_config, resumed_config
from opd.detectors.monitor import RunMonitor
from opd.episodes.player import MakeEnvironment
from opd.errors import ConfigError, RunError, one_line
from opd.evaluate import ParityRow
from opd.local import build as embedded
from opd.local.backend import LocalBackend
from opd.local.warmup import warm_up
from opd.logging.console import ProgressLine
from opd.logging.curves import draw_run
from opd.logging.run_folder import Background, RunFolder, explain_io
from opd.logging.writers import Writers, require_installed
from opd.loop import StepReport, train_steps
from opd.measuring import Measuring
from opd.rewards.reward import Raised, Reward, awaited
from opd.roles import Backend
from opd.saving import Interrupts, Saver, identities_of
from opd.startup import TaskData, make_parts, packing_findings, read_tasks, require_callable, run_checks

OnStep: TypeAlias = Callable[[StepReport], Any]
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
    on_step: OnStep | None = None,
) -> Result:
    """Train a student by on-policy distillation, from a fresh run folder to the parity table.

    Args:
        config: the recipe, from `opd.load_config`.
        reward: (prompt, response) -> score in [0, 1], or None for no verdict; takes the place of every task's own verifier. It may
            be async: the rewards of a step are then awaited at the same time.
        environment: prompt -> an `opd.Environment` for one episode, or None for a single turn; takes the place of the tasks' own.
        on_step: called after each update with what it did; it may be async.

    Raises OpdError with one line when something does not fit; nothing is written over. Whatever ends a run that has begun, its last
    whole step is saved, and the error says how to go on: in its line, or in a note where it is no OpdError.
    """
    require_callable("on_step", on_step, "report")
    require_installed(config.logging.writers)
    RunFolder.require_absent(config.output)
    task_data = read_tasks(config, reward, environment)
    own = _own_code(reward, environment)
    return _Run(config, RunFolder(Path(config.output)), task_data, on_step, own_code=own).go(resume=False)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    reward: Reward | None = None,
    environment: MakeEnvironment | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Continue a run from its newest whole checkpoint; the result is that of a run that was never stopped.

    A run that was started with a reward function or environments of the user's own needs them again. overrides: where and how it
    goes on, such as "teachers.math.url=http://10.0.0.8:8000" or "cluster.learner_ranks=8"; config.json holds them from then on.
    Raises ConfigError for one that would change what is learnt.
    """
    require_callable("on_step", on_step, "report")
    folder = RunFolder.open(run)
    with folder.locked():  # before anything is read, which another process may be changing
        folder.require_own_code(_own_code(reward, environment))
        config = resumed_config(folder.config(), overrides)
        _require_adapters(config, folder)
        require_installed(config.logging.writers)
        return _Run(config, folder, read_tasks(config, reward, environment), on_step).go(resume=True)


def check(config: Config, *, reward: Reward | None = None, environment: MakeEnvironment | None = None) -> list[Finding]:
    """Every start-up check on a recipe, with its figures; raises for a record that no run could use. reward and environment: as
    for `train`."""
    task_data = read_tasks(config, reward, environment)
    with closing(_backend(config.started(), task_data)) as backend:
        return run_checks(config, backend, task_data)


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
    config = resumed_config(folder.config(), overrides, evaluation=True)
    _require_adapters(config, folder)
    if not config.evaluation.num_prompts:
        raise RunError(
            f"run '{run}' has evaluation.num_prompts = 0; say on how many prompts of each task and split, such as "
            "evaluation.num_prompts=128"
        )
    if not checkpoint.list_checkpoints(folder.checkpoints):
        raise RunError(f"'{run}' has no checkpoint to evaluate; continue it with: {folder.how_to_resume()}")
    return _Run(config, folder, read_tasks(config, reward, environment), None).evaluate_only()


def _backend(config: Config, task_data: TaskData) -> Backend:
    """The parts of a recipe, in this process or on a cluster."""
    if config.backend == "local":
        return embedded.build(config, task_data.make_environment)
    try:
        from opd.distributed.backend import build
    except ImportError as error:
        raise ConfigError(
            f"backend = 'ray' needs more packages ({error.name} is missing): pip install 'opd[distributed]'"
        ) from None
    return build(config, task_data.make_environment)


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
        task_data: TaskData,
        on_step: OnStep | None,
        *,
        own_code: Sequence[str] = (),
    ) -> None:
        self.own_code = own_code
        self.folder = folder
        self.prompts = task_data.prompts
        self.on_step = on_step
        started = config.started()
        self.backend = _backend(started, task_data)
        # a run keeps the moment where a template reads it
        config = self.config = started if self.backend.facts().reads_clock else config
        self.task_data = task_data
        self.say: Callable[[str], None] = print  # until there is a line to say it above
        try:
            self.parts = make_parts(config, self.backend, task_data, warn=lambda text: self.say(text))
        except BaseException:
            self.backend.close()
            raise
        checkpoints = config.checkpoint
        self.saver = Saver(
            folder,
            self.parts.learner,
            self._identities,
            steps=config.steps,
            every=checkpoints.every,
            keep=checkpoints.keep,
        )
        self.parts = replace(self.parts, learner=self.saver.learner)
        self.measuring = Measuring(config, folder, self.backend, self.parts, task_data)
        self.saver.cursor = dict(self.parts.stream.cursor)
        self._prompts_of = identities_of(self.prompts)
        self._silence_said = False

    def go(self, *, resume: bool) -> Result:
        """Train to the end. resume: in a folder that is there, and locked."""
        with closing(self.backend), ProgressLine(self.config.steps) as line:
            self.say = line.say
            findings = run_checks(self.config, self.backend, self.task_data)
            preflight.require(findings)
            for finding in findings:
                if not resume and (finding.warning or finding.name == REWARD):
                    line.say(f"{'warning: ' if finding.warning else ''}{finding.name}: {finding.detail}")
            if resume:
                return self._train(line, resume=True)
            # Only now, so that a recipe that is refused leaves nothing behind.
            RunFolder.create(self.folder.path, self.config, own_code=self.own_code)
            with self.folder.locked():
                return self._train(line, resume=False)

    def _train(self, line: ProgressLine, *, resume: bool) -> Result:
        restored = self._restore(line.say) if resume else None
        start = self.saver.done
        if start > self.config.steps:
            raise ConfigError(f"steps = {self.config.steps}: step {start} of this run is done; ask for as many or more")
        with self.saver.explained(line.say):
            if resume:
                if start < self.config.steps:  # a run that is done was made as its configuration says
                    self._note_changes(line.say)
                # a step without its line gets it below
                self.folder.truncate_metrics(start - (self.saver.unrecorded is not None))
            return self._go_on(line, restored)

    def _go_on(self, line: ProgressLine, restored: int | None) -> Result:
        config = self.config
        if config.objective.discount is not None and config.objective.discount > _SAFE_DISCOUNT:
            line.say(_DISCOUNT_WARNING.format(config.objective.discount))
        about_mask = mask_warning(config)
        if about_mask is not None:
            line.say(about_mask)
        before = self.measuring.before(line, restored=restored is not None)
        if restored is None and config.warmup.steps:
            assert isinstance(self.backend, LocalBackend)  # the recipe says so
            warm_up(self.backend, {name: splits["train"] for name, splits in self.prompts.items()}, line.say)
            self.saver.save()
        if not self._steps(line):
            line.say(f"{self.saver.stopped}; continue with: {self.folder.how_to_resume()}")
            return Result(self.folder.path, self.saver.done, finished=False)
        with explain_io(self.folder.student):
            self.backend.export(self.folder.student)
        draw_run(self.folder)
        rows = self.measuring.parity(before, line)
        return Result(self.folder.path, self.saver.done, finished=True, parity=tuple(rows))

    def _note_changes(self, say: Callable[[str], None]) -> None:
        """Write where and how the run goes on into its folder, when that has changed."""
        changes = config_changes(self.folder.config(), self.config)
        for key, before, after in changes:
            say(f"changed: {key} = {json.dumps(after)}, was {json.dumps(before)}")
        if changes:
            self.folder.write_text("config.json", dump_config(self.config))

    def _restore(self, warn: Callable[[str], None]) -> int | None:
        """Load the newest whole checkpoint; returns its step (0: warmed up), None when there is none yet."""
        step = self.saver.restore(warn)
        self.parts.stream.cursor = dict(self.saver.cursor)
        return step

    def evaluate_only(self) -> list[ParityRow]:
        with closing(self.backend), ProgressLine(self.config.steps) as line:
            preflight.require(packing_findings(self.backend))
            self._restore(line.say)
            return self.measuring.parity(self.measuring.kept(), line)

    def _steps(self, line: ProgressLine) -> bool:
        """Train until the last step; returns False where an interrupt or a detector stopped it before. Every step that is done is
        saved, also where an error ends the run."""
        saver, config = self.saver, self.config
        self.parts.sampler.load_weights(self.parts.learner.weights(), policy_version=saver.done)
        pending = saver.unrecorded  # of a run that ended before this line was whole
        written = saver.done - (pending is not None)
        monitor = RunMonitor(config.detectors, self.folder, line.say)
        report, stopped = None, False
        with (
            Interrupts(saver.learner).heeded() as interrupts,
            Background() as records,
            Writers(config, self.folder.path, start=written) as writers,
        ):
            try:
                if pending is not None:
                    values, alarmed = self._measured(saver.done, pending, monitor)
                    stopped = alarmed and saver.done < config.steps
                    self._append(saver.done, values)
                    writers.write(saver.done, values)
                with closing(train_steps(config, self.parts, start=saver.done)) as reports:
                    for report in reports if not stopped else ():
                        saver.made(report.step, report.cursor, report.values)
                        values, alarmed = self._measured(report.step, report.values, monitor)
                        self._record(replace(report, values=values), line, records)
                        writers.write(report.step, values)
                        stopped = interrupts.stop or (alarmed and saver.done < config.steps)
                        if saver.due or stopped:
                            records.wait()  # a checkpoint says that all before it is on disk
                            saver.save()
                        if stopped:
                            break
            except BaseException:
                self._rescue(report, records, line)
                raise
        monitor.report()
        return not (stopped or interrupts.stop)  # one that came while the last step was saved counts too

    def _measured(self, step: int, values: Mapping[str, float], monitor: RunMonitor) -> tuple[dict[str, float], bool]:
        """The metrics of a step with what is measured behind it, and whether a detector stops the run."""
        return monitor.observe(step, {**values, **self.measuring.held_out(step)})

    def _record(self, report: StepReport, line: ProgressLine, records: Background) -> None:
        records.start(partial(self.folder.write_rollouts, report.step, report.scored))
        self._append(report.step, report.values)
        line.step(report.step, report.values)
        self._warn_of_silence(report, line)
        every = self.config.logging.samples_every
        if every and (report.step == 1 or report.step % every == 0):
            line.samples(report.scored)
        if self.on_step is not None:
            records.wait()  # it may read them
            answer = self.on_step(report)
            for found in awaited([answer] if inspect.isawaitable(answer) else []):
                if isinstance(found, Raised):
                    raise found.error

    def _warn_of_silence(self, report: StepReport, line: ProgressLine) -> None:
        """Say once that a reward function judges nothing: it may lack its return."""
        rollouts = [item.rollout for item in report.scored if item.rollout.failure is None]
        if self._silence_said or not self.task_data.own_reward or any(r.reward is not None for r in rollouts):
            return
        self._silence_said = True
        line.say(
            f"warning: step {report.step}: the reward was None, no verdict, for all {len(rollouts)} responses; does the function "
            "return its number?"
        )

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        self.folder.append_metrics(step, values)
        self.saver.unrecorded = None

    def _rescue(self, report: StepReport | None, records: Background, line: ProgressLine) -> None:
        """Save the last whole step with its rollouts after any failure; a further failure here is printed."""
        missing = [] if report is None or self.saver.unrecorded is None else [report]
        for write in (records.again, *(partial(self.folder.write_rollouts, r.step, r.scored) for r in missing)):
            try:
                write()
            except Exception as error:
                line.say(f"warning: {one_line(str(error))}")
        self.saver.rescue(line.say)

    def _identities(self) -> dict[str, str]:
        """What must not change under a run: its teachers, the student's base, their tokenizers and templates, the prompts."""
        return {**self.backend.identities, **self._prompts_of}
