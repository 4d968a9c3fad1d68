"""A claim on the objective: its forms have one value and one gradient, the entropy form of equation (4) among them."""

import torch
from torch import Tensor

from opd.objectives.advantages import future_kl, log_ratio_to_go
from opd.objectives.divergences import reverse_kl
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, state_statistics
from opd_theory.claim import Claim
from opd_theory.estimators import mean_and_variance, trajectory_gradients
from opd_theory.gradient_claims import instance
from opd_theory.tree import Policy, make_tree
from opd_theory.written_out import gap, slope, written_out
from opd_theory.written_out import reverse_kl as plain_kl

_EXACT = 1e-10


def objective_forms(instances: int = 12) -> Claim:
    """Equations (2), (3), (4) and (9) on random trees with several prompts, each with a teacher of its own: values against
    recursion from the ends, and the policy gradient of the entropy form against complex steps."""
    worst: dict[str, float] = {}
    missing = float("inf")
    for seed in range(instances):
        tree = make_tree(3, 3 + seed % 2, end=2 if seed % 2 else None, num_prompts=1 + seed % 3)
        policy = instance(tree, seed, sharpness=0.5 + 0.5 * (seed % 3))
        w = written_out(policy)
        value, gradient = float(w.value(w.table)), w.gradient()
        for name, found in _values(policy).items():
            worst[name] = max(worst.get(name, 0.0), abs(found - value))
        entropy = "the policy gradient of the entropy form is grad V"
        worst[entropy] = max(worst.get(entropy, 0.0), gap(_entropy_gradient(policy), gradient))
        logprobs = torch.where(tree.mask, policy.problem.logq[tree.states, tree.actions], 0.0)
        without, _ = mean_and_variance(policy, trajectory_gradients(policy, log_ratio_to_go(logprobs, tree.mask)))
        missing = min(missing, gap(without, gradient))
    parts = {name: found < _EXACT for name, found in worst.items()} | {
        "without the entropy it is another": missing > 1e-3
    }
    largest = max(worst.values())
    return Claim(
        "1b", "the objective: sequence KL, log ratios, teacher's log-probability plus entropy, KL of visited states",
        "equations (2), (3), (4) and (9)", f"one value and one gradient, to {_EXACT}",
        f"at most {largest:.1e} over {instances} instances of one to three prompts", all(parts.values()),
        {"largest_gap": largest}, parts,
    )  # fmt: skip


def _values(policy: Policy) -> dict[str, float]:
    """V in each form, by the quantities of the trees and by the functions of training."""
    tree, logq = policy.problem.tree, policy.problem.logq
    logprobs = torch.where(tree.mask, logq[tree.states, tree.actions], 0.0)
    entropies = torch.where(tree.mask, _entropy(policy)[tree.states], 0.0)
    whole = policy.action_logprobs.sum(-1)  # log pi(y|x)
    return {
        "equation (2), the KL of whole responses": -float(policy.chances @ (whole - logprobs.sum(-1))),
        "equation (3), the log ratios": float(policy.chances @ policy.log_ratio.sum(-1)),
        "equation (3), differentiable": float(policy.value),
        "equation (4), with the entropy": float(policy.chances @ (logprobs + entropies).sum(-1)),
        "equation (9), the KL of visited states": -float(policy.occupancy @ reverse_kl(policy.logp, logq)),
        "the values of the prompts": float(policy.state_value[tree.steps == 0].mean()),
    }


def _entropy(policy: Policy) -> Tensor:
    """H(pi(.|s)) [states], as training reports it."""
    tree = policy.problem.tree
    eye = torch.eye(tree.vocab, dtype=torch.float64)
    return state_statistics(policy.logp, eye, [TeacherStates(policy.problem.logq, eye)], VocabularyLoss()).entropy


def _entropy_gradient(policy: Policy) -> Tensor:
    """The mean of sum_t (log q to go + later entropies) grad log pi + grad H(s_t), [rows * vocab]: a regularised reward, as in
    reinforcement learning."""
    tree, w = policy.problem.tree, written_out(policy)
    logprobs = torch.where(tree.mask, policy.problem.logq[tree.states, tree.actions], 0.0)
    entropies = torch.where(tree.mask, _entropy(policy)[tree.states], 0.0)
    credit = log_ratio_to_go(logprobs, tree.mask) + future_kl(-entropies, tree.mask)
    mean, _ = mean_and_variance(policy, trajectory_gradients(policy, credit))
    visits = w.occupancy(w.table)
    even = w.logq * 0.0  # the entropy is minus the KL to a target of log q = 0
    direct = slope(lambda z: -(visits * plain_kl(z[..., w.rows, :], even)).sum(-1), w.table)
    return mean + torch.from_numpy(direct)
