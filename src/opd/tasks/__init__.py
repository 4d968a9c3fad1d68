"""Prompts and where outcomes come from."""

from collections.abc import Callable, Mapping
from typing import TypeAlias, assert_never

from opd.config import FileTask, ReasoningGymTask, TaskConfig
from opd.records import Prompt
from opd.roles import Task

Reward: TypeAlias = Callable[[Prompt, str], float | None]


def make_tasks(configs: Mapping[str, TaskConfig]) -> dict[str, Task]:
    """The tasks of a recipe by name, prompts not yet read."""
    from opd.tasks.files import PromptFile
    from opd.tasks.gym import ReasoningGym

    tasks: dict[str, Task] = {}
    for name, config in configs.items():
        match config:
            case FileTask():
                tasks[name] = PromptFile(name, config)
            case ReasoningGymTask():
                tasks[name] = ReasoningGym(name, config)
            case _:
                assert_never(config)
    return tasks
