"""A conversation whose tool calls a teacher reads as its own chat template writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opd.errors import DataError
from opd.records import Rollout
from opd.text.call_template import CallTemplate, CallText, with_calls
from opd.text.special_tags import TAGS
from opd.text.student_text import StudentText, spell
from opd.text.teacher_text import Rendering, TeacherSide
from opd.text.token_bytes import TokenBytes
from opd.text.tool_calls import Syntax, parse_calls
from opd.text.transcribe import Transcript, payloads_of, transcribe


@dataclass(frozen=True)
class Seen:
    """What a teacher is shown of a turn: the conversation before it, and what it reads in place of what the student wrote (None:
    just that). untranscribed: calls in it or before it stay as written, because the template does not write them."""

    before: Rendering
    transcript: Transcript | None
    untranscribed: bool


class OwnSyntax:
    """One rollout, read by one teacher. The calls of a turn are those that its environment has read in the student's message."""

    def __init__(self, rollout: Rollout, table: TokenBytes, teacher_side: TeacherSide, syntax: Syntax) -> None:
        """table: of the student; syntax: in which it writes calls."""
        self._table = table
        self._teacher_side = teacher_side
        self._syntax: Syntax = syntax
        self._tools = rollout.prompt.tools
        self._messages = with_calls(rollout.messages, self._tools, syntax=syntax)
        # Ids of what a tool said stay, which some templates require.
        self._as_written = tuple(
            {**said, "tool_call_id": m["tool_call_id"]} if "tool_call_id" in m else said
            for said, m in zip(rollout.messages, self._messages, strict=True)
        )

    def see(self, answer: int, token_ids: np.ndarray, student_text: StudentText) -> Seen:
        """The turn that is message `answer` of the rollout; token_ids: its tokens without the end, spelling: of these.

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
        """The conversation before a turn with its calls as data; None where the template cannot be given them."""
        try:
            return self._teacher_side.render(self._messages[:answer], self._tools)
        except DataError:
            return None

    def _transcript(
        self, token_ids: np.ndarray, student_text: StudentText, own: Sequence[Mapping[str, Any]], before: Rendering
    ) -> Transcript | None:
        template: CallTemplate | None = self._teacher_side.calls
        assert template is not None
        # The student's calls are written in its own tags, which the teacher may spell otherwise, or have none for.
        own_tags = {i: literal for i, literal in self._table.added.items() if literal in TAGS}
        literal = spell(self._table, token_ids, {**self._teacher_side.counterparts(self._table), **own_tags})
        parsed = parse_calls(literal.text, self._tools, syntax=self._syntax)
        if parsed.errors or [(c.name, c.arguments) for c in parsed.calls] != [_as_pair(call) for call in own]:
            return None  # control tokens within a call, of which the message knows nothing
        places = _Places(literal, student_text)
        calls = [replace(c, start=places.of(c.start), end=places.of(c.end)) for c in parsed.calls]
        payloads = [
            replace(p, start=places.of(p.start), end=places.of(p.end)) for p in payloads_of(literal.text, parsed.calls)
        ]

        def write(first: int, last: int, text: str) -> CallText | None:
            return template.write(own[first:last], self._tools, before.quotes, text=text)

        return transcribe(student_text.text, student_text.tags, calls, payloads, write)


def _as_pair(call: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    return call["function"]["name"], call["function"]["arguments"]


@dataclass(frozen=True)
class _Places:
    """From one spelling of a turn to another that differs in its tags alone."""

    one: StudentText
    other: StudentText

    def of(self, place: int) -> int:
        """The same place, in characters; it lies within no tag."""
        byte = len(self.one.text[:place].encode())
        before = int(np.searchsorted(self.one.ends, byte, side="right"))  # tokens that end here or earlier
        start, start_there = (int(side.ends[before - 1]) if before else 0 for side in (self.one, self.other))
        return len(self.other.text.encode()[: start_there + byte - start].decode())
