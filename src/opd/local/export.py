"""Writing a student: a standard PEFT adapter, or a whole Hugging Face folder."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.config import ComputeConfig
from opd.local.teacher import Policy
from opd.models.loading import add_adapter, load_network, quiet, save_adapter_facts


def export(
    policy: Policy,
    folder: Path,
    *,
    dtype: str = "float32",
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: bool = True,
) -> None:
    """Write the student as a standard PEFT adapter, or as a whole Hugging Face folder; its tokenizer and chat template beside it.

    weights: the trained weights by name, when the model itself holds only a part of them. tokenizer: whether it is written too.
    """
    network = policy.network
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if policy.adapter is None:
            kept = None if weights is None else {name: w.to(getattr(torch, dtype)) for name, w in weights.items()}
            model = network.base if weights is not None else network.base.to(getattr(torch, dtype))  # type: ignore[call-arg]  # a decorator hides its signature
            with quiet():
                model.save_pretrained(staging, state_dict=kept)
        else:
            assert isinstance(network.model, PeftModel)
            # peft puts an adapter of this name into a folder of this name
            network.model.save_pretrained(
                str(staging),
                selected_adapters=[policy.adapter],
                save_embedding_layers=False,
                state_dict=None if weights is None else dict(weights),
            )
            for file in (staging / policy.adapter).iterdir():
                file.rename(staging / file.name)
            (staging / policy.adapter).rmdir()
            (staging / "README.md").unlink(missing_ok=True)  # an empty template of a model card
            _sort_lists(staging / "adapter_config.json")
            save_adapter_facts(staging, network)
        if tokenizer:
            network.tokenizer.save_pretrained(staging)
        _cast(staging, getattr(torch, dtype))
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes files for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def export_files(policy: Policy, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The same as the contents of the folder's files."""
    with tempfile.TemporaryDirectory(prefix="opd-export-") as place:
        export(policy, Path(place) / "student", weights=weights, tokenizer=False)
        return {file.name: file.read_bytes() for file in sorted((Path(place) / "student").iterdir())}


def write_merged(base: str, adapter: Path | None, folder: Path, *, dtype: str, whose: str) -> None:
    """Write a base, with an adapter merged into its weights if there is one, and its tokenizer. whose: in errors, a teacher's name.

    dtype: that in which it will be computed; adding to weights of less precision would round the adapter away. Raises ModelError
    where the two do not fit.
    """
    network = load_network(base, ComputeConfig(device="cpu", dtype=dtype))  # type: ignore[arg-type]  # one of its two
    model: Any = network.model
    if adapter is not None:
        add_adapter(network, str(adapter), teacher=whose, name="merged")
        assert isinstance(network.model, PeftModel)
        model = network.model.merge_and_unload()
    with quiet():
        model.save_pretrained(folder)
    network.tokenizer.save_pretrained(folder)


def _sort_lists(path: Path) -> None:
    """Write a JSON file's lists in order: peft keeps them as sets, whose order changes from process to process."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in plain.items()}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def _cast(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "adapter_model.safetensors"
    if path.exists():
        tensors: dict[str, Tensor] = {name: t.to(dtype).contiguous() for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
