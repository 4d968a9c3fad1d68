"""Writing models: a student's adapter, its whole weights, and a base with an adapter merged into it."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from opd.config import ComputeConfig
from opd.errors import ModelError
from opd.models.architecture import is_text_only
from opd.models.loading import load_network, quiet
from opd.models.lora import ADAPTER_FACTS, add_adapter
from opd.models.network import Network
from opd.models.quantized import quantised_by

# of a model that also reads images: what transformers and vLLM look for beside its weights and its tokenizer
_PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def export(
    network: Network,
    adapter: str | None,
    folder: Path,
    *,
    dtype: str = "float32",
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: bool = True,
) -> None:
    """Write a student into a folder, whole or not at all: a PEFT adapter, or (None) the whole model.

    weights: the trained weights by name, when the model itself holds only a part of them. tokenizer: whether the tokenizer and its
    chat template are written too.
    """
    kind = getattr(torch, dtype)
    with _whole_folder(folder) as staging:
        if adapter is None:
            kept = None if weights is None else {name: w.to(kind) for name, w in weights.items()}
            if weights is None:
                _convert(network.base, kind)
            with quiet():
                network.base.save_pretrained(staging, state_dict=kept)
        else:
            _write_adapter(network, adapter, staging, kind, weights)
        if tokenizer:
            network.tokenizer.save_pretrained(staging)
        if adapter is None:
            _write_processor(network, staging)


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a model in place. `model.to` would do that to complex buffers as well, and halve them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _write_processor(network: Network, folder: Path) -> None:
    """Copy the files by which a model's images are read, where it reads any."""
    if is_text_only(network.base.config):
        return
    for name in _PROCESSOR:
        with quiet():
            found = cached_file(
                network.source,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
        if found is not None:
            shutil.copyfile(found, folder / name)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its place at the end: whole, or not at all."""
    folder = folder.resolve()  # "." has no name
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors writes files for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_adapter(
    network: Network, adapter: str, folder: Path, dtype: torch.dtype, weights: Mapping[str, Tensor] | None
) -> None:
    """Write a standard PEFT adapter, and beside it on which base it was made: a wrong base is refused, not trained on."""
    assert isinstance(network.model, PeftModel)
    network.model.save_pretrained(
        str(folder),
        selected_adapters=[adapter],
        save_embedding_layers=False,
        state_dict=None if weights is None else dict(weights),
    )
    # peft puts an adapter of this name into a folder of this name
    for file in (folder / adapter).iterdir():
        file.rename(folder / file.name)
    (folder / adapter).rmdir()
    (folder / "README.md").unlink(missing_ok=True)  # an empty template of a model card
    # peft keeps lists as sets, whose order changes from process to process
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in said.items()}
    facts = {"base": network.source, "base_fingerprint": network.fingerprint()}
    for name, plain in (("adapter_config.json", ordered), (ADAPTER_FACTS, facts)):
        (folder / name).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.to(dtype).contiguous() for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def export_files(network: Network, adapter: str | None, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The contents of the files that `export` writes, by name."""
    with tempfile.TemporaryDirectory(prefix="opd-export-") as place:
        export(network, adapter, Path(place) / "student", weights=weights, tokenizer=False)
        return {file.name: file.read_bytes() for file in sorted((Path(place) / "student").iterdir())}


def require_mergeable(network: Network) -> None:
    """Raise ModelError for a quantised base: whole weights with the adapter would be another model than the trained one."""
    method = network.quantization or quantised_by(network.base)
    if method is not None:
        raise ModelError(
            f"model '{network.source}' is quantised ({method}), and opd makes no merged weights of a quantised base: the adapter "
            "was trained on its rounded weights; use the adapter (the run's student/ folder) on the base with the same quantisation"
        )


def write_merged(base: str, adapter: Path | None, folder: Path, *, dtype: str, whose: str) -> None:
    """Write a base, with an adapter merged into its weights if there is one, and its tokenizer. whose: in errors, a teacher's name.

    dtype: that in which it will be computed; adding to weights of less precision would round the adapter away. Raises ModelError
    where the two do not fit.
    """
    network = load_network(base, ComputeConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]  # one of its two
    model: Any = network.model
    if adapter is not None:
        require_mergeable(network)
        add_adapter(network, str(adapter), teacher=whose, name="merged")
        assert isinstance(network.model, PeftModel)
        model = network.model.merge_and_unload()
    with _whole_folder(folder) as staging:
        with quiet():
            model.save_pretrained(staging)
        network.tokenizer.save_pretrained(staging)
        _write_processor(network, staging)
