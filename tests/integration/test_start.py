"""A student that begins with an adapter's weights: it is that adapter, and trains on from there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from factories import prompt, save_toy, sft_recipe, toy_recipe
from safetensors.torch import load_file

import opd
from opd.config import SftConfig
from opd.errors import ConfigError, ModelError
from opd.finetune import sft
from opd.local.build import build


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 4 on the toy that recipes have for a student."""
    folder = tmp_path_factory.mktemp("start")
    sft(opd.parse_config(sft_recipe(folder, save_toy(folder / "base", 0)), kind=SftConfig))
    return folder / "expert" / "student"


def recipe(folder: Path, start: Path, **changes: Any) -> opd.Config:
    lora = {"rank": 4, "alpha": 8, "start": str(start)} | changes.pop("lora", {})
    return opd.parse_config(toy_recipe(folder, **changes) | {"lora": lora})


def test_it_begins_as_the_adapter(tmp_path: Path, start: Path):
    backend = build(recipe(tmp_path, start))
    saved = load_file(start / "adapter_model.safetensors")
    own = {n.replace(".student", ""): p for n, p in backend.learner().weights().items()}
    assert len(own) == len(saved)
    for name, weight in saved.items():
        assert torch.equal(own[name], weight), name
    as_teacher = toy_recipe(tmp_path / "other")
    as_teacher["teachers"]["even"] = {"adapter": str(start)}
    asked = [prompt("p", "hi", teacher="even")]
    teacher = build(opd.parse_config(as_teacher))
    expected = teacher.sampler(teacher.policies["even"]).sample(asked, num_samples=2, seed=(1,))
    found = backend.sampler().sample(asked, num_samples=2, seed=(1,))
    assert [r.token_ids.tolist() for r in found] == [r.token_ids.tolist() for r in expected]


def test_a_run_trains_on_from_it_and_resumes(tmp_path: Path, start: Path):
    config = recipe(tmp_path, start, steps=2, evaluation={"num_prompts": 0})
    run = opd.train(config).run
    before, after = load_file(start / "adapter_model.safetensors"), load_file(run / "student/adapter_model.safetensors")
    assert before.keys() == after.keys()
    gaps = [float((before[n] - after[n]).abs().max()) for n in before]
    assert 0 < max(gaps) < 0.05  # two steps at 1e-2, the first of them a warm-up


def test_the_initial_student_of_an_extrapolation_is_the_one_that_begins(tmp_path: Path, start: Path):
    objective = {"type": "exact", "extrapolation": 1.25, "reference": "student"}
    backend = build(recipe(tmp_path, start, objective=objective))
    rollouts = backend.sampler().sample([prompt("p", "hi", teacher="even")], num_samples=2, seed=(1,))
    target = {"even": (backend.followed["even"][-1],)}
    [scored, _] = backend.local_teachers(target, keep_hidden=False).score(rollouts)
    rollout = scored.rollout
    gap = scored.score.logprobs[rollout.loss_mask]  # type: ignore[union-attr]  # none failed
    weight = backend.followed["even"][-1].weight
    assert torch.allclose(
        torch.from_numpy(gap), weight * torch.from_numpy(rollout.rollout_logprobs[rollout.loss_mask]), atol=1e-4
    )


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"rank": 8}, "has rank 4, lora.rank is 8; write that one"),
        ({"alpha": 16}, "has alpha 8, lora.alpha is 16; write that one"),
        ({"target_modules": ["q_proj"]}, "set lora.target_modules as it was made"),
        ({"start": "nowhere"}, "has no adapter_config.json; expected a PEFT LoRA folder"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, start: Path, lora: dict[str, Any], reason: str):
    with pytest.raises(ModelError, match=r"\(lora.start\)") as caught:
        build(recipe(tmp_path, start, lora=lora))
    assert reason in str(caught.value)


def test_another_base_and_a_cut_file_are_refused(tmp_path: Path, start: Path):
    tree = toy_recipe(tmp_path / "a")
    tree["student"] = save_toy(tmp_path / "b", 9)
    tree["lora"] = {"rank": 4, "alpha": 8, "start": str(start)}
    with pytest.raises(ModelError, match=r"was made on another base .* use that base, or start without it"):
        build(opd.parse_config(tree))
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in start.iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match="cannot be read"):
        build(recipe(tmp_path / "c", cut))


def test_a_whole_student_has_no_adapter_to_begin_with(tmp_path: Path, start: Path):
    with pytest.raises(ConfigError, match=r"lora.start works only with trainable = 'lora'"):
        recipe(tmp_path, start, trainable="full")
