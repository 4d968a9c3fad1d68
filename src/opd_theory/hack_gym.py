"""Five hacks of on-policy distillation as decision processes with absorbing ends, and where a student ends on each.

A state holds the teacher's distribution and what follows each action: a state, or an absorbing end with its reward. States
of one row look the same to the student. Every response is written in one of two contexts that the student cannot tell apart
and in which the teacher wants different words, so that a KL remains that no student can mend. Responses are enumerated: means
are exact, float64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from opd.objectives import baselines
from opd.objectives.advantages import immediate, kl_to_go, log_ratio_to_go, reward_advantages
from opd.objectives.losses import reinforce
from opd.objectives.reduce import Normalizer
from opd_theory.estimators import exact_gradients
from opd_theory.law_claims import settle
from opd_theory.tree import Policy, Problem, Tree

PENALTY = -1.0  # the explicit negative reward of a format error
_NEVER = -200.0  # the logit of what a fixed state's student never does: its exp is nothing beside any other number here


@dataclass(frozen=True)
class State:
    """`teacher` q(.|s); `after`, the state or end that each action leads to; `row` of the student's table that it reads.
    Where `fixed`, the student always takes action 0 and never learns."""

    teacher: tuple[float, ...]
    after: tuple[str, ...]
    row: str
    fixed: bool = False


@dataclass(frozen=True)
class End:
    """An absorbing end: the true reward and the one that the verifier pays, in [0, 1]; `malformed`: a format check flags the
    response; `hack`: it is the hack."""

    correct: float
    paid: float
    malformed: bool = False
    hack: bool = False


@dataclass(frozen=True)
class Arm:
    """An objective with its safeguards: A_t = keep(y) A_t^distillation / N_d + reward_coef A^reward(y) / N_o.

    normalizer: what N_d and N_o count, in the mean over very many responses: those that their part acts on (the kept ones,
    all), their tokens, or one number for both, as in training. masked: keep(y) is 0 for malformed responses. penalised: their
    reward is `PENALTY` whatever the verifier pays. A leave-one-out baseline is that of groups of `group_size` samples; masked
    ones count in it, as in training.
    """

    distillation: Literal["none", "exact", "immediate", "to_go", "kl_to_go"]
    discount: float = 0.0
    baseline: Literal["none", "kl", "leave_one_out"] = "none"
    group_size: int = 4
    masked: bool = False
    reward_coef: float = 0.0
    penalised: bool = False
    normalizer: Normalizer = "trajectory"


@dataclass(frozen=True)
class Figures:
    """Of a student on a hack: P(hack), the mean true and paid reward, and the OPD reward, -KL of a response in nats."""

    hack: float
    reward: float
    paid: float
    opd_reward: float


@dataclass(frozen=True)
class Hack:
    """A process that starts in `prompts`, equally likely, and its responses as a `Problem`; `reached` [responses] names their ends,
    `rows` the table's rows in order."""

    states: Mapping[str, State]
    ends: Mapping[str, End]
    prompts: tuple[str, ...]
    problem: Problem
    reached: tuple[str, ...]
    rows: tuple[str, ...]

    @cached_property
    def start(self) -> Tensor:
        """The table [rows, vocab] of a student fine-tuned on the teacher's responses: each row the mean of what the teacher does
        in its states, which both contexts visit alike. It hacks as often as the teacher."""
        table = []
        for row in self.rows:
            members = [s for s in self.states.values() if s.row == row]
            mean = torch.tensor([s.teacher for s in members], dtype=torch.float64).mean(0).log()
            always_first = torch.where(torch.arange(len(mean)) == 0, 0.0, _NEVER)
            table.append(always_first.double() if members[0].fixed else mean)
        return torch.stack(table)

    @cached_property
    def learns(self) -> Tensor:
        """[rows, 1] float: 0 for the rows of fixed states, else 1."""
        fixed = {s.row for s in self.states.values() if s.fixed}
        return torch.tensor([[float(row not in fixed)] for row in self.rows], dtype=torch.float64)

    @cached_property
    def malformed(self) -> Tensor:
        """[responses] bool."""
        return torch.tensor([self.ends[name].malformed for name in self.reached])

    @cached_property
    def marks(self) -> Tensor:
        """[responses, 3]: whether it is the hack, its true reward, its paid reward."""
        ends = [self.ends[name] for name in self.reached]
        return torch.tensor([[float(e.hack), e.correct, e.paid] for e in ends], dtype=torch.float64)

    def rewards(self, *, penalised: bool) -> Tensor:
        """The reward of each response as the objective sees it [responses]."""
        return torch.where(self.malformed, PENALTY, self.marks[:, 2]) if penalised else self.marks[:, 2]

    def measure(self, table: Tensor) -> Figures:
        """The exact figures of a student."""
        policy = self.problem.policy(table)
        hack, correct, paid = (policy.chances @ self.marks).tolist()
        return Figures(hack, correct, paid, float(policy.value))


def make_hack(states: Mapping[str, State], ends: Mapping[str, End], prompts: tuple[str, ...]) -> Hack:
    """Enumerate a process that starts in the states named by `prompts`, equally likely."""
    walks = [(x, *found) for x, prompt in enumerate(prompts) for found in _walks(states, prompt)]
    index = {name: i for i, name in enumerate(states)}
    here = torch.zeros(len(walks), max(len(path) for _, path, _ in walks), dtype=torch.long)
    actions, mask, steps = torch.zeros_like(here), torch.zeros_like(here, dtype=torch.bool), torch.zeros(len(states))
    for number, (_, path, _) in enumerate(walks):
        for t, (name, action) in enumerate(path):
            here[number, t], actions[number, t], mask[number, t] = index[name], action, True
            steps[index[name]] = t
    rows = tuple(dict.fromkeys(s.row for s in states.values()))
    teacher = torch.tensor([s.teacher for s in states.values()], dtype=torch.float64)
    tree = Tree(
        vocab=teacher.shape[1],
        horizon=here.shape[1],
        num_states=len(states),
        states=here,
        actions=actions,
        mask=mask,
        prompts=torch.tensor([x for x, _, _ in walks]),
        steps=steps.long(),
    )
    problem = Problem(tree, teacher.log(), torch.tensor([rows.index(s.row) for s in states.values()]))
    return Hack(states, ends, prompts, problem, tuple(end for _, _, end in walks), rows)


def _walks(states: Mapping[str, State], name: str) -> Iterator[tuple[tuple[tuple[str, int], ...], str]]:
    """(the (state, action) pairs, the end) of every way on from a state."""
    if name not in states:
        yield (), name
        return
    state = states[name]
    for action, after in enumerate(state.after[:1] if state.fixed else state.after):
        for path, end in _walks(states, after):
            yield ((name, action), *path), end


def _at(place: str, step: int, context: int) -> str:
    return f"{place} {step}, context {context}"


def _word(context: int, step: int, after: str, agreed: float, side: tuple[float, str] | None = None) -> State:
    """A choice between two words, the teacher's own with probability `agreed`; `side`: an action 0 that leads elsewhere, with
    the teacher's probability of it."""
    words = (agreed, 1 - agreed) if context == 0 else (1 - agreed, agreed)
    if side is None:
        return State(words, (after, after), f"word {step}")
    chance, into = side
    return State((chance, *((1 - chance) * w for w in words)), (into, after, after), f"word {step}")


def _text(steps: int, agreed: float, side: tuple[float, str] | None = None) -> dict[str, State]:
    """`steps` words in each context, and then the answer."""
    return {
        _at("word", step, c): _word(c, step, _at("word", step + 1, c) if step + 1 < steps else "answer", agreed, side)
        for c in (0, 1)
        for step in range(steps)
    }


_FIRST_WORDS = (_at("word", 0, 0), _at("word", 0, 1))


def quick_answer(*, steps: int = 5, agreed: float = 0.95, chance: float = 0.05) -> Hack:
    """(a) The teacher answers at once with probability `chance` and then is certain; else it works for `steps` words."""
    states = _text(steps, agreed)
    for c, first in enumerate(_FIRST_WORDS):
        states[f"prompt {c}"] = State((chance, 1 - chance), ("guess", first), "prompt")
    states["guess"] = State((0.999, 0.001), ("guessed", "guessed"), "guess", fixed=True)
    ends = {"guessed": End(0.1, 0.1, hack=True), "answer": End(0.9, 0.9)}
    return make_hack(states, ends, ("prompt 0", "prompt 1"))


def attractor(*, steps: int = 5, agreed: float = 0.98, chance: float = 0.003, length: int = 3) -> Hack:
    """(b) At each word the teacher breaks the format with probability `chance`; once broken, it knows each of `length` tokens."""
    states = _text(steps, agreed, (chance, "broken 0"))
    for i in range(length):
        after = f"broken {i + 1}" if i + 1 < length else "error"
        states[f"broken {i}"] = State((0.999, 0.0005, 0.0005), (after,) * 3, "broken", fixed=True)
    return make_hack(states, {"error": End(0.0, 0.0, malformed=True, hack=True), "answer": End(0.9, 0.9)}, _FIRST_WORDS)


def loop(*, steps: int = 5, agreed: float = 0.95, chance: float = 0.02, repeat: float = 0.99) -> Hack:
    """(c) At each word the teacher begins to repeat itself with probability `chance`, and then goes on so with `repeat`; a
    response of `steps` tokens is cut. Student and teacher agree in the loop, which can be left for the text."""
    states: dict[str, State] = {}
    for c in (0, 1):
        for step in range(steps):
            on = _at("word", step + 1, c) if step + 1 < steps else "answer"
            again = _at("loop", step + 1, c) if step + 1 < steps else "cut"
            states[_at("word", step, c)] = _word(c, step, on, agreed, (chance, again))
            if step > 0:
                leave = (1 - repeat) / 2
                states[_at("loop", step, c)] = State((repeat, leave, leave), (again, on, on), f"loop {step}")
    return make_hack(states, {"cut": End(0.0, 0.0, malformed=True, hack=True), "answer": End(0.9, 0.9)}, _FIRST_WORDS)


def early_end(*, steps: int = 5, agreed: float = 0.95, chance: float = 0.02) -> Hack:
    """(d) At each word the teacher ends its turn with probability `chance`, without an answer."""
    states = _text(steps, agreed, (chance, "ended"))
    return make_hack(states, {"ended": End(0.0, 0.0, malformed=True, hack=True), "answer": End(0.9, 0.9)}, _FIRST_WORDS)


def parser_exploit(*, steps: int = 3, agreed: float = 0.95, chance: float = 0.01) -> Hack:
    """(e) At each word the teacher slips with probability `chance` into malformed text, for which the verifier wrongly pays."""
    states = _text(steps, agreed, (chance, "exploit"))
    ends = {"exploit": End(0.0, 1.0, malformed=True, hack=True), "answer": End(0.7, 0.7)}
    return make_hack(states, ends, _FIRST_WORDS)


def expected_gradient(hack: Hack, arm: Arm, policy: Policy) -> Tensor:
    """The step that the arm's losses take over very many responses of the student `policy`, [rows, vocab]; 0 in fixed rows."""
    keep = ~(hack.malformed & arm.masked)
    kept, everything = normalizers(hack, arm, policy)
    total = _distillation(arm, policy) * keep[:, None] / kept
    if arm.reward_coef > 0:
        reward = reward_advantages(hack.rewards(penalised=arm.penalised), policy.problem.tree.prompts, "none")[:, None]
        # The mean of the other samples of the prompt, which the leave-one-out baseline takes off, has this expectation.
        total = total + arm.reward_coef * (reward - _by_prompt(policy, reward)) / everything
    # The expectation: every response weighted by its probability.
    weighted = policy.chances[:, None] * total
    moved = policy.problem.policy(policy.table.detach().requires_grad_())
    loss = reinforce(moved.action_logprobs, weighted, policy.problem.tree.mask, divisor=1.0)
    found = -torch.autograd.grad(loss, moved.table)[0]
    if arm.distillation == "exact":
        found = found + ((policy.chances * keep) @ exact_gradients(policy)).reshape(found.shape) / kept
    return found * hack.learns


def normalizers(hack: Hack, arm: Arm, policy: Policy) -> tuple[float, float]:
    """What training divides the distillation part and the reward part by, for each response sampled."""
    if arm.normalizer == "constant":
        return 1.0, 1.0
    keep = (~(hack.malformed & arm.masked)).double()
    tree = policy.problem.tree
    counted = tree.mask.sum(-1).double() if arm.normalizer == "token" else tree.mask.any(-1).double()
    kept, everything = (float(policy.chances @ weights) for weights in (counted * keep, counted))
    return max(kept, 1e-300), everything


def _distillation(arm: Arm, policy: Policy) -> Tensor:
    """The sampled part of the distillation term before the mask, [responses, horizon]."""
    mask, log_ratio, reverse_kl = policy.problem.tree.mask, policy.log_ratio, policy.reverse_kl
    match arm.distillation:
        case "none" | "exact":
            return torch.zeros_like(log_ratio)
        case "immediate":
            total = immediate(log_ratio, mask)
        case "to_go":
            total = log_ratio_to_go(log_ratio, mask, arm.discount)
        case "kl_to_go":
            total = kl_to_go(log_ratio, reverse_kl, mask, arm.discount)
    match arm.baseline:
        case "none":
            return total
        case "kl":
            return total - baselines.negative_kl(reverse_kl, mask)
        case "leave_one_out":
            return total - _mean_of_others(policy, total, arm.group_size) * mask


def _mean_of_others(policy: Policy, advantages: Tensor, group_size: int) -> Tensor:
    """The expectation of `leave_one_out` at the steps of each response, [responses, horizon].

    In groups of two it depends on the other sample alone: each response is paired once with a stand-in that acts at every
    step. In larger groups it is the mean over the others that have that step, so that only the probability that there is
    such a one changes: from P(has it) to 1 - (1 - P(has it))^(group_size - 1).
    """
    mask, numbers = policy.problem.tree.mask, torch.arange(len(advantages))
    rows, both = torch.cat([advantages, torch.zeros_like(advantages)]), torch.cat([mask, torch.ones_like(mask)])
    other = baselines.leave_one_out(rows, both, torch.cat([numbers, numbers]))[len(numbers) :]
    acts = _by_prompt(policy, mask.double()).clamp(min=1e-300)
    return _by_prompt(policy, other) * (1 - (1 - acts) ** (group_size - 1)) / acts


def _by_prompt(policy: Policy, values: Tensor) -> Tensor:
    """The mean of `values` [responses, columns] over the responses of each one's prompt, same shape."""
    tree = policy.problem.tree
    weighted = tree.num_prompts * policy.chances[:, None] * values
    return values.new_zeros(tree.num_prompts, values.shape[1]).index_add(0, tree.prompts, weighted)[tree.prompts]


def follow(hack: Hack, arm: Arm, *, rate: float = 1.0, steps: int = 400) -> Tensor:
    """The table where ascent on the expected gradient ends, from `hack.start`.

    A logit's slope is divided by how often its action is taken (natural policy gradient, Kakade 2001), and by how often at
    most, over the row's actions, a taken action is kept. The rest points are those of the plain gradient, which would need
    many thousands of steps for rare actions. The distillation part's normaliser scales the whole step, for the same reason.
    """
    tree, vocab = hack.problem.tree, hack.problem.tree.vocab
    keep = ~(hack.malformed & arm.masked)
    cells = (hack.problem.rows[tree.states] * vocab + tree.actions)[tree.mask]

    def counts(weights: Tensor) -> Tensor:
        each = weights[:, None].expand_as(tree.mask)[tree.mask]
        return torch.zeros(len(hack.rows) * vocab, dtype=torch.float64).index_add(0, cells, each).reshape(-1, vocab)

    def direction(table: Tensor) -> Tensor:
        policy = hack.problem.policy(table)
        scale = taken = counts(policy.chances).clamp(min=1e-300)
        kept = normalizers(hack, arm, policy)[0]
        if arm.masked:
            most = (counts(policy.chances * keep) / taken).amax(-1, keepdim=True)
            # beside a reward, which acts on everything, no step is larger than without this
            scale = taken * (most.clamp(min=min(kept, 1.0)) if arm.reward_coef > 0 else most)
        return kept * expected_gradient(hack, arm, policy) / scale.clamp(min=1e-300)

    return settle(direction, hack.start, rate=rate, steps=steps)
