"""The learner under each objective: its gradient is that of the formula written out rollout by rollout."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from benches import (
    PROMPTS,
    TEMPERATURE,
    Bench,
    assert_same_gradient,
    config_of,
    dense_gradient,
    make_bench,
    with_advantages,
)
from benches import bench as bench
from benches import in_float64 as in_float64
from torch import Tensor

from opd.batch import Batch, pack
from opd.metrics import values
from opd.objective import compute_advantages
from opd.objectives.divergences import forward_kl, jsd, top_k_reverse_kl


def teacher_logits(batch: Batch, bench: Bench, row: int) -> Tensor:
    """The target's logits [actions, vocab] of one rollout at the run's temperature, parts summed by their weights."""
    assert batch.teacher_parts is not None
    total = torch.zeros(())
    for part in batch.teacher_parts[row]:
        head = bench.backend.policies[part.model].network.head_weight().double()
        total = total + part.weight * torch.log_softmax(torch.tensor(part.hidden).double() @ head.T / TEMPERATURE, -1)
    return total


def dense_term(bench: Bench, batch: Batch, term: Any, divisor: float) -> dict[str, Tensor]:
    """The gradient of sum over distilled actions of term(log p, log q, target) / divisor, plus the policy term."""

    def loss(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        logq = teacher_logits(batch, bench, row)
        kept = batch.distill_mask[places].double()
        total = (kept * term(logp, logq, targets)).sum()
        if batch.advantages is not None:
            logprobs = logp[torch.arange(len(targets)), targets]
            trained = batch.train_mask[places].double()
            total = total - (trained * batch.advantages[places].double() * logprobs).sum()
        return total / divisor

    return dense_gradient(bench, batch, loss)


def reverse(logp: Tensor, logq: Tensor, _: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def top_k_logprobs(logp: Tensor, logq: Tensor, targets: Tensor) -> Tensor:
    found = []
    for p, q, target in zip(logp, logq, targets, strict=True):
        chosen = {*p.topk(5).indices.tolist(), *q.topk(5).indices.tolist(), int(target)}
        ids = torch.tensor(sorted(chosen))
        found.append(top_k_reverse_kl(p[ids], q[ids]))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("options", "term"),
    [
        ({"type": "exact", "divergence": "forward_kl"}, lambda p, q, _: forward_kl(p, q)),
        ({"type": "exact", "divergence": "jsd", "jsd_beta": 0.3}, lambda p, q, _: jsd(p, q, beta=0.3)),
        ({"type": "top_k", "top_k": 5}, top_k_logprobs),
    ],
    ids=["forward_kl", "jsd", "top_k"],
)
def test_the_gradient_is_that_of_the_divergence(bench: Bench, options: dict[str, Any], term: Any):
    wanted = dense_term(bench, bench.batch, term, len(bench.batch))
    for max_tokens in (1, 40, 10_000):
        assert_same_gradient(bench.gradient(max_tokens=max_tokens, **options), wanted, 1e-6)


TO_GO: dict[str, Any] = {"type": "exact_to_go", "discount": 0.9, "baseline": "leave_one_out"}


@pytest.mark.parametrize(
    "objective",
    [
        TO_GO,
        {"type": "kl_to_go", "discount": 1.0, "baseline": "kl"},
        {"type": "immediate", "baseline": "score_weighted"},
        TO_GO | {"correction": {"type": "reject", "low": 0.9, "high": 1.1}},
    ],
    ids=["exact_to_go", "kl_to_go", "score_weighted", "rejected"],
)
@pytest.mark.parametrize("normalizer", ["trajectory", "token"])
def test_the_gradient_of_a_sampled_objective_is_written_out(bench: Bench, objective: dict[str, Any], normalizer: str):
    objective = objective | {"normalizer": normalizer}
    stale = with_advantages(bench.batch)  # whose rollout log-probabilities are those of a policy that has moved since
    batch = bench.learner(**objective).score_student(replace(stale, advantages=None))
    batch, _ = compute_advantages(config_of(bench, objective), batch)
    if "correction" in objective:
        assert 0 < int(batch.train_mask.sum()) < int(batch.loss_mask.sum())
    rows = batch.padded(batch.train_mask)
    divisor = float(rows.any(-1).sum() if normalizer == "trajectory" else rows.sum())
    term = reverse if objective["type"] == "exact_to_go" else (lambda p, q, _: torch.zeros(len(p)))
    wanted = dense_term(bench, batch, term, divisor)
    for max_tokens in (1, 60, 10_000):
        assert_same_gradient(bench.gradient(batch, max_tokens=max_tokens, **objective), wanted, 1e-6)


def test_the_learners_scores_of_the_student_are_those_of_plain_passes(bench: Bench):
    found = bench.learner(baseline="score_weighted", type="immediate", max_tokens=40).score_student(bench.batch)
    network = bench.backend.student.network
    bench.learner()  # activates the student's adapter
    for row, (start, end) in enumerate(zip(found.offsets, found.offsets[1:], strict=False)):
        ids = found.token_ids[start:end]
        places = found.loss_mask[start:end].nonzero()[:, 0]
        with torch.no_grad():
            logits = network.base(input_ids=ids[None]).logits[0, places - 1] / TEMPERATURE
        logp, logq = torch.log_softmax(logits, -1), teacher_logits(found, bench, row)
        p, r = logp.exp(), logq - logp
        n = 1 - 2 * p + p.square().sum(-1, keepdim=True)
        expected = {
            "student_logprobs": logp[torch.arange(len(places)), ids[places]],
            "reverse_kl": -(p * r).sum(-1),
            "best_baseline": (p * r * n).sum(-1) / (p * n).sum(-1),
        }
        for name, wanted in expected.items():
            column = getattr(found, name)[start:end]
            torch.testing.assert_close(column[places].double(), wanted, rtol=1e-5, atol=1e-5)
            assert not column[~found.loss_mask[start:end]].any()


def test_ppo_takes_its_ratio_to_the_student_as_the_update_found_it(bench: Bench):
    objective = {"type": "immediate", "loss": "ppo", "correction": {"type": "truncate"}}
    batch = bench.learner(**objective).score_student(replace(with_advantages(bench.batch), advantages=None))
    batch, _ = compute_advantages(config_of(bench, objective), batch)
    # at that student the ratio is 1, whoever sampled: the gradient is that of REINFORCE
    plain = bench.gradient(batch, type="immediate", correction={"type": "truncate"})
    assert_same_gradient(bench.gradient(batch, **objective), plain, 1e-6)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All prompts follow both teachers, with weights 3 and 1."""
    tree = {
        "teachers": {"both": {"weights": {"even": 3.0, "odd": 1.0}}},
        "tasks": {"third": {"type": "file", "path": "-", "teacher": "both"}},
    }
    prompts = [replace(p, teacher="both") for p in PROMPTS]
    return make_bench(tmp_path_factory.mktemp("merged"), prompts, **tree)


def test_several_teachers_weigh_as_one(merged: Bench):
    assert merged.batch.teacher_parts is not None
    assert [[p.weight for p in parts] for parts in merged.batch.teacher_parts] == [[0.75, 0.25]] * len(merged.batch)
    wanted = dense_term(merged, merged.batch, reverse, len(merged.batch))
    for max_tokens in (1, 10_000):
        assert_same_gradient(merged.gradient(max_tokens=max_tokens, type="exact"), wanted, 1e-6)


def test_a_sampled_score_of_several_teachers_is_the_weighted_log_probability(merged: Bench):
    merged.backend.student.network.base.float()
    rollouts = [s.rollout for s in merged.scored]
    apart = {
        name: merged.backend.local_teachers({"both": merged.backend.targets[name]}, keep_hidden=False).score(rollouts)
        for name in ("even", "odd")
    }
    merged.backend.student.network.base.double()
    for i, item in enumerate(merged.scored):
        expected = 0.75 * apart["even"][i].score.logprobs + 0.25 * apart["odd"][i].score.logprobs
        torch.testing.assert_close(torch.tensor(item.score.logprobs), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reference", ["student", "odd"])
def test_extrapolation_scores_against_the_reference(tmp_path_factory: pytest.TempPathFactory, reference: str):
    objective = {"extrapolation": 1.5, "reference": reference}
    found = make_bench(tmp_path_factory.mktemp("extrapolated"), objective=objective)
    assert found.batch.teacher_parts is not None
    names = {"student": "the initial student"}.get(reference, reference)
    first = found.batch.teacher_parts[0]
    assert [(part.model, part.weight) for part in first] == [("even", 1.5), (names, -0.5)]
    wanted = dense_term(found, found.batch, reverse, len(found.batch))
    assert_same_gradient(found.gradient(type="exact", **objective), wanted, 1e-6)
    # what the table of parity compares with is the teacher itself
    plain = found.backend.teachers(keep_hidden=False)
    assert [part.weight for part in found.backend.targets["even"]] == [1.0]
    assert plain is not None


def test_an_all_masked_batch_has_no_loss_and_no_gradient(bench: Bench):
    nothing = torch.zeros_like(bench.batch.loss_mask)
    batch = replace(bench.batch, distill_mask=nothing)
    gradient, loss = bench.gradient_and_loss(batch, type="exact")
    assert loss == 0.0
    assert all(not g.any() for g in gradient.values())


def test_the_metrics_of_a_support_show_what_it_leaves_out(bench: Bench):
    found = values(bench.learner(type="top_k", top_k=3).forward_backward(bench.batch))
    whole = values(bench.learner(type="exact").forward_backward(bench.batch))
    assert 0 < found["top_k/tail_mass/mean"] < 1
    assert found["divergence/token/mean"] < found["kl/token/mean"]
    assert found["kl/token/mean"] == pytest.approx(whole["kl/token/mean"], rel=1e-6)


def test_a_group_of_equal_samples_still_packs(bench: Bench):
    first = bench.scored[0]
    again = replace(first, rollout=replace(first.rollout, sample=first.rollout.sample + 1))
    batch, _ = pack([first, again], logprob_floor=-50.0)
    scored = bench.learner(**TO_GO).score_student(batch)
    found, _ = compute_advantages(config_of(bench, TO_GO), scored)
    assert found.advantages is not None
    assert float(found.advantages.abs().max()) < 1e-6  # each is the other's baseline
