"""Rollouts without a score: a reward still acts on them, steps without any are skipped and counted, and all of it is shown."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import assert_same_gradient, float64_norms, make_bench
from factories import objective_config, prompt, rollout, scored, toy_recipe

import opd
from opd.batch import pack, trainable
from opd.errors import RunError
from opd.evaluate import ParityRow, evaluate, parity_text
from opd.metrics import values
from opd.objective import compute_advantages
from opd.records import FailedScore, Flag, HiddenPart, HiddenScore, Message, Prompt, Rollout, ScoredRollout
from opd.rewards.judge import Judge
from opd.step_metrics import rollout_metrics

UNREADABLE = "too long for the teacher"


def unscored(item: ScoredRollout) -> ScoredRollout:
    return ScoredRollout(item.rollout, FailedScore(item.score.teacher, UNREADABLE))


def four() -> list[ScoredRollout]:
    """Two samples of two prompts, rewards 0, 1, 0, 1; the second one has a format error."""
    found = []
    for i in range(4):
        item = rollout([1, 2, 3, 4], 2, prompt=prompt(f"p{i // 2}"), sample=i % 2)
        flags = (Flag("truncated", 3, 4),) if i == 1 else ()
        found.append(scored(replace(item, reward=float(i % 2), flags=flags), [-0.5 * (i + 1), -1.0]))
    return found


def test_an_outcome_acts_where_no_teacher_could_score():
    """The same advantages as if it had been scored and its distillation part left out by hand."""
    items = four()
    some = [items[0], unscored(items[1]), *items[2:]]
    how = objective_config(objective={"type": "immediate"}, reward={"coef": 2.0})
    batch, counts = pack(some, logprob_floor=-50.0, unscored=True)
    assert counts == {"dropped": 0, "floored": 0, "unscored": 1}
    found, _ = compute_advantages(how, batch)
    assert found.advantages is not None
    row = batch.padded(found.advantages)[1][2:]
    # reward -1 (its format error) against 0 of the other sample; the reward's own denominator is 4 episodes, the divisor's 3
    torch.testing.assert_close(row, torch.full((2,), 2.0 * (-1.0 - 0.0) * 3 / 4))
    assert not batch.padded(found.distill_mask)[1].any()
    assert batch.padded(found.reward_mask)[1].sum() == 2
    assert [bool(x) for x in batch.leading] == [True, False, True, True]


def test_without_an_outcome_they_are_dropped_and_counted():
    items = four()
    batch, counts = pack([items[0], unscored(items[1])], logprob_floor=-50.0)
    assert (len(batch), counts["dropped"]) == (1, 1)


def test_an_episode_that_failed_never_trains():
    [first, *_] = four()
    broken = ScoredRollout(replace(first.rollout, failure="gone"), FailedScore("t", "gone"))
    assert trainable([broken], unscored=True) == []


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "exact"},
        {"type": "top_k", "top_k": 8},
        {"type": "immediate", "baseline": "kl"},
        {"type": "immediate"},
    ],
)
def test_the_gradient_is_that_of_the_scored_rest_and_of_the_outcome(tmp_path: Path, objective: dict[str, Any]):
    """Against the batch in which every rollout has a score, whose distillation mask lacks the row."""
    with float64_norms():
        bench = make_bench(tmp_path)
        rewarded = [replace(s, rollout=replace(s.rollout, reward=float(i % 2))) for i, s in enumerate(bench.scored)]
        lost = 2
        how = objective_config(objective=objective, reward={"coef": 1.0})
        found, _ = pack(
            [unscored(s) if i == lost else s for i, s in enumerate(rewarded)], logprob_floor=-50.0, unscored=True
        )
        whole, _ = pack(rewarded, logprob_floor=-50.0)
        learner = bench.learner(**objective)
        plain = compute_advantages(how, learner.score_student(found))[0]
        expected = compute_advantages(how, learner.score_student(whole))[0]
        row = torch.repeat_interleave(torch.arange(len(whole)) == lost, whole.lengths)
        # by hand: no distillation in that row, of whose advantage the reward alone is left, and one rollout fewer to divide by
        reward = compute_advantages(
            objective_config(objective={"coef": 0.0, "type": "immediate"}, reward={"coef": 1.0}), whole
        )[0].advantages
        rest = compute_advantages(
            objective_config(objective=objective, reward={"coef": 0.0, "baseline": "none"}), expected
        )[0].advantages
        assert reward is not None
        share = (len(whole) - 1) / len(whole)
        kept = torch.zeros_like(reward) if rest is None else torch.where(row, 0.0, rest)
        expected = replace(expected, distill_mask=expected.distill_mask & ~row, advantages=kept + share * reward)
        assert_same_gradient(bench.gradient(plain, **objective), bench.gradient(expected, **objective), 1e-6)


class Silent:
    """An environment that fails in the steps that it is told to."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    async def reset(self) -> Sequence[Message]:
        if self.fails:
            raise ConnectionError("the server is down")
        return ()

    async def step(self, message: Message) -> opd.Step:
        return opd.Step(done=True, reward=1.0)


def down(steps: Sequence[int], per_step: int) -> Any:
    """Environments of which those of these steps fail."""
    made = iter(range(10**6))
    return lambda prompt: Silent(next(made) // per_step + 1 in steps)


def recipe(folder: Path, **changes: Any) -> opd.Config:
    sampling = {"prompts_per_step": 2, "group_size": 1, "max_new_tokens": 4}
    checks = {"evaluation": {"num_prompts": 0}, "sampling": sampling}
    return opd.parse_config(toy_recipe(folder, **checks, **changes))


def test_a_step_without_any_rollout_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.run.run_checks", lambda config, backend, task_data: [])  # they would play episodes too
    run = opd.train(recipe(tmp_path, steps=4), environment=down((2,), 2)).run
    lines = opd.read_metrics(run)
    assert [line.get("update/skipped/sum", 0.0) for line in lines] == [0.0, 1.0, 0.0, 0.0]
    assert lines[1]["batch/dropped/sum"] == 2
    assert {s.rollout.policy_version for s in opd.read_rollouts(run, 3)} == {
        2
    }  # as a run that was resumed there has it
    assert lines[1]["episode/failed/sum"] == 2
    assert [s.rollout.failure for s in opd.read_rollouts(run, 2)] == [
        "the environment raised ConnectionError: the server is down"
    ] * 2


def test_a_run_of_which_nothing_comes_any_more_stops_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.run.run_checks", lambda config, backend, task_data: [])
    with pytest.raises(RunError, match=r"no rollout of the last 3 steps can be trained on \(.*the server is down\)"):
        opd.train(recipe(tmp_path, steps=9), environment=down((2, 3, 4), 2))


def test_a_run_whose_environments_never_answer_is_not_started(tmp_path: Path):
    with pytest.raises(
        opd.OpdError, match=r"'episodes can be played' failed: 0 of 4 can be scored .*the server is down"
    ):
        opd.train(recipe(tmp_path, steps=2), environment=down(range(1, 99), 2))
    assert not (tmp_path / "run" / "config.json").exists()


def parts_of(name: str, sizes: Sequence[int]) -> list[Rollout]:
    """An episode in as many rollouts."""
    made = [rollout([1, 2, *range(3, 3 + n)], 2, prompt=prompt(name)) for n in sizes]
    return [replace(r, part=i) for i, r in enumerate(made)]


def test_figures_of_an_episode_count_all_of_its_parts_once():
    rollouts = [*parts_of("p0", (3, 2)), *parts_of("p1", (1,))]
    assert values(rollout_metrics(rollouts))["response/length/mean"] == 3.0

    class Told:
        def sample(self, prompts: Any, *, num_samples: int, seed: Any) -> list[Rollout]:
            return rollouts

    class Reads:
        def score(self, asked: Sequence[Rollout]) -> list[ScoredRollout]:
            def hidden(r: Rollout) -> HiddenScore:
                states = np.zeros((r.num_actions, 2), dtype=np.float32)
                return HiddenScore("t", np.zeros(len(r.token_ids), dtype=np.float32), (HiddenPart("t", 1.0, states),))

            return [ScoredRollout(r, hidden(r)) for r in asked]

    cell = evaluate(
        Told(), [], Judge(lambda p, r: 1.0), teachers=Reads(),
        reverse_kl=lambda items: [np.ones(s.rollout.num_actions) for s in items],
    )  # type: ignore[arg-type]  # a stand-in  # fmt: skip
    assert (cell.kl_token, cell.kl_sequence, cell.total) == (1.0, 3.0, 2)


def test_episodes_that_failed_are_counted_beside_the_accuracy():
    good, bad = rollout([1, 2, 3], 2, prompt=prompt("p0")), rollout([1, 2, 3], 2, prompt=prompt("p1"))
    bad = replace(bad, failure="gone", reward=None)

    class Told:
        def sample(self, prompts: Any, *, num_samples: int, seed: Any) -> list[Rollout]:
            return [good, bad]

    cell = evaluate(Told(), [], Judge(lambda p, r: 1.0))  # type: ignore[arg-type]  # a stand-in
    assert (cell.total, cell.verified, cell.failed) == (2, 1, 1)


def test_a_grader_takes_the_place_of_what_an_environment_gave():
    item = replace(rollout([1, 2, 3], 2, prompt=prompt()), reward=0.25)

    def reward(p: Prompt, response: str) -> float:
        return 1.0

    assert Judge(reward)([item])[0].reward == 0.25
    assert Judge(reward, own=["task"])([item])[0].reward == 1.0
    assert Judge(reward, own=["another"])([item])[0].reward == 0.25


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "exact"},
        {"type": "top_k", "top_k": 8},
        {"type": "exact_to_go", "discount": 1.0, "baseline": "leave_one_out"},
        {"type": "kl_to_go", "discount": 1.0},
        {"type": "to_go", "discount": 1.0},
        {"type": "immediate", "baseline": "kl"},
        {"type": "immediate", "baseline": "score_weighted"},
    ],
)
def test_a_step_of_which_nothing_was_scored_follows_its_outcome(tmp_path: Path, objective: dict[str, Any]):
    """The gradient is that of the reward alone."""
    with float64_norms():
        bench = make_bench(tmp_path)
        lost = [
            unscored(replace(s, rollout=replace(s.rollout, reward=float(i % 2)))) for i, s in enumerate(bench.scored)
        ]
        batch, _ = pack(lost, logprob_floor=-50.0, unscored=True)
        how = objective_config(objective=objective, reward={"coef": 1.0})
        found = compute_advantages(how, bench.learner(**objective).score_student(batch))[0]
        alone = {"coef": 0.0, "type": "immediate"}
        expected = compute_advantages(objective_config(objective=alone, reward={"coef": 1.0}), batch)[0]
        assert_same_gradient(bench.gradient(found, **objective), bench.gradient(expected, **alone), 1e-6)


def test_what_has_neither_score_nor_verdict_is_dropped():
    [first, second, *_] = four()
    no_verdict = ScoredRollout(replace(first.rollout, reward=None), FailedScore("t", UNREADABLE))
    flagged = ScoredRollout(replace(second.rollout, reward=None), FailedScore("t", UNREADABLE))
    assert trainable([no_verdict, flagged], unscored=True) == [flagged]


def test_rewards_in_part_have_a_mean_beside_the_accuracy():
    made = [rollout([1, 2, 3], 2, prompt=prompt(f"p{i}")) for i in range(2)]

    class Told:
        def sample(self, prompts: Any, *, num_samples: int, seed: Any) -> list[Rollout]:
            return made

    half = evaluate(Told(), [], Judge(lambda p, r: 0.5, own=["task"]))  # type: ignore[arg-type]  # a stand-in
    assert (half.accuracy, half.mean_reward) == (0.0, 0.5)
    assert "0.0 [0.0, 65.8] of 2, mean reward 0.50 [0.17, 0.83]" in parity_text(
        [ParityRow("t", "train", "t", None, None, half)]
    )
    whole = evaluate(Told(), [], Judge(lambda p, r: 1.0, own=["task"]))  # type: ignore[arg-type]  # a stand-in
    assert (whole.accuracy, whole.mean_reward) == (1.0, 1.0)
    assert "mean reward" not in parity_text([ParityRow("t", "train", "t", None, None, whole)])
    assert ParityRow("t", "train", "t", None, whole, half).parity == 0.5
