"""Tool calls in text that may be anything: what is a call, what is an error, and which tools are none."""

import json
from typing import Any

import pytest
from call_texts import ADD, GOOD, NOTE, SYNTAXES, TOOLS, check_parsed, tagged, tool

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


def note(arguments: str) -> str:
    """A call of a tool that takes anything, its arguments as they are written."""
    return tagged(f'{{"name": "note", "arguments": {arguments}}}')


def only_error(text: str, *, syntax: Syntax = "hermes", tools: Any = TOOLS) -> CallError:
    parsed = parse_calls(text, tools, syntax=syntax)
    assert parsed.calls == ()
    assert parsed.content == text
    [error] = parsed.errors
    return error


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
