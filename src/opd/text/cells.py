"""What two vocabularies have in common: cells of tokens that begin with the same bytes.

A token that both have is a cell. One that a single side has lies in the cell of its longest beginning that both have: a
teacher's "the" counts for the "th" with which a student without it starts that word. Ending the turn is a cell of its own, and
tokens that are no text lie in the last one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd.text.token_bytes import TokenBytes


@dataclass(frozen=True)
class Cells:
    """student [ids], teacher [teacher ids]: the cell of each id, int64; the last of `num` cells is for what has none, the one
    before it for ending the turn. student_whole, teacher_whole: whether the id is all that its cell begins with."""

    student: np.ndarray
    teacher: np.ndarray
    num: int
    student_whole: np.ndarray
    teacher_whole: np.ndarray

    def same(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> np.ndarray:
        """Which pairs of tokens are one and the same on both sides, [pairs] bool."""
        whole = self.student_whole[student_ids] & self.teacher_whole[teacher_ids]
        return whole & (self.student[student_ids] == self.teacher[teacher_ids])


def common_cells(
    student: TokenBytes, student_ends: Sequence[int], teacher: TokenBytes, teacher_ends: Sequence[int]
) -> Cells:
    """The cells of two vocabularies; `.._ends` are the ids that end a turn."""
    sides = ((student, student_ends), (teacher, teacher_ends))
    spelled = [_spelled(table, ends) for table, ends in sides]
    both = sorted(set(spelled[0].values()) & set(spelled[1].values()))
    number = {raw: cell for cell, raw in enumerate(both)}
    end, none = len(number), len(number) + 1
    cells, whole = [], []
    for (table, ends), mine in zip(sides, spelled, strict=True):
        found = np.full(len(table), none, dtype=np.int64)
        for index, raw in mine.items():
            found[index] = _longest(raw, number, none)
        found[list(ends)] = end
        cells.append(found)
        whole.append(np.array([mine.get(i) in number for i in range(len(table))]) | (found == end))
    return Cells(cells[0], cells[1], none + 1, whole[0], whole[1])


def _spelled(table: TokenBytes, ends: Sequence[int]) -> dict[int, bytes]:
    """The bytes of every id that writes text."""
    apart = table.control | table.unknown | np.isin(np.arange(len(table)), list(ends))
    return {i: raw for i in np.flatnonzero(~apart).tolist() if (raw := table.of(i))}


def _longest(raw: bytes, number: Mapping[bytes, int], none: int) -> int:
    """The cell of the longest beginning that has one."""
    for stop in range(len(raw), 0, -1):
        if raw[:stop] in number:
            return number[raw[:stop]]
    return none
