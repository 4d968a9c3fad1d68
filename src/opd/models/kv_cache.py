"""The KV cache of sequences that grow by a token a pass, one row each."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opd.models.architecture import Reach
from opd.models.attention import Kept

_SPARE = 64  # places that a row gets beyond what it needs, so that buffers are seldom made anew


class KVCache:
    """The KV cache of sequences that grow by a token a pass: rows of tokens, each at the left of its buffer. It is also the plan of
    a pass with one new token a row, which sees its row as far back as the layer looks.

    Buffers [rows, key heads, places, size] grow by half when they are full. Where a layer has a window or chunks, its rows leave
    out tokens that none to come will see. Rows are numbered from 0 without gaps.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths: list[int] = []
        self._device = device
        self._buffers: dict[tuple[int, str], Tensor] = {}  # by layer, and "key" or "value"
        self._layers: dict[Reach | None, list[int]] = {}
        self._starts: dict[Reach | None, list[int]] = {}  # the first token of each row that its buffer holds
        self._which = torch.empty(0)
        self._at: dict[Reach | None, Tensor] = {}
        self._masks: dict[Reach | None, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_filled(self) -> bool:
        """Whether any layer has given it keys and values."""
        return bool(self._buffers)

    def add(self, kept: Mapping[int, Kept], paths: Sequence[np.ndarray]) -> None:
        """Append a row for each path through the nodes of a pass whose keys and values were kept."""
        first = len(self)
        self.lengths += map(len, paths)
        where: dict[Reach | None, Tensor] = {}
        for layer, (keys, values, reach) in kept.items():
            if reach not in where:
                starts = [_first_needed(reach, len(path)) for path in paths]
                held = [path[start:] for path, start in zip(paths, starts, strict=True)]
                index = np.zeros((len(paths), max(map(len, held))), dtype=np.int64)
                for row, nodes in zip(index, held, strict=True):
                    row[: len(nodes)] = nodes
                where[reach] = torch.from_numpy(index).to(self._device)
                self._starts.setdefault(reach, []).extend(starts)
            if layer not in self._layers.setdefault(reach, []):
                self._layers[reach].append(layer)
            places = where[reach].shape[1]
            for name, nodes in (("key", keys), ("value", values)):
                buffer = self._reserved((layer, name), nodes, places)
                buffer[first : len(self), :, :places] = nodes[where[reach]].transpose(1, 2)

    def copy(self, row: int) -> None:
        """Append a copy of a row."""
        self.lengths.append(self.lengths[row])
        for starts, names in self._by_reach():
            starts.append(starts[row])
            places = self.lengths[row] - starts[row]
            for name in names:
                whole = self._reserved(name, _nodes_like(self._buffers[name]), places)
                whole[len(self) - 1, :, :places] = whole[row, :, :places]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        length = self.lengths.pop()
        for starts, names in self._by_reach():
            start = starts.pop()
            if row < len(self):
                for name in names:
                    whole = self._buffers[name]
                    whole[row, :, : length - start] = whole[len(self), :, : length - start]
                starts[row] = start
        if row < len(self):
            self.lengths[row] = length

    def begin(self) -> Tensor:
        """Make room for one more token a row; returns their positions [rows]."""
        at = torch.tensor(self.lengths)
        for reach in self._layers:
            self._make_room(reach)
            starts = torch.tensor(self._starts[reach])
            places = torch.arange(int((at - starts).max()) + 1)
            hidden = places > (at - starts)[:, None]
            if reach is not None:
                hidden |= places + starts[:, None] < reach.first(at)[:, None]
            dtype = self._buffers[self._layers[reach][0], "key"].dtype
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self._masks[reach] = mask[:, None, None].to(self._device)
            self._at[reach] = (at - starts).to(self._device)
        self._which = torch.arange(len(self), device=self._device)
        self.lengths = [length + 1 for length in self.lengths]
        return at.to(self._device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, reach: Reach | None
    ) -> Tensor:
        """query [rows, heads, 1, size], key and value [rows, key heads, 1, size] -> [rows, 1, heads, size]."""
        rows, heads = len(self), key.shape[1]
        mask, at = self._masks[reach], self._at[reach]
        keys, values = self._buffers[layer, "key"], self._buffers[layer, "value"]
        keys[self._which, :, at] = key[:, :, 0]
        values[self._which, :, at] = value[:, :, 0]
        # The heads that share a key head are rows of it.
        shared = query.reshape(rows, heads, -1, query.shape[-1]).contiguous()
        width = mask.shape[-1]
        found = F.scaled_dot_product_attention(
            shared,
            keys[:rows, :, :width],
            values[:rows, :, :width],
            attn_mask=mask.expand(rows, 1, shared.shape[2], width),
            scale=scale,
        )
        return found.reshape(rows, 1, -1, found.shape[-1])

    def _by_reach(self) -> Iterator[tuple[list[int], list[tuple[int, str]]]]:
        """The starts of rows, and the names of the buffers that have them."""
        for reach in self._layers:
            yield self._starts[reach], self._names(reach)

    def _names(self, reach: Reach | None) -> list[tuple[int, str]]:
        return [(layer, part) for layer in self._layers[reach] for part in ("key", "value")]

    def _make_room(self, reach: Reach | None) -> None:
        """One place more for each row in the layers of one reach: where buffers are full, tokens that no more are seen go."""
        starts, names = self._starts[reach], self._names(reach)
        room = self._buffers[names[0]].shape[2]
        needed = max(length - start for length, start in zip(self.lengths, starts, strict=True)) + 1
        if reach is not None and needed > room:
            now = [max(start, _first_needed(reach, length)) for length, start in zip(self.lengths, starts, strict=True)]
            moved = torch.tensor(now) - torch.tensor(starts)
            index = (torch.arange(room) + moved[:, None]).clamp_(max=room - 1).to(self._device)[:, None, :, None]
            for name in names:
                buffer = self._buffers[name]
                buffer[: len(self)] = buffer[: len(self)].take_along_dim(index, dim=2)
            self._starts[reach] = now
            # room for some more tokens, or the next pass would move them again
            needed = max(length - start for length, start in zip(self.lengths, now, strict=True)) + _SPARE // 2
        for name in names:
            self._reserved(name, _nodes_like(self._buffers[name]), needed)

    def _reserved(self, name: tuple[int, str], like: Tensor, places: int) -> Tensor:
        """A buffer with room for all rows of this many places; `like` [any, key heads, size]."""
        old = self._buffers.get(name)
        rows, room = (0, 0) if old is None else (old.shape[0], old.shape[2])
        if old is not None and rows >= len(self) and room >= places:
            return old
        more_rows = rows if rows >= len(self) else max(len(self), rows * 3 // 2)
        more_room = room if room >= places else max(places + _SPARE, room * 3 // 2)
        # zeros: places not filled yet are hidden, but nan times 0 would not be 0
        new = like.new_zeros(more_rows, like.shape[1], more_room, like.shape[2])
        if old is not None:
            new[:rows, :, :room] = old
        self._buffers[name] = new
        return new


def _first_needed(reach: Reach | None, length: int) -> int:
    """The first token of a row that its next one, at place `length`, or a later one sees."""
    return 0 if reach is None else max(0, reach.first(length))


def _nodes_like(buffer: Tensor) -> Tensor:
    """A tensor [any, key heads, size] of the dtype and sizes of a buffer."""
    return buffer.transpose(1, 2)[0]
