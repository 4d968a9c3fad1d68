"""The tokens that are flagged for format errors: those that spell what a rule found."""

from call_texts import (
    ALL,
    BYTES,
    GOOD,
    ID_OF,
    RULES,
    WHOLE,
    config,
    flagged,
    flagged_rollout,
    hostile,
    tagged,
    thorough,
    turn_of,
)
from factories import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from opd.config.tasks import ChecksConfig
from opd.records import Finish, Flag
from opd.rewards.format_checks import check_turn, flag_errors
from opd.text.tokenizer import token_bytes

START, END = 256, 257


def spelled(text: str | bytes) -> list[int]:
    """A token a byte."""
    return [ID_OF[b] for b in (text if isinstance(text, bytes) else text.encode())]


def test_a_place_in_the_text_is_the_tokens_that_spell_it():
    call = tagged(GOOD.replace("1", '"é🙂"'))
    item = flagged_rollout([spelled("hi"), [*spelled(f"naïve 🙂 {call} 字"), END]])
    assert flagged(item, config("tool_arguments")) == [("tool_arguments", call.encode())]


def test_what_is_missing_is_flagged_at_the_last_token_of_its_turn():
    item = flagged_rollout([spelled("hi"), [*spelled("no tags"), END]])
    done = flag_errors(item, config("tags"), BYTES, syntax="hermes")
    assert done.flags == (Flag("tags", 9, 10),)
    cut = flagged_rollout([spelled("hi"), spelled("no tags")], finish="length")
    assert flagged(cut, config("truncated")) == [("truncated", b"s")]
    assert flagged(cut, config("truncated"), final=False) == []
    assert flagged(item, config("truncated")) == []


def test_every_turn_is_judged_in_its_own_place_and_the_last_as_the_last():
    wrong = tagged(GOOD.replace("add", "sub"))
    parts = [spelled("hi"), [*spelled(wrong), END], spelled(wrong), [*spelled(f"so {wrong}"), END]]
    done = flag_errors(flagged_rollout(parts), config("unknown_tool"), BYTES, syntax="hermes")
    first, last = 2, sum(map(len, parts[:3])) + 3
    assert done.flags == tuple(Flag("unknown_tool", start, start + len(wrong)) for start in (first, last))
    done = flag_errors(flagged_rollout(parts), config("answer_pattern"), BYTES, syntax="hermes")
    assert [flag.start for flag in done.flags] == [sum(map(len, parts)) - 1]
    assert not flag_errors(flagged_rollout(parts), config("answer_pattern"), BYTES, syntax="hermes", final=False).flags


def test_bytes_that_are_no_text_are_flagged_with_all_their_tokens():
    item = flagged_rollout([spelled("hi"), [*spelled(b"a\xe4\xb8b\xff"), END]])
    assert flagged(item, config("invalid_utf8")) == [("invalid_utf8", b"\xe4\xb8"), ("invalid_utf8", b"\xff")]
    cut = flagged_rollout([spelled("hi"), spelled("so 🙂".encode()[:-2])], finish="length")
    assert flagged(cut, ALL)[-1:] == [("truncated", b"\x9f")]
    assert "invalid_utf8" not in dict(flagged(cut, ALL))


def test_a_special_token_is_no_text_unless_a_rule_asks_for_it():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool_call>", "</tool_call>"]})
    table = token_bytes(tokenizer)
    think, end_think, call, end_call = range(258, 262)
    item = flagged_rollout([spelled("hi"), [think, *spelled("so"), START, end_think, END]])
    assert flagged(item, config("tags", tags=["think"]), table) == []
    item = flagged_rollout([spelled("hi"), [call, *spelled(GOOD), START, end_call, END]])
    assert flagged(item, config("dropped_call"), table) == []
    item = flagged_rollout([spelled("hi"), [call, *spelled(GOOD[:-1]), end_call, END]])
    assert flagged(item, config("tool_call"), table) == [("tool_call", tagged(GOOD[:-1]).encode())]


def test_a_tag_that_the_prompt_ends_with_is_open():
    checks = config("tags")
    rest = [*spelled(WHOLE.removeprefix("<think>")), END]
    assert flagged(flagged_rollout([spelled("hi <think>\n"), rest]), checks) == []
    assert flagged(flagged_rollout([spelled("hi <think> so"), rest]), checks) == [("tags", b"<|im_end|>")]


def test_turns_without_tokens_and_rollouts_without_turns_have_no_flags():
    assert flagged(flagged_rollout([spelled("hi"), []], finish="length"), ALL) == []
    assert flagged(flagged_rollout([spelled("hi")]), ALL) == []
    item = flagged_rollout([spelled("hi"), spelled("```")])
    assert flag_errors(item, ChecksConfig(), BYTES, syntax="hermes") is item


@thorough
@given(
    st.lists(st.lists(st.integers(0, 300) | st.sampled_from(spelled("<>{}`\n")), max_size=20), min_size=1, max_size=5),
    st.sampled_from(["end", "length", "context", "turns"]),
)
def test_flags_of_any_tokens_lie_in_their_turns(parts: list[list[int]], finish: Finish):
    flagged(flagged_rollout(parts, finish=finish), ALL)


@thorough
@given(st.lists(hostile, max_size=3).map(lambda texts: "".join(texts).encode(errors="ignore")))
def test_on_a_token_a_byte_flags_are_the_bytes_of_what_was_found(raw: bytes):
    checked = turn_of(raw)
    expected: set[Flag] = set()
    for error in check_turn(checked, RULES) if raw else []:
        start, end = (len(checked.text[:place].encode()) for place in (error.start, error.end))
        expected.add(Flag(error.rule, start, end) if start < end else Flag(error.rule, len(raw) - 1, len(raw)))
    assert set(flag_errors(flagged_rollout([[], spelled(raw)]), ALL, BYTES, syntax="hermes").flags) == expected


def test_a_turn_that_was_whole_is_not_called_cut_where_no_room_was_left_for_another():
    whole = flagged_rollout([spelled("hi"), [*spelled("done"), END]], finish="context")
    assert flagged(whole, config("truncated")) == []
    cut = flagged_rollout([spelled("hi"), spelled("do")], finish="context")
    assert flagged(cut, config("truncated")) == [("truncated", b"o")]
