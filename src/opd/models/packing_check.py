"""Packed and padded passes against the model's own forward pass, in float32: the start-up check of every model.

Half precision moves logits by as much as a wrong architecture does, so weights of half precision are widened operation by operation
while the check runs. Memory: one weight at a time in float32, and for the gradient one layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from opd.errors import ModelError, one_line
from opd.models.architecture import causal_model, decoder_layers, narrow_windows, reaches_of
from opd.models.attention import own_attention
from opd.models.head import logits_of_states
from opd.models.kv_cache import KVCache
from opd.models.linear import replaced_forwards
from opd.models.network import Network, checkpointed
from opd.models.packing import TokenTree, pack_trees
from opd.models.quantized import quantised_by
from opd.objectives.tiles import soft_capped
from opd.roles import PassGaps

# Of the spread of the logits, in float32. Right architectures were within 2e-5, wrong ones beyond 1e-2
# (docs/results/packed-passes.md).
PACKED_WITHIN = 1e-3
# What it means where a probe (`packed_gaps`) is the first to fail.
PACKING_CAUSES: Mapping[str, str] = {
    "plan": "this model does not pass the arguments of a forward pass on to its attention",
    "head": "this model scales, caps or shifts its logits after the output head",
    "windows": "this model's attention does not have the window that its config names",
    "one sequence": "this model's layers do not see a token's predecessors by plain attention alone",
    "several sequences": "this model's layers carry state across packed sequences",
    "another order": "this model's layers carry state across packed sequences, which depends on their order",
    "distant positions": "in this model the longest sequence of a pass changes the others",
    "next pass": "this model keeps state from one pass to the next",
    "grown rows": "this model's decoding token by token differs from its forward pass (layers that run twice share one cache)",
    "gradients": "this model's gradient through a packed pass differs from that of its forward pass",
    "slopes": "this model's quantised layers lose a gradient, or have a wrong one",
}
_TEXT = (
    'Packing keeps many texts in one pass: 3 questions, 14 answers, {"x": [1, 59]} and naïve prose, one after another, the quick '
    "brown fox among them."
)
_TOKENS = 32  # of the longest probe
_STEP = 1e-3  # of the embeddings, for a slope
_DIRECTIONS = 3
_SLOPE_WITHIN = 0.05  # of the slopes; curvature and rounding left 1.2e-3 at most, on toys and SmolLM2-135M
_WINDOW = 8  # tokens that windows and chunks have in the check, so that short texts go beyond them
_GROWN = 3  # tokens that rows grow by
_FAR = 100_000  # a position to probe where nothing limits it
_SPREAD = 30.0  # of the logits with which the head is probed: where soft caps bend
_HALF = (torch.bfloat16, torch.float16)
# what the code of a model raises where it cannot run a pass
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError)


def settled_passes(network: Network, *, gradients: bool) -> PassGaps:
    """Check a model's passes. Where packed ones turn out to be wrong, the model makes padded ones from now on, which are checked
    too."""
    try:
        gaps = packed_gaps(network, gradients=gradients)
        wrong = first_wrong(gaps)
        because = None if wrong in (None, "head") or math.isnan(gaps[wrong]) else PACKING_CAUSES[wrong]
    except _FAILURES as error:
        if isinstance(error, ModelError | torch.OutOfMemoryError):
            raise
        said = one_line(str(error))[:200]
        if network.padded_because is not None:
            raise ModelError(
                f"model '{network.source}': its own code fails in a forward pass over text ({said}); use another model (a teacher "
                "of this kind can run behind a server: teachers.NAME.url)"
            ) from None
        gaps, because = {}, f"a packed pass fails in this model ({said})"
    if because is not None and network.padded_because is None:
        network.pad(because)
        return settled_passes(network, gradients=gradients)
    return PassGaps(gaps, network.padded_because)


def first_wrong(gaps: Mapping[str, float]) -> str | None:
    """The first probe with a difference that is too large, or is no number."""
    return next((probe for probe, gap in gaps.items() if not gap <= PACKED_WITHIN), None)


def packed_gaps(network: Network, *, gradients: bool) -> dict[str, float]:
    """The difference between a model's packed passes, with its current adapter, and its own pass of one row, by probe.

    Log-probabilities by their largest difference, as a fraction of the spread (standard deviation) of the logits; gradients by
    the norm of the difference, as a fraction of theirs. A nan stays a nan. The first probe that is too large is the last one made.

    plan: whether attention uses the plan of a pass; head: logits from hidden states; windows: whether narrower windows change the
    model's own logits; one sequence: a pass of one; several sequences: one pass over all, which share prefixes; another order:
    the same pass with the sequences reversed; distant positions: a short sequence beside one at the end of the model's limit; next
    pass: the first sequence once more; grown rows: tokens one by one, as while sampling; gradients: of the pass over all, for its
    inputs; slopes: of a quantised model's loss, by differences. Windows and chunks have a few tokens meanwhile, so that every probe
    goes beyond them.
    """
    with _in_float32(network) as widened:
        wide = []
        if any(reach.window > _WINDOW for reach in reaches_of(network.base.config)):
            with torch.no_grad():
                wide = _Probe(network, ()).plain[:1]
        with narrow_windows(network.base, _WINDOW):
            return _measured(_Probe(network, wide), network, gradients=gradients, layer_by_layer=widened)


def _measured(probe: "_Probe", network: Network, *, gradients: bool, layer_by_layer: bool) -> dict[str, float]:
    """`packed_gaps` of a probe; layer_by_layer: keep only the inputs of layers for the gradient, so that weights of one layer at a
    time are widened."""
    found: dict[str, float] = {}
    for name, gap in probe.gaps.items():
        with torch.no_grad():
            found[name] = gap()
        if not found[name] <= PACKED_WITHIN:
            return found
    if gradients:
        layers = decoder_layers(network.base) if layer_by_layer else ()
        with replaced_forwards((layer, partial(checkpointed, layer.forward)) for layer in layers):
            found["gradients"] = probe.gradient_gap()
            if quantised_by(network.base) is not None and found["gradients"] <= PACKED_WITHIN:
                found["slopes"] = probe.slope_gap()
    return found


def _sequences(network: Network) -> list[list[int]]:
    """Token sequences that share prefixes, end within one another and differ in length; the last has no token in common place
    with the first."""
    limit = network.max_context or _FAR
    ids = [i for i in network.tokenizer(_TEXT, add_special_tokens=False)["input_ids"] if i < network.vocab_size]
    base = (ids or [0])[: min(_TOKENS, limit)]
    half = len(base) // 2
    other = base[::-1]
    if other[0] == base[0]:
        other = [(base[0] + 1) % network.vocab_size, *other[1:]]
    found = [base, [*base[:half], *other[: len(base) - half]], base[: half // 2 + 1], other[: half + 1]]
    return [list(one) for one in dict.fromkeys(map(tuple, found))]


class _Probe:
    """The comparisons of one model, each of its packed passes with the model's own logits of every sequence alone."""

    def __init__(self, network: Network, wide: Sequence[Tensor]) -> None:
        """wide: the model's own logits of the first sequence in windows as they are, of a model that has wide ones."""
        self._network = network
        self._wide = wide
        self._sequences = _sequences(network)
        every: dict[str, Callable[[], float]] = {
            "plan": self._plan_gap,
            "head": self._head_gap,
            "windows": self._windows_gap,
            "one sequence": lambda: self._tree_gap(self._sequences[:1], self.plain[:1]),
            "several sequences": lambda: self._tree_gap(self._sequences, self.plain),
            "another order": lambda: self._tree_gap(self._sequences[::-1], self.plain[::-1]),
            "distant positions": self._distant_gap,
            "next pass": lambda: _gap([self._own(self._sequences[0])], self.plain[:1]),
            "grown rows": self._rows_gap,
        }
        if network.padded_because is not None:
            # rows are what the model makes of them: no plan, its own windows and positions
            del every["plan"], every["windows"], every["distant positions"]
        elif not wide:
            del every["windows"]
        self.gaps: Mapping[str, Callable[[], float]] = every

    @cached_property
    def plain(self) -> list[Tensor]:
        """The model's own logits of each sequence."""
        return [self._own(sequence) for sequence in self._sequences]

    def _own(self, sequence: Sequence[int], first: int = 0) -> Tensor:
        """The model's own logits [tokens, vocab] of a sequence that begins at position `first`."""
        network = self._network
        ids = torch.tensor([list(sequence)], device=network.device)
        where = torch.arange(first, first + len(sequence), device=network.device)[None]
        with own_attention(network.base):
            logits = causal_model(network.base)(input_ids=ids, position_ids=where, use_cache=False).logits
        return logits[0, :, : network.vocab_size]

    def _packed(self, tree: TokenTree) -> list[Tensor]:
        """The logits [tokens, vocab] of each path of a packed pass."""
        logits = self._logits(self._network.hidden_states(tree))
        return [logits[self._on(path)] for path in tree.paths]

    def _logits(self, hidden: Tensor) -> Tensor:
        """The logits [..., vocab] of hidden states as the head takes them, as losses form them."""
        return soft_capped(hidden @ self._network.head_weight().T, self._network.softcap)[0]

    def _on(self, path: np.ndarray) -> Tensor:
        return torch.from_numpy(path).to(self._network.device)

    def _tree_gap(self, sequences: Sequence[Sequence[int]], plain: Sequence[Tensor]) -> float:
        return _gap(self._packed(_tree(sequences)), plain)

    def _plan_gap(self) -> float:
        """Infinite for a model that does not pass its keyword arguments on to attention."""
        cache = KVCache(self._network.device)
        self._network.prefill(self._sequences[:1], cache, max_tokens=_TOKENS)
        return 0.0 if cache.is_filled else math.inf

    def _head_gap(self) -> float:
        """Logits of large random states by the model itself and by its head alone."""
        network, head = self._network, cast(Any, self._network.base.get_output_embeddings()).weight
        states = torch.randn(8, head.shape[1], generator=torch.Generator().manual_seed(0))
        states = states.to(network.device, torch.promote_types(head.dtype, torch.float32))
        states = states * (_SPREAD / (states @ head.T).std().clamp_min(1e-30))
        logits = logits_of_states(network.base, states)[:, : network.vocab_size]
        return _gap([self._logits(network.for_head(states))], [logits])

    def _windows_gap(self) -> float:
        """Infinite for a model that makes the same logits in narrower windows."""
        differ = len(self._sequences[0]) <= _WINDOW or _gap(self.plain[:1], self._wide) > 0
        return 0.0 if differ else math.inf

    def _distant_gap(self) -> float:
        """A short sequence at the first positions beside one at the last positions, as beside a long sequence."""
        far = self._sequences[-1]
        tree = _tree([self._sequences[0], far])
        first = max(0, (self._network.max_context or _FAR) - len(far))
        positions = tree.positions.copy()
        positions[tree.paths[1]] = np.arange(first, first + len(far))
        if self._sequences[0][0] == far[0]:  # of one token there is no other sequence
            return 0.0
        return _gap(self._packed(replace(tree, positions=positions)), [self.plain[0], self._own(far, first)])

    def _rows_gap(self) -> float:
        """Rows of different lengths that grow together, one of them twice."""
        chosen = [i for i, s in enumerate(self._sequences) if len(s) > _GROWN]
        if not chosen:
            return 0.0
        texts = [self._sequences[i] for i in chosen]
        cache = self._network.new_cache()
        begun = self._network.prefill([s[:-_GROWN] for s in texts], cache, max_tokens=2 * _TOKENS)
        cache.copy(0)
        found, texts, chosen = [torch.cat([begun, begun[:1]])], [*texts, texts[0]], [*chosen, chosen[0]]
        found += [self._network.decode([s[step] for s in texts], cache) for step in range(-_GROWN, 0)]
        logits = self._logits(torch.stack(found, dim=1))
        return _gap(list(logits), [self.plain[i][-_GROWN - 1 :] for i in chosen])

    def gradient_gap(self) -> float:
        """Gradients of weighted log-probabilities for the embeddings of a pass, which flow through every layer."""
        network, sequences = self._network, self._sequences
        tree = _tree(sequences)
        size = network.num_embeddings
        with _inputs(network) as given:
            logits = self._packed(tree)
            total = torch.stack([_loss(mine, s) for mine, s in zip(logits, sequences, strict=True)]).sum()
            found = _by_token(total, given, size)
        expected = torch.zeros_like(found)
        for sequence in sequences:
            with _inputs(network) as given, own_attention(network.base):  # which layers may attend with once more
                expected += _by_token(_loss(self._own(sequence), sequence), given, size)
        return float((found - expected).norm() / expected.norm().clamp_min(1e-30))

    def slope_gap(self) -> float:
        """The gradient of an own pass against slopes of its loss in random directions, as a fraction of these; 0 where they are as
        close as float32 allows. A kernel of a quantised layer may lose its gradient in packed passes and in the model's own."""
        network, sequence = self._network, self._sequences[0]
        with _inputs(network) as given, own_attention(network.base):
            loss = _loss(self._own(sequence), sequence)
            leaf = given[-1][1]
            gradient = _gradient(loss, leaf)
        generator, apart, whole = torch.Generator().manual_seed(0), 0.0, 0.0
        for _ in range(_DIRECTIONS):
            step = torch.randn(leaf.shape, generator=generator).to(leaf.device)
            step *= _STEP * leaf.detach().norm() / step.norm()
            found = (self._moved(sequence, step) - self._moved(sequence, -step)) / 2
            apart += (found - float((gradient * step).sum())) ** 2
            whole += found**2
        gap = math.sqrt(apart / max(whole, 1e-30))
        return 0.0 if gap < _SLOPE_WITHIN else gap

    @torch.no_grad()
    def _moved(self, sequence: Sequence[int], step: Tensor) -> float:
        """The loss of an own pass with embeddings that a step has moved."""

        def moved(module: Any, args: Any, output: Tensor) -> Tensor:
            return output + step

        hook = self._network.base.get_input_embeddings().register_forward_hook(moved)
        try:
            return float(_loss(self._own(sequence), sequence))
        finally:
            hook.remove()


def _gap(packed: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """The largest difference of log-probabilities [tokens, vocab], as a fraction of the spread of the plain logits."""
    worst = 0.0
    for mine, own in zip(packed, plain, strict=True):
        gap = (torch.log_softmax(mine, -1) - torch.log_softmax(own, -1)).abs().max()
        spread = own.std(-1).mean()
        worst = float(np.maximum(worst, float(gap / spread.clamp_min(1e-30))))  # unlike max(), keeps a nan
    return worst


def _loss(logits: Tensor, sequence: Sequence[int]) -> Tensor:
    """The log-probabilities of a sequence's tokens, weighted at random; its last state counts too."""
    targets = torch.tensor([*sequence[1:], sequence[0]], device=logits.device)
    logprobs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    weights = torch.randn(len(sequence), generator=torch.Generator().manual_seed(len(sequence)))
    return (logprobs * weights.to(logits.device)).sum()


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    """Of one scalar for one leaf, by the engine itself: `torch.autograd.grad` leaves `_Widened` while it runs."""
    engine: Any = Variable._execution_engine
    [found] = engine.run_backward(
        (value,), (torch.ones_like(value),), False, False, (leaf,), allow_unreachable=True, accumulate_grad=False
    )
    return found


def _tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    [(_, tree)] = pack_trees(sequences, max_tokens=sum(map(len, sequences)) + 1)
    return tree


def _by_token(value: Tensor, given: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor:
    """The gradient of one scalar for the embedding of each token id that the last pass read, [ids, hidden]."""
    token_ids, leaf = given[-1]
    gradient = _gradient(value, leaf)
    found = torch.zeros(size, gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    return found.index_add_(0, token_ids.flatten(), gradient.flatten(0, -2))


@contextmanager
def _inputs(network: Network) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The token ids and the embeddings of the passes that follow, which are leaves of their own."""
    given: list[tuple[Tensor, Tensor]] = []

    def leaf(module: Any, args: Any, output: Tensor) -> Tensor:
        given.append((args[0], output.detach().requires_grad_()))
        return given[-1][1]

    hook = network.base.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield given
    finally:
        hook.remove()


@contextmanager
def _in_float32(network: Network) -> Iterator[bool]:
    """Compute in full float32 for any weights; yields whether they are widened for it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    widened = any(p.dtype in _HALF for p in (*network.model.parameters(), *network.model.buffers()))
    try:
        with _Widened() if widened else nullcontext():
            yield widened
    finally:
        torch.set_float32_matmul_precision(before)


class _Widened(TorchFunctionMode):
    """Every operation reads half precision as float32, and makes nothing of half precision. Weights stay as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if getattr(func, "__self__", None) is Tensor.dtype:
            dtype = func(*args, **kwargs)
            return torch.float32 if dtype in _HALF else dtype
        if name in ("__get__", "__set__", "data_ptr", "size", "dim", "numel", "stride", "requires_grad_"):
            return func(*args, **kwargs)
        if func is torch.nn.functional.embedding:  # a table is large, its rows are few
            return func(*args, **kwargs).float()
        if name.endswith("_") and not name.endswith("__"):  # in place: the target keeps its dtype
            return func(args[0], *tree_map(_wide, tuple(args[1:])), **tree_map(_wide, kwargs))
        return func(*tree_map(_wide, tuple(args)), **tree_map(_wide, kwargs))


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value
