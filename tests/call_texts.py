"""Texts with tool calls, right and wrong, the tools that they call, and what must hold for every text."""

import json
from typing import Any

from hypothesis import strategies as st

from opd.text.tool_calls import MAX_CALLS, Parsed, Syntax, parse_calls

SYNTAXES: tuple[Syntax, ...] = ("hermes", "json")


def tool(name: str, properties: dict[str, Any] | None = None, **schema: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties or {}, **schema}
    return {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": parameters}}


ADD = tool(
    "add",
    {"a": {"type": "integer"}, "b": {"type": "integer", "maximum": 99}},
    required=["a", "b"],
    additionalProperties=False,
)
NOTE = tool("note")
UNIQUE = tool("unique", {"items": {"type": "array", "uniqueItems": True}})
# Two branches a level: a check that looks at all of them takes 2^depth steps.
_TREE = {"properties": {"left": {"$ref": "#/$defs/tree"}, "op": {"enum": ["+"]}}, "required": ["op"]}
TREE = {
    "type": "function",
    "function": {
        "name": "tree",
        "parameters": {"$ref": "#/$defs/tree", "$defs": {"tree": {"anyOf": [_TREE, dict(_TREE)]}}},
    },
}
TOOLS = (ADD, NOTE, UNIQUE, TREE)
GOOD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


def tagged(inner: str) -> str:
    return f"<tool_call>{inner}</tool_call>"


def check_parsed(text: str, tools: Any, syntax: Syntax) -> Parsed:
    """What must hold for every text."""
    parsed = parse_calls(text, tools, syntax=syntax)
    assert parse_calls(text, tools, syntax=syntax) == parsed
    position = 0
    for item in sorted((*parsed.calls, *parsed.errors), key=lambda item: item.start):
        assert position <= item.start < item.end <= len(text)
        position = item.end
    for items in (parsed.calls, parsed.errors):
        assert [i.start for i in items] == sorted(i.start for i in items)
    names = {t["function"]["name"] for t in tools}
    for call in parsed.calls:
        assert call.name in names
        json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
    for error in parsed.errors:
        assert 0 < len(error.detail) <= 200
        assert all(" " <= c <= "~" for c in error.detail), error.detail
    assert parse_calls(parsed.content, tools, syntax=syntax).calls == ()
    assert len(parsed.calls) + sum(e.reason != "dropped" for e in parsed.errors) <= MAX_CALLS + 1
    if not parsed.calls:
        assert parsed.content == text
    return parsed


FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool_cal>", "<function=add>", GOOD, tagged(GOOD), "{", "}", "[", "]", '"', ",", ":",
    "\\", '"name": "add"', '{"name": "note", "arguments": {', "}}", "add(", "\n", "```json", " ", "1e999", "NaN",
    "9" * 80, "\ud800", "\x00", "\x1b[2J", "<script>", "🙂", "[TOOL_CALLS]", '{"name": "tree", "arguments": {"left": ',
)  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=24).map("".join)


def filled(fragment: str, size: int = 1_000_000) -> str:
    return fragment * (size // len(fragment))
