"""Quantised models: linear layers whose weights are kept in 4 or 8 bits.

bitsandbytes quantises weights and widens them. Its products are not used: for one row its 4-bit kernel has no gradient on a CPU,
and its 8-bit kernel rounds the states as well. Here every product widens the weight, and so does its gradient, so that a pass
equals that of a model with these widened weights, whatever its shape.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig, PreTrainedModel

from opd.config import Quantization
from opd.errors import ModelError


def loading_options(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise a model while it loads. Raises ModelError without bitsandbytes."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization = '{quantization}' needs bitsandbytes: pip install 'opd[quantized]'")
    if quantization == "nf4":
        said = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        said = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": said, "device_map": {"": device}}


def quantised_by(model: PreTrainedModel) -> str | None:
    """The method that quantised a model, as its config names it; None for a whole model."""
    said = getattr(model.config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    return None if said is None else str(getattr(method, "value", method))


def widen_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every layer that bitsandbytes quantised multiply by its widened weight; dtype: of the products."""
    for layer in _layers(model):
        layer.forward = partial(_product, layer, dtype)


def widened(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] of a layer that bitsandbytes quantised."""
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        whole: Tensor = bnb.dequantize_4bit(layer.weight.data, state)
    else:
        whole = bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return whole.to(dtype)


def _layers(model: nn.Module) -> Iterator[Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    yield from (module for module in model.modules() if isinstance(module, (bnb.Linear4bit, bnb.Linear8bitLt)))


def _product(layer: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    found: Tensor = _Product.apply(x, layer, dtype)
    return found if layer.bias is None else found + layer.bias.to(found.dtype)


class _Product(torch.autograd.Function):
    """W x of states x [..., in]; the widened weight is made once more for the gradient, and kept nowhere."""

    @staticmethod
    def forward(ctx, x, layer, dtype):  # type: ignore[override]  # torch declares (*args)
        ctx.layer, ctx.dtype = layer, dtype
        return nn.functional.linear(x, widened(layer, dtype).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        return grad @ widened(ctx.layer, ctx.dtype).to(grad.dtype), None, None
