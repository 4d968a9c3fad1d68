"""LoRA adapters: reading a folder, checking what it computes, and attaching it to a network.

PEFT's own layers compute an adapter of every kind that passes the checks, or products that give the same (`opd.models.linear`).
opd refuses an adapter that acts outside the linear layers, by the name of its field: rows of the embeddings, whole copies of
modules and changed base weights would also act on the student and the other teachers on the same base, or on none of them.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from opd.config import LoraConfig
from opd.errors import ModelError, one_line
from opd.models.architecture import backbone, is_text_only
from opd.models.linear import fuse_adapters
from opd.models.loading import first_line, quiet
from opd.models.network import Network
from opd.models.weights import difference_of_names, require_floats

ADAPTER_FACTS = "opd.json"
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

    Raises ModelError where the folder holds no LoRA adapter, and for a field that opd does not support.
    """
    path = Path(folder)
    if not (path / "adapter_config.json").exists():
        raise ModelError(f"{who} has no adapter_config.json; expected a PEFT LoRA folder")
    if not (path / "adapter_model.safetensors").exists():
        raise ModelError(f"{who} has no adapter_model.safetensors; pickles are not loaded")
    said = _json_object(path / "adapter_config.json", f"{who}: its adapter_config.json")
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
    """Raise ModelError where adapter `theirs`, as PEFT has loaded it, would compute something else than `ours` with the same
    weights: on other layers, with another rank or scale, or not W x + scale B A x."""
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
    plain = sorted(value) if isinstance(value, set) else value
    text = json.dumps(plain, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def add_student_adapter(network: Network, config: LoraConfig, *, seed: int) -> None:
    """Put a trainable adapter named "student" on a network; it starts as the identity, or as `config.start`."""
    torch.manual_seed(seed)
    left_out = _not_adapted(network.base) if config.target_modules == "all-linear" else []
    if left_out:
        network.notes.append(
            f"model '{network.source}': lora.target_modules = 'all-linear' leaves out {', '.join(left_out)}"
        )
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        exclude_modules="|".join([*(rf"(.*\.)?{name}" for name in left_out), *_beside_text(network.base)]) or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet():
            network.model = get_peft_model(network.base, peft_config, adapter_name="student")
    except ValueError as error:
        raise ModelError(f"model '{network.source}': lora.target_modules does not fit: {first_line(error)}") from None
    fuse_adapters(network.base)
    network.head_weight()  # refuses an adapter on the head: the exact objective reads the head as it is
    if config.start is not None:
        _start_from(network, config.start)


def _beside_text(model: PreTrainedModel) -> list[str]:
    """A pattern of the modules that read no text, where a model has such."""
    if is_text_only(model.config):
        return []
    [name] = [name for name, module in model.named_modules() if module is backbone(model)]
    return [rf"(?!{re.escape(name)}\.).*"]


def _not_adapted(model: nn.Module) -> list[str]:
    """Linear layers that an adapter would be wrong for, by the ends of their names.

    Routers return more than their product. Fused kernels read the weight of a Mamba mixer's last layer without calling the layer,
    so an adapter there would do nothing (PEFT refuses it).
    """
    found = []
    for name, module in model.named_modules():
        own, above = name.rpartition(".")[2], name.rpartition(".")[0].rpartition(".")[2]
        if isinstance(module, nn.Linear) and "Router" in type(module).__name__:
            found.append(own)
        if (
            isinstance(getattr(module, "out_proj", None), nn.Linear)
            and hasattr(module, "A_log")
            and hasattr(module, "D")
        ):
            found.append(f"{own}.out_proj" if above else "out_proj")
    return sorted(set(found))


def _start_from(network: Network, folder: str) -> None:
    """Copy the weights of an adapter into the student's. Raises ModelError where it computes something else, or has another
    base."""
    who = f"adapter '{folder}' (lora.start)"
    config = _load_adapter(network, folder, who, name="start", otherwise="start without it")
    require_same_adapter(network, "student", "start", who, config)
    assert isinstance(network.model, PeftModel)
    with torch.no_grad():
        for _, layer in lora_layers(network.base):
            for factor in (layer.lora_A, layer.lora_B):
                factor["student"].weight.copy_(factor["start"].weight)
    network.model.delete_adapter("start")


def add_adapter(network: Network, folder: str, *, teacher: str, name: str) -> None:
    """Load `teacher`'s frozen adapter beside the others, under a `name` of ours.

    Raises ModelError when it is missing, was made for another base, or is of a kind that opd does not compute.
    """
    who = f"adapter '{folder}' (teacher '{teacher}')"
    otherwise = f"load the teacher as a whole model (teachers.{teacher}.model)"
    _load_adapter(network, folder, who, name=name, otherwise=otherwise)
    fuse_adapters(network.base)
    network.base.requires_grad_(False)


def _load_adapter(network: Network, folder: str, who: str, *, name: str, otherwise: str) -> PeftLoraConfig:
    """Load an adapter with PEFT, beside the others. Raises ModelError where PEFT would leave weights out, or change the base."""
    config, names = adapter_config(folder, who), adapter_names(folder, who)
    require_inner_layers(network, names, config, who)
    before = network.fingerprint()
    path = Path(folder) / ADAPTER_FACTS
    facts = _json_object(path, f"'{path}'") if path.exists() else {}
    if facts and facts.get("base_fingerprint") != before:
        raise ModelError(
            f"{who} was made on another base ('{facts.get('base')}', fingerprint {facts.get('base_fingerprint')}) than "
            f"'{network.source}' ({before}); use that base, or {otherwise}"
        )
    try:
        with quiet():
            if isinstance(network.model, PeftModel):
                network.model.load_adapter(folder, adapter_name=name, is_trainable=False)
            else:
                network.model = PeftModel.from_pretrained(
                    network.base, folder, adapter_name=name, is_trainable=False, trust_remote_code=False
                )
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{who} does not fit the base '{network.source}': {first_line(error)}") from None
    with quiet():
        wanted = set(get_peft_model_state_dict(network.model, adapter_name=name, save_embedding_layers=False))
    if wanted != names:
        raise ModelError(f"{who} does not fit the base '{network.source}': {_other_names(names, wanted)}")
    if network.fingerprint() != before:
        raise ModelError(f"{who} changes the weights of its base when it is loaded; {MERGE}")
    return config


def _other_names(found: set[str], wanted: set[str]) -> str:
    """How an adapter's file differs from its layers on this base: PEFT ignores weights without a layer."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    said = []
    if missing:
        said.append(f"{len(missing)} of its {len(wanted)} weights are missing in its file, first '{missing[0]}'")
    if extra:
        said.append(f"{len(extra)} weights in its file belong to no layer of it, first '{extra[0]}'")
    cause = difference_of_names(extra, missing) or "it was made for another base, or the file is not of this adapter"
    return f"{' and '.join(said)}; {cause}"


def _json_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; what: names the file in errors. Raises ModelError where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{what} is not valid JSON: {one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{what} must hold a JSON object, got {type(found).__name__}")
    return found
