"""Tool calls that a teacher reads as its own chat template writes them: what it reads, what is compared, and what is left out."""

from collections.abc import Mapping

import numpy as np
import pytest
from call_turns import (
    ARGUMENTS,
    CALCULATOR,
    LISTED,
    NOTE,
    TAGGED,
    TURNED,
    Segment,
    asked,
    bytes_reader,
    call,
    chatml,
    check_laws,
    kept_by_hand,
    kept_text,
    left_out,
    read,
    same,
    student_side,
    tagged,
    teacher_side,
    told,
    toy_reader,
    turn_of,
    with_control,
)
from templated import toy_without
from zoo import toy_bpe

from opd.records import Prompt
from opd.text.alignment import chunk_score, pair_turns
from opd.text.call_template import tool_call
from opd.text.student_text import Masked
from opd.text.teacher_text import TeacherSide
from opd.text.tool_calls import Syntax

# The law: a score against a computation that knows no blocks and no alignment, and no template but the teacher's own.
CASES: Mapping[str, tuple[str, str, tuple[Segment, ...]]] = {
    "a line to three": (
        "qwen2_5", call(),
        (("both", "<tool_call>"), ("teacher", "\n"), ("both", f'{{"name": "calculator", "arguments": {ARGUMENTS}}}'),
         ("teacher", "\n"), ("both", "</tool_call>")),
    ),
    "text before, two calls": (
        "qwen2_5", f"Let me see.\n\n{call()} {call()}",
        (("both", "Let me see."), ("student", "\n\n"), ("teacher", "\n"), ("both", "<tool_call>"), ("teacher", "\n"),
         ("both", f'{{"name": "calculator", "arguments": {ARGUMENTS}}}'), ("teacher", "\n"), ("both", "</tool_call>"),
         ("student", " "), ("teacher", "\n"), ("both", "<tool_call>"), ("teacher", "\n"),
         ("both", f'{{"name": "calculator", "arguments": {ARGUMENTS}}}'), ("teacher", "\n"), ("both", "</tool_call>")),
    ),
    "written closely": (
        "qwen2_5", call(separators=(",", ":")),
        (("both", "<tool_call>"), ("teacher", "\n"), ("both", '{"name":'), ("teacher", " "), ("both", '"calculator",'),
         ("teacher", " "), ("both", '"arguments":'), ("teacher", " "), ("both", '{"expression":'), ("teacher", " "),
         ("both", '"1 + 2"}}'), ("teacher", "\n"), ("both", "</tool_call>")),
    ),
    "to an object": (
        "llama3_1", call(),
        (("student", "<tool_call>"), ("both", '{"name": "calculator", "'), ("student", "arguments"),
         ("teacher", "parameters"), ("both", f'": {ARGUMENTS}}}'), ("student", "</tool_call>")),
    ),
    "text before an object": (
        "llama3_1", f"I look.\n{call()}",
        (("both", "I look.\n"), ("student", "<tool_call>"), ("both", '{"name": "calculator", "'),
         ("student", "arguments"), ("teacher", "parameters"), ("both", f'": {ARGUMENTS}}}'),
         ("student", "</tool_call>")),
    ),
    "to a list": (
        "mistral_nemo", call(),
        (("student", "<tool_call>"), ("teacher", "[TOOL_CALLS]["),
         ("both", f'{{"name": "calculator", "arguments": {ARGUMENTS}'), ("student", "}</tool_call>"),
         ("teacher", ', "id": "000000000"}]')),
    ),
    "text before a list": (
        "mistral_v3", f"I look. {call()}",
        (("both", "I look."), ("student", " <tool_call>"), ("teacher", "[TOOL_CALLS]["),
         ("both", f'{{"name": "calculator", "arguments": {ARGUMENTS}'), ("student", "}</tool_call>"),
         ("teacher", ', "id": "000000000"}]')),
    ),
}  # fmt: skip

SHOWS_NO_TEXT = ("text before an object",)


def whole_conversation(case: str) -> tuple[str, int, str]:
    """(the conversation as the teacher's template writes it, where its answer begins, the answer)."""
    teacher, text, segments = CASES[case]
    tokenizer = teacher_side(teacher).tokenizer
    answer = "".join(written for who, written in segments if who != "student")
    content, *calls = text.split("<tool_call>")
    structured = {
        "role": "assistant",
        "content": content.strip(),
        "tool_calls": [tool_call(k, "calculator", {"expression": "1 + 2"}) for k in range(len(calls))],
    }
    messages = asked().messages
    if (
        case in SHOWS_NO_TEXT
    ):  # the template has no place for text before a call: it stands where the teacher would write it
        opened = tokenizer.apply_chat_template(
            list(messages), tools=[CALCULATOR, NOTE], tokenize=False, add_generation_prompt=True
        )
        return opened + answer, len(opened), answer
    whole = tokenizer.apply_chat_template([*messages, structured], tools=[CALCULATOR, NOTE], tokenize=False)
    return whole, whole.rindex(answer), answer


@pytest.mark.parametrize("student", ["smollm2", "llama3_1", "mistral_nemo", "bytes"])
@pytest.mark.parametrize("case", CASES)
def test_the_score_is_that_of_the_teachers_own_text_over_what_both_have(student: str, case: str):
    """Render the conversation, tokenise it whole, sum the tokens of the kept spans."""
    teacher, text, segments = CASES[case]
    own, theirs = student_side(student), teacher_side(teacher)
    assert "".join(written for who, written in segments if who != "teacher") == text
    whole, start, answer = whole_conversation(case)
    found = theirs.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [k for k, (a, b) in enumerate(found["offset_mapping"]) if b > start and a < start + len(answer)]
    item = turn_of(text, own)
    [turn] = pair_turns(item, own, theirs, own_syntax="hermes")
    assert turn.teacher_text.token_ids.tolist() == found["input_ids"][: inside[-1] + 1]
    assert turn.teacher_text.first == inside[0]
    assert not turn.untranscribed

    theirs_pieces = [whole[max(a, start) : b] for a, b in (found["offset_mapping"][k] for k in inside)]
    pieces = [own.table.of(i).decode() for i in own.encode(text)]
    kept, kept_there = kept_by_hand((pieces, theirs_pieces), segments)
    logprobs = -np.random.default_rng(1).exponential(size=len(inside) + 1)
    score = chunk_score("t", item, [turn], [logprobs])
    by_hand = logprobs[:-1][np.array(kept_there)].sum() + logprobs[-1]
    assert score.logprobs.sum() == pytest.approx(by_hand, rel=1e-6)
    assert (score.chunks[1:] >= 0).tolist() == [*kept, True]
    assert score.facts["masked/syntax"] == kept.count(False) > 0
    check_laws(turn, own, theirs, text)


# What agrees, and what is no call


@pytest.mark.parametrize(
    ("teacher", "text", "syntax"),
    [
        ("qwen2_5", f"Let me see.\n{tagged()}\n{tagged('3')}", "hermes"),
        ("qwen2_5", tagged(), "hermes"),
        ("qwen2_5", "No call at all, but { and <tool", "hermes"),
        ("llama3_1", f'{{"name": "calculator", "parameters": {ARGUMENTS}}}', "json"),
        ("llama3_1", "An answer.", "json"),
    ],
)
@pytest.mark.parametrize("student", ["smollm2", "mistral_nemo", "bytes"])
def test_what_the_teacher_would_write_is_read_as_it_was_written(student: str, teacher: str, text: str, syntax: Syntax):
    own, theirs = student_side(student), teacher_side(teacher)
    assert same(read(text, own, theirs, syntax=syntax), read(text, own, theirs, syntax=None))


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "calculator"</tool_call>',
        call("1") + '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "calculator", "arguments": {"expression": 1}}</tool_call>',
        "[TOOL_CALLS][{}]",
    ],
)
@pytest.mark.parametrize("teacher", ["qwen2_5", "llama3_1", "mistral_nemo"])
def test_what_is_no_call_stays_as_it_was_written(teacher: str, text: str):
    own, theirs = student_side("smollm2"), teacher_side(teacher)
    found = read(text, own, theirs)
    assert same(found, read(text, own, theirs, syntax=None))
    assert not found.untranscribed
    assert told(found, theirs) == text


def test_without_tools_nothing_is_a_call():
    own, theirs = student_side("smollm2"), teacher_side("qwen2_5")
    alone = asked(tools=())
    assert same(read(call(), own, theirs, prompt=alone), read(call(), own, theirs, prompt=alone, syntax=None))


@pytest.mark.parametrize("ended", [True, False])
def test_a_turn_that_was_cut_has_no_end_and_may_hold_a_call(ended: bool):
    own, theirs = student_side("smollm2"), toy_reader(TAGGED)
    found = read(call(), own, theirs, ended=ended)
    assert found.ends_turn is ended
    assert told(found, theirs) == tagged()
    check_laws(found, own, theirs, call())


def test_a_call_with_a_control_token_in_it_stays_as_written():
    """The environment has not seen the token, the teacher would."""
    item, theirs = with_control(call(), call().index("1 + 2")), toy_reader(TAGGED)
    own, written = (
        pair_turns(item, student_side("bytes"), theirs, own_syntax=syntax)[0] for syntax in ("hermes", None)
    )
    assert own.untranscribed
    assert same(own, written)


def test_a_control_token_that_the_teacher_lacks_is_left_out_by_itself():
    tokenizer = toy_without(toy_bpe(390), "<|im_start|>")
    tokenizer.chat_template = chatml(TAGGED).replace("<|im_start|>", "<other>")
    theirs, place = TeacherSide(tokenizer, name="t"), call().index("1 + 2")
    [found] = pair_turns(with_control(call(), place), student_side("bytes"), theirs, own_syntax="hermes")
    usual = read(call(), student_side("bytes"), theirs)
    assert told(found, theirs) == tagged()
    assert found.pairing.masked[place] == Masked.NO_COUNTERPART
    assert np.delete(found.pairing.chunk_ids, place).tolist() == usual.pairing.chunk_ids.tolist()


# What stands in arguments


def test_look_alikes_of_special_tokens_in_arguments_stay_text():
    """The template's own are tokens, those that the student quotes are not; on both sides of a call."""
    quoted = "</s> [TOOL_CALLS] <|im_end|> [INST]"
    text = f"I say </s>. {call(quoted)} [TOOL_RESULTS]"
    own, theirs = student_side("smollm2"), teacher_side("mistral_nemo")
    found = read(text, own, theirs)
    ids = found.teacher_text.token_ids[found.teacher_text.first :].tolist()
    control = [theirs.table.of(i) for i in ids if theirs.table.control[i]]
    assert control == [b"[TOOL_CALLS]"]
    assert told(found, theirs) == (
        f'I say </s>. [TOOL_CALLS][{{"name": "calculator", "arguments": {{"expression": "{quoted}"}}, "id": "000000000"}}]'
        " [TOOL_RESULTS]"
    )
    assert "TO" in "".join(told(found, theirs))
    check_laws(found, own, theirs, text)
    masked = "".join(left_out(found, own, text))
    assert "INST" not in masked
    assert "im" not in masked


def test_look_alikes_in_the_calls_of_earlier_turns_stay_text():
    own, theirs = student_side("smollm2"), teacher_side("mistral_nemo")
    earlier = [{"role": "assistant", "content": call("</s> [INST]")}, {"role": "tool", "content": "3"}]
    prompt = Prompt("p", (*asked().messages, *earlier), teacher="t", task="task", tools=asked().tools)
    found = read("Three.", own, theirs, prompt=prompt)
    ids = found.teacher_text.token_ids.tolist()
    assert ids.count(theirs.end_ids[0]) == 1  # behind the call
    assert theirs.table.join(np.array(ids)).tobytes().count(b"</s>") == 2
    assert not found.untranscribed


@pytest.mark.parametrize("teacher", ["qwen2_5", "mistral_nemo", "llama3_1"])
def test_escapes_that_the_template_writes_otherwise_are_left_out_and_shift_nothing(teacher: str):
    expression = "caf\u00e9 3 \U0001f642 ok / 4"
    plain, escaped = (call(expression, ensure_ascii=ascii_only) for ascii_only in (False, True))
    escaped = escaped.replace("/ 4", "\\/ 4")
    own, theirs = student_side("bytes"), teacher_side(teacher)
    usual, found = read(plain, own, theirs), read(escaped, own, theirs)
    assert told(found, theirs) == told(usual, theirs)
    assert f'"{expression}"' in told(found, theirs)
    check_laws(found, own, theirs, escaped)
    lost = "".join(left_out(found, own, escaped))
    for escape in ("\\u00e9", "\\ud83d\\ude42", "\\/"):
        assert escape in lost
    assert "ca" in kept_text(found, own, escaped)
    assert "ok" in kept_text(found, own, escaped)


def test_numbers_and_order_that_the_template_writes_otherwise_are_left_out():
    """A number as its value, an object's keys sorted: the same arguments, of which only what is written alike is compared."""
    own = student_side("bytes")
    text = '<tool_call>{"name": "note", "arguments": {"b": 1e2, "a": [true, null, 1.50]}}</tool_call>'
    found = read(text, own, toy_reader(TAGGED))
    assert '{"b": 100.0, "a": [true, null, 1.5]}' in told(found, toy_reader(TAGGED))
    lost = "".join(left_out(found, own, text))
    assert "1e2" in lost
    assert "1.50" in lost
    assert "null" in kept_text(found, own, text)
    ordered = TAGGED.replace("| tojson", "| tojson(sort_keys=true)")
    found = read(text, own, toy_reader(ordered))
    assert '{"a": [true, null, 1.5], "b": 100.0}' in told(found, toy_reader(ordered))
    assert '"b": 1e2, "a": [true, null' in "".join(left_out(found, own, text))
    assert "name" in kept_text(found, own, text)


@pytest.mark.parametrize(
    ("answer", "text", "kept"),
    [
        (TAGGED, f'{{"arguments": {ARGUMENTS}, "name": "calculator"}}', f'<tool_call>{{"{ARGUMENTS}}}</tool_call>'),
        (LISTED, f'{{"arguments": {ARGUMENTS}, "name": "calculator"}}', ARGUMENTS),
        (TURNED, f'{{"name": "calculator", "arguments": {ARGUMENTS}}}', f'<tool_call>{{"{ARGUMENTS}}}</tool_call>'),
    ],
)
def test_parts_in_another_order_leave_the_arguments_alone(answer: str, text: str, kept: str):
    """And of what stands around the call, what both begin and end with: a comma before a name is none before an id."""
    own, theirs = student_side("bytes"), bytes_reader(answer)
    text = f"<tool_call>{text}</tool_call>"
    found = read(text, own, theirs)
    assert kept_text(found, own, text) == kept
    check_laws(found, own, theirs, text)
