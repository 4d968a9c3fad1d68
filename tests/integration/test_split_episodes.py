"""An episode that its chat template splits into parts is one trajectory: nothing that is defined over a trajectory may notice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import CHATML, byte_tokenizer, objective_config, prompt, rollout, scored, toy_recipe
from games import always_echo
from hypothesis import given, settings
from hypothesis import strategies as st

from opd import parse_config
from opd.batch import Batch, pack
from opd.config import Config, MaskConfig, ObjectiveConfig, RewardConfig
from opd.detectors.metrics import detector_metrics
from opd.metrics import values
from opd.objective import compute_advantages, divisor
from opd.records import ChunkScore, FailedScore, Flag, Prompt, ScoredRollout, Turn
from opd.rewards.judge import Judge
from opd_theory import probe as probe_module

CHECKED = {"task": {"type": "file", "path": "p", "teacher": "t", "checks": {"rules": ["truncated"]}}}


@dataclass(frozen=True)
class Played:
    """An episode: of each turn the log-probabilities of its actions, the student's and the teacher's; its reward, and the turn
    and action of its format error."""

    student: list[list[float]]
    teacher: list[list[float]]
    reward: float | None = None
    error: tuple[int, int] | None = None


def whole(episode: Played, name: str, sample: int) -> list[ScoredRollout]:
    """All turns in one rollout, an observation of two tokens between them."""
    ids, turns, student, teacher, flags = [1, 2], [Turn("prompt", 0, 2)], [0.0, 0.0], [], []
    for number, (ours, theirs) in enumerate(zip(episode.student, episode.teacher, strict=True)):
        if number:
            turns.append(Turn("observation", len(ids), len(ids) + 2))
            ids, student = [*ids, 8, 9], [*student, 0.0, 0.0]
        if episode.error is not None and episode.error[0] == number:
            flags.append(Flag("truncated", len(ids) + episode.error[1], len(ids) + episode.error[1] + 1))
        turns.append(Turn("student", len(ids), len(ids) + len(ours)))
        ids, student, teacher = [*ids, *range(3, 3 + len(ours))], [*student, *ours], [*teacher, *theirs]
    mask = np.zeros(len(ids), dtype=bool)
    for turn in turns:
        mask[turn.start : turn.end] = turn.author == "student"
    made = replace(
        rollout([1, 2], 2, prompt=prompt(name), sample=sample),
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.array(student, dtype=np.float32),
        turns=tuple(turns),
        reward=episode.reward,
        flags=tuple(flags),
    )
    return [scored(made, teacher)]


def parts(episode: Played, name: str, sample: int) -> list[ScoredRollout]:
    """Each turn in a rollout of its own, behind prompts of different lengths."""
    found = []
    for number, (ours, theirs) in enumerate(zip(episode.student, episode.teacher, strict=True)):
        behind = 2 + 3 * number
        made = rollout(
            [*range(1, 1 + behind), *range(3, 3 + len(ours))], behind, prompt=prompt(name), sample=sample, logprobs=ours
        )
        flags = ()
        if episode.error is not None and episode.error[0] == number:
            flags = (Flag("truncated", behind + episode.error[1], behind + episode.error[1] + 1),)
        found.append(scored(replace(made, part=number, reward=episode.reward, flags=flags), theirs))
    return found


def unread(item: ScoredRollout) -> ScoredRollout:
    return ScoredRollout(item.rollout, FailedScore(item.score.teacher, "too long"))


def filled(batch: Batch) -> Batch:
    """With the columns that a learner adds, the same for the same actions in whatever rollouts they are."""
    generator = torch.Generator().manual_seed(1)
    size = int(batch.loss_mask.sum())
    student, kl, best = (torch.zeros(len(batch.token_ids)) for _ in range(3))
    student[batch.loss_mask] = batch.rollout_logprobs[batch.loss_mask] + 0.3 * torch.randn(size, generator=generator)
    kl[batch.loss_mask] = torch.rand(size, generator=generator)
    best[batch.loss_mask] = -torch.rand(size, generator=generator)
    return replace(batch, student_logprobs=student, reverse_kl=kl, best_baseline=best)


def on_actions(how: Config, items: Sequence[ScoredRollout]) -> tuple[list[float], list[bool], list[bool], float]:
    """(advantages, distillation mask, reward mask of every action, the divisor)."""
    unscored = how.reward.coef > 0
    found, _ = compute_advantages(how, filled(pack(items, logprob_floor=-50.0, unscored=unscored)[0]))
    advantages = torch.zeros(len(found.token_ids)) if found.advantages is None else found.advantages
    mask = found.loss_mask
    assert not advantages[~mask].any()
    columns = (advantages[mask].tolist(), found.distill_mask[mask].tolist(), found.reward_mask[mask].tolist())
    return *columns, divisor(how.objective, found)


OBJECTIVES = [
    {"type": "immediate"},
    {"type": "immediate", "baseline": "leave_one_out"},
    {"type": "immediate", "baseline": "kl"},
    {"type": "to_go", "discount": 1.0},
    {"type": "to_go", "discount": 0.7, "baseline": "leave_one_out"},
    {"type": "kl_to_go", "discount": 1.0, "baseline": "score_weighted"},
    {"type": "kl_to_go", "discount": 0.5},
    {"type": "exact_to_go", "discount": 0.9, "baseline": "leave_one_out"},
    {"type": "exact"},
]
CORRECTIONS = [
    {"type": "none"},
    *({"type": "truncate", "cap": 1.2, "level": level} for level in ("token", "geometric", "sequence")),
    *({"type": "reject", "low": 0.8, "high": 1.3, "level": level} for level in ("token", "geometric", "sequence")),
]
logprobs = st.floats(-4.0, -0.125, width=32)


@st.composite
def groups(draw: st.DrawFn) -> list[tuple[Played, str, int]]:
    found = []
    for name, sample in product(("p0", "p1"), (0, 1, 2)):
        sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        error = draw(st.none() | st.integers(0, len(sizes) - 1))
        turns = [[[draw(logprobs) for _ in range(size)] for size in sizes] for _ in range(2)]
        reward = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        place = None if error is None else (error, draw(st.integers(0, sizes[error] - 1)))
        found.append((Played(*turns, reward, place), name, sample))
    return found


@settings(max_examples=200)
@given(
    groups(),
    st.sampled_from(OBJECTIVES),
    st.sampled_from(CORRECTIONS),
    st.sampled_from(["off", "trajectory", "suffix", "turn", "span"]),
    st.sampled_from([0.0, 1.5]),
    st.sampled_from(["trajectory", "token"]),
)
def test_splitting_an_episode_changes_nothing(
    played: Any, objective: dict[str, Any], correction: dict[str, Any], scope: str, coef: float, normalizer: str
):
    # set one by one: a recipe may not combine all of them, but the law holds where it may not too
    how = objective_config(tasks=CHECKED).model_copy(
        update={
            "objective": ObjectiveConfig(**objective, correction=correction, normalizer=normalizer),
            "mask": MaskConfig(format_errors=scope),
            "reward": RewardConfig(coef=coef),
        }
    )
    one = on_actions(how, [item for each in played for item in whole(*each)])
    several = on_actions(how, [item for each in played for item in parts(*each)])
    assert several[1:] == one[1:]
    np.testing.assert_allclose(several[0], one[0], rtol=2e-5, atol=2e-5)


def test_the_mean_of_sums_to_go_over_two_parts_is_the_gradient():
    """Two binary actions, the second in a part of its own: enumerated in float64 against autograd of the sequence's KL."""
    generator = torch.Generator().manual_seed(3)
    tables = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)  # states: the root, and after either action
    student, teacher = tables[0].clone().requires_grad_(), tables[1]
    logp, logq = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    value = sum(
        (logp[0, a] + logp[1 + a, b]).exp() * (logq[0, a] + logq[1 + a, b] - logp[0, a] - logp[1 + a, b])
        for a, b in product((0, 1), repeat=2)
    )
    assert isinstance(value, torch.Tensor)
    (expected,) = torch.autograd.grad(value, student, retain_graph=True)
    kl = (logp.exp() * (logp - logq)).sum(-1).detach()
    for objective in ({"type": "to_go", "discount": 1.0}, {"type": "kl_to_go", "discount": 1.0}):
        how, mean = objective_config(objective=objective), torch.zeros_like(expected)
        for a, b in product((0, 1), repeat=2):
            ours = [[logp[0, a].item()], [logp[1 + a, b].item()]]
            theirs = [[float(logq[0, a])], [float(logq[1 + a, b])]]
            batch, _ = pack(parts(Played(ours, theirs), "p0", 0), logprob_floor=-50.0)
            states = torch.zeros(len(batch.token_ids))
            states[batch.loss_mask] = torch.stack([kl[0], kl[1 + a]]).float()
            found, _ = compute_advantages(how, replace(batch, reverse_kl=states))
            assert found.advantages is not None
            first, second = found.advantages[found.loss_mask].double()
            surrogate = first * logp[0, a] + second * logp[1 + a, b]
            (score,) = torch.autograd.grad(surrogate, student, retain_graph=True)
            mean += (logp[0, a] + logp[1 + a, b]).exp().detach() * score
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)  # the batch's columns are float32


def test_a_part_without_a_score_does_not_shift_the_baseline_of_later_parts():
    """The second part is compared with the second part of the other sample, not with its first."""
    first = parts(Played([[-1.0], [-1.0]], [[-2.0], [-6.0]]), "p0", 0)
    second = parts(Played([[-1.0], [-1.0]], [[-3.0], [-4.0]]), "p0", 1)
    how = objective_config(objective={"type": "immediate", "baseline": "leave_one_out"})
    batch, counts = pack([*first, unread(second[0]), second[1]], logprob_floor=-50.0)
    assert counts == {"dropped": 1, "floored": 0}
    found, _ = compute_advantages(how, batch)
    assert found.advantages is not None
    # log ratios -1, -5 and -, -3
    assert found.advantages[found.loss_mask].tolist() == [-1.0, -5.0 + 3.0, 0.0, -3.0 + 5.0]
    assert found.distill_mask[found.loss_mask].tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("scope", "kept"),
    [
        ("trajectory", [False] * 5),
        ("suffix", [True, True, False, False, False]),
        ("turn", [True, True, False, True, True]),
    ],
)
def test_a_format_error_in_a_part_without_a_score_masks_the_other_parts(scope: str, kept: list[bool]):
    one = parts(Played([[-1.0] * 2, [-1.0], [-1.0] * 2], [[-2.0] * 2, [-2.0], [-2.0] * 2], None, (1, 0)), "p0", 0)
    how = objective_config(objective={"type": "exact"}, mask={"format_errors": scope}, tasks=CHECKED)
    found, _ = compute_advantages(how, pack([one[0], unread(one[1]), one[2]], logprob_floor=-50.0)[0])
    assert found.distill_mask[found.loss_mask].tolist() == kept


def test_a_sequence_weight_is_that_of_the_whole_episode():
    """Log weights of its parts 1.07 and -0.31: 0.76 on every action of it."""
    batch, _ = pack(parts(Played([[-2.0, -1.0], [-1.0]], [[-1.0, -1.0], [-1.0]]), "p0", 0), logprob_floor=-50.0)
    moved = batch.rollout_logprobs.clone()
    moved[batch.loss_mask] += torch.tensor([0.57, 0.5, -0.31])
    correction = {"type": "truncate", "cap": 100.0, "level": "sequence"}
    found, metrics = compute_advantages(
        objective_config(objective={"type": "immediate", "correction": correction}),
        replace(batch, student_logprobs=moved),
    )
    assert found.advantages is not None
    weights = found.advantages[found.loss_mask] / found.log_ratio[found.loss_mask]
    torch.testing.assert_close(weights.log(), torch.full((3,), 0.76), rtol=1e-5, atol=0)
    assert values(metrics)["correction/weight/mean"] == pytest.approx(np.exp(0.76), rel=1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reward_is_asked_once_an_episode(asynchronous: bool):
    """With the prompt that the student was given first and its last response, as where nothing was split."""
    split = [item.rollout for item in parts(Played([[-1.0]] * 3, [[-2.0]] * 3), "p0", 0)]
    for number, text in enumerate(("one", "two", "three")):
        before = ({"role": "user", "content": f"rewritten {number}"},)
        changed = replace(split[number].prompt, messages=before if number else split[number].prompt.messages)
        messages = (*before, {"role": "assistant", "content": text})
        split[number] = replace(split[number], prompt=changed, messages=messages)
    [other] = (item.rollout for item in whole(Played([[-1.0]], [[-2.0]]), "p0", 1))
    asked: list[tuple[str, str]] = []

    def reward(prompt: Prompt, response: str) -> Any:
        asked.append((str(prompt.messages[0]["content"]), response))
        return later(float(response == "three")) if asynchronous else float(response == "three")

    async def later(value: float) -> float:
        return value

    judged = Judge(reward, own_code=True)([*split, other])
    first = str(split[0].prompt.messages[0]["content"])
    assert asked == [(first, "three"), (str(other.prompt.messages[0]["content"]), other.response)]
    assert [r.reward for r in judged] == [1.0, 1.0, 1.0, 0.0]
    assert [r.prompt for r in judged] == [r.prompt for r in [*split, other]]


def test_parts_that_come_out_of_order_are_put_in_order():
    one = parts(Played([[-1.0], [-2.0]], [[-3.0], [-5.0]]), "p0", 0)
    two = parts(Played([[-1.0]], [[-2.0]]), "p1", 0)
    straight, _ = pack([*one, *two], logprob_floor=-50.0)
    mixed, _ = pack([one[1], *two, one[0]], logprob_floor=-50.0)
    assert mixed.rollout_ids == straight.rollout_ids == ("p0/0", "p0/0.1", "p1/0")
    assert torch.equal(mixed.teacher_logprobs, straight.teacher_logprobs)


def test_chunks_of_different_parts_are_different_chunks():
    """Both parts number their chunks from 0; the second's first chunk is not open when the first's is chosen."""
    found = []
    for item in parts(Played([[-1.0, -1.0], [-3.0, -1.0]], [[0.0, -5.0], [0.0, -7.0]]), "p0", 0):
        chunks = np.where(item.rollout.loss_mask, 0, -1)
        found.append(ScoredRollout(item.rollout, ChunkScore("t", item.score.logprobs, chunks, 4, {})))  # type: ignore[union-attr]  # none failed
    followed, _ = compute_advantages(
        objective_config(objective={"type": "immediate"}), pack(found, logprob_floor=-50.0)[0]
    )
    assert followed.advantages is not None
    assert followed.advantages[followed.loss_mask].tolist() == [-3.0, -4.0, -3.0, -6.0]


def test_detectors_read_the_same_of_an_episode_in_parts():
    """Loops, windows, rankings and advantages: long responses of three turns, some of them repeated tokens."""
    generator = np.random.default_rng(0)
    played = []
    for name, sample in product(("p0", "p1"), (0, 1)):
        ours = [(-generator.exponential(size=100)).tolist() for _ in range(3)]
        theirs = [(-generator.exponential(size=100) * (0.01 if sample else 1.0)).tolist() for _ in range(3)]
        played.append((Played(ours, theirs, float(sample), (1, 5) if name == "p1" else None), name, sample))
    how = objective_config(objective={"type": "to_go", "discount": 1.0})
    seen = []
    for make in (whole, parts):
        items = [item for each in played for item in make(*each)]
        found = values(
            detector_metrics(
                items, compute_advantages(how, pack(items, logprob_floor=-50.0)[0])[0], special_ids=frozenset({4})
            )
        )
        seen.append(found)
    assert (
        seen[0].keys() == seen[1].keys() >= {"detectors/low_kl/mean", "detectors/looping/mean", "detectors/auroc/mean"}
    )
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def test_a_probe_takes_an_episode_in_parts_as_one_response(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two estimators that are one function of an unsplit response agree; a group holds all parts of a prompt's samples."""
    forgets = CHATML.replace("+ m['content'] +", "+ (m['content'] if loop.last else m['content'][:1]) +")
    tree = toy_recipe(tmp_path, sampling={"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 30})
    for name in ("student", "even", "odd"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = forgets
        tokenizer.save_pretrained(tmp_path / name)
    read = probe_module.read_tasks
    monkeypatch.setattr(probe_module, "read_tasks", lambda config, reward: read(config, reward, always_echo))
    monkeypatch.setattr(probe_module, "run_checks", lambda config, backend, task_data: [])
    monkeypatch.setattr(probe_module, "ESTIMATORS", {n: probe_module.ESTIMATORS[n] for n in ("exact", "immediate")})
    packed: list[Batch] = []
    own = probe_module._packed
    monkeypatch.setattr(probe_module, "_packed", lambda *given: packed.append(own(*given)) or packed[-1])
    found = probe_module.probe(parse_config(tree | {"temperature": 3.0}), num_prompts=4, samples=3, repeats=20)
    assert [len(batch.first_parts) for batch in packed] == [3] * 4
    assert any(len(batch) > 3 for batch in packed)
    assert all(len({name.split("/")[0] for name in batch.rollout_ids}) == 1 for batch in packed)
    assert found.rows[0].cosine == pytest.approx(1.0, abs=1e-6)
