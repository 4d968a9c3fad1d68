"""Toy models of the architectures that transformers has, by the kind of pass that is right for them."""

import copy
from typing import Any

import torch
from factories import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from opd.models.network import Network

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_GRANITE = {"num_local_experts": 0, "shared_intermediate_size": 48, "logits_scaling": 1.0, **_MAMBA}

SOUND: dict[str, dict[str, Any]] = {
    "llama": HEAD,
    "mistral": {**HEAD, "sliding_window": None},
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3_moe": {**HEAD, **EXPERTS},
    "gemma3_text": HEAD,
    "smollm3": HEAD,
    "olmo2": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "deepseek_v3": LATENT,
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "minicpm3": {k: v for k, v in LATENT.items() if "rank" in k or "head" in k},
    "hyperclovax": {"logits_scaling": 0.25},
    "nanochat": {},
    "phi": {},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "n_inner": 48},
    # a hybrid's config whose layers are all attention
    "granitemoehybrid": {**_GRANITE, "layer_types": ["attention", "attention"]},
}
# each layer with a window of 12 tokens, or only some
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 12},
    "mixtral": {**HEAD, "sliding_window": 12, "num_local_experts": 2},
    "phi3": {"sliding_window": 12},
    "starcoder2": {"sliding_window": 12},
    "qwen2": {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {
        "sliding_window": 12, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"],
        "moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16,
    },
    "gemma3_text": {**HEAD, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 12, "layer_types": ["full_attention", "sliding_attention"], "logit_scale": 0.25},
    "exaone4": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
# packed passes are wrong for these, by their config or modules: why
PADDED: dict[str, tuple[dict[str, Any], str]] = {
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "short convolutions carry state across packed sequences"),
    "granitemoehybrid": (
        {**_GRANITE, "layer_types": ["mamba", "attention"]},
        "recurrent layers .* carry state across packed sequences",
    ),
    "falcon_h1": (
        {**HEAD, **_MAMBA, "mamba_d_ssm": 64},
        "recurrent layers .* carry state across packed sequences",
    ),
    "bamba": ({**_MAMBA, "attn_layer_indices": [1]}, "recurrent layers .* carry state across packed sequences"),
    "qwen3_next": (
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
        "recurrent layers .* carry state across packed sequences",
    ),
    "qwen3_5_text": (DELTA, "recurrent layers .* carry state across packed sequences"),
    "minimax": ({**HEAD, **EXPERTS}, "recurrent layers .* carry state across packed sequences"),
    "gemma2": (HEAD, r"soft-caps its attention scores .*softcapping = 50"),
    "gpt_oss": ({**HEAD, **EXPERTS}, r"needs attention sinks, which packed passes do not have \(self_attn.sinks\)"),
    "llama4_text": (
        {**HEAD, "num_local_experts": 2, "intermediate_size_mlp": 48},
        "scales its attention by a token's place within the pass",
    ),
}
# packed passes are wrong for these, which numbers alone show: the first probe that fails
FOUND: dict[str, tuple[dict[str, Any], str]] = {
    "nemotron": ({}, "plan"),
    "doge": ({}, "one sequence"),
    "diffllama": ({}, "grown rows"),  # attends twice a layer
}
# further families with sizes by the names of their settings: those that are packed, and those that are padded
OTHERS = (
    "afmoe", "apertus", "arcee", "bitnet", "cohere2_moe", "deepseek_v2", "ernie4_5", "ernie4_5_moe", "exaone", "exaone_moe",
    "flex_olmo", "gemma", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_bigcode",
    "gpt_neox", "gptj", "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3",
    "jetmoe", "minimax_m2", "ministral", "ministral3", "olmo", "olmoe", "persimmon", "phimoe", "seed_oss",
)  # fmt: skip
OTHERS_PADDED = (
    "bloom", "deepseek_v32", "falcon", "falcon_mamba", "glm_moe_dsa", "granite_swa", "mamba", "mamba2", "mimo_v2_flash",
    "mpt", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "stablelm", "vaultgemma",
)  # fmt: skip
_GENERIC: dict[str, Any] = {
    **SIZES, **EXPERTS, **_MAMBA, **{k: v for k, v in DELTA.items() if k.startswith("linear")},
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 48, "d_model": 32, "n_layers": 2, "n_heads": 4,
    "rotary_dim": 8, "sliding_window": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 64, "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 48, "moe_num_experts": 4, "moe_k": 2, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 258, "num_kv_shared_layers": 0, "laurel_rank": 8, "altup_num_inputs": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "state_size": 8, "expand": 2, "num_heads": 8,
    "n_groups": 1, "time_step_rank": 4, "conv_kernel": 4,
}  # fmt: skip
NO_CACHE = {"lru_width": 32, "attention_window_size": 256, "num_hidden_layers": 3}  # of RecurrentGemma


def options_of(kind: str) -> dict[str, Any]:
    """Sizes for one of `OTHERS` or `OTHERS_PADDED`, by the settings that its config has; each of its kinds of layers once."""
    known = AutoConfig.for_model(kind).to_dict()
    found = {name: size for name, size in _GENERIC.items() if name in known}
    if "kv_lora_rank" in known:
        found["num_key_value_heads"] = 4
    elif "head_dim" in known:
        found["head_dim"] = 8
    for name in ("layer_types", "mlp_layer_types"):
        if known.get(name):
            kinds = list(dict.fromkeys(known[name]))
            found[name] = (kinds * 2)[: max(2, len(kinds), len(found.get("layer_types", ())))]
            found["num_hidden_layers"] = len(found["layer_types"] if "layer_types" in found else found[name])
    return found


def toy_of(kind: str, options: dict[str, Any], *, scale: float = 0.15) -> PreTrainedModel:
    """A model of one kind with random weights, large enough to matter."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    options = copy.deepcopy(options)  # configs write into what they are given
    sizes = {k: v for k, v in {**SIZES, **options}.items() if k in options or hasattr(known, k)}
    model = AutoModelForCausalLM.from_config(type(known)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale)
            else:  # norms stay near 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def network_of(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Network:
    return Network(toy_of(kind, options).to(dtype), byte_tokenizer(), kind)
