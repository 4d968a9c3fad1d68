"""The tasks of a recipe: their prompts, rewards and environments, and the order of prompts.

A new kind of task is a class of `opd.config`, a class here or beside its library, and a case of `make_tasks`. The teacher of a
prompt, T(x), is that of its record, else that of its task, else the only one (`_with_default_teacher`).
"""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

import torch

from opd.config import (
    Config,
    EpisodesConfig,
    FileTask,
    PythonTask,
    ReasoningGymTask,
    TaskConfig,
    TextArenaTask,
    ToolTask,
    nearest,
)
from opd.data.conversations import check_prompt
from opd.data.prompts import read_prompts, read_prompts_from
from opd.episodes.player import MakeEnvironment, recorded_turn
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.judge import Judge
from opd.rewards.reward import Reward
from opd.rewards.verifiers import VERIFIERS
from opd.roles import Task, generator_of

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PythonPrompts:
    """Prompts that were passed as Python objects: iterables of records (`opd.data.read_prompts_from`)."""

    train: Iterable[Any]
    held_out: Iterable[Any] | None = None


class _Records:
    """The base of tasks of records: verifiers compare with the answers, and there is no environment."""

    def __init__(self, name: str, config: FileTask | PythonTask) -> None:
        self.name = name
        self._config = config
        self._verify = VERIFIERS[config.verifier]
        self._grade = VERIFIERS[config.grader or config.verifier]

    @property
    def _reading(self) -> dict[str, Any]:
        config = self._config
        return {
            "task": self.name,
            "teacher": config.teacher,
            "columns": config.columns,
            "completion": config.completion,
            "verifiers": tuple(dict.fromkeys((config.verifier, config.grader or config.verifier))),
        }

    def reward(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._verify(response, prompt.answer)

    def grade(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._grade(response, prompt.answer)

    def environment(self, prompt: Prompt) -> None:
        """None: records have no environment. Prompts with tools need the user's own for training."""

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        if not prompt.demonstration:
            return prompt.answer
        return recorded_turn(prompt.demonstration, len(messages) - len(prompt.messages))


class PromptFile(_Records):
    """A task that reads one file for each split; ids are unique within a file."""

    _config: FileTask

    def prompts(self, split: str) -> list[Prompt]:
        config = self._config
        path, key = (config.path, "path") if split == "train" else (config.held_out_path, "held_out_path")
        return [] if path is None else read_prompts(path, key=key, **self._reading)


class PassedRecords(_Records):
    """A task whose records were passed as Python objects."""

    def __init__(self, name: str, config: PythonTask, passed: PythonPrompts) -> None:
        super().__init__(name, config)
        self._passed = passed

    def prompts(self, split: str) -> list[Prompt]:
        records = self._passed.train if split == "train" else self._passed.held_out
        return [] if records is None else read_prompts_from(records, **self._reading)


def make_tasks(
    configs: Mapping[str, TaskConfig], limits: EpisodesConfig | None = None, passed: PythonPrompts | None = None
) -> dict[str, Task]:
    """The tasks of a recipe by name, prompts not yet read. passed: the prompts of its task of type "python".

    Raises DataError when the recipe has such a task and no prompts are passed.
    """
    from opd.episodes.tool_problems import ToolProblems
    from opd.integrations.reasoning_gym import ReasoningGym
    from opd.integrations.textarena import TextArena

    tasks: dict[str, Task] = {}
    for name, config in configs.items():
        match config:
            case FileTask():
                tasks[name] = PromptFile(name, config)
            case PythonTask():
                if passed is None:
                    raise DataError(
                        f"tasks.{name} has type = 'python': pass its prompts to opd.Trainer(..., prompts=...)"
                    )
                tasks[name] = PassedRecords(name, config, passed)
            case ReasoningGymTask():
                tasks[name] = ReasoningGym(name, config)
            case ToolTask():
                tasks[name] = ToolProblems(name, config, limits or EpisodesConfig())
            case TextArenaTask():
                tasks[name] = TextArena(name, config)
            case _:
                assert_never(config)
    return tasks


def read_splits(tasks: Mapping[str, Task]) -> dict[str, dict[str, list[Prompt]]]:
    """The prompts of each task and split. Raises DataError for an unusable prompt and for an empty task."""
    found: dict[str, dict[str, list[Prompt]]] = {}
    for name, task in tasks.items():
        found[name] = {split: task.prompts(split) for split in SPLITS}
        if not found[name]["train"]:
            raise DataError(f"tasks.{name} has no training prompts")
        for split in SPLITS:
            for prompt in found[name][split]:
                check_prompt(prompt, f"prompt '{prompt.id}'")
    return found


PromptSets: TypeAlias = Mapping[str, Mapping[str, Sequence[Prompt]]]
"""Prompts by task and split."""


@dataclass(frozen=True)
class TaskData:
    """The prompts, rewards and environments of the tasks of a recipe.

    reward, grade: of a response; the grade is that of the held-out reward. own_reward, own_grade: the tasks in which they take the
    place of a reward that an environment gave; own_reward is empty unless the user passed a reward function. own_environment:
    whether the environments are the user's.
    """

    prompts: PromptSets
    reward: Reward
    grade: Reward
    make_environment: MakeEnvironment
    own_reward: frozenset[str] = frozenset()
    own_environment: bool = False
    own_grade: frozenset[str] = frozenset()

    def judge(self, config: Config, tokenizer: Any) -> Judge:
        """Rewards and format errors of rollouts that were sampled with this tokenizer."""
        return Judge(
            self.reward,
            {name: task.checks for name, task in config.tasks.items()},
            tokenizer=tokenizer,
            tool_syntax=config.episodes.tool_syntax,
            own=self.own_reward,
            own_code=bool(self.own_reward),
        )

    def grader(self) -> Judge:
        """Held-out rewards."""
        return Judge(self.grade, own=self.own_grade, own_code=bool(self.own_reward))


def read_tasks(
    config: Config,
    reward: Reward | None,
    make_environment: MakeEnvironment | None = None,
    *,
    passed: PythonPrompts | None = None,
) -> TaskData:
    """Everything that the tasks of a recipe give; `reward` and `make_environment` take the place of the tasks' own. passed: the
    prompts of a task of type "python".

    Raises DataError for a bad record.
    """
    require_callable("reward", reward, "prompt, response")
    require_callable("environment", make_environment, "prompt")
    if inspect.iscoroutinefunction(make_environment):
        raise DataError(
            "environment is a coroutine function, expected a plain one; its environments' reset and step may be async"
        )
    tasks = make_tasks(_with_default_teacher(config), config.episodes, passed)
    prompts = read_splits(tasks)
    every = [p for splits in prompts.values() for split in SPLITS for p in splits[split]]
    require_teachers(every, config.teachers)
    _require_usable_teachers(config, every)
    given = reward is not None or make_environment is not None
    _require_measurable(config, prompts, given=given)
    if not given:
        _require_verdicts(config, every)
    graded = [name for name, task in config.tasks.items() if getattr(task, "grader", None)]
    return TaskData(
        prompts,
        reward or (lambda prompt, response: tasks[prompt.task].reward(prompt, response)),
        reward or (lambda prompt, response: tasks[prompt.task].grade(prompt, response)),
        make_environment or (lambda prompt: tasks[prompt.task].environment(prompt)),
        own_reward=frozenset(config.tasks if reward is not None else ()),
        own_environment=make_environment is not None,
        own_grade=frozenset(config.tasks if reward is not None else graded),
    )


def require_teachers(prompts: Sequence[Prompt], teachers: Collection[str]) -> None:
    """Raise DataError for the first prompt whose teacher is not in the recipe."""
    for prompt in prompts:
        if prompt.teacher not in teachers:
            hint = nearest(prompt.teacher, list(teachers))
            raise DataError(
                f"prompt '{prompt.id}': teacher '{prompt.teacher}' is not in [teachers] ({', '.join(sorted(teachers))}){hint}"
            )


def has_verdict(prompt: Prompt, task: TaskConfig) -> bool:
    """Whether the task itself gives a reward for a response to this prompt."""
    return not isinstance(task, FileTask | PythonTask) or (prompt.answer is not None and task.verifier != "none")


def require_callable(name: str, function: object, arguments: str) -> None:
    """Raise DataError for an object that cannot be called with these arguments."""
    if function is None:
        return
    if not callable(function):
        raise DataError(f"{name} is {type(function).__name__}, expected a function of ({arguments})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise DataError(f"{name} takes {signature}, expected ({arguments}): {error}") from None


def _with_default_teacher(config: Config) -> dict[str, TaskConfig]:
    """The tasks of the recipe. Where it has one teacher, that is the teacher of records that name none."""
    only = next(iter(config.teachers)) if len(config.teachers) == 1 else None
    return {
        name: task if only is None or task.teacher is not None else task.model_copy(update={"teacher": only})
        for name, task in config.tasks.items()
    }


def _require_usable_teachers(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for a teacher without prompts, and for a prompt's teacher that an extrapolation or a warm-up cannot use."""
    reference = config.objective.reference
    parts = {part for teacher in config.teachers.values() for part in teacher.weights or ()}
    used = {p.teacher for p in prompts} | parts | {reference}
    for name in config.teachers:
        if name not in used:
            raise DataError(f"teacher '{name}' of [teachers] is named by no prompt; remove it, or name it in a task")
    for prompt in prompts:
        weights = config.teachers[prompt.teacher].weights
        if reference in (weights or (prompt.teacher,)):
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is the reference of objective.extrapolation, so there is "
                "nothing to extrapolate; choose another reference"
            )
        if weights and config.warmup.steps:
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is a mixture of teachers, which cannot generate, and "
                f"warmup.steps = {config.warmup.steps} learns from responses of teachers; leave it at 0"
            )


def _require_verdicts(config: Config, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for reward.coef > 0 where no verifier, no environment and no check for format errors gives a reward."""
    checked = any(task.checks.rules for task in config.tasks.values())
    if config.reward.coef > 0 and not checked and not any(has_verdict(p, config.tasks[p.task]) for p in prompts):
        raise DataError(
            "reward.coef > 0 needs verified rewards, and no prompt has an answer and a verifier; add them or pass a reward"
        )


def _require_measurable(config: Config, prompts: PromptSets, *, given: bool) -> None:
    """Raise DataError where evaluation.every has nothing to measure. given: the user passed a reward or environments."""
    if not config.evaluation.every:
        return
    every = f"evaluation.every = {config.evaluation.every} measures nothing: no task has held-out prompts"
    held_out = [(p, config.tasks[name]) for name, splits in prompts.items() for p in splits["held_out"]]
    if not held_out:
        raise DataError(f"{every}; set held_out_path or held_out_size of a task, or evaluation.every = 0")
    graded = (has_verdict(p, task) or (p.answer is not None and getattr(task, "grader", None)) for p, task in held_out)
    if not given and not any(graded):
        raise DataError(f"{every} with an answer and a verifier; add them, or set evaluation.every = 0")


class PromptStream:
    """An endless stream of prompts, a pure function of (seed, cursor).

    Each task is visited in its own order, which is shuffled again every epoch. Tasks take turns in proportion to their weights, so
    that every batch is as balanced as its size allows.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float], *, seed: int) -> None:
        assert prompts
        assert all(prompts.values())
        self._prompts = {name: list(items) for name, items in prompts.items()}
        self._weights = {name: weights[name] / sum(weights[n] for n in prompts) for name in prompts}
        self._seed = seed
        self.cursor: dict[str, int] = dict.fromkeys(self._prompts, 0)
        self._orders: dict[tuple[str, int], list[int]] = {}

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a prompt may occur twice in a batch in which the epoch of its task ends."""
        return [self._draw(self._due()) for _ in range(count)]

    def _due(self) -> str:
        """The task that is furthest behind its weight."""
        drawn = sum(self.cursor.values()) + 1
        return max(self._prompts, key=lambda name: self._weights[name] * drawn - self.cursor[name])

    def _draw(self, name: str) -> Prompt:
        items = self._prompts[name]
        epoch, index = divmod(self.cursor[name], len(items))
        self.cursor[name] += 1
        return items[self._order(name, epoch)[index]]

    def _order(self, name: str, epoch: int) -> list[int]:
        key = (name, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[0] != name}
            task = list(self._prompts).index(name)
            self._orders[key] = shuffled(len(self._prompts[name]), self._seed, task, epoch)
        return self._orders[key]


def shuffled(count: int, seed: int, task: int, epoch: int) -> list[int]:
    """A permutation of range(count) that is a function of the run's seed, the task's place and the epoch."""
    return torch.randperm(count, generator=generator_of(seed, "prompts", task, epoch)).tolist()
