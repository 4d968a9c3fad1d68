"""A student equal to its teacher stays where it is, and one that is merely near it still learns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import objective_config as signal_config
from factories import prompt, rollout, scored, toy_recipe
from servers import serving
from transformers import LlamaForCausalLM

import opd
from opd.batch import pack
from opd.config import ObjectiveConfig
from opd.local.learner import LocalLearner
from opd.objective import compute_advantages
from opd.objectives.advantages import above_rounding
from opd.objectives.divergences import resolution, reverse_kl, top_k_reverse_kl
from opd.objectives.vocabulary import TeacherStates, VocabularyLoss, vocabulary_loss

SELF_TEACHERS: dict[str, dict[str, Any]] = {
    "exact, LoRA": {"objective": {"type": "exact"}},
    "exact, full, a high rate": {"objective": {"type": "exact"}, "trainable": "full", "optimizer": {"lr": 0.3}},
    "forward KL, full": {"objective": {"type": "exact", "divergence": "forward_kl"}, "trainable": "full"},
    "support, full": {"objective": {"type": "top_k", "top_k": 8}, "trainable": "full"},
    "immediate, full": {"objective": {"type": "immediate"}, "trainable": "full"},
    "immediate, the baseline of least variance": {
        "objective": {"type": "immediate", "baseline": "score_weighted"},
        "trainable": "full",
    },
    "to-go, leave one out, PPO": {
        "objective": {"type": "to_go", "discount": 1.0, "baseline": "leave_one_out", "loss": "ppo", "epochs": 2},
        "trainable": "full",
    },
    "KL-to-go, KL baseline, full": {
        "objective": {"type": "kl_to_go", "discount": 0.9, "baseline": "kl"},
        "trainable": "full",
    },
    "exact-to-go, full": {
        "objective": {"type": "exact_to_go", "discount": 1.0, "baseline": "leave_one_out"},
        "trainable": "full",
    },
}


@contextmanager
def in_process(folder: str) -> Iterator[dict[str, str]]:
    yield {"model": folder}


@contextmanager
def behind_a_server(folder: str) -> Iterator[dict[str, str]]:
    with serving(LlamaForCausalLM.from_pretrained(folder)) as server:
        yield {"url": server.url}


@pytest.mark.parametrize("name", SELF_TEACHERS)
def test_a_student_that_equals_its_teacher_keeps_every_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_beside_itself(tmp_path, monkeypatch, in_process, SELF_TEACHERS[name])


@pytest.mark.parametrize("top_k", [5, 200])
def test_a_student_whose_equal_names_its_likeliest_tokens_keeps_every_weight(
    top_k: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"objective": {"type": "top_k", "top_k": top_k}, "trainable": "full"}
    run_beside_itself(tmp_path, monkeypatch, behind_a_server, changes)


def run_beside_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teachers: Callable[[str], AbstractContextManager[dict[str, str]]],
    changes: dict[str, Any],
) -> None:
    seen: list[tuple[bool, float]] = []
    plain = LocalLearner.optim_step

    def step(self: LocalLearner) -> Any:
        before = {n: p.detach().clone() for n, p in self.weights().items()}
        found = plain(self)
        seen.append((all(torch.equal(p, before[n]) for n, p in self.weights().items()), len(before)))
        return found

    monkeypatch.setattr(LocalLearner, "optim_step", step)
    tree = toy_recipe(tmp_path, steps=3, evaluation={"num_prompts": 0}, **changes)
    with teachers(tree["student"]) as one:
        tree["teachers"] = {name: one for name in ("even", "odd")}
        lines = opd.read_metrics(opd.train(opd.parse_config(tree)).run)
    assert len(seen) >= 3
    assert all(same and count for same, count in seen)
    assert all(abs(line["kl/token/mean"]) < 1e-6 for line in lines)


def student_and_teacher(distance: float, vocab: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of 8 states [8, vocab], and the same with log ratios of about `distance` nats; float32."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(8, vocab, generator=generator)
    return logits, logits + distance * torch.randn(8, vocab, generator=generator)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_rounding_error_has_no_gradient_and_a_small_distance_has_all_of_it(divergence):
    eye = torch.eye(50)
    how = VocabularyLoss(divergence=divergence)
    for distance, is_signal in ((1e-5, False), (1e-3, True), (0.045, True)):
        student, teacher = student_and_teacher(distance)
        hidden = student.clone().requires_grad_()
        loss, stats = vocabulary_loss(hidden, eye, [TeacherStates(teacher, eye)], torch.ones(8), how)
        found = torch.autograd.grad(loss, hidden)[0]
        if not is_signal:
            assert float(found.abs().max()) == 0.0
            assert float(stats.reverse_kl.abs().max()) == 0.0
            continue
        wide = student.double().requires_grad_()
        if divergence == "reverse_kl":
            dense = torch.autograd.grad(reverse_kl(wide, teacher.double()).sum(), wide)[0]
            torch.testing.assert_close(found.double(), dense, rtol=0, atol=5e-7)
        assert float(found.abs().max()) > 1e-6


@pytest.mark.parametrize(
    ("temperature", "weights"), [(1.0, [1.0]), (0.02, [1.0]), (1.0, [20.0, -19.0]), (0.1, [0.5, 0.5])]
)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_rounding_that_a_low_temperature_or_an_extrapolation_magnifies_is_none_still(
    divergence: Any, temperature: float, weights: list[float]
):
    eye = torch.eye(50)
    how = VocabularyLoss(divergence=divergence, temperature=temperature)
    student, _ = student_and_teacher(0.0)
    generator = torch.Generator().manual_seed(3)

    def gradient(distance: float) -> float:
        others = [student + distance * torch.randn(student.shape, generator=generator) for _ in weights]
        hidden = student.clone().requires_grad_()
        teachers = [TeacherStates(x, eye, w) for x, w in zip(others, weights, strict=True)]
        loss, _ = vocabulary_loss(hidden, eye, teachers, torch.ones(8), how)
        return float(torch.autograd.grad(loss, hidden)[0].abs().max())

    assert gradient(1e-5) == 0.0
    assert gradient(1e-3) > 0.0


@pytest.mark.parametrize(("temperature", "extrapolation"), [(1.0, 1.0), (0.1, 1.0), (1.0, 10.0)])
def test_a_sampled_log_ratio_that_rounding_alone_magnifies_is_no_signal(
    temperature: float, extrapolation: float, monkeypatch: pytest.MonkeyPatch
):
    def advantages(gap: float) -> Sequence[float]:
        item = rollout([5, 17, 80, 33], 2, prompt=prompt(), logprobs=[-1.0, -2.0])
        batch, _ = pack([scored(item, [-1.0 + gap, -2.0 - gap])], logprob_floor=-50.0)
        past = {} if extrapolation == 1.0 else {"extrapolation": extrapolation, "reference": "student"}
        plain = signal_config().model_copy(update={"objective": ObjectiveConfig(type="immediate", **past)})
        found, _ = compute_advantages(plain.model_copy(update={"temperature": temperature}), batch)
        assert found.advantages is not None
        return found.advantages[found.loss_mask].tolist()

    scale = extrapolation / temperature
    assert advantages(5e-5 * scale) == [0.0, 0.0]
    assert advantages(2e-4 * scale) == pytest.approx([2e-4 * scale, -2e-4 * scale], rel=1e-2)


def test_what_an_overconfident_student_leaves_out_is_a_signal_for_the_forward_kl():
    """It excludes a token of teacher probability 7e-5: 2e-9 nats of the reverse KL's gradient, 1.3e-3 nats of forward KL."""
    student, teacher = torch.tensor([[0.0, -30.0]]), torch.tensor([[0.0, -9.6]])
    hidden = student.clone().requires_grad_()
    eye = torch.eye(2)
    how = VocabularyLoss(divergence="forward_kl")
    loss, stats = vocabulary_loss(hidden, eye, [TeacherStates(teacher, eye)], torch.ones(1), how)
    found = torch.autograd.grad(loss, hidden)[0]
    p, q = (torch.log_softmax(x.double(), -1) for x in (student, teacher))
    torch.testing.assert_close(found.double(), p.exp() - q.exp(), rtol=1e-3, atol=1e-8)
    assert float(stats.divergence) == pytest.approx(float((q.exp() * (q - p)).sum()), rel=1e-3)


def test_a_small_bucket_far_from_its_teachers_is_a_signal():
    """The student leaves 1e-3 to tokens that its teacher does not name, to which the teacher leaves 1e-6."""
    logp = torch.tensor([[0.6, 0.399]]).log().requires_grad_()
    loss = top_k_reverse_kl(logp, torch.tensor([[0.6006, 0.399399]]).log()).sum()
    assert float(loss.detach()) == pytest.approx(1e-3 * 6.9 - 1e-3, rel=0.02)
    assert float(torch.autograd.grad(loss, logp)[0].abs().max()) > 1.0


def test_a_rare_token_far_from_its_teacher_is_a_signal():
    """The student gives 1e-6 to a token that its teacher excludes: a KL of 2e-5 nats, which one token makes."""
    student = torch.tensor([[0.0, -14.0, -1.0]])
    teacher = torch.tensor([[0.0, -34.0, -1.0]])
    hidden = student.clone().requires_grad_()
    eye = torch.eye(3)
    loss, _ = vocabulary_loss(hidden, eye, [TeacherStates(teacher, eye)], torch.ones(1), VocabularyLoss())
    found = torch.autograd.grad(loss, hidden)[0]
    wide = student.double().requires_grad_()
    dense = torch.autograd.grad(reverse_kl(wide, teacher.double()).sum(), wide)[0]
    torch.testing.assert_close(found.double(), dense, rtol=1e-3, atol=1e-8)


def test_a_saturated_student_is_still_charged_its_kl():
    student, teacher = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, 1.0]])
    eye = torch.eye(2)
    _, stats = vocabulary_loss(student, eye, [TeacherStates(teacher, eye)], torch.ones(1), VocabularyLoss())
    assert float(stats.reverse_kl) == pytest.approx(1.3133, abs=1e-3)


def test_log_ratios_of_a_row_are_kept_as_they_are_or_dropped_together():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rows = torch.tensor([[3e-5, -2e-5, 7.0], [1e-5, 2e-4, -1e-6]])
    found = above_rounding(rows, mask)
    assert found[0].abs().sum() == 0
    torch.testing.assert_close(found[1], rows[1], rtol=0, atol=0)


def test_in_float64_the_bound_is_that_of_float64():
    assert resolution(torch.float32) == pytest.approx(1e-4)
    assert resolution(torch.float64) < 1e-12


def test_a_student_near_its_teacher_still_comes_nearer(tmp_path: Path):
    """From a KL of some 0.001 nats a token, as at the end of a run."""
    from safetensors.torch import load_file, save_file

    tree = toy_recipe(
        tmp_path,
        steps=30,
        trainable="full",
        optimizer={"lr": 1e-4, "schedule": "constant"},
        evaluation={"num_prompts": 0},
    )
    near = tmp_path / "even" / "model.safetensors"
    weights = load_file(tmp_path / "student" / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {n: w + 0.0015 * torch.randn(w.shape, generator=noise) for n, w in weights.items()}
    save_file(moved, near, metadata={"format": "pt"})
    tree["teachers"]["odd"] = tree["teachers"]["even"]
    lines = opd.read_metrics(opd.train(opd.parse_config(tree)).run)
    first, last = (sum(x["kl/token/mean"] for x in part) / 5 for part in (lines[:5], lines[-5:]))
    assert 2e-4 < lines[0]["kl/token/mean"] < 5e-3
    assert last < 0.5 * first
