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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.config import ComputeConfig, LoraConfig
from opd.models.adapters import (
    MERGE,
    adapter_config,
    adapter_names,
    lora_layers,
    require_inner_layers,
    require_same_adapter,
)
from opd.models.architecture import require_packable_config
from opd.models.linear import fuse_adapters
from opd.models.network import Network
from opd.models.weights import difference_of_names, require_floats, require_loaded, require_whole
from opd.errors import ModelError

ADAPTER_FACTS = "opd.json"
# what transformers and its loaders raise for files and settings that do not fit one another
_LOADERS_SAY = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, ImportError, AttributeError, AssertionError, ArithmeticError,
    SafetensorError,
)  # fmt: skip
OWN_CODE = (
    "needs code of its own (auto_map in config.json or tokenizer_config.json), which opd never runs; use a model that transformers "
    "itself has a class for, or a newer transformers that has one"
)


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
    require_whole(path, source)
    where = str(path)
    device = resolve_device(compute.device)
    with _one_line(source), quiet():
        facts = AutoConfig.from_pretrained(where, trust_remote_code=False)
    require_packable_config(facts, source=source)
    with _one_line(source), quiet():
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        # every architecture has this attention; `Network` replaces it
        model, notes = _read_model(
            where, source, dtype=getattr(torch, compute.dtype), attn_implementation="eager", use_safetensors=True
        )
    notes += _own_code(model, tokenizer, source)
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        raise ModelError(
            f"model '{source}': its tokenizer has neither an end token nor a chat template, so no response could end"
        )
    model.to(device).eval().requires_grad_(False)
    return Network(model, tokenizer, source, notes=notes)


def _read_model(where: str, source: str, **options: Any) -> tuple[Any, list[str]]:
    """A model with every weight from its files, and lines about what of these is left out."""
    found: Any = AutoModelForCausalLM.from_pretrained(
        where, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, info = found
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"model '{source}' holds an adapter beside its weights (adapter_config.json), which transformers adds to them; "
            "name the adapter by itself (teachers.NAME.adapter, lora.start), or move it out of the folder"
        )
    notes = require_loaded(model, info, source)
    if getattr(model.config, "quantization_config", None) is None:
        require_floats(sorted(Path(where).glob("model*.safetensors")), f"model '{source}'")
    return model, notes


def _own_code(model: Any, tokenizer: Any, source: str) -> list[str]:
    """A line where a model or a tokenizer comes with code of its own, which is not run."""
    config = getattr(model.config, "auto_map", None) or {}
    said = {"config.json": (config.get("AutoModelForCausalLM"), model)}
    said["tokenizer_config.json"] = (getattr(tokenizer, "init_kwargs", {}).get("auto_map"), tokenizer)
    return [
        f"model '{source}': its {file} names code of its own ({code}), which opd never runs; {type(part).__name__} of transformers "
        "takes its place"
        for file, (code, part) in said.items()
        if code
    ]


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
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **file)
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        raise ModelError(
            f"model '{source}': its tokenizer has neither an end token nor a chat template, so no response could end"
        )
    return LoadedTokenizer(tokenizer, None if file else _generation_config(source))


def _generation_config(source: str) -> GenerationConfig | None:
    """What says how the model generates, as loading the model would find it; None where nothing does."""
    with quiet():
        with contextlib.suppress(OSError, ValueError):
            return GenerationConfig.from_pretrained(source, trust_remote_code=False)
        with contextlib.suppress(OSError, ValueError):
            return GenerationConfig.from_model_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    return None


def gguf_folder(path: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once and kept in the cache (OPD_CACHE, ~/.cache/opd)."""
    if not path.is_file():
        raise ModelError(f"GGUF file '{path}' does not exist")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    cache = Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")
    folder = (
        cache / f"{path.stem}-{digest}-whole"
    )  # those without that name were made before missing weights were refused
    if not folder.is_dir():
        convert_gguf(path, folder)
    return folder


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF model as a float32 safetensors folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:  # a kill leaves the staging folder behind, never half of `folder`
        with _one_line(str(path)), quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
            model, _ = _read_model(str(path.parent), str(path), gguf_file=path.name, dtype=torch.float32)
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
        _start_from(network, config.start)


def _start_from(network: Network, folder: str) -> None:
    """Give the student's adapter the weights of another one; raises ModelError where that one computes something else, or has
    another base."""
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
    """Load an adapter with PEFT itself, beside the others. Raises ModelError where PEFT would leave some of it out, or change what
    the base computes."""
    config, names = adapter_config(folder, who), adapter_names(folder, who)
    require_inner_layers(network, names, config, who)
    before = network.fingerprint()
    facts = _adapter_facts(Path(folder))
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
        raise ModelError(f"{who} does not fit the base '{network.source}': {_first_line(error)}") from None
    with quiet():
        wanted = set(get_peft_model_state_dict(network.model, adapter_name=name, save_embedding_layers=False))
    if wanted != names:
        raise ModelError(f"{who} does not fit the base '{network.source}': {_other_names(names, wanted)}")
    if network.fingerprint() != before:
        raise ModelError(f"{who} changes the weights of its base when it is loaded; {MERGE}")
    return config


def _other_names(found: set[str], wanted: set[str]) -> str:
    """Why an adapter's weights are not those of its layers on this base: PEFT leaves out what has no counterpart."""
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    said = []
    if missing:
        said.append(f"{len(missing)} of its {len(wanted)} weights are missing in its file, first '{missing[0]}'")
    if extra:
        said.append(f"{len(extra)} weights in its file belong to no layer of it, first '{extra[0]}'")
    cause = difference_of_names(extra, missing) or "it was made for another base, or the file is not of this adapter"
    return f"{' and '.join(said)}; {cause}"


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
    except ModelError:
        raise
    except _LOADERS_SAY as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the machine's own (disk full, no permission), not the model's
        if asks_for_own_code(error, source):
            raise ModelError(f"model '{source}' {OWN_CODE}") from None
        # what is no folder is asked of the hub
        where = "" if Path(source).exists() else "there is no such folder here, and as a model of the hub: "
        damaged = (
            "; a file of weights is cut short or damaged: copy it again" if isinstance(error, SafetensorError) else ""
        )
        raise ModelError(f"model '{source}' cannot be loaded: {where}{_first_line(error)}{damaged}") from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # so tokenizers says that a file is damaged
        raise ModelError(f"model '{source}': its tokenizer cannot be loaded: {_first_line(error)}") from None


def asks_for_own_code(error: Exception, source: str) -> bool:
    """Whether a loader refuses a model because its own code would have to be run."""
    said = str(error)
    if "trust_remote_code" in said or "recognize" not in said.lower():
        return "trust_remote_code" in said
    try:
        return "auto_map" in json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


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
            warnings.simplefilter("ignore", UserWarning)  # of missing keys, which `_load_adapter` refuses
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
