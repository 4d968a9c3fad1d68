"""A turn with tool calls as another template writes it, and the bytes that both texts have in common.

Common are the text outside calls, the names of the tools, the arguments by pieces of their JSON, and the whole words and signs
with which the text around them begins or ends on both sides.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from opd.errors import DataError
from opd.records import Rollout
from opd.text.call_template import CallTemplate, CallText, Payload, with_calls
from opd.text.encoding import byte_offsets
from opd.text.special_tags import TAGS
from opd.text.student_text import StudentText, spell
from opd.text.teacher_text import Rendering, TeacherSide, Transcript
from opd.text.tokenizer import TokenBytes
from opd.text.tool_calls import Call, Syntax, parse_calls, skip_space

Write: TypeAlias = Callable[[int, int, str], CallText | None]
"""The teacher's text of the calls [first, last) of a turn, behind a text (`CallTemplate.write`)."""

Block: TypeAlias = tuple[int, int, int]
"""(place in the student's text, place in the teacher's, length) of equal text."""

_SIGN = re.compile(r"(\s*+)(\w+|\S)")
_JSON = re.compile(r'([ \t\n\r]*+)("[^"\\]*+(?:\\.[^"\\]*+)*+"|[-+0-9.eE]+|true|false|null|.)', re.DOTALL)
_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)
_DECODER = json.JSONDecoder()


def transcribe(
    text: str, tags: Sequence[tuple[int, int]], calls: Sequence[Call], payloads: Sequence[Payload], write: Write
) -> Transcript | None:
    """The student's turn with every run of calls as the teacher writes it; None where the teacher cannot write one of them.

    text, tags: as in `StudentText`; calls and payloads: of the turn, in order. Text outside calls stays, except white space that
    the template writes itself: between the text of an answer and the calls behind it, and behind the last call.
    """
    whole = _Whole(text, tags)
    position, led = 0, True
    for first, last in _runs(text, calls):
        begin, end = calls[first].start, calls[last - 1].end
        between = text[position:begin]
        written = write(first, last, between.strip())
        if written is None:
            return None
        if between.strip():
            start = position + len(between.rstrip()) if written.joined else begin
            whole.copy(position, start)
        else:
            start = position
            led = written.led if first == 0 else led
        own = [Payload(p.call - first, p.part, p.start, p.end) for p in payloads if first <= p.call < last]
        whole.add(written, _common((text, start, end), own, written))
        position = end
    if text[position:].strip():
        whole.copy(position, len(text))
    found = "".join(whole.parts)
    return Transcript(found, tuple(whole.tags), _in_bytes(_merged(whole.blocks), text, found), led)


class _Whole:
    """A transcript while it grows: its text, and its tags and the blocks that it shares with the student's text, in characters."""

    def __init__(self, text: str, tags: Sequence[tuple[int, int]]) -> None:
        self._text, self._tags = text, tags
        self._length = 0
        self.parts: list[str] = []
        self.tags: list[tuple[int, int]] = []
        self.blocks: list[Block] = []

    def copy(self, start: int, end: int) -> None:
        """The student's own text."""
        tags = [(a - start, b - start) for a, b in self._tags if start <= a and b <= end]
        self._append(self._text[start:end], tags, [(start, 0, end - start)])

    def add(self, written: CallText, common: Sequence[Block]) -> None:
        """The teacher's text of calls; `common`: places in the student's whole text and in this one."""
        self._append(written.text, written.own, common)

    def _append(self, text: str, tags: Sequence[tuple[int, int]], blocks: Sequence[Block]) -> None:
        self.tags += [(a + self._length, b + self._length) for a, b in tags]
        self.blocks += [(ours, theirs + self._length, size) for ours, theirs, size in blocks]
        self.parts.append(text)
        self._length += len(text)


def payloads_of(text: str, calls: Sequence[Call]) -> list[Payload]:
    """The places of each call's name and arguments in a text that `parse_calls` has read, in order."""
    found: list[Payload] = []
    for number, call in enumerate(calls):
        for key, start, end in _members(text, text.index("{", call.start)):
            if key == "name":
                found.append(Payload(number, "name", start + 1, end - 1))
            else:
                found.append(Payload(number, "arguments", start, end))
    return found


def _members(text: str, start: int) -> Iterator[tuple[str, int, int]]:
    """(key, start, end of the value) of each member of the JSON object that begins here."""
    position = start
    while text[position] != "}":
        key, end = _DECODER.raw_decode(text, skip_space(text, position + 1))
        begin = skip_space(text, skip_space(text, end) + 1)
        _, end = _DECODER.raw_decode(text, begin)
        yield key, begin, end
        position = skip_space(text, end)


def _runs(text: str, calls: Sequence[Call]) -> Iterator[tuple[int, int]]:
    """[first, last) of calls with nothing but white space between them."""
    edges = [k for k in range(1, len(calls)) if text[calls[k - 1].end : calls[k].start].strip()]
    yield from pairwise([0, *edges, len(calls)])


def _common(student: tuple[str, int, int], own: Sequence[Payload], written: CallText) -> list[Block]:
    """The blocks that a run of calls, characters [start, end) of the student's text, shares with the teacher's text of it.

    Text around payloads is compared between the same two payloads. Where a payload is found on one side alone, only the text at
    the edges of the run is compared.
    """
    text, position, end = student
    pairs = _in_one_order(own, written.payloads)
    lonely = {p.start for p in own} - {p.start for p, _ in pairs}
    lonely_there = {p.start for p in written.payloads} - {p.start for _, p in pairs}
    found: list[Block] = []
    place = 0
    stops = [(ours.start, theirs.start) for ours, theirs in pairs] + [(end, len(written.text))]
    for k, (stop, stop_there) in enumerate(stops):
        same = all(not position <= p < stop for p in lonely) and all(not place <= p < stop_there for p in lonely_there)
        found += _wrapper(
            text[position:stop],
            written.text[place:stop_there],
            (position, place),
            head=same or k == 0,
            tail=same or k == len(pairs),
        )
        if k < len(pairs):
            ours, theirs = pairs[k]
            one, other = text[ours.start : ours.end], written.text[theirs.start : theirs.end]
            pieces = _characters if ours.part == "name" else _pieces
            found += _corresponding(one, other, (ours.start, theirs.start), pieces)
            position, place = ours.end, theirs.end
    return found


def _in_one_order(own: Sequence[Payload], written: Sequence[Payload]) -> list[tuple[Payload, Payload]]:
    """The payloads that both texts have, in one order. Of a call with its parts in another order, the arguments alone."""
    theirs = {(p.call, p.part): p for p in written}
    pairs = [(p, theirs[p.call, p.part]) for p in own if (p.call, p.part) in theirs]
    crossed = {a.call for (a, b), (_, d) in pairwise(pairs) if d.start < b.start}
    found: list[tuple[Payload, Payload]] = []
    for a, b in pairs:
        if (a.part == "arguments" or a.call not in crossed) and (not found or found[-1][1].end <= b.start):
            found.append((a, b))
    return found


def _wrapper(ours: str, theirs: str, at: tuple[int, int], *, head: bool, tail: bool) -> list[Block]:
    """The whole words and signs with which two wrappers at these places both begin (`head`) and end (`tail`)."""
    one, other = list(_signs(ours)), list(_signs(theirs))
    first = _alike(one, other) if head else 0
    last = _alike(one[first:][::-1], other[first:][::-1]) if tail else 0
    pairs = [*zip(one[:first], other[:first], strict=True)]
    pairs += zip(one[len(one) - last :], other[len(other) - last :], strict=True)
    return _equal_parts(ours, theirs, at, pairs)


_Piece: TypeAlias = tuple[Any, int, int, int]
"""(value, start, start behind the white space, end) of a word, a sign or a character."""


def _alike(one: Sequence[_Piece], other: Sequence[_Piece]) -> int:
    """How many pieces both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a[0] != b[0]), min(len(one), len(other)))


def _signs(text: str) -> Iterator[_Piece]:
    """A text by words and other signs; the last piece is its end."""
    position = 0
    for found in _SIGN.finditer(text):
        yield found[2], position, found.start(2), found.end()
        position = found.end()
    yield None, position, len(text), len(text)


def _pieces(text: str) -> Iterator[_Piece]:
    """JSON sign by sign, its strings character by character."""
    for found in _JSON.finditer(text):
        sign = found[2]
        if sign[0] != '"':
            what = "a number" if sign[0] in "-0123456789" else sign
            yield what, found.start(), found.start(2), found.end()
            continue
        inside = found.start(2) + 1
        yield sign[0], found.start(), found.start(2), inside
        for what, _, start, end in _characters(sign[1:-1]):
            yield what, start + inside, start + inside, end + inside
        yield sign[0], found.end() - 1, found.end() - 1, found.end()


def _characters(text: str) -> Iterator[_Piece]:
    """The inside of a JSON string: each character, or the character that an escape stands for."""
    for found in _CHARACTER.finditer(text):
        value = json.loads(f'"{found[0]}"') if found[0][0] == "\\" else found[0]
        yield ("character", value), found.start(), found.start(), found.end()


def _corresponding(
    ours: str, theirs: str, at: tuple[int, int], pieces: Callable[[str], Iterator[_Piece]]
) -> list[Block]:
    """The equal parts of one value that both texts have at these places; nothing where its pieces are in another order."""
    if ours == theirs:
        return [(*at, len(ours))]
    one, other = list(pieces(ours)), list(pieces(theirs))
    if [p[0] for p in one] != [p[0] for p in other]:
        return []
    return _equal_parts(ours, theirs, at, zip(one, other, strict=True))


def _equal_parts(ours: str, theirs: str, at: tuple[int, int], pairs: Iterable[tuple[_Piece, _Piece]]) -> list[Block]:
    """Of pieces that correspond, those that are equal, and the white space before them where it is equal."""
    start, place = at
    found: list[Block] = []
    for (_, a, b, c), (_, x, y, z) in pairs:
        if ours[a:b] == theirs[x:y]:
            found.append((start + a, place + x, b - a))
        if ours[b:c] == theirs[y:z]:
            found.append((start + b, place + y, c - b))
    return found


def _merged(blocks: Sequence[Block]) -> list[Block]:
    """Blocks that touch on both sides as one; none that is empty."""
    found: list[Block] = []
    for ours, theirs, size in blocks:
        if found and (ours, theirs) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + size)
        elif size:
            found.append((ours, theirs, size))
    return found


def _in_bytes(blocks: Sequence[Block], ours: str, theirs: str) -> np.ndarray:
    one, other = byte_offsets(ours), byte_offsets(theirs)
    plain = np.array(blocks, dtype=np.int64).reshape(-1, 3)
    starts, places, stops = one[plain[:, 0]], other[plain[:, 1]], one[plain[:, 0] + plain[:, 2]]
    return np.stack([starts, places, stops - starts], axis=1)


@dataclass(frozen=True)
class Seen:
    """A turn as a teacher reads it: the conversation before it, and a transcript in place of the student's text (None: the text).

    untranscribed: calls in the turn or before it stay as the student wrote them, because the template does not write them.
    """

    before: Rendering
    transcript: Transcript | None
    untranscribed: bool


class OwnSyntax:
    """Shows one rollout to one teacher in the teacher's own syntax of calls, as far as its template writes calls."""

    def __init__(self, rollout: Rollout, table: TokenBytes, teacher_side: TeacherSide, syntax: Syntax) -> None:
        """table, syntax: the student's tokens, and its syntax of calls."""
        self._table = table
        self._teacher_side = teacher_side
        self._syntax: Syntax = syntax
        self._tools = rollout.prompt.tools
        self._messages = with_calls(rollout.messages, self._tools, syntax=syntax)
        # The ids of tools' answers stay, because some templates require them.
        self._as_written = tuple(
            {**said, "tool_call_id": m["tool_call_id"]} if "tool_call_id" in m else said
            for said, m in zip(rollout.messages, self._messages, strict=True)
        )

    def see(self, answer: int, token_ids: np.ndarray, student_text: StudentText) -> Seen:
        """The turn that is message `answer` of the rollout; token_ids, student_text: of the turn without its end token.

        Raises DataError when the teacher cannot read the conversation.
        """
        told = any("tool_calls" in m for m in self._messages[: answer + 1])
        before = self._told(answer) if self._teacher_side.calls is not None or not told else None
        if before is None:
            return Seen(self._teacher_side.render(self._as_written[:answer], self._tools), None, untranscribed=told)
        own = self._messages[answer].get("tool_calls", ())
        if not own:
            return Seen(before, None, untranscribed=False)
        transcript = self._transcript(token_ids, student_text, own, before)
        return Seen(before, transcript, untranscribed=transcript is None)

    def _told(self, answer: int) -> Rendering | None:
        """The conversation before a turn with calls as data; None where the template refuses them."""
        try:
            return self._teacher_side.render(self._messages[:answer], self._tools)
        except DataError:
            return None

    def _transcript(
        self, token_ids: np.ndarray, student_text: StudentText, own: Sequence[Mapping[str, Any]], before: Rendering
    ) -> Transcript | None:
        template: CallTemplate | None = self._teacher_side.calls
        assert template is not None
        # The student writes calls in its own tags; the teacher may have other tags, or none.
        own_tags = {i: literal for i, literal in self._table.added.items() if literal in TAGS}
        literal = spell(self._table, token_ids, {**self._teacher_side.counterparts(self._table), **own_tags})
        parsed = parse_calls(literal.text, self._tools, syntax=self._syntax)
        wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in own]
        if parsed.errors or [(c.name, c.arguments) for c in parsed.calls] != wanted:
            return None  # control tokens within a call, which the message does not show
        places = _Places(literal, student_text)
        calls = [replace(c, start=places.of(c.start), end=places.of(c.end)) for c in parsed.calls]
        payloads = [
            replace(p, start=places.of(p.start), end=places.of(p.end)) for p in payloads_of(literal.text, parsed.calls)
        ]

        def write(first: int, last: int, text: str) -> CallText | None:
            return template.write(own[first:last], self._tools, before.quotes, text=text)

        return transcribe(student_text.text, student_text.tags, calls, payloads, write)


@dataclass(frozen=True)
class _Places:
    """Maps places between two texts of a turn that differ in their tags alone."""

    one: StudentText
    other: StudentText

    def of(self, place: int) -> int:
        """The same place, in characters; it lies within no tag."""
        byte = len(self.one.text[:place].encode())
        before = int(np.searchsorted(self.one.ends, byte, side="right"))  # tokens that end here or earlier
        start, start_there = (int(side.ends[before - 1]) if before else 0 for side in (self.one, self.other))
        return len(self.other.text.encode()[: start_there + byte - start].decode())
