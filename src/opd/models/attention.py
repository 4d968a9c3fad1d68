"""Attention of packed trees and of cached rows, in place of the models' own.

transformers calls a function of our choice in every attention layer, with the keyword arguments of the model's forward pass. One
of them, `plan`, says what the tokens of this pass see. Without a plan a model attends as it always does.

The plan of a tree works in tiles, so that it costs what is seen and not all pairs. A tile is a stretch of consecutive nodes. Its
keys are the nodes that any of them sees: the tile itself, and the ancestors of the branches in it. Tiles begin where branches do,
unless several short branches fit into one. Tiles that see about as many keys are computed together, padded to the widest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opd.errors import ModelError
from opd.models.architecture import require_packable
from opd.models.packing import TokenTree

_NAME = "opd"
_TILE = 64  # nodes; a smaller tile sees less that it does not need, a larger one makes fewer, larger products
_SLACK = 0.75  # a tile joins a group when it sees at least this fraction of what the group's widest tile sees
_WIDE = 512  # keys; groups that see more keep only their inputs for the gradient
# Arguments that change the scores, or which keys count. A plan ignores them.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sinks", "indices", "block_indices")


class Plan(Protocol):
    """What the tokens of one pass see."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [batch, heads, tokens, size], key and value [batch, key heads, tokens, size] -> [batch, tokens, heads, size]."""
        ...


def use_plans(model: PreTrainedModel, *, source: str) -> None:
    """Let a model attend as plans say. Raises ModelError for an architecture that keeps its own attention, or has layers that no
    plan can run."""
    require_packable(model, source=source)
    model.set_attn_implementation(_NAME)
    if model.config.get_text_config()._attn_implementation != _NAME:
        raise ModelError(
            f"model '{source}': {type(model).__name__} kept its own attention, so its passes cannot be packed"
        )


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend as in transformers: in full, with the model's own mask."""
    before = model.config.get_text_config()._attn_implementation or _NAME
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} attends with '{name}', which packed passes do not do")
    plan: Plan | None = options.pop("plan", None)
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return plan.attend(module.layer_idx, query, key, value, options.get("scaling")), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@dataclass(frozen=True)
class TileGroup:
    """Tiles that are computed together.

    starts, ends [tiles]: each is the nodes start, ..., end - 1, at most `size` of them; keys [tiles, width]: the nodes that each
    sees, in order, 0 behind their end; visible [tiles, size, width] bool: which keys each node sees. A place behind a tile's last
    node sees the first key, so that every row sees something.
    """

    starts: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    visible: np.ndarray


def tile_groups(tree: TokenTree, *, size: int) -> list[TileGroup]:
    """Every node in exactly one tile of at most `size` nodes; the widest group first."""
    first_of_run = _first_of_run(tree.parents)
    cuts = _cuts(first_of_run, size)
    seen = [_tile(tree.parents, first_of_run, start, end) for start, end in cuts]
    order = sorted(range(len(seen)), key=lambda i: -len(seen[i][0]))
    groups: list[list[int]] = []
    for i in order:
        if not groups or len(seen[i][0]) < _SLACK * len(seen[groups[-1][0]][0]):
            groups.append([])
        groups[-1].append(i)
    return [_group(sorted(members), cuts, seen, size) for members in groups]


def _first_of_run(parents: np.ndarray) -> np.ndarray:
    """For each node, the first of the unbroken line of nodes, each the parent of the next, that leads to it."""
    breaks = np.flatnonzero(parents != np.arange(len(parents)) - 1)
    starts = np.concatenate([[0], breaks])
    return np.repeat(starts, np.diff(np.concatenate([starts, [len(parents)]])))


def _cuts(first_of_run: np.ndarray, size: int) -> list[tuple[int, int]]:
    """The tiles' (start, end)."""
    starts = np.unique(first_of_run).tolist()
    cuts: list[tuple[int, int]] = []
    begun = 0
    for start, end in zip(starts, [*starts[1:], len(first_of_run)], strict=True):
        if end - begun > size and begun < start:
            cuts.append((begun, start))
            begun = start
        while end - begun > size:
            cuts.append((begun, begun + size))
            begun += size
    return [*cuts, (begun, len(first_of_run))]


def _tile(parents: np.ndarray, first_of_run: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, visible [nodes of the tile, keys]) of one tile."""
    nodes = np.arange(start, end)
    begins = [start, *nodes[1:][first_of_run[start + 1 : end] == nodes[1:]].tolist()]
    above = np.zeros((len(begins), end), dtype=bool)  # the ancestors of each branch that begins or goes on in the tile
    for row, begin in zip(above, begins, strict=True):
        node = int(parents[begin])
        while node >= 0:
            first = int(first_of_run[node])
            row[first : node + 1] = True
            node = int(parents[first])
    seen = np.asarray(above.any(axis=0))
    seen[start:] = True
    keys = np.flatnonzero(seen)
    if len(begins) == 1:  # all that is seen stands before the tile, or in it
        return keys, keys <= nodes[:, None]
    branch = np.repeat(np.arange(len(begins)), np.diff([*begins, end]))
    own = (keys >= np.array(begins)[branch, None]) & (keys <= nodes[:, None])
    return keys, own | above[:, keys][branch]


def _group(
    members: list[int], cuts: list[tuple[int, int]], seen: list[tuple[np.ndarray, np.ndarray]], size: int
) -> TileGroup:
    width = max(len(seen[i][0]) for i in members)
    keys = np.zeros((len(members), width), dtype=np.int64)
    visible = np.zeros((len(members), size, width), dtype=bool)
    for row, i in enumerate(members):
        its_keys, its_visible = seen[i]
        keys[row, : len(its_keys)] = its_keys
        visible[row, : len(its_visible), : len(its_keys)] = its_visible
        visible[row, len(its_visible) :, 0] = True
    starts, ends = np.array([cuts[i] for i in members], dtype=np.int64).T
    return TileGroup(starts, ends, keys, visible)


class TreePlan:
    """A token of a packed tree sees itself and its ancestors. With `keep`, `kept` has each layer's keys and values
    [tokens, key heads, size] afterwards."""

    def __init__(self, tree: TokenTree, *, device: torch.device, keep: bool = False) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self._chain = bool((tree.parents == np.arange(len(tree)) - 1).all())
        groups = [] if self._chain else tile_groups(tree, size=_TILE)
        self._keys = [torch.from_numpy(group.keys).to(device) for group in groups]
        self._visible = [torch.from_numpy(group.visible).to(device) for group in groups]
        self._masks: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._places = torch.from_numpy(_places(groups, len(tree))).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if self.kept is not None:
            self.kept[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1))
        shared = query.shape[1] // key.shape[1]
        if self._chain:
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
        heads, size, width = key.shape[1], query.shape[3], value.shape[3]
        kind = (shared, query.dtype)  # under mixed precision not that of the weights
        if kind not in self._masks:
            self._masks = {kind: [_mask(visible, shared, query.dtype) for visible in self._visible]}
        counts = [len(keys) for keys in self._keys]
        queries = _Put.apply(query[0].transpose(0, 1).flatten(1), self._places, sum(counts) * _TILE)
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
        found = []
        for mine, seen, mask in zip(
            queries.view(-1, _TILE, heads, shared, size).split(counts), self._keys, self._masks[kind], strict=True
        ):
            # The heads that share a key head are further rows of it, so keys are not repeated.
            given = mine.permute(0, 2, 3, 1, 4).reshape(len(seen), heads, shared * _TILE, size)
            one = _looked_at(given, keys, values, seen, mask, scale)
            found.append(one.view(len(seen), heads, shared, _TILE, width).permute(0, 3, 1, 2, 4).flatten(0, 1))
        whole = torch.cat([one.flatten(1) for one in found])
        return _Take.apply(whole, self._places).view(1, -1, heads * shared, width)


def _mask(visible: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores [tiles, 1, shared * rows, keys]: -inf where nothing is seen."""
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return hidden.repeat(1, shared, 1)[:, None]


def _looked_at(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention of tiles [tiles, key heads, rows, size] over the keys and values [tokens, key heads, size] that each sees."""

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        mine, theirs = (_See.apply(x, seen).transpose(1, 2) for x in (keys, values))
        return F.scaled_dot_product_attention(query, mine, theirs, attn_mask=mask, scale=scale)

    if seen.shape[1] <= _WIDE or not torch.is_grad_enabled():
        return attend(query, keys, values)
    # Copies of the keys of every tile, kept layer by layer, would need many times the memory of the keys.
    found = checkpoint(attend, query, keys, values, use_reentrant=False, preserve_rng_state=False)
    return cast(Tensor, found)


def _places(groups: Sequence[TileGroup], num_nodes: int) -> np.ndarray:
    """Where each node stands among the places of all tiles, group by group, [nodes]."""
    found = np.zeros(num_nodes, dtype=np.int64)
    tile = 0
    for group in groups:
        for start, end in zip(group.starts, group.ends, strict=True):
            found[start:end] = tile * _TILE + np.arange(end - start)
            tile += 1
    return found


class _See(torch.autograd.Function):
    """The rows [rows, heads, size] that each tile sees, [tiles, seen, heads, size]. What many tiles see gets its gradient from
    each of them, so they are summed in float32 or wider."""

    @staticmethod
    def forward(ctx, rows, seen):  # type: ignore[override]  # torch declares (*args)
        ctx.save_for_backward(seen)
        ctx.shape = rows.shape
        return rows[seen]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        [seen] = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        whole.index_add_(0, seen.flatten(), grad.flatten(0, 1).to(whole.dtype))
        return whole.to(grad.dtype), None


class _Put(torch.autograd.Function):
    """Rows [rows, width] into their places of [total, width], zeros elsewhere. No two rows share a place, which torch's own
    gradients of indexing cannot know: they add up row by row."""

    @staticmethod
    def forward(ctx, rows, places, total):  # type: ignore[override]  # torch declares (*args)
        ctx.save_for_backward(places)
        out = rows.new_zeros(total, rows.shape[1])
        out[places] = rows
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        return grad[ctx.saved_tensors[0]], None, None


class _Take(torch.autograd.Function):
    """The rows [rows, width] at their places of [total, width]: what undoes `_Put`."""

    @staticmethod
    def forward(ctx, whole, places):  # type: ignore[override]  # torch declares (*args)
        ctx.save_for_backward(places)
        ctx.total = len(whole)
        return whole[places]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]  # torch declares (*args)
        out = grad.new_zeros(ctx.total, grad.shape[1])
        out[ctx.saved_tensors[0]] = grad
        return out, None
