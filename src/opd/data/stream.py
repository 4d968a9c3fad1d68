"""The order in which prompts are visited: shuffled by seed, balanced over tasks, continued from a cursor."""

from collections.abc import Mapping, Sequence

import torch

from opd.records import Prompt
from opd.roles import generator_of


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
