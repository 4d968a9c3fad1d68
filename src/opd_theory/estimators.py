"""Gradient estimators on a tree: their exact mean and variance, by the very functions that training calls.

An estimator is an advantage for each action, and a divergence integrated over the vocabulary at each visited state, or
only one of the two. Gradients are with respect to the student's table of logits, [rows, vocab], to be ascended.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives import baselines
from opd.objectives.advantages import full_trajectory, future_kl, immediate, kl_to_go, log_ratio_to_go
from opd.objectives.reduce import masked
from opd_theory.tree import Policy

Advantage = Callable[[Policy], Tensor]


@dataclass(frozen=True)
class Estimator:
    """name; advantage: Policy -> [trajectories, horizon], or None; exact: whether the exact immediate term is added."""

    name: str
    advantage: Advantage | None
    exact: bool = False

    def gradients(self, policy: Policy) -> Tensor:
        """The estimate that each single trajectory gives, [trajectories, rows * vocab]."""
        found = trajectory_gradients(policy, self.advantages(policy))
        return found + exact_gradients(policy) if self.exact else found

    def advantages(self, policy: Policy) -> Tensor:
        mask = policy.problem.tree.mask
        return (
            torch.zeros(mask.shape, dtype=torch.float64) if self.advantage is None else self.advantage(policy).detach()
        )


def trajectory_gradients(policy: Policy, advantages: Tensor, drawn: Tensor | None = None) -> Tensor:
    """sum_t A_t grad log pi(a_t|s_t), what `reinforce` descends, [trajectories, rows * vocab]: of every trajectory, or of
    the `drawn` ones, whose advantages are given."""
    tree, rows = policy.problem.tree, policy.problem.rows
    chosen = slice(None) if drawn is None else drawn
    states, actions, mask = tree.states[chosen], tree.actions[chosen], tree.mask[chosen]
    score = -policy.logp.detach().exp()[states]  # [trajectories, horizon, vocab]
    score = score.scatter_add(-1, actions[..., None], torch.ones_like(score[..., :1]))
    return _by_row(policy, (advantages * mask)[..., None] * score, rows[states])


def exact_gradients(policy: Policy) -> Tensor:
    """-sum_t grad KL_{s_t} of every trajectory, [trajectories, rows * vocab]: what `exact_reverse_kl` descends."""
    tree, rows = policy.problem.tree, policy.problem.rows
    logp = policy.logp.detach()
    gap = logp - policy.problem.logq
    pull = logp.exp() * (gap - policy.state_kl.detach()[:, None])
    return _by_row(policy, -pull[tree.states] * tree.mask[..., None], rows[tree.states])


def _by_row(policy: Policy, values: Tensor, rows: Tensor) -> Tensor:
    """Add [trajectories, horizon, vocab] into the table's rows, [trajectories, rows * vocab]."""
    count, vocab = len(values), policy.problem.tree.vocab
    found = torch.zeros(count, policy.problem.num_rows, vocab, dtype=values.dtype)
    found.scatter_add_(1, rows[..., None].expand_as(values), values)
    return found.flatten(1)


def mean_and_variance(policy: Policy, gradients: Tensor) -> tuple[Tensor, float]:
    """(mean [rows * vocab], total variance) of one trajectory's estimate under the policy."""
    mean = policy.chances @ gradients
    second = policy.chances @ gradients.square().sum(-1)
    return mean, float(second - mean.square().sum())


def family(discount: float = 1.0) -> dict[str, Estimator]:
    """The estimators of docs/concepts/objectives.md that one trajectory is enough for; V is the true value, of discount 1."""

    def state_value(policy: Policy) -> Tensor:
        return masked(policy.state_value[policy.problem.tree.states], mask(policy))

    def score_weighted(policy: Policy) -> Tensor:
        best = baselines.score_weighted(policy.logp, policy.problem.logq)
        return masked(best[policy.problem.tree.states], mask(policy))

    def future_value(policy: Policy) -> Tensor:
        """E[sum of what comes later | s_t] = V(s_t) + KL_t."""
        return state_value(policy) + policy.reverse_kl

    def mask(policy: Policy) -> Tensor:
        return policy.problem.tree.mask

    members = (
        Estimator("full trajectory (i)", lambda p: full_trajectory(p.log_ratio, mask(p))),
        Estimator("log-ratio-to-go (ii)", lambda p: log_ratio_to_go(p.log_ratio, mask(p), discount)),
        Estimator(
            "log-ratio-to-go - V (iii)",
            lambda p: log_ratio_to_go(p.log_ratio, mask(p), discount) - state_value(p),
        ),
        Estimator("KL-to-go (iv)", lambda p: kl_to_go(p.log_ratio, p.reverse_kl, mask(p), discount)),
        Estimator(
            "KL-to-go - V (v)", lambda p: kl_to_go(p.log_ratio, p.reverse_kl, mask(p), discount) - state_value(p)
        ),
        Estimator("immediate", lambda p: immediate(p.log_ratio, mask(p))),
        Estimator(
            "immediate + KL",
            lambda p: immediate(p.log_ratio, mask(p)) - baselines.negative_kl(p.reverse_kl, mask(p)),
        ),
        Estimator("immediate - b*", lambda p: immediate(p.log_ratio, mask(p)) - score_weighted(p)),
        Estimator("exact", None, exact=True),
        Estimator("exact + KL-to-go", lambda p: future_kl(p.reverse_kl, mask(p), discount), exact=True),
        Estimator(
            "exact + KL-to-go - V",
            lambda p: future_kl(p.reverse_kl, mask(p), discount) - future_value(p),
            exact=True,
        ),
    )
    return {member.name: member for member in members}


UNBIASED: tuple[str, ...] = (
    "full trajectory (i)",
    "log-ratio-to-go (ii)",
    "log-ratio-to-go - V (iii)",
    "KL-to-go (iv)",
    "KL-to-go - V (v)",
    "exact + KL-to-go",
    "exact + KL-to-go - V",
)
IMMEDIATE: tuple[str, ...] = ("immediate", "immediate + KL", "immediate - b*", "exact")


@dataclass(frozen=True)
class GroupEstimate:
    """Means over groups of samples of a prompt: mean [rows * vocab], and the variance of one group's mean times its size
    (comparable with one trajectory's), with its standard error."""

    mean: Tensor
    variance: float
    error: float


def simulate_groups(
    policy: Policy,
    advantage: Advantage,
    *,
    size: int,
    batches: int,
    exact: bool,
    generator: torch.Generator,
) -> GroupEstimate:
    """Estimate mean and variance with a leave-one-out baseline over `size` samples of one prompt, by simulation."""
    tree = policy.problem.tree
    assert tree.num_prompts == 1, "the samples of a group share one prompt"
    drawn = torch.multinomial(policy.chances, batches * size, replacement=True, generator=generator)
    groups = torch.arange(batches).repeat_interleave(size)
    advantages, mask = advantage(policy).detach()[drawn], tree.mask[drawn]
    advantages = advantages - baselines.leave_one_out(advantages, mask, groups)
    found = trajectory_gradients(policy, advantages, drawn)
    if exact:
        found = found + exact_gradients(policy)[drawn]
    means = found.reshape(batches, size, -1).mean(1)
    centred = (means - means.mean(0)).square().sum(-1)
    return GroupEstimate(
        mean=means.mean(0),
        variance=float(centred.sum() / (batches - 1)) * size,
        error=float(centred.std() / batches**0.5) * size,
    )
