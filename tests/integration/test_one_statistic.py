"""One name is one statistic: rewards that are worth a part count alike in training, on held-out prompts and in the parity table."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import prompt, rollout, scored, toy_recipe

import opd
from opd.config.detectors import DetectorsConfig
from opd.detectors.detectors import HeldOut
from opd.detectors.metrics import _rewards
from opd.evaluate import Cell, ParityRow, evaluate, parity_json, parity_text
from opd.metrics import mean_interval, values
from opd.rewards.judge import Judge
from opd.step_metrics import rollout_metrics


def graded(rewards: list[float]) -> Cell:
    made = [replace(rollout([1, 2, 3], 2, prompt=prompt(f"p{i}")), reward=r) for i, r in enumerate(rewards)]

    class Told:
        def sample(self, *_: Any, **__: Any) -> list[Any]:
            return made

    return evaluate(Told(), [], Judge(lambda p, r: None))  # type: ignore[arg-type]  # a stand-in


@pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.5], [1.0, 0.0], [0.25, 1.0, 0.0, 0.75], [0.0], [1.0, 1.0]])
def test_the_mean_reward_is_one_number_in_training_evaluation_and_detectors(rewards: list[float]):
    made = [replace(rollout([1, 2, 3], 2, prompt=prompt(f"p{i}")), reward=r) for i, r in enumerate(rewards)]
    mean = sum(rewards) / len(rewards)
    trained = values(rollout_metrics(made))
    assert trained["reward/mean"] == trained["reward/task/mean"] == pytest.approx(mean)
    watched = values(_rewards([scored(r, [-1.0]) for r in made]))
    assert watched["detectors/reward/t/mean"] == pytest.approx(mean)
    cell = graded(rewards)
    assert cell.mean_reward == pytest.approx(mean)
    assert cell.accuracy == sum(r == 1.0 for r in rewards) / len(rewards)


@pytest.mark.parametrize("reward", [0.5, 0.25, 1.0])
def test_the_held_out_reward_of_rewards_in_part_is_their_mean(tmp_path: Path, reward: float):
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0, "every": 1, "held_out_prompts": 3})
    lines = opd.read_metrics(opd.train(opd.parse_config(tree), reward=lambda prompt, response: reward).run)
    for line in lines:
        assert line["reward/mean"] == line["held_out/reward/mean"] == line["held_out/reward/second/mean"] == reward


def test_the_held_out_reward_over_all_weighs_every_response_alike(tmp_path: Path):
    """Two tasks with 12 and 4 held-out prompts: the mean of responses, not of tasks, as `reward` is."""
    tree = toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0, "every": 2, "held_out_prompts": 12})
    tree["tasks"]["first"]["held_out_path"] = tree["tasks"]["first"]["path"]
    worth = {"first": 0.2, "second": 0.6}
    lines = opd.read_metrics(opd.train(opd.parse_config(tree), reward=lambda p, r: worth[p.task]).run)
    assert lines[1]["held_out/reward/mean"] == pytest.approx((12 * 0.2 + 4 * 0.6) / 16)
    assert lines[1]["held_out/reward/first/mean"] == pytest.approx(0.2)


def test_the_held_out_detector_sees_rewards_in_part_fall():
    """Rewards of 0.6 that fall to 0.3 while training's stay: no response was ever worth 1."""
    config = DetectorsConfig()
    detector = HeldOut(config.held_out, train_memory=20)
    noise, alarms = np.random.default_rng(0), []
    for step in range(1, 201):
        worth = 0.6 if step < 100 else 0.3
        cell = graded([worth + 0.02 * float(noise.uniform(-1, 1)) for _ in range(8)])
        assert cell.accuracy == 0.0
        line = {
            "reward/mean": 0.6 + 0.02 * float(noise.uniform(-1, 1)),
            "held_out/reward/mean": cell.mean_reward or 0.0,
        }
        alarms += [found.message for found in detector.observe(step, line).values() if found.message]
    assert alarms


def test_the_parity_is_that_of_mean_rewards_where_no_response_is_worth_1():
    row = ParityRow("t", "train", "x", None, graded([0.8, 0.4]), graded([0.3, 0.3]))
    assert row.parity == pytest.approx(0.5)
    [plain] = parity_json([row])
    assert plain["parity"] == row.parity
    assert plain["student_after"]["mean_reward"] == pytest.approx(0.3)
    assert plain["student_after"]["reward_interval"] == row.after.reward_interval
    text = parity_text([row])
    assert "mean reward 0.30" in text
    assert "50.0 %" in text


def test_where_rewards_are_0_or_1_the_parity_is_that_of_accuracies():
    row = ParityRow("t", "train", "x", None, graded([1.0, 1.0, 0.0, 1.0]), graded([1.0, 0.0]))
    assert row.parity == pytest.approx(0.5 / 0.75)
    assert "mean reward" not in parity_text([row])


def test_the_interval_of_a_mean_is_the_plus_four_interval_of_a_share():
    for right, count in itertools.product((0, 1, 5), (5, 9)):
        p = (right + 2) / (count + 4)
        spread = 1.959964 * math.sqrt(p * (1 - p) / (count + 4))
        share = right / count
        found = mean_interval(share, math.sqrt(share * (1 - share)), count)
        assert found == pytest.approx((max(0.0, p - spread), min(1.0, p + spread)))


def test_the_interval_of_a_mean_of_rewards_in_part_covers_it():
    draws, missed = np.random.default_rng(0).beta(0.6, 1.1, size=(4000, 24)), 0
    for rewards in draws:
        low, high = mean_interval(float(rewards.mean()), float(rewards.std()), len(rewards))
        missed += not low <= 0.6 / 1.7 <= high
    assert missed / len(draws) < 0.05


def test_equal_rewards_are_not_certain_and_none_say_nothing():
    low, high = mean_interval(0.5, 0.0, 8)
    assert low < 0.35
    assert high > 0.65
    assert mean_interval(0.0, 0.0, 0) == (0.0, 1.0)
