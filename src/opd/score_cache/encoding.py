"""A score as bytes and back, to the bit."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from opd.records import ChunkScore, FailedScore, HiddenPart, HiddenScore, SampledScore, Score, TopKScore

_ABOUT = "about"  # the plain values of a score, JSON as bytes


def to_bytes(score: Score) -> bytes:
    """A score of any kind but a failure, which is nothing to keep."""
    assert not isinstance(score, FailedScore)
    arrays: dict[str, np.ndarray] = {"logprobs": score.logprobs}
    about: dict[str, Any] = {"kind": type(score).__name__}
    parts: tuple[HiddenPart, ...] = ()
    if isinstance(score, TopKScore):
        arrays |= {"ids": score.ids, "top_k_logprobs": score.top_k_logprobs}
    elif isinstance(score, HiddenScore):
        parts = score.parts
    elif isinstance(score, ChunkScore):
        arrays["chunks"] = score.chunks
        about |= {"num_bytes": score.num_bytes, "facts": dict(score.facts)}
        if score.compared is not None:
            arrays["compared"] = score.compared
        parts = (score.part,) if score.part is not None else ()
    components = score.components if isinstance(score, SampledScore | HiddenScore) else ()
    about["components"] = [weight for weight, _ in components]
    arrays |= {f"component{i}": logprobs for i, (_, logprobs) in enumerate(components)}
    about["parts"] = [(part.model, part.weight) for part in parts]
    arrays |= {f"hidden{i}": part.hidden for i, part in enumerate(parts)}
    arrays[_ABOUT] = np.frombuffer(json.dumps(about, default=lambda number: number.item()).encode(), dtype=np.uint8)
    # it writes memory as it lies
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def from_bytes(content: bytes, *, teacher: str) -> Score:
    """What `to_bytes` was given, of that teacher."""
    arrays = load(content)
    about: Mapping[str, Any] = json.loads(arrays[_ABOUT].tobytes())
    logprobs, kind = arrays["logprobs"], about["kind"]
    parts = tuple(HiddenPart(model, weight, arrays[f"hidden{i}"]) for i, (model, weight) in enumerate(about["parts"]))
    components = tuple((weight, arrays[f"component{i}"]) for i, weight in enumerate(about["components"]))
    if kind == "SampledScore":
        return SampledScore(teacher, logprobs, components)
    if kind == "TopKScore":
        return TopKScore(teacher, logprobs, arrays["ids"], arrays["top_k_logprobs"])
    if kind == "HiddenScore":
        return HiddenScore(teacher, logprobs, parts, components)
    assert kind == "ChunkScore", kind
    return ChunkScore(
        teacher,
        logprobs,
        arrays["chunks"],
        about["num_bytes"],
        about["facts"],
        arrays.get("compared"),
        parts[0] if parts else None,
    )
