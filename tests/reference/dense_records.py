"""The plain records of the dense reference: what was sampled, and what becomes of each action."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One part of an episode. tokens: all ids; actions: the places of those that the student sampled, in order; turns: [start, end)
    of its turns; flags: [start, end) of its format errors; sampled: the sampler's log-probability of each action; kind: how it was
    scored ("whole" distributions, the "sampled" token, "named" tokens, "chunks", or "none"); chunks: of each action; named: the
    teacher's log-probabilities of a few ids before each action."""

    prompt: str
    teacher: str
    sample: int
    part: int
    tokens: tuple[int, ...]
    actions: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    flags: tuple[tuple[int, int], ...]
    reward: float | None
    sampled: tuple[float, ...]
    kind: str = "whole"
    failed: bool = False
    chunks: tuple[int, ...] = ()
    named: tuple[Mapping[int, float], ...] = ()

    @property
    def targets(self) -> Tensor:
        return torch.tensor([self.tokens[place] for place in self.actions])


@dataclass(eq=False)
class Action:
    """One action of an episode; `t` is its index in the whole episode."""

    row: int
    k: int
    t: int
    turn: int
    flagged: bool
    scored: bool
    chunk: int
    cur: float = 0.0
    sampled: float = 0.0
    logq: float = 0.0
    kl: float = math.nan
    best: float = math.nan
    advantage: float = 0.0
    baseline: float = 0.0
    distilled: bool = False
    judged: bool = False
    weight: float = 1.0
    pull: float = 0.0


@dataclass(eq=False)
class Episode:
    """All parts that were sampled, in order; `used` are the actions of those that train."""

    key: tuple[str, str, int]
    rows: list[int]
    actions: list[Action] = field(default_factory=list)
    used: list[Action] = field(default_factory=list)
    verdict: float | None = None
    reward: float = 0.0

    @property
    def seen(self) -> list[Action]:
        """The actions of the parts that have a score or that a reward acts on; others say of the episode alone what it is."""
        rows = {a.row for a in self.used if a.scored or a.judged}
        return [a for a in self.used if a.row in rows]

    @property
    def scored(self) -> list[Action]:
        return [a for a in self.used if a.scored]
