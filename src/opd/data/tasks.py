"""Tasks: where prompts and rewards come from. A new kind is a class of `opd.config`, a class as `PromptFile`, and a case below."""

from collections.abc import Mapping, Sequence
from typing import assert_never

from opd.config import EpisodesConfig, FileTask, ReasoningGymTask, TaskConfig, TextArenaTask, ToolTask
from opd.data.conversations import check_prompt
from opd.data.prompts import read_prompts
from opd.episodes.demonstrations import recorded_turn
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.verifiers import VERIFIERS
from opd.roles import Task

SPLITS = ("train", "held_out")


class PromptFile:
    """A task that reads one file for each split; ids are unique within a file."""

    def __init__(self, name: str, config: FileTask) -> None:
        self.name = name
        self._config = config
        self._verify = VERIFIERS[config.verifier]
        self._grade = VERIFIERS[config.grader or config.verifier]

    def prompts(self, split: str) -> list[Prompt]:
        config = self._config
        path, key = (config.path, "path") if split == "train" else (config.held_out_path, "held_out_path")
        if path is None:
            return []
        verifiers = dict.fromkeys((config.verifier, config.grader or config.verifier))
        return read_prompts(
            path,
            task=self.name,
            teacher=config.teacher,
            columns=config.columns,
            completion=config.completion,
            verifiers=tuple(verifiers),
            key=key,
        )

    def reward(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._verify(response, prompt.answer)

    def grade(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._grade(response, prompt.answer)

    def environment(self, prompt: Prompt) -> None:
        """None: a file has no environment. Prompts with tools need the user's own for training."""

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        if not prompt.demonstration:
            return prompt.answer
        return recorded_turn(prompt.demonstration, len(messages) - len(prompt.messages))


def make_tasks(configs: Mapping[str, TaskConfig], limits: EpisodesConfig | None = None) -> dict[str, Task]:
    """The tasks of a recipe by name, prompts not yet read."""
    from opd.episodes.tool_problems import ToolProblems
    from opd.integrations.reasoning_gym import ReasoningGym
    from opd.integrations.textarena import TextArena

    tasks: dict[str, Task] = {}
    for name, config in configs.items():
        match config:
            case FileTask():
                tasks[name] = PromptFile(name, config)
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
