"""Micro-batches: what one packed forward pass holds, and where its actions are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opd.models.prefix_tree import TokenTree, pack_trees


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed into one tree, and their actions in order (sequence by sequence, token by token).

    members: which sequences; states [actions]: the node whose hidden state predicts each action; targets [actions]: the
    action's token id; owners [actions]: its sequence's place in the whole batch; places [actions]: its place within its
    sequence.
    """

    members: tuple[int, ...]
    tree: TokenTree
    states: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    places: np.ndarray


def micro_batches(
    sequences: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray], *, max_tokens: int
) -> Iterator[MicroBatch]:
    """Split sequences into packed trees of at most `max_tokens` tokens, each sequence with an action in exactly one.

    A sequence's first token is never an action: nothing precedes it. A sequence without an action needs no pass.
    """
    asked = [i for i, mask in enumerate(loss_masks) if mask.any()]
    for packed, tree in pack_trees([sequences[i].tolist() for i in asked], max_tokens=max_tokens):
        members = [asked[i] for i in packed]
        places = [np.flatnonzero(loss_masks[m]) for m in members]
        assert all(p.size == 0 or p[0] > 0 for p in places)
        yield MicroBatch(
            members=tuple(members),
            tree=tree,
            states=_join([path[p - 1] for path, p in zip(tree.paths, places, strict=True)]),
            targets=_join([np.asarray(sequences[m])[p] for m, p in zip(members, places, strict=True)]),
            owners=_join([np.full(len(p), m) for m, p in zip(members, places, strict=True)]),
            places=_join(places),
        )


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)
