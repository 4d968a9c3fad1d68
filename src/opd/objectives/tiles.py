"""Logits of a few states at a time: the products of hidden states with heads, in buffers that are used again.

A buffer of [states, vocab] that is made anew for every tile costs a CPU as much in fresh memory pages as a pass over it, and
passes over a whole tile cost what they read from memory; `blocks` are small enough to stay in a cache between passes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_COLUMNS = 4096  # of the vocabulary in one product: with more, a CPU's product leaves its cache
_STATES = 256  # of one tile: with fewer, its products read the head too often; more would only need more memory,
_MANY = 8  # unless there are so many tiles: then twice as many states, which is 6 % faster, are no larger share of all memory
_ROUND = 64  # states, where they must be fewer; products of other numbers of rows are slower
_BLOCK = 2**19  # logits


def tiles(pairs: Sequence[tuple[Tensor, Tensor]], *, max_logits: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """For each stretch of states (their slice, each model's logits [states, vocab]), to be used before the next is asked for.

    pairs: a model's hidden [states, width] and head [vocab, width] each. Of one model at most `max_logits` logits exist, one state
    at least. Without gradients.
    """
    num_states = len(pairs[0][0])
    most = max(1, max_logits // max(len(head) for _, head in pairs))
    wanted = min(max(_STATES, num_states // _MANY // _ROUND * _ROUND), 2 * _STATES)
    size = min(num_states, wanted, most // _ROUND * _ROUND or most)
    sharing = _sharing([head for _, head in pairs])
    buffers = [head.new_empty(len(members) * size, len(head)) for head, members in sharing]
    for start in range(0, num_states, size or 1):
        rows = slice(start, min(start + size, num_states))
        found: dict[int, Tensor] = {}
        for (head, members), buffer in zip(sharing, buffers, strict=True):
            hidden = torch.cat([pairs[i][0][rows].detach() for i in members])
            out = buffer[: len(hidden)]
            _product(hidden, head.detach(), out)
            found |= zip(members, out.split(rows.stop - rows.start), strict=True)
        yield rows, [found[i] for i in range(len(pairs))]


def _sharing(heads: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """Each head once, and which models have it: their states go through it together, so it is read once."""
    found: dict[tuple[object, ...], tuple[Tensor, list[int]]] = {}
    for i, head in enumerate(heads):
        key = (head.data_ptr(), head.shape, head.stride(), head.dtype)
        found.setdefault(key, (head, []))[1].append(i)
    return list(found.values())


def blocks(rows: slice, widest: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """A tile's states, a few at a time: (where they are in the tile, which states they are)."""
    count = rows.stop - rows.start
    size = max(1, _BLOCK // widest) if device.type == "cpu" else count
    for start in range(0, count, size):
        stop = min(start + size, count)
        yield slice(start, stop), slice(rows.start + start, rows.start + stop)


def soft_capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(c tanh(logits / c), its slope 1 - tanh^2), both float32 or wider; without a cap the logits and None."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is None:
        return logits, None
    bent = (logits / softcap).tanh_()
    return bent * softcap, 1.0 - bent.square()


def _product(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """hidden @ head.T into `out`."""
    columns = _COLUMNS if head.device.type == "cpu" else len(head)
    for start in range(0, len(head), columns):
        torch.mm(hidden, head[start : start + columns].T, out=out[:, start : start + columns])
