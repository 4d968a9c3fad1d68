"""Attention of packed trees and of cached rows, in place of the models' own.

transformers calls a function of our choice in every attention layer, with the keyword arguments of the model's forward pass. One
of them, `plan`, says what the tokens of this pass see. Without a plan a model attends as it always does.

The plan of a tree works in tiles, so that tokens that do not see each other cost little. A tile is a stretch of consecutive
nodes. Its keys are the nodes that any of them sees: the tile itself, and the ancestors of the branches in it, as far back as the
layer looks. Tiles begin where branches do, unless several short branches fit into one. Tiles that see about as many keys are
computed together, padded to the widest.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
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
from opd.models.architecture import Reach, language_model, reach_of, unpackable
from opd.models.packing import TokenTree

_NAME = "opd"
_TILE = 64  # nodes; a smaller tile sees less that it does not need, a larger one makes fewer, larger products
_SLACK = 0.75  # a tile joins a group when it sees at least this fraction of the keys of the group's widest tile
_KEPT = 64  # trees of which the tiles are kept: an eighth of a byte for each token and key that it sees
_WIDE = 512  # keys; groups that see more keep only their inputs for the gradient
# Arguments that change the scores, or which keys count. A plan ignores them.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sinks", "indices", "block_indices")


# of one layer, for each node of a pass: keys and values [nodes, key heads, size], and how far back the layer sees
Kept = tuple[Tensor, Tensor, Reach | None]


class Plan(Protocol):
    """What the tokens of one pass see."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, reach: Reach | None
    ) -> Tensor:
        """query [batch, heads, tokens, size], key and value [batch, key heads, tokens, size] -> [batch, tokens, heads, size].

        reach: how far back the tokens of this layer see; None: to the first one."""
        ...


def use_plans(model: PreTrainedModel) -> str | None:
    """Let a model attend as plans say; returns why not for an architecture that keeps its own attention, or has layers that no plan
    can run, and leaves that one as it is."""
    why = unpackable(model)
    if why is None:
        language_model(model).set_attn_implementation(_NAME)
        if model.config.get_text_config()._attn_implementation != _NAME:
            return f"{type(model).__name__} keeps its own attention"
    return why


def use_own_attention(model: PreTrainedModel) -> None:
    """Let a model attend as in transformers from now on: in full, with the model's own mask."""
    language_model(model).set_attn_implementation("eager")


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend as in transformers: in full, with the model's own mask."""
    before = model.config.get_text_config()._attn_implementation or _NAME
    use_own_attention(model)
    try:
        yield
    finally:
        language_model(model).set_attn_implementation(before)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} attends with '{name}', which packed passes do not do")
    plan: Plan | None = options.pop("plan", None)
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    reach = reach_of(module.config, module.layer_idx, options.get("sliding_window"))
    return plan.attend(module.layer_idx, query, key, value, options.get("scaling"), reach), None


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@dataclass(frozen=True)
class TileGroup:
    """Tiles that are computed together.

    starts, ends [tiles]: each is the nodes start, ..., end - 1; keys [tiles, width]: the nodes that any of them sees, in order, 0
    behind their end; counts [tiles]: how many keys there are. All int64.
    """

    starts: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Tiles:
    """The tiles of a tree, the widest group first, the nodes' numbers in depth-first order, and how far back each node sees.

    enter, leave [nodes] int32: node k is n or an ancestor of n where enter[k] <= enter[n] < leave[k]; depths, first [nodes] int64:
    n sees of these the nodes k with first[n] <= depths[k].
    """

    groups: Sequence[TileGroup]
    enter: np.ndarray
    leave: np.ndarray
    depths: np.ndarray
    first: np.ndarray


@lru_cache(maxsize=_KEPT)
def tiles_of(tree: TokenTree, *, size: int, reach: Reach | None) -> Tiles:
    """Every node of a tree in exactly one tile of at most `size` nodes. Those of the last trees are kept."""
    depths = tree.depths
    first_seen = np.zeros_like(depths) if reach is None else reach.first(depths)
    breaks = np.flatnonzero(tree.parents != np.arange(len(tree)) - 1)
    runs = [0, *breaks.tolist(), len(tree)]  # bounds of the unbroken lines of nodes, each the parent of the next
    first_of_run = np.repeat(runs[:-1], np.diff(runs))
    cuts = _cuts(runs, size)
    keys = [_keys(tree.parents, first_of_run, start, end) for start, end in cuts]
    if reach is not None:
        lowest = [first_seen[start:end].min() for start, end in cuts]
        keys = [mine[depths[mine] >= low] for mine, low in zip(keys, lowest, strict=True)]
    groups: list[list[int]] = []
    for i in sorted(range(len(keys)), key=lambda i: -len(keys[i])):
        if not groups or len(keys[i]) < _SLACK * len(keys[groups[-1][0]]):
            groups.append([])
        groups[-1].append(i)
    found = []
    for members in map(sorted, groups):
        counts = np.array([len(keys[i]) for i in members])
        padded = np.zeros((len(members), counts.max()), dtype=np.int64)
        for row, i in zip(padded, members, strict=True):
            row[: len(keys[i])] = keys[i]
        starts, ends = np.array([cuts[i] for i in members]).T
        found.append(TileGroup(starts, ends, padded, counts))
    return Tiles(found, *_depth_first(tree.parents, runs), depths, first_seen)


def _cuts(runs: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The tiles' (start, end), from the bounds of runs."""
    cuts: list[tuple[int, int]] = []
    begun = 0
    for start, end in pairwise(runs):
        if end - begun > size and begun < start:
            cuts.append((begun, start))
            begun = start
        while end - begun > size:
            cuts.append((begun, begun + size))
            begun += size
    return [*cuts, (begun, runs[-1])]


def _keys(parents: np.ndarray, first_of_run: np.ndarray, start: int, end: int) -> np.ndarray:
    """The nodes that a tile sees: its own, and the ancestors of each branch that begins or goes on in it."""
    seen = np.zeros(end, dtype=bool)
    seen[start:] = True
    nodes = np.arange(start + 1, end)
    for begin in [start, *nodes[first_of_run[start + 1 : end] == nodes].tolist()]:
        node = int(parents[begin])
        while node >= 0:
            first = int(first_of_run[node])
            seen[first : node + 1] = True
            node = int(parents[first])
    return np.flatnonzero(seen)


def _depth_first(parents: np.ndarray, runs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(enter, leave) of each node: its number in depth-first order, and the number after its last descendant. The next node of a
    run comes first, then the branches in their order."""
    sizes = np.ones(len(parents), dtype=np.int64)  # of the subtrees
    for start, end in reversed(list(pairwise(runs))):
        sizes[start:end] = np.cumsum(sizes[start:end][::-1])[::-1]
        if parents[start] >= 0:
            sizes[parents[start]] += sizes[start]
    enter = np.zeros(len(parents), dtype=np.int64)
    free = np.zeros(len(parents) + 1, dtype=np.int64)  # the number of each node's next branch, and of the next root
    for start, end in pairwise(runs):
        enter[start:end] = free[parents[start]] + np.arange(end - start)
        free[parents[start]] += sizes[start]
        free[start:end] = enter[start:end] + 1
        free[start : end - 1] += sizes[start + 1 : end]
    return enter.astype(np.int32), (enter + sizes).astype(np.int32)


def visible_keys(tiles: Tiles, group: TileGroup, *, size: int, device: torch.device) -> Tensor:
    """Which keys each node of a group's tiles sees, [tiles, size, width] bool. A place behind a tile's last node sees what the
    first key sees, itself at least, so that every row sees something."""
    enter, leave, depths, first_seen = (
        torch.from_numpy(a).to(device) for a in (tiles.enter, tiles.leave, tiles.depths, tiles.first)
    )
    starts, ends, keys, counts = (
        torch.from_numpy(a).to(device) for a in (group.starts, group.ends, group.keys, group.counts[:, None])
    )
    nodes = starts[:, None] + torch.arange(size, device=device)
    nodes = torch.where(nodes < ends[:, None], nodes, keys[:, :1])
    is_key = torch.arange(keys.shape[1], device=device) < counts
    at, first = enter[nodes][:, :, None], enter[keys].masked_fill(~is_key, len(enter))
    visible = (first[:, None] <= at).logical_and_(at < leave[keys][:, None])
    return visible.logical_and_(depths[keys][:, None] >= first_seen[nodes][:, :, None])


class TreePlan:
    """A token of a packed tree sees itself and its ancestors. With `keep`, `kept` has each layer's keys and values
    [tokens, key heads, size], and its reach, afterwards."""

    def __init__(self, tree: TokenTree, *, device: torch.device, keep: bool = False) -> None:
        self.kept: dict[int, Kept] | None = {} if keep else None
        self._tree, self._device = tree, device
        self._is_chain = bool((tree.parents == np.arange(len(tree)) - 1).all())
        self._deepest = int(tree.depths.max(initial=0))
        self._tiled: dict[Reach | None, _TiledAttention] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, reach: Reach | None
    ) -> Tensor:
        if self.kept is not None:
            self.kept[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1), reach)
        if reach is not None and reach.first(self._deepest) <= 0:
            reach = None  # all see to the first token
        if self._is_chain and reach is None:
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
        if reach not in self._tiled:
            self._tiled[reach] = _TiledAttention(self._tree, reach, self._device)
        return self._tiled[reach].attend(query, key, value, scale)


class _TiledAttention:
    """The tiles of a tree for the layers of one reach, and the masks that they share."""

    def __init__(self, tree: TokenTree, reach: Reach | None, device: torch.device) -> None:
        tiles = tiles_of(tree, size=_TILE, reach=reach)
        self._keys = [torch.from_numpy(group.keys).to(device) for group in tiles.groups]
        self._visible = [visible_keys(tiles, group, size=_TILE, device=device) for group in tiles.groups]
        self._masks: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._places = torch.from_numpy(_places(tiles.groups, len(tree))).to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        shared = query.shape[1] // key.shape[1]
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
    """The mask to add to scores [tiles, 1, shared * rows, keys]: -inf for a key that a row does not see."""
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
    tiles = [bounds for group in groups for bounds in zip(group.starts, group.ends, strict=True)]
    for tile, (start, end) in enumerate(tiles):
        found[start:end] = tile * _TILE + np.arange(end - start)
    return found


class _See(torch.autograd.Function):
    """The rows [rows, heads, size] that each tile sees, [tiles, seen, heads, size]. A row's gradients from many tiles are summed in
    float32 or wider."""

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
    """Rows [rows, width] into their places of [total, width], zeros elsewhere. No two rows share a place, so the gradient needs no
    sum, and nothing but the places is kept for it (torch's `index_copy` keeps the rows)."""

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
