"""Every kind of adapter computes what PEFT computes, as a teacher and as a start, or is refused by name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, prompt, save_adapter, save_toy, toy_model, toy_recipe
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

import opd
from opd.config import ComputeConfig
from opd.errors import ModelError
from opd.local.build import build
from opd.models.export import write_merged
from opd.models.loading import load_network
from opd.models.lora import add_adapter
from opd.models.network import Network
from opd.models.packing import pack_trees

IDS = [72, 101, 108, 108, 111, 32, 256, 119, 257, 114]
CLOSE = 1e-4  # float32 on logits of about 10; what is refused here was 0.1 to 10 off
CPU = ComputeConfig(device="cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_toy(tmp_path_factory.mktemp("base") / "toy", 0)


def save_kind(folder: Path, base: str, *, scale: float = 0.3, config: Any = None, **fields: Any) -> str:
    """An adapter with random weights in all that it trains, as PEFT writes it."""
    torch.manual_seed(3)
    described = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config or LoraConfig(**described))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * torch.randn_like(parameter))
        model.save_pretrained(str(folder))
    return str(folder)


@torch.no_grad()
def logits_of_peft(base: str, adapter: str) -> Tensor:
    """The logits [tokens, vocab] of PEFT's own model, loaded anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
        return model(input_ids=torch.tensor([IDS])).logits[0]


@torch.no_grad()
def logits_of(network: Network, adapter: str | None) -> list[Tensor]:
    """The same by a network's packed pass, and as it samples."""
    [(_, tree)] = pack_trees([IDS], max_tokens=64)
    network.activate(adapter)
    found = [network.hidden_states(tree) @ network.head_weight().T]
    with network.merged(adapter):
        found.append(network.hidden_states(tree) @ network.head_weight().T)
    return found


COMPUTED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "a scale for each layer": {"alpha_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 31}},
    "a rank for each layer": {"rank_pattern": {"v_proj": 2, "down_proj": 7}},
    "ranks and scales": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}, "use_rslora": True},
    "one layer of two": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "all but some layers": {"exclude_modules": ["k_proj", "o_proj"]},
    "weight-decomposed": {"use_dora": True},
    "weight-decomposed and rank-stabilised": {"use_dora": True, "use_rslora": True},
    "with dropout": {"lora_dropout": 0.5},
    "with fan_in_fan_out of another layer kind": {"fan_in_fan_out": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "minor components": {"init_lora_weights": "mica"},
    "biased factors": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_teacher_that_is_an_adapter_gives_the_logits_of_pefts_own_model(base: str, tmp_path: Path, kind: str):
    adapter = save_kind(tmp_path / "adapter", base, **COMPUTED[kind])
    expected = logits_of_peft(base, adapter)
    network = load_network(base, CPU)
    plain = logits_of(network, None)[0]
    assert float((expected - plain).abs().max()) > 0.1  # the adapter says something
    add_adapter(network, save_adapter(tmp_path / "other", base, 9), teacher="other", name="other")
    add_adapter(network, adapter, teacher="even", name="even")
    for found in logits_of(network, "even"):
        torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    torch.testing.assert_close(logits_of(network, None)[0], plain, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "rank-stabilised", "a rank for each layer", "weight-decomposed"])
def test_a_merged_copy_gives_the_logits_of_pefts_own_model(base: str, tmp_path: Path, kind: str):
    adapter = save_kind(tmp_path / "adapter", base, **COMPUTED[kind])
    write_merged(base, Path(adapter), tmp_path / "merged", dtype="float32", whose="even")
    found = logits_of(load_network(str(tmp_path / "merged"), CPU), None)[0]
    torch.testing.assert_close(found, logits_of_peft(base, adapter), atol=CLOSE, rtol=0)


def changed(**fields: Any) -> Callable[[Path, str], str]:
    """A plain adapter whose configuration was changed by hand."""

    def write(folder: Path, base: str) -> str:
        file = Path(save_kind(folder, base)) / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return str(folder)

    return write


def made(**fields: Any) -> Callable[[Path, str], str]:
    return lambda folder, base: save_kind(folder, base, **fields)


def biased(folder: Path, base: str) -> str:
    """An adapter that trains the biases of a base that has some."""
    model = toy_model(0)
    model.config.attention_bias = True
    torch.manual_seed(0)
    LlamaForCausalLM(model.config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    return save_kind(folder, base, bias="lora_only", target_modules=["q_proj"])


REFUSED: dict[str, tuple[Callable[[Path, str], str], str]] = {
    "embeddings": (made(target_modules=["embed_tokens", "q_proj"]), "adapts the embeddings"),
    "the head": (made(target_modules=["lm_head", "q_proj"]), "adapts the output head"),
    "a saved head": (made(modules_to_save=["lm_head"]), "keeps whole copies of modules (modules_to_save"),
    "a saved norm": (made(modules_to_save=["norm"]), 'keeps whole copies of modules (modules_to_save = ["norm"])'),
    "rows of the embeddings": (made(trainable_token_indices=[256, 257]), "changes rows of the embeddings"),
    "biases of the base": (biased, "changes the base's biases (bias = 'lora_only')"),
    "principal components": (made(init_lora_weights="pissa"), 'init_lora_weights = "pissa"'),
    "orthonormal": (made(init_lora_weights="olora"), 'init_lora_weights = "olora"'),
    "repeated layers": (made(layer_replication=[[0, 2], [1, 2]]), "repeats layers of the base"),
    "behind an invocation": (made(alora_invocation_tokens=[104, 105]), "acts only after its invocation tokens"),
    "another tuner": (made(config=IA3Config(task_type="CAUSAL_LM")), "is of type 'IA3'"),
    "a field of another peft": (changed(use_xlora3=True), "does not know its field use_xlora3 = true"),
}


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_of_a_kind_that_opd_does_not_compute_is_refused_by_what_it_is(
    tmp_path: Path, kind: str, trainable: str
):
    tree = toy_recipe(tmp_path, trainable=trainable)
    write, reason = REFUSED[kind]
    adapter = write(tmp_path / "adapter", tree["student"])
    tree["teachers"]["even"] = {"adapter": adapter}
    with pytest.raises(ModelError) as caught:
        build(opd.parse_config(tree))
    assert f"adapter '{adapter}' (teacher 'even')" in str(caught.value)
    assert reason in str(caught.value)
    assert "another base" not in str(caught.value)


STARTS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    # the adapter, the recipe's [lora], and why it is refused
    "plain": ({}, {}, None),
    "with dropout": ({"lora_dropout": 0.5}, {}, None),
    "rank-stabilised of the same scale": ({"use_rslora": True}, {"alpha": 16}, None),
    "a pattern that changes nothing": ({"alpha_pattern": {"q_proj": 8}, "rank_pattern": {"q_proj": 4}}, {}, None),
    "some layers": ({"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "up_proj"]}, None),
    "rank-stabilised": ({"use_rslora": True}, {}, "(use_rslora; alpha 8, rank 4), lora.alpha / lora.rank is 2; write"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 2}}, {}, "(alpha_pattern; alpha 2, rank 4)"),
    "rank pattern": ({"rank_pattern": {"v_proj": 2}}, {}, "has rank 2 at 'model.layers.0.self_attn.v_proj' (rank_pattern)"),
    "weight-decomposed": ({"use_dora": True}, {}, "use_dora = true"),
    "biased factors": ({"lora_bias": True}, {}, "lora_bias = true"),
    "an alpha that a recipe cannot have": ({"lora_alpha": 8.5}, {}, "has alpha 8.5, lora.alpha is 8; merge it into its base"),
    "an alpha below zero": ({"lora_alpha": -8}, {}, "has alpha -8, lora.alpha is 8; merge it into its base"),
    "one layer": ({"layers_to_transform": [1], "target_modules": ["q_proj"]}, {}, "layers_to_transform = [1]"),
    "fewer modules": ({"target_modules": ["q_proj"]}, {}, "set lora.target_modules as it was made"),
    "more modules": ({}, {"target_modules": ["q_proj"]}, "set lora.target_modules as it was made"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}, "adapts the embeddings"),
    "a saved norm": ({"modules_to_save": ["norm"]}, {}, "keeps whole copies of modules"),
    "principal components": ({"init_lora_weights": "pissa"}, {}, "changes the base's weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STARTS)
def test_a_student_starts_as_exactly_that_adapter_or_the_field_that_differs_is_named(
    base: str, tmp_path: Path, kind: str
):
    fields, lora, reason = STARTS[kind]
    adapter = save_kind(tmp_path / "adapter", base, **fields)
    tree = toy_recipe(tmp_path) | {"student": base, "lora": {"rank": 4, "alpha": 8, "start": adapter} | lora}
    if reason is not None:
        with pytest.raises(ModelError, match=r"\(lora.start\)") as caught:
            build(opd.parse_config(tree))
        assert reason in str(caught.value)
        return
    backend = build(opd.parse_config(tree))
    network = backend.student.network
    for found in logits_of(network, "student"):
        torch.testing.assert_close(found, logits_of_peft(base, adapter), atol=CLOSE, rtol=0)
    assert not [name for name, _ in network.model.named_parameters() if ".start." in name]
    network.activate("student", trainable=True)
    assert all(p.requires_grad == ("lora_" in n) for n, p in network.model.named_parameters())


def test_the_advice_for_a_rank_stabilised_start_works(base: str, tmp_path: Path):
    adapter = save_kind(tmp_path / "adapter", base, use_rslora=True)
    tree = toy_recipe(tmp_path) | {"student": base, "lora": {"rank": 4, "alpha": 8, "start": adapter}}
    with pytest.raises(ModelError, match=r"write lora.alpha = 16$"):
        build(opd.parse_config(tree))
    tree["lora"]["alpha"] = 16
    assert build(opd.parse_config(tree)).student.adapter == "student"


RENAMED: dict[str, tuple[Callable[[str], str], str]] = {
    "without PEFT's prefix": (lambda n: n.removeprefix("base_model.model."), "its names lack 'base_model.model.' at the front"),
    "of a wrapped model": (lambda n: f"module.{n}", "its names begin with 'module.', which those of the model do not"),
    "of a compiled model": (lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."), "hold '_orig_mod.'"),
    "with the adapter's name": (lambda n: n.replace(".weight", ".default.weight"), "its names hold 'default.'"),
    "of a larger model's text part": (lambda n: n.replace("model.layers", "model.language_model.layers"), "hold 'language_model.'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RENAMED)
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_an_adapter_whose_names_match_nothing_is_refused_with_the_prefix(tmp_path: Path, kind: str, trainable: str):
    rename, reason = RENAMED[kind]
    tree = toy_recipe(tmp_path, trainable=trainable)
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    file = adapter / "adapter_model.safetensors"
    save_file({rename(n): t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    tree["teachers"]["even"] = {"adapter": str(adapter)}
    with pytest.raises(ModelError) as caught:
        build(opd.parse_config(tree))
    assert "28 of its 28 weights are missing in its file, first 'base_model.model.model.layers.0." in str(caught.value)
    assert reason in str(caught.value)


def test_an_adapter_without_its_second_factors_is_refused(tmp_path: Path):
    tree = toy_recipe(tmp_path)
    adapter = Path(save_adapter(tmp_path / "adapter", tree["student"], 5))
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora_B" not in n}, file, metadata={"format": "pt"})
    tree["teachers"]["even"] = {"adapter": str(adapter)}
    with pytest.raises(ModelError, match=r"14 of its 28 weights are missing in its file, first '.*lora_B.weight'"):
        build(opd.parse_config(tree))


def test_a_start_samples_as_its_adapter(base: str, tmp_path: Path):
    adapter = save_kind(tmp_path / "adapter", base, use_rslora=True)
    tree = toy_recipe(tmp_path) | {"student": base, "lora": {"rank": 4, "alpha": 16, "start": adapter}}
    tree["teachers"]["even"] = {"adapter": adapter}
    backend = build(opd.parse_config(tree))
    rollouts = backend.sampler().sample([prompt("p", "hi", teacher="even")], num_samples=3, seed=(1,))
    scored = backend.teachers(keep_hidden=False).score(rollouts)
    for one in scored:
        gap = one.score.logprobs - one.rollout.rollout_logprobs  # type: ignore[union-attr]  # none failed
        assert float(abs(gap).max()) < 1e-4


def test_an_adapter_in_whole_numbers_is_refused(base: str, tmp_path: Path):
    adapter = save_kind(tmp_path / "adapter", base)
    file = Path(adapter) / "adapter_model.safetensors"
    save_file({name: (20 * tensor).to(torch.int8) for name, tensor in load_file(file).items()}, file)
    tree = toy_recipe(tmp_path) | {"student": base}
    tree["teachers"]["even"] = {"adapter": adapter}
    with pytest.raises(ModelError, match=r"\(teacher 'even'\): weight '.*' holds whole numbers \(I8\)"):
        build(opd.parse_config(tree))
