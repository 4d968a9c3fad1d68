"""Texts with tool calls and format errors, the tools that they call, and what must hold of every text."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from factories import byte_tokenizer, prompt
from hypothesis import settings
from hypothesis import strategies as st

from opd.config.tasks import ChecksConfig, Rule
from opd.records import Finish, Rollout, Turn
from opd.rewards.format_checks import CheckedTurn, Found, check_turn, flag_errors
from opd.text.tokenizer import TokenBytes, token_bytes
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


thorough = settings(max_examples=200)
RULES: tuple[Rule, ...] = get_args(Rule)
SETTINGS: dict[str, dict[str, Any]] = {
    "tags": {"tags": ["think", "answer"]},
    "answer_pattern": {"answer_pattern": r"Answer: \d+"},
    "after_answer": {"answer_end": "</answer>"},
}
ALL = ChecksConfig(rules=list(RULES), **{k: v for each in SETTINGS.values() for k, v in each.items()})
WHOLE = "<think>so</think> <answer>3</answer>"


def config(rule: Rule, **changes: Any) -> ChecksConfig:
    return ChecksConfig(rules=[rule], **(SETTINGS.get(rule, {}) | changes))


def turn_of(
    text: str | bytes,
    checks: ChecksConfig = ALL,
    *,
    last: bool = True,
    cut: bool = False,
    syntax: Syntax = "hermes",
    opened: str = "",
) -> CheckedTurn:
    raw = text if isinstance(text, bytes) else text.encode()
    return CheckedTurn(raw.decode(errors="replace"), TOOLS, syntax, last, cut, raw, checks, opened)


def check_found(turn: CheckedTurn) -> list[Found]:
    """What must hold for every turn."""
    errors = check_turn(turn, RULES)
    for rule in RULES:
        position = 0
        for error in (e for e in errors if e.rule == rule):
            assert position <= error.start <= error.end <= len(turn.text)
            assert error.start < error.end or error.end == len(turn.text)
            position = error.end
    assert check_turn(turn, RULES) == errors
    return errors


def flagged_rollout(parts: Sequence[Sequence[int]], *, finish: Finish = "end", tools: Any = TOOLS) -> Rollout:
    """A rollout of a prompt's tokens and then, in turn, the student's and observations."""
    ids = np.array([i for part in parts for i in part], dtype=np.int32)
    edges = np.cumsum([0, *map(len, parts)]).tolist()
    authors = ["prompt", *["student", "observation"] * len(parts)]
    turns = tuple(Turn(a, s, e) for a, s, e in zip(authors, edges[:-1], edges[1:], strict=False))
    mask = np.zeros(len(ids), dtype=bool)
    for turn in turns:
        mask[turn.start : turn.end] = turn.author == "student"
    replies = [{"role": "assistant" if t.author == "student" else "tool", "content": "..."} for t in turns[1:]]
    asked = replace(prompt(), tools=tuple(tools))
    zeros = np.zeros(len(ids), dtype=np.float32)
    return Rollout(asked, 0, ids, mask, zeros, turns, (*asked.messages, *replies), finish, 0)


BYTES = token_bytes(byte_tokenizer())


ID_OF = {BYTES.of(i)[0]: i for i in range(256)}


def flagged(item: Rollout, checks: ChecksConfig, table: TokenBytes = BYTES, **how: Any) -> list[tuple[str, bytes]]:
    """(rule, the bytes of its tokens) of every flag; the flags hold what they must for every rollout."""
    done = flag_errors(item, checks, table, syntax="hermes", **how)
    students = [t for t in done.turns if t.author == "student"]
    for flag in done.flags:
        assert flag.start < flag.end
        assert any(t.start <= flag.start and flag.end <= t.end for t in students)
        assert done.loss_mask[flag.start : flag.end].all()
    assert done.messages is item.messages
    return [(f.rule, table.join(done.token_ids[f.start : f.end]).tobytes()) for f in done.flags]
