"""The teacher's side of an alignment: its own chat template, its own tokens, and where they end in the response.

The teacher reads a response where it would write one itself: behind its own rendering of the conversation with the generation
prompt. Text that looks like a special token stays text, in the response and in the turns before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from opd.errors import DataError
from opd.records import Message, Prompt
from opd.text.call_template import CallTemplate, call_template, shown_calls
from opd.text.encoding import Encoded, Encoder, Quotes
from opd.text.special_tags import TAGS, counterparts, opened_thinking, opens_thinking, thinking_opening, thinking_tag
from opd.text.student_text import Masked, StudentSide, StudentText
from opd.text.template import REFUSALS, apply_template, require_generation_prompt, template_shows_tools, turn_end
from opd.text.tokenizer import TokenBytes, token_bytes


@dataclass(frozen=True)
class TeacherText:
    """One response in a teacher's tokens.

    token_ids [tokens]: of the prompt and the response, without an end token; first: the response's first token; ends [response
    tokens]: the byte of the response at which each token ends, not falling; masked [response tokens]: `Masked`.
    """

    token_ids: np.ndarray
    first: int
    ends: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class Transcript:
    """A turn with tool calls as the teacher's template writes it.

    text: the teacher reads it in place of the student's text; tags: its characters [start, end) in which special tokens are real
    ones of the teacher. blocks [blocks, 3] int64: (byte of the student's text, byte of this text, length) of what both texts have,
    in order. led: the template writes its white space before an answer before this one too.
    """

    text: str
    tags: tuple[tuple[int, int], ...]
    blocks: np.ndarray
    led: bool


@dataclass(frozen=True)
class Rendering:
    """A conversation with the generation prompt of the teacher; `marked` has placeholders for quoted special tokens."""

    marked: str
    quotes: Quotes

    @property
    def text(self) -> str:
        return self.quotes.restore(self.marked)


class TeacherSide:
    """The tokenizer of one teacher: its template, the bytes of its tokens, its end tokens."""

    def __init__(
        self, tokenizer: Any, *, name: str, generation_config: Any = None, vocab_size: int | None = None
    ) -> None:
        """Raises ModelError when the bytes of the tokens are unknown, when the template has no generation prompt, and when no token
        ends a turn."""
        self.name = name
        self.tokenizer = tokenizer
        self.table: TokenBytes = token_bytes(tokenizer, vocab_size=vocab_size)
        self._templated = bool(getattr(tokenizer, "chat_template", None))
        self._leading = [] if self._templated else _leading_ids(tokenizer)
        who = f"teacher '{name}'"
        frame = require_generation_prompt(tokenizer, who=who) if self._templated else None
        self._gap = frame.gap if frame else ""
        # Added tokens that the template writes are structure, special or not. Not so tags and white space: a response has them too.
        own = frame.whole if frame else ""
        structural = [t for t in self.table.added.values() if t in own and t.strip() and t not in TAGS]
        self._encoder = Encoder(tokenizer, self.table, [*self.table.names.values(), *structural], name=who)
        self._asked: tuple[TokenBytes, dict[int, str]] | None = None
        self.end = turn_end(tokenizer, generation_config, who=who)
        self.end_ids = self.end.ids

    def counterparts(self, student: TokenBytes) -> dict[int, str]:
        """The student's tags for which this teacher has tokens; the result for the last student is kept."""
        if self._asked is None or self._asked[0] is not student:
            self._asked = (student, counterparts(student, self.table))
        return self._asked[1]

    def ends_of(self, token_id: int, student_side: StudentSide) -> tuple[int, ...]:
        """The teacher's end tokens for an end token of the student: the one of the same name.

        The student's `end_id` also stands for the teacher's end tokens without a namesake. All of the teacher's end tokens, where
        the student's token stands for none.
        """
        names = {student_side.table.of(i): i for i in student_side.end_ids}
        owners = [(i, names.get(self.table.of(i), student_side.end_id)) for i in self.end_ids]
        return tuple(i for i, owner in owners if owner == token_id) or self.end_ids

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Rendering:
        """The conversation with its tools and the generation prompt, quoted special tokens as placeholders. Calls as data
        ("tool_calls") become text where the template does not write calls (`calls`)."""
        quotes = self._encoder.quotes()
        shown = [shown_calls(self.calls, m, quotes) if "tool_calls" in m else m for m in messages]
        quoted = [{**m, "content": quotes.mark(m["content"])} for m in shown]
        if not self._templated:
            return Rendering("\n\n".join(m["content"] for m in quoted), quotes)
        return Rendering(self._apply(quoted, tools, generate=True), quotes)

    @cached_property
    def calls(self) -> CallTemplate | None:
        """How the template writes tool calls; None where it writes none."""
        if not self._templated:
            return None
        ends = [self.table.added[i] for i in self.end_ids if i in self.table.added]
        return call_template(self._apply, ends)

    def read(
        self, before: Rendering, student_text: StudentText, transcript: Transcript | None = None, *, opened: str = ""
    ) -> TeacherText:
        """The student's text, or its transcript, behind the rendering, in the teacher's tokens.

        opened: the thinking tag at the end of the student's generation prompt; the teacher's prompt then opens a thought too.
        Raises DataError when this tokenizer's encoding does not tell quoted special tokens from real ones.
        """
        written = student_text if transcript is None else transcript
        opening = opened_thinking(before.marked, written.text)
        shown = before.marked[: len(before.marked) - len(opening)]
        if not opens_thinking(written.text) and not thinking_opening(shown):
            opening = thinking_tag(opened, self.table)
            shown += opening
        led = transcript is None or transcript.led
        gap = self._gap if written.text and not opening and led else ""
        quotes = before.quotes
        prompt = len(quotes.restore(shown).encode())
        encoded = self._encoder.encode(shown + gap + quotes.mark(written.text, outside=written.tags), quotes)
        ends, lossy = _spans(encoded, self.table)
        boundary = prompt + len(gap.encode())
        first = int(np.searchsorted(ends, prompt, side="right"))
        while first > 0 and ends[first - 1] == prompt and self._invisible(encoded.ids, ends, first - 1):
            first -= 1  # the space that the tokenizer puts before a text is part of the response
        masked = np.where(lossy[first:], np.uint8(Masked.LOSSY), np.uint8(Masked.NOT))
        if 0 < first < len(ends) and ends[first - 1] < prompt:
            masked[0] = Masked.STRADDLE
        # The template's white space before an answer is part of the first chunk: the teacher would write it too.
        inside = np.maximum(ends[first:] - boundary, 0)
        ids = np.array([*self._leading, *encoded.ids], dtype=np.int64)
        return TeacherText(ids, first + len(self._leading), inside, masked)

    def length(self, prompt: Prompt) -> int:
        """How many tokens the prompt has as this teacher reads it. Raises DataError when its template refuses it."""
        shown = self.render(prompt.messages, prompt.tools)
        return len(self._leading) + len(self._encoder.encode(shown.marked, shown.quotes).ids)

    def _invisible(self, ids: Sequence[int], ends: np.ndarray, index: int) -> bool:
        start = ends[index - 1] if index else 0
        return ends[index] == start and not self.table.control[ids[index]]

    def _apply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, generate: bool) -> str:
        try:
            natively = bool(tools) and self._shows_tools
            return apply_template(self.tokenizer, messages, tools, natively=natively, generate=generate)
        except REFUSALS as error:
            raise DataError(f"teacher '{self.name}': its chat template refuses the conversation: {error}") from None

    @cached_property
    def _shows_tools(self) -> bool:
        return template_shows_tools(self.tokenizer)


def _spans(encoded: Encoded, table: TokenBytes) -> tuple[np.ndarray, np.ndarray]:
    """The byte of the text at which each token ends, and the tokens with other bytes than the text has there."""
    array = np.array(encoded.ids, dtype=np.int64)
    joined = table.join(array).tobytes()
    if joined == encoded.whole:
        return np.cumsum(table.lengths(array)), np.zeros(len(array), dtype=bool)
    whole = np.frombuffer(encoded.whole, dtype=np.uint8)
    written = table.writable[whole]
    if joined and joined == whole[written].tobytes():
        return _around_gaps(np.flatnonzero(written) + 1, table.lengths(array), len(whole))
    return _walk(encoded, table)


def _around_gaps(places: np.ndarray, lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`_spans` where the tokenizer leaves out bytes that its vocabulary lacks; `places` [bytes written]: the ends of the others.

    The tokenizer's own offsets are wrong behind such a byte. A byte that is left out counts for the token behind it, which is
    marked.
    """
    ends = np.append(0, places)[np.cumsum(lengths)]
    ends[-1] = size
    return ends, np.diff(ends, prepend=0) != lengths


def _walk(encoded: Encoded, table: TokenBytes) -> tuple[np.ndarray, np.ndarray]:
    """`_spans`, token by token. A space that the tokenizer adds is passed over. Where a token has other bytes than the text, the
    tokenizer's offsets tell how far the change reaches, and all tokens of that stretch are marked."""
    pieces = [table.of(i) for i in encoded.ids]
    starts, stops = encoded.byte_offsets()
    ends, lossy = np.zeros(len(pieces), dtype=np.int64), np.zeros(len(pieces), dtype=bool)
    position, k = 0, 0
    while k < len(pieces):
        piece, token = pieces[k], encoded.ids[k]
        if encoded.whole.startswith(piece, position):
            position += len(piece)
            if token in table.stripping:  # it takes the white space beside it
                position = max(position, int(stops[k]))
        elif _spaced(piece, table) and encoded.whole.startswith(piece[1:], position):
            position += len(piece) - 1
            # It stands in front of the spaces that the text itself begins with: each token of these ends one earlier.
            before = k - 1
            while (
                before >= 0
                and pieces[before]
                and not pieces[before].strip(b" ")
                and ends[before] > _end(ends, before - 1)
            ):
                ends[before] -= 1
                before -= 1
        elif token in table.stripping:
            position = max(position, int(stops[k]))
        else:
            reach, last = int(stops[k]), k
            while last + 1 < len(pieces) and starts[last + 1] < max(reach, position + 1):
                last += 1
                reach = max(reach, int(stops[last]))
            following = int(starts[last + 1]) if last + 1 < len(pieces) else len(encoded.whole)
            ends[k:last], lossy[k : last + 1] = position, True
            position, k = max(position, reach, following), last
        ends[k] = position
        k += 1
    if len(pieces) and ends[-1] != len(encoded.whole):
        ends[-1], lossy[-1] = len(encoded.whole), True
    return ends, lossy


def _end(ends: np.ndarray, index: int) -> int:
    return int(ends[index]) if index >= 0 else 0


def _spaced(piece: bytes, table: TokenBytes) -> bool:
    """Whether the tokenizer may have added the space at the start of a token; a space alone only where it begins texts with one."""
    return piece.startswith(b" ") and (len(piece) > 1 or table.dummy_prefix)


def _leading_ids(tokenizer: Any) -> list[int]:
    """The BOS token, where a tokenizer without a template puts one before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a").input_ids)[:1] == [bos] else []
