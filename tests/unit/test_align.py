"""Two tokenisations cut where both end: against a plain search, and laws for any cuts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.text.chunks import align

# ends of tokens in a text of 12 bytes: any cuts, empty tokens too
cuts = st.lists(st.integers(0, 12), max_size=14).map(lambda c: np.array([*sorted(c), 12]))


def searched(student: np.ndarray, teacher: np.ndarray) -> list[int]:
    """Where both end, found one by one."""
    return sorted({int(e) for e in student} & {int(e) for e in teacher} - {0})


@given(cuts, cuts)
def test_chunks_end_where_both_tokenisations_end(student: np.ndarray, teacher: np.ndarray):
    assert align(student, teacher).ends.tolist() == searched(student, teacher)


@given(cuts, cuts)
def test_each_token_lies_within_its_chunk(student: np.ndarray, teacher: np.ndarray):
    found = align(student, teacher)
    starts = np.concatenate([[0], found.ends[:-1]])
    for ends, chunk in ((student, found.student), (teacher, found.teacher)):
        before = np.concatenate([[0], ends[:-1]])
        assert (starts[chunk] <= before).all()
        assert (ends <= found.ends[chunk]).all()
        assert (np.diff(chunk) >= 0).all()


@given(cuts, cuts)
def test_the_bytes_of_a_chunk_are_the_same_on_both_sides(student: np.ndarray, teacher: np.ndarray):
    found = align(student, teacher)
    for ends, chunk in ((student, found.student), (teacher, found.teacher)):
        sizes = np.bincount(chunk, weights=np.diff(ends, prepend=0), minlength=len(found))
        assert sizes.tolist() == found.sizes().tolist()


@given(cuts, cuts)
def test_the_partition_is_the_finest_one(student: np.ndarray, teacher: np.ndarray):
    found = align(student, teacher)
    ours, theirs = found.counts()
    assert (ours + theirs > 0).all()
    inner = {int(e) for e in student} & {int(e) for e in teacher}
    assert not [e for e in inner if e > 0 and e not in set(found.ends.tolist())]


@given(st.lists(st.tuples(cuts, cuts), min_size=1, max_size=5))
def test_many_sequences_at_once_are_each_by_itself(pairs: list[tuple[np.ndarray, np.ndarray]]):
    pairs = [(np.unique(a[a > 0]), np.unique(b[b > 0])) for a, b in pairs]  # no empty tokens at a seam
    seams = 12 * np.arange(len(pairs))
    joined = align(*(np.concatenate([p[k] + s for p, s in zip(pairs, seams, strict=True)]) for k in (0, 1)))
    alone = [align(*p) for p in pairs]
    firsts = np.concatenate([[0], np.cumsum([len(a) for a in alone])[:-1]])
    assert joined.student.tolist() == [int(c + f) for a, f in zip(alone, firsts, strict=True) for c in a.student]
    assert joined.teacher.tolist() == [int(c + f) for a, f in zip(alone, firsts, strict=True) for c in a.teacher]


def test_a_worked_example():
    # un|believ|able against unbe|lievable|<end>, the end one unit on both sides
    found = align(np.array([2, 8, 12, 13]), np.array([4, 12, 13]))
    assert found.ends.tolist() == [12, 13]
    assert found.student.tolist() == [0, 0, 0, 1]
    assert found.teacher.tolist() == [0, 0, 1]


def test_a_token_without_bytes_goes_with_what_it_stands_before():
    found = align(np.array([0, 3, 3, 6, 6]), np.array([3, 6]))
    assert found.student.tolist() == [0, 0, 1, 1, 1]


def test_nothing_at_all_has_no_chunks():
    found = align(np.array([0, 0]), np.array([0]))
    assert len(found) == 0
    assert found.student.tolist() == [-1, -1]


@pytest.mark.parametrize(("student", "teacher"), [([3], [4]), ([], [2]), ([1], [])])
def test_different_texts_are_refused(student: list[int], teacher: list[int]):
    with pytest.raises(ValueError, match="not the same text"):
        align(np.array(student, dtype=np.int64), np.array(teacher, dtype=np.int64))
