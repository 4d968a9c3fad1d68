"""The mask law: training's own batches against closed forms, simulations and loops that know no code of the library."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from math import exp, log, log1p
from typing import Any

import numpy as np
import pytest
import torch
from hacks import SMALL, Path, ways

import opd
import opd.objective
from opd.batch import pack
from opd.checks.notices import mask_warning
from opd.config import Config
from opd.objective import compute_advantages, divisor
from opd.objectives.losses import reinforce
from opd.objectives.mask_law import Choice, largest_kl, reward_pull
from opd.objectives.reduce import Normalizer
from opd.records import Flag, Prompt, Rollout, SampledScore, ScoredRollout, Turn
from opd_theory import hack_gym
from opd_theory.hack_gym import PENALTY, Arm, Hack, expected_gradient
from opd_theory.mask_claims import batch_gradient, enumerated, three

KL, TWO = 0.2556 - log(0.98), 2.0 - log(0.98)  # of a student without errors, in the two examples


@pytest.mark.parametrize(
    "choice",
    [
        Choice(KL),
        Choice(KL, masked=False, weight=0.7),
        Choice(KL, weight=0.1),
        Choice(TWO, weight=2.5),
        Choice(TWO, weight=2.5, normalizer="constant"),
        Choice(TWO, weight=2.5, baseline="none"),
        Choice(0.7, 0.3, weight=1.3, baseline="group_mean"),
        Choice(TWO, weight=1.5, baseline="grpo"),
        Choice(TWO, weight=1.5, baseline="grpo", normalizer="constant"),
        Choice(3.0, 0.1, distillation="kl", weight=0.8),
        Choice(3.0, 0.1, distillation="kl", weight=0.8, normalizer="constant"),
        Choice(3.0, 0.1, distillation="exact", weight=0.8),
        Choice(3.0, 0.1, distillation="exact", weight=0.8, normalizer="constant"),
    ],
    ids=lambda c: f"{c.distillation}-{c.normalizer}-{c.baseline}-{c.weight}",
)
@pytest.mark.parametrize("error", [0.03, 0.5, 0.9])
def test_the_mean_step_over_all_batches_is_the_law(choice: Choice, error: float):
    # "grpo" adds 1e-6 to a group's deviation
    allowed = 1e-5 if choice.baseline == "grpo" else 1e-12
    expected = replace(choice, batch=4).flow(error)
    if choice.baseline == "none":
        # without a baseline a batch of errors alone is divided by the reward's normaliser, as every other is
        assert choice.normalizer == "trajectory"
    assert enumerated(choice, error, 4) == pytest.approx(expected, abs=allowed)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_large_batch_divided_by_tokens_moves_as_the_law_says(length: int):
    choice = Choice(TWO, weight=2.5, normalizer="token", length=float(length), baseline="none")
    for errors in (20, 100, 160):
        good = (200 - errors) // 2
        found = batch_gradient(choice, errors / 200, (errors, good, good), 200)
        assert found == pytest.approx(choice.flow(errors / 200), abs=1e-12)


def simulated(kl: float, weight: float, start: float, *, constant: bool, steps: int = 2000) -> float:
    """P(error) after plain SGD on sampled batches of 1024 in groups of 4, written out with nothing of the library."""
    rng = np.random.default_rng(0)
    theta, ends, size = log(start) - log1p(-start), [], 1024
    remaining = kl + log(0.98)
    tilt = 0.5 * (1 + (1 - exp(-2 * remaining)) ** 0.5)
    teacher = np.array([0.02, 0.98 * tilt, 0.98 * (1 - tilt)])
    for step in range(steps):
        error = 1 / (1 + exp(-theta))
        p = np.array([error, (1 - error) / 2, (1 - error) / 2])
        actions = rng.choice(3, size=size, p=p)
        slope = np.where(actions == 0, 1 - error, -error)
        reward = np.where(actions == 0, -1.0, 1.0).reshape(-1, 4)
        others = (reward.sum(1, keepdims=True) - reward) / 3
        gain = (weight / 2 * (reward - others)).reshape(-1)
        ratio = np.log(teacher[actions]) - np.log(p[actions])
        kept = actions != 0
        over = size if constant else max(1, kept.sum())
        theta += 0.3 * ((ratio * kept * slope).sum() / over + (gain * slope).sum() / size)
        theta = min(max(theta, -9.0), 9.0)
        if step >= steps // 2:
            ends.append(error)
    return float(np.mean(ends))


@pytest.mark.parametrize(
    ("kl", "weight", "start", "constant", "end"),
    [
        (KL, 0.0, 0.02, False, 0.241),
        (KL, 0.1, 0.12, False, 0.176),
        (KL, 0.1, 0.12, True, 0.161),
        (TWO, 2.5, 0.02, False, 0.0),
        (TWO, 2.5, 0.5, False, 0.756),
        (TWO, 2.5, 0.8, False, 0.756),
        (TWO, 2.5, 0.8, True, 0.0),
    ],
)
def test_a_simulated_run_ends_where_the_law_says(kl: float, weight: float, start: float, constant: bool, end: float):
    choice = Choice(kl, weight=weight, normalizer="constant" if constant else "trajectory")
    assert choice.end(start) == pytest.approx(end, abs=5e-4)
    assert simulated(kl, weight, start, constant=constant) == pytest.approx(end, abs=0.012)


NORMALIZERS: tuple[tuple[Normalizer, Callable[[float], float]], ...] = (
    ("trajectory", lambda x: x),
    ("token", lambda x: x / (x + 4 * (1 - x))),
    ("constant", lambda _: 1.0),
)


def test_errors_fade_from_a_start_exactly_where_the_outcome_exceeds_the_kl_of_kept_responses():
    for normalizer, weighs in NORMALIZERS:
        choice = Choice(TWO, weight=2.5, normalizer=normalizer, length=4.0)
        for error in np.linspace(0.01, 0.99, 197):
            paid = TWO + log(1 - error)
            assert (choice.flow(float(error)) < 0) == (2.5 * weighs(1 - error) > paid)


def test_a_start_just_inside_the_basin_ends_without_errors_and_one_just_outside_does_not():
    choice = Choice(TWO, weight=2.5)
    (edge, stable), (rest, _) = choice.rests()
    assert not stable
    assert edge == pytest.approx(0.389, abs=5e-4)
    assert choice.end(edge - 1e-3) == 0.0
    assert choice.end(edge + 1e-3) == pytest.approx(rest)


@pytest.mark.parametrize("weight", [0.3, 0.9, 2.5, 12.0])
def test_the_largest_kl_is_the_closed_form(weight: float):
    assert largest_kl(weight, "constant") == pytest.approx((weight, weight), rel=1e-3)
    everywhere = weight if weight <= 1 else 1 + log(weight)
    assert largest_kl(weight, "trajectory") == pytest.approx((everywhere, weight), rel=1e-3)
    assert largest_kl(weight, "token", length=4.0)[0] <= everywhere + 1e-3


@pytest.mark.parametrize("normalizer", ["trajectory", "token", "constant"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
def test_below_the_largest_kl_errors_fade_from_every_start_and_above_it_they_do_not(normalizer, baseline):
    bound, _ = largest_kl(2.5, normalizer, baseline=baseline, length=3.0)
    choice = Choice(bound - 0.01, weight=2.5, normalizer=normalizer, baseline=baseline, length=3.0)
    assert choice.rests() == []
    assert any(stable for _, stable in replace(choice, kl=bound + 0.01).rests())


def test_the_pull_of_a_normalised_outcome_is_that_of_all_groups():
    for error, size in itertools.product((0.1, 0.6), (2, 4)):
        total = 0.0
        for group in itertools.product((0, 1), repeat=size):
            rewards = np.array([-1.0 if wrong else 1.0 for wrong in group])
            chance = float(np.prod([error if wrong else 1 - error for wrong in group]))
            advantage = (rewards - rewards.mean()) / (rewards.std() or 1.0)
            total += chance * float((advantage * np.where(group, 1 - error, -error)).mean())
        assert reward_pull(error, "grpo", size) == pytest.approx(-total, abs=1e-12)


def test_the_student_of_three_actions_has_the_kl_that_it_is_given():
    for kl, error in ((KL, 0.1), (TWO, 0.7)):
        student = three(Choice(kl), error)
        p = student.logp.detach().exp()
        assert float(p[0]) == pytest.approx(error)
        good = p[1:] / p[1:].sum()
        assert float(-(good * (student.logq[1:] - good.log())).sum()) == pytest.approx(kl)


def every_response(hack: Hack) -> list[tuple[int, Path, str, int]]:
    """(prompt, path, end, how often it stands in a batch) of a student that takes every action alike."""
    found = [(x, path, end) for x, prompt in enumerate(hack.prompts) for path, end in ways(hack, prompt)]
    choices = [[len(hack.states[n].after) for n, _ in path if not hack.states[n].fixed] for _, path, _ in found]
    whole = int(np.lcm.reduce([int(np.prod(c, dtype=int)) for c in choices]))
    return [
        (x, path, end, whole // int(np.prod(c, dtype=int))) for (x, path, end), c in zip(found, choices, strict=True)
    ]


def trained_gradient(hack: Hack, arm: Arm, table: torch.Tensor) -> torch.Tensor:
    """What `follow` and `reinforce` make of one batch that holds every response as often as the student says."""
    scored, steps, paid = [], [], []
    for x, path, end, count in every_response(hack):
        size = 1 + len(path)
        spread = np.zeros(size, dtype=np.float32)
        rollout = Rollout(
            prompt=Prompt(str(x), (), teacher="t", task="task"),
            sample=0,
            token_ids=np.arange(size, dtype=np.int32),
            loss_mask=np.arange(size) > 0,
            rollout_logprobs=spread,
            turns=(Turn("prompt", 0, 1), Turn("student", 1, size)),
            messages=(),
            finish="end",
            policy_version=0,
            reward=hack.ends[end].paid,
            flags=(Flag("truncated", 1, size),) if hack.ends[end].malformed else (),
        )
        for _ in range(count):
            scored.append(ScoredRollout(replace(rollout, sample=len(steps)), SampledScore("t", spread)))
            steps.append(path)
            paid.append(hack.ends[end].paid)
    batch, _ = pack(scored, logprob_floor=-50.0)
    rows = torch.tensor([hack.rows.index(hack.states[n].row) for path in steps for n, _ in path])
    actions = torch.tensor([a for path in steps for _, a in path])
    teacher = torch.tensor([hack.states[n].teacher for path in steps for n, _ in path], dtype=torch.float64).log()
    moved = table.clone().requires_grad_()
    logp = torch.log_softmax(moved, -1)[rows]
    at = torch.nonzero(batch.loss_mask)[:, 0]

    def column(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(batch.token_ids), dtype=torch.float64).index_add(0, at, values)

    mine = logp.gather(1, actions[:, None])[:, 0]
    kl = (logp.exp() * (logp - teacher)).sum(-1)
    batch = replace(
        batch,
        rollout_logprobs=column(mine.detach()),
        teacher_logprobs=column(teacher.gather(1, actions[:, None])[:, 0]),
        reverse_kl=column(kl.detach()),
        rewards=torch.tensor(paid, dtype=torch.float64),
    )
    config = as_config(arm, len(batch))
    batch, _ = compute_advantages(config, batch)
    shared = divisor(config.objective, batch)
    loss = torch.zeros((), dtype=torch.float64)
    if batch.advantages is not None:
        loss = loss + reinforce(column(mine)[None], batch.advantages[None], batch.train_mask[None], divisor=shared)
    if arm.distillation == "exact":
        loss = loss + (kl * batch.distill_mask[at]).sum() / shared
    return -torch.autograd.grad(loss, moved)[0] * hack.learns


def as_config(arm: Arm, num_episodes: int) -> Config:
    kind: dict[str, Any] = {"type": arm.distillation, "baseline": arm.baseline, "normalizer": arm.normalizer}
    if arm.distillation in ("to_go", "kl_to_go"):
        kind["discount"] = arm.discount
    if arm.normalizer == "constant":
        kind["constant"] = num_episodes
    config = opd.parse_config(
        {
            "student": "s",
            "output": "o",
            "teachers": {"t": {"model": "m"}},
            "tasks": {"task": {"type": "file", "path": "p", "teacher": "t", "checks": {"rules": ["truncated"]}}},
            "objective": kind,
            "reward": {"coef": arm.reward_coef, "format_error": PENALTY, "baseline": "none"},
        }
    )
    scope = "trajectory" if arm.masked else "off"
    return config.model_copy(update={"mask": config.mask.model_copy(update={"format_errors": scope})})


@pytest.mark.parametrize("normalizer", ["trajectory", "token", "constant"])
@pytest.mark.parametrize("hack", ["early end", "loop", "parser exploit", "attractor"])
def test_the_gym_moves_a_student_as_training_does(hack: str, normalizer):
    process = SMALL[hack]() if hack != "loop" else hack_gym.loop(steps=2, repeat=0.8)
    table = torch.where(process.learns > 0, torch.zeros_like(process.start), process.start)
    for arm in (
        Arm("immediate", masked=True, reward_coef=3.0, penalised=True),
        Arm("to_go", 1.0, masked=True, reward_coef=0.7, penalised=True),
        Arm("immediate", 0.0, "kl", masked=True, reward_coef=3.0, penalised=True),
        Arm("exact", masked=True, reward_coef=3.0, penalised=True),
        Arm("immediate", masked=True),
    ):
        arm = replace(arm, normalizer=normalizer)
        found = expected_gradient(process, arm, process.problem.policy(table))
        torch.testing.assert_close(found, trained_gradient(process, arm, table), rtol=0, atol=1e-12)


MASKED: dict[str, Any] = {
    "student": "s",
    "output": "o",
    "teachers": {"t": {"model": "m"}},
    "tasks": {"task": {"type": "file", "path": "p", "teacher": "t", "checks": {"rules": ["truncated"]}}},
    "sampling": {"prompts_per_step": 6, "group_size": 4},
    "mask": {"format_errors": "trajectory"},
}


def warned(objective: dict[str, Any], reward: dict[str, Any]) -> str | None:
    return mask_warning(opd.parse_config(MASKED | {"objective": objective, "reward": reward}))


def test_a_recipe_with_an_uncentred_mask_is_told_which_kl_its_outcome_outweighs():
    text = warned({"type": "immediate"}, {"coef": 1.25})
    assert text is not None
    assert "errors always decrease if this KL is below 1.92 nats per response" in text
    assert "from 1.92 to 2.5 nats they decrease only if there are few at the start" in text
    assert "objective.constant = 24" in text
    halved = warned({"type": "to_go", "discount": 1.0, "coef": 0.5}, {"coef": 1.25})
    assert halved is not None
    assert f"below {1 + log(5):.3g} nats" in halved
    assert "to 5 nats" in halved


def test_the_advice_of_the_mask_warning_is_a_recipe_with_one_bound():
    text = warned({"type": "immediate", "normalizer": "constant", "constant": 24}, {"coef": 1.25})
    assert text is not None
    assert "below 2.5 nats per response, and increase if it is above" in text
    assert "constant =" not in text


@pytest.mark.parametrize(
    ("objective", "reward"),
    [
        ({"type": "exact"}, {"coef": 1.0}),
        ({"type": "immediate", "baseline": "kl"}, {"coef": 1.0}),
        ({"coef": 0.0}, {"coef": 1.0}),
    ],
)
def test_a_centred_mask_is_not_warned_about(objective, reward):
    assert warned(objective, reward) is None


def test_an_outcome_divided_by_its_deviation_is_warned_about_with_its_own_bounds():
    text = warned({"type": "immediate"}, {"coef": 2.5, "baseline": "grpo"})
    assert text is not None
    assert "below 2.41 nats" in text
    assert "to 4.33 nats" in text


def test_a_recipe_that_divides_by_a_constant_is_not_told_to_do_so():
    constant = {"type": "immediate", "normalizer": "constant", "constant": 48}
    tree = MASKED | {"objective": constant, "reward": {"coef": 1.0, "baseline": "grpo"}}
    text = mask_warning(opd.parse_config(tree | {"sampling": {"prompts_per_step": 6, "group_size": 8}}))
    assert text is not None
    assert "Raise reward.coef (docs" in text
