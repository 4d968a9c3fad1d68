"""Every ordered pair of published tokenizers over a corpus that is meant to break them."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import CORPUS, PROMPT, check_chunks, check_pairs, check_response, rollout_of
from zoo import REAL, TOYS, real, toy

from opd.text.alignment import pair_turns
from opd.text.student_text import Masked, StudentSide, StudentText
from opd.text.teacher_text import TeacherSide
from opd.text.tokenizer import encode_text


def plain(text: str) -> StudentText:
    """A text to read, of no particular tokens."""
    return StudentText(text, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))


@pytest.fixture(scope="module")
def writers() -> dict[str, StudentSide]:
    return {name: StudentSide(real(name)) for name in REAL}


@pytest.fixture(scope="module")
def teacher_sides() -> dict[str, TeacherSide]:
    return {name: TeacherSide(real(name), name=name) for name in REAL}


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(REAL, 2)))
def test_every_byte_of_the_corpus_is_in_a_chunk(
    student: str, teacher: str, writers: dict[str, StudentSide], teacher_sides: dict[str, TeacherSide]
):
    student_side, teacher_side = writers[student], teacher_sides[teacher]
    for kind, text in CORPUS.items():
        ids = student_side.encode(text)
        [turn] = pair_turns(rollout_of(ids, student_side, text=text), student_side, teacher_side)
        # Where a text begins with a space, transformers' conversion of Mistral's SentencePiece drops the dummy one in encoding but
        # takes one away in decoding: what its tokens spell is what it decodes, one space less.
        spelled = text[1:] if student == "mistral_v3" and text.startswith(" ") else text
        assert turn.student_text.text == student_side.tokenizer.decode(ids) == spelled, kind
        straddles = int((turn.teacher_text.masked == Masked.STRADDLE).sum())
        masked = turn.pairing.masked[turn.pairing.masked != Masked.NOT]
        assert set(masked.tolist()) <= ({int(Masked.STRADDLE)} if straddles else set()), (kind, turn.pairing.masked)
        if not straddles:
            assert turn.pairing.kept_sizes.sum() == len(spelled.encode()), kind
        check_chunks(turn, ids, student_side, teacher_side)
        check_pairs(turn, ids, student_side, teacher_side)


@pytest.mark.parametrize("teacher", REAL)
def test_the_teachers_ids_are_its_own_encoding_of_its_own_rendering(
    teacher: str, teacher_sides: dict[str, TeacherSide]
):
    teacher_side = teacher_sides[teacher]
    before = teacher_side.render(PROMPT.messages)
    gap = " " if teacher == "mistral_v3" else ""  # its template writes a space before an answer
    for kind, text in CORPUS.items():
        if kind == "look-alikes":
            continue  # quoted control tokens: the rendering alone cannot say that they are quoted
        found = teacher_side.read(before, plain(text)).token_ids.tolist()
        own = encode_text(teacher_side.tokenizer, before.text + gap * bool(text) + text, parse_special=True)
        assert found[len(found) - len(own) :] == own, kind
        assert len(found) - len(own) <= 1, kind  # a BOS where there is no template to write it


@pytest.mark.parametrize("teacher", REAL)
def test_quoted_control_tokens_stay_text(teacher: str, teacher_sides: dict[str, TeacherSide]):
    teacher_side = teacher_sides[teacher]
    before = teacher_side.render(PROMPT.messages)
    structural = {
        i for i, literal in teacher_side.table.added.items() if literal in before.text or teacher_side.table.control[i]
    }
    text = " ".join([*sorted(teacher_side.table.names.values())[:20], "<｜User｜>", "<|im_end|>"])
    teacher_text = teacher_side.read(before, plain(text))
    assert not structural & set(teacher_text.token_ids[teacher_text.first :].tolist())
    whole = b"".join(teacher_side.table.of(int(i)) for i in teacher_text.token_ids[teacher_text.first :])
    lossy = (teacher_text.masked == Masked.LOSSY).any()
    assert lossy or whole.endswith(
        text.encode().removeprefix(b"</")
    )  # the first may stand in one token with what is before


@pytest.mark.parametrize("teacher", REAL)
def test_quotes_in_the_turns_before_stay_text(teacher: str, teacher_sides: dict[str, TeacherSide]):
    teacher_side = teacher_sides[teacher]
    messages = [
        {"role": "user", "content": "say hello please"},
        {"role": "assistant", "content": "hello"},
        PROMPT.messages[0],
    ]
    quoting = [dict(m) for m in messages]
    name = teacher_side.table.names[teacher_side.end_ids[0]]
    quoting[1]["content"] = f"it ends with {name} or so"
    found, usual = (
        teacher_side.read(teacher_side.render(m), plain("ok")).token_ids.tolist() for m in (quoting, messages)
    )
    assert found.count(teacher_side.end_ids[0]) == usual.count(teacher_side.end_ids[0])
    assert teacher_side.table.join(np.array(found)).tobytes().count(name.encode()) == 1 + usual.count(
        teacher_side.end_ids[0]
    )


def test_a_space_that_sentencepiece_writes_otherwise_is_lossy(teacher_sides: dict[str, TeacherSide]):
    """U+2581 is how SentencePiece writes a space: the character itself comes out as one."""
    teacher_text = teacher_sides["llama2"].read(
        teacher_sides["llama2"].render(PROMPT.messages), plain("a\u2581b and more")
    )
    assert (teacher_text.masked == Masked.LOSSY).any()
    assert (teacher_text.masked == Masked.NOT).sum() >= 3


@functools.cache
def toy_writer(name: str) -> StudentSide:
    return StudentSide(toy(name))


@functools.cache
def toy_reader(student: str, teacher: str) -> TeacherSide:
    return TeacherSide(toy(teacher), name=f"{teacher} for {student}")


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(TOYS, 2)))
@settings(max_examples=25)
@given(data=st.data())
def test_any_ids_at_all_line_up(student: str, teacher: str, data: st.DataObject):
    """Random tokens: text cut in mid-character, bytes that are no UTF-8, control tokens, ids beyond the vocabulary."""
    student_side, teacher_side = toy_writer(student), toy_reader(student, teacher)
    ids = data.draw(st.lists(st.integers(0, len(student_side.table) + 5), max_size=24))
    ids = [i for i in ids if i not in student_side.end_ids]
    ended = data.draw(st.booleans())
    check_response(ids, student_side, teacher_side, ended=ended)


def test_a_lone_space_that_the_decoder_takes_away_is_counted():
    """The dummy space of SentencePiece and nothing else: no bytes, no chunk, so it is masked with a reason."""
    student_side, teacher_side = StudentSide(toy("sentencepiece")), TeacherSide(toy("bpe300"), name="t")
    space = student_side.tokenizer.convert_tokens_to_ids("▁")
    [turn] = pair_turns(rollout_of([space], student_side, text="", ended=False), student_side, teacher_side)
    assert turn.student_text.text == ""
    assert turn.pairing.masked.tolist() == [Masked.NO_COUNTERPART]
    check_response([space], student_side, teacher_side, ended=False)


def test_a_space_that_the_teacher_puts_before_spaces_belongs_to_them():
    """Between two special tokens, behind which SentencePiece puts a space of its own: both are the space's, not the tag's."""
    student_side, teacher_side = (
        StudentSide(toy("sentencepiece, no prefix")),
        TeacherSide(toy("sentencepiece"), name="t"),
    )
    unk, space = student_side.tokenizer.convert_tokens_to_ids(["<unk>", "▁"])
    [turn] = pair_turns(rollout_of([unk, space, unk], student_side, text="", ended=False), student_side, teacher_side)
    read = [teacher_side.table.of(int(i)) for i in turn.teacher_text.token_ids[turn.teacher_text.first :]]
    assert read == [b"<unk>", b" ", b" ", b"<unk>"]
    assert turn.pairing.chunks.teacher.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "text", ["\x13漢漢aaaa aaaa\x13", "\x13\ufffd\ufffd/-\ufffd\0\0\0\0\0 \0\0\0\ufffd", "x\x13aaaa aaaa"]
)
def test_bytes_that_the_teachers_vocabulary_lacks_shift_nothing(teacher_sides: dict[str, TeacherSide], text: str):
    """SmolLM2 leaves U+0013 out, and its own offsets are wrong behind it; equal letters around it make a shift invisible."""
    teacher_side, whole = teacher_sides["smollm2"], text.encode()
    teacher_text = teacher_side.read(teacher_side.render(PROMPT.messages), plain(text))
    pieces = [teacher_side.table.of(int(i)) for i in teacher_text.token_ids[teacher_text.first :]]
    starts = [0, *teacher_text.ends[:-1].tolist()]
    for piece, start, end, why in zip(
        pieces, starts, teacher_text.ends.tolist(), teacher_text.masked.tolist(), strict=True
    ):
        assert (why == Masked.LOSSY) == (b"\x13" in whole[start:end]), (piece, start, end)
        if why == Masked.NOT:
            assert piece == whole[start:end]
    assert teacher_text.ends[-1] == len(whole)
