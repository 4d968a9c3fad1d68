"""The gym of hacks written out: every response, and the expected gradient by plain loops."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from math import log, prod
from typing import TypeAlias

import torch
from torch import Tensor

from opd_theory import hack_gym
from opd_theory.hack_claims import ARMS
from opd_theory.hack_gym import PENALTY, Arm, Hack

SMALL = {
    "quick answer": lambda: hack_gym.quick_answer(steps=2),
    "attractor": lambda: hack_gym.attractor(steps=2, length=2, chance=0.1),
    "loop": lambda: hack_gym.loop(steps=3, repeat=0.8),
    "early end": lambda: hack_gym.early_end(steps=2),
    "parser exploit": lambda: hack_gym.parser_exploit(steps=2),
}


def shares(hack: Hack, table: Tensor) -> dict[str, list[float]]:
    """pi(.|s) of every state."""
    p = torch.softmax(table, -1).tolist()
    return {name: p[hack.rows.index(state.row)] for name, state in hack.states.items()}


Path: TypeAlias = list[tuple[str, int]]  # the (state, action) pairs of a response


def ways(hack: Hack, name: str) -> Iterator[tuple[Path, str]]:
    """Every response from a state on, written anew."""
    if name in hack.ends:
        yield [], name
        return
    state = hack.states[name]
    for action in range(1 if state.fixed else len(state.after)):
        for path, end in ways(hack, state.after[action]):
            yield [(name, action), *path], end


@dataclass(frozen=True)
class WrittenOut:
    """Formulas of docs/concepts/objectives.md for one student, a response at a time; p: pi(.|s) of every state."""

    hack: Hack
    arm: Arm
    p: dict[str, list[float]]

    def ratio(self, name: str, action: int) -> float:
        return log(self.hack.states[name].teacher[action]) - log(self.p[name][action])

    def kl(self, name: str) -> float:
        return -sum(x * self.ratio(name, a) for a, x in enumerate(self.p[name]))

    def advantage(self, path: Path, t: int) -> float:
        """Of the distillation term at step t, before a leave-one-out baseline and the mask."""
        (name, action), later, discount = path[t], path[t + 1 :], self.arm.discount
        if self.arm.distillation in ("none", "exact"):
            return 0.0
        total = self.ratio(name, action) + (self.kl(name) if self.arm.baseline == "kl" else 0.0)
        if self.arm.distillation == "to_go":
            total += sum(discount ** (i + 1) * self.ratio(*step) for i, step in enumerate(later))
        if self.arm.distillation == "kl_to_go":
            total -= sum(discount ** (i + 1) * self.kl(state) for i, (state, _) in enumerate(later))
        return total

    def keeps(self, end: str) -> bool:
        return not (self.arm.masked and self.hack.ends[end].malformed)

    def paid(self, end: str) -> float:
        return PENALTY if self.arm.penalised and self.hack.ends[end].malformed else self.hack.ends[end].paid

    def chance(self, path: Path) -> float:
        return prod(self.p[name][action] for name, action in path)

    def counted(self, path: Path) -> float:
        return {"trajectory": 1.0, "token": float(len(path)), "constant": 0.0}[self.arm.normalizer]

    def normalizers(self) -> tuple[float, float]:
        """What is kept, and everything, of a response in the mean."""
        if self.arm.normalizer == "constant":
            return 1.0, 1.0
        every = [found for prompt in self.hack.prompts for found in ways(self.hack, prompt)]
        weights = [self.chance(path) * self.counted(path) / len(self.hack.prompts) for path, _ in every]
        kept = sum(w for w, (_, end) in zip(weights, every, strict=True) if self.keeps(end))
        return kept, sum(weights)

    def slopes(self, path: Path, end: str, others: list[Path], mean: float) -> Iterator[tuple[str, list[float]]]:
        """(row, slope of each logit) at every step of a response in a group with `others`; mean: of the reward."""
        kept, everything = self.normalizers()
        for t, (name, action) in enumerate(path):
            baseline = [self.advantage(other, t) for other in others if len(other) > t]
            total = self.advantage(path, t) - (sum(baseline) / len(baseline) if baseline else 0.0)
            total = self.keeps(end) * total / kept + self.arm.reward_coef * (self.paid(end) - mean) / everything
            pull = self.keeps(end) * (self.arm.distillation == "exact") / kept
            yield (
                self.hack.states[name].row,
                [
                    total * ((a == action) - x) + pull * x * (self.ratio(name, a) + self.kl(name))
                    for a, x in enumerate(self.p[name])
                ],
            )


def written_out(hack: Hack, arm: Arm, table: Tensor) -> Tensor:
    """The expected gradient by loops over prompts, groups of samples, steps and actions."""
    each = WrittenOut(hack, arm, shares(hack, table))
    found = torch.zeros_like(table)
    for prompt in hack.prompts:
        responses = [(path, end, each.chance(path)) for path, end in ways(hack, prompt)]
        mean = sum(chance * each.paid(end) for _, end, chance in responses)
        for group in itertools.product(responses, repeat=arm.group_size if arm.baseline == "leave_one_out" else 1):
            weight = prod(chance for _, _, chance in group) / len(hack.prompts)
            (path, end, _), others = group[0], [other for other, _, _ in group[1:]]
            for row, slopes in each.slopes(path, end, others, mean):
                found[hack.rows.index(row)] += weight * torch.tensor(slopes, dtype=torch.float64)
    return found * hack.learns


WRITTEN_OUT = {
    **ARMS,
    "to-go, discount 0.7, mask": Arm("to_go", 0.7, masked=True),
    "KL-to-go, mask": Arm("kl_to_go", 0.7, masked=True),
    "immediate": Arm("immediate"),
    "penalised reward": Arm("none", reward_coef=0.5, penalised=True),
    "to-go, mask, reward, by token": Arm("to_go", 1.0, masked=True, reward_coef=0.5, normalizer="token"),
    "exact, mask, reward, by token": Arm("exact", masked=True, reward_coef=0.5, normalizer="token"),
    "immediate, mask, reward, constant": Arm("immediate", masked=True, reward_coef=0.5, normalizer="constant"),
}
