"""Supervised fine-tuning: how the experts of a merge are made (`opd sft`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd.config import EpisodesConfig, ObjectiveConfig, SftConfig
from opd.data.stream import PromptStream
from opd.embedded.build import build_student
from opd.embedded.export import export
from opd.embedded.learner import EmbeddedLearner
from opd.embedded.sampler import EmbeddedSampler, episode_player
from opd.embedded.sft import imitation_batch
from opd.embedded.teacher import Voice
from opd.errors import DataError
from opd.evaluate import SPLITS, Cell, evaluate, pick
from opd.metrics import values
from opd.records import Prompt, Rollout
from opd.report.console import ProgressLine
from opd.report.curves import draw_curves
from opd.report.run_folder import RunFolder, explain_io, read_metrics
from opd.roles import Environment, Task
from opd.tasks import make_tasks
from opd.tasks.demonstrate import Demonstrator, Replay
from opd.tasks.judge import Judge
from opd.text.template import clock_of
from opd.text.turn_end import turn_end

_LOOKED_AT = 64


def sft(config: SftConfig) -> Mapping[tuple[str, str], Cell]:
    """Fine-tune a student on the reference answers of its tasks and write it to `output`/student.

    Returns its accuracy by task and split. The loss is the mean negative log-likelihood of the answers' tokens, end token
    included.
    """
    tasks = make_tasks(config.tasks, config.episodes)
    prompts = {name: {split: task.prompts(split) for split in SPLITS} for name, task in tasks.items()}
    for name, splits in prompts.items():
        if not splits["train"]:
            raise DataError(f"tasks.{name} has no training prompts")
    RunFolder.require_absent(config.output)
    started = config.started()
    student = build_student(started)
    config = started if clock_of(student.network.tokenizer) else config
    school = _School(student, tasks, config.episodes)
    for name, splits in prompts.items():
        school.require_learnable(tasks[name], splits["train"])
    folder = RunFolder.create(config.output, config)
    learner = EmbeddedLearner(
        student.network,
        adapter=student.adapter,
        objective=ObjectiveConfig(type="immediate", normalizer="token"),
        optimizer=config.optimizer,
        steps=config.steps,
        heads={},
        temperature=1.0,
        max_tokens=config.compute.max_tokens,
    )
    weights = {name: task.weight for name, task in config.tasks.items()}
    stream = PromptStream({t: splits["train"] for t, splits in prompts.items()}, weights, seed=config.seed)
    with ProgressLine(config.steps) as line:
        if note := school.turn_end.note:
            line.say(f"warning: where a turn of '{config.student}' ends: {note}")
        for step in range(1, config.steps + 1):
            batch = imitation_batch(school.demonstrate(stream.next(config.batch_size)))
            metrics = learner.forward_backward(batch) | learner.optim_step()
            plain = {name: value for name, value in values(metrics).items() if not name.startswith("kl/")}
            folder.append_metrics(step, plain)
            line.step(step, plain)
        with explain_io(folder.student):
            export(student, folder.student, dtype=config.save_dtype)
            draw_curves(read_metrics(folder.path), folder.path / "curves.png", title=str(Path(config.output)))
        return school.examine(config, prompts, line)


class _School:
    """A student's episodes with the solutions of its tasks, and without."""

    def __init__(self, student: Voice, tasks: Mapping[str, Task], episodes: EpisodesConfig) -> None:
        self._student = student
        self._tasks = tasks
        self._episodes = episodes
        network = student.network
        self.turn_end = turn_end(network.tokenizer, network.base.generation_config, who=f"model '{network.source}'")
        self._player = episode_player(network, episodes, lambda prompt: tasks[prompt.task].environment(prompt))
        self._told = episode_player(network, episodes, self._recorded)
        self._demonstrator = Demonstrator(
            self._told.chat, lambda prompt, messages: tasks[prompt.task].solution(prompt, messages)
        )

    def _recorded(self, prompt: Prompt) -> Environment | None:
        """What answers in a demonstration: a recorded one answers for itself."""
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
        """Raise DataError for the first prompt whose answer is missing or does not fit the context; of generated problems, whose
        solutions are generated too, only some are looked at."""
        limit = self._student.network.max_context
        for prompt in prompts if task.environment(prompts[0]) is None else prompts[:_LOOKED_AT]:
            tokens = max(len(r.token_ids) for r in self.demonstrate([prompt]))
            if limit is not None and tokens > limit:
                raise DataError(
                    f"prompt '{prompt.id}': {tokens} tokens with its answer exceed the model's context ({limit})"
                )

    def examine(
        self, config: SftConfig, prompts: Mapping[str, Mapping[str, Sequence[Prompt]]], line: ProgressLine
    ) -> dict[tuple[str, str], Cell]:
        """The student's own accuracy by task and split."""
        sampler = EmbeddedSampler(
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
                    line.say(
                        f"{name} {split}: {cell.accuracy:.3f} [{low:.3f}, {high:.3f}] correct of {cell.verified}{faults}"
                    )
        return found
