"""What an objective may say, and what it is told when it may not."""

import json
from typing import Any

import pytest
from factories import config_tree, fault

from opd.config import Config, ObjectiveConfig, dump_config, parse_config
from opd.config.parse import apply_overrides

CHECKED = {"first": {"type": "file", "path": "p", "teacher": "even", "checks": {"rules": ["truncated"]}}}
TO_GO: dict[str, Any] = {"type": "exact_to_go", "discount": 0.9, "baseline": "leave_one_out"}
GROUPS = {"group_size": 4}
MERGED = {"even": {"model": "m"}, "odd": {"model": "n"}}


def parsed(**changes: Any) -> Config:
    return parse_config(config_tree(**changes))


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"type": "exact", "divergence": "jsd", "jsd_beta": 0.1},
        {"type": "top_k", "top_k": 8, "tail_residual": True},
        TO_GO,
        {"type": "kl_to_go", "discount": 1.0, "baseline": "kl", "correction": {"type": "reject", "level": "sequence"}},
        {"type": "immediate", "baseline": "score_weighted", "loss": "ppo", "clip_dual": 3.0, "epochs": 2},
        {"type": "exact", "extrapolation": 1.25, "reference": "student"},
        {"type": "exact", "extrapolation": 1.25, "reference": "odd"},
    ],
    ids=str,
)
def test_a_sensible_objective_survives_saving_and_loading(objective: dict[str, Any]):
    config = parsed(objective=objective, sampling=GROUPS)
    assert parse_config(json.loads(dump_config(config))) == config


def test_the_default_objective_is_the_exact_immediate_term():
    objective = parsed().objective
    assert (objective.type, objective.discount, objective.divergence) == ("exact", None, "reverse_kl")
    assert objective.needs_distributions
    assert not objective.needs_student_scores


@pytest.mark.parametrize(
    ("objective", "distributions", "scores"),
    [
        ({"type": "immediate"}, False, False),
        ({"type": "to_go", "discount": 1.0}, False, False),
        ({"type": "immediate", "baseline": "leave_one_out"}, False, False),
        ({"type": "immediate", "baseline": "kl"}, True, True),
        ({"type": "immediate", "baseline": "score_weighted"}, True, True),
        ({"type": "kl_to_go", "discount": 1.0}, True, True),
        ({"type": "top_k"}, True, False),
        (TO_GO, True, True),
        ({"type": "immediate", "correction": {"type": "truncate"}}, False, True),
    ],
    ids=str,
)
def test_what_an_objective_needs(objective: dict[str, Any], distributions: bool, scores: bool):
    found = ObjectiveConfig(**objective)
    assert (found.needs_distributions, found.needs_student_scores) == (distributions, scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "exact_to_go", "discount": 1.0}, "type = 'exact_to_go' needs baseline = 'leave_one_out', got 'none'"),
        (TO_GO | {"baseline": "kl"}, "type = 'exact_to_go' needs baseline = 'leave_one_out', got 'kl'"),
        ({"type": "exact_to_go", "baseline": "leave_one_out"}, "type = 'exact_to_go' needs a discount"),
        ({"type": "exact", "baseline": "kl"}, "type = 'exact' has no sampled advantage: drop baseline"),
        ({"type": "top_k", "discount": 0.5}, "type = 'top_k' has no future part to discount"),
        (
            {"type": "immediate", "divergence": "jsd"},
            "divergence works only with type = 'exact', got type = 'immediate'",
        ),
        ({"jsd_beta": 0.3}, "jsd_beta works only with divergence = 'jsd', got divergence = 'reverse_kl'"),
        ({"clip_low": 0.1}, "clip_low works only with loss = 'ppo', got loss = 'reinforce'"),
        ({"type": "exact", "top_k": 8}, "top_k works only with type = 'top_k', got type = 'exact'"),
        (
            {"type": "top_k", "tail_residual": True, "correction": {"type": "reject"}},
            "corrections and epochs > 1 do not reweight the sampled term of tail_residual",
        ),
        (
            {"correction": {"type": "truncate"}},
            "correction.type = 'truncate' has no effect: it reweights sampled advantages",
        ),
        ({"type": "immediate", "correction": {"type": "reject", "cap": 3.0}}, "cap works only with type = 'truncate'"),
        ({"type": "immediate", "correction": {"low": 0.7}}, "low works only with type = 'reject'"),
        (
            {"type": "immediate", "correction": {"level": "sequence"}},
            "level works only with type = 'truncate' or 'reject'",
        ),
        (
            TO_GO | {"extrapolation": 1.5, "reference": "student"},
            "the extrapolated target is not normalised, so the future part would reward length",
        ),
        ({"type": "exact", "tail_residual": True}, "tail_residual works only with type = 'top_k'"),
        ({"clip_dual": 2.0}, "clip_dual works only with loss = 'ppo'"),
        ({"extrapolation": 1.5}, "extrapolation other than 1 and 'reference' go together"),
        ({"reference": "student"}, "extrapolation other than 1 and 'reference' go together"),
    ],
    ids=str,
)
def test_a_senseless_objective_is_refused_with_what_to_write(changes: dict[str, Any], message: str):
    assert message in fault(config_tree(objective=changes, sampling=GROUPS))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("k1", "expected gradient of zero"), ("k2", "write 'immediate'"), ("k3", "forward KL's direction")],
)
def test_estimates_that_must_not_be_backpropagated_are_refused_with_the_reason(name: str, reason: str):
    message = fault(config_tree(objective={"type": name}))
    assert reason in message
    assert "immediate" in message


@pytest.mark.parametrize(
    ("tail", "reason"), [("renormalize", "ignores the student's mass"), ("drop", "pushes mass out of the top k")]
)
def test_wrong_tails_of_a_top_k_are_refused_with_the_reason(tail: str, reason: str):
    message = fault(config_tree(objective={"type": "top_k", "top_k_tail": tail}))
    assert reason in message
    assert "leave top_k_tail = 'bucket'" in message


@pytest.mark.parametrize("discount", [-0.1, 1.5])
def test_a_discount_outside_its_range_is_refused(discount: float):
    assert "objective.discount" in fault(config_tree(objective={"type": "to_go", "discount": discount}))


def test_leave_one_out_needs_a_group():
    message = fault(config_tree(objective={"type": "immediate", "baseline": "leave_one_out"}))
    assert "objective.baseline = 'leave_one_out' compares the samples of one prompt" in message


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean", "grpo"])
def test_a_reward_against_the_group_needs_one(baseline: str):
    message = fault(config_tree(reward={"coef": 1.0, "baseline": baseline}))
    assert f"reward.baseline = '{baseline}' compares the samples of one prompt" in message


@pytest.mark.parametrize(
    "objective",
    [{"type": "immediate"}, {"type": "to_go", "discount": 1.0}, {"type": "kl_to_go", "discount": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("scope", ["trajectory", "suffix", "turn", "span"])
def test_a_mask_on_an_uncentred_sampled_advantage_is_refused(objective: dict[str, Any], scope: str):
    masked = {"mask": {"format_errors": scope}, "objective": objective, "tasks": CHECKED}
    assert "rewards errors" in fault(config_tree(**masked))
    assert parsed(**masked, reward={"coef": 1.0}, sampling=GROUPS).mask.format_errors == scope
    assert parsed(**masked | {"objective": {"type": "exact"}}).mask.format_errors == scope
    centred = masked | {"objective": objective | {"baseline": "leave_one_out"}}
    assert parsed(**centred, sampling=GROUPS).mask.format_errors == scope
    # The KL is the mean of the immediate log ratio alone.
    by_kl = masked | {"objective": objective | {"baseline": "kl"}}
    if objective["type"] == "immediate":
        assert parsed(**by_kl).mask.format_errors == scope
    else:
        assert "rewards errors" in fault(config_tree(**by_kl))


def test_a_mask_without_checks_masks_nothing_and_is_refused():
    assert "masks nothing: no task has checks" in fault(config_tree(mask={"format_errors": "turn"}))


def test_something_must_be_left_to_learn_from():
    assert "leave nothing to learn from" in fault(config_tree(objective={"coef": 0.0}))
    assert parsed(objective={"coef": 0.0}, reward={"coef": 1.0}, sampling=GROUPS).objective.coef == 0.0


@pytest.mark.parametrize("kind", ["exact", "top_k"])
def test_ppo_without_a_sampled_advantage_is_refused_unless_a_reward_gives_one(kind: str):
    objective = {"type": kind, "loss": "ppo"}
    assert "without a reward has none" in fault(config_tree(objective=objective))
    assert parsed(objective=objective, reward={"coef": 1.0}, sampling=GROUPS).objective.loss == "ppo"


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (MERGED | {"both": {"weights": {"even": 1.0}}}, "weights names 1 teachers, expected two or more"),
        (MERGED | {"both": {"weights": {"even": 1.0, "odd": 0.0}}}, "teachers.both.weights.odd"),
        (MERGED | {"both": {"weights": {"even": 1.0, "ood": 1.0}}}, "'ood' is no single teacher"),
        (MERGED | {"both": {"model": "m", "weights": {"even": 1.0, "odd": 1.0}}}, "set exactly one of"),
        (
            MERGED | {"a": {"weights": {"even": 1.0, "odd": 1.0}}, "b": {"weights": {"a": 1.0, "odd": 1.0}}},
            "'a' is no single teacher",
        ),
    ],
    ids=str,
)
def test_a_mixture_of_teachers_that_does_not_fit_is_refused(teachers: dict[str, Any], message: str):
    assert message in fault(config_tree(teachers=teachers))


def test_a_reference_that_is_no_model_is_refused():
    message = fault(config_tree(objective={"extrapolation": 1.5, "reference": "studnet"}))
    assert (
        "objective.reference = 'studnet' is neither 'student' nor a single teacher of [teachers] (even, odd)" in message
    )


def test_a_teacher_called_student_is_not_mistaken_for_the_initial_student():
    teachers = {"even": {"model": "m"}, "odd": {"model": "n"}, "student": {"model": "s"}}
    message = fault(config_tree(teachers=teachers, objective={"extrapolation": 1.5, "reference": "student"}))
    assert "means the initial student" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teachers.even.adapter=a", {"adapter": "a"}),
        ("teachers.odd.model=b", {"model": "b"}),
        ("teachers.both.weights.even=3", {"weights": {"even": 3, "odd": 1.0}}),
        ("teachers.both.model=c", {"model": "c"}),
        ("teachers.even.weights={odd=1, even=1}", {"weights": {"odd": 1, "even": 1}}),
    ],
)
def test_an_override_replaces_a_teachers_source(override: str, expected: dict[str, Any]):
    data: dict[str, Any] = config_tree(teachers=MERGED | {"both": {"weights": {"even": 1.0, "odd": 1.0}}})
    apply_overrides(data, [override])
    assert data["teachers"][override.split(".")[1]] == expected


def test_a_mask_on_the_residual_of_a_top_k_is_refused():
    masked = {"mask": {"format_errors": "turn"}, "tasks": CHECKED}
    objective = {"type": "top_k", "tail_residual": True}
    assert "'exact' without tail_residual" in fault(config_tree(**masked, objective=objective))
    assert parsed(**masked, objective={"type": "top_k"}).mask.format_errors == "turn"


def test_a_mask_that_pays_for_errors_is_refused():
    masked = {"mask": {"format_errors": "turn"}, "tasks": CHECKED, "reward": {"coef": 1.0, "format_error": 0.0}}
    assert "pays for errors" in fault(config_tree(**masked, objective={"type": "immediate"}, sampling=GROUPS))
    centred = {"type": "to_go", "discount": 1.0, "baseline": "leave_one_out"}
    assert "pays for errors" in fault(config_tree(**masked, objective=centred, sampling=GROUPS))
    assert parsed(**masked, objective={"type": "exact"}, sampling=GROUPS).reward.format_error == 0.0
