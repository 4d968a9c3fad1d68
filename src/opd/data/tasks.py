"""Prompts and where rewards come from."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from opd.config import EpisodesConfig, FileTask, PythonTask, ReasoningGymTask, TaskConfig, TextArenaTask, ToolTask
from opd.errors import DataError
from opd.records import Prompt
from opd.roles import Task

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PythonPrompts:
    """Prompts that were passed as Python objects: iterables of records (`opd.data.files.read_records`)."""

    train: Iterable[Any]
    held_out: Iterable[Any] | None = None


def make_tasks(
    configs: Mapping[str, TaskConfig], limits: EpisodesConfig | None = None, passed: PythonPrompts | None = None
) -> dict[str, Task]:
    """The tasks of a recipe by name, prompts not yet read. passed: the prompts of its task of type "python".

    Raises DataError when the recipe has such a task and no prompts are passed.
    """
    from opd.data.files import PassedRecords, PromptFile
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
                tasks[name] = PassedRecords(name, config, passed.train, passed.held_out)
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
    """The prompts of each task and split. Raises DataError for one that no student could be given, and for a task without any."""
    from opd.data.conversations import check_prompt

    found: dict[str, dict[str, list[Prompt]]] = {}
    for name, task in tasks.items():
        found[name] = {split: task.prompts(split) for split in SPLITS}
        if not found[name]["train"]:
            raise DataError(f"tasks.{name} has no training prompts")
        for split in SPLITS:
            for prompt in found[name][split]:
                check_prompt(prompt, f"prompt '{prompt.id}'")
    return found
