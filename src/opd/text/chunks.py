"""Two tokenizations of one text, cut into the smallest chunks with equal bytes on both sides.

A chunk ends where a student token and a teacher token end at the same byte. Its log ratio is log q(chunk) - log pi(chunk), and
the log ratios of all chunks add up to that of the text. Tokens are byte spans here; nothing reads strings.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Chunks:
    """The chunk of each token of both sides, numbered from 0 in order.

    student [student tokens], teacher [teacher tokens]: int64; ends [chunks]: the byte at which each chunk ends.
    """

    student: np.ndarray
    teacher: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of student tokens and of teacher tokens in each chunk, [chunks]."""
        ours, theirs = (np.bincount(side[side >= 0], minlength=len(self)) for side in (self.student, self.teacher))
        return ours, theirs

    def sizes(self) -> np.ndarray:
        """Bytes a chunk, [chunks]."""
        return np.diff(self.ends, prepend=0)


def align(student_ends: np.ndarray, teacher_ends: np.ndarray) -> Chunks:
    """The finest common partition of two tokenizations of the same bytes.

    student_ends, teacher_ends: the byte at which each token ends, not falling; the last one of both is the length of the text.
    A token without bytes belongs to the chunk that starts at its place, or, at the end of the text, to the last chunk. Several
    sequences can be aligned in one call when the ends of each continue those of the one before.
    Raises ValueError when the two sides do not end at the same byte. O(student tokens + teacher tokens).
    """
    if len(student_ends) == 0 or len(teacher_ends) == 0 or student_ends[-1] != teacher_ends[-1]:
        last = [int(ends[-1]) if len(ends) else 0 for ends in (student_ends, teacher_ends)]
        raise ValueError(f"the student's tokens end at byte {last[0]}, the teacher's at {last[1]}: not the same text")
    total = int(student_ends[-1])
    # One mark a byte is linear, and several times faster than merging two sorted lists in numpy.
    marks = np.zeros(total + 1, dtype=np.uint8)
    marks[student_ends] = 1
    marks[teacher_ends] += marks[teacher_ends] == 1
    cut = marks == 2
    cut[0] = False
    before = np.concatenate([[0], np.cumsum(cut[:-1])])  # cuts strictly before a byte
    ends = np.flatnonzero(cut)
    return Chunks(_places(student_ends, before, len(ends)), _places(teacher_ends, before, len(ends)), ends)


def _places(ends: np.ndarray, cuts_before: np.ndarray, num_chunks: int) -> np.ndarray:
    """The chunk of each token, by the byte at which it ends; a token without bytes is in the chunk that starts there."""
    found = cuts_before[ends]
    empty = np.diff(ends, prepend=0) == 0
    if empty.any():
        starts_one = np.append(cuts_before, num_chunks)[ends + 1]  # cuts up to and with this byte
        found = np.where(empty, np.minimum(starts_one, num_chunks - 1), found)
    return found


@dataclass(frozen=True)
class Folded:
    """The tokens of a text over some of its blocks of bytes, joined.

    ends [tokens]: the byte of the joined blocks at which each token ends, not falling; inside [tokens] bool: the token has bytes in
    a block; torn [tokens] bool: it also has bytes outside, or in two blocks.
    """

    ends: np.ndarray
    inside: np.ndarray
    torn: np.ndarray


def fold(ends: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Folded:
    """Tokens that end at these bytes, over the blocks [starts, starts + sizes), which are in order and do not overlap.

    A token without bytes is inside where the next byte is in a block, or, at the end of the text, the last byte.
    """
    if not len(starts) or not len(ends):
        nothing = np.zeros(len(ends), dtype=bool)
        return Folded(np.zeros(len(ends), dtype=np.int64), nothing, nothing)
    before = np.concatenate([[0], np.cumsum(sizes)])

    def block(places: np.ndarray) -> np.ndarray:
        return np.searchsorted(starts, places, side="right") - 1

    def folded(places: np.ndarray) -> np.ndarray:
        k = block(places)
        return np.where(k < 0, 0, before[k] + np.minimum(places - starts[k], sizes[k]))

    begins = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths, covered = ends - begins, folded(ends) - folded(begins)
    within = (block(begins) >= 0) & (begins < starts[block(begins)] + sizes[block(begins)])
    last = (begins == ends[-1]) & (starts[-1] + sizes[-1] == ends[-1])
    inside = np.where(lengths == 0, within | last, covered > 0)
    torn = inside & ((covered < lengths) | ((lengths > 0) & (block(begins) != block(ends - 1))))
    return Folded(folded(ends), inside, torn)
