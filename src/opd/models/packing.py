"""Packing: sequences that share a prefix hold it once, and forward passes hold a limited number of tokens.

Samples of one prompt share the prompt, and all chats share the first tokens of their template. A batch of sequences is packed as
a tree of tokens. A token attends to its ancestors only, at the position of its depth, so every path through the tree gives the
same numbers as the sequence alone, at the cost of the distinct tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike

# Few are enough: passes over the same tokens follow each other (parts of a teacher, student scores, epochs of an update).
_KEPT = 4


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A packed set of sequences.

    token_ids, parents, positions: [nodes] int64, a parent before its children, -1 above a root; paths: for every
    sequence the nodes of its tokens in order, [tokens] int64. Sequences [5, 6, 7] and [5, 6, 8] give token_ids [5, 6, 7, 8],
    parents [-1, 0, 1, 1], positions [0, 1, 2, 2], paths ([0, 1, 2], [0, 1, 3]).
    """

    token_ids: np.ndarray
    parents: np.ndarray
    positions: np.ndarray
    paths: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def depths(self) -> np.ndarray:
        """How many nodes lie above each, [nodes] int64: its place in every sequence that goes through it."""
        found = np.zeros(len(self), dtype=np.int64)
        for path in self.paths:
            found[path] = np.arange(len(path))
        return found


class _Builder:
    """A tree that grows sequence by sequence. Each addition is one run: new nodes with consecutive numbers, each the parent of
    the next."""

    def __init__(self) -> None:
        self.num_nodes = 0
        self._runs: dict[tuple[int, int], tuple[int, np.ndarray]] = {}  # (parent, first token) -> (first node, tokens)
        self._parents: list[int] = []  # above each run
        self._depths: list[int] = []  # of each run's first node
        self._paths: list[np.ndarray] = []

    def shared(self, sequence: np.ndarray) -> np.ndarray:
        """The nodes that already hold the first tokens of a sequence, in order."""
        node, depth, found = -1, 0, [np.zeros(0, dtype=np.int64)]
        while depth < len(sequence):
            run = self._runs.get((node, int(sequence[depth])))
            if run is None:
                break
            first, tokens = run
            length = min(len(tokens), len(sequence) - depth)
            differs = np.flatnonzero(tokens[:length] != sequence[depth : depth + length])
            same = int(differs[0]) if len(differs) else length
            found.append(np.arange(first, first + same))
            node, depth = first + same - 1, depth + same
        return np.concatenate(found)

    def add(self, sequence: np.ndarray, shared: np.ndarray) -> None:
        """Add a sequence, given the nodes that it shares (`shared`)."""
        new, first = sequence[len(shared) :], self.num_nodes
        if len(new):
            parent = int(shared[-1]) if len(shared) else -1
            self._runs[parent, int(new[0])] = (first, new)
            self._parents.append(parent)
            self._depths.append(len(shared))
            self.num_nodes += len(new)
        self._paths.append(np.concatenate([shared, np.arange(first, self.num_nodes)]))

    def build(self) -> TokenTree:
        runs = list(self._runs.values())  # in the order of their nodes
        token_ids = np.concatenate([np.zeros(0, dtype=np.int64), *(tokens for _, tokens in runs)])
        parents = np.arange(-1, self.num_nodes - 1)
        positions = np.arange(self.num_nodes)
        for (first, tokens), parent, depth in zip(runs, self._parents, self._depths, strict=True):
            parents[first] = parent
            positions[first : first + len(tokens)] += depth - first
        return TokenTree(token_ids, parents, positions, tuple(self._paths))


def pack_trees(
    sequences: Sequence[ArrayLike], *, max_tokens: int, padded: bool = False
) -> list[tuple[list[int], TokenTree]]:
    """Pack sequences, in order, into trees of at most `max_tokens` nodes each; padded: of at most as many tokens where each
    sequence is a row as long as the longest.

    Returns (indices of the sequences in this tree, the tree) for each; every sequence is in exactly one tree. One that
    is longer than `max_tokens` by itself gets a tree of its own.
    """
    trees: list[tuple[list[int], TokenTree]] = []
    builder, members, longest = _Builder(), [], 0
    for index, each in enumerate(sequences):
        sequence = np.asarray(each, dtype=np.int64)
        shared = builder.shared(sequence)
        rows = (len(members) + 1) * max(longest, len(sequence))
        if members and (rows if padded else builder.num_nodes + len(sequence) - len(shared)) > max_tokens:
            trees.append((members, builder.build()))
            builder, members, longest = _Builder(), [], 0
            shared = shared[:0]
        longest = max(longest, len(sequence))
        builder.add(sequence, shared)
        members.append(index)
    if members:
        trees.append((members, builder.build()))
    return trees


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, packed into one tree, and their actions in order (sequence by sequence, token by token).

    members: which sequences; states [actions]: the node whose hidden state predicts each action; targets [actions]: the
    action's token id; owners [actions]: its sequence's place in the whole batch; places [actions]: its place within its
    sequence. All int64.
    """

    members: tuple[int, ...]
    tree: TokenTree
    states: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    places: np.ndarray

    def by_member(self, values: np.ndarray) -> list[np.ndarray]:
        """Values [actions, ...] cut into those of each member, in the order of `members`."""
        return np.split(values, np.flatnonzero(np.diff(self.owners)) + 1)


def micro_batches(
    sequences: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray], *, max_tokens: int, padded: bool = False
) -> tuple[MicroBatch, ...]:
    """Split sequences into packed trees of at most `max_tokens` tokens, each sequence with an action in exactly one.

    padded: for passes of one row for each sequence; padding counts as tokens.

    A sequence's first token is never an action: nothing precedes it. A sequence without an action needs no pass. The packings of
    the last few calls are kept, so that the same tokens with the same actions are packed once; callers must not write into them.
    """
    tokens = tuple(np.asarray(s, dtype=np.int64).tobytes() for s in sequences)
    masks = tuple(np.asarray(m, dtype=bool).tobytes() for m in loss_masks)
    return _packed(tokens, masks, max_tokens, padded)


@lru_cache(maxsize=_KEPT)
def _packed(
    tokens: tuple[bytes, ...], masks: tuple[bytes, ...], max_tokens: int, padded: bool
) -> tuple[MicroBatch, ...]:
    """`micro_batches` of the bytes of sequences [tokens] int64 and masks [tokens] bool."""
    sequences = [np.frombuffer(each, dtype=np.int64) for each in tokens]
    actions = [np.flatnonzero(np.frombuffer(each, dtype=bool)) for each in masks]
    needed = [i for i, places in enumerate(actions) if len(places)]
    found = []
    for packed, tree in pack_trees([sequences[i] for i in needed], max_tokens=max_tokens, padded=padded):
        members = [needed[i] for i in packed]
        places = [actions[m] for m in members]
        assert all(p[0] > 0 for p in places)
        found.append(
            MicroBatch(
                members=tuple(members),
                tree=tree,
                states=np.concatenate([path[p - 1] for path, p in zip(tree.paths, places, strict=True)]),
                targets=np.concatenate([sequences[m][p] for m, p in zip(members, places, strict=True)]),
                owners=np.repeat(members, [len(p) for p in places]),
                places=np.concatenate(places),
            )
        )
    return tuple(found)
