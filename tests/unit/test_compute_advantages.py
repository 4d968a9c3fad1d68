"""From a batch to what the learner follows: every objective, baseline, mask and correction."""

from dataclasses import replace

import pytest
import torch
from factories import CHECKED, objective_config, prompt, rollout, scored

from opd.batch import Batch, pack
from opd.config import MaskConfig
from opd.metrics import values
from opd.objective import compute_advantages, divisor
from opd.objectives import advantages as adv
from opd.objectives import baselines
from opd.objectives.reduce import MaskScope, without_errors
from opd.records import Flag

PROMPTS = {name: prompt(name) for name in ("p0", "p1")}


def make_batch(*, scores: bool = True) -> Batch:
    """Two prompts, two samples each, of 3, 2, 1 and 2 actions; the second one was cut at its length."""
    lengths = [3, 2, 1, 2]
    items = []
    for i, n in enumerate(lengths):
        item = rollout([1, 2, *range(3, 3 + n)], 2, prompt=PROMPTS[f"p{i // 2}"], sample=i % 2, logprobs=[-1.0] * n)
        flags = (Flag("truncated", 2 + n - 1, 2 + n),) if i == 1 else ()
        item = replace(item, reward=float(i % 2), finish="length" if i == 1 else "end", flags=flags)
        items.append(scored(item, [-0.5 * (i + k + 1) for k in range(n)]))
    batch, _ = pack(items, logprob_floor=-50.0)
    if not scores:
        return batch
    noise = torch.Generator().manual_seed(0)
    size = len(batch.token_ids)
    return replace(
        batch,
        student_logprobs=torch.where(batch.loss_mask, -1.0 + 0.3 * torch.randn(size, generator=noise), 0.0),
        reverse_kl=torch.where(batch.loss_mask, torch.rand(size, generator=noise), 0.0),
        best_baseline=torch.where(batch.loss_mask, -torch.rand(size, generator=noise), 0.0),
    )


def columns(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log ratio, reverse KL, mask), padded."""
    assert batch.student_logprobs is not None
    assert batch.reverse_kl is not None
    return (
        batch.padded(batch.teacher_logprobs - batch.student_logprobs),
        batch.padded(batch.reverse_kl),
        batch.padded(batch.loss_mask),
    )


@pytest.mark.parametrize("kind", ["exact", "top_k"])
def test_an_integrated_objective_has_no_sampled_advantage(kind: str):
    batch, metrics = compute_advantages(objective_config(objective={"type": kind}), make_batch(scores=False))
    assert batch.advantages is None
    assert metrics == {}


def test_each_sampled_objective_is_its_function_of_the_batch():
    batch = make_batch()
    ratio, kl, mask = columns(batch)
    future = adv.future_kl(kl, mask, 0.9)
    expected = {
        ("immediate", None): adv.immediate(ratio, mask),
        ("to_go", 0.7): adv.log_ratio_to_go(ratio, mask, 0.7),
        ("kl_to_go", 1.0): adv.kl_to_go(ratio, kl, mask, 1.0),
        ("exact_to_go", 0.9): future - baselines.leave_one_out(future, mask, batch.group_ids),
    }
    for (kind, discount), wanted in expected.items():
        objective = {"type": kind, "discount": discount} if discount is not None else {"type": kind}
        if kind == "exact_to_go":
            objective["baseline"] = "leave_one_out"
        found, _ = compute_advantages(objective_config(objective=objective), batch)
        assert found.advantages is not None
        torch.testing.assert_close(found.advantages, batch.flatten(wanted))


def test_each_baseline_is_subtracted():
    batch = make_batch()
    ratio, kl, mask = columns(batch)
    plain = adv.immediate(ratio, mask)
    assert batch.best_baseline is not None
    expected = {
        "leave_one_out": baselines.leave_one_out(plain, mask, batch.group_ids),
        "kl": -kl * mask,
        "score_weighted": batch.padded(batch.best_baseline),
    }
    for name, baseline in expected.items():
        found, _ = compute_advantages(objective_config(objective={"type": "immediate", "baseline": name}), batch)
        assert found.advantages is not None
        torch.testing.assert_close(found.advantages, batch.flatten(plain - baseline))


def test_without_the_learners_scores_the_sampled_log_probabilities_count():
    batch = make_batch(scores=False)
    found, _ = compute_advantages(objective_config(objective={"type": "immediate"}), batch)
    assert found.advantages is not None
    wanted = torch.where(batch.loss_mask, batch.teacher_logprobs - batch.rollout_logprobs, 0.0)
    torch.testing.assert_close(found.advantages, wanted)


def test_an_objective_that_needs_the_students_scores_says_so():
    with pytest.raises(ValueError, match=r"needs batch.reverse_kl; call learner.score_student"):
        compute_advantages(objective_config(objective={"type": "kl_to_go", "discount": 1.0}), make_batch(scores=False))


def test_the_outcome_is_added_on_every_action():
    batch = make_batch(scores=False)
    plain, _ = compute_advantages(objective_config(objective={"type": "immediate"}), batch)
    found, _ = compute_advantages(objective_config(objective={"type": "immediate"}, reward={"coef": 2.0}), batch)
    assert plain.advantages is not None
    assert found.advantages is not None
    added = batch.padded(found.advantages - plain.advantages)
    # rewards 0, -1 (a format error, whatever its verdict), 0, 1; against the other sample of the prompt 1, -1, -1, 1
    for row, sign in enumerate((1.0, -1.0, -1.0, 1.0)):
        mask = batch.padded(batch.loss_mask)[row]
        torch.testing.assert_close(added[row][mask], torch.full((int(mask.sum()),), 2.0 * sign))
        assert not added[row][~mask].any()


def test_a_masked_response_leaves_the_distillation_term_and_the_normaliser():
    batch = make_batch()
    found, metrics = compute_advantages(
        objective_config(
            objective={"type": "immediate", "baseline": "kl"}, mask={"format_errors": "trajectory"}, tasks=CHECKED
        ),
        batch,
    )
    masked = batch.padded(found.loss_mask & ~found.distill_mask).any(-1)
    assert masked.tolist() == [False, True, False, False]
    assert torch.equal(found.train_mask, found.distill_mask)
    assert found.advantages is not None
    assert not found.padded(found.advantages)[1].any()
    assert values(metrics) == {"mask/rollouts/sum": 1.0, "mask/tokens/sum": 2.0}


def test_a_masked_response_keeps_its_outcome():
    batch = make_batch()
    found, _ = compute_advantages(
        objective_config(
            objective={"type": "exact"}, mask={"format_errors": "trajectory"}, tasks=CHECKED, reward={"coef": 1.0}
        ),
        batch,
    )
    assert torch.equal(found.train_mask, batch.loss_mask)
    assert not found.padded(found.distill_mask)[1].any()
    assert found.advantages is not None
    # -1 against the 0 of the prompt's other sample, on two actions; three responses are distilled, four have a reward
    assert found.padded(found.advantages)[1].sum() == pytest.approx(-2.0 * 3 / 4)


def test_a_format_error_is_a_verdict_of_its_own():
    batch = make_batch()
    batch = replace(batch, rewards=torch.tensor([0.0, float("nan"), float("nan"), 1.0]))
    found, _ = compute_advantages(
        objective_config(objective={"coef": 0.0}, reward={"coef": 1.0, "format_error": -2.0}), batch
    )
    assert found.padded(found.reward_mask).any(-1).tolist() == [True, True, False, True]
    assert found.advantages is not None
    assert found.padded(found.advantages)[:, 2].tolist() == [2.0, -2.0, 0.0, 0.0]


def test_distillation_and_outcome_have_denominators_of_their_own():
    """Leaving three of four responses out of the distillation term makes neither term smaller."""
    batch = make_batch()
    both = objective_config(
        objective={"type": "immediate", "baseline": "kl"}, reward={"coef": 1.0, "baseline": "none"}, tasks=CHECKED
    )
    whole, _ = compute_advantages(both, batch)
    flagged = batch.loss_mask & (torch.repeat_interleave(torch.arange(4), batch.lengths) > 0)
    masked, _ = compute_advantages(
        both.model_copy(update={"mask": MaskConfig(format_errors="trajectory")}), replace(batch, flagged=flagged)
    )
    assert (divisor(both.objective, whole), divisor(both.objective, masked)) == (4.0, 1.0)
    assert whole.advantages is not None
    assert masked.advantages is not None
    rows = torch.repeat_interleave(torch.arange(4), batch.lengths)
    # the reward's part of the loss, a mean over the four episodes that have one: -1 for each of the three with an error
    for row, reward in enumerate((0.0, -1.0, -1.0, -1.0)):
        mine = batch.loss_mask & (rows == row)
        if row:
            expected = torch.full((int(mine.sum()),), reward / 4)
            torch.testing.assert_close(masked.advantages[mine] / divisor(both.objective, masked), expected)


@pytest.mark.parametrize(
    ("scope", "kept"),
    [("trajectory", ["", "ab"]), ("suffix", ["ab", "ab"]), ("turn", ["adefghij", "ab"]), ("span", ["abdefghij", "ab"])],
)
def test_the_scopes_of_a_mask(scope: MaskScope, kept: list[str]):
    """A trajectory with an error in the third of its tokens, and one without."""
    flagged = torch.zeros(2, 10, dtype=torch.bool)
    flagged[0, 2] = True
    turns = torch.tensor([[0, 1, 1, 2, 3, 3, 4, 5, 5, 5], [0] * 10])
    found = without_errors(flagged, turns, scope)
    shown = [
        "".join("abcdefghij"[t] for t in range(n) if row[t]) for row, n in zip(found.tolist(), (10, 2), strict=True)
    ]
    assert shown == kept


def test_the_parts_of_an_episode_share_one_outcome():
    """Split in two by its template, an episode counts once against the other sample of its prompt."""
    items = []
    for sample, part, reward in ((0, 0, 1.0), (0, 1, 1.0), (1, 0, 0.0)):
        item = rollout([1, 2, 3], 2, prompt=PROMPTS["p0"], sample=sample)
        items.append(scored(replace(item, reward=reward, part=part), [-0.5]))
    batch, _ = pack(items, logprob_floor=-50.0)
    assert batch.episodes.tolist() == [0, 0, 1]
    found, _ = compute_advantages(objective_config(objective={"coef": 0.0}, reward={"coef": 1.0}), batch)
    assert found.advantages is not None
    assert found.advantages[found.loss_mask].tolist() == [1.0, 1.0, -1.0]
    assert divisor(objective_config(objective={"coef": 0.0}, reward={"coef": 1.0}).objective, found) == 2.0


def test_the_parts_of_an_episode_are_no_baseline_for_each_other():
    items = []
    for sample, part, logprob in ((0, 0, -2.0), (0, 1, -6.0), (1, 0, -3.0)):
        item = rollout([1, 2, 3], 2, prompt=PROMPTS["p0"], sample=sample, logprobs=[-1.0])
        items.append(scored(replace(item, part=part), [logprob]))
    batch, _ = pack(items, logprob_floor=-50.0)
    found, _ = compute_advantages(objective_config(objective={"type": "immediate", "baseline": "leave_one_out"}), batch)
    assert found.advantages is not None
    # log ratios -1 and -5, and -2 of the other sample's first part; nobody else has a second
    assert found.advantages[found.loss_mask].tolist() == [1.0, -5.0, -1.0]


def test_truncated_weights_multiply_and_are_counted():
    batch = make_batch()
    assert batch.student_logprobs is not None
    objective = {"type": "immediate", "correction": {"type": "truncate", "cap": 1.1}}
    found, metrics = compute_advantages(objective_config(objective=objective), batch)
    ratio, _, mask = columns(batch)
    weights = (batch.padded(batch.student_logprobs - batch.rollout_logprobs)).exp().clamp(max=1.1)
    assert found.advantages is not None
    torch.testing.assert_close(found.advantages, batch.flatten(torch.where(mask, ratio * weights, 0.0)))
    assert torch.equal(found.train_mask, batch.loss_mask)
    plain = (batch.student_logprobs - batch.rollout_logprobs)[batch.loss_mask].exp()
    assert values(metrics)["correction/truncated/sum"] == float((plain > 1.1).sum()) > 0
    assert values(metrics)["correction/weight/mean"] == pytest.approx(float(plain.mean()))
    gaps = plain.double().log().abs()
    assert values(metrics)["correction/gap/mean"] == pytest.approx(float(gaps.mean()), rel=1e-5)
    assert values(metrics)["correction/gap/max"] == pytest.approx(float(gaps.max()), rel=1e-5)


def test_rejected_tokens_leave_what_trains():
    batch = make_batch()
    assert batch.student_logprobs is not None
    objective = {"type": "exact", "correction": {"type": "reject", "low": 0.8, "high": 1.25}}
    found, metrics = compute_advantages(objective_config(objective=objective), batch)
    weights = (batch.student_logprobs - batch.rollout_logprobs).exp()
    kept = batch.loss_mask & (weights >= 0.8) & (weights <= 1.25)
    assert 0 < int(kept.sum()) < int(batch.loss_mask.sum())
    assert torch.equal(found.train_mask, kept)
    assert torch.equal(found.distill_mask, kept)
    assert values(metrics)["correction/rejected/sum"] == float((batch.loss_mask & ~kept).sum())
