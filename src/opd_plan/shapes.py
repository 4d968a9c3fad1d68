"""Sizes of a model from its config.json alone: it is built without memory (torch's meta device) and counted."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from opd.errors import ModelError, one_line
from opd.models.loading import OWN_CODE, asks_for_own_code

# fields of an adapter's config that change which layers it has, or how many parameters on each
_NARROWING = ("rank_pattern", "layers_to_transform", "layers_pattern", "exclude_modules", "use_dora", "lora_bias")


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder: parameters are counted of the model that transformers builds.

    inside: parameters of its layers, which ranks share; outside: all others (embeddings, head, last norm; tied ones once).
    products: of the layers' parameters those of linear layers; largest: parameters of its largest layer; qk_norm: whether queries
    and keys are normalised; context: the longest sequence it takes, if its config says so.
    """

    source: str
    inside: int
    outside: int
    products: int
    largest: int
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool
    context: int | None

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.inside + self.outside

    @property
    def head(self) -> int:
        """Parameters of the output head, whether the embeddings share them or not."""
        return self.vocab * self.width

    @property
    def queries(self) -> int:
        """Width of all queries of a token together, and of the attention's result."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all keys of a token together, and of all values."""
        return self.kv_heads * self.head_dim

    def kv_bytes(self, bytes_each: int) -> int:
        """What one token keeps in a KV cache, all layers together: grouped queries share keys and values."""
        return 2 * self.layers * self.keys * bytes_each

    def splits(self, devices: int) -> bool:
        """Whether an engine can split it over so many devices: whole heads on each, and key heads whole or copied."""
        evenly = self.heads % devices == 0 and self.intermediate % devices == 0
        return evenly and (self.kv_heads % devices == 0 or devices % self.kv_heads == 0)


def read_shape(source: str) -> Shape:
    """The sizes of the model in a folder (its config.json is enough) or of a hub id.

    Raises ModelError for what cannot be read, and for models whose cost this plan cannot count: experts, attention without a
    cache of keys and values for each head.
    """
    config = _config(source)
    model = _empty(source)
    blocks = _blocks(model)
    inside = {id(p): p.numel() for block in blocks for p in block.parameters()}
    outside = {id(p): p.numel() for p in model.parameters() if id(p) not in inside}
    heads = config.num_attention_heads
    return Shape(
        source=source,
        inside=sum(inside.values()),
        outside=sum(outside.values()),
        products=sum(_linear(block) for block in blocks),
        largest=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        qk_norm=any(name.endswith("q_norm") for name, _ in blocks[0].named_modules()),
        context=getattr(config, "max_position_embeddings", None),
    )


def adapter_parameters(
    source: str, *, rank: int, target_modules: str | list[str] | set[str], narrowed: Mapping[str, Any] | None = None
) -> int:
    """How many parameters a LoRA adapter of that rank on those layers of a model has. narrowed: other fields of its config."""
    described = PeftLoraConfig(r=rank, target_modules=target_modules, task_type="CAUSAL_LM", **(narrowed or {}))  # type: ignore[arg-type]  # a set is given back
    try:
        with torch.device("meta"), _quiet():
            adapted = get_peft_model(_empty(source), described)
    except ValueError as error:
        raise ModelError(f"model '{source}': target_modules do not fit: {one_line(str(error))[:200]}") from None
    return sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)


def adapter_of(folder: str, base: str) -> int:
    """The same of an adapter in a folder, made for a base."""
    path = Path(folder) / "adapter_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rank, targets = int(found["r"]), found["target_modules"]
        narrowed = {field: found[field] for field in _NARROWING if found.get(field)}
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(
            f"adapter '{folder}': its adapter_config.json cannot be read; expected a PEFT LoRA folder"
        ) from None
    return adapter_parameters(base, rank=rank, target_modules=targets, narrowed=narrowed)


def _config(source: str) -> Any:
    if Path(source).suffix == ".gguf":
        raise ModelError(
            f"model '{source}': a plan reads a config.json; name the Hugging Face folder of the same model instead of its GGUF file"
        )
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise ModelError(f"model folder '{source}' has no config.json, all that a plan needs of it")
    try:
        with _quiet():
            found = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        if asks_for_own_code(error, source):
            raise ModelError(f"model '{source}' {OWN_CODE}") from None
        where = "" if Path(source).exists() else ", there is no such folder here"
        raise ModelError(
            f"model '{source}' has no config.json that can be read{where}: {one_line(str(error))[:200]}; name a folder with one"
        ) from None
    odd = {"kv_lora_rank": "latent attention", "num_experts": "experts", "num_local_experts": "experts"}
    kinds = set(getattr(found, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    what = [said for key, said in odd.items() if getattr(found, key, None)] + sorted(kinds)
    if what:
        raise ModelError(
            f"model '{source}' has {what[0]}, and a plan counts dense decoders with a cache for each key head; plan it by hand"
        )
    return found


def _empty(source: str) -> Any:
    """The model without memory."""
    try:
        with torch.device("meta"), _quiet():
            return AutoModelForCausalLM.from_config(_config(source), trust_remote_code=False)
    except (ValueError, TypeError, AttributeError) as error:
        if asks_for_own_code(error, source):
            raise ModelError(f"model '{source}' {OWN_CODE}") from None
        raise ModelError(f"model '{source}' is no causal language model: {one_line(str(error))[:200]}") from None


def _blocks(model: Any) -> list[torch.nn.Module]:
    """The layers, as `opd.distributed.rank` finds them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ModelError(f"{type(model).__name__} does not name its layers, so they cannot be spread over ranks")
    return found


def _linear(block: torch.nn.Module) -> int:
    return sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers and peft say along the way."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
