"""Every claim of the theory, in a small size: it holds, and it fails when one of the objects that it names is wrong."""

import ast
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sabotages import SABOTAGES, Sabotage
from small_claims import CLAIM, SIZES, small

from opd_theory import hack_claims, mask_claims, written_out
from opd_theory.claim import Claim
from opd_theory.gradient_claims import instance
from opd_theory.report import claim_line
from opd_theory.tree import make_tree


@pytest.mark.parametrize("name", CLAIM)
def test_every_part_of_the_claim_holds(name: str):
    claim = small(name)
    assert [part for part, true in claim.parts.items() if not true] == []
    assert claim.holds, claim.measured
    plain = json.loads(json.dumps(asdict(claim)))
    assert plain["parts"] == claim.parts
    assert plain["holds"] is True
    if CLAIM[name].__module__ == hack_claims.__name__:
        assert set(claim.figures["laws"]) < set(claim.figures["arms"])


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name, each in SABOTAGES.items() for wrong in each])
def test_a_claim_fails_when_an_object_that_it_names_is_wrong(name: str, wrong: str, monkeypatch: pytest.MonkeyPatch):
    sabotage = SABOTAGES[name][wrong]
    sabotage.apply(monkeypatch)
    claim = small(name)
    assert sabotage.calls > 0, "the claim never reached the sabotaged object"
    assert not claim.holds, f"the claim holds with {wrong}"


BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "every episode counts as kept": ("opd.objective._normalizer", lambda objective, batch, mask: float(len(batch))),
    "masked episodes still train": ("opd.objective.without_errors", lambda flagged, *_: torch.ones_like(flagged)),
    "the KL baseline has the other sign": ("opd.objectives.baselines.negative_kl", lambda kl, mask: kl * mask),
    "the reward loses its baseline": ("opd.objectives.advantages.reward_advantages", lambda r, *_: r.clamp(min=0.0)),
    "the learner divides by all episodes": ("opd_theory.mask_claims.divisor", lambda _, batch: float(len(batch))),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_claim_fails_when_the_functions_of_training_are_broken(name: str):
    target, broken = BROKEN[name]
    with patch(target, broken):
        found = mask_claims.mask_law()
    assert not found.holds, found.measured


@pytest.mark.parametrize("name", ["the learner divides by all episodes", "the reward loses its baseline"])
def test_the_tilt_claim_fails_when_the_functions_of_training_are_broken(name: str):
    target, broken = BROKEN[name]
    with patch(target, broken):
        assert not mask_claims.tilt_law().holds


def test_the_claim_on_the_attractor_fails_when_the_gym_divides_both_parts_alike():
    with patch("opd_theory.hack_gym.normalizers", lambda *_: (1.0, 1.0)):
        assert not hack_claims.attractor().holds


def test_every_claim_has_at_least_three_sabotages_and_no_other_has_any():
    assert {name: len(each) for name, each in SABOTAGES.items() if len(each) < 3} == {}
    assert set(SABOTAGES) == set(CLAIM)
    assert set(SIZES) <= set(CLAIM)


def test_a_sabotage_ends_with_its_test(monkeypatch: pytest.MonkeyPatch):
    from opd.objectives import advantages
    from opd_theory import gradient_claims

    with monkeypatch.context() as inner:
        Sabotage("objectives.advantages:future_kl", lambda f: lambda *args: 0.0).apply(inner)
        assert gradient_claims.future_kl is advantages.future_kl
        assert gradient_claims.future_kl() == 0.0
    assert gradient_claims.future_kl(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)).tolist() == [[-1.0, 0.0]]


def test_what_claims_compare_with_calls_no_function_of_training():
    tree = ast.parse(Path(written_out.__file__).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m for m in modules if m and m.startswith("opd")} == {"opd_theory.tree"}


def test_complex_steps_are_the_slopes_of_finite_differences():
    policy = instance(make_tree(3, 3, end=2, num_prompts=2), 1, sharpness=1.0)
    w = written_out.written_out(policy)
    f = np.random.default_rng(0).normal(size=len(w.logq))
    for slopes, function in (
        (w.gradient(), w.value),
        (w.occupancy_slope(f), lambda table: w.occupancy(table) @ f),
    ):
        for place in (0, 5, w.table.size - 2):
            step = np.zeros(w.table.size)
            step[place] = 1e-5
            step = step.reshape(w.table.shape)
            difference = float(function(w.table + step) - function(w.table - step)) / 2e-5
            assert slopes[place] == pytest.approx(difference, abs=1e-8)


def test_a_leave_one_out_baseline_by_hand():
    values = [[1.0, 2.0, 3.0], [5.0], [7.0, 9.0]]
    assert written_out.leave_one_out(values) == [[6.0, 9.0, 0.0], [4.0], [3.0, 2.0]]
    assert written_out.leave_one_out(values, per="prompt") == [[7.0, 7.0, 7.0], [22 / 5], [11 / 4, 11 / 4]]


def test_the_baseline_of_least_variance_is_the_vertex():
    p, values = np.array([0.2, 0.5, 0.3]), np.array([1.0, -2.0, 0.5])
    best = written_out.best_baseline(p, values)
    least = written_out.sampled_variance(p, values - best)
    assert all(written_out.sampled_variance(p, values - b) > least for b in (best - 0.01, best + 0.01))
    assert written_out.best_baseline(np.array([1.0, 0.0]), np.array([1.0, 2.0])) == 0.0


def test_a_failed_claim_names_its_false_parts():
    claim = Claim("1", "a claim", "a source", "x", "y", False, {}, {"this": True, "that": False, "those": False})
    assert claim_line(claim).splitlines()[-1].strip() == "false: that; those"
    assert "false:" not in claim_line(Claim("1", "a claim", "a source", "x", "y", True, {}, {"this": True}))
    with pytest.raises(AssertionError, match="parts"):
        Claim("1", "a claim", "a source", "x", "y", True, {}, {"this": False})
