"""Prefix trees: sequences that share a prefix hold it once.

Samples of one prompt share the prompt, and every chat shares its template's head. A batch of sequences is packed as one
tree of tokens; a token attends to its ancestors only, at the position of its depth, so every path through the tree gives
the same numbers as the sequence alone, at the cost of the distinct tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenTree:
    """A packed set of sequences.

    token_ids, parents, positions: [nodes] int64, a parent before its children, -1 above a root; paths: for every
    sequence the nodes of its tokens in order. Sequences [5, 6, 7] and [5, 6, 8] give token_ids [5, 6, 7, 8],
    parents [-1, 0, 1, 1], positions [0, 1, 2, 2], paths ([0, 1, 2], [0, 1, 3]).
    """

    token_ids: np.ndarray
    parents: np.ndarray
    positions: np.ndarray
    paths: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


class _Builder:
    def __init__(self) -> None:
        self.children: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.paths: list[np.ndarray] = []

    def num_new(self, sequence: Sequence[int]) -> int:
        """How many nodes `add` would make."""
        node = -1
        for depth, token in enumerate(sequence):
            child = self.children.get((node, token))
            if child is None:
                return len(sequence) - depth
            node = child
        return 0

    def add(self, sequence: Sequence[int]) -> None:
        node, path = -1, []
        for depth, token in enumerate(sequence):
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.positions.append(depth)
            node = child
            path.append(node)
        self.paths.append(np.array(path, dtype=np.int64))

    def build(self) -> TokenTree:
        arrays = (np.array(a, dtype=np.int64) for a in (self.tokens, self.parents, self.positions))
        return TokenTree(*arrays, paths=tuple(self.paths))


def pack_trees(sequences: Sequence[Sequence[int]], *, max_tokens: int) -> list[tuple[list[int], TokenTree]]:
    """Pack sequences, in order, into trees of at most `max_tokens` nodes each.

    Returns (indices of the sequences in this tree, the tree) for each; every sequence is in exactly one tree. One that
    is longer than `max_tokens` by itself gets a tree of its own.
    """
    trees: list[tuple[list[int], TokenTree]] = []
    builder, members = _Builder(), []
    for index, sequence in enumerate(sequences):
        tokens = [int(t) for t in sequence]
        if members and len(builder.tokens) + builder.num_new(tokens) > max_tokens:
            trees.append((members, builder.build()))
            builder, members = _Builder(), []
        builder.add(tokens)
        members.append(index)
    if members:
        trees.append((members, builder.build()))
    return trees
