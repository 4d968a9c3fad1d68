"""What holds of every turn with calls, and of any two texts that have blocks in common."""

import json

import numpy as np
import pytest
from call_turns import (
    BY_KEY,
    ESCAPED,
    FENCED,
    LISTED,
    TAGGED,
    THINKING,
    Segment,
    asked,
    bytes_reader,
    check_laws,
    kept_by_hand,
    kept_text,
    read,
    student_side,
    toy_reader,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd.text.alignment import pair, turn_facts
from opd.text.chunks import fold
from opd.text.student_text import Masked, StudentText
from opd.text.teacher_text import TeacherText
from opd.text.tool_calls import parse_calls

# Any turn at all
WORDS = st.text(alphabet='ab .\n{}<>"\\é漢🙂', max_size=8)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-2, 2) | WORDS | st.just("<|im_end|>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)

STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([None, (",", ":"), (" ,", ": ")]),
        "indent": st.sampled_from([None, 1]),
    }
)


@st.composite
def turns(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A turn with calls in any style, and the texts around them."""
    around = [draw(WORDS)]
    text = around[0]
    for _ in range(draw(st.integers(1, 3))):
        arguments = draw(st.dictionaries(WORDS, VALUES, max_size=3))
        members = [("name", "note"), ("arguments", arguments)]
        written = json.dumps(dict(members[:: draw(st.sampled_from([1, -1]))]), **draw(STYLES))
        space = draw(st.sampled_from(["", "\n", " "]))
        around.append(draw(WORDS))
        text += f"<tool_call>{space}{written}{space}</tool_call>{around[-1]}"
    return text, around


@pytest.mark.parametrize("answer", [TAGGED, LISTED, FENCED, BY_KEY, ESCAPED, THINKING], ids=range(6))
@settings(max_examples=40)
@given(turn=turns(), ended=st.booleans())
def test_any_turn_with_calls_keeps_the_laws(answer: str, turn: tuple[str, list[str]], ended: bool):
    text, around = turn
    parsed = parse_calls(text, asked().tools, syntax="hermes")
    assume(not parsed.errors and len(parsed.calls) == len(around) - 1)
    assume("\x13" not in text)
    teacher = toy_reader(answer)
    for student in ("bytes", "smollm2"):
        own = student_side(student)
        found = read(text, own, teacher, ended=ended)
        check_laws(found, own, teacher, text)
        facts = turn_facts(found, np.zeros(len(found.teacher_text.ends) + ended))
        hidden = sum(count for name, count in facts.items() if name.startswith("masked/"))
        assert hidden == (found.pairing.chunk_ids < 0).sum()
        assert set(found.pairing.masked.tolist()) <= {Masked.NOT, Masked.SYNTAX, Masked.STRADDLE}
    # a teacher that writes bytes has no token with a part in two things: text outside calls is compared, letter by letter, but
    # for white space where the template has its own
    own = student_side("bytes")
    found = read(text, own, bytes_reader(answer), ended=ended)
    if not found.untranscribed:
        kept, position = kept_text(found, own, text), 0
        for said in (x for part in around for x in part.split()):
            position = kept.find(said, position)
            assert position >= 0, (said, kept)


def test_tokens_without_bytes_belong_to_what_their_place_starts():
    """Two blocks, [0, 2) and [3, 5) of 6 bytes."""
    ends = np.array([0, 1, 2, 2, 3, 3, 5, 5, 6])
    found = fold(ends, np.array([0, 3]), np.array([2, 2]))
    assert found.inside.tolist() == [True, True, True, False, False, True, True, False, False]
    assert found.ends.tolist() == [0, 1, 2, 2, 2, 2, 4, 4, 4]
    assert not found.torn.any()
    last = fold(np.array([2, 2]), np.array([0]), np.array([2]))
    assert last.inside.tolist() == [True, True]


@settings(max_examples=60)
@given(data=st.data())
def test_blocks_of_any_two_texts_line_up_as_by_hand(data: st.DataObject):
    """The pairing alone, against `kept_by_hand`: any blocks, any two tokenisations."""
    kinds = st.sampled_from(["both", "student", "teacher"])
    segments = data.draw(st.lists(st.tuples(kinds, st.integers(1, 4)), max_size=6))
    segments = [(who, "x" * size) for who, size in segments]
    merged: list[Segment] = []
    for who, text in segments:  # two segments of both that touch are one
        if merged and who == merged[-1][0]:
            merged[-1] = (who, merged[-1][1] + text)
        else:
            merged.append((who, text))
    totals = [sum(len(t) for who, t in merged if who in ("both", side)) for side in ("student", "teacher")]
    cuts = [sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=6)) - {total}) for total in totals]
    ends = [np.array([*c, total] if total else [], dtype=np.int64) for c, total in zip(cuts, totals, strict=True)]
    blocks, places = [], [0, 0]
    for who, text in merged:
        if who == "both":
            blocks.append((*places, len(text)))
        places = [
            p + len(text) * (who in ("both", side)) for p, side in zip(places, ("student", "teacher"), strict=True)
        ]
    student_text = StudentText("x" * totals[0], ends[0], np.zeros(len(ends[0]), dtype=np.uint8))
    teacher_text = TeacherText(np.arange(len(ends[1])), 0, ends[1], np.zeros(len(ends[1]), dtype=np.uint8))
    found = pair(student_text, teacher_text, ends_turn=True, blocks=np.array(blocks, dtype=np.int64).reshape(-1, 3))
    pieces = tuple(["x" * n for n in np.diff(e, prepend=0)] for e in ends)
    kept, kept_there = kept_by_hand(pieces, merged)  # type: ignore[arg-type]  # two lists
    assert (found.chunk_ids >= 0).tolist() == [*kept, True]
    logprobs = -np.arange(1.0, len(ends[1]) + 2)
    assert found.sums(logprobs).sum() == logprobs[:-1][np.array(kept_there, dtype=bool)].sum() + logprobs[-1]
