"""Prompts and where outcomes come from."""

from collections.abc import Callable, Mapping
from typing import TypeAlias, assert_never

from opd.config import FileTask, ReasoningGymTask, TaskConfig
from opd.errors import DataError
from opd.records import Prompt
from opd.roles import Task

Reward: TypeAlias = Callable[[Prompt, str], float | None]


def checked_reward(reward: Reward) -> Reward:
    """The same reward as a plain float or None. Raises DataError naming the prompt when it is no number in [0, 1]."""

    def checked(prompt: Prompt, response: str) -> float | None:
        found = reward(prompt, response)
        if found is None:
            return None
        value = float(found)
        if not 0.0 <= value <= 1.0:
            raise DataError(
                f"prompt '{prompt.id}': the reward of a response is {value}, expected a number in [0, 1] or None"
            )
        return value

    return checked


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
