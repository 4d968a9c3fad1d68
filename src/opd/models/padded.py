"""Padded passes: one row for each sequence through a model's own forward pass, for models that packed passes are wrong for.

Nothing that a causal model computes of a token depends on what stands behind it, so rows are padded at their ends and need no
mask. Recurrent state never flows from one sequence into another, since every row is a sequence. Shared prefixes are computed once
for each row.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opd.errors import ModelError
from opd.models.packing import TokenTree

# Where the output of a model keeps its cache, and the argument that takes it again; the later names are those of transformers
# before 5.24.
_CACHES = ("cache", "past_key_values", "cache_params")


def rows_of(tree: TokenTree) -> tuple[np.ndarray, np.ndarray]:
    """(token ids [rows, longest], the row that holds each node [nodes]), both int64; a node stands at its position.

    A sequence that ends within another one needs no row. Behind the end of a row stands token 0.
    """
    row_of = np.full(len(tree), -1)
    kept: list[np.ndarray] = []
    for path in sorted(tree.paths, key=len, reverse=True):
        if len(path) and row_of[path[-1]] < 0:
            row_of[path] = len(kept)
            kept.append(path)
    token_ids = np.zeros((len(kept), max(map(len, kept), default=0)), dtype=np.int64)
    for row, path in zip(token_ids, kept, strict=True):
        row[: len(path)] = tree.token_ids[path]
    return token_ids, row_of


def hidden_states(backbone: nn.Module, tree: TokenTree, device: torch.device) -> Tensor:
    """The final hidden states [nodes, hidden] of a tree, by one row for each of its longest paths."""
    token_ids, row_of = rows_of(tree)
    found = backbone(torch.from_numpy(token_ids).to(device), use_cache=False).last_hidden_state
    where = (torch.from_numpy(a).to(device) for a in (row_of, tree.positions))
    return found[tuple(where)]


@dataclass(eq=False)
class _Group:
    """Sequences of one length, and the cache that the model made of its `rows` rows, which the output and the argument call
    `name`."""

    name: str
    cache: Any
    rows: int
    length: int


class PaddedCache:
    """The caches of sequences that grow by a token a pass, in groups of one length, so that no row needs padding.

    Rows are numbered from 0 without gaps. Copying and dropping rows is bookkeeping; the next pass selects the rows of each cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[tuple[_Group, int]] = []  # of each row: its group and its row in the group's cache

    def __len__(self) -> int:
        return len(self._rows)

    def copy(self, row: int) -> None:
        """Append a copy of a row."""
        self._rows.append(self._rows[row])

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def prefill(self, backbone: nn.Module, sequences: Sequence[Sequence[int]], *, max_tokens: int) -> Tensor:
        """Append a row for each sequence; returns the hidden states [sequences, hidden] after the last token of each."""
        found: list[Tensor | None] = [None] * len(sequences)
        rows: list[tuple[_Group, int] | None] = [None] * len(sequences)
        for members in _of_one_length(sequences, max_tokens):
            ids = torch.tensor([list(sequences[i]) for i in members], device=self._device)
            output = backbone(ids, use_cache=True)
            name = next((name for name in _CACHES if getattr(output, name, None) is not None), None)
            if name is None:
                raise ModelError(
                    f"{type(backbone).__name__} returns no cache, so opd cannot sample from it; use another model (a teacher of "
                    "this kind can run behind a server: teachers.NAME.url)"
                )
            group = _Group(name, getattr(output, name), len(members), ids.shape[1])
            for place, (i, state) in enumerate(zip(members, output.last_hidden_state[:, -1], strict=True)):
                found[i], rows[i] = state, (group, place)
        self._rows += [row for row in rows if row is not None]
        return torch.stack([state for state in found if state is not None])

    def decode(self, backbone: nn.Module, token_ids: Sequence[int]) -> Tensor:
        """One more token for each row; returns the hidden states [rows, hidden] after it."""
        counted = "position_ids" in inspect.signature(backbone.forward).parameters
        groups: dict[_Group, list[int]] = {}
        for row, (group, _) in enumerate(self._rows):
            groups.setdefault(group, []).append(row)
        found: list[Tensor | None] = [None] * len(self._rows)
        for group, rows in groups.items():
            wanted = [self._rows[row][1] for row in rows]
            if wanted != list(range(group.rows)):
                _select(group.cache, torch.tensor(wanted, device=self._device))
            ids = torch.tensor([[token_ids[row]] for row in rows], device=self._device)
            options: dict[str, Any] = {group.name: group.cache}
            if counted:  # some models do not count from their cache
                options["position_ids"] = torch.full_like(ids, group.length)
            output = backbone(ids, use_cache=True, **options)
            group.cache, group.rows, group.length = getattr(output, group.name), len(rows), group.length + 1
            for place, (row, state) in enumerate(zip(rows, output.last_hidden_state[:, -1], strict=True)):
                self._rows[row], found[row] = (group, place), state
        return torch.stack([state for state in found if state is not None])


def _select(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache, in this order; a row may come twice."""
    cache.reorder_cache(rows)
    states = getattr(cache, "linear_cache", [])  # which MiniMax keeps beside its layers
    states[:] = [state.index_select(0, rows) if isinstance(state, Tensor) else state for state in states]


def _of_one_length(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Which sequences go through a pass together: those of one length, as many as `max_tokens` allows, at least one."""
    by_length: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(i)
    found = []
    for length, members in by_length.items():
        size = max(1, max_tokens // max(1, length))
        found += [members[start : start + size] for start in range(0, len(members), size)]
    return found
