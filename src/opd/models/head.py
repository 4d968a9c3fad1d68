"""What a model does to its logits behind the product of hidden states and output head: a factor, a soft cap."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.models.architecture import backbone, causal_model

_SMALL = 1e-3  # of logits that no soft cap bends
_WITHIN = 1e-3  # of a factor


class HeadShape(NamedTuple):
    """logits = c tanh(scale (hidden rows^T + bias) / c) with the soft cap c; without one, scale (hidden rows^T + bias)."""

    scale: float = 1.0
    softcap: float | None = None


def head_shape(model: PreTrainedModel) -> HeadShape:
    """The shape of a model's head, from the numbers in its config: which of them is the factor, the model itself says.

    Families write the factor in different ways (Granite divides by logits_scaling, HyperCLOVA multiplies by it, MiniCPM divides by
    hidden_size / dim_model_base), so every candidate is compared with logits that the model makes of small states. A shape that
    is none of these stays as it is here, and the check of forward passes refuses the model.
    """
    config = model.config.get_text_config()
    factors = [factor for factor in _factors(config) if factor not in (0.0, 1.0)]
    return HeadShape(_factor(model, factors) if factors else 1.0, _softcap(config))


def _softcap(config: Any) -> float | None:
    """The soft cap of logits that a config names; those of attention, routers and MLPs are others."""
    for key, value in config.to_dict().items():
        if re.search("soft_?cap", key) and not re.search("attn|attention|rout|moe|gate|mlp", key) and value:
            return float(value)
    return None


def _factors(config: Any) -> Iterator[float]:
    """Numbers that a head may multiply by."""
    for key, value in config.to_dict().items():
        if re.search("logits?_scal|lm_head_mult|output_mult", key) and isinstance(value, int | float) and value:
            yield from (float(value), 1.0 / value)
    base = getattr(config, "dim_model_base", None)
    if base:
        yield base / config.hidden_size


def _factor(model: PreTrainedModel, candidates: list[float]) -> float:
    """The candidate by which the model multiplies the product of small states and its head; 1 where none is it."""
    head: Any = model.get_output_embeddings()
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    states = torch.randn(4, head.weight.shape[1], generator=generator).to(head.weight.device, wide)
    with torch.no_grad():
        plain = states @ head.weight.T.to(wide)
        states *= _SMALL / plain.std().clamp_min(1e-30)
        plain = states @ head.weight.T.to(wide)
        found = logits_of_states(model, states.to(head.weight.dtype)).to(wide)
        if head.bias is not None:
            plain = plain + head.bias
        factor = float((found * plain).sum() / plain.square().sum().clamp_min(1e-30))
    within = _WITHIN if wide == head.weight.dtype else 10 * _WITHIN  # in half precision
    near = [value for value in candidates if abs(value - factor) < within * abs(factor)]
    return near[0] if near else 1.0


def logits_of_states(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The logits [states, vocab] that a model makes of final hidden states [states, width], by its own code."""
    below: list[bool] = []
    head: Any = model.get_output_embeddings()

    def put(module: Any, args: Any, output: Any) -> Any:
        below.append(True)
        output.last_hidden_state = states[None]
        return output

    def put_in(module: Any, args: Any) -> Any:  # where a model runs its layers by another module
        return None if below else (states[None],)

    hooks = [backbone(model).register_forward_hook(put), head.register_forward_pre_hook(put_in)]
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        found: Mapping[str, Any] = causal_model(model)(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    logits: Tensor = found["logits"][0]
    return logits
