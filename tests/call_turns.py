"""Turns with tool calls, how a teacher reads them, and a computation by hand of what of them is compared."""

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from call_templates import (
    LLAMA,
    MISTRAL,
    asked,
    chatml,
)
from factories import byte_tokenizer
from test_tokenizer_pairs import check_chunks
from zoo import real, toy, toy_bpe

from opd.records import Prompt, Rollout, Turn
from opd.text.alignment import TurnPair, pair_turns, sides
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide
from opd.text.tool_calls import Syntax

Segment = tuple[str, str]
"""("both" | "student" | "teacher", text): who writes it."""

ARGUMENTS = '{"expression": "1 + 2"}'

TEMPLATES = {"llama3_1": LLAMA, "mistral_v3": MISTRAL}


def call(expression: str = "1 + 2", **style: Any) -> str:
    """A call in the Hermes syntax, as json.dumps writes it."""
    written = json.dumps({"name": "calculator", "arguments": {"expression": expression}}, **style)
    return f"<tool_call>{written}</tool_call>"


def tagged(expression: str = "1 + 2") -> str:
    """The same call as `TAGGED` and Qwen2.5 write it."""
    return f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


@functools.cache
def student_side(name: str) -> StudentSide:
    return StudentSide(toy(name) if name == "bytes" else real(name))


@functools.cache
def teacher_side(name: str) -> TeacherSide:
    """A published tokenizer with its own template, or one like its model's where the archive's writes no calls."""
    tokenizer = copy.copy(real(name))
    tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    return TeacherSide(tokenizer, name=name)


@functools.cache
def toy_reader(answer: str) -> TeacherSide:
    return TeacherSide(toy_bpe(390, template=chatml(answer)), name="t")


@functools.cache
def bytes_reader(answer: str) -> TeacherSide:
    """A teacher that writes bytes, so that no token has a part in two things."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chatml(answer)
    return TeacherSide(tokenizer, name="t")


def turn_of(text: str, own: StudentSide, prompt: Prompt | None = None, *, ended: bool = True) -> Rollout:
    """A rollout of one turn, behind one token that stands for the prompt."""
    prompt = prompt or asked()
    ids = [0, *own.encode(text), *([own.end_ids[-1]] if ended else [])]
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
        messages=(*prompt.messages, {"role": "assistant", "content": text}),
        finish="end" if ended else "length",
        policy_version=0,
    )


def read(
    text: str, own: StudentSide, theirs: TeacherSide, *, syntax: Syntax | None = "hermes", **kwargs: Any
) -> TurnPair:
    [turn] = pair_turns(turn_of(text, own, **kwargs), own, theirs, own_syntax=syntax)
    return turn


def told(turn: TurnPair, theirs: TeacherSide) -> str:
    """What the teacher reads of a turn, from its tokens."""
    return theirs.table.join(turn.teacher_text.token_ids[turn.teacher_text.first :]).tobytes().decode()


def left_out(turn: TurnPair, own: StudentSide, text: str) -> list[str]:
    """The student's tokens that are masked."""
    pieces = [own.table.of(i).decode(errors="replace") for i in own.encode(text)]
    return [piece for piece, why in zip(pieces, turn.pairing.masked, strict=False) if why]


def same(one: TurnPair, other: TurnPair) -> bool:
    """Whether two readings agree in everything that a score depends on."""
    pairs = [
        (one.teacher_text.token_ids, other.teacher_text.token_ids),
        (one.teacher_text.ends, other.teacher_text.ends),
        (one.pairing.masked, other.pairing.masked),
        (one.pairing.chunk_ids, other.pairing.chunk_ids),
        (one.pairing.chunks.ends, other.pairing.chunks.ends),
        (one.pairing.chunks.teacher, other.pairing.chunks.teacher),
    ]
    return one.teacher_text.first == other.teacher_text.first and all(np.array_equal(a, b) for a, b in pairs)


def kept_by_hand(pieces: tuple[list[str], list[str]], segments: Sequence[Segment]) -> tuple[list[bool], list[bool]]:
    """Which tokens of the student and of the teacher are compared, letter by letter.

    Tokens that share a letter of "both" belong together; all that do are left out when one of them has a letter which the other
    side has not, or goes on past a place where the other side has one.
    """
    common: tuple[dict[int, int], dict[int, int]] = ({}, {})  # a side's letter -> letter of "both"
    segment_of: list[int] = []
    for side, name in enumerate(("student", "teacher")):
        letters = [(k, who) for k, (who, text) in enumerate(segments) if who in ("both", name) for _ in text]
        both = [i for i, (_, who) in enumerate(letters) if who == "both"]
        common[side].update({i: n for n, i in enumerate(both)})
        segment_of = [letters[i][0] for i in both]
    tokens: list[tuple[set[int], bool]] = []
    for side, texts in enumerate(pieces):
        ends = np.cumsum([len(text) for text in texts]).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            shared = {common[side][i] for i in range(start, end) if i in common[side]}
            tokens.append((shared, len(shared) < end - start or len({segment_of[n] for n in shared}) > 1))
    kept = [not torn for _, torn in tokens]
    while True:
        lost = set().union(*(shared for (shared, _), keep in zip(tokens, kept, strict=True) if not keep))
        fewer = [keep and not shared & lost for (shared, _), keep in zip(tokens, kept, strict=True)]
        if fewer == kept:
            return kept[: len(pieces[0])], kept[len(pieces[0]) :]
        kept = fewer


def check_laws(turn: TurnPair, own: StudentSide, theirs: TeacherSide, text: str) -> None:
    """Chunks part what is kept, in order, and spell the same bytes on both sides; the counts agree."""
    ids = [*own.encode(text), *([own.end_ids[-1]] if turn.ends_turn else [])]
    check_chunks(turn, ids, own, theirs)
    numbers = turn.pairing.chunk_ids[turn.pairing.chunk_ids >= 0]
    assert (np.diff(numbers) >= 0).all()
    assert set(numbers.tolist()) == set(range(int((turn.pairing.faulty == Masked.NOT).sum())))
    assert (np.diff(turn.pairing.chunks.ends) > 0).all()
    for side in (turn.pairing.chunks.student, turn.pairing.chunks.teacher):
        assert (np.diff(side[side >= 0]) >= 0).all()
    shown = sides(turn, ids, own, theirs)
    assert b"".join(piece for side in shown for piece in side.student) == own.table.join(np.array(ids)).tobytes()
    read = b"".join(piece for side in shown for piece in side.teacher).removesuffix(b"<end of turn>")
    assert read == theirs.table.join(turn.teacher_text.token_ids[turn.teacher_text.first :]).tobytes()


def with_control(text: str, place: int) -> Rollout:
    """A control token of the student's in the middle of a turn; its message does not show it."""
    own = student_side("bytes")
    item = turn_of(text, own)
    ids = np.insert(item.token_ids, 1 + place, own.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    return replace(
        item,
        token_ids=ids,
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
    )


def kept_text(turn: TurnPair, own: StudentSide, text: str) -> str:
    """What the student's tokens spell that are compared."""
    ids = own.encode(text)
    kept = [own.table.of(i) for i, why in zip(ids, turn.pairing.masked, strict=False) if not why]
    return b"".join(kept).decode(errors="replace")


def history(*messages: tuple[str, str]) -> Prompt:
    """A prompt in which this has been said, (role, text) each."""
    said = [{"role": role, "content": content} for role, content in messages]
    return Prompt("p", (*asked().messages, *said), teacher="t", task="task", tools=asked().tools)


def before(turn: TurnPair, theirs: TeacherSide) -> str:
    """What the teacher reads before a turn."""
    return theirs.table.join(turn.teacher_text.token_ids[: turn.teacher_text.first]).tobytes().decode()
