"""Models that also read images, as models of text."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, sft_recipe, toy_recipe
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from vision import VISION, save_vision, vision_toy

import opd
from opd.config import ComputeConfig, LoraConfig, SftConfig
from opd.finetune import sft
from opd.models.export import export
from opd.models.loading import load_network
from opd.models.lora import add_student_adapter
from opd.models.network import Network
from opd.models.packing_check import PACKED_WITHIN, settled_passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", VISION)
def test_passes_over_text_equal_those_of_the_whole_model(kind: str, dtype: torch.dtype):
    model = vision_toy(kind, VISION[kind])
    for parameter in model.parameters():  # not buffers, which may be complex
        parameter.data = parameter.data.to(dtype)
    network = Network(model, byte_tokenizer(), kind)
    gaps, because = settled_passes(network, gradients=True)
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps
    assert list(gaps)[-1] == "gradients"
    assert (because is not None) == (kind in ("qwen3_5", "llama4"))


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_only_what_text_uses_trains_and_what_is_written_loads_in_transformers(
    tmp_path: Path, kind: str, trainable: str
):
    source = save_vision(tmp_path / "base", kind)
    network = load_network(source, ComputeConfig(device="cpu"))
    if trainable == "lora":
        add_student_adapter(network, LoraConfig(rank=4), seed=0)
    adapter = "student" if trainable == "lora" else None
    network.activate(adapter, trainable=True)
    before = {name: p.clone() for name, p in network.base.named_parameters()}
    trained = {name: p for name, p in network.model.named_parameters() if p.requires_grad}
    assert trained
    towers = ("vision", "visual", "tower", "projector", "merger", "connector", "image")
    assert not [name for name in trained if any(part in name for part in towers)]
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    network.activate(adapter)
    with torch.no_grad():
        expected = network.for_head(network._backbone(ids).last_hidden_state) @ network.head_weight().T
    export(network, adapter, tmp_path / "out")
    whole: Any = AutoModelForImageTextToText.from_pretrained(source if adapter else tmp_path / "out").eval()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    if adapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
            whole = PeftModel.from_pretrained(whole, tmp_path / "out").merge_and_unload()
    else:
        assert (tmp_path / "out" / "preprocessor_config.json").exists()
        for name, weight in whole.named_parameters():
            assert torch.equal(weight, before[name]) == (name not in trained), name
    decoder = whole.get_decoder()
    with torch.no_grad():
        states = decoder(ids)
        found = states.logits if "logits" in states else whole.lm_head(states.last_hidden_state)
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "qwen3_vl"])
def test_it_trains_as_a_student_and_as_a_teacher_and_its_merged_student_is_whole(tmp_path: Path, kind: str):
    source = save_vision(tmp_path / "base", kind)
    tree = toy_recipe(tmp_path, steps=2, student=source, output=str(tmp_path / "run"))
    tree["teachers"] = {"even": {"model": save_vision(tmp_path / "teacher", kind)}, "odd": {"model": source}}
    assert all(f.passed for f in opd.Trainer(tree).check())
    assert opd.train(tree).finished
    opd.Trainer(tmp_path / "run").export(tmp_path / "merged", merged=True)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged).__name__ == type(AutoModelForImageTextToText.from_pretrained(source)).__name__
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()


def test_it_can_be_fine_tuned(tmp_path: Path):
    tree = sft_recipe(tmp_path / "sft", save_vision(tmp_path / "base", "gemma3"))
    sft(SftConfig(**tree))
