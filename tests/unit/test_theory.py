"""The theory's trees: exact quantities against each other, against training's own losses, and the claims."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from opd.cli import app
from opd.objectives import baselines
from opd.objectives.advantages import future_kl
from opd.objectives.losses import exact_reverse_kl, reinforce
from opd_theory import gradient_claims, horizon, law_claims, report
from opd_theory.claim import Claim
from opd_theory.estimators import (
    UNBIASED,
    exact_gradients,
    family,
    mean_and_variance,
    simulate_groups,
    trajectory_gradients,
)
from opd_theory.gradient_claims import instance
from opd_theory.tree import Policy, Problem, make_tree, random_problem, random_table

TREES = {
    "full": make_tree(3, 3),
    "end": make_tree(3, 3, end=2),
    "prompts": make_tree(2, 3, num_prompts=3),
}


@pytest.fixture(params=TREES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return instance(TREES[request.param], 1, sharpness=1.0)


def test_a_trees_trajectories_are_all_there():
    assert len(make_tree(3, 3)) == 27
    assert make_tree(3, 3).num_states == 1 + 3 + 9
    end = make_tree(3, 3, end=2)
    assert len(end) == 1 + 2 + 4 + 8
    assert end.mask.sum(-1).tolist() == [1, 2, 2, 3, 3, 3, 3, *[3] * 8]
    assert make_tree(2, 2, num_prompts=3).num_prompts == 3


def test_probabilities_sum_to_one_and_the_occupancy_to_the_mean_length(policy: Policy):
    tree = policy.problem.tree
    assert float(policy.chances.sum()) == pytest.approx(1.0, abs=1e-12)
    expected = torch.zeros(tree.num_states, dtype=torch.float64)
    expected[tree.steps == 0] = 1.0 / tree.num_prompts
    seen = set()
    for t in range(tree.horizon - 1):  # from each state to the next, by the probability of the action
        for here, action, after in zip(tree.states[:, t], tree.actions[:, t], tree.states[:, t + 1], strict=True):
            if after > 0 and int(after) not in seen and tree.steps[after] == t + 1:
                seen.add(int(after))
                expected[after] = expected[here] * policy.logp[here, action].exp()
    torch.testing.assert_close(policy.occupancy, expected, rtol=0, atol=1e-12)


def test_the_value_is_minus_the_occupancys_kl(policy: Policy):
    assert float(policy.value) == pytest.approx(-float(policy.occupancy @ policy.state_kl), abs=1e-12)
    roots = policy.problem.tree.steps == 0
    assert float(policy.state_value[roots].mean()) == pytest.approx(float(policy.value), abs=1e-12)


def test_the_gradient_is_the_slope_of_the_value(policy: Policy):
    gradient = policy.gradient()
    for row, action in ((0, 0), (1, 1)):
        shifted = []
        for step in (1e-6, -1e-6):
            table = policy.table.clone()
            table[row, action] += step
            shifted.append(float(policy.problem.policy(table).value))
        assert (shifted[0] - shifted[1]) / 2e-6 == pytest.approx(float(gradient[row, action]), abs=1e-8)


def test_g1_and_g2_are_the_parts_of_the_gradient(policy: Policy):
    torch.testing.assert_close(policy.g1() + policy.g2(), policy.gradient(), rtol=0, atol=1e-12)


def through_training(policy: Policy, row: int, advantages: Tensor, *, exact: bool) -> Tensor:
    """What the losses of training descend on one trajectory, by autograd, [rows * vocab]."""
    tree, rows = policy.problem.tree, policy.problem.rows
    table = policy.table.clone().requires_grad_()
    moved = policy.problem.policy(table)
    loss = reinforce(moved.action_logprobs[row][None], advantages[row][None], tree.mask[row][None])
    if exact:
        visited = tree.states[row][tree.mask[row]]
        eye = torch.eye(tree.vocab, dtype=torch.float64)
        weights = torch.ones(len(visited), dtype=torch.float64)
        loss = loss + exact_reverse_kl(table[rows[visited]], eye, policy.problem.logq[visited], eye, weights)[0]
    return -torch.autograd.grad(loss, table)[0].flatten()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["log-ratio-to-go (ii)", "exact", "exact + KL-to-go"])
def test_the_gradients_of_the_theory_are_those_of_the_losses_of_training(policy: Policy, name: str, tied: bool):
    if tied:
        rows = torch.arange(policy.problem.tree.num_states) % 3
        problem = Problem(policy.problem.tree, policy.problem.logq, rows)
        policy = problem.policy(random_table(problem, torch.Generator().manual_seed(0)))
    estimator = family()[name]
    gradients, advantages = estimator.gradients(policy), estimator.advantages(policy)
    for row in (0, len(policy.problem.tree) // 2, len(policy.problem.tree) - 1):
        expected = through_training(policy, row, advantages, exact=estimator.exact)
        torch.testing.assert_close(gradients[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators_have_the_mean_grad_v_also_with_shared_rows(policy: Policy, name: str):
    problem = Problem(policy.problem.tree, policy.problem.logq, torch.arange(policy.problem.tree.num_states) % 4)
    for found in (policy, problem.policy(random_table(problem, torch.Generator().manual_seed(2)))):
        mean, variance = mean_and_variance(found, family()[name].gradients(found))
        torch.testing.assert_close(mean, found.gradient().flatten(), rtol=0, atol=1e-10)
        assert variance > 0


def group_estimates(policy: Policy, size: int, *, exact: bool) -> tuple[Tensor, Tensor]:
    """(probability, gradient) of every group of `size` trajectories of one prompt, with the leave-one-out baseline."""
    tree = policy.problem.tree
    future = future_kl(policy.reverse_kl, tree.mask)
    chances, found = [], []
    for rows in itertools.product(range(len(tree)), repeat=size):
        chosen = torch.tensor(rows)
        baseline = baselines.leave_one_out(future[chosen], tree.mask[chosen], torch.zeros(size, dtype=torch.long))
        gradient = trajectory_gradients(policy, future[chosen] - baseline, chosen)
        if exact:
            gradient = gradient + exact_gradients(policy)[chosen]
        chances.append(policy.chances[chosen].prod())
        found.append(gradient.mean(0))
    return torch.stack(chances), torch.stack(found)


@pytest.mark.parametrize("size", [2, 3])
def test_exact_to_go_with_leave_one_out_has_the_mean_grad_v_by_enumeration_of_groups(size: int):
    policy = instance(make_tree(3, 2, end=2), 5, sharpness=1.0)
    chances, found = group_estimates(policy, size, exact=True)
    torch.testing.assert_close(chances @ found, policy.gradient().flatten(), rtol=0, atol=1e-10)


def test_the_simulated_variance_is_the_enumerated_one():
    policy = instance(make_tree(3, 2, end=2), 5, sharpness=1.0)
    chances, found = group_estimates(policy, 2, exact=True)
    mean = chances @ found
    exact = 2 * float(chances @ (found - mean).square().sum(-1))
    simulated = simulate_groups(
        policy, lambda p: future_kl(p.reverse_kl, p.problem.tree.mask), size=2, batches=20_000, exact=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert abs(simulated.variance - exact) < 4 * simulated.error
    torch.testing.assert_close(simulated.mean, mean, rtol=0, atol=0.05)


def test_several_teachers_and_prompts_have_one_gradient():
    tree = make_tree(2, 3, num_prompts=2)
    problem = random_problem(tree, torch.Generator().manual_seed(0))
    table = random_table(problem, torch.Generator().manual_seed(1))
    whole = problem.policy(table).gradient()
    # each prompt alone, on half of the states, weighs a half
    half = tree.num_states // 2
    alone = Problem(make_tree(2, 3), problem.logq[:half], torch.arange(half)).policy(table[:half]).gradient()
    torch.testing.assert_close(whole[:half], alone / 2)


def test_a_chains_true_future_is_the_mean_of_the_sampled_one():
    chain = horizon.make_chain(3, 0.5, seed=0)
    truth = chain.future(4, 0.9)
    states, _ = horizon.walk(chain, 4, 40_000, torch.Generator().manual_seed(0))
    sampled = future_kl(chain.kl[states], torch.ones_like(states, dtype=torch.bool), 0.9)
    assert float(sampled[:, 0].mean()) == pytest.approx(float(truth[0, 0]), rel=0.01)
    assert float(truth[-1].abs().max()) == 0.0


def test_the_variance_order_holds_in_the_median_of_a_hundred_instances():
    ratios: dict[str, list[float]] = {}
    for seed in range(100):
        policy = instance(make_tree(3, 4), seed)
        variances = {n: mean_and_variance(policy, e.gradients(policy))[1] for n, e in family().items()}
        for name in gradient_claims.ORDER:
            ratios.setdefault(name, []).append(variances[name] / variances["immediate"])
    medians = [sorted(found)[50] for found in ratios.values()]
    assert medians == sorted(medians)


def test_every_claim_is_in_the_report_once():
    names = [claim.__name__ for claim in report.CLAIMS]
    assert len(set(names)) == len(names) == 27


def fake(holds: bool) -> Claim:
    return Claim("1", "a claim", "a source", "|x| < 1", "x = 2", holds, {"x": 2.0})


@pytest.mark.parametrize("holds", [True, False])
def test_a_failed_claim_ends_the_command_with_exit_code_1(holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "CLAIMS", (lambda: fake(True), lambda: fake(holds)))
    result = CliRunner().invoke(app, ["theory", "--output", str(tmp_path / "out")])
    assert result.exit_code == (0 if holds else 1)
    assert f"{1 + holds} of 2 claims hold" in result.output
    plain = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert [claim["holds"] for claim in plain] == [True, holds]
    assert ("| holds |" if holds else "| fails |") in (tmp_path / "out" / "claims.md").read_text().splitlines()[-1]


def test_json_is_all_that_is_printed_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "CLAIMS", (lambda: fake(True),))
    result = CliRunner().invoke(app, ["theory", "--json", "--output", str(tmp_path)])
    assert json.loads(result.output)[0]["figures"] == {"x": 2.0}


def test_pictures_are_drawn_of_the_claims_at_hand(tmp_path: Path):
    claims = [law_claims.branch_law(), gradient_claims.growth((3, 4))]
    files = report.write_report(claims, tmp_path)
    assert {f.name for f in files} == {"claims.json", "claims.md", "branch.png", "growth.png"}
    assert all(f.stat().st_size > 0 for f in files)
