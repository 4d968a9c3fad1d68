"""Toy models that read images too, as folders: a language model, a vision tower and what joins them."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from architectures import DELTA, EXPERTS, HEAD, LATENT, SIZES
from factories import byte_tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

_TEXT = {**SIZES, "vocab_size": 264}
_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "depth": 2, "num_heads": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "patch_size": 4, "image_size": 16, "out_hidden_size": 32, "embed_dim": 16, "vision_output_dim": 32,
    "projector_input_dim": 16, "projector_output_dim": 16, "head_dim": 8,
}  # fmt: skip
_SECTIONS = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 1, 1]}
# the options of the language model
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {**HEAD, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_vl": {"rope_parameters": _SECTIONS},
    "qwen2_5_vl": {"rope_parameters": _SECTIONS},
    "qwen3_vl": {**HEAD, "rope_parameters": _SECTIONS},
    "qwen3_vl_moe": {**HEAD, **EXPERTS, "rope_parameters": _SECTIONS},
    "qwen3_5": DELTA,
    "mistral3": HEAD,
    "kimi_k25": LATENT,
    "llama4": {**HEAD, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "smolvlm": {},
    "internvl": {},
    "glm4v": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}},
    "gemma4": {
        **HEAD, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 264,
    },
}  # fmt: skip


def vision_toy(kind: str, options: dict[str, Any], *, scale: float = 0.15) -> PreTrainedModel:
    """A model of one kind with random weights; the ids from 258 on stand for images."""
    torch.manual_seed(0)
    known = AutoConfig.for_model(kind)
    text = known.get_text_config()
    parts: dict[str, Any] = {}
    for name in type(known).sub_configs:
        part = getattr(known, name)
        if part is not None:
            sizes = {**_TEXT, **copy.deepcopy(options)} if part is text else _TOWER
            names = part.to_dict()
            parts[name] = type(part)(
                **{k: v for k, v in sizes.items() if k in names or (part is text and k in options)}
            )
    names = [k for k in known.to_dict() if k.endswith(("_token_id", "_token_index")) and k.split("_")[0] not in _TEXT]
    ids = {name: 258 + i % 6 for i, name in enumerate(n for n in names if n.split("_")[0] not in ("bos", "eos", "pad"))}
    model = AutoModelForImageTextToText.from_config(type(known)(**parts, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_vision(folder: Path, kind: str) -> str:
    """A toy model with its tokenizer and a file of its processor; returns its folder."""
    vision_toy(kind, VISION[kind]).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "of the toy"}), encoding="utf-8"
    )
    return str(folder)
