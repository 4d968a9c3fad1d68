"""How a chat template writes tool calls, found by rendering calls that are given as data.

Nothing here knows a syntax. Calls with made-up names and arguments show which pieces of the text are the template's own. A text
with other pieces around its calls is not taken apart.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

from opd.errors import DataError
from opd.records import Message
from opd.text.encoding import Quotes
from opd.text.special_tags import opened_thinking
from opd.text.tool_calls import Syntax, parse_calls


class Apply(Protocol):
    """Renders a conversation and its tools, with the generation prompt or without; raises DataError where the template refuses
    them."""

    def __call__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generate: bool) -> str: ...


_QUESTION: Message = {"role": "user", "content": "?"}
_TEXT = "aXbYcZ"
_NAME, _KEY, _VALUE = "dUeVfW", "gRhSiT", "jOkPlQ"
_MADE_UP = re.compile(rf'{_NAME}(?P<name>\d+)x|\{{\s*"{_KEY}(?P<arguments>\d+)x"\s*:\s*"{_VALUE}"\s*\}}')
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Payload:
    """A part of a call that every syntax writes: its name, without quotation marks, or its arguments as a JSON object.

    call: the number of the call in the turn; start, end: characters of the text.
    """

    call: int
    part: Literal["name", "arguments"]
    start: int
    end: int


@dataclass(frozen=True)
class CallText:
    """Calls as a template writes them.

    text: with quoted special tokens restored; own: the characters [start, end) outside quotes, where special tokens are the
    template's; payloads: those that were found, in order. joined: the calls follow the text of an answer. Otherwise they stand
    alone, and `led` tells whether the template's white space before an answer stands before them too.
    """

    text: str
    own: tuple[tuple[int, int], ...]
    payloads: tuple[Payload, ...]
    joined: bool
    led: bool


def tool_call(number: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call as data. Some templates require ids of nine letters or digits, and no template requires others."""
    return {"id": f"{number:09d}", "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def with_calls(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, syntax: Syntax
) -> tuple[Message, ...]:
    """The conversation with the assistant's calls as data: "tool_calls", and the text outside them as "content".

    A turn with a faulty call stays text. The answers of tools get the ids and names of the calls before them, in order; an answer
    without a call gets an id of its own.
    """
    found: list[Message] = []
    waiting: list[Mapping[str, Any]] = []
    number = 0
    for message in messages:
        if message.get("tool_calls"):  # of a prompt, which may have them as data
            waiting = list(message["tool_calls"])
            number += len(waiting)
        elif message["role"] == "assistant":
            parsed = parse_calls(message["content"], tools, syntax=syntax)
            waiting = []
            if parsed.calls and not parsed.errors:
                waiting = [tool_call(number + k, c.name, c.arguments) for k, c in enumerate(parsed.calls)]
                number += len(waiting)
                message = {**message, "content": parsed.content, "tool_calls": tuple(waiting)}
        elif message["role"] == "tool" and "tool_call_id" not in message:
            if waiting:
                answered = waiting.pop(0)
                message = {**message, "tool_call_id": answered["id"], "name": answered["function"]["name"]}
            else:
                message = {**message, "tool_call_id": f"{number:09d}"}
                number += 1
        found.append(message)
    return tuple(found)


class CallTemplate:
    """A template that writes calls. It takes the arguments of a call as an object, or as JSON text (`as_text`)."""

    def __init__(self, apply: Apply, ends: Sequence[str], *, as_text: bool) -> None:
        """ends: the special tokens that end a turn, as the template writes them."""
        self._apply = apply
        self._ends = sorted(ends, key=len, reverse=True)
        self._as_text = as_text

    def shaped(self, calls: Sequence[Mapping[str, Any]], quotes: Quotes) -> list[dict[str, Any]]:
        """Calls as the template takes them, quoted special tokens as placeholders.

        Raises DataError where there are some and JSON would escape them, or this template their placeholders.
        """
        marked = [{**call, "function": quotes.mark_all(call["function"])} for call in calls]
        if marked != [dict(call) for call in calls] and (self._escapes or not quotes.plain_in_json):
            raise DataError(
                "a tool call in the conversation contains the text of a special token, and the chat template would change this "
                "text; remove it from the call"
            )
        return [self._shape(call) for call in marked]

    def write(
        self, calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], quotes: Quotes, *, text: str
    ) -> CallText | None:
        """The template's text of these calls, without its text before them and the end of the turn.

        text: the text of the answer before the calls, if there is any. None where the template refuses the calls, does not end the
        turn behind them, or does not show them there.
        """
        made_up = [
            self._shape(tool_call(k, f"{_NAME}{k}x", {f"{_KEY}{k}x": _VALUE}) | {"id": call["id"]})
            for k, call in enumerate(calls)
        ]
        try:
            frame = self._frame(made_up, tools, quotes.mark(text))
            if frame is None:
                return None
            skeleton = self._inside(frame, made_up, tools)
            marked = self._inside(frame, self.shaped(calls, quotes), tools)
        except DataError:
            return None
        if skeleton is None or marked is None:
            return None
        found = _found(skeleton, marked, [quotes.mark_all(call["function"]) for call in calls])
        if not found:
            return None
        payloads = tuple(
            Payload(p.call, p.part, *(len(quotes.restore(marked[:edge])) for edge in (p.start, p.end))) for p in found
        )
        return CallText(quotes.restore(marked), quotes.unquoted(marked), payloads, frame.joined, frame.led)

    def _frame(
        self, calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str
    ) -> "_Frame | None":
        """The template's text around calls, found with made-up calls."""
        probe = _TEXT
        while probe in json.dumps([list(tools), text], ensure_ascii=False, default=dict):
            probe += _TEXT
        head, _, after = self._apply(
            [_QUESTION, {"role": "assistant", "content": probe}], tools, generate=False
        ).partition(probe)
        if text:
            before, shown, _ = self._answer(probe, calls, tools).partition(probe)
            if shown:
                # What a template writes behind a text may depend on the end of a thought in it.
                opening = self._apply([_QUESTION], tools, generate=True)
                opening = opening.removesuffix(opened_thinking(opening, text))
                whole = self._answer(text, calls, tools)
                start = next((start for start in (head, opening) if whole.startswith(start + text)), None)
                if start is not None:
                    return _Frame(text, start + text, after, joined=True, led=True)
                return _Frame(probe, before + probe, after, joined=True, led=True)
        whole = self._answer("", calls, tools)
        if whole.startswith(head):
            return _Frame("", head, after, joined=False, led=True)
        bare = head.rstrip()
        if not whole.startswith(bare):
            return None
        space = len(whole) - len(bare) - len(whole[len(bare) :].lstrip())
        return _Frame("", whole[: len(bare) + space], after, joined=False, led=False)

    def _answer(self, content: str, calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> str:
        answer = {"role": "assistant", "content": content, "tool_calls": list(calls)}
        return self._apply([_QUESTION, answer], tools, generate=False)

    def _inside(
        self, frame: "_Frame", calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """The template's text of calls within a frame; None where their text has another frame."""
        whole = self._answer(frame.content, calls, tools)
        if not whole.startswith(frame.start):
            return None
        rest = whole.removeprefix(frame.start)
        if rest.endswith(frame.after):
            return rest.removesuffix(frame.after)
        shown = rest.rstrip()
        end = next((end for end in self._ends if shown.endswith(end)), None)  # another end token than behind an answer
        return None if end is None else shown.removesuffix(end)

    def _shape(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        if self._as_text:
            function = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        return {**call, "function": function}

    @cached_property
    def _escapes(self) -> bool:
        """Whether the template escapes characters outside ASCII in arguments."""
        call = self._shape(tool_call(0, _NAME, {_KEY: "\U00100000"}))
        return "\U00100000" not in self._answer("", [call], [_tool(_NAME)])


def shown_calls(template: CallTemplate | None, message: Message, quotes: Quotes) -> Message:
    """A message with calls as data, as its template takes them. Without a template for calls they follow its text, in tags."""
    calls = message["tool_calls"]
    if template is not None:
        return {**message, "tool_calls": template.shaped(calls, quotes)}
    written = [f"<tool_call>{json.dumps(call['function'], ensure_ascii=False)}</tool_call>" for call in calls]
    content = "\n".join([*filter(None, [message["content"]]), *written])
    return {**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content}


@dataclass(frozen=True)
class _Frame:
    """The text around calls. content: of their message; start: everything that the template writes before the calls; after: the
    text that follows any answer; joined, led: as in `CallText`."""

    content: str
    start: str
    after: str
    joined: bool
    led: bool


def call_template(apply: Apply, ends: Sequence[str]) -> CallTemplate | None:
    """The template as one that writes calls; None where it writes none.

    It gets arguments as an object or as text, whichever it writes as JSON.
    """
    found: CallTemplate | None = None
    for as_text in (False, True):
        template = CallTemplate(apply, ends, as_text=as_text)
        written = template.write([tool_call(0, _TEXT, {_TEXT: 1})], [_tool(_TEXT)], _UNQUOTED, text="")
        parts = {payload.part for payload in written.payloads} if written else set()
        if parts == {"name", "arguments"}:
            return template
        if "name" in parts:
            found = found or template
    return found


_UNQUOTED = Quotes(re.compile(r"(?!)"))


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def _found(skeleton: str, text: str, functions: Sequence[Mapping[str, Any]]) -> list[Payload]:
    """The payloads in the template's text of calls. skeleton: its text of made-up calls.

    Both texts are compared piece by piece, and the search ends where they differ.
    """
    found: list[Payload] = []
    place = position = 0
    for made_up in _MADE_UP.finditer(skeleton):
        piece = skeleton[place : made_up.start()]
        if not text.startswith(piece, position):
            break
        position += len(piece)
        part: Literal["name", "arguments"] = "arguments" if made_up["name"] is None else "name"
        number = int(made_up[part])
        end = _end_of(functions[number][part], text, position)
        if end is None:
            break
        if all((p.call, p.part) != (number, part) for p in found):
            found.append(Payload(number, part, position, end))
        place, position = made_up.end(), end
    return found


def _end_of(wanted: Any, text: str, start: int) -> int | None:
    """The end of the payload at `start`: this name, or this object in JSON; None for anything else."""
    if isinstance(wanted, str):
        return start + len(wanted) if text.startswith(wanted, start) else None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except ValueError:
        return None
    return end if value == wanted else None
