"""Prompts and where outcomes come from."""

from collections.abc import Mapping
from typing import assert_never

from opd.config import EpisodesConfig, FileTask, ReasoningGymTask, TaskConfig, TextArenaTask, ToolTask
from opd.roles import Task


def make_tasks(configs: Mapping[str, TaskConfig], limits: EpisodesConfig | None = None) -> dict[str, Task]:
    """The tasks of a recipe by name, prompts not yet read."""
    from opd.tasks.files import PromptFile
    from opd.tasks.gym import ReasoningGym
    from opd.tasks.textarena import TextArena
    from opd.tasks.tool_problems import ToolProblems

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
