"""Quantised bases and teachers against models with the widened weights, forward and backward."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SOUND, toy_of
from factories import byte_tokenizer, save_adapter, sft_recipe, toy_recipe
from torch import Tensor
from transformers import AutoModelForCausalLM

import opd
from opd.config import ComputeConfig, LoraConfig, SftConfig
from opd.errors import ConfigError, ModelError
from opd.finetune import sft
from opd.local.build import build
from opd.models.attention import own_attention
from opd.models.loading import load_network
from opd.models.lora import add_adapter, add_student_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees
from opd.models.packing_check import PACKED_WITHIN, settled_passes
from opd.models.quantized import widened
from opd.objectives.logprobs import token_logprobs

pytest.importorskip("bitsandbytes")

KINDS = ("nf4", "int8")
SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8], [30], [5]]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # blocks of 4 bits hold 64 weights


def saved(folder: Path, kind: str = "qwen3") -> str:
    toy_of(kind, {**SOUND[kind], **WIDE}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def quantised(source: str, kind: Any, dtype: Any = "float32") -> Network:
    return load_network(source, ComputeConfig(device="cpu", dtype=dtype, quantization=kind))


def dense(network: Network, source: str) -> Any:
    """The whole model with the widened weights in the place of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, attn_implementation="eager", dtype=network.base.dtype
    ).eval()
    found = 0
    for name, layer in network.base.named_modules():
        if type(layer).__module__.startswith("bitsandbytes"):
            whole = widened(layer, network.base.dtype)
            original = model.get_submodule(name.replace(".base_layer", "")).weight
            assert float((whole - original).detach().norm() / original.detach().norm()) < 0.2  # not other weights
            original.data = whole
            found += 1
    assert found == 14
    return model


def loss_of(logprobs: list[Tensor]) -> Tensor:
    return torch.stack([(x * torch.linspace(-1.0, 2.0 + i, len(x))).sum() for i, x in enumerate(logprobs)]).sum()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_gradients_of_an_adapter_equal_those_of_a_model_with_the_widened_weights(
    tmp_path: Path, kind: str, dtype: str
):
    """One token alone, one after another while sampling, and many: whichever kernel would be chosen."""
    source = saved(tmp_path / "base")
    network = quantised(source, kind, dtype)
    add_student_adapter(network, LoraConfig(rank=4), seed=0)
    network.activate("student", trainable=True)
    with torch.no_grad():
        for name, p in network.model.named_parameters():
            if "lora_B" in name:
                p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    whole = Network(dense(network, source), byte_tokenizer(), source)
    add_student_adapter(whole, LoraConfig(rank=4), seed=0)
    whole.activate("student", trainable=True)
    whole.model.load_state_dict({n: p for n, p in network.model.state_dict().items() if "lora_" in n}, strict=False)
    gaps, because = settled_passes(network, gradients=True)
    assert because is None
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps
    if dtype != "float32":
        return  # its own rounding moves a gradient by a tenth; the check above computes in float32
    for sequences in (SEQUENCES, [[5, 6]]):
        found: list[dict[str, Tensor]] = []
        for each, packed in ((network, True), (whole, False)):
            logprobs = []
            [(_, tree)] = pack_trees(sequences, max_tokens=100)
            hidden = each.hidden_states(tree) if packed else torch.empty(0)
            for sequence, path in zip(sequences, tree.paths, strict=True):
                targets = torch.tensor([*sequence[1:], sequence[0]])
                if packed:
                    states = hidden[torch.from_numpy(path)]
                    logprobs.append(token_logprobs(states, each.head_weight(), targets, temperature=1.0))
                else:
                    with own_attention(each.base):
                        logits = each.base(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
                    logprobs.append(logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0])
            named = {n: p for n, p in each.model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss_of(logprobs), list(named.values()))
            found.append(dict(zip(named, grads, strict=True)))
        mine, theirs = found
        assert list(mine) == list(theirs)
        for name, wanted in theirs.items():
            assert float(wanted.norm()) > 0, name
            assert float((mine[name] - wanted).norm()) <= 1e-4 * float(wanted.norm()), (name, sequences)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_need_the_memory_of_their_bits(tmp_path: Path, kind: str):
    network = quantised(saved(tmp_path / "base"), kind)
    sizes = [p.numel() * p.element_size() for n, p in network.base.named_parameters() if "proj" in n]
    whole = sum(
        p.numel() * 4
        for n, p in load_network(network.source, ComputeConfig(device="cpu")).base.named_parameters()
        if "proj" in n
    )
    assert sum(sizes) / whole == pytest.approx({"nf4": 1 / 8, "int8": 1 / 4}[kind], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["exact", "immediate"])
def test_a_quantised_student_learns_from_whole_and_quantised_teachers_and_can_be_resumed(
    tmp_path: Path, kind: str, objective: str
):
    source, theirs = saved(tmp_path / "base"), saved(tmp_path / "theirs", "llama")
    tree = toy_recipe(
        tmp_path, steps=2, student=source, objective={"type": objective}, optimizer={"schedule": "constant"}
    )
    tree["compute"] = {**tree.get("compute", {}), "quantization": kind}
    tree["teachers"] = {
        "even": {"model": theirs, "quantization": kind, "dtype": "bfloat16"},
        "odd": {"adapter": save_adapter(tmp_path / "adapter", source)},
    }
    findings = opd.Trainer(tree).check()
    assert [f.name for f in findings if not f.passed] == []
    said = {f.name: f.detail for f in findings if "fewer bits" in f.name}
    assert list(said) == ["weights in fewer bits (the student)", "weights in fewer bits (teacher 'even')"]
    assert all(f"{kind}: 0." in detail and "nats per token from the whole model" in detail for detail in said.values())
    backend = build(opd.parse_config(tree))
    assert backend.policies["even"].network.base.dtype == torch.bfloat16
    assert backend.policies["odd"].network is backend.student.network
    result = opd.train(tree)
    assert result.finished
    assert opd.Trainer(tmp_path / "run").resume(["steps=3"]).finished
    opd.Trainer(tmp_path / "run").export(tmp_path / "out")
    again = quantised(source, kind)
    add_adapter(again, str(tmp_path / "out"), teacher="t", name="again")
    with pytest.raises(
        ModelError, match=rf"is quantised \({kind}\), and opd makes no merged weights of a quantised base"
    ):
        opd.Trainer(tmp_path / "run").export(tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()


def test_a_whole_teacher_of_a_quantised_student_is_loaded_whole(tmp_path: Path):
    source = saved(tmp_path / "base")
    tree = toy_recipe(tmp_path, student=source)
    tree["compute"] = {**tree.get("compute", {}), "quantization": "nf4"}
    tree["teachers"] = {"even": {"model": source}, "odd": {"model": source, "quantization": "nf4"}}
    backend = build(opd.parse_config(tree))
    assert backend.policies["even"].network.quantization is None
    assert backend.policies["odd"].network is backend.student.network


def test_fine_tuning_takes_a_quantised_base(tmp_path: Path):
    tree = sft_recipe(tmp_path / "sft", saved(tmp_path / "base"))
    tree["compute"] = {**tree.get("compute", {}), "quantization": "nf4"}
    sft(SftConfig(**tree))


def test_a_gradient_that_a_kernel_loses_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """bitsandbytes' own product of one row has none on a CPU."""
    network = quantised(saved(tmp_path / "base"), "nf4")
    for layer in network.base.modules():
        if hasattr(layer, "quant_state") or type(layer).__name__ == "Linear4bit":
            lost = layer.forward
            layer.forward = lambda x, lost=lost: lost(x.detach())
    gaps, _ = settled_passes(network, gradients=True)
    assert list(gaps)[-1] == "slopes", gaps
    assert gaps["slopes"] > PACKED_WITHIN


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"compute": {"quantization": "nf4"}, "trainable": "full"}, "works only with trainable = 'lora'"),
        ({"compute": {"quantization": "nf4"}, "backend": "ray"}, "works only with backend = 'local'"),
        ({"compute": {"quantization": "fp3"}}, "quantization"),
        ({"teachers": {"even": {"adapter": "x", "dtype": "bfloat16"}, "odd": {"model": "y"}}}, "dtype works only with model"),
        ({"teachers": {"even": {"url": "http://x", "quantization": "nf4"}, "odd": {"model": "y"}}}, "quantization works only"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(tmp_path: Path, change: dict[str, Any], line: str):
    with pytest.raises(ConfigError, match=line):
        opd.parse_config(toy_recipe(tmp_path) | change)


def test_a_model_that_is_quantised_already_is_not_quantised_again(tmp_path: Path):
    network = quantised(saved(tmp_path / "base"), "nf4")
    network.base.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(
        ModelError, match=r"is quantised already \(quantization_config in config.json\); remove quantization"
    ):
        quantised(str(tmp_path / "small"), "nf4")
    again = load_network(str(tmp_path / "small"), ComputeConfig(device="cpu"))
    gaps, _ = settled_passes(again, gradients=True)
    assert max(gaps.values()) < PACKED_WITHIN / 20, gaps
    [(_, tree)] = pack_trees(SEQUENCES, max_tokens=100)
    torch.testing.assert_close(again.hidden_states(tree), network.hidden_states(tree))
