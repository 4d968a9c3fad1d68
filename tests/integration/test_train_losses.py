"""The loss of every step against its recorded rollouts, and where sampled objectives, rewards and equal teachers lead."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import toy_recipe
from toy_runs import newest, other_words, train

import opd
from opd.records import FailedScore, Rollout, ScoredRollout


def actions_of(item: ScoredRollout) -> tuple[np.ndarray, np.ndarray]:
    """(the student's log-probabilities as sampled, the teacher's) of a rollout's actions."""
    assert not isinstance(item.score, FailedScore)
    mask = item.rollout.loss_mask
    return item.rollout.rollout_logprobs[mask].astype(float), item.score.logprobs[mask].astype(float)


def to_go(log_ratio: np.ndarray, discount: float) -> np.ndarray:
    return np.array(
        [sum(discount ** (u - t) * log_ratio[u] for u in range(t, len(log_ratio))) for t in range(len(log_ratio))]
    )


def reward_advantages(rollouts: Sequence[Rollout], baseline: str) -> list[float]:
    found = []
    for item in rollouts:
        mine = [r.reward for r in rollouts if r.prompt == item.prompt]
        others = [r.reward for r in rollouts if r.prompt == item.prompt and r.sample != item.sample]
        if baseline == "leave_one_out":
            found.append(item.reward - np.mean(others))
        else:
            found.append((item.reward - np.mean(mine)) / (np.std(mine) + 1e-6))
    return found


VARIANTS = {
    "immediate": ({"objective": {"type": "immediate"}}, lambda r: r),
    "to_go": ({"objective": {"type": "to_go", "discount": 1.0}}, lambda r: to_go(r, 1.0)),
    "to_go discounted": ({"objective": {"type": "to_go", "discount": 0.5}}, lambda r: to_go(r, 0.5)),
    "ppo": ({"objective": {"type": "immediate", "loss": "ppo"}}, None),
    "reward beside exact": ({"objective": {"type": "exact"}, "reward": {"coef": 2.0}}, None),
    "reward beside to_go": (
        {"objective": {"type": "to_go", "discount": 1.0}, "reward": {"coef": 0.5, "baseline": "grpo"}},
        lambda r: to_go(r, 1.0),
    ),
}


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ppo"])
def test_the_loss_of_a_step_is_that_of_its_recorded_rollouts(tmp_path: Path, variant: str):
    changes, distillation = VARIANTS[variant]
    run = train(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}, **changes))
    for line in opd.read_metrics(run.path):
        scored = list(opd.read_rollouts(run.path, line["step"]))
        coef = changes.get("reward", {}).get("coef", 0.0)
        baseline = changes.get("reward", {}).get("baseline", "leave_one_out")
        rewards = reward_advantages([s.rollout for s in scored], baseline)
        assert len({s.rollout.reward for s in scored}) == 2
        total = line["kl/sequence/mean"] * len(scored) if distillation is None else 0.0
        for item, reward in zip(scored, rewards, strict=True):
            student, teacher = actions_of(item)
            advantage = coef * reward + (0.0 if distillation is None else distillation(teacher - student))
            total -= float((advantage * student).sum())
        assert line["loss/total/sum"] == pytest.approx(total / len(scored), rel=1e-4, abs=1e-4)


def test_a_clipped_update_is_repeated_on_one_batch_and_counts_what_it_clips(tmp_path: Path):
    still = {"optimizer": {"lr": 1e-12}, "objective": {"type": "immediate", "loss": "ppo", "epochs": 2}}
    run = train(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}, **still))
    for line in opd.read_metrics(run.path):
        # With weights that stand still every ratio is 1, so each epoch's loss is -sum A / rollouts.
        scored = list(opd.read_rollouts(run.path, line["step"]))
        ratios = [teacher - student for student, teacher in map(actions_of, scored)]
        once = -sum(r.sum() for r in ratios) / len(scored)
        assert line["loss/total/sum"] == pytest.approx(2 * once, rel=1e-4, abs=1e-4)
        assert line["loss/clipped/mean"] == 0.0
    fast = still | {"optimizer": {"lr": 0.3}, "output": str(tmp_path / "fast")}
    moved = train(toy_recipe(tmp_path, steps=3, evaluation={"num_prompts": 0}, **fast))
    lines = opd.read_metrics(moved.path)
    assert all(0 < line["loss/clipped/mean"] < 1 for line in lines)
    _, state = newest(moved.path)
    assert state["learner"]["num_updates"] == 6


@pytest.mark.parametrize(
    "objective",
    [{"type": "immediate"}, {"type": "immediate", "loss": "ppo", "epochs": 2}],
    ids=["reinforce", "ppo"],
)
def test_sampled_objectives_bring_the_reverse_kl_down(tmp_path: Path, objective: dict[str, Any]):
    changes = {
        "sampling": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 3},
        "optimizer": {"lr": 2e-2},
        "evaluation": {"num_prompts": 12},
    }
    tree = toy_recipe(tmp_path, steps=25, objective=objective, **changes)
    other_words(tree["tasks"]["second"]["path"])
    rows = [row for row in train(tree).result.parity if row.split == "train"]
    assert len(rows) == 2
    for row in rows:
        assert row.before is not None
        assert row.after.kl_token < 0.95 * row.before.kl_token, row.task


def test_the_outcome_term_makes_rewarded_responses_more_frequent(tmp_path: Path):
    changes = {"sampling": {"prompts_per_step": 8, "group_size": 4, "max_new_tokens": 3}, "optimizer": {"lr": 2e-2}}
    tree = toy_recipe(tmp_path, steps=20, reward={"coef": 50.0}, evaluation={"num_prompts": 0}, **changes)
    opd.train(opd.parse_config(tree), reward=lambda prompt, response: float(response[:1].isascii()))
    curve = [line["reward/mean"] for line in opd.read_metrics(tree["output"])]
    assert np.mean(curve[-5:]) > np.mean(curve[:2]) + 0.2


def test_a_teacher_equal_to_the_student_gives_kl_0(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=2)
    copy = shutil.copytree(tree["student"], tmp_path / "copy")
    tree["teachers"] = {"even": {"model": tree["student"]}, "odd": {"model": str(copy)}}
    run = train(tree)
    first = opd.read_metrics(run.path)[0]
    for name in ("kl/token/mean", "kl/token/even/mean", "kl/token/odd/mean"):
        assert abs(first[name]) < 1e-6
    assert first["optim/grad_norm/mean"] < 1e-4
    for item in opd.read_rollouts(run.path, 1):
        student, teacher = actions_of(item)
        np.testing.assert_allclose(teacher, student, atol=1e-4)
    for row in run.result.parity:
        assert row.before is not None
        assert abs(row.before.kl_token) < 1e-6
