"""A tree of all trajectories of a small vocabulary and horizon, and the exact quantities of softmax policies on it.

A state is a prompt and what was said so far. A policy is a table of logits, one row a state; with `rows` several states
share one (a student that cannot tell them apart). Everything is float64.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """Every trajectory: states, actions [trajectories, horizon], mask (True where it acted), prompts [trajectories].

    `parents` [states] is the state before each state (-1 for a prompt), `steps` [states] how many actions came before it.
    """

    vocab: int
    horizon: int
    num_states: int
    states: Tensor
    actions: Tensor
    mask: Tensor
    prompts: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_prompts(self) -> int:
        return int(self.prompts.max()) + 1


def make_tree(vocab: int, horizon: int, *, end: int | None = None, num_prompts: int = 1) -> Tree:
    """All responses of at most `horizon` actions; with `end`, that action ends a response. It is an action of its own."""
    inner = [a for a in range(vocab) if a != end]
    prefixes = [p for n in range(horizon) for p in itertools.product(inner, repeat=n)]
    finished = [] if end is None else [(*p, end) for p in prefixes]
    finished += list(itertools.product(inner, repeat=horizon))
    keys = [(x, p) for x in range(num_prompts) for p in prefixes]
    index = {key: i for i, key in enumerate(keys)}
    trajectories = [(x, y) for x in range(num_prompts) for y in finished]
    states = torch.zeros(len(trajectories), horizon, dtype=torch.long)
    actions, mask = torch.zeros_like(states), torch.zeros_like(states, dtype=torch.bool)
    for row, (x, y) in enumerate(trajectories):
        for t, action in enumerate(y):
            states[row, t], actions[row, t], mask[row, t] = index[x, y[:t]], action, True
    return Tree(
        vocab=vocab,
        horizon=horizon,
        num_states=len(keys),
        states=states,
        actions=actions,
        mask=mask,
        prompts=torch.tensor([x for x, _ in trajectories]),
        steps=torch.tensor([len(p) for _, p in keys]),
    )


@dataclass(frozen=True)
class Problem:
    """A tree, the target log q [states, vocab] of every state (of its prompt's teacher; it may be unnormalised), and the
    row of the student's table that each state reads, `rows` [states]."""

    tree: Tree
    logq: Tensor
    rows: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.rows.max()) + 1

    def policy(self, table: Tensor) -> "Policy":
        return Policy(self, table)


@dataclass(frozen=True)
class Policy:
    """A student's table of logits [rows, vocab] on a problem, and what follows from it."""

    problem: Problem
    table: Tensor

    @cached_property
    def logp(self) -> Tensor:
        """log pi [states, vocab]."""
        return torch.log_softmax(self.table, -1)[self.problem.rows]

    @cached_property
    def chances(self) -> Tensor:
        """The probability of each trajectory, prompts being equally likely; sums to 1. Without gradient."""
        return (self.action_logprobs.sum(-1).exp() / self.problem.tree.num_prompts).detach()

    @cached_property
    def action_logprobs(self) -> Tensor:
        """log pi(a_t|s_t) [trajectories, horizon], 0 behind the end."""
        return self._of_actions(self.logp)

    @cached_property
    def log_ratio(self) -> Tensor:
        """r_t = log q - log pi of every action [trajectories, horizon]."""
        return self._of_actions(self.problem.logq - self.logp)

    @cached_property
    def state_kl(self) -> Tensor:
        """KL(pi(.|s), q(.|s)) [states]."""
        return (self.logp.exp() * (self.logp - self.problem.logq)).sum(-1)

    @cached_property
    def reverse_kl(self) -> Tensor:
        """The KL of the state of every action [trajectories, horizon]."""
        return torch.where(self.problem.tree.mask, self.state_kl[self.problem.tree.states], 0.0)

    @cached_property
    def value(self) -> Tensor:
        """V = E_x E_y[sum_t r_t] = -E_x KL(pi(.|x), q(.|x)), differentiable in the table."""
        probability = self.action_logprobs.sum(-1).exp() / self.problem.tree.num_prompts
        return (probability * self.log_ratio.sum(-1)).sum()

    @cached_property
    def occupancy(self) -> Tensor:
        """d(s) [states]: the expected number of visits of each state; sums to E|y|. Without gradient."""
        tree = self.problem.tree
        weight = self.chances[:, None].expand_as(tree.mask)[tree.mask]
        return torch.zeros(tree.num_states, dtype=weight.dtype).index_add(0, tree.states[tree.mask], weight)

    @cached_property
    def state_value(self) -> Tensor:
        """V(s) [states]: the expected sum of log ratios from a state on. Without gradient."""
        tree = self.problem.tree
        to_go = self.log_ratio.detach().flip(-1).cumsum(-1).flip(-1)
        weight = (self.chances[:, None] * tree.mask)[tree.mask]
        zeros = torch.zeros(tree.num_states, dtype=weight.dtype)
        total = zeros.index_add(0, tree.states[tree.mask], weight * to_go[tree.mask])
        return total / zeros.index_add(0, tree.states[tree.mask], weight).clamp(min=1e-300)

    def gradient(self) -> Tensor:
        """grad V [rows, vocab]."""
        table = self.table.detach().requires_grad_()
        return torch.autograd.grad(self.problem.policy(table).value, table)[0]

    def g1(self) -> Tensor:
        """-sum_s d(s) grad KL_s [rows, vocab]: the gradient of V with the visited states held fixed."""
        table = self.table.detach().requires_grad_()
        moved = self.problem.policy(table)
        return torch.autograd.grad(-(self.occupancy * moved.state_kl).sum(), table)[0]

    def g2(self) -> Tensor:
        """-sum_s grad d(s) KL_s [rows, vocab]: the gradient of which states are visited."""
        table = self.table.detach().requires_grad_()
        moved = self.problem.policy(table)
        tree = self.problem.tree
        probability = moved.action_logprobs.sum(-1).exp() / tree.num_prompts
        visits = torch.where(tree.mask, self.state_kl.detach()[tree.states], 0.0).sum(-1)
        return torch.autograd.grad(-(probability * visits).sum(), table)[0]

    def _of_actions(self, values: Tensor) -> Tensor:
        tree = self.problem.tree
        return torch.where(tree.mask, values[tree.states, tree.actions], 0.0)


def random_problem(
    tree: Tree, generator: torch.Generator, *, sharpness: float = 1.0, rows: Tensor | None = None
) -> Problem:
    """A teacher of independent normal logits of standard deviation `sharpness`."""
    logits = sharpness * torch.randn(tree.num_states, tree.vocab, generator=generator, dtype=torch.float64)
    return Problem(tree, torch.log_softmax(logits, -1), torch.arange(tree.num_states) if rows is None else rows)


def random_table(problem: Problem, generator: torch.Generator, *, sharpness: float = 1.0) -> Tensor:
    """A student's table of independent normal logits [rows, vocab]."""
    return sharpness * torch.randn(problem.num_rows, problem.tree.vocab, generator=generator, dtype=torch.float64)
