"""Supervised fine-tuning: how the experts of a merge are made (`opd sft`)."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from opd.checkpoint import Saver, explain_io, identities_of
from opd.checks import startup
from opd.checks.notices import clock_unread, notices_of_tuning, warmup_warning
from opd.config import EpisodesConfig, ObjectiveConfig, SftConfig
from opd.data.tasks import SPLITS, PromptStream, make_tasks, read_splits
from opd.episodes.player import Demonstrator, Replay
from opd.errors import DataError
from opd.evaluate import Cell, evaluate, pick, reward_text
from opd.interrupts import Interrupts
from opd.local.backend import check_passes_of
from opd.local.build import build_student
from opd.local.learner import LocalLearner, imitation_batch
from opd.local.sampler import LocalSampler, episode_player
from opd.local.teacher import Policy
from opd.logging.console import ProgressLine
from opd.logging.run_folder import RunFolder
from opd.logging.writers import draw_run
from opd.metrics import values
from opd.models.export import export
from opd.records import Prompt, Rollout
from opd.rewards.judge import Judge
from opd.roles import Environment, Task
from opd.text.template import clock_of, turn_end
from opd.text.tokenizer import fingerprint

_LOOKED_AT = 64  # of generated problems

_Prompts = Mapping[str, Mapping[str, Sequence[Prompt]]]


@dataclass(frozen=True)
class SftResult:
    """The result of fine-tuning.

    Attributes:
        run: The run folder.
        finished: False if it was interrupted.
        accuracy: The student's own responses by (task, split); empty if it was interrupted.
    """

    run: Path
    finished: bool
    accuracy: Mapping[tuple[str, str], Cell]


def sft(config: SftConfig) -> SftResult:
    """Fine-tune a student on the answers and demonstrations of its tasks.

    The loss is the mean negative log-likelihood of the answers' tokens, the end token included. The student is written to
    `OUTPUT/student`. If it ends early, for any reason, its last whole step is saved, and `resume_sft` continues it.
    """
    return _tune(config, RunFolder(Path(config.output)), resume=False)


def resume_sft(run: str | Path) -> SftResult:
    """Continue an interrupted fine-tuning run from its newest whole checkpoint, to the same result."""
    folder = RunFolder.open(run)
    with folder.locked():
        return _tune(folder.config(SftConfig), folder, resume=True)


def _tune(config: SftConfig, folder: RunFolder, *, resume: bool) -> SftResult:
    tasks = make_tasks(config.tasks, config.episodes)
    prompts = read_splits(tasks)
    if not resume:
        RunFolder.require_absent(folder.path)
    started = config.started()
    student = build_student(started)
    config = started if clock_of(student.network.tokenizer) else config
    startup.require([startup.passes_equal_own("the student", *check_passes_of(student, trains=True))])
    school = _School(student, tasks, config.episodes)
    for name, splits in prompts.items():
        school.require_learnable(tasks[name], splits["train"])
    with ProgressLine(config.steps) as line, ExitStack() as held:
        if not resume:
            RunFolder.create(folder.path, config)
            held.enter_context(folder.locked())
        learner = _learner(config, student)
        checkpoints = config.checkpoint
        saver = Saver(
            folder.checkpoints,
            learner,
            lambda: {**_identities(config, student), **identities_of(prompts)},
            steps=config.steps,
            every=checkpoints.every,
            keep=checkpoints.keep,
            how_to_resume=folder.how_to_resume,
        )
        if resume:
            saver.restore(line.say)
        else:
            unread = clock_unread(config, reads_clock=bool(clock_of(student.network.tokenizer)))
            for finding in notices_of_tuning(config, prompts) + unread:
                line.say(f"warning: {finding.name}: {finding.detail}")
            if (warning := warmup_warning(config)) is not None:
                line.say(warning)
            for note in school.notes:
                line.say(f"warning: {note}")
        with saver.explained(line.say):
            folder.truncate_metrics(saver.done - (saver.unrecorded is not None))
            if not _steps(config, school, prompts, saver, folder, line):
                line.say(f"{saver.stopped}; continue with: {folder.how_to_resume()}")
                return SftResult(folder.path, False, {})
            with explain_io(folder.student):
                export(student.network, student.adapter, folder.student, dtype=config.save_dtype)
            draw_run(folder)
            return SftResult(folder.path, True, school.examine(config, prompts, line))


def _learner(config: SftConfig, student: Policy) -> LocalLearner:
    return LocalLearner(
        student.network,
        adapter=student.adapter,
        objective=ObjectiveConfig(type="immediate", normalizer="token"),
        optimizer=config.optimizer,
        steps=config.steps,
        heads={},
        temperature=1.0,
        max_tokens=config.compute.max_tokens,
    )


def _identities(config: SftConfig, student: Policy) -> dict[str, str]:
    """The tokenizer and the base, which must not change during a run."""
    named = {"the student's tokenizer": fingerprint(student.network.tokenizer)}
    return named | ({"the student's base": student.network.fingerprint()} if config.trainable == "lora" else {})


def _steps(
    config: SftConfig, school: "_School", prompts: _Prompts, saver: Saver, folder: RunFolder, line: ProgressLine
) -> bool:
    """Fine-tune until the last step; returns False where an interrupt stopped it before. Every step that is done is saved, also
    where an error ends the run."""
    weights = {name: task.weight for name, task in config.tasks.items()}
    stream = PromptStream({t: splits["train"] for t, splits in prompts.items()}, weights, seed=config.seed)
    stream.cursor |= saver.cursor

    def append(step: int, values: Mapping[str, float]) -> None:
        folder.append_metrics(step, values)
        saver.unrecorded = None

    with Interrupts(saver).handled() as interrupts:
        try:
            if saver.unrecorded is not None:
                append(saver.done, saver.unrecorded)
            for step in range(saver.done + 1, config.steps + 1):
                batch = imitation_batch(school.demonstrate(stream.next(config.batch_size)))
                metrics = saver.learner.forward_backward(batch) | saver.learner.optim_step()
                plain = {name: value for name, value in values(metrics).items() if not name.startswith("kl/")}
                saver.made(step, stream.cursor, plain)
                append(step, plain)
                line.step(step, plain)
                if saver.due or interrupts.stop:
                    saver.save()
                if interrupts.stop:
                    break
        except BaseException:
            saver.rescue(line.say)
            raise
    return not interrupts.stop


class _School:
    """A student's episodes with the solutions of its tasks, and without."""

    def __init__(self, student: Policy, tasks: Mapping[str, Task], episodes: EpisodesConfig) -> None:
        self._student = student
        self._tasks = tasks
        self._episodes = episodes
        network = student.network
        end = turn_end(network.tokenizer, network.base.generation_config, who=f"model '{network.source}'")
        self.notes = [*network.notes, *([f"where a turn of '{network.source}' ends: {end.note}"] if end.note else [])]
        self._player = episode_player(network, episodes, lambda prompt: tasks[prompt.task].environment(prompt))
        self._told = episode_player(network, episodes, self._recorded)
        self._demonstrator = Demonstrator(
            self._told.chat, lambda prompt, messages: tasks[prompt.task].solution(prompt, messages)
        )

    def _recorded(self, prompt: Prompt) -> Environment | None:
        """The environment of a demonstration: a replay where the whole conversation is recorded."""
        return Replay(prompt.demonstration) if prompt.demonstration else self._tasks[prompt.task].environment(prompt)

    def demonstrate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """One episode a prompt as its task's solution has it; raises DataError where it has none, and where the recipe's limits
        would cut it."""
        rollouts = self._told.play([(p, 0) for p in prompts], self._demonstrator.take_turns, version=0)
        for rollout in rollouts:
            name = f"prompt '{rollout.prompt.id}': its demonstration"
            if rollout.failure is not None:
                raise DataError(f"{name} fails: {rollout.failure}")
            if rollout.finish == "turns":
                raise DataError(f"{name} has more than episodes.max_turns = {self._episodes.max_turns} turns; raise it")
            if rollout.prompt.demonstration and rollout.events.get("observation_cut"):
                limit = self._episodes.max_observation_chars
                raise DataError(f"{name} has a message of more than episodes.max_observation_chars = {limit}; raise it")
        return rollouts

    def require_learnable(self, task: Task, prompts: Sequence[Prompt]) -> None:
        """Raise DataError for the first prompt without an answer that fits the context; of generated problems only some are
        checked."""
        limit = self._student.network.limit
        for prompt in prompts if task.environment(prompts[0]) is None else prompts[:_LOOKED_AT]:
            tokens = max(len(r.token_ids) for r in self.demonstrate([prompt]))
            if limit is not None and tokens > limit.tokens:
                raise DataError(
                    f"prompt '{prompt.id}': {tokens} tokens with its answer exceed {limit.of('the student')}; shorten the prompt "
                    "or its answer"
                )

    def examine(self, config: SftConfig, prompts: _Prompts, line: ProgressLine) -> dict[tuple[str, str], Cell]:
        """The student's own accuracy by task and split."""
        sampler = LocalSampler(
            self._student.network,
            adapter=self._student.adapter,
            temperature=1.0,
            max_new_tokens=config.max_new_tokens,
            max_rows=64,
            max_tokens=config.compute.max_tokens,
            player=self._player,
        )
        judge = Judge(
            lambda prompt, response: self._tasks[prompt.task].reward(prompt, response),
            {name: task.checks for name, task in config.tasks.items()},
            tokenizer=self._student.network.tokenizer,
            tool_syntax=self._episodes.tool_syntax,
        )
        found: dict[tuple[str, str], Cell] = {}
        for name, splits in prompts.items():
            for split in SPLITS:
                # nobody answers the turns of a recorded conversation
                alone = [p for p in splits[split] if not p.demonstration]
                if len(alone) < len(splits[split]) and config.evaluation.num_prompts:
                    line.say(
                        f"{name} {split}: {len(splits[split]) - len(alone)} prompts with a demonstration are not evaluated"
                    )
                chosen = pick(alone, config.evaluation.num_prompts, seed=0)
                if not chosen:
                    continue
                cell = found[name, split] = evaluate(sampler, chosen, judge)
                if cell.accuracy is not None and cell.interval is not None:
                    low, high = cell.interval
                    faults = f", {cell.flagged} with format errors" if cell.flagged else ""
                    faults += f", {cell.timeouts} not compared in time" if cell.timeouts else ""
                    line.say(
                        f"{name} {split}: {cell.accuracy:.3f} [{low:.3f}, {high:.3f}] correct of {cell.verified}"
                        f"{reward_text(cell)}{faults}"
                    )
        return found
