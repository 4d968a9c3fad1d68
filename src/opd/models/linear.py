"""The linear layers of a model: an adapter's update in one pass with its base, and products of a few rows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_FEW = 512  # rows; up to here W x^T, a product with a few columns, is faster on a CPU than x W^T with a few rows


class _Whole:
    """A layer's weight with an adapter's update added, W + scale B A, in one buffer: fresh memory for every step would cost as much
    time as the sum saves."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._state: tuple[Any, ...] = ()

    def make(self, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """The sum, made anew where the parts have changed."""
        found = self.current(weight, down, up, scale)
        if found is None:
            kept, self._parts = self._sum, ()  # an error on the way leaves no sum that counts
            if kept is None or kept.is_inference() or (kept.dtype, kept.device) != (weight.dtype, weight.device):
                kept = torch.empty_like(weight)
            with torch.no_grad():
                found = torch.addmm(weight, up, down, alpha=scale, out=kept)
            self._sum, self._parts, self._state = found, (weight, down, up), _state(scale, weight, down, up)
        return found

    def current(self, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor | None:
        """The sum if it was made of these parts as they are now."""
        same = self._parts and all(a is b for a, b in zip(self._parts, (weight, down, up), strict=True))
        return self._sum if same and self._state == _state(scale, weight, down, up) else None


def _state(scale: float, *parts: Tensor) -> tuple[Any, ...]:
    """A state of tensors that changes with their values: their addresses, and torch's counts of writes. Fused optimizers and writes
    through `.data` are not counted."""
    return scale, *((part.data_ptr(), part._version) for part in parts)


def fuse_adapters(model: nn.Module) -> None:
    """Let every LoRA layer compute W x + scale B A x and its gradients without intermediate [tokens, width] results.

    Where the sum W + scale B A is there (`merged`) and is still that of the layer's weights, it is used with gradients too.
    Layers of another kind (DoRA, biases in the adapter, dropout while it trains, another dtype than the base) stay as peft has
    them.
    """
    for layer in model.modules():
        if type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear:
            layer.opd_whole = _Whole()  # type: ignore[assignment]  # no module and no tensor
            layer.forward = partial(_adapted, layer)  # type: ignore[method-assign]  # of this one layer, not of peft's class


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """For passes of few tokens without gradients: every linear layer with its active adapter added to a copy of its weight.

    Later passes with the same weights use the copies too (`fuse_adapters`). Weights of half precision get no copy: adding to them
    would round the update away.
    """
    with torch.no_grad():
        sums = [(name, layer, *_sum(layer)) for name, layer in _linear_layers(model)]
    # Attention may read its rows as complex numbers, so they must be contiguous. Making the wide rows of MLPs contiguous took 7 %
    # of sampling.
    forwards = [
        (layer, partial(few_rows, weight, bias, together="mlp" not in name))
        for name, layer, weight, bias in sums
        if weight is not None
    ]
    with replaced_forwards(forwards):
        yield


@contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let single modules compute otherwise for a while."""
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for layer, forward in forwards:
            changed.append((layer, layer.__dict__.get("forward")))
            layer.forward = forward  # type: ignore[method-assign]  # as above
        yield
    finally:
        for layer, forward in changed:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]  # as above


def _linear_layers(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost linear layers and their names: an adapted one, not its parts."""
    for name, child in model.named_children():
        if type(child) is LoraLinear or type(child) is nn.Linear:
            yield f"{path}{name}", child
        elif not isinstance(child, BaseTunerLayer):  # other tuners use their parts in ways of their own
            yield from _linear_layers(child, f"{path}{name}.")


def _sum(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """A layer's weight with its active adapter's update, and its bias; None where only peft can add the update."""
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    if type(layer.base_layer) is not nn.Linear or (adapters := _plain_adapters(layer)) is None:
        return None, None
    base = layer.base_layer
    if not adapters:
        return base.weight, base.bias
    if base.weight.dtype.itemsize < torch.float32.itemsize:
        return None, None
    whole = getattr(layer, "opd_whole", None) or _Whole()
    return whole.make(base.weight, *adapters[0]), base.bias


def _plain_adapters(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """(A, B, scale) of the adapter that is active on a layer, if any; None where it is not of the plain kind."""
    if layer.disable_adapters:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return []
    name = active[0]
    down, up, base = layer.lora_A[name], layer.lora_B[name], layer.base_layer
    plain = len(active) == 1 and not layer.merged and name not in layer.lora_variant and up.bias is None
    dropped = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    if not plain or dropped or down.weight.dtype != base.weight.dtype or layer.fan_in_fan_out:
        return None
    return [(down.weight, up.weight, layer.scaling[name])]


def _adapted(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """The forward pass of one LoRA layer."""
    adapters = None if args or options else _plain_adapters(layer)
    if adapters is None or x.dtype != layer.base_layer.weight.dtype:
        return LoraLinear.forward(layer, x, *args, **options)
    base = layer.base_layer
    if not adapters:
        return base(x)
    down, up, scale = adapters[0]
    whole = layer.opd_whole.current(base.weight, down, up, scale)
    rows = x.reshape(-1, x.shape[-1])
    out = _Adapted.apply(rows, base.weight, base.bias, down, up, scale, whole)
    # a view that the function itself returned could not be written over, as Llama 4 does
    return out.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]  # torch types it as Any


class _Adapted(torch.autograd.Function):
    """rows [rows, in] -> W x + bias + scale B A x of each, [rows, out]; W and its bias are frozen. whole: W + scale B A, if it is
    there."""

    @staticmethod
    def forward(ctx, rows, weight, bias, down, up, scale, whole):  # type: ignore[override]  # torch declares (*args)
        weight = weight if whole is None else whole
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        small = None
        if whole is None:
            small = rows @ down.T
            out.addmm_(small, up.T, alpha=scale)
        ctx.save_for_backward(rows, small, weight, down, up)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        rows, small, weight, down, up = ctx.saved_tensors
        grad_small = (grad @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x = grad_x if small is None else grad_x.addmm_(grad_small, down)
        grad_down = (rows.T @ grad_small).T if ctx.needs_input_grad[3] else None
        grad_up = None
        if ctx.needs_input_grad[4]:
            grad_up = (grad.T @ (rows @ down.T if small is None else small)).mul_(ctx.scale)
        return grad_x, None, None, grad_down, grad_up, None, None


def few_rows(weight: Tensor, bias: Tensor | None, x: Tensor, *, together: bool = True) -> Tensor:
    """W x + bias [..., out] of a few rows x [..., in]; together: rows are contiguous, otherwise columns are."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > _FEW or weight.device.type != "cpu":
        return nn.functional.linear(x, weight, bias)
    out = (weight @ rows.T).T
    out = out.contiguous() if together else out
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
