"""The KV cache of sequences that grow by a token a pass, one row each."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SPARE = 64  # places that a row gets beyond what it needs, so that buffers are seldom made anew


class KVCache:
    """The KV cache of sequences that grow by a token a pass: rows of tokens, each at the left of its buffer. It is also the plan of
    a pass with one new token a row, which sees all of its row.

    Buffers [rows, key heads, places, size] grow by half when they are full. Rows are numbered from 0 without gaps.
    """

    def __init__(self, device: torch.device) -> None:
        self.lengths: list[int] = []
        self._device = device
        self._buffers: dict[tuple[int, str], Tensor] = {}  # by layer, and "key" or "value"
        self._which = torch.empty(0)
        self._at = torch.empty(0)
        self._mask = torch.empty(0)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_filled(self) -> bool:
        """Whether any layer has given it keys and values."""
        return bool(self._buffers)

    def add(self, kept: Mapping[int, tuple[Tensor, Tensor]], paths: Sequence[np.ndarray]) -> None:
        """Append a row for each path through the nodes of a pass whose keys and values [nodes, key heads, size] were kept."""
        first, longest = len(self), max(map(len, paths))
        index = np.zeros((len(paths), longest), dtype=np.int64)
        for row, path in enumerate(paths):
            index[row, : len(path)] = path
        where = torch.from_numpy(index).to(self._device)
        self.lengths += map(len, paths)
        for layer, (keys, values) in kept.items():
            for name, nodes in (("key", keys), ("value", values)):
                buffer = self._reserved((layer, name), nodes, longest)
                buffer[first : len(self), :, :longest] = nodes[where].transpose(1, 2)

    def copy(self, row: int) -> None:
        """Append a copy of a row."""
        length = self.lengths[row]
        self.lengths.append(length)
        for name, buffer in self._buffers.items():
            whole = self._reserved(name, buffer.transpose(1, 2)[0], length)
            whole[len(self) - 1, :, :length] = whole[row, :, :length]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        length = self.lengths.pop()
        if row < len(self):
            for whole in self._buffers.values():
                whole[row, :, :length] = whole[len(self), :, :length]
            self.lengths[row] = length

    def begin(self) -> Tensor:
        """Make room for one more token a row; returns their positions [rows]."""
        at = torch.tensor(self.lengths)
        width = int(at.max()) + 1
        for name, buffer in self._buffers.items():
            self._reserved(name, buffer.transpose(1, 2)[0], width)
        dtype = next(iter(self._buffers.values())).dtype
        hidden = torch.arange(width) > at[:, None]
        self._mask = torch.zeros(len(self), 1, 1, width, dtype=dtype).masked_fill_(hidden[:, None, None], -torch.inf)
        self._mask, self._at = self._mask.to(self._device), at.to(self._device)
        self._which = torch.arange(len(self), device=self._device)
        self.lengths = [length + 1 for length in self.lengths]
        return self._at

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [rows, heads, 1, size], key and value [rows, key heads, 1, size] -> [rows, 1, heads, size]."""
        rows, heads, width = len(self), key.shape[1], self._mask.shape[-1]
        keys, values = self._buffers[layer, "key"], self._buffers[layer, "value"]
        keys[self._which, :, self._at] = key[:, :, 0]
        values[self._which, :, self._at] = value[:, :, 0]
        # The heads that share a key head are rows of it.
        shared = query.reshape(rows, heads, -1, query.shape[-1]).contiguous()
        mask = self._mask.expand(rows, 1, shared.shape[2], width)
        found = F.scaled_dot_product_attention(
            shared, keys[:rows, :, :width], values[:rows, :, :width], attn_mask=mask, scale=scale
        )
        return found.reshape(rows, 1, -1, found.shape[-1])

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
