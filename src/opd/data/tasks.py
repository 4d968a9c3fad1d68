"""What the tasks of a recipe give to a run: prompts, rewards and environments."""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

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
from opd.roles import Environment, Task

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PythonPrompts:
    """Prompts that were passed as Python objects: iterables of records (`opd.data.read_prompts_from`)."""

    train: Iterable[Any]
    held_out: Iterable[Any] | None = None


class _Records:
    """What tasks of records have in common: verifiers compare with the answers, and there is no environment."""

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
    """What a recipe's tasks give: prompts by task and split, the reward of a response and another grader's, environments, and
    the tasks whose environments' rewards the reward and the grader take the place of; own_code: reward and grade are a function of
    the user's; own_environment: so are the environments."""

    prompts: PromptSets
    reward: Reward
    grade: Reward
    make_environment: MakeEnvironment
    own_reward: frozenset[str] = frozenset()
    own_environment: bool = False
    own_grade: frozenset[str] = frozenset()
    own_code: bool = False

    def judge(self, config: Config, tokenizer: Any) -> Judge:
        """Rewards and format errors of rollouts that were sampled with this tokenizer."""
        return Judge(
            self.reward,
            {name: task.checks for name, task in config.tasks.items()},
            tokenizer=tokenizer,
            tool_syntax=config.episodes.tool_syntax,
            own=self.own_reward,
            own_code=self.own_code,
        )

    def grader(self) -> Judge:
        """Rewards by another grader, where there is one."""
        return Judge(self.grade, own=self.own_grade, own_code=self.own_code)


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
    for splits in prompts.values():
        for split in SPLITS:
            require_teachers(splits[split], config.teachers)

    every = [p for splits in prompts.values() for split in SPLITS for p in splits[split]]
    inner = {part for teacher in config.teachers.values() for part in teacher.weights or ()}
    for name in config.teachers:
        if name not in inner | {config.objective.reference} and not any(p.teacher == name for p in every):
            raise DataError(f"teacher '{name}' of [teachers] is named by no prompt; remove it, or name it in a task")
    _require_cross_tokenizer_reference(config, every)
    _require_single_teachers(config, every)
    _require_measurable(config, prompts, given=reward is not None or make_environment is not None)
    if config.reward.coef > 0 and reward is None and make_environment is None and not _verdicts(config, every):
        raise DataError(
            "reward.coef > 0 needs verified rewards, and no prompt has an answer and a verifier; add them or pass a reward"
        )

    def verify(prompt: Prompt, response: str) -> float | None:
        return tasks[prompt.task].reward(prompt, response)

    def environment(prompt: Prompt) -> Environment | None:
        return tasks[prompt.task].environment(prompt)

    def grade(prompt: Prompt, response: str) -> float | None:
        return tasks[prompt.task].grade(prompt, response)

    every_task = frozenset(config.tasks)
    return TaskData(
        prompts,
        reward or verify,
        reward or grade,
        make_environment or environment,
        own_reward=every_task if reward is not None else frozenset(),
        own_environment=make_environment is not None,
        own_grade=every_task
        if reward is not None
        else frozenset(n for n, t in config.tasks.items() if getattr(t, "grader", None)),
        own_code=reward is not None,
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
    """Whether the task itself says what a response to this prompt is worth."""
    return not isinstance(task, FileTask | PythonTask) or (prompt.answer is not None and task.verifier != "none")


def has_grade(prompt: Prompt, task: TaskConfig) -> bool:
    """Whether the task says what a response is worth in the held-out reward: its grader where it has one, else its verifier."""
    graded = isinstance(task, FileTask | PythonTask) and task.grader is not None and prompt.answer is not None
    return graded or has_verdict(prompt, task)


def _with_default_teacher(config: Config) -> dict[str, TaskConfig]:
    """The tasks, where the recipe's only teacher is that of records which name none."""
    if len(config.teachers) > 1:
        return dict(config.tasks)
    (only,) = config.teachers
    return {
        name: task if task.teacher is not None else task.model_copy(update={"teacher": only})
        for name, task in config.tasks.items()
    }


def require_callable(name: str, function: object, arguments: str) -> None:
    """Raise DataError for what cannot be called as it will be."""
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


def _require_measurable(config: Config, prompts: PromptSets, *, given: bool) -> None:
    """Raise DataError for an evaluation on the way that has nothing to measure."""
    if not config.evaluation.every:
        return
    every = f"evaluation.every = {config.evaluation.every} measures nothing: no task has held-out prompts"
    held_out = {name: splits["held_out"] for name, splits in prompts.items()}
    if not any(held_out.values()):
        raise DataError(f"{every}; set held_out_path or held_out_size of a task, or evaluation.every = 0")
    if not given and not any(has_grade(p, config.tasks[name]) for name, found in held_out.items() for p in found):
        raise DataError(f"{every} with an answer and a verifier; add them, or set evaluation.every = 0")


def _verdicts(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Whether anything says what a response is worth: a verifier, an environment, or a check for format errors."""
    return any(t.checks.rules for t in config.tasks.values()) or any(
        has_verdict(p, config.tasks[p.task]) for p in prompts
    )


def _require_single_teachers(config: Config, prompts: Sequence[Prompt]) -> None:
    """A warm-up learns what teachers do alone: refuse one with a prompt whose teacher is a mixture."""
    for prompt in prompts if config.warmup.steps else ():
        if config.teachers[prompt.teacher].weights:
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is several at once, none of whom answers alone, and "
                f"warmup.steps = {config.warmup.steps} learns from answers; leave it at 0"
            )


def _require_cross_tokenizer_reference(config: Config, prompts: Sequence[Prompt]) -> None:
    """Away from a teacher toward itself is nowhere: refuse a reference that is the teacher of a prompt."""
    reference = config.objective.reference
    for prompt in prompts:
        parts = config.teachers[prompt.teacher].weights or {prompt.teacher: 1.0}
        if reference in parts:
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is the reference of objective.extrapolation, so there is "
                "nothing to extrapolate; choose another reference"
            )
