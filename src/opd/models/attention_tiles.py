"""Which nodes of a prefix tree a stretch of them attends to: attention at the cost of what is seen, not of all pairs.

A tile is a stretch of consecutive nodes. Its keys are the nodes that any of them sees: the tile itself, and the ancestors of
what begins or goes on in it. Tiles begin where branches do, unless several short branches fit into one. Tiles that see about as
much are done together, padded to the widest of them.
"""

from dataclasses import dataclass

import numpy as np

from opd.models.prefix_tree import TokenTree

_SLACK = 0.75  # a tile joins a group when it sees at least this share of what the group's widest tile sees


@dataclass(frozen=True)
class TileGroup:
    """Tiles that are done together.

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
    first_of_run = _runs(tree.parents)
    cuts = _cuts(first_of_run, size)
    seen = [_tile(tree.parents, first_of_run, start, end) for start, end in cuts]
    order = sorted(range(len(seen)), key=lambda i: -len(seen[i][0]))
    groups: list[list[int]] = []
    for i in order:
        if not groups or len(seen[i][0]) < _SLACK * len(seen[groups[-1][0]][0]):
            groups.append([])
        groups[-1].append(i)
    return [_group(sorted(members), cuts, seen, size) for members in groups]


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


def _runs(parents: np.ndarray) -> np.ndarray:
    """For each node, the first of the unbroken line of nodes, each the parent of the next, that leads to it."""
    breaks = np.flatnonzero(parents != np.arange(len(parents)) - 1)
    starts = np.concatenate([[0], breaks])
    return np.repeat(starts, np.diff(np.concatenate([starts, [len(parents)]])))


def _tile(parents: np.ndarray, first_of_run: np.ndarray, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(keys, visible [nodes of the tile, keys]) of one tile."""
    begins = [start, *(n for n in range(start + 1, end) if first_of_run[n] == n)]
    lines = [_line(parents, first_of_run, int(parents[n])) for n in begins]
    keys = np.unique(np.concatenate([*lines, np.arange(start, end)]))
    visible = np.zeros((end - start, len(keys)), dtype=bool)
    for begin, stop, line in zip(begins, [*begins[1:], end], lines, strict=True):
        nodes = np.arange(begin, stop)
        visible[begin - start : stop - start] = np.isin(keys, line) | ((keys >= begin) & (keys <= nodes[:, None]))
    return keys, visible


def _line(parents: np.ndarray, first_of_run: np.ndarray, node: int) -> np.ndarray:
    """A node and its ancestors; none for -1."""
    found = [np.zeros(0, dtype=np.int64)]
    while node >= 0:
        found.append(np.arange(first_of_run[node], node + 1))
        node = int(parents[first_of_run[node]])
    return np.concatenate(found)


def _group(
    members: list[int], cuts: list[tuple[int, int]], seen: list[tuple[np.ndarray, np.ndarray]], size: int
) -> TileGroup:
    width = max(len(seen[i][0]) for i in members)
    keys = np.zeros((len(members), width), dtype=np.int64)
    visible = np.zeros((len(members), size, width), dtype=bool)
    for row, i in enumerate(members):
        mine, sees = seen[i]
        keys[row, : len(mine)] = mine
        visible[row, : len(sees), : len(mine)] = sees
        visible[row, len(sees) :, 0] = True
    starts, ends = np.array([cuts[i] for i in members], dtype=np.int64).T
    return TileGroup(starts, ends, keys, visible)
