"""Tool calls in the text of a turn.

A model may write any text. It is read strictly, in linear time, and nothing in it raises or is executed. A faulty call (no JSON,
no such tool, arguments outside the schema), and text that was meant as a call but is none in the syntax, is an error with its
place in the text.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from opd.config import nearest
from opd.text.tool_schemas import Toolbox, kind

Syntax: TypeAlias = Literal["hermes", "json"]
"""How calls are written: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number in a turn (Hermes, Qwen2.5); or
the whole turn is one JSON object {"name", "parameters" or "arguments"} (Llama 3.1)."""

Reason: TypeAlias = Literal["unparsed", "unknown", "arguments", "dropped"]
"""Not the JSON object of the syntax; a tool that does not exist; arguments outside its schema; text that was meant as a call, and
is none in the syntax."""

MAX_CALL_BYTES = 64 * 1024
MAX_DEPTH = 32
MAX_CALLS = 256  # in one turn, errors included
_MAX_DIGITS = 64  # of an integer
_MAX_DETAIL = 200

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile("</?tool_call>")
_SPACE = re.compile(r"[ \t\n\r]*+")
_CLOSING = re.compile(r"[ \t\n\r]*+</tool_call>")
_TOKEN = re.compile(r'[ \t\n\r,:]++|[-+0-9.eE]++|true|false|null|"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}]', re.DOTALL)
_NAMED = re.compile(
    r"""([{,])[ \t\n\r]{0,16}+["']name["'][ \t\n\r]{0,16}+:[ \t\n\r]{0,16}+["']([^"'\\\n]{1,128}+)["']"""
)
_ARGUMENTS = re.compile(r"""["'](?:arguments|parameters)["'][ \t\n\r]{0,16}+:""")
_WRITTEN = re.compile(r"^[ \t]{0,16}+(?:print\()?([A-Za-z_][\w.-]{0,127}+)\([^\n]*+", re.MULTILINE)
_FUNCTION = re.compile(r"<function=([\w.-]{1,128}+)>?")
# a tag by its first two words, under whatever bars and lines a family draws around them
_TAG_LIKE = re.compile(r"<[|｜/ ]{0,3}([A-Za-z]{2,12}+(?:[_▁ -][A-Za-z]{1,12}+)?)(?:[^<>\n]{0,24}>)?")
_FOREIGN = re.compile(r"\[TOOL_CALLS\](?:[ \n]{0,4}+\[)?|<\|python_tag\|>|<\|START_ACTION\|>")


@dataclass(frozen=True)
class Call:
    """One call: characters [start, end) of the text, tags included."""

    name: str
    arguments: Mapping[str, Any]
    start: int
    end: int


@dataclass(frozen=True)
class CallError:
    """A failed call: characters [start, end) of the text. detail: printable ASCII, at most 200 characters."""

    reason: Reason
    detail: str
    start: int
    end: int


@dataclass(frozen=True)
class Parsed:
    """content: the text outside calls, errors included; calls and errors, both in the order of the text, never overlap."""

    content: str
    calls: tuple[Call, ...]
    errors: tuple[CallError, ...]


class _Refused(Exception):
    """Why something is no call."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


def parse_calls(text: str, tools: Sequence[Mapping[str, Any]], *, syntax: Syntax) -> Parsed:
    """The calls that a turn makes and those that it fails to make.

    tools: {"type": "function", "function": {"name", "description", "parameters": JSON schema}} each. A call is strict JSON (no
    NaN, no infinity, no repeated key, no lone surrogate, at most 64 KiB and 32 levels) of exactly the keys of the syntax, names
    a known tool, and has arguments within that tool's schema (Draft 2020-12; `format` is not asserted).

    Calls are taken out of `content`, and the white space around it; a turn without calls keeps its text as it is. In the
    "json" syntax an object that neither has arguments nor names a known tool is an answer, not a call. What follows the 256th
    call of a turn is one error.

    Raises DataError where `tools` themselves are no tools, as `check_tools` does; no text makes it raise.
    """
    known = Toolbox(tools)
    found = _hermes(text, known) if syntax == "hermes" else _whole(text, known)
    found += _dropped(text, known, found)
    found.sort(key=lambda item: item.start)
    calls = tuple(item for item in found if isinstance(item, Call))
    errors = tuple(item for item in found if isinstance(item, CallError))
    return Parsed(_content(text, calls, tools), calls, errors)


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError naming the first tool that has no name, one that is taken, or parameters that are no JSON schema."""
    Toolbox(tools)


def tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools for a chat template that has no place for them: a line of JSON each, and how to call one; "" for none."""
    if not tools:
        return ""
    lines = [json.dumps(tool, ensure_ascii=False, default=dict) for tool in tools]
    example = f'{_OPEN}{{"name": NAME, "arguments": {{...}}}}{_CLOSE}'
    return "\n".join(["You may call these tools:", *lines, f"To call one, write {example} with arguments as JSON."])


def _hermes(text: str, known: Toolbox) -> list[Call | CallError]:
    """The calls and errors between tags. A tag within a string of a call is text; `_dropped` finds closing tags alone."""
    found: list[Call | CallError] = []
    tags = list(_TAG.finditer(text))
    position = 0
    for i, tag in enumerate(tags):
        if tag.start() < position or tag[0] == _CLOSE:
            continue
        if len(found) == MAX_CALLS:
            found.append(CallError("unparsed", f"more than {MAX_CALLS} calls in one turn", tag.start(), len(text)))
            break
        following = tags[i + 1] if i + 1 < len(tags) else None
        found.append(_tagged(text, tag, following, known))
        position = found[-1].end
    return found


def _tagged(text: str, tag: re.Match[str], following: re.Match[str] | None, known: Toolbox) -> Call | CallError:
    """The call that an opening tag begins; one that is not framed as a call ends with the next tag, or with the text."""
    start = skip_space(text, tag.end())
    end, fault = _frame(text, start)
    closing = None if fault else _CLOSING.match(text, end)
    if closing is None:
        rest = len(text) if following is None else following.end() if following[0] == _CLOSE else following.start()
        return CallError("unparsed", fault or f"no {_CLOSE} behind the object", tag.start(), rest)
    try:
        name, arguments = _judged(_strict(text[start:end]), known, ("arguments",))
    except _Refused as refused:
        return CallError(refused.reason, refused.detail, tag.start(), closing.end())
    return Call(name, arguments, tag.start(), closing.end())


def _whole(text: str, known: Toolbox) -> list[Call | CallError]:
    """The turn as one call; nothing where it is an answer. Objects within other text are left to `_dropped`."""
    start, stop = skip_space(text, 0), len(text.rstrip(" \t\n\r"))
    if not known.names or not text.startswith("{", start):
        return []
    end, fault = _frame(text, start)
    if not fault and end < stop:
        return []
    try:
        if fault:
            raise _Refused("unparsed", fault)
        value = _strict(text[start:end])
        if not value.keys() & {"arguments", "parameters"} and value.get("name") not in known:
            return []
        name, arguments = _judged(value, known, ("parameters", "arguments"))
    except _Refused as refused:
        if refused.reason == "unparsed" and not _names_known(text, known) and not _ARGUMENTS.search(text):
            return []
        return [CallError(refused.reason, refused.detail, start, stop)]
    return [Call(name, arguments, start, stop)]


def _names_known(text: str, known: Toolbox) -> bool:
    return any(found[2] in known for found in _NAMED.finditer(text))


def skip_space(text: str, start: int) -> int:
    """The first place from `start` on that is no white space of JSON."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def _frame(text: str, start: int) -> tuple[int, str]:
    """(where the JSON object at `start` ends, ""), or (where it stops being one, why), from its brackets and tokens alone.

    Nothing recurses, and of two starts at most one goes past the next tag: outside a string `<` is no token, nor is NaN.
    """
    if not text.startswith("{", start):
        return start, "expected a JSON object"
    position, depth, limit = start, 0, start + MAX_CALL_BYTES
    while token := _TOKEN.match(text, position, limit):
        position = token.end()
        if token[0] in ("{", "["):
            depth += 1
            if depth > MAX_DEPTH:
                return position, f"nested deeper than {MAX_DEPTH} levels"
        elif token[0] in ("}", "]"):
            depth -= 1
            if not depth:
                return position, ""
    if position >= len(text):
        return position, "the JSON object does not end"
    rest = text[position : position + 20]
    too_long = len(text) > limit and (position == limit or rest.startswith('"'))
    why = f"longer than {MAX_CALL_BYTES} bytes" if too_long else f"no JSON from character {position - start} on: {rest}"
    return position, _printable(why)


def _strict(raw: str) -> dict[str, Any]:
    """The value of a framed object, where it is JSON and nothing else. Raises _Refused."""
    try:
        if len(raw.encode()) > MAX_CALL_BYTES:
            raise _Refused("unparsed", f"longer than {MAX_CALL_BYTES} bytes")
        value = json.loads(raw, object_pairs_hook=_object, parse_int=_integer, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # an escape may stand for a lone surrogate
    except UnicodeEncodeError:
        raise _Refused("unparsed", "a lone surrogate, which is no text") from None
    except json.JSONDecodeError as error:
        raise _Refused("unparsed", _printable(f"no JSON: {error.msg} (character {error.pos})")) from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused("unparsed", _printable(f"key '{repeated}' stands twice"))
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _Refused("unparsed", f"an integer of {len(digits)} digits, at most {_MAX_DIGITS} are read")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise _Refused("unparsed", _printable(f"number {number[:40]} is too large"))
    return value


def _judged(value: Mapping[str, Any], known: Toolbox, keys: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a call whose arguments stand under one of `keys`. Raises _Refused."""
    given = [key for key in keys if key in value]
    if len(given) != 1 or len(value) != 2 or not isinstance(value.get("name"), str):
        expected = " or ".join(f"'{key}'" for key in keys)
        shown = ", ".join(f"'{key}'" for key in value) or "none"
        raise _Refused("unparsed", _printable(f"expected the keys 'name', a string, and {expected}; got {shown}"))
    name, arguments = value["name"], value[given[0]]
    if name not in known:
        raise _Refused("unknown", _printable(f"no tool '{name[:64]}'{nearest(name[:64], known.names)}"))
    if not isinstance(arguments, dict):
        raise _Refused("arguments", f"{given[0]}: expected an object, got {kind(arguments)}")
    if fault := known.fault(name, arguments, key=given[0]):
        raise _Refused("arguments", _printable(fault))
    return name, arguments


def _dropped(text: str, known: Toolbox, taken: Sequence[Call | CallError]) -> list[CallError]:
    """Text that was meant as a call and is none in the syntax; signs with nothing but white space between them are one error.

    taken: the calls and errors that were read already, in order. Without tools nothing is meant as a call.
    """
    if not known.names:
        return []
    starts, ends = [item.start for item in taken], [item.end for item in taken]
    merged: list[tuple[str, int, int]] = []
    for start, end, detail in sorted(_signs(text, known)):
        place = bisect_right(ends, start)  # the first that ends behind `start`
        if place < len(taken) and starts[place] <= start:
            continue
        end = min(end, starts[place]) if place < len(taken) else end
        if merged and (start <= merged[-1][2] or text[merged[-1][2] : start].isspace()):
            first, begin, until = merged[-1]
            merged[-1] = (first, begin, max(until, end))
        else:
            merged.append((detail, start, end))
    return [CallError("dropped", _printable(detail), start, end) for detail, start, end in merged]


def _signs(text: str, known: Toolbox) -> Iterator[tuple[int, int, str]]:
    """(start, end, description) of each sign that a call was meant."""
    for found in _TAG_LIKE.finditer(text):
        if _names_a_call(found[1].lower()):
            yield found.start(), found.end(), "a tag that is not the syntax's, or without its counterpart"
    for found in _FOREIGN.finditer(text):
        yield found.start(), found.end(), "a tag of another syntax"
    for pattern, how in ((_FUNCTION, "<function=...>"), (_WRITTEN, "name(...)")):
        for found in pattern.finditer(text):
            if found[1] in known:
                yield found.start(), found.end(), f"a call of '{found[1]}' written as {how}"
    position = 0
    while found := _NAMED.search(text, position):
        position = found.end()
        if found[2] in known:
            if found[1] == "{":
                position = max(position, _frame(text, found.start())[0])
            yield found.start(), position, f"a call of '{found[2]}' outside of what the syntax sees"


def _deletions(word: str) -> set[str]:
    """The word, and the word without each of its letters: two that share one differ by about one letter."""
    return {word} | {word[:i] + word[i + 1 :] for i in range(len(word))}


_NEAR = _deletions("toolcall") | _deletions("functioncall")


@lru_cache(maxsize=1024)
def _names_a_call(tag: str) -> bool:
    """Whether a tag of these words is "tool call" or "function call", misspelt by at most a letter or so."""
    return bool(_NEAR & _deletions(re.sub("[^a-z]", "", tag)))


def _content(text: str, calls: Sequence[Call], tools: Sequence[Mapping[str, Any]]) -> str:
    """The text without its calls."""
    if not calls:
        return text
    edges = [0, *(edge for call in calls for edge in (call.start, call.end)), len(text)]
    joined = "".join(text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)).strip()
    if any(isinstance(item, Call) for item in _hermes(joined, Toolbox(tools))):
        # what a call had cut in two forms another one when it is joined
        return joined.replace(_OPEN, _OPEN.replace("<", "< "))
    return joined


def _printable(text: str) -> str:
    """Printable ASCII, everything else escaped, at most `_MAX_DETAIL` characters."""
    if len(text) <= _MAX_DETAIL and text.isascii() and text.isprintable():
        return text
    shown = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[: _MAX_DETAIL + 1])
    return shown if len(shown) <= _MAX_DETAIL else shown[: _MAX_DETAIL - 3] + "..."
