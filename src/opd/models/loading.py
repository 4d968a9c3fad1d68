"""Loading models and tokenizers from a hub id, a folder or a GGUF file."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)

from opd.config import ComputeConfig
from opd.errors import ModelError
from opd.models.architecture import is_text_only
from opd.models.network import Network
from opd.models.quantized import loading_options, quantised_by, widen_products
from opd.models.weights import require_floats, require_loaded, require_whole

# raised by transformers and its loaders for files and settings that do not fit one another
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
            raise ModelError(f"compute.device = '{name}' cannot be used: {first_line(error)}") from None
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
    dtype = getattr(torch, compute.dtype)
    options = {} if compute.quantization is None else loading_options(compute.quantization, dtype, device)
    with _one_line(source), quiet():
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        # every architecture has this attention; `Network` replaces it for packed passes
        model, notes = _read_model(
            where, source, dtype=dtype, attn_implementation="eager", use_safetensors=True, **options
        )
    notes += _own_code(model, tokenizer, source)
    _require_an_end(tokenizer, source)
    if quantised_by(model) is None:
        model.to(device)
    else:
        widen_products(model, dtype)
    for parameter in model.parameters():  # the model's own method takes whole weights alone
        parameter.requires_grad_(False)
    network = Network(model.eval(), tokenizer, source, notes=notes)
    network.quantization = compute.quantization
    return network


def _read_model(where: str, source: str, **options: Any) -> tuple[Any, list[str]]:
    """A model with every weight from its files, and notes about weights that are left out."""
    found: Any = _auto_class(where, source, options).from_pretrained(
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


def _auto_class(where: str, source: str, options: Mapping[str, Any]) -> Any:
    """The class that keeps all parts of a model: a model that also reads images is written as it was read."""
    if "gguf_file" in options:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    if "quantization_config" in options and getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"model '{source}' is quantised already (quantization_config in config.json); remove quantization"
        )
    kind = type(config)
    if is_text_only(config) or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    whole: str = cast(Any, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]).__name__
    named = config.architectures or [whole]
    return (
        AutoModelForImageTextToText
        if whole in named or kind not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def _own_code(model: Any, tokenizer: Any, source: str) -> list[str]:
    """A line for a model and a tokenizer that come with code of their own, which is not run."""
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
    """Raise ModelError for a source that is written as a path and is no folder."""
    path = Path(source)
    written = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or path.exists()
    if path.suffix != ".gguf" and not path.is_dir() and written:
        raise ModelError(f"model '{source}' is neither a folder, a .gguf file, nor a hub id (owner/name)")


def _require_an_end(tokenizer: Any, source: str) -> None:
    """Raise ModelError for a tokenizer with which no response could end."""
    if tokenizer.eos_token_id is None and not tokenizer.chat_template:
        raise ModelError(
            f"model '{source}': its tokenizer has neither an end token nor a chat template, so no response could end"
        )


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
    _require_an_end(tokenizer, source)
    return LoadedTokenizer(tokenizer, None if file else _generation_config(source))


def _generation_config(source: str) -> GenerationConfig | None:
    """The generation config that loading the model would find; None where there is none."""
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
    folder = cache / f"{path.stem}-{digest}-whole"  # older folders without that ending may lack weights
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
            # The weights are no longer quantised: without this, saving would ask for a GGUF writer.
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


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turn a loader's failure into one line that names the model."""
    try:
        yield
    except ModelError:
        raise
    except _LOADERS_SAY as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the machine (disk full, no permission), not of the model
        if asks_for_own_code(error, source):
            raise ModelError(f"model '{source}' {OWN_CODE}") from None
        # transformers asks the hub for a source that is no folder
        where = "" if Path(source).exists() else "there is no such folder here, and as a model of the hub: "
        damaged = (
            "; a file of weights is cut short or damaged: copy it again" if isinstance(error, SafetensorError) else ""
        )
        raise ModelError(f"model '{source}' cannot be loaded: {where}{first_line(error)}{damaged}") from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        # tokenizers raises a bare Exception for a damaged file
        raise ModelError(f"model '{source}': its tokenizer cannot be loaded: {first_line(error)}") from None


def asks_for_own_code(error: Exception, source: str) -> bool:
    """Whether a loader refuses a model because its own code would have to be run."""
    said = str(error)
    if "trust_remote_code" in said or "recognize" not in said.lower():
        return "trust_remote_code" in said
    try:
        return "auto_map" in json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return lines[1]  # torch heads its list of mismatches with a line that says nothing
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and advice of the loaders."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
            warnings.simplefilter("ignore", UserWarning)  # of missing keys, which are refused
            warnings.filterwarnings(
                "ignore", message="The following (rank|alpha)_pattern keys"
            )  # which peft adds for experts
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
