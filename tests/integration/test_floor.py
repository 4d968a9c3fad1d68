"""The floor of a teacher's log-probability acts on each model before its weight, in every path that reads one."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
)
from benches import in_float64 as in_float64
from factories import prompt, rollout, scored
from rich.console import Console
from torch import Tensor

from opd.batch import Batch, pack
from opd.evaluate import evaluate
from opd.logging.console import ProgressLine
from opd.objective import compute_advantages
from opd.objectives.target import target_logprobs
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss
from opd.records import SampledScore, ScoredRollout
from opd.rewards.judge import Judge
from opd.score_cache import from_bytes, to_bytes

FLOOR = -6.0  # the toys' log-probabilities reach from -0.1 to -15
EXTRAPOLATED = {"extrapolation": 3.0, "reference": "student"}


@pytest.fixture(scope="module", params=["one teacher", "mixture", "extrapolation"])
def floored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("floored")
    objective: dict[str, Any] = {"teacher_logprob_floor": FLOOR}
    tree: dict[str, Any] = {}
    prompts = PROMPTS
    if request.param == "mixture":
        tree = {
            "teachers": {"both": {"weights": {"even": 3.0, "odd": 1.0}}},
            "tasks": {"third": {"type": "file", "path": "-", "teacher": "both"}},
        }
        prompts = [replace(p, teacher="both") for p in PROMPTS]
    elif request.param == "extrapolation":
        objective |= EXTRAPOLATED
    bench = make_bench(folder, prompts, objective=objective, **tree)
    return replace(bench, batch=pack(bench.scored, logprob_floor=FLOOR)[0]), objective


def dense_targets(bench: Bench, row: int) -> tuple[Tensor, Tensor]:
    """(log q [actions, vocab] of one rollout, where a model is below the floor), written out."""
    total, below = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    assert bench.batch.teacher_parts is not None
    for part in bench.batch.teacher_parts[row]:
        head = bench.backend.policies[part.model].network.head_weight().double()
        each = torch.log_softmax(torch.tensor(part.hidden).double() @ head.T / TEMPERATURE, -1)
        total, below = total + part.weight * each.clamp(min=FLOOR), below | (each < FLOOR)
    return total, below


def sampled_of(batch: Batch, row: int, target: Tensor) -> Tensor:
    a, b = batch.offsets[row], batch.offsets[row + 1]
    return target[torch.arange(len(target)), batch.token_ids[a:b][batch.loss_mask[a:b]]]


def test_a_sampled_tokens_target_is_that_of_the_vocabulary(floored: tuple[Bench, dict[str, Any]]):
    bench, _ = floored
    batch, counts = pack(bench.scored, logprob_floor=FLOOR)
    low = 0
    for row in range(len(batch)):
        target, below = dense_targets(bench, row)
        a, b = batch.offsets[row], batch.offsets[row + 1]
        found = batch.teacher_logprobs[a:b][batch.loss_mask[a:b]].double()
        torch.testing.assert_close(found, sampled_of(batch, row, target), rtol=1e-5, atol=1e-4)
        low += int(sampled_of(batch, row, below).sum())
    assert counts["floored"] == low
    assert low > 0


def test_the_kl_is_minus_the_mean_of_the_log_ratio(floored: tuple[Bench, dict[str, Any]]):
    """So a KL-centred advantage has mean 0 where the floor acts too."""
    bench, objective = floored
    batch = bench.learner(**objective, type="immediate", baseline="kl").score_student(bench.batch)
    assert batch.reverse_kl is not None
    mean: list[Tensor] = []

    def row_mean(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        mean.append((logp.exp() * (dense_targets(bench, row)[0] - logp)).sum(-1).detach())
        return logp.sum() * 0.0

    dense_gradient(bench, batch, row_mean)
    torch.testing.assert_close(batch.reverse_kl[batch.loss_mask].double(), -torch.cat(mean), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [{"type": "exact"}, {"type": "top_k", "top_k": 4}, {"type": "immediate", "baseline": "kl"}]
)
def test_a_gradient_where_the_floor_acts_is_that_of_the_floored_target(
    floored: tuple[Bench, dict[str, Any]], kind: dict[str, Any]
):
    bench, objective = floored
    learner_options = objective | kind
    batch = bench.learner(**learner_options).score_student(bench.batch)
    batch, _ = compute_advantages(config_of(bench, learner_options), batch)

    def loss(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logp, (logq, _) = torch.log_softmax(logits, -1), dense_targets(bench, row)
        here = torch.arange(len(targets))
        if kind["type"] == "exact":
            return (logp.exp() * (logp - logq)).sum() / len(batch)
        if kind["type"] == "immediate":
            kl = (logp.exp() * (logp - logq)).sum(-1)
            advantage = (logq - logp)[here, targets] + kl
            return -(advantage.detach() * logp[here, targets]).sum() / len(batch)
        inside = torch.zeros_like(logp, dtype=torch.bool)
        for each in (logp, logq):
            inside.scatter_(-1, each.topk(4, dim=-1).indices, True)
        inside[here, targets] = True
        tails = [x.masked_fill(inside, -torch.inf).logsumexp(-1) for x in (logp, logq)]
        head = torch.where(inside, logp.exp() * (logp - logq), 0.0).sum(-1)
        return (head + tails[0].exp() * (tails[0] - tails[1])).sum() / len(batch)

    assert_same_gradient(bench.gradient(batch, **learner_options), dense_gradient(bench, batch, loss), 3e-5)


def test_an_extrapolation_aims_below_the_floor_where_no_model_is_below_it():
    """3 log q - 2 log q_ref with log q = -25.3 and log q_ref = -2.55: -70.8 on every path, and nothing is counted."""
    item = rollout([1, 2, 3], 2, prompt=prompt(), logprobs=[-1.0])
    models = tuple((w, np.array([0.0, 0.0, x], dtype=np.float32)) for w, x in ((3.0, -25.3), (-2.0, -2.55)))
    total = sum((np.float32(w) * x for w, x in models), np.zeros(3, dtype=np.float32))
    batch, counts = pack([ScoredRollout(item, SampledScore("t", total, models))], logprob_floor=-50.0)
    assert float(batch.teacher_logprobs[2]) == pytest.approx(-70.8, abs=1e-4)
    assert float(batch.log_ratio[2]) == pytest.approx(-69.8, abs=1e-4)
    assert counts["floored"] == 0


def test_the_tail_of_a_support_may_be_aimed_below_the_floor_too():
    """Two tokens off the support: no model is below the floor of -5.5 there, their target is."""
    logits = torch.tensor([[3.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    teacher = torch.log_softmax(torch.tensor([[2.0, 0.0, -3.0, -2.9]], dtype=torch.float64), -1)
    reference = torch.log_softmax(torch.tensor([[-1.0, -1.0, 3.0, 3.0]], dtype=torch.float64), -1)
    head = torch.eye(4, dtype=torch.float64)
    teachers = [TeacherStates(teacher, head, 3.0), TeacherStates(reference, head, -2.0)]
    how = VocabularyLoss(top_k=1, logprob_floor=-5.5)
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = vocabulary_loss(logits, head, teachers, one, how, sampled_ids=torch.tensor([1]))
    logp, logq = torch.log_softmax(logits, -1)[0], (3.0 * teacher - 2.0 * reference)[0]
    tail_p, tail_q = logp[2:].logsumexp(0), logq[2:].logsumexp(0)
    assert float(teacher.min()) > -5.5
    assert float(tail_q) < -5.5
    expected = (logp.exp() * (logp - logq))[:2].sum() + tail_p.exp() * (tail_p - tail_q)
    torch.testing.assert_close(loss, expected)


def test_a_token_at_which_several_models_are_below_the_floor_counts_once():
    low = [(torch.tensor([-9.0, -1.0, -torch.inf]), 0.5), (torch.tensor([-8.0, -9.0, -1.0]), 0.5)]
    found, below = target_logprobs(low, -5.0)
    assert found.tolist() == [-5.0, -3.0, -3.0]
    assert below is not None
    assert below.tolist() == [True, True, True]
    assert target_logprobs([(torch.tensor([-1.0, -5.0]), 1.0)], -5.0)[1] is None  # at the floor is not below it
    assert target_logprobs([(torch.tensor([-1.0, -9.0]), 2.0)], -5.0)[0].tolist() == [-2.0, -10.0]
    assert target_logprobs([(torch.zeros(0), 1.0)], -5.0)[0].tolist() == []


def test_a_score_of_several_models_keeps_them_on_disk():
    models = ((0.75, np.array([0.0, -1.5], dtype=np.float32)), (0.25, np.array([0.0, -3.0], dtype=np.float32)))
    score = SampledScore("t", np.array([0.0, -1.875], dtype=np.float32), models)
    again = from_bytes(to_bytes(score), teacher="t")
    assert isinstance(again, SampledScore)
    assert [w for w, _ in again.components] == [0.75, 0.25]
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(again.components, models, strict=True))


def test_an_evaluation_floors_what_training_floors(tmp_path: Path):
    """A token to which the teacher gives no probability costs 50 nats more than its own log-probability, not infinity."""

    class Told:
        def sample(self, prompts: Any, *, num_samples: int, seed: Any) -> list[Any]:
            return [rollout([1, 2, 3, 4], 2, prompt=prompt(), logprobs=[-1.0, -2.0])]

    class Reads:
        def score(self, asked: Any) -> list[ScoredRollout]:
            return [scored(r, [-np.inf, -2.5]) for r in asked]

    cell = evaluate(Told(), [], Judge(lambda p, r: 1.0), teachers=Reads(), reverse_kl=lambda items: [])  # type: ignore[arg-type]  # stand-ins
    assert cell.kl_sequence == pytest.approx((50.0 - 1.0) + (2.5 - 2.0))
    assert cell.kl_token == pytest.approx(cell.kl_sequence / 2)


@pytest.mark.parametrize(("floor", "shown"), [(-50.0, "-24.500"), (-3.0, "-1.000"), (-1e6, "-499.500")])
def test_the_table_of_sampled_responses_shows_the_log_ratio_that_training_follows(floor: float, shown: str):
    item = scored(rollout([1, 2, 3], 1, prompt=prompt(), logprobs=[-1.0, -1.0]), [-1.0, -1000.0])
    written = Console(record=True, width=200, file=io.StringIO())
    ProgressLine(1, console=written).samples([item], logprob_floor=floor)
    assert shown in written.export_text()
