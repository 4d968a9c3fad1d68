"""The architectures for which packed passes are right, and the longest sequence: read from a config and a model's modules.

All others run padded passes (`opd.models.padded`). The start-up check then measures the passes on the weights themselves
(`opd.models.packing_check`).
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from opd.errors import ModelError
from opd.roles import Limit, smallest

Place = TypeVar("Place", int, np.ndarray, torch.Tensor)  # of a token in its sequence

_STATE = "carry state across packed sequences"
_ALLOWED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention", "moe", "mlp"}
_LAYERS = {
    "conv": f"this model's short convolutions {_STATE}",
    "mamba": f"this model's Mamba layers {_STATE}",
    "recurrent": f"this model's recurrent layers {_STATE}",
    "linear_attention": f"this model's recurrent layers (linear attention, Mamba) {_STATE}",
    "hybrid": f"this model's recurrent layers (Mamba or linear attention beside attention) {_STATE}",
    "hybrid_sliding": f"this model's recurrent layers (linear attention beside attention) {_STATE}",
}
# of modules, by the names that transformers gives to their classes
_KINDS = (
    ("Mamba|SSM|Ssm", f"this model's Mamba layers {_STATE}"),
    ("DeltaNet|KimiDelta|DeltaAttention|GatedDelta", f"this model's gated delta layers (linear attention) {_STATE}"),
    ("Lightning|LinearAttention|Retention|GatedLinear", f"this model's linear attention {_STATE}"),
    ("RgLru|RGLRU|RecurrentBlock|Rwkv|RWKV|[ms]LSTM|LSTM", f"this model's recurrent layers {_STATE}"),
    ("ShortConv", f"this model's short convolutions {_STATE}"),
)
_SINKS = "this model needs attention sinks, which packed passes do not have"


def is_text_only(config: Any) -> bool:
    """Whether a model has no parts that read images or sound."""
    return config.get_text_config() is config


def decoder_layers(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """The blocks of a model that read text, those that transformers would not split over devices."""
    below = backbone(model)
    blocks = {name for part in (model, below) for name in getattr(part, "_no_split_modules", None) or ()}
    for module in below.modules():
        if type(module).__name__ in blocks:
            yield module


def unpackable(model: PreTrainedModel) -> str | None:
    """Why packed passes cannot run a model's layers, by its config and its modules; None where they can."""
    text = model.config.get_text_config()
    why = _layers_named(text) or _keys_named(text)
    for layer in (*decoder_layers(model),) or (backbone(model),):
        why = why or _modules_named(layer)
    if why is None and not language_model(model)._supports_attention_backend:
        why = f"{type(model).__name__} does not take another attention function (transformers' AttentionInterface)"
    return why


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The modules below the output head, of a model that also reads images those that read text; the model itself where it does not
    say which these are."""
    if not is_text_only(model.config):
        causal = causal_model(model)
        return model.get_decoder() if causal is model else backbone(causal)
    below: torch.nn.Module = model.base_model
    return getattr(model, "model", below) if below is model else below


def text_parameters(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """The weights that text reaches: those of the backbone and of the output head."""
    head = model.get_output_embeddings()
    yield from backbone(model).parameters()
    yield from () if head is None else head.parameters()


def causal_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that makes logits of text alone: itself, unless its language model has the output head."""
    decoder = model if is_text_only(model.config) else model.get_decoder()
    return model if decoder.get_output_embeddings() is None else decoder


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that attends to text: itself, unless it also reads images."""
    below = model if is_text_only(model.config) else backbone(model)
    assert isinstance(below, PreTrainedModel)
    return below


def require_backbone(model: PreTrainedModel, *, source: str) -> None:
    """Raise ModelError for a model that does not say which of its modules lie below the output head."""
    if backbone(model) is model:
        raise ModelError(
            f"model '{source}': {type(model).__name__} does not say which of its modules lie below the output head; use another "
            "model (a teacher of this kind can run behind a server: teachers.NAME.url)"
        )


@dataclass(frozen=True)
class Reach:
    """How far back the tokens of a layer see: the last `window` tokens, the token itself among them; or, `in_chunks`, its chunk of
    so many tokens up to itself."""

    window: int
    in_chunks: bool = False

    def first(self, place: Place) -> Place:
        """The first place that the token at `place` sees; 0 or less: the beginning."""
        return place // self.window * self.window if self.in_chunks else place - (self.window - 1)


def reach_of(config: Any, layer: int, window: int | None = None) -> Reach | None:
    """How far back the tokens of a layer see, by the config that its attention keeps and the window that it is called with (many
    architectures put theirs into the mask alone); None: to the first token."""
    kinds = getattr(config, "layer_types", None)
    kind = "sliding_attention" if kinds is None else kinds[layer]
    if kind == "chunked_attention" and getattr(config, "attention_chunk_size", None):
        return Reach(config.attention_chunk_size, in_chunks=True)
    if window is None and kind == "sliding_attention":
        window = getattr(config, "sliding_window", None)
    return None if window is None else Reach(window)


def reaches_of(config: Any) -> set[Reach]:
    """How far back the tokens of layers with a window or chunks see."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [None]
    return {reach for layer in range(len(kinds)) if (reach := reach_of(text, layer)) is not None}


@contextlib.contextmanager
def narrow_windows(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Let every window and chunk of a model be of at most so many tokens: what lies beyond it can be tried with few tokens."""
    found = [
        (part, name, size)
        for part in (model.config.get_text_config(), *model.modules())
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(size := getattr(part, name, None), int) and size > tokens
    ]
    for part, name, _ in found:
        setattr(part, name, tokens)
    try:
        yield
    finally:
        for part, name, size in found:
            setattr(part, name, size)


def length_limit(config: Any) -> Limit | None:
    """The longest sequence that passes are right for, with its cause; None where the config sets no limit.

    One rope turns all sequences of a pass, packed or padded: where a rope changes with the longest of them ("longrope",
    "dynamic"), all stay below the change.
    """
    text = config.get_text_config()
    found: list[Limit] = []
    if (context := getattr(text, "max_position_embeddings", None)) is not None:
        found.append(Limit(context))
    found += _rope_limits(text)
    return smallest(reversed(found))  # of equal limits the last one, which names a cause other than the context


def rope_limit_of(source: str) -> Limit | None:
    """Where the rope of a model changes with the longest sequence, by its config alone; None where it does not, or cannot be
    read."""
    with contextlib.suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return smallest(_rope_limits(config.get_text_config()))
    return None


def _rope_limits(text: Any) -> Iterator[Limit]:
    """Where ropes change with the longest sequence of a pass."""
    for rope in _ropes(text):
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        context = getattr(text, "max_position_embeddings", None)
        if "dynamic" in kind:  # transformers grows it beyond the config's own context
            original = context
        if kind not in ("longrope", "su") and "dynamic" not in kind:
            continue
        if (tokens := original or context) is not None:
            yield Limit(tokens, f"its rope ('{kind}') changes beyond {tokens} tokens")


def _ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of each rope, which may be given by kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = getattr(text, key, None)
        if isinstance(found, Mapping):
            nested = [value for value in found.values() if isinstance(value, Mapping)]
            yield from nested or [found]


def _layers_named(text: Any) -> str | None:
    """Why the kinds of layers that a config lists cannot be packed."""
    for key in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(text, key, None)
        for kind in kinds if isinstance(kinds, list | tuple) else ():
            if kind not in _ALLOWED_LAYERS:
                return _LAYERS.get(kind, f"this model's layers of kind '{kind}' are not plain attention") + f" ({key})"
    return None


def _keys_named(text: Any) -> str | None:
    """Why the settings of a config cannot be packed."""
    for key, value in text.to_dict().items():
        if not value or isinstance(value, Mapping):
            continue
        if re.search("soft_?cap", key) and ("attn" in key or "attention" in key):
            return f"this model soft-caps its attention scores ({key} = {value}), which packed passes do not do"
        if "sink" in key and value is True:
            return f"{_SINKS} ({key})"
        if key == "attn_temperature_tuning":
            return f"this model scales its attention by a token's place within the pass ({key})"
    return None


def _modules_named(layer: torch.nn.Module) -> str | None:
    """Why the modules of a layer cannot be packed."""
    for module in layer.modules():
        name = type(module).__name__
        for kinds, why in _KINDS:
            if re.search(kinds, name):
                return f"{why} ({name})"
        if isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1:
            return f"this model's short convolutions {_STATE} ({type(layer).__name__})"
    for name, _ in layer.named_parameters():
        if re.search("(^|[._])sinks?$|sink_bias$", name):
            return f"{_SINKS} ({name})"
    return None
