"""The base of tasks that generate their prompts, in this package or beside the library that makes them."""

from abc import ABC, abstractmethod

from opd.config import GeneratedTask
from opd.records import Prompt


class GeneratedPrompts(ABC):
    """The base of tasks of generated prompts: `draw` makes all prompts, and the first of them are held out."""

    def __init__(self, name: str, config: GeneratedTask) -> None:
        self.name = name
        self._config = config
        self._drawn: list[Prompt] = []

    @abstractmethod
    def draw(self, count: int) -> list[Prompt]:
        """So many distinct prompts, a function of the task's seed."""

    def prompts(self, split: str) -> list[Prompt]:
        held_out = self._config.held_out_size
        self._drawn = self._drawn or self.draw(held_out + self._config.size)
        return self._drawn[:held_out] if split == "held_out" else self._drawn[held_out:]

    @abstractmethod
    def reward(self, prompt: Prompt, response: str) -> float | None: ...

    def grade(self, prompt: Prompt, response: str) -> float | None:
        return self.reward(prompt, response)
