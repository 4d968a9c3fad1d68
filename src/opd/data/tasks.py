"""Tasks: where prompts and rewards come from. A new kind is a class of `opd.config`, a class as `PromptFile`, and a case below."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from opd.config import EpisodesConfig, FileTask, PythonTask, ReasoningGymTask, TaskConfig, TextArenaTask, ToolTask
from opd.data.conversations import check_prompt
from opd.data.prompts import read_prompts, read_prompts_from
from opd.episodes.demonstrations import recorded_turn
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.verifiers import VERIFIERS
from opd.roles import Task

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
