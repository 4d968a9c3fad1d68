"""A turn with tool calls as another template writes it, and the bytes that both texts have in common.

What is common follows from what the texts are, never from how they happen to look: the text outside calls, the names, the
arguments piece by piece of their JSON, and of the rest whole words and signs where it begins or ends alike.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from opd.text.call_template import CallText, Payload
from opd.text.tool_calls import Call

Write: TypeAlias = Callable[[int, int, str], CallText | None]
"""The teacher's text of the calls [first, last) of a turn, behind a text (`CallTemplate.write`)."""

Block: TypeAlias = tuple[int, int, int]
"""(place in the student's text, place in the teacher's, length) of what both have."""

_SIGN = re.compile(r"(\s*+)(\w+|\S)")
_SPACE = re.compile(r"[ \t\n\r]*")
_JSON = re.compile(r'([ \t\n\r]*+)("[^"\\]*+(?:\\.[^"\\]*+)*+"|[-+0-9.eE]+|true|false|null|.)', re.DOTALL)
_CHARACTER = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.", re.DOTALL
)
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Transcript:
    """A turn as the teacher's template writes it.

    text: what the teacher reads in place of what the student wrote; tags: the characters [start, end) of it in which special
    tokens are the teacher's own rather than text that looks so. blocks [blocks, 3] int64: (byte of the student's text, byte of
    this one, bytes) of what both have, in order. led: whether the white space that the template writes before an answer is
    before this one.
    """

    text: str
    tags: tuple[tuple[int, int], ...]
    blocks: np.ndarray
    led: bool


def transcribe(
    text: str, tags: Sequence[tuple[int, int]], calls: Sequence[Call], payloads: Sequence[Payload], write: Write
) -> Transcript | None:
    """The student's turn with every run of calls as the teacher writes it; None where it writes one of them in no way.

    text, tags: as in `Spelling`; calls and payloads: of the turn, in its order. Text outside calls stays as it is, but for
    white space where the template has its own: between an answer's text and the calls behind it, and behind the last call.
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
    """A transcript while it grows: its text, and in characters its tags and what it has in common with the student's text."""

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
    """Where each call's name and its arguments stand in a text that `parse_calls` has read, in the text's order."""
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
        key, end = _DECODER.raw_decode(text, _past_space(text, position + 1))
        begin = _past_space(text, _past_space(text, end) + 1)
        _, end = _DECODER.raw_decode(text, begin)
        yield key, begin, end
        position = _past_space(text, end)


def _past_space(text: str, start: int) -> int:
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _runs(text: str, calls: Sequence[Call]) -> Iterator[tuple[int, int]]:
    """[first, last) of calls with nothing but white space between them."""
    edges = [k for k in range(1, len(calls)) if text[calls[k - 1].end : calls[k].start].strip()]
    yield from pairwise([0, *edges, len(calls)])


def _common(student: tuple[str, int, int], own: Sequence[Payload], written: CallText) -> list[Block]:
    """What a run of calls, characters [start, end) of the student's text, has in common with the teacher's text of it.

    Wrappers are compared between the same two payloads; around one that is found on one side alone, at the run's own edges.
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
    """The payloads of both texts; of a call whose parts stand in another order, the arguments alone."""
    theirs = {(p.call, p.part): p for p in written}
    pairs = [(p, theirs[p.call, p.part]) for p in own if (p.call, p.part) in theirs]
    crossed = {a.call for (a, b), (_, d) in pairwise(pairs) if d.start < b.start}
    found: list[tuple[Payload, Payload]] = []
    for a, b in pairs:
        if (a.part == "arguments" or a.call not in crossed) and (not found or found[-1][1].end <= b.start):
            found.append((a, b))
    return found


def _wrapper(ours: str, theirs: str, at: tuple[int, int], *, head: bool, tail: bool) -> list[Block]:
    """What two wrappers that stand at these places begin with (`head`) and end with (`tail`), in whole words and signs."""
    one, other = list(_signs(ours)), list(_signs(theirs))
    first = _alike(one, other) if head else 0
    last = _alike(one[first:][::-1], other[first:][::-1]) if tail else 0
    pairs = [*zip(one[:first], other[:first], strict=True)]
    pairs += zip(one[len(one) - last :], other[len(other) - last :], strict=True)
    return _equal_parts(ours, theirs, at, pairs)


_Piece: TypeAlias = tuple[Any, int, int, int]
"""(what it is, start, start behind the white space, end) of a word, a sign or a character."""


def _alike(one: Sequence[_Piece], other: Sequence[_Piece]) -> int:
    """How many pieces both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a[0] != b[0]), min(len(one), len(other)))


def _signs(text: str) -> Iterator[_Piece]:
    """A text by words and other signs; what comes last is its end."""
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
    """The inside of a JSON string, each character or escape with what it stands for."""
    for found in _CHARACTER.finditer(text):
        value = json.loads(f'"{found[0]}"') if found[0][0] == "\\" else found[0]
        yield ("character", value), found.start(), found.start(), found.end()


def _corresponding(
    ours: str, theirs: str, at: tuple[int, int], pieces: Callable[[str], Iterator[_Piece]]
) -> list[Block]:
    """What is written alike of one value that is written twice, at these places; nothing where its pieces stand in another
    order."""
    if ours == theirs:
        return [(*at, len(ours))]
    one, other = list(pieces(ours)), list(pieces(theirs))
    if [p[0] for p in one] != [p[0] for p in other]:
        return []
    return _equal_parts(ours, theirs, at, zip(one, other, strict=True))


def _equal_parts(ours: str, theirs: str, at: tuple[int, int], pairs: Iterable[tuple[_Piece, _Piece]]) -> list[Block]:
    """Of pieces that correspond, what is written alike, and the white space before them where that is."""
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
    one, other = (np.cumsum([0, *(len(c.encode()) for c in text)]) for text in (ours, theirs))
    plain = np.array(blocks, dtype=np.int64).reshape(-1, 3)
    starts, places, stops = one[plain[:, 0]], other[plain[:, 1]], one[plain[:, 0] + plain[:, 2]]
    return np.stack([starts, places, stops - starts], axis=1)
