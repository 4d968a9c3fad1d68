"""The learner in process: its gradient is that of the written-out loss, however a batch is split, and its steps are safe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benches import (
    TEMPERATURE,
    Bench,
    assert_same_gradient,
    dense_gradient,
    heads_of,
    make_bench,
    with_advantages,
)
from benches import bench as bench
from benches import in_float64 as in_float64
from factories import toy_model
from safetensors.torch import load, save
from torch import Tensor

import opd
from opd.batch import Batch, pack
from opd.config import OptimizerConfig
from opd.errors import ScoreError
from opd.local.learner import LocalLearner, learning_rate
from opd.metrics import values
from opd.objective import compute_advantages
from opd.records import HiddenScore, Score


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("full"), trainable="full")


def dense_exact(bench: Bench, batch: Batch, divisor: float, *, plain_teachers: bool = False) -> dict[str, Tensor]:
    """The gradient of sum KL(student, teacher) / divisor, with the teachers' logits from their hidden states or models."""
    models = {"even": toy_model(1).double(), "odd": toy_model(2).double()}
    heads = heads_of(bench.backend, torch.float64)

    @torch.no_grad()
    def teacher_logits(row: int, places: Tensor) -> Tensor:
        teacher = batch.teachers[row]
        if not plain_teachers:
            assert batch.teacher_parts is not None
            [part] = batch.teacher_parts[row]
            assert (part.model, part.weight) == (teacher, 1.0)
            return torch.tensor(part.hidden).double() @ heads[teacher].double().T
        start, end = batch.offsets[row], batch.offsets[row + 1]
        return models[teacher](input_ids=batch.token_ids[None, start:end]).logits[0, places - start - 1]

    def loss(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logp = torch.log_softmax(logits, -1)
        logq = torch.log_softmax(teacher_logits(row, places) / TEMPERATURE, -1)
        return (logp.exp() * (logp - logq)).sum() / divisor

    return dense_gradient(bench, batch, loss)


def dense_policy(bench: Bench, batch: Batch, divisor: float, *, clip: tuple[float, float] | None) -> dict[str, Tensor]:
    """The gradient of -sum A log pi / divisor, or of the clipped surrogate."""

    def loss(logits: Tensor, targets: Tensor, places: Tensor, row: int) -> Tensor:
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
        assert batch.advantages is not None
        advantage = batch.advantages[places].double()
        if clip is None:
            return -(advantage * logprobs).sum() / divisor
        weight = (logprobs - batch.rollout_logprobs[places].double()).exp()
        clipped = torch.clamp(weight, 1 - clip[0], 1 + clip[1])
        return -torch.minimum(weight * advantage, clipped * advantage).sum() / divisor

    return dense_gradient(bench, batch, loss)


OBJECTIVES = [
    {"type": "exact"},
    {"type": "exact", "normalizer": "token"},
    {"type": "immediate"},
    {"type": "to_go", "discount": 1.0, "normalizer": "token"},
    {"type": "immediate", "loss": "ppo"},
    {"type": "immediate", "normalizer": "constant", "constant": 3.0},
]


def for_objective(batch: Batch, options: dict[str, Any]) -> Batch:
    return batch if options["type"] == "exact" else with_advantages(batch)


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_any_split_into_passes_gives_the_same_gradient(bench: Bench, options: dict[str, Any]):
    batch = for_objective(bench.batch, options)
    whole, loss = bench.gradient_and_loss(batch, **options)
    for max_tokens in (1, 37, 60, 90):
        split, split_loss = bench.gradient_and_loss(batch, max_tokens=max_tokens, **options)
        assert_same_gradient(split, whole, 1e-6)
        assert split_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_layers_that_are_computed_again_have_the_same_gradient_and_keep_less(tmp_path: Path, trainable: str):
    found, kept = [], []
    for again in (False, True):
        own = make_bench(tmp_path / str(again), trainable=trainable, compute={"activation_checkpointing": again})
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            found.append(own.gradient_and_loss(own.batch, type="exact"))
        kept.append(sum(sizes))
    (plain, loss), (checkpointed, other) = found
    assert loss == other
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert kept[1] < kept[0] / 2


def test_a_split_makes_several_passes(bench: Bench):
    whole, split = (values(bench.learner(max_tokens=n).forward_backward(bench.batch)) for n in (10_000, 37))
    tokens = len(bench.batch.token_ids)
    # One pass holds every shared prefix once; many passes hold it again each.
    assert whole["batch/packed_tokens/sum"] < split["batch/packed_tokens/sum"] < tokens
    assert whole["kl/token/mean"] == pytest.approx(split["kl/token/mean"], rel=1e-6)


def test_the_exact_gradient_of_the_packed_tree_is_that_of_separate_rows(bench: Bench):
    found = bench.gradient(type="exact")
    assert_same_gradient(found, dense_exact(bench, bench.batch, len(bench.batch)), 1e-9)
    assert_same_gradient(found, dense_exact(bench, bench.batch, len(bench.batch), plain_teachers=True), 1e-5)


@pytest.mark.parametrize(("normalizer", "constant"), [("token", None), ("constant", 5.0)])
def test_the_normaliser_divides_by_what_its_name_says(bench: Bench, normalizer: str, constant: float | None):
    divisor = float(bench.batch.loss_mask.sum()) if constant is None else constant
    found = bench.gradient(type="exact", normalizer=normalizer, constant=constant)
    assert_same_gradient(found, dense_exact(bench, bench.batch, divisor), 1e-6)


def test_the_policy_gradient_of_the_packed_tree_is_that_of_separate_rows(bench: Bench):
    batch = with_advantages(bench.batch)
    found = bench.gradient(batch, type="immediate")
    assert_same_gradient(found, dense_policy(bench, batch, len(batch), clip=None), 1e-6)


def test_the_clipped_gradient_of_the_packed_tree_is_that_of_separate_rows(bench: Bench):
    batch = with_advantages(bench.batch)
    found = bench.gradient(batch, type="immediate", loss="ppo", clip_low=0.1, clip_high=0.3)
    assert_same_gradient(found, dense_policy(bench, batch, len(batch), clip=(0.1, 0.3)), 1e-6)
    unclipped = dense_policy(bench, batch, len(batch), clip=(0.999, 100.0))
    assert max(float((found[n] - unclipped[n]).abs().max()) for n in found) > 1e-3


def test_the_end_of_turn_token_trains_where_it_is_the_pad_token_too(full: Bench):
    """The gradient of its embedding is that of finite differences, where prompts hold it: in and out of the model (tied)."""
    weight, end = full.backend.student.network.base.get_input_embeddings().weight, 257
    assert (full.batch.token_ids[~full.batch.loss_mask] == end).any()
    gradient, _ = full.gradient_and_loss(type="exact")
    name = next(n for n, p in full.learner(type="exact").weights().items() if p is weight)
    for column in (0, 7, 31):
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[end, column] += step
            losses.append(full.gradient_and_loss(type="exact")[1])
            with torch.no_grad():
                weight[end, column] -= step
        assert float(gradient[name][end, column]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


def test_full_fine_tuning_has_the_gradient_of_separate_rows_for_every_weight(full: Bench):
    found = full.gradient(type="exact")
    assert set(found) == {name for name, _ in full.backend.student.network.base.named_parameters()}
    assert_same_gradient(found, dense_exact(full, full.batch, len(full.batch)), 1e-9)
    batch = with_advantages(full.batch)
    assert_same_gradient(full.gradient(batch, type="immediate"), dense_policy(full, batch, len(batch), clip=None), 1e-6)


@pytest.mark.parametrize("which", ["bench", "full"])
@pytest.mark.parametrize("options", OBJECTIVES[::2], ids=lambda o: o["type"] + o.get("loss", ""))
def test_the_gradient_is_the_slope_of_the_loss(which: str, options: dict[str, Any], request: pytest.FixtureRequest):
    bench: Bench = request.getfixturevalue(which)
    batch = for_objective(bench.batch, options)
    gradient, _ = bench.gradient_and_loss(batch, **options)
    weights = bench.learner().weights()
    steepest = sorted(gradient, key=lambda n: -float(gradient[n].abs().max()))
    for name in (steepest[0], steepest[len(steepest) // 2]):
        flat = weights[name].data.view(-1)
        index = int(gradient[name].abs().argmax())
        before, slope = float(flat[index]), float(gradient[name].view(-1)[index])
        losses = []
        for step in (1e-5, -1e-5):
            flat[index] = before + step
            losses.append(bench.gradient_and_loss(batch, **options)[1])
        flat[index] = before
        assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-5), name


def test_the_same_text_for_two_teachers_is_drawn_to_each_by_its_own_rollouts(bench: Bench):
    same = [s for s in bench.scored if s.rollout.prompt.messages[0]["content"] == "hi"]
    parts = {t: [s for s in same if s.rollout.prompt.teacher == t] for t in ("even", "odd")}
    options = {"type": "exact", "normalizer": "constant", "constant": 2.0}
    both, _ = pack(same, logprob_floor=-50.0)
    assert both.teachers == ("even", "even", "odd", "odd")
    packed = values(bench.learner(**options).forward_backward(both))["batch/packed_tokens/sum"]
    assert packed < len(both.token_ids)  # the prompt stands in the tree once for both teachers
    gradients = {t: bench.gradient(pack(items, logprob_floor=-50.0)[0], **options) for t, items in parts.items()}
    total = bench.gradient(both, **options)
    assert_same_gradient(total, {n: gradients["even"][n] + gradients["odd"][n] for n in total}, 1e-9)
    assert max(float((gradients["even"][n] - gradients["odd"][n]).abs().max()) for n in total) > 1e-3
    # With the heads exchanged the rollouts are drawn elsewhere.
    other = [replace(s, score=exchanged(s.score)) for s in same]
    swapped = bench.gradient(pack(other, logprob_floor=-50.0)[0], **options)
    assert max(float((swapped[n] - total[n]).abs().max()) for n in total) > 1e-3


def exchanged(score: Score) -> Score:
    """The same hidden states under the other teacher's name and head."""
    assert isinstance(score, HiddenScore)
    other = {"even": "odd", "odd": "even"}
    parts = tuple(replace(part, model=other[part.model]) for part in score.parts)
    return replace(score, teacher=other[score.teacher], parts=parts)


def test_samples_of_one_prompt_id_for_two_teachers_are_two_groups(bench: Bench):
    first = bench.scored[0]
    twin = replace(first.rollout, prompt=replace(first.rollout.prompt, teacher="odd"), reward=0.0)
    rewarded = [replace(first.rollout, reward=1.0), replace(first.rollout, sample=1, reward=0.0), twin]
    items = [replace(first, rollout=r, score=replace(first.score, teacher=r.prompt.teacher)) for r in rewarded]
    batch, _ = pack(items, logprob_floor=-50.0)
    assert batch.group_ids.tolist() == [0, 0, 1]
    config = opd.parse_config(
        bench.backend.config.model_dump() | {"reward": {"coef": 1.0}, "objective": {"type": "exact"}}
    )
    found = compute_advantages(config, batch)[0].advantages
    assert found is not None
    firsts = [float(found[start:end][batch.loss_mask[start:end]][0]) for start, end in _spans(batch)]
    assert firsts == [1.0, -1.0, 0.0]


def _spans(batch: Batch) -> list[tuple[int, int]]:
    return list(zip(batch.offsets, batch.offsets[1:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "share", "expected"),
    [
        ("constant", 0.0, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", 0.0, [0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0.4, [0.2, 0.4, 0.6, 0.8, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ("cosine", 0.0, [0.2, 0.4, 0.6, 0.8, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule: str, share: float, expected: list[float]):
    config = OptimizerConfig(lr=3.0, warmup_steps=4, schedule=schedule, final_lr_fraction=share)
    found = [learning_rate(config, update, 10) / 3.0 for update in range(10)]
    assert found == pytest.approx(expected)
    assert learning_rate(config, 10, 10) / 3.0 == pytest.approx(1.0 if schedule == "constant" else share)


def test_each_update_moves_by_the_rate_of_its_place_in_the_schedule(tmp_path: Path):
    bench = make_bench(tmp_path)
    config = OptimizerConfig(lr=1e-3, warmup_steps=2, schedule="linear", betas=(0.0, 0.0), eps=1e-30)
    learner = bench.learner(optimizer=config, steps=5)
    for update in range(5):
        before = {name: p.detach().clone() for name, p in learner.weights().items()}
        learner.forward_backward(bench.batch)
        metrics = values(learner.optim_step())
        rate = learning_rate(config, update, 5)
        assert metrics["optim/lr/max"] == rate
        # With both betas 0 AdamW moves every weight by exactly the rate.
        moved = max(float((p.detach() - before[name]).abs().max()) for name, p in learner.weights().items())
        assert moved == pytest.approx(rate, rel=1e-6)


def test_an_update_clears_the_gradient_and_reports_its_norm_before_clipping(tmp_path: Path):
    bench = make_bench(tmp_path)
    expected = torch.sqrt(sum((g**2).sum() for g in bench.gradient().values()))
    learner = bench.learner(optimizer=OptimizerConfig(lr=1e-12, max_grad_norm=1e-3))
    for _ in range(2):
        learner.forward_backward(bench.batch)
        norm = values(learner.optim_step())["optim/grad_norm/mean"]
        assert norm == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_is_clipped_to_its_largest_norm(tmp_path: Path):
    bench = make_bench(tmp_path)
    gradient = bench.gradient()
    norm = float(torch.sqrt(sum((g**2).sum() for g in gradient.values())))
    # The first AdamW moment after one update is (1 - beta_1) times the clipped gradient.
    learner = bench.learner(optimizer=OptimizerConfig(betas=(0.5, 0.9), max_grad_norm=0.1))
    learner.forward_backward(bench.batch)
    learner.optim_step()
    tensors, _ = learner.state()
    for name, g in gradient.items():
        moment = tensors[f"optimizer/{name}/exp_avg"]
        torch.testing.assert_close(moment, 0.5 * 0.1 / norm * g, rtol=1e-4, atol=1e-9)


def snapshot(learner: LocalLearner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.weights().items()}


def assert_untouched(learner: LocalLearner, before: dict[str, Tensor]) -> None:
    for name, parameter in learner.weights().items():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_refused_and_the_weights_stay(tmp_path: Path, value: float):
    bench = make_bench(tmp_path, wide=False)
    learner = bench.learner()
    learner.forward_backward(bench.batch)
    learner.optim_step()
    before, (_, counted) = snapshot(learner), learner.state()
    learner.forward_backward(bench.batch)
    next(iter(learner.weights().values())).grad.view(-1)[0] = value
    with pytest.raises(ScoreError, match="update 1: the gradient's norm is"):
        learner.optim_step()
    assert_untouched(learner, before)
    assert learner.state()[1] == counted


def test_a_loss_that_is_no_number_names_its_rollouts_and_the_weights_stay(bench: Bench):
    learner = bench.learner(type="immediate", max_tokens=1)
    batch = with_advantages(bench.batch)
    assert batch.advantages is not None
    start, end = _spans(batch)[3]
    batch.advantages[start:end][batch.loss_mask[start:end]] = float("inf")
    before = snapshot(learner)
    with pytest.raises(ScoreError, match=r"the loss is -?(nan|inf) in a pass over rollouts 'p1/1'"):
        learner.forward_backward(batch)
    assert_untouched(learner, before)


def test_a_teachers_logprob_that_is_no_number_names_the_rollout(bench: Bench):
    item = bench.scored[5]
    bad = item.score.logprobs.copy()
    bad[np.flatnonzero(item.rollout.loss_mask)[1]] = np.nan
    scored = [*bench.scored[:5], replace(item, score=replace(item.score, logprobs=bad)), *bench.scored[6:]]
    with pytest.raises(ScoreError, match=r"rollout 'p2/1': 1 of \d+ log-probabilities from teacher 'even' are NaN"):
        pack(scored, logprob_floor=-50.0)


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_a_teachers_state_that_is_no_number_names_the_rollout_and_the_weights_stay(bench: Bench, max_tokens: int):
    item = bench.scored[3]
    assert isinstance(item.score, HiddenScore)
    assert item.rollout.num_actions > 2
    [part] = item.score.parts
    bad = part.hidden.copy()
    bad[2, 0] = np.nan
    score = replace(item.score, parts=(replace(part, hidden=bad),))
    scored = [*bench.scored[:3], replace(item, score=score), *bench.scored[4:]]
    batch, _ = pack(scored, logprob_floor=-50.0)
    learner = bench.learner(max_tokens=max_tokens)
    before = snapshot(learner)
    place = int(np.flatnonzero(item.rollout.loss_mask)[2])
    with pytest.raises(ScoreError, match=f"rollout 'p1/1': the reverse KL at token {place} is nan"):
        learner.forward_backward(batch)
    assert_untouched(learner, before)


@pytest.mark.parametrize("changes", [{}, {"trainable": "full"}], ids=["lora", "full"])
def test_a_saved_state_continues_bit_for_bit(tmp_path: Path, changes: dict[str, Any]):
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.1)

    def updates(learner: LocalLearner, batch: Batch, count: int) -> list[dict[str, float]]:
        return [values(learner.forward_backward(batch) | learner.optim_step()) for _ in range(count)]

    first = make_bench(tmp_path / "a", wide=False, **changes)
    learner = first.learner(optimizer=optimizer)
    updates(learner, first.batch, 3)
    tensors, plain = learner.state()
    saved = save({name: t.contiguous().clone() for name, t in tensors.items()})
    straight = updates(learner, first.batch, 3)

    second = make_bench(tmp_path / "b", wide=False, **changes)
    other = second.learner(optimizer=optimizer)
    updates(other, second.batch, 1)  # what it did before must not matter
    other.load_state(load(saved), plain)
    assert updates(other, first.batch, 3) == straight
    assert_untouched(other, snapshot(learner))
    ours, theirs = learner.state(), other.state()
    assert ours[1] == theirs[1] == {"num_updates": 6}
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])
