"""Loading models, tokenizers and adapters from a hub id, a folder or a GGUF file."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.config import ComputeConfig, LoraConfig
from opd.embedded.architecture import require_packable_config
from opd.embedded.linear import fuse_adapters
from opd.embedded.network import Network
from opd.errors import ModelError

ADAPTER_FACTS = "opd.json"


def resolve_device(name: str) -> torch.device:
    """The torch device of `compute.device`; "auto" takes a CUDA device where there is one."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"compute.device = '{name}' cannot be used: {_first_line(error)}") from None
    # Other accelerators may lack the float64 that sampling sums in; they can be asked for by name.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_network(source: str, compute: ComputeConfig) -> Network:
    """A model and its tokenizer. Raises ModelError with one line when either cannot be loaded."""
    path = Path(source)
    if path.suffix == ".gguf":
        path = gguf_folder(path)
    else:
        _require_a_place(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise ModelError(f"model folder '{source}' has no config.json; expected a Hugging Face model folder")
    where = str(path)
    device = resolve_device(compute.device)
    with _one_line(source), quiet():
        facts = AutoConfig.from_pretrained(where, trust_remote_code=False)
    require_packable_config(facts, source=source)
    with _one_line(source), quiet():
        tokenizer = AutoTokenizer.from_pretrained(where)
        # every architecture has this attention; `Network` replaces it
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, dtype=getattr(torch, compute.dtype), attn_implementation="eager", use_safetensors=True
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model '{source}': its tokenizer has no end token, so no response could end")
    model.to(device).eval().requires_grad_(False)
    return Network(model, tokenizer, source)


def _require_a_place(source: str) -> None:
    """Raise ModelError for what is written as a path and is no folder."""
    path = Path(source)
    written = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.exists()
    if path.suffix != ".gguf" and not path.is_dir() and written:
        raise ModelError(f"model '{source}' is neither a folder, a .gguf file, nor a hub id (owner/name)")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer without its model's weights, and the generation config beside it, if there is one."""

    tokenizer: Any
    generation_config: Any


def load_tokenizer(source: str) -> LoadedTokenizer:
    """The tokenizer of a hub id, a folder (weights are not needed) or a GGUF file. Raises ModelError with one line."""
    path = Path(source)
    _require_a_place(source)
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    where = str(path.parent) if file else source
    with _one_line(source), quiet():
        tokenizer = AutoTokenizer.from_pretrained(where, **file)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model '{source}': its tokenizer has no end token, so no response could end")
    return LoadedTokenizer(tokenizer, None if file else _generation_config(source))


def _generation_config(source: str) -> GenerationConfig | None:
    """What says how the model generates, as loading the model would find it; None where nothing does."""
    with quiet():
        with contextlib.suppress(OSError, ValueError):
            return GenerationConfig.from_pretrained(source)
        with contextlib.suppress(OSError, ValueError):
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(source))
    return None


def gguf_folder(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once and kept in the cache (OPD_CACHE, ~/.cache/opd)."""
    if not path.is_file():
        raise ModelError(f"GGUF file '{path}' does not exist")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")
    folder = cache / f"{path.stem}-{digest}"
    if not folder.is_dir():
        convert_gguf(path, folder)
    return folder


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF model as a float32 safetensors folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:  # a kill leaves the staging folder behind, never half of `folder`
        with _one_line(str(path)), quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=torch.float32
            )
            # What was read is no longer quantised: without this, saving would ask for a GGUF writer.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes files for their owner alone
        staging.chmod(0o755)
        staging.rename(folder)
    except SafetensorError as error:
        raise OSError(f"cannot write '{folder}': {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def add_student_adapter(network: Network, config: LoraConfig, *, seed: int) -> None:
    """Put a trainable adapter named "student" on a network; it starts as the identity, or as `config.start`."""
    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet():
            network.model = get_peft_model(network.base, peft_config, adapter_name="student")
    except ValueError as error:
        raise ModelError(f"model '{network.source}': lora.target_modules does not fit: {_first_line(error)}") from None
    fuse_adapters(network.base)
    network.head_weight()  # refuses an adapter on the head: the exact objective reads the head as it is
    if config.start is not None:
        _start_from(network, config, config.start)


def _start_from(network: Network, config: LoraConfig, folder: str) -> None:
    """Give the student's adapter the weights of another one; raises ModelError where that one has another shape or base."""
    who = f"adapter '{folder}' (lora.start)"
    _require_adapter(network, folder, who, otherwise="start without it")
    described = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    for key, name, wanted in (("r", "rank", config.rank), ("lora_alpha", "alpha", config.alpha)):
        if described.get(key) != wanted:
            raise ModelError(f"{who} has {name} {described.get(key)}, lora.{name} is {wanted}; write that one")
    try:
        weights = load_file(Path(folder) / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ModelError(f"{who} cannot be read: {_first_line(error)}") from None
    own = get_peft_model_state_dict(network.model, adapter_name="student", save_embedding_layers=False)
    odd = sorted(set(own) ^ set(weights)) or sorted(n for n, w in weights.items() if own[n].shape != w.shape)
    if odd:
        raise ModelError(
            f"{who} has other weights than the student's adapter: {len(odd)} without a counterpart of their shape, first {odd[0]}; "
            "set lora.target_modules as it was made"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def add_adapter(network: Network, folder: str, *, teacher: str, name: str) -> None:
    """Load `teacher`'s frozen adapter beside the others, under a `name` of ours.

    Raises ModelError when it is missing or was made for another base.
    """
    who = f"adapter '{folder}' (teacher '{teacher}')"
    _require_adapter(network, folder, who, otherwise=f"load the teacher as a whole model (teachers.{teacher}.model)")
    try:
        with quiet():
            if isinstance(network.model, PeftModel):
                network.model.load_adapter(folder, adapter_name=name, is_trainable=False)
            else:
                network.model = PeftModel.from_pretrained(network.base, folder, adapter_name=name, is_trainable=False)
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"{who} does not fit the base '{network.source}': {_first_line(error)}") from None
    wanted = set(get_peft_model_state_dict(network.model, adapter_name=name, save_embedding_layers=False))
    odd = sorted(wanted ^ set(load_file(Path(folder) / "adapter_model.safetensors")))
    if odd:
        raise ModelError(
            f"{who} was made for another base than '{network.source}': {len(odd)} of its weights or of the base's layers have no "
            f"counterpart, first {odd[0]}"
        )
    fuse_adapters(network.base)
    network.head_weight()  # refuses an adapter that replaced the head
    network.base.requires_grad_(False)


def require_adapter_folder(folder: str, who: str) -> None:
    """Raise ModelError where a folder is no LoRA adapter."""
    path = Path(folder)
    if not (path / "adapter_config.json").exists():
        raise ModelError(f"{who} has no adapter_config.json; expected a PEFT LoRA folder")
    if not (path / "adapter_model.safetensors").exists():
        raise ModelError(f"{who} has no adapter_model.safetensors; pickles are not loaded")


def _require_adapter(network: Network, folder: str, who: str, *, otherwise: str) -> None:
    """Raise ModelError where a folder is no LoRA adapter, or one of another base."""
    require_adapter_folder(folder, who)
    path = Path(folder)
    facts = _adapter_facts(path)
    if facts and facts.get("base_fingerprint") != network.fingerprint():
        raise ModelError(
            f"{who} was made on another base ('{facts.get('base')}', fingerprint {facts.get('base_fingerprint')}) than "
            f"'{network.source}' ({network.fingerprint()}); use that base, or {otherwise}"
        )


def save_adapter_facts(folder: Path, network: Network) -> None:
    """Write beside an adapter on which base it was made, so that a wrong base is refused instead of trained on."""
    facts = {"base": network.source, "base_fingerprint": network.fingerprint()}
    (folder / ADAPTER_FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _adapter_facts(folder: Path) -> dict[str, Any] | None:
    path = folder / ADAPTER_FACTS
    if not path.exists():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"'{path}' is not valid JSON: {error}") from None
    if not isinstance(facts, dict):
        raise ModelError(f"'{path}' must hold a JSON object, got {type(facts).__name__}")
    return facts


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn a loader's failure into one line that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's own (disk full, no permission), not the model's
        # what is no folder is asked of the hub
        where = "" if Path(source).exists() else "there is no such folder here, and as a model of the hub: "
        raise ModelError(f"model '{source}' cannot be loaded: {where}{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return lines[1]  # torch heads its list of mismatches with a line that says nothing
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the loaders' own bars and advice; ours name what matters."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
            warnings.simplefilter("ignore", UserWarning)  # of missing keys, which `add_adapter` refuses
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
