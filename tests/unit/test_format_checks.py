"""Format errors: each rule by what it finds and by its near misses, and how rules are configured."""

import time
from typing import Any

import pytest
from call_texts import ALL, GOOD, RULES, WHOLE, check_found, config, filled, hostile, tagged, thorough, turn_of
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from opd.config.tasks import ChecksConfig, Rule
from opd.rewards.format_checks import CHECKS, SEARCHED_CHARACTERS, Found, check_turn
from opd.text.tool_calls import Syntax

CALL = tagged(GOOD)
SOME = " ".join(f"word{i}" for i in range(19))


def found(rule: Rule, text: str | bytes, *, settings: dict[str, Any] | None = None, **how: Any) -> list[str]:
    """The texts that a rule finds; "" for what is missing, which it finds at the end."""
    turn = turn_of(text, config(rule, **(settings or {})), **how)
    errors = check_turn(turn, [rule])
    assert all(e.rule == rule and (e.start < e.end or e.end == len(turn.text)) for e in errors)
    return [turn.text[e.start : e.end] for e in errors]


# rules


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("tool_call", tagged(GOOD[:-1])),
        ("unknown_tool", tagged(GOOD.replace("add", "sub"))),
        ("tool_arguments", tagged(GOOD.replace("1", '"1"'))),
        ("dropped_call", f"<tool_cal>{GOOD}</tool_call>"),
    ],
)
def test_each_way_to_fail_a_call_is_a_rule_of_its_own(rule: Rule, wrong: str):
    text = f"one {wrong} two {CALL} three"
    assert found(rule, text) == [wrong]
    for other in ("tool_call", "unknown_tool", "tool_arguments", "dropped_call"):
        assert other == rule or not found(other, text)
    assert not found(rule, f"one {CALL} two")


def test_a_call_is_judged_by_the_syntax_of_the_run():
    assert not found("dropped_call", GOOD, syntax="json")
    assert found("dropped_call", GOOD, syntax="hermes") == [GOOD]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (WHOLE, []),
        (f"Well: {WHOLE}.", []),
        ("<think>so <b>x</b> </thinking></think><answer>3</answer>", []),
        ("", [""]),
        ("<think>so</think> 3", [""]),
        ("<think>so</think> <answer>3", [""]),
        ("so</think> <answer>3</answer>", [""]),
        ("<think>so</think><think>on</think><answer>3</answer>", ["<think>", "</think>"]),
        (f"{WHOLE}</answer>", ["</answer>"]),
        ("<answer>3</answer><think>so</think>", ["<think>", "</think>"]),
        ("<think><answer>so</think>3</answer>", ["</think>"]),
        ("</think>so<think> <answer>3</answer>", ["<think>"]),
    ],
)
def test_tags_stand_once_each_and_in_order(text: str, wrong: list[str]):
    assert found("tags", text) == wrong


def test_a_turn_that_is_not_the_last_may_lack_tags_but_not_their_counterparts():
    for text in ("", "Hello.", f"<think>so</think>{CALL}"):
        assert found("tags", text, last=False) == []
        assert found("tags", text, last=True) == [""]
    assert found("tags", f"<think>so {CALL}", last=False) == [""]
    assert found("tags", "<think>so</think></think>", last=False) == ["</think>"]


def test_a_tag_that_the_prompt_has_opened_stands_already():
    rest = WHOLE.removeprefix("<think>")
    assert found("tags", rest) == [""]
    assert found("tags", rest, opened="think") == []
    assert found("tags", WHOLE, opened="think") == ["<think>"]
    assert found("tags", WHOLE, opened="other") == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", []),
        ("no `code` and ```a line``` of it", []),
        ("```one line``` of it", []),
        ("```python\nx = 1\n```", []),
        ("- so:\n    ```\n    x\n    ```  \nand on", []),
        ("~~~\n```\n~~~", []),
        ("````md\n```\n````", []),
        ("```python\nx = 1", ["```python"]),
        ("```python\nx = 1\n```\n```\n", ["```"]),
        ("```a\n```b\n", ["```a"]),
        ("````\n```", ["````"]),
        ("~~~\n```", ["~~~"]),
        ("`" * 100, ["`" * 100]),
    ],
)
def test_a_code_block_ends_with_a_fence_like_its_first(text: str, wrong: list[str]):
    assert found("code_fence", text) == wrong


def test_the_last_turn_has_the_answer_pattern_near_its_end():
    assert found("answer_pattern", "so Answer: 12.") == []
    assert found("answer_pattern", "so Answer: twelve") == [""]
    assert found("answer_pattern", "so Answer: twelve", last=False) == []
    far = "x" * (SEARCHED_CHARACTERS - len("Answer: 3"))
    assert found("answer_pattern", f"Answer: 3{far}") == []
    assert found("answer_pattern", f"Answer: 3{far}x") == [""]
    begins = {"answer_pattern": "^x"}
    assert found("answer_pattern", "x" * SEARCHED_CHARACTERS, settings=begins) == []
    assert found("answer_pattern", "y" + "x" * SEARCHED_CHARACTERS, settings=begins) == [""]


def test_a_turn_that_a_limit_has_cut_is_truncated():
    assert found("truncated", "and so on and", cut=True) == [""]
    assert found("truncated", "and so on and") == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", []),
        (f"{SOME} end", []),
        ("a b " * 9 + "a", []),  # 19 words
        ("a b " * 10, ["a b " * 9]),  # 20 words: all after the second begin 3-grams that stood before
        (f"{SOME} " + "no no yes " * 8, []),  # 19 of 41 3-grams
        (f"{SOME} " + "no no yes " * 30, ["no no yes " * 29]),
        ("ha" * 63, []),  # 126 characters
        ("ha" * 64, ["ha" * 63]),
        ("谢谢你" * 60, ["谢谢你" * 59]),
        ("".join(map(chr, range(0x4E00, 0x4E00 + 300))), []),
        ("".join(str(i) for i in range(1000, 1300)), []),
        (f"{SOME} {SOME[::-1]} " + "=" * 127, []),
        (f"{SOME} {SOME[::-1]} " + "=" * 200 + " end", ["=" * 199]),
        ("one\nshort line\n" * 3 + "x" * 300, ["one\nshort line\n" * 2 + "x" * 300]),
    ],
)
def test_what_repeats_is_found_by_words_and_by_characters(text: str, wrong: list[str]):
    assert found("repetition", text) == [w.strip() for w in wrong]


def test_how_much_may_repeat_is_a_setting():
    text = f"{SOME} " + "no no yes " * 8
    assert found("repetition", text, settings={"max_repetition": 0.47}) == []
    assert len(found("repetition", text, settings={"max_repetition": 0.46})) == 1


@pytest.mark.parametrize(
    ("raw", "wrong"),
    [
        ("naïve 🙂 \ufffd".encode(), []),
        (b"a\xffb", ["\ufffd"]),
        (b"a\xff\xfe b\xc3(", ["\ufffd\ufffd", "\ufffd"]),
        (b"\xef\xbf\xbd\xe4\xb8", ["\ufffd"]),
        (b"\xed\xa0\x80", ["\ufffd\ufffd\ufffd"]),  # a surrogate
        (b"\xe4\xe4\xb8\xf0\x9f\x99x", ["\ufffd\ufffd\ufffd"]),
    ],
)
def test_bytes_that_are_no_text_are_found_where_they_are_shown(raw: bytes, wrong: list[str]):
    assert found("invalid_utf8", raw) == wrong


def test_a_character_that_a_limit_has_cut_is_no_invalid_text():
    half = "so 🙂".encode()[:-1]
    assert found("invalid_utf8", half, cut=True) == []
    assert found("invalid_utf8", half) == ["\ufffd"]
    assert found("invalid_utf8", b"\xff" + half, cut=True) == ["\ufffd"]


def test_nothing_follows_the_end_of_an_answer():
    assert found("after_answer", "<answer>3</answer> \n") == []
    assert found("after_answer", "<answer>3</answer> so it is. ") == ["so it is."]
    assert found("after_answer", "<answer>3</answer>.</answer>") == [".</answer>"]
    assert found("after_answer", "no answer at all") == []


def test_every_rule_has_a_check_and_rules_are_run_in_their_order():
    assert set(CHECKS) == set(RULES)
    turn = turn_of("```\nno tags", cut=True)
    assert check_turn(turn, ["truncated", "code_fence"]) == [Found("truncated", 11, 11), Found("code_fence", 0, 3)]
    assert check_turn(turn, []) == []


@thorough
@given(
    st.lists(
        hostile.map(lambda text: text.encode(errors="surrogatepass"))
        | st.binary(max_size=8)
        | st.sampled_from(
            [b"<think>", b"</think>", b"<answer>", b"</answer>", b"\n```", "🙂".encode()[:3], b"x " * 40]
        ),
        max_size=6,
    ).map(b"".join),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["hermes", "json"]),
)
def test_no_turn_raises_and_what_is_found_lies_in_it(raw: bytes, last: bool, cut: bool, syntax: Syntax):
    check_found(turn_of(raw, last=last, cut=cut, syntax=syntax))


@pytest.mark.parametrize(
    "fragment",
    [
        "`",
        "```\n",
        "~~~ `\n",
        " ",
        "a ",
        "a",
        "<think>",
        "</answer>",
        "<tool_call>",
        "\n",
        "字",
        "\t`",
        "x" * 127 + " ",
    ],
)
def test_a_million_characters_take_seconds(fragment: str):
    turn = turn_of(filled(fragment), cut=True)
    start = time.process_time()
    check_turn(turn, RULES)
    assert time.process_time() - start < 20.0  # half a second to two here; what is not linear takes minutes


def test_a_million_bytes_that_are_no_text_take_seconds():
    turn = turn_of(b"\xff\xe4\xb8a" * 250_000)
    start = time.process_time()
    check_turn(turn, ["invalid_utf8"])
    assert time.process_time() - start < 20.0


def test_a_pattern_that_takes_for_ever_finds_nothing_within_its_time():
    began = time.monotonic()
    assert found("answer_pattern", "a" * 64 + "!", settings={"answer_pattern": "(a|a)+$"}) == [""]
    assert time.monotonic() - began < 60.0  # a second here; without a limit it takes centuries


# configuration


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rules": ["tag"]}, "Input should be 'tool_call', 'unknown_tool'"),
        ({"rules": ["truncated", "truncated"]}, "'truncated' stands 2 times; name it once"),
        ({"rules": ["tags"]}, r"rule 'tags' needs the setting tags: write tags = \['think', 'answer'\]"),
        ({"rules": ["tags"], "tags": ["<think>"]}, "'<think>' is no name of a tag; write it without brackets"),
        ({"rules": ["tags"], "tags": ["a", "a"]}, "'a' stands 2 times"),
        ({"rules": ["answer_pattern"]}, r"needs the setting answer_pattern: write answer_pattern = 'Answer: \\d\+', a"),
        ({"rules": ["answer_pattern"], "answer_pattern": ""}, "needs the setting answer_pattern"),
        ({"rules": ["answer_pattern"], "answer_pattern": "("}, "is no regular expression: missing"),
        ({"rules": ["after_answer"]}, "needs the setting answer_end: write answer_end = '</answer>'"),
        ({"tags": ["think"]}, "tags works only with the rule 'tags': add 'tags' to rules, or remove tags"),
        ({"answer_pattern": "x"}, "answer_pattern works only with the rule 'answer_pattern'"),
        ({"answer_end": "x"}, "answer_end works only with the rule 'after_answer'"),
        ({"max_repetition": 0.5}, "max_repetition works only with the rule 'repetition'"),
        ({"rules": ["repetition"], "max_repetition": 1.0}, "less than 1"),
        ({"rules": ["repetition"], "max_repetition": 0}, "greater than 0"),
    ],
    ids=str,
)
def test_checks_that_make_no_sense_say_what_to_write(tree: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ChecksConfig(**tree)


def test_checks_survive_saving_and_loading_and_are_off_by_default():
    assert ChecksConfig().rules == []
    for checks in (ALL, ChecksConfig(), config("repetition", max_repetition=0.5)):
        assert ChecksConfig(**checks.model_dump(mode="json")) == checks
