"""Toy runs from end to end: what makes them, what they returned, and what their callables saw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from factories import save_adapter, toy_recipe

import opd
from opd.loop import StepReport
from opd.records import Prompt


@dataclass(frozen=True)
class Run:
    """A finished run, what it returned, and what its callables saw."""

    tree: dict[str, Any]
    result: opd.Result
    reports: list[StepReport]
    rewarded: list[tuple[Prompt, str]]

    @property
    def path(self) -> Path:
        return self.result.run


def reward_of(prompt: Prompt, response: str) -> float:
    """Some reward that differs between samples."""
    return float(crc32(response.encode()) % 2)


def other_words(path: str) -> None:
    """Another text for every prompt of a file, so that two teachers do not pull apart what one text is answered with."""
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text.replace("say ", "Now for something else: "), encoding="utf-8")


def train(tree: dict[str, Any]) -> Run:
    reports: list[StepReport] = []
    rewarded: list[tuple[Prompt, str]] = []

    def reward(prompt: Prompt, response: str) -> float:
        rewarded.append((prompt, response))
        return reward_of(prompt, response)

    result = opd.train(opd.parse_config(tree), reward=reward, callbacks=[reports.append])
    assert result.finished
    assert result.steps_done == tree["steps"]
    return Run(tree, result, reports, rewarded)


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of two tasks, one teacher an adapter, whose random numbers, order, optimizer and schedule all matter."""
    tree = toy_recipe(folder, evaluation={"num_prompts": 2}, **changes)
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    return tree
