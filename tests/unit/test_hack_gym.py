"""The gym of hacks: expected gradients against plain loops and slopes, rest points against closed forms, and the claims."""

import itertools
from dataclasses import replace
from functools import cache
from math import exp, log

import pytest
import torch
from hacks import SMALL, WRITTEN_OUT, shares, ways, written_out
from torch import Tensor

from opd_theory import hack_gym
from opd_theory.hack_claims import Trial, rest_by_law, run_trial
from opd_theory.hack_gym import Arm, Figures, Hack, expected_gradient, follow
from opd_theory.law_claims import settle

HACKS = {
    "quick answer": hack_gym.quick_answer,
    "attractor": hack_gym.attractor,
    "loop": hack_gym.loop,
    "early end": hack_gym.early_end,
    "parser exploit": hack_gym.parser_exploit,
}


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Hack:
    return SMALL[request.param]()


def some_table(hack: Hack, seed: int = 0) -> Tensor:
    """A student away from the start; fixed rows as they are."""
    noise = torch.randn(hack.start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return hack.start + noise * hack.learns


def gradient(hack: Hack, arm: Arm, table: Tensor) -> Tensor:
    return expected_gradient(hack, arm, hack.problem.policy(table))


@pytest.mark.parametrize("name", [n for n in WRITTEN_OUT if WRITTEN_OUT[n].baseline != "leave_one_out"])
def test_the_expected_gradient_is_the_sum_over_responses(small: Hack, name: str):
    table = some_table(small)
    expected = written_out(small, WRITTEN_OUT[name], table)
    torch.testing.assert_close(gradient(small, WRITTEN_OUT[name], table), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["loop", "early end"])
def test_the_leave_one_out_gradient_is_the_sum_over_groups(name: str, size: int):
    hack = SMALL[name]() if name == "early end" else hack_gym.loop(steps=2)
    for distillation in (Arm("immediate"), Arm("to_go", 1.0)):
        arm = replace(distillation, baseline="leave_one_out", group_size=size, masked=True, reward_coef=0.3)
        table = some_table(hack)
        torch.testing.assert_close(gradient(hack, arm, table), written_out(hack, arm, table), rtol=0, atol=1e-12)


def value(hack: Hack, table: Tensor, coef: float) -> float:
    """-KL of a response + coef * reward, from the ends backwards over states; no response is enumerated."""
    p = shares(hack, table)

    @cache
    def from_here(name: str) -> float:
        if name in hack.ends:
            return coef * hack.ends[name].paid
        state = hack.states[name]
        return sum(
            x * (log(q) - log(x) + from_here(after))
            for x, q, after in zip(p[name], state.teacher, state.after, strict=True)
        )

    return sum(from_here(prompt) for prompt in hack.prompts) / len(hack.prompts)


@pytest.mark.parametrize("coef", [0.0, 2.0])
@pytest.mark.parametrize("distillation", ["to_go", "kl_to_go"])
def test_at_discount_1_the_expected_gradient_is_the_slope_of_distillation_and_outcome(
    small: Hack, distillation, coef: float
):
    table = some_table(small, seed=1)
    found = gradient(small, Arm(distillation, 1.0, reward_coef=coef), table)
    for row, action in itertools.product(range(len(small.rows)), range(table.shape[1])):
        if small.learns[row] == 0:
            assert found[row, action] == 0
            continue
        step = torch.zeros_like(table)
        step[row, action] = 1e-5
        slope = (value(small, table + step, coef) - value(small, table - step, coef)) / 2e-5
        assert float(found[row, action]) == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize("name", HACKS)
def test_the_start_hacks_as_often_as_the_teacher(name: str):
    hack = HACKS[name]()

    @cache
    def teachers(state: str) -> float:
        if state in hack.ends:
            return float(hack.ends[state].hack)
        return sum(
            q * teachers(after) for q, after in zip(hack.states[state].teacher, hack.states[state].after, strict=True)
        )

    rates = [teachers(prompt) for prompt in hack.prompts]
    assert hack.measure(hack.start).hack == pytest.approx(sum(rates) / len(rates), abs=1e-12)


def test_figures_are_those_of_the_responses(small: Hack):
    table = some_table(small)
    figures, p = small.measure(table), shares(small, table)
    expected = [0.0, 0.0, 0.0]
    for prompt in small.prompts:
        for path, name in ways(small, prompt):
            chance, end = 1.0 / len(small.prompts), small.ends[name]
            for state, action in path:
                chance *= p[state][action]
            for i, mark in enumerate((end.hack, end.correct, end.paid)):
                expected[i] += chance * mark
    assert [figures.hack, figures.reward, figures.paid] == pytest.approx(expected, abs=1e-12)
    assert figures.opd_reward == pytest.approx(value(small, table, 0.0), abs=1e-12)


def test_a_response_of_every_length_is_there():
    assert len(hack_gym.quick_answer(steps=2).reached) == 2 * (1 + 4)
    assert len(hack_gym.early_end(steps=3).reached) == 2 * (1 + 2 + 4 + 8)
    assert len(hack_gym.loop(steps=3).reached) == 2 * 27


def test_only_the_format_errors_are_penalised():
    hack = hack_gym.parser_exploit(steps=1)
    rewards = dict(zip(hack.reached, hack.rewards(penalised=True).tolist(), strict=True))
    assert rewards == {"exploit": -1.0, "answer": 0.7}
    assert set(hack.rewards(penalised=False).tolist()) == {1.0, 0.7}


def test_a_looping_token_costs_nothing_and_a_word_does():
    hack = hack_gym.loop()
    kl = dict(zip(hack.states, hack.problem.policy(hack.start).state_kl.tolist(), strict=True))
    assert all(abs(cost) < 1e-12 for name, cost in kl.items() if name.startswith("loop"))
    assert all(cost > 0.8 for name, cost in kl.items() if name.startswith("word"))


NATS = -log(2 * (0.95 * 0.05) ** 0.5)  # of a word that is the teacher's with 0.95 in one context and 0.05 in the other


@pytest.mark.parametrize(
    ("arm", "log_odds"),
    [
        (Arm("to_go", 1.0), 5 * NATS + log(0.999)),
        (Arm("kl_to_go", 0.9), sum(0.9**t for t in range(1, 6)) * NATS + 0.9 * log(0.999)),
        (Arm("exact"), 0.0),
        (Arm("immediate", masked=True), 0.0),
        (Arm("exact", reward_coef=3.0), -3 * 0.8),
        (Arm("to_go", 1.0, reward_coef=3.0), 5 * NATS + log(0.999) - 3 * 0.8),
    ],
)
def test_a_quick_answer_ends_at_the_branch_and_tilt_laws(arm: Arm, log_odds: float):
    odds = 0.05 / 0.95 * exp(log_odds)
    hack = hack_gym.quick_answer()
    assert hack.measure(follow(hack, arm)).hack == pytest.approx(odds / (1 + odds), abs=1e-10)
    assert rest_by_law(hack, arm) == pytest.approx(odds / (1 + odds), abs=1e-12)


@pytest.mark.parametrize(
    ("arm", "kept"),
    [
        (Arm("immediate", masked=True), (0.98 * exp(-NATS)) ** 5),
        (Arm("exact"), (0.98 * exp(-NATS) / (0.02 + 0.98 * exp(-NATS))) ** 5),
        (Arm("exact", masked=True), (0.98 * exp(-NATS) / (0.02 + 0.98 * exp(-NATS))) ** 5),
    ],
)
def test_an_early_end_ends_at_the_mask_law(arm: Arm, kept: float):
    hack = hack_gym.early_end()
    assert hack.measure(follow(hack, arm)).hack == pytest.approx(1 - kept, abs=1e-10)
    assert rest_by_law(hack, arm) == pytest.approx(1 - kept, abs=1e-12)


def test_an_outcome_behind_an_uncentred_mask_lifts_the_mask_law_by_its_advantage():
    hack = hack_gym.early_end(steps=1)
    arm = Arm("immediate", masked=True, reward_coef=0.1, penalised=True)
    kept = 0.5
    for _ in range(200):
        kept = 0.98 * exp(0.1 * 1.9 * kept - NATS)  # the kept episodes divide the distillation part
    assert hack.measure(follow(hack, arm)).hack == pytest.approx(1 - kept, abs=1e-8)
    assert rest_by_law(hack, arm) == pytest.approx(1 - kept, abs=1e-12)
    constant = replace(arm, normalizer="constant")
    law = 1 - 0.98 * exp(0.1 * 1.9 - NATS)
    assert hack.measure(follow(hack, constant)).hack == pytest.approx(law, abs=1e-8)
    assert rest_by_law(hack, constant) == pytest.approx(law, abs=1e-12)


@pytest.mark.parametrize(
    "arm",
    [
        Arm("to_go", 1.0),
        Arm("kl_to_go", 0.9),
        Arm("immediate", masked=True),
        Arm("immediate", 0.0, "kl", masked=True),
        Arm("immediate", 0.0, "leave_one_out", 2, masked=True),
        Arm("exact", masked=True, reward_coef=0.2, penalised=True),
    ],
    ids=lambda arm: f"{arm.distillation}-{arm.baseline}",
)
def test_plain_ascent_ends_where_the_natural_gradient_does(arm: Arm):
    hack = hack_gym.early_end(steps=2, agreed=0.8, chance=0.2)
    plain = settle(lambda t: gradient(hack, arm, t), hack.start, rate=2.0, steps=1000)
    assert hack.measure(plain).hack == pytest.approx(hack.measure(follow(hack, arm)).hack, abs=1e-8)


def test_arms_that_no_law_covers_have_none():
    hack = hack_gym.early_end(steps=1)
    for arm in (
        Arm("none", reward_coef=1.0),
        Arm("immediate", 0.0, "leave_one_out"),
        Arm("immediate", 0.0, "kl", reward_coef=1.0),
        Arm("kl_to_go", 1.0, masked=True),
        Arm("to_go", 1.0, "kl"),
    ):
        assert rest_by_law(hack, arm) is None


def test_a_trial_tells_a_collapse_from_a_hold():
    start = Figures(0.1, 0.8, 0.8, -4.0)
    arms = {
        "collapsed": Figures(0.7, 0.3, 0.3, -3.0),
        "held": Figures(0.1, 0.8, 0.8, -4.2),
        "dearer": Figures(0.7, 0.3, 0.3, -4.1),
        "poorer": Figures(0.05, 0.7, 0.8, -3.9),
    }
    trial = Trial(start, arms, {"held": 0.1, "collapsed": 0.7})
    assert [name for name in arms if trial.collapsed(name)] == ["collapsed"]
    assert [name for name in arms if trial.held(name)] == ["held"]
    assert trial.claim("x", "", "", "", True).holds
    assert not trial.claim("x", "", "", "", False).holds
    assert not replace(trial, laws={"held": 0.1, "collapsed": 0.6999}).claim("x", "", "", "", True).holds


def test_a_hack_that_no_word_outbids_does_not_collapse():
    """Where student and teacher can agree on every word there is no KL to save, and to-go leaves the teacher's rate."""
    hack = hack_gym.early_end(agreed=0.5)
    trial = run_trial(hack, {"to-go": Arm("to_go", 1.0)})
    assert not trial.collapsed("to-go")
    assert trial.held("to-go")
