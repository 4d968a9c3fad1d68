"""What holds of any text that may have tool calls: nothing raises or hangs, and calls come back as they were."""

import json
import string
import time
from typing import Any

import pytest
from call_texts import GOOD, NOTE, SYNTAXES, TOOLS, check_parsed, filled, hostile, tagged
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.text.tool_calls import Syntax, parse_calls

thorough = settings(max_examples=300)

# laws

numbers = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text() | st.sampled_from(["</tool_call>", "<tool_call>", '"}}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@thorough
@given(st.text() | hostile, st.sampled_from(SYNTAXES), st.sampled_from([TOOLS, (NOTE,), ()]))
def test_no_text_raises_and_what_is_found_lies_in_it(text: str, syntax: Syntax, tools: Any):
    check_parsed(text, tools, syntax)


@thorough
@given(values, st.sampled_from(SYNTAXES), st.booleans())
def test_no_json_raises(value: Any, syntax: Syntax, in_tags: bool):
    raw = json.dumps(value)
    check_parsed(tagged(raw) if in_tags else raw, TOOLS, syntax)


@settings(thorough, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.text(string.ascii_letters + " .", max_size=20),
)
def test_well_formed_calls_come_back_as_they_were(
    arguments: list[dict[str, Any]], escape: bool, indent: int | None, prose: str
):
    rendered = [
        json.dumps({"name": "note", "arguments": each}, ensure_ascii=escape, indent=indent) for each in arguments
    ]
    parsed = check_parsed(prose + "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in rendered), TOOLS, "hermes")
    assert [call.arguments for call in parsed.calls] == arguments
    assert (parsed.errors, parsed.content.strip()) == ((), prose.strip())
    for each, text in zip(arguments, rendered, strict=True):
        [call] = check_parsed(text, TOOLS, "json").calls
        assert call.arguments == each


@thorough
@given(st.integers(), st.integers(max_value=99), st.sampled_from(SYNTAXES))
def test_arguments_within_a_typed_schema_come_back(a: int, b: int, syntax: Syntax):
    raw = json.dumps({"name": "add", "arguments": {"a": a, "b": b}})
    [call] = check_parsed(tagged(raw) if syntax == "hermes" else raw, TOOLS, syntax).calls
    assert call.arguments == {"a": a, "b": b}


# time


_NESTED = '{"op": "-", "left": ' * 28 + '"' + "x" * 50_000 + '"' + "}" * 28
_MIXED = ",".join(f'{i}, "{i}", {{"{i}": []}}' for i in range(1_500))
ADVERSARIAL = {
    "opening tags": filled("<tool_call>"),
    "closing tags": filled("</tool_call> x"),
    "opened objects": filled('<tool_call>{"'),
    "opened arrays": filled('<tool_call>{"x": ["<tool_call>["","'),
    "brackets": "[" * 1_000_000,
    "braces": "{" * 1_000_000,
    "objects in objects": filled('{"a":'),
    "backticks": "`" * 1_000_000,
    "spaces": " " * 1_000_000,
    "lines": "\n" * 1_000_000,
    "quotes": filled('\\"'),
    "names": filled('{"name": "add", '),
    "names and brackets": filled('{"name": "add",' * 31 + "[]," * 20_000),
    "unknown tools": filled(tagged(GOOD.replace("add", "adx"))),
    "calls": filled(tagged(GOOD)),
    "written calls": filled("add(\n"),
    "tags like it": filled("<tool_cal> x"),
    "angles": filled("<ab "),
    "recursive schema": filled(tagged(f'{{"name": "tree", "arguments": {_NESTED}}}')),
    "unsortable items": filled(tagged(f'{{"name": "unique", "arguments": {{"items": [{_MIXED}]}}}}')),
    "surrogates": "\ud800" * 1_000_000,
}


@pytest.mark.parametrize(
    ("name", "syntax"),
    [(name, "hermes") for name in ADVERSARIAL]
    + [(name, "json") for name in ("opening tags", "braces", "objects in objects", "names and brackets", "calls")],
)
def test_a_million_characters_take_seconds(name: str, syntax: Syntax):
    start = time.process_time()
    parse_calls(ADVERSARIAL[name], TOOLS, syntax=syntax)
    assert time.process_time() - start < 20.0  # a tenth to two seconds here; what is not linear takes minutes
