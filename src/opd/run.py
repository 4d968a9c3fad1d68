"""One run: its components, its steps, and what is saved when it ends for any reason."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from opd.callbacks import Callbacks
from opd.checkpoint import Saver, explain_io, find_checkpoint, identities_of, require_same
from opd.checks import startup
from opd.checks.notices import REWARD, discount_warning, mask_warning, warmup_warning
from opd.checks.startup import packing_findings, run_checks
from opd.config import Config, config_changes, dump_config
from opd.data.tasks import PromptStream, TaskData
from opd.detectors.monitor import RunMonitor
from opd.episodes.player import MakeEnvironment
from opd.errors import ConfigError, one_line
from opd.evaluate import Evaluator, ParityRow
from opd.interrupts import Interrupts
from opd.local import build as local
from opd.local.backend import LocalBackend
from opd.local.build import build_student
from opd.local.learner import learning_rate, read_weights
from opd.local.warmup import warm_up
from opd.logging.console import ProgressLine
from opd.logging.run_folder import Background, RunFolder, read_metrics
from opd.logging.writers import Writers, draw_run
from opd.loop import Components, StepReport, train_steps
from opd.models.export import export, require_mergeable, write_merged
from opd.roles import Backend, Teacher
from opd.score_cache import CachedTeacher, MemoryScores, ScoreFiles, identities, probe
from opd.text.tokenizer import fingerprint


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        run: The run folder.
        steps_done: The steps that are done and saved.
        finished: False for a run that was stopped before its last step.
        parity: The rows of the parity table; empty without an evaluation.
    """

    run: Path
    steps_done: int
    finished: bool
    parity: tuple[ParityRow, ...] = ()

    @property
    def student(self) -> Path:
        """The folder of the trained student: a PEFT adapter or a Hugging Face model, with its tokenizer."""
        return self.run / "student"

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The metrics of every step, one dict for each step; `pandas.DataFrame(result.history)` makes a table."""
        return read_metrics(self.run)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last step; empty before the first."""
        return self.history[-1] if self.history else {}


class Run:
    """One training run, in this process."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        task_data: TaskData,
        callbacks: Callbacks,
        *,
        own_code: Sequence[str] = (),
    ) -> None:
        self.own_code = own_code
        self.folder = folder
        self.callbacks = callbacks
        self.task_data = task_data
        started = config.started()
        self.say: Callable[[str], None] = partial(print, flush=True)  # until there is a progress line to say it above
        self.backend = make_backend(started, task_data.make_environment, say=self.say)
        # the run keeps its start time where a template reads the clock
        self.config = started if self.backend.facts().reads_clock else config
        try:
            components = make_components(self.config, self.backend, task_data, warn=lambda text: self.say(text))
        except BaseException:
            self.backend.close()
            raise
        self._prompt_identities = identities_of(task_data.prompts)
        self.saver = Saver(
            folder.checkpoints,
            components.learner,
            self._identities,
            steps=config.steps,
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            how_to_resume=folder.how_to_resume,
        )
        self.components = replace(components, learner=self.saver.learner)
        self.saver.cursor = dict(self.components.stream.cursor)
        self.evaluator = Evaluator(self.config, folder, self.backend, self.components, task_data)
        self._warned_of_silence = False

    def go(self, *, resume: bool, replace: bool = False) -> Result:
        """Train to the end. resume: in a folder that is there, and locked; replace: in place of a run that is there."""
        with closing(self.backend), ProgressLine(self.config.steps) as line:
            self.say = line.say
            line.say("checking the recipe on the real models")
            findings = run_checks(self.config, self.backend, self.task_data)
            startup.require(findings)
            for finding in findings if not resume else ():
                if finding.warning or finding.name == REWARD:
                    line.say(f"{'warning: ' if finding.warning else ''}{finding.name}: {finding.detail}")
            if resume:
                return self._train(line, resume=True)
            # Only now, so that a refused recipe leaves nothing behind, and deletes nothing.
            if replace:
                self.folder.remove()
            RunFolder.create(self.folder.path, self.config, own_code=self.own_code)
            with self.folder.locked():
                return self._train(line, resume=False)

    def evaluate(self, step: int | None = None) -> list[ParityRow]:
        """The parity table of the student in the newest checkpoint, or in that of `step`."""
        with closing(self.backend), ProgressLine(self.config.steps) as line:
            startup.require(packing_findings(self.backend))
            self._restore(line.say, step)
            name = "parity" if step is None else f"evaluations/step-{step:06d}"
            (self.folder.path / name).parent.mkdir(exist_ok=True)
            return self.evaluator.parity(self.evaluator.kept(), line, name=name)

    def evaluate_untrained(self) -> list[ParityRow]:
        """The parity table of the student as the recipe has it; nothing is written."""
        with closing(self.backend), ProgressLine(self.config.steps) as line:
            startup.require(packing_findings(self.backend))
            return self.evaluator.parity({}, line, name=None)

    def _train(self, line: ProgressLine, *, resume: bool) -> Result:
        restored = self._restore(line.say) if resume else None
        start = self.saver.done
        if start > self.config.steps:
            raise ConfigError(f"steps = {self.config.steps}: step {start} of this run is done; ask for as many or more")
        with self.saver.explained(line.say):
            if resume:
                if start < self.config.steps:  # the configuration of a finished run stays as it was
                    self._note_changes(line.say)
                # a step without its line gets it below
                self.folder.truncate_metrics(start - (self.saver.unrecorded is not None))
            result = self._train_and_evaluate(line, restored)
            self.callbacks.on_end(result)
            return result

    def _train_and_evaluate(self, line: ProgressLine, restored: int | None) -> Result:
        for warning in (warmup_warning(self.config), discount_warning(self.config), mask_warning(self.config)):
            if warning is not None:
                line.say(warning)
        before = self.evaluator.before(line, restored=restored is not None)
        if restored is None and self.config.warmup.steps:
            assert isinstance(self.backend, LocalBackend)  # the config refuses any other
            prompts = self.task_data.prompts
            warm_up(self.backend, {name: splits["train"] for name, splits in prompts.items()}, line.say)
            self.saver.save()
        finished = self._steps(line)
        with explain_io(self.folder.student):
            self.backend.export(self.folder.student)
        draw_run(self.folder)
        if not finished:
            line.say(f"{self.saver.stopped}; continue with: {self.folder.how_to_resume()}")
            return Result(self.folder.path, self.saver.done, finished=False)
        rows = self.evaluator.parity(before, line)
        self.callbacks.on_evaluate(self.saver.done, {}, rows)
        return Result(self.folder.path, self.saver.done, finished=True, parity=tuple(rows))

    def _note_changes(self, say: Callable[[str], None]) -> None:
        """Write the settings that have changed since the start into the folder."""
        changes = config_changes(self.folder.config(), self.config)
        for key, before, after in changes:
            say(f"changed: {key} = {json.dumps(after)}, was {json.dumps(before)}")
        if changes:
            self.folder.note_changes(self.saver.done, changes)
            self.folder.write_text("config.json", dump_config(self.config))
        steps = next((before for key, before, _ in changes if key == "steps"), None)
        if steps is not None and self.config.optimizer.schedule != "constant":
            now, was = (learning_rate(self.config.optimizer, self.saver.done, n) for n in (self.config.steps, steps))
            say(
                f"the learning rate follows {self.config.steps} steps now: {now:.3g} at the next step, {was:.3g} before"
            )

    def _restore(self, warn: Callable[[str], None], step: int | None = None) -> int | None:
        """Load the newest whole checkpoint, or that of `step`; returns its step (0: warmed up), None when there is none yet."""
        restored = self.saver.restore(warn, step)
        self.components.stream.cursor = dict(self.saver.cursor)
        return restored

    def _steps(self, line: ProgressLine) -> bool:
        """Train until the last step; returns False when an interrupt, a detector or a callback stopped it earlier. Every whole step
        is saved, also when an error ends the run."""
        saver, config, components = self.saver, self.config, self.components
        components.sampler.load_weights(components.learner.weights(), policy_version=saver.done)
        pending = saver.unrecorded  # of a run that ended before this line was whole
        written = saver.done - (pending is not None)
        monitor = RunMonitor(config.detectors, self.folder, line.say)
        report, stopped = None, False
        with (
            Interrupts(saver).handled() as interrupts,
            Background() as records,
            Writers(config, self.folder.path, start=written) as writers,
        ):
            try:
                if pending is not None:
                    values, alarmed = self._measured(saver.done, pending, monitor)
                    stopped = (alarmed or self.callbacks.stop) and saver.done < config.steps
                    self._append(saver.done, values)
                    writers.write(saver.done, values)
                with closing(train_steps(config, components, start=saver.done)) as reports:
                    for report in reports if not stopped else ():
                        saver.made(report.step, report.cursor, report.values)
                        values, alarmed = self._measured(report.step, report.values, monitor)
                        values = self._record(replace(report, values=values), line, records)
                        writers.write(report.step, values)
                        stop = alarmed or self.callbacks.stop
                        stopped = interrupts.stop or (stop and saver.done < config.steps)
                        if saver.due or stopped:
                            records.wait()  # a checkpoint says that everything before it is on disk
                            self.callbacks.on_checkpoint(saver.done, saver.save())
                            stopped |= self.callbacks.stop and saver.done < config.steps
                        if stopped:
                            break
            except BaseException:
                self._rescue(report, records, line)
                raise
        monitor.report()
        return not (stopped or interrupts.stop)  # an interrupt during the last save counts too

    def _measured(self, step: int, values: Mapping[str, float], monitor: RunMonitor) -> tuple[dict[str, float], bool]:
        """The metrics of a step with the evaluation and the detectors' metrics, and whether a detector stops the run."""
        held_out = self.evaluator.held_out(step)
        self.callbacks.on_evaluate(step, held_out)
        return monitor.observe(step, {**values, **held_out})

    def _record(self, report: StepReport, line: ProgressLine, records: Background) -> dict[str, float]:
        """Write the rollouts and the metrics of a step; returns the metrics with those of the callbacks."""
        records.start(partial(self.folder.write_rollouts, report.step, report.scored))
        line.step(report.step, report.values)
        self._warn_of_silence(report, line)
        every = self.config.logging.samples_every
        if every and (report.step == 1 or report.step % every == 0):
            line.samples(report.scored, logprob_floor=self.config.objective.teacher_logprob_floor)
        values = dict(report.values)
        try:
            if self.callbacks:
                records.wait()  # callbacks may read them
                values |= self.callbacks.on_step(report)
        finally:
            self._append(report.step, values)
        return values

    def _warn_of_silence(self, report: StepReport, line: ProgressLine) -> None:
        """Say once that a reward function returns None for everything: its `return` may be missing."""
        rollouts = [item.rollout for item in report.scored if item.rollout.failure is None]
        own = self.task_data.own_reward
        if self._warned_of_silence or not own or any(r.reward is not None for r in rollouts):
            return
        self._warned_of_silence = True
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
        return {**self.backend.identities, **self._prompt_identities}


def export_student(
    config: Config, folder: RunFolder, target: Path, step: int | None, *, merged: bool, dtype: str | None
) -> None:
    """Write the student of a run's newest checkpoint, or of `step`, to a folder (`Trainer.export`).

    Only the student's own base is loaded: no teacher, no prompt, and no cluster.
    """
    lora = config.trainable == "lora"
    if dtype is not None and lora and not merged:
        raise ConfigError(f"dtype = '{dtype}' works only with merged: opd writes an adapter in float32")
    found = find_checkpoint(folder.checkpoints, step, warn=partial(print, flush=True))
    on_cpu = {"compute": config.compute.model_copy(update={"device": "cpu"})}  # as a run may still fill its GPUs
    policy = build_student(config.started().model_copy(update=on_cpu))
    if lora and merged:
        require_mergeable(policy.network)
    now = {"the student's tokenizer": fingerprint(policy.network.tokenizer)}
    if lora:
        now["the student's base"] = policy.network.fingerprint()
    require_same(found.state["identities"], now)
    read_weights(found.path, policy.network, policy.adapter)
    with explain_io(target), tempfile.TemporaryDirectory(prefix="opd-export-") as place:
        if not lora or not merged:
            export(policy.network, policy.adapter, target, dtype=dtype or "float32")
            return
        adapter = Path(place) / "student"
        export(policy.network, policy.adapter, adapter, tokenizer=False)
        write_merged(config.student, adapter, target, dtype=dtype or "float32", whose="the student")


def make_backend(
    config: Config, make_environment: MakeEnvironment, *, say: Callable[[str], None] = lambda line: None
) -> Backend:
    """The backend that a recipe names: this process, or a Ray cluster. say: shows a line before each model that is loaded."""
    if config.backend == "local":
        return local.build(config, make_environment, say=say)
    try:
        from opd.distributed.backend import build
    except ImportError as error:
        raise ConfigError(
            f"backend = 'ray' needs more packages ({error.name} is missing): pip install 'opd[distributed]'"
        ) from None
    return build(config, make_environment)


def make_components(
    config: Config, backend: Backend, task_data: TaskData, *, warn: Callable[[str], None] = print
) -> Components:
    """The components of a recipe's training loop. warn: shows a line to the user, now or later.

    Raises RunError when the folder for scores cannot be written to.
    """
    weights = {name: task.weight for name, task in config.tasks.items()}
    train = {name: splits["train"] for name, splits in task_data.prompts.items()}
    learner = backend.learner()
    teachers = backend.teachers(keep_hidden=config.objective.needs_distributions, followed=True)
    tokenizer = backend.tokenizer
    return Components(
        stream=PromptStream(train, weights, seed=config.seed),
        sampler=backend.sampler(),
        teachers=_keeping(config, backend, teachers, warn),
        learner=learner,
        judge=task_data.judge(config, tokenizer),
        special_ids=frozenset(tokenizer.all_special_ids),
        per_prompt=_per_prompt(config),
    )


def _per_prompt(config: Config) -> bool:
    """Whether each prompt is sampled and scored on its own: where servers do all the work, and no model sleeps between prompts."""
    cluster = config.backend == "ray" and not config.cluster.teachers_sleep
    return cluster and all(t.remote for t in config.teachers.values())


def _keeping(config: Config, backend: Backend, teachers: Teacher, warn: Callable[[str], None]) -> Teacher:
    """The teachers with the score caches that the recipe asks for: memory before disk."""
    found = teachers
    if (folder := config.compute.score_cache_folder) is not None:
        known = identities(config, backend)
        ask = partial(
            probe, teachers, tuple(known), known=frozenset(backend.facts().cross_tokenizer), tokenizer=backend.tokenizer
        )
        # from where the command runs, whatever the process does later
        found = CachedTeacher(found, ScoreFiles(Path(folder).absolute(), known, ask, warn))
    return CachedTeacher(found, MemoryScores(config.compute.score_cache)) if config.compute.score_cache else found
