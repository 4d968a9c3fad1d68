"""Tool calls in text that may be anything: what is a call, what is an error, and that nothing raises or hangs."""

import json
import string
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import DataError
from opd.text.tool_calls import (
    MAX_CALL_BYTES,
    MAX_CALLS,
    MAX_DEPTH,
    CallError,
    Parsed,
    Syntax,
    check_tools,
    parse_calls,
    tools_text,
)

thorough = settings(max_examples=300, deadline=None, derandomize=True)
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


def note(arguments: str) -> str:
    """A call of a tool that takes anything, its arguments as they are written."""
    return tagged(f'{{"name": "note", "arguments": {arguments}}}')


def only_error(text: str, *, syntax: Syntax = "hermes", tools: Any = TOOLS) -> CallError:
    parsed = parse_calls(text, tools, syntax=syntax)
    assert parsed.calls == ()
    assert parsed.content == text
    [error] = parsed.errors
    return error


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


# calls


def test_calls_between_tags_are_found_and_taken_out_of_the_text():
    text = f"Let me see.\n<tool_call>\n{GOOD}\n</tool_call>\n{note('{}')}"
    parsed = parse_calls(text, TOOLS, syntax="hermes")
    first, second = parsed.calls
    assert (first.name, first.arguments) == ("add", {"a": 1, "b": 2})
    assert (second.name, second.arguments) == ("note", {})
    assert text[first.start : first.end] == f"<tool_call>\n{GOOD}\n</tool_call>"
    assert text[second.start : second.end] == note("{}")
    assert (parsed.content, parsed.errors) == ("Let me see.", ())


@pytest.mark.parametrize("key", ["parameters", "arguments"])
def test_a_turn_that_is_one_object_is_a_call_in_the_json_syntax(key: str):
    text = f'\n {{"name": "add", "{key}": {{"a": 1, "b": 2}}}}\n'
    parsed = parse_calls(text, TOOLS, syntax="json")
    [call] = parsed.calls
    assert (call.name, call.arguments, text[call.start : call.end]) == ("add", {"a": 1, "b": 2}, text.strip())
    assert (parsed.content, parsed.errors) == ("", ())


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "The sum is 3.",
        "To add (or not) is the question; I can add(1, 2) for you.",
        '{"answer": 3}',
        '{"name": "Ada", "age": 36}',
        "<b>bold</b> <tool>hammer</tool>",
        "```python\nprint('hello')\n```",
        'The field "name": "add" is quoted here.',
        "\x1b[31m\x00\ud800 <|im_end|>",
    ],
)
def test_ordinary_text_is_neither_call_nor_error(text: str, syntax: Syntax):
    assert parse_calls(text, TOOLS, syntax=syntax) == Parsed(text, (), ())


def test_without_tools_a_tag_calls_an_unknown_tool_and_other_text_is_text():
    assert only_error(tagged(GOOD), tools=()).reason == "unknown"
    for text in (GOOD, "<tool_cal>{}</tool_call>", "add(1, 2)"):
        for syntax in SYNTAXES:
            assert parse_calls(text, (), syntax=syntax) == Parsed(text, (), ())


def test_tags_within_the_strings_of_a_call_are_text():
    inner = f'{{"text": {json.dumps(tagged(GOOD))}}}'
    [call] = parse_calls(note(inner), TOOLS, syntax="hermes").calls
    assert call.arguments == {"text": tagged(GOOD)}


def test_what_a_call_cuts_in_two_is_no_call_when_it_is_joined():
    text = f'<tool_call>{{"name": "note", {tagged(GOOD)}"arguments": {{}}}}</tool_call>'
    parsed = check_parsed(text, TOOLS, "hermes")
    assert [call.name for call in parsed.calls] == ["add"]
    assert parsed.content == '< tool_call>{"name": "note", "arguments": {}}</tool_call>'


# errors


@pytest.mark.parametrize(
    ("inner", "detail"),
    [
        ("", "expected a JSON object"),
        ("add(1, 2)", "expected a JSON object"),
        (f"[{GOOD}]", "expected a JSON object"),
        ("{'name': 'add'}", "no JSON from character 1 on: 'name'"),
        ('{"name": "add", "arguments": {"a": 1 "b": 2}}', "no JSON: Expecting ',' delimiter (character 37)"),
        ('{"name": "add", "arguments": {"a": 1, "b": 2}', "no JSON from character 45 on: </tool_call>"),
        (GOOD + "}", "no </tool_call> behind the object"),
        (GOOD + GOOD, "no </tool_call> behind the object"),
        ("{}", "expected the keys 'name', a string, and 'arguments'; got none"),
        ('{"name": "add"}', "got 'name'"),
        ('{"name": 1, "arguments": {}}', "got 'name', 'arguments'"),
        ('{"name": "add", "parameters": {}}', "got 'name', 'parameters'"),
        ('{"name": "add", "arguments": {}, "id": 1}', "got 'name', 'arguments', 'id'"),
        ('{"name": "add", "name": "note", "arguments": {}}', "key 'name' stands twice"),
        ('{"name": "note", "arguments": {"x": NaN}}', "no JSON from character 36 on: NaN"),
        ('{"name": "note", "arguments": {"x": -Infinity}}', "no JSON from character 37 on: Infinity"),
        ('{"name": "note", "arguments": {"x": 1e999}}', "number 1e999 is too large"),
        ('{"name": "note", "arguments": {"x": "\\ud800"}}', "a lone surrogate, which is no text"),
        ('{"name": "note", "arguments": {"x": "\ud800"}}', "a lone surrogate, which is no text"),
        ('{"name": "note", "arguments": {"x": "\n"}}', "no JSON: Invalid control character at (character 37)"),
    ],
)
def test_what_stands_between_tags_and_is_no_call_is_unparsed(inner: str, detail: str):
    text = f"before {tagged(inner)} behind"
    error = only_error(text)
    assert (error.reason, text[error.start : error.end]) == ("unparsed", tagged(inner))
    assert detail in error.detail


def test_a_call_without_its_closing_tag_is_unparsed_to_the_next_tag_or_the_end():
    text = f"see <tool_call>{GOOD} and on"
    error = only_error(text)
    assert (error.reason, error.start, error.end) == ("unparsed", 4, len(text))
    parsed = parse_calls(f"<tool_call>{GOOD}{tagged(GOOD)}", TOOLS, syntax="hermes")
    assert [e.end for e in parsed.errors] == [c.start for c in parsed.calls] == [len("<tool_call>" + GOOD)]


@pytest.mark.parametrize(
    ("depth", "digits", "size"), [(MAX_DEPTH - 2, 64, MAX_CALL_BYTES - 100), (0, 1, 0), (0, 1, MAX_CALL_BYTES - 100)]
)
def test_a_call_within_the_limits_of_depth_digits_and_size_is_read(depth: int, digits: int, size: int):
    value = f'{{"deep": {"[" * (depth - 1)}{"]" * (depth - 1)}, ' if depth > 1 else "{"
    inner = f'{value}"big": {"9" * digits}, "long": "{"x" * max(0, size - 200)}"}}'
    assert len(parse_calls(note(inner), TOOLS, syntax="hermes").calls) == 1


@pytest.mark.parametrize(
    ("inner", "detail"),
    [
        (f'{{"x": {"[" * (MAX_DEPTH - 1)}{"]" * (MAX_DEPTH - 1)}}}', "nested deeper than 32 levels"),
        (f'{{"x": {"9" * 65}}}', "an integer of 65 digits"),
        (f'{{"x": {"9" * 60000}}}', "an integer of 60000 digits"),
        (f'{{"x": "{"y" * MAX_CALL_BYTES}"}}', "longer than 65536 bytes"),
        (f'{{"x": "{"é" * (MAX_CALL_BYTES // 2)}"}}', "longer than 65536 bytes"),
        (f'{{"x": [{"1," * MAX_CALL_BYTES}1]}}', "longer than 65536 bytes"),
    ],
    ids=["depth", "digits", "many digits", "characters", "bytes", "items"],
)
def test_a_call_beyond_a_limit_is_unparsed(inner: str, detail: str):
    error = only_error(note(inner))
    assert error.reason == "unparsed"
    assert detail in error.detail


def test_calls_beyond_the_limit_of_a_turn_are_one_error():
    text = tagged(GOOD) * (MAX_CALLS + 50)
    parsed = check_parsed(text, TOOLS, "hermes")
    [error] = parsed.errors
    assert len(parsed.calls) == MAX_CALLS
    assert (error.start, error.end) == (MAX_CALLS * len(tagged(GOOD)), len(text))


def test_an_unknown_tool_is_told_the_nearest_name():
    error = only_error(tagged(GOOD.replace("add", "addd")))
    assert (error.reason, error.detail) == ("unknown", "no tool 'addd'; did you mean 'add'?")
    error = only_error(tagged('{"name": "\\u001b[31m<b>\\u0000", "arguments": {}}'))
    assert (error.reason, error.detail) == ("unknown", "no tool '\\x1b[31m<b>\\x00'")


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        ("[]", "arguments: expected an object, got array"),
        ('"{}"', "arguments: expected an object, got string"),
        ("null", "arguments: expected an object, got null"),
        ('{"a": 1}', "arguments: 'b' is a required property"),
        ('{"a": "1", "b": 2}', "arguments.a: expected integer, got string"),
        ('{"a": true, "b": 2}', "arguments.a: expected integer, got boolean"),
        ('{"a": 1.5, "b": 2}', "arguments.a: expected integer, got number"),
        ('{"a": 1, "b": 100}', "arguments.b: expected maximum 99"),
        ('{"a": 1, "b": 2, "c": 3}', "arguments: Additional properties are not allowed ('c' was unexpected)"),
    ],
)
def test_arguments_outside_the_schema_say_where_and_what_was_expected(arguments: str, detail: str):
    error = only_error(tagged(f'{{"name": "add", "arguments": {arguments}}}'))
    assert (error.reason, error.detail) == ("arguments", detail)


@pytest.mark.parametrize(
    ("schema", "value", "detail"),
    [
        ({"type": "array", "items": {"type": "string"}}, '["a", {}]', "arguments.x[1]: expected string, got object"),
        ({"type": ["string", "null"]}, "[]", "arguments.x: expected string or null, got array"),
        ({"enum": ["a", 1]}, "2", 'arguments.x: expected enum ["a", 1]'),
        ({"anyOf": [{"const": 1}]}, "2", 'arguments.x: expected anyOf [{"const": 1}]'),
        ({"properties": {"y": {"minItems": 1}}}, '{"y": []}', "arguments.x.y: expected minItems 1"),
        (False, "2", "arguments: a value that the schema forbids"),
    ],
)
def test_the_path_leads_into_arrays_and_objects(schema: Any, value: str, detail: str):
    call = tagged(f'{{"name": "f", "arguments": {{"x": {value}}}}}')
    assert only_error(call, tools=(tool("f", {"x": schema}),)).detail == detail


@pytest.mark.parametrize(
    ("items", "unique"),
    [("1, true, 0, false", True), ('1, "1", [1], {"a": 1}', True), ("1, 1.0", False), ("[1], [1.0]", False)],
)
def test_items_are_unique_as_json_compares_them(items: str, unique: bool):
    text = tagged(f'{{"name": "unique", "arguments": {{"items": [{items}]}}}}')
    parsed = parse_calls(text, TOOLS, syntax="hermes")
    assert (len(parsed.calls), [e.reason for e in parsed.errors]) == ((1, []) if unique else (0, ["arguments"]))


@pytest.mark.parametrize(
    "meant",
    [
        f"<tool_cal>{GOOD}</tool_call>",
        f"<toolcall>{GOOD}</toolcall>",
        f"<Tool_Call>\n{GOOD}\n</Tool_Call>",
        f"<tool_calls>\n{GOOD}\n</tool_calls>",
        f"<tool call>{GOOD}</tool call>",
        f"<|tool_call|>{GOOD}<|/tool_call|>",
        f"<tool_call\n{GOOD}",
        "<tool_cal>nonsense",
        f"{GOOD}</tool_call>",
        "</tool_call>",
        GOOD,
        '{"arguments": {"a": 1, "b": 2}, "name": "add"}',
        "{'name': 'add', 'arguments': {}}",
        f"```json\n{GOOD}\n```",
        "add(1, 2)",
        "  add(a=1, b=2)",
        "print(add(1, 2))",
        "```python\nadd(1, 2)\n```",
        '<function=add>{"a": 1, "b": 2}</function>',
        f"[TOOL_CALLS] [{GOOD}]",
        f"<|python_tag|>{GOOD}",
        f"<｜tool▁calls▁begin｜>{GOOD}",
    ],
)
def test_what_was_meant_as_a_call_and_is_not_seen_as_one_is_dropped(meant: str):
    text = f"Let me see.\n{meant}\nSo be it."
    error = only_error(text)
    assert error.reason == "dropped"
    assert text.index(meant) <= error.start < error.end <= text.index(meant) + len(meant)


def test_a_dropped_call_covers_its_tags_and_its_object():
    text = f"so <tool_cal>\n{GOOD}\n</tool_call> there"
    error = only_error(text)
    assert text[error.start : error.end] == f"<tool_cal>\n{GOOD}\n</tool_call>"


def test_a_dropped_call_stands_beside_one_that_is_seen():
    text = f"{tagged(GOOD)}\n{GOOD} {tagged(GOOD)}"
    parsed = check_parsed(text, TOOLS, "hermes")
    assert len(parsed.calls) == 2
    assert [(e.reason, text[e.start : e.end]) for e in parsed.errors] == [("dropped", GOOD)]


# the json syntax


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "add", "arguments": {"a": 1}', "unparsed"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "unparsed"),
        ('{"name": "add"}', "unparsed"),
        ('{"arguments": {}}', "unparsed"),
        ('{"type": "function", "name": "add", "parameters": {}}', "unparsed"),
        ('{"name": "add", "arguments": {}, "parameters": {}}', "unparsed"),
        ('{"name": "sub", "parameters": {}}', "unknown"),
        ('{"name": "add", "parameters": {"a": "x", "b": 2}}', "arguments"),
        (f"Let me see. {GOOD}", "dropped"),
        (f"{GOOD} is my call", "dropped"),
        (f"{GOOD}\n{GOOD}", "dropped"),
        (tagged(GOOD), "dropped"),
        ("add(1, 2)", "dropped"),
    ],
)
def test_a_turn_that_fails_to_be_a_call_in_the_json_syntax_says_how(text: str, reason: str):
    assert only_error(text, syntax="json").reason == reason


@pytest.mark.parametrize("text", ['{"answer": 3, "answer": 4}', "{x | x > 0}", '{"open": ', "{}"])
def test_an_object_that_is_no_call_is_an_answer_in_the_json_syntax(text: str):
    assert parse_calls(text, TOOLS, syntax="json") == Parsed(text, (), ())


# tools


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"name": "add"}], r"tools\[0\]: expected"),
        ([ADD, {"type": "function", "function": {"name": ""}}], r"tools\[1\]: expected"),
        ([ADD, ADD], "name 'add' was used before"),
        ([tool("add", {"a": {"type": "int"}})], "'add': parameters are no JSON schema"),
        ([tool("add", {"a": {"pattern": "("}})], "'add': parameters are no JSON schema"),
        ([tool("add", {"a": {"$ref": "https://example.org/a"}})], "reference 'https://example.org/a' leads nowhere"),
        ([tool("add", {"a": {"$ref": "#/$defs/a"}})], "leads nowhere; write it in"),
        ([{"function": object()}], "expected JSON objects"),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, message: str):
    with pytest.raises(DataError, match=message):
        check_tools(tools)


def test_a_tool_without_parameters_takes_none():
    bare = {"type": "function", "function": {"name": "now"}}
    call = tagged('{"name": "now", "arguments": {}}')
    assert len(parse_calls(call, (bare,), syntax="hermes").calls) == 1
    assert only_error(call.replace("{}", '{"x": 1}'), tools=(bare,)).reason == "arguments"


def test_a_schema_of_an_older_draft_is_read_as_the_present_one():
    draft = {"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {"a": ["b"]}}
    old = tool("old", {"child": {"$ref": "#"}}, **draft)
    error = only_error(tagged('{"name": "old", "arguments": {"child": {"a": 1}}}'), tools=(old,))
    assert error.detail == "arguments.child: 'b' is a dependency of 'a'"


def test_the_text_about_tools_has_a_line_each_and_shows_a_call():
    first, *lines, last = tools_text((ADD, NOTE)).split("\n")
    assert [json.loads(line) for line in lines] == [ADD, NOTE]
    assert "tools" in first
    shown = last[last.index("<tool_call>") : last.index("</tool_call>")].replace("NAME", '"note"').replace("...", "")
    assert len(parse_calls(shown + "</tool_call>", (NOTE,), syntax="hermes").calls) == 1
    assert tools_text(()) == ""


# laws

FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool_cal>", "<function=add>", GOOD, tagged(GOOD), "{", "}", "[", "]", '"', ",", ":",
    "\\", '"name": "add"', '{"name": "note", "arguments": {', "}}", "add(", "\n", "```json", " ", "1e999", "NaN",
    "9" * 80, "\ud800", "\x00", "\x1b[2J", "<script>", "🙂", "[TOOL_CALLS]", '{"name": "tree", "arguments": {"left": ',
)  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=24).map("".join)
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


def filled(fragment: str, size: int = 1_000_000) -> str:
    return fragment * (size // len(fragment))


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
