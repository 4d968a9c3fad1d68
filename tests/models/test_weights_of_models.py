"""A model is what its files say: weights that are missing, of other shapes or without a place are refused, never random."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, save_adapter, save_toy, sft_recipe, toy_model, write_toml
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_runs import bench as bench
from toy_runs import invoke, one_line, place_of, refuse_tree
from toy_runs import tree as tree
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

import opd
from opd.config import ComputeConfig
from opd.errors import ModelError
from opd.models.loading import load_network

CPU = ComputeConfig(device="cpu")
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def rewrite(folder: str | Path, change: Change) -> str:
    file = Path(folder) / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def configured(folder: str | Path, file: str = "config.json", **fields: Any) -> str:
    path = Path(folder) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(folder)


def named(rename: Callable[[str], str]) -> Change:
    return lambda weights: {rename(name): tensor for name, tensor in weights.items()}


PREFIXED: dict[str, tuple[Callable[[str], str], str]] = {
    "a text model out of a larger one": (lambda n: n.replace("model.", "model.language_model.", 1),
        "its names hold 'language_model.'"),
    "a model of several devices": (lambda n: f"module.{n}", "its names begin with 'module.', which those of the model do not"),
    "a compiled model": (lambda n: f"_orig_mod.{n}", "its names begin with '_orig_mod.', which"),
    "another library's names": (lambda n: n.replace("model.", "transformer.", 1),
        "its names begin with 'transformer.' where those of the model begin with 'model.'"),
    "a text model of a wrapper": (lambda n: f"text.{n.removeprefix('model.')}",
        "its names begin with 'text.' where those of the model begin with 'model.'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFIXED)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_weights_under_a_prefix_are_refused_with_the_prefix(tree: dict[str, Any], tmp_path: Path, who: str, kind: str):
    rename, reason = PREFIXED[kind]
    place_of(tree, who, rewrite(save_toy(tmp_path / "prefixed", 1), named(rename)))
    line = refuse_tree(tree, tmp_path)
    assert f"model '{tmp_path}/prefixed': 21 of the 21 weights of LlamaForCausalLM are missing in its files" in line
    assert "would be random, first 'lm_head.weight'" in line
    assert reason in line
    assert "transformers' load report: MISSING" in line


def test_the_advice_for_a_prefix_works(tree: dict[str, Any], tmp_path: Path):
    folder = rewrite(save_toy(tmp_path / "prefixed", 1), named(lambda n: f"module.{n}"))
    place_of(tree, "teacher", folder)
    assert "begin with 'module.', which those of the model do not: rewrite the file without it" in refuse_tree(
        tree, tmp_path
    )
    rewrite(folder, named(lambda n: n.removeprefix("module.")))
    assert invoke("check", write_toml(tmp_path / "recipe.toml", tree)).exit_code == 0


def test_a_base_model_without_the_outer_prefix_is_the_same_model(tmp_path: Path):
    folder = rewrite(save_toy(tmp_path / "bare", 1), named(lambda n: n.removeprefix("model.")))
    found, expected = load_network(folder, CPU).base, toy_model(1)
    for (name, ours), (_, theirs) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def without(*parts: str) -> Change:
    return lambda weights: {name: t for name, t in weights.items() if not any(part in name for part in parts)}


def more(**tensors: Tensor) -> Change:
    return lambda weights: weights | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


REFUSED: dict[str, tuple[Change | None, dict[str, Any], str]] = {
    "a layer is missing": (without("layers.1."), {},
        "9 of the 21 weights of LlamaForCausalLM are missing in its files and would be random, first "
        "'model.layers.1.input_layernorm.weight' (all of them begin with 'model.layers.1.')"),
    "one weight is missing": (without("layers.1.mlp.up_proj"), {}, "1 of the 21 weights of LlamaForCausalLM are missing"),
    "the config has more layers": (None, {"num_hidden_layers": 3}, "9 of the 30 weights of LlamaForCausalLM are missing"),
    "no head": (None, {"tie_word_embeddings": False},
        "write tie_word_embeddings = true into config.json if the embeddings are the head"),
    "the config has fewer layers": (None, {"num_hidden_layers": 1},
        "9 weights in its files have no place inside LlamaForCausalLM, first 'model.layers.1.input_layernorm.weight'"),
    "biases that the architecture lacks": (more(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), {},
        "1 weights in its files have no place inside LlamaForCausalLM, first 'model.layers.0.self_attn.q_proj.bias'"),
    "norms that the architecture lacks": (more(model__layers__0__self_attn__q_norm__weight=torch.ones(8)), {},
        "first 'model.layers.0.self_attn.q_norm.weight'"),
    "a head's bias": (more(lm_head__bias=torch.ones(258)), {}, "first 'lm_head.bias'"),
    "a norm behind the embeddings": (more(model__embed_norm__weight=torch.ones(32)), {}, "first 'model.embed_norm.weight'"),
    "other widths": (None, {"intermediate_size": 64},
        "the shapes of 6 weights differ from those of LlamaForCausalLM, for example "
        "'model.layers.0.mlp.down_proj.weight': [32, 48] in the files, [32, 64] according to config.json"),
    "another vocabulary": (None, {"vocab_size": 300}, "[258, 32] in the files, [300, 32] according to config.json"),
    "quantised weights without their config": (more(model__layers__0__mlp__up_proj__weight_scale_inv=torch.ones(1)), {},
        "first 'model.layers.0.mlp.up_proj.weight_scale_inv'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_not_those_of_the_model_are_refused(tree: dict[str, Any], tmp_path: Path, kind: str):
    change, fields, reason = REFUSED[kind]
    folder = configured(save_toy(tmp_path / "other", 1), **fields)
    if change is not None:
        rewrite(folder, change)
    place_of(tree, "teacher", folder)
    line = refuse_tree(tree, tmp_path)
    assert f"model '{folder}': " in line
    assert reason in line
    assert "transformers' load report: " in line


def test_a_student_to_fine_tune_with_missing_weights_is_refused(tmp_path: Path):
    folder = rewrite(save_toy(tmp_path / "base", 0), named(lambda n: f"module.{n}"))
    line = one_line(invoke("sft", write_toml(tmp_path / "sft.toml", sft_recipe(tmp_path / "sft", folder))))
    assert "its names begin with 'module.'" in line


ACCEPTED: dict[str, Change] = {
    "old rotary buffers": more(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "its own copy of a tied head": lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_an_architecture_may_lack_or_have_more_is_loaded_without_a_word(tmp_path: Path, kind: str):
    network = load_network(rewrite(save_toy(tmp_path / "toy", 1), ACCEPTED[kind]), CPU)
    assert network.notes == []
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(network.base(input_ids=ids).logits, toy_model(1)(input_ids=ids).logits)


def test_architectures_with_buffers_and_norms_of_their_own_are_loaded_without_a_word(tmp_path: Path):
    sizes = {"vocab_size": 258, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 257}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)),
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                num_key_value_heads=2, **sizes,
            )
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        assert load_network(str(tmp_path / name), CPU).notes == []


@pytest.mark.parametrize(
    "name", ["visual.blocks.0.attn.weight", "v_head.summary.weight", "model.vision_tower.a.b.weight"]
)
def test_parts_beside_the_text_model_are_left_out_and_shown(tree: dict[str, Any], tmp_path: Path, name: str):
    folder = rewrite(save_toy(tmp_path / "larger", 1), lambda w: w | {name: torch.ones(3)})
    place_of(tree, "teacher", folder)
    shown = invoke("check", write_toml(tmp_path / "recipe.toml", tree))
    assert shown.exit_code == 0, shown.output
    said = "1 weights in its files are not part of LlamaForCausalLM and are left out"
    assert f"warn  models are loaded as their files say: model '{folder}': {said}" in shown.stdout
    assert f"UNEXPECTED {name}" in shown.stdout


def sharded(folder: Path) -> Path:
    toy_model(1).save_pretrained(folder, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_in_several_files_is_loaded(tmp_path: Path):
    assert load_network(str(sharded(tmp_path / "several")), CPU).notes == []


def test_a_missing_file_of_several_is_named(tree: dict[str, Any], tmp_path: Path):
    folder = sharded(tmp_path / "several")
    (folder / "model-00002-of-00003.safetensors").unlink()
    place_of(tree, "teacher", folder)
    line = refuse_tree(tree, tmp_path)
    assert "'model.safetensors.index.json' names 3 files, 1 of them are missing" in line
    assert "first 'model-00002-of-00003.safetensors'; copy them into the folder" in line


def test_an_index_that_leaves_a_file_out_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder = sharded(tmp_path / "several")
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] = {n: f for n, f in said["weight_map"].items() if "00003-of" not in f}
    index.write_text(json.dumps(said))
    place_of(tree, "teacher", folder)
    assert "are missing in its files and would be random, first 'model.layers." in refuse_tree(tree, tmp_path)


@pytest.mark.parametrize("damaged", ["[]", '{"weight_map": {}}', "{"])
def test_an_index_that_is_no_index_is_refused(tree: dict[str, Any], tmp_path: Path, damaged: str):
    folder = sharded(tmp_path / "several")
    (folder / "model.safetensors.index.json").write_text(damaged)
    place_of(tree, "teacher", folder)
    assert "'model.safetensors.index.json' has no weight_map; copy the file again" in refuse_tree(tree, tmp_path)


_GGUF = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def save_gguf(path: Path, *, rename: Callable[[str], str | None] = lambda name: name) -> str:
    """The toy with one token more as a GGUF file; rename: what a tensor is called in it, None where it is left out."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    vocab = byte_tokenizer().get_vocab()
    writer.add_token_list([*sorted(vocab, key=vocab.__getitem__), "ab"])
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names |= {f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for i in range(2) for a, b in _GGUF.items()}
    for name, parameter in toy_model(1, vocab_size=259).named_parameters():
        called = rename(names[name])
        if called is not None:
            writer.add_tensor(called, parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_is_the_model_that_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    network = load_network(save_gguf(tmp_path / "toy.gguf"), CPU)
    assert network.notes == []
    ours = network.base.get_input_embeddings().weight  # type: ignore[union-attr]  # it has some
    assert torch.equal(ours, toy_model(1, vocab_size=259).get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        (lambda n: None if n == "blk.1.ffn_up.weight" else n, "1 of the 21 weights of LlamaForCausalLM are missing"),
        (lambda n: f"model.{n}", "21 of the 21 weights of LlamaForCausalLM are missing"),
        (lambda n: None if n == "token_embd.weight" else n, "2 of the 21 weights of LlamaForCausalLM are missing"),
    ],
)
def test_a_gguf_file_without_some_weights_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: Callable[[str], str | None], reason: str
):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    path = save_gguf(tmp_path / "toy.gguf", rename=rename)
    with pytest.raises(ModelError, match=reason) as caught:
        load_network(path, CPU)
    assert "tie_word_embeddings" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_tokenizer_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder = Path(save_toy(tmp_path / "toy", 1))
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    said["model"]["merges"] = [["a", "\u2603"]]
    file.write_text(json.dumps(said))
    place_of(tree, "teacher", folder)
    assert f"model '{folder}': its tokenizer cannot be loaded: " in refuse_tree(tree, tmp_path)


def test_a_model_folder_with_an_adapter_in_it_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder = save_toy(tmp_path / "both", 1)
    for file in Path(save_adapter(tmp_path / "adapter", folder, 3)).iterdir():
        file.rename(Path(folder) / file.name)
    place_of(tree, "teacher", folder)
    assert "holds an adapter beside its weights (adapter_config.json)" in refuse_tree(tree, tmp_path)


def test_a_run_whose_teacher_lost_its_names_is_not_resumed(tree: dict[str, Any], tmp_path: Path):
    folder = save_toy(tmp_path / "teacher", 1)
    place_of(tree, "teacher", folder)
    assert (
        invoke("train", write_toml(tmp_path / "recipe.toml", tree), "steps=1", "optimizer.warmup_steps=0").exit_code
        == 0
    )
    rewrite(folder, named(lambda n: f"module.{n}"))
    line = one_line(invoke("train", "--resume", tree["output"]))
    assert "its names begin with 'module.'" in line
    assert len(opd.read_metrics(tree["output"])) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {n.replace("base_model.model.", "", 1): t for n, t in w.items()},
        lambda w: {n: t for n, t in w.items() if "layers.1.mlp.up_proj.lora_B" not in n},
        lambda w: {n: t[:1] if n.startswith("student/") and "lora_B" in n else t for n, t in w.items()},
    ],
    ids=["other names", "one is missing", "shapes that would be broadcast"],
)
def test_a_checkpoint_of_another_student_is_refused(tree: dict[str, Any], tmp_path: Path, change: Change):
    recipe = write_toml(tmp_path / "recipe.toml", tree | {"checkpoint": {"every": 1}})
    assert invoke("train", recipe).exit_code == 0
    [path] = [p for p in Path(tree["output"]).glob("checkpoints/step-000002/*.safetensors")]
    save_file({n: t.contiguous() for n, t in change(load_file(path)).items()}, path)
    sums = path.parent / "checksums.json"
    said = json.loads(sums.read_text()) | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    sums.write_text(json.dumps(said))
    line = one_line(invoke("train", "--resume", tree["output"]))
    assert "the checkpoint belongs to another student: " in line
    assert "resume with the same model and the same versions of transformers and peft as before" in line


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_weights_in_whole_numbers_without_a_quantisation_config_are_refused(
    tree: dict[str, Any], tmp_path: Path, kind: torch.dtype
):
    folder = save_toy(tmp_path / "other", 1)
    rewrite(folder, lambda weights: {n: (20 * t).to(kind) if "proj" in n else t for n, t in weights.items()})
    place_of(tree, "teacher", folder)
    line = refuse_tree(tree, tmp_path)
    assert f"model '{folder}': weight 'model.layers." in line
    assert "holds whole numbers" in line


def test_a_vocabulary_too_small_for_its_special_tokens_is_one_line(tree: dict[str, Any], tmp_path: Path):
    folder = configured(save_toy(tmp_path / "other", 1), vocab_size=200)
    place_of(tree, "teacher", folder)
    assert f"model '{folder}' cannot be loaded: Padding_idx must be within num_embeddings" in refuse_tree(
        tree, tmp_path
    )


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_no_numbers_are_called_so(tree: dict[str, Any], tmp_path: Path, name: str):
    folder = save_toy(tmp_path / "other", 1)
    rewrite(folder, lambda weights: {n: t * float("nan") if n == name else t for n, t in weights.items()})
    place_of(tree, "teacher", folder)
    assert "its logits are no numbers (nan): weights of it are nan or infinite" in refuse_tree(tree, tmp_path)
