"""Reading an adapter's folder, and whether opd computes what this adapter computes.

An adapter of every kind that passes is computed by PEFT's own layers, or by products that give the same (`opd.models.linear`).
What acts outside the layers (rows of the embeddings, whole copies of modules, changed base weights) would reach the student and
the other teachers on the same base, or reach nobody: it is refused, by the name of its field.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from opd.models.network import Network
from opd.models.weights import require_floats
from opd.errors import ModelError, one_line

MERGE = "merge it into its base (peft: merge_and_unload) and use the merged model"
# Fields of adapter_config.json that are empty in an adapter that opd computes, and what they do otherwise.
_UNSUPPORTED: Mapping[str, str] = {
    "modules_to_save": "keeps whole copies of modules",
    "trainable_token_indices": "changes rows of the embeddings",
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters outside linear layers",
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA)",
    "arrow_config": "mixes other adapters (Arrow)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "pools its input (QALoRA)",
    "kasa_config": "changes the base's weights (KaSA)",
    "monteclora_config": "draws random weights (MonteCLoRA)",
    "velora_config": "compresses activations (VeLoRA)",
    "megatron_config": "is made for Megatron",
}
# of init_lora_weights: those that leave the base's weights as they are
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def adapter_config(folder: str, who: str) -> PeftLoraConfig:
    """The adapter_config.json of a LoRA adapter that opd computes. who: names it in errors.

    Raises ModelError where the folder holds no LoRA adapter, and for a field that makes it compute what opd does not.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").exists():
        raise ModelError(f"{who} has no adapter_config.json; expected a PEFT LoRA folder")
    if not (path / "adapter_model.safetensors").exists():
        raise ModelError(f"{who} has no adapter_model.safetensors; pickles are not loaded")
    try:
        said = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{who}: its adapter_config.json is not valid JSON: {one_line(str(error))}") from None
    if not isinstance(said, dict):
        raise ModelError(f"{who}: its adapter_config.json must hold a JSON object, got {type(said).__name__}")
    if said.get("peft_type") != "LORA":
        raise ModelError(f"{who} is of type {said.get('peft_type')!r}, opd supports 'LORA' only; {MERGE}")
    for field, what in _UNSUPPORTED.items():
        if said.get(field):
            raise ModelError(f"{who} {what} ({field} = {_shown(said[field])}), which opd does not support; {MERGE}")
    if said.get("bias", "none") != "none":
        raise ModelError(
            f"{who} changes the base's biases (bias = '{said['bias']}'), which opd does not support; {MERGE}"
        )
    if said.get("init_lora_weights", True) not in _INITS:
        raise ModelError(
            f"{who} changes the base's weights when it is loaded (init_lora_weights = {_shown(said['init_lora_weights'])}); "
            f"{MERGE}, or convert it to a plain adapter (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    known = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    odd = [field for field in said if field not in known and said[field]]
    if odd:
        raise ModelError(
            f"{who}: peft {peft.__version__} does not know its field {odd[0]} = {_shown(said[odd[0]])}, so opd cannot say what it "
            "computes; install a peft that does, or delete the field if it changes nothing"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how it would be initialised
            return PeftLoraConfig(**{field: value for field, value in said.items() if field in known})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{who}: its adapter_config.json cannot be read: {one_line(str(error))[:200]}") from None


def adapter_names(folder: str, who: str) -> set[str]:
    """The names of the weights in an adapter's file."""
    try:
        path = Path(folder) / "adapter_model.safetensors"
        require_floats([path], who)
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ModelError(f"{who} cannot be read: {one_line(str(error))}") from None


def require_inner_layers(network: Network, names: Iterable[str], config: PeftLoraConfig, who: str) -> None:
    """Raise ModelError for an adapter on the embeddings or the head: objectives read the head as it is, and all share it."""
    base = network.base
    outer = {"embeddings": base.get_input_embeddings(), "output head": base.get_output_embeddings()}
    for kind, module in outer.items():
        called = next((n for n, m in base.named_modules() if m is module), None)
        found = next((n for n in sorted(names) if called is not None and f".{called}." in f".{n}"), None)
        if found is not None:
            raise ModelError(
                f"{who} adapts the {kind} ('{found}'; target_modules = {_shown(config.target_modules)}), which opd does not "
                f"support: train it without '{called}', or {MERGE}"
            )


def require_same_adapter(network: Network, ours: str, theirs: str, who: str, config: PeftLoraConfig) -> None:
    """Raise ModelError where adapter `theirs`, as PEFT has loaded it, cannot be what `ours` computes with the same weights.

    Both are compared layer by layer: which layers they have, the ranks, the scales, and that neither is of another kind than
    W x + scale B A x.
    """
    for name, layer in lora_layers(network.base):
        has = [adapter for adapter in (ours, theirs) if adapter in layer.lora_A]
        if not has:
            continue
        if has != [ours, theirs]:
            where, field = ("only the student", "it has none") if has == [ours] else ("only it", "the student has none")
            raise ModelError(
                f"{who} adapts other layers than lora.target_modules: {where} has an adapter on '{name}'{_narrowed(config)}; set "
                f"lora.target_modules as it was made ({field} there)"
            )
        kind = "use_dora" if config.use_dora else "lora_bias" if config.lora_bias else "init_lora_weights"
        if theirs in layer.lora_variant or layer.lora_bias[theirs]:
            raise ModelError(
                f"{who} is of another kind than the student's adapter ({kind} = {_shown(getattr(config, kind))}); {MERGE}"
            )
        if layer.r[theirs] != layer.r[ours]:
            pattern = f" at '{name}' (rank_pattern)" if config.rank_pattern else ""
            advice = MERGE if config.rank_pattern else "write that one"
            raise ModelError(f"{who} has rank {layer.r[theirs]}{pattern}, lora.rank is {layer.r[ours]}; {advice}")
        if layer.scaling[theirs] != layer.scaling[ours]:
            raise ModelError(f"{who} {_other_scale(layer, name, ours, theirs, config)}")


def _other_scale(layer: Any, name: str, ours: str, theirs: str, config: PeftLoraConfig) -> str:
    """Why an adapter's scale is not the student's, and what to do."""
    alpha, rank, scale = layer.lora_alpha[theirs], layer.r[theirs], layer.scaling[theirs]
    if not config.use_rslora and not config.alpha_pattern:
        advice = "write that one" if alpha == round(alpha) > 0 else MERGE
        return f"has alpha {alpha}, lora.alpha is {layer.lora_alpha[ours]}; {advice}"
    field = "alpha_pattern" if config.alpha_pattern else "use_rslora"
    wanted = round(scale * rank)
    plain = not config.alpha_pattern and wanted / rank == scale and wanted > 0
    return (
        f"scales its update at '{name}' by {scale:.6g} ({field}; alpha {alpha}, rank {rank}), lora.alpha / lora.rank is "
        f"{layer.scaling[ours]:.6g}; {f'write lora.alpha = {wanted}' if plain else MERGE}"
    )


def lora_layers(base: nn.Module) -> Iterable[tuple[str, Any]]:
    """Every layer of a model that adapters sit on, and its name."""
    return [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _narrowed(config: PeftLoraConfig) -> str:
    """The fields by which an adapter leaves layers out, as a remark."""
    fields = ("layers_to_transform", "layers_pattern", "exclude_modules")
    said = [f"{field} = {_shown(value)}" for field in fields if (value := getattr(config, field)) is not None]
    return f" ({', '.join(said)})" if said else ""


def _shown(value: Any) -> str:
    """A field's value, short."""
    plain = sorted(value) if isinstance(value, set) else value
    text = json.dumps(plain, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
