"""What two vocabularies have in common: cells of tokens that begin with the same bytes.

A token that both have is a cell. One that a single side has lies in the cell of its longest beginning that both have: a
teacher's "the" counts for the "th" with which a student without it starts that word. A tag of both, under whatever spelling, is
a cell of its own, and so is ending the turn; other tokens that are no text lie in the last cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd.text.token_bytes import TokenBytes


@dataclass(frozen=True)
class SharedVocabulary:
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


def shared_vocabulary(
    student: TokenBytes,
    student_ends: Sequence[int],
    teacher: TokenBytes,
    teacher_ends: Sequence[int],
    tags: Mapping[int, str] | None = None,
) -> SharedVocabulary:
    """The cells of two vocabularies; `.._ends` are the ids that end a turn, `tags` the student's tags and how the teacher writes
    them (`opd.text.special_tags.counterparts`)."""
    id_of = {literal: index for index, literal in teacher.added.items()}
    pairs = [(ours, id_of[literal]) for ours, literal in (tags or {}).items()]
    apart = ([*student_ends, *(ours for ours, _ in pairs)], [*teacher_ends, *(theirs for _, theirs in pairs)])
    sides = ((student, student_ends), (teacher, teacher_ends))
    spelled = [_spelled(table, ids) for (table, _), ids in zip(sides, apart, strict=True)]
    both = sorted(set(spelled[0].values()) & set(spelled[1].values()))
    number = {raw: cell for cell, raw in enumerate(both)}
    tag_cell = {theirs: len(number) + k for k, theirs in enumerate(dict.fromkeys(theirs for _, theirs in pairs))}
    end = len(number) + len(tag_cell)
    none = end + 1
    cells, whole = [], []
    tagged = ({ours: tag_cell[theirs] for ours, theirs in pairs}, tag_cell)
    for (table, ends), mine, tags_here in zip(sides, spelled, tagged, strict=True):
        found = np.full(len(table), none, dtype=np.int64)
        for index, raw in mine.items():
            found[index] = _longest(raw, number, none)
        for index, cell in tags_here.items():
            found[index] = cell
        found[list(ends)] = end
        cells.append(found)
        plain = np.array([mine.get(i) in number for i in range(len(table))])
        whole.append(plain | ((found >= len(number)) & (found <= end)))
    return SharedVocabulary(cells[0], cells[1], none + 1, whole[0], whole[1])


def _spelled(table: TokenBytes, others: Sequence[int]) -> dict[int, bytes]:
    """The bytes of every id that writes text; `others` do not."""
    apart = table.control | table.unknown | np.isin(np.arange(len(table)), list(others))
    return {i: raw for i in np.flatnonzero(~apart).tolist() if (raw := table.of(i))}


def _longest(raw: bytes, number: Mapping[bytes, int], none: int) -> int:
    """The cell of the longest beginning that has one."""
    for stop in range(len(raw), 0, -1):
        if raw[:stop] in number:
            return number[raw[:stop]]
    return none
