"""Checks that a model's files hold its weights: transformers fills missing weights with random numbers and goes on."""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.utils.loading_report import update_key_name

from opd.errors import ModelError

_SHOWN = 4  # patterns of a report
_LOOKED_AT = 64  # names of a file from which a renaming is guessed


def require_whole(folder: Path, source: str) -> None:
    """Raise ModelError where a folder's index names files that are not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        files = set()
    if not files:
        raise ModelError(f"model '{source}': '{index.name}' has no weight_map; copy the file again")
    absent = sorted(file for file in files if not (folder / file).is_file())
    if absent:
        raise ModelError(
            f"model '{source}': '{index.name}' names {len(files)} files, {len(absent)} of them are missing, first '{absent[0]}'; "
            "copy them into the folder"
        )


def require_floats(files: Iterable[Path], who: str) -> None:
    """Raise ModelError where files that say nothing of quantisation hold a weight in whole numbers: it would be read as it is."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # a file is no mapping
                kind = str(file.get_slice(name).get_dtype())
                if name.endswith((".weight", ".bias")) and kind.startswith(("I", "U", "BOOL")):
                    raise ModelError(
                        f"{who}: weight '{name}' holds whole numbers ({kind}) in '{path.name}', and no quantization_config says "
                        "what they stand for; take the files of the model before it was quantised"
                    )


def require_loaded(model: Any, info: Mapping[str, Any], source: str) -> list[str]:
    """Raise ModelError where weights of a model are not those of its files; returns lines about files with more than the model.

    info: what `from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True)` gives beside the model: tied weights,
    buffers that are computed, and names that the architecture allows to be missing are already left out.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    name, report = type(model).__name__, _report(info)
    if info["mismatched_keys"]:
        first, here, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"model '{source}': the shapes of {len(info['mismatched_keys'])} weights differ from those of {name}, for example "
            f"'{first}': {list(here)} in the files, {list(wanted)} according to config.json; use the config.json that belongs to "
            f"these weights ({report})"
        )
    if missing:
        own = dict(model.named_parameters(remove_duplicate=False))
        raise ModelError(
            f"model '{source}': {len(missing)} of the {len(own)} weights of {name} are missing in its files and would be random, "
            f"first '{missing[0]}'{_common(missing)}; {_cause(missing, unexpected, own, model)} ({report})"
        )
    inside = [key for key in unexpected if _is_inside(model, key)]
    if inside:
        raise ModelError(
            f"model '{source}': {len(inside)} weights in its files have no place inside {name}, first '{inside[0]}'"
            f"{_common(inside)}: the files are of another architecture or size than config.json says; use the config.json of these "
            f"weights ({report})"
        )
    if unexpected:
        return [
            f"model '{source}': {len(unexpected)} weights in its files are not part of {name} and are left out ({report})"
        ]
    return []


def difference_of_names(found: Collection[str], wanted: Collection[str]) -> str:
    """The rule by which names in a file differ from the wanted names, and what to do; "" where no rule explains most of them."""
    inner = _extra_part(found, wanted)
    if inner is not None:
        return f"its names hold '{inner}.', which those of the model do not: rewrite the file without it"
    renaming = _renaming(found, wanted)
    if renaming is None:
        return ""
    old, new = renaming
    if not old:
        return f"its names lack '{new}' at the front: rewrite the file with it"
    if not new:
        return f"its names begin with '{old}', which those of the model do not: rewrite the file without it"
    return f"its names begin with '{old}' where those of the model begin with '{new}': rewrite the file with these"


def _cause(missing: Sequence[str], unexpected: Sequence[str], own: Mapping[str, Any], model: Any) -> str:
    renamed = difference_of_names(unexpected, missing)
    if renamed:
        return renamed
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    if head is not None and not tied and all(own.get(key) is head.weight for key in missing):
        return (
            "the files have no output head: write tie_word_embeddings = true into config.json if the embeddings are the head, else "
            "take the files of the whole model"
        )
    return "the files are incomplete, or of another architecture than config.json says; copy them again"


def _is_inside(model: nn.Module, key: str) -> bool:
    """Whether the model lacks a weight that belongs inside it (a bias, one layer more), and not to a part beside it, such as a
    vision tower or a value head."""
    parts, module, path = key.split("."), model, list[str]()
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    layered = False
    for part in parts:
        child = dict(module.named_children()).get(part)
        if child is None:
            break
        module, path = child, [*path, part]
        layered = layered or type(module).__name__ in blocks
    if isinstance(module, nn.ModuleList):
        return not _is_further_head(model, parts[len(path)])
    holds = any(True for _ in module.parameters(recurse=False))
    beside = bool(path) and len(parts) - len(path) <= 2  # a norm of the backbone's own
    return layered or holds or beside


def _is_further_head(model: Any, index: str) -> bool:
    """Whether that layer predicts tokens further ahead, which only speeds up a server."""
    config = model.config.get_text_config()
    first, further = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    return index.isdigit() and first <= int(index) < first + further


def _common(names: Sequence[str]) -> str:
    """The common beginning of several names, as a remark."""
    first, last = min(names).split("."), max(names).split(".")  # sorted names share what the first and the last share
    shared = list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    prefix = ".".join(part for part, _ in shared)
    return f" (all of them begin with '{prefix}.')" if prefix and len(names) > 1 else ""


def _report(info: Mapping[str, Any]) -> str:
    """transformers' own load report, in one line."""
    said = []
    for status, key in (
        ("MISSING", "missing_keys"),
        ("UNEXPECTED", "unexpected_keys"),
        ("MISMATCH", "mismatched_keys"),
    ):
        names = [k if isinstance(k, str) else k[0] for k in info[key]]
        if names:
            merged = list(update_key_name(dict.fromkeys(sorted(names))))
            more = f" and {len(merged) - _SHOWN} more" if len(merged) > _SHOWN else ""
            said.append(f"{status} {', '.join(merged[:_SHOWN])}{more}")
    return f"transformers' load report: {'; '.join(said)}"


def _extra_part(found: Collection[str], wanted: Collection[str]) -> str | None:
    """A part between two points that stands inside most of the names found, and not in those wanted."""
    parts = Counter(p for name in sorted(found)[:_LOOKED_AT] for p in set(name.split(".")[1:]) if not p.isdigit())
    for part, _ in parts.most_common(8):
        without = {name.replace(f".{part}.", ".", 1) for name in found if f".{part}." in name}
        if 2 * len(without & set(wanted)) > len(wanted):
            return part
    return None


def _renaming(found: Collection[str], wanted: Collection[str]) -> tuple[str, str] | None:
    """(old, new) beginnings that make most of the wanted names of those found."""
    ends: dict[str, str | None] = {}
    for name in wanted:
        for cut in _cuts(name):
            ends[name[cut:]] = None if name[cut:] in ends else name[:cut]
    votes: Counter[tuple[str, str]] = Counter()
    for name in sorted(found)[:_LOOKED_AT]:
        for cut in _cuts(name):
            new = ends.get(name[cut:])
            if new is not None:
                votes[name[:cut], new] += 1
                break
    for (old, new), _ in votes.most_common(4):
        made = {new + name.removeprefix(old) for name in found if name.startswith(old)}
        if 2 * len(made & set(wanted)) > len(wanted):
            return old, new
    return None


def _cuts(name: str) -> list[int]:
    """Where a name's parts begin."""
    return [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
