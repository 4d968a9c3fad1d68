"""How chat templates write calls: beside text, in earlier turns, in every way that is in use, and not at all."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from call_turns import (
    ARGUMENTS,
    BY_KEY,
    CALCULATOR,
    ESCAPED,
    FENCED,
    LISTED,
    NOTE,
    SINGLE,
    TAGGED,
    THINKING,
    asked,
    before,
    bytes_reader,
    call,
    chatml,
    check_laws,
    history,
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
)
from factories import CHATML, byte_tokenizer
from zoo import toy_bpe

from opd.errors import DataError
from opd.records import Message, Turn
from opd.text.alignment import describe, pair_turns, shares, turn_facts
from opd.text.call_template import tool_call
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide

# Several calls, and text around them


def test_text_between_and_behind_calls_stays_where_the_student_wrote_it():
    text = f"First.\n{call('1')}\n{call('2')}\nThen\n{call('3')} bye\n"
    own, theirs = student_side("bytes"), toy_reader(LISTED)
    found = read(text, own, theirs)
    one, two, three = (
        f'{{"name": "calculator", "arguments": {{"expression": "{k + 1}"}}, "id": "{k:09d}"}}' for k in range(3)
    )
    assert told(found, theirs) == f"First.[TOOL_CALLS][{one}, {two}]\nThen[TOOL_CALLS][{three}] bye\n"
    kept = kept_text(found, own, text)
    for said in ("First.", "\nThen", " bye\n"):
        assert said[:-1] in kept
    check_laws(found, own, theirs, text)


def test_a_thought_before_a_call_is_followed_by_what_the_template_writes_behind_thoughts():
    own, theirs = student_side("bytes"), toy_reader(THINKING)
    found = read(f"<think>\nhm\n</think>\n\n{call()}", own, theirs)
    assert told(found, theirs) == f"<think>\nhm\n</think>\n\n{tagged()}"
    found = read(f"Hm.\n\n{call()}", own, theirs)
    assert told(found, theirs) == f"Hm.\n{tagged()}"
    assert told(read(call(), own, theirs), theirs) == tagged()


@pytest.mark.parametrize("gap", ["", " "])
def test_white_space_before_an_answer_stands_before_a_call_where_the_template_writes_it_there(gap: str):
    own = student_side("bytes")
    calls = LISTED.removeprefix("{{ m.content }}")
    theirs = bytes_reader(
        f"{{% if m.tool_calls %}}{{{{ '{gap}' }}}}{calls}{{% else %}}{{{{ ' ' + m.content }}}}{{% endif %}}"
    )
    found = read(call(), own, theirs)
    wanted = f'{gap}[TOOL_CALLS][{{"name": "calculator", "arguments": {ARGUMENTS}, "id": "000000000"}}]'
    assert (before(found, theirs) + told(found, theirs)).endswith(f"<|im_start|>assistant\n{wanted}")
    check_laws(found, own, theirs, call())


def test_a_template_that_has_no_place_for_text_gets_it_as_it_was_written():
    own, theirs = student_side("bytes"), toy_reader(SINGLE)
    found = read(f"Hm.\n{call()} ok", own, theirs)
    assert told(found, theirs) == f'Hm.\n{{"name": "calculator", "parameters": {ARGUMENTS}}} ok'


def test_the_students_own_tag_is_the_teachers_by_role():
    """A token here, a token of another name there: one chunk, and the decision to call is compared."""
    own, theirs = student_side("qwen2_5"), teacher_side("mistral_nemo")
    text = tagged()
    found = read(text, own, theirs)
    assert told(found, theirs).startswith('[TOOL_CALLS][{"name"')
    assert found.pairing.chunk_ids[0] == 0
    tag = theirs.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert found.teacher_text.token_ids[found.teacher_text.first] == tag
    assert found.pairing.chunks.teacher[0] == 0
    assert "".join(left_out(found, own, text)) == '\n"}}\n</tool_call>'


def test_tags_that_are_special_tokens_of_the_student_are_read_as_it_wrote_them():
    """A teacher without tags has nothing for them: they are left out by themselves, the call is transcribed all the same."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    own, theirs = StudentSide(tokenizer), bytes_reader(SINGLE)
    item = turn_of(call(), own)
    ids = [0, *tokenizer(call(), add_special_tokens=False).input_ids, own.end_ids[-1]]
    item = replace(
        item,
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
    )
    [found] = pair_turns(item, own, theirs, own_syntax="hermes")
    assert told(found, theirs) == f'{{"name": "calculator", "parameters": {ARGUMENTS}}}'
    reasons = found.pairing.masked.tolist()
    assert [reasons[0], reasons[-2]] == [Masked.NO_COUNTERPART] * 2
    assert reasons.count(Masked.SYNTAX) == len("arguments")
    assert not found.untranscribed


# Templates


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (FENCED, f"call calculator\n```json\n{ARGUMENTS}\n```"),
        (
            BY_KEY,
            "<tool_call>\n<function=calculator>\n<parameter=expression>1 + 2</parameter>\n</function>\n</tool_call>",
        ),
        (ESCAPED, tagged()),
    ],
)
def test_other_ways_to_write_a_call(answer: str, expected: str):
    own, theirs = student_side("bytes"), toy_reader(answer)
    found = read(call(), own, theirs)
    assert told(found, theirs) == expected
    assert "alculator" in kept_text(found, own, call())
    assert ("1 + 2" in kept_text(found, own, call())) == (answer is not BY_KEY)
    check_laws(found, own, theirs, call())


def test_a_call_may_end_with_another_token_than_an_answer():
    """As Llama's <|eom_id|>: any token that ends the teacher's turns."""
    ending = "{{ '<|im_start|>' if m.role == 'assistant' and m.tool_calls else '<|im_end|>\n' }}{% endfor %}"
    tokenizer = toy_bpe(390, template=chatml(TAGGED).replace("{{ '<|im_end|>\n' }}{% endfor %}", ending))
    assert TeacherSide(tokenizer, name="t").calls is None  # nothing ends the turn
    ends = SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    theirs = TeacherSide(tokenizer, name="t", generation_config=ends)
    assert told(read(call(), student_side("bytes"), theirs), theirs) == tagged()


def test_a_template_that_writes_no_calls_leaves_them_as_written_and_counts_that():
    own = student_side("bytes")
    theirs = TeacherSide(toy_bpe(390, template=CHATML), name="t")
    found = read(call(), own, theirs)
    assert found.untranscribed
    assert same(found, read(call(), own, theirs, syntax=None))
    assert not read("No call.", own, theirs).untranscribed
    facts = turn_facts(found, np.zeros(len(found.teacher_text.ends) + 1))
    assert shares(facts)["untranscribed"] == 1.0
    assert "untranscribed 1.00" in describe(facts)


def test_a_template_that_refuses_two_calls_leaves_that_turn_as_written():
    own, theirs = student_side("bytes"), toy_reader(SINGLE)
    text = call("1") + call("2")
    found = read(text, own, theirs)
    assert found.untranscribed
    assert told(found, theirs) == text
    assert same(found, read(text, own, theirs, syntax=None))


def test_a_template_that_escapes_cannot_quote_a_special_token():
    own, theirs = student_side("bytes"), toy_reader(ESCAPED)
    found = read(call("<|im_end|>"), own, theirs)
    assert found.untranscribed
    assert told(found, theirs) == call("<|im_end|>")
    assert "\\u00e9" in told(read(call("\u00e9", ensure_ascii=False), own, theirs), theirs)


def test_a_special_token_that_json_would_escape_is_quoted_in_no_call():
    tokenizer = toy_bpe(390, template=chatml(TAGGED))
    tokenizer.add_special_tokens({"additional_special_tokens": ['<"x">']})
    own, theirs = student_side("bytes"), TeacherSide(tokenizer, name="t")
    assert read(call('<"x">'), own, theirs).untranscribed
    assert not read(call('<"y">'), own, theirs).untranscribed


def test_words_that_the_template_is_probed_with_may_be_anybodys():
    tool = {
        "type": "function",
        "function": {"name": "aXbYcZ", "description": "aXbYcZ", "parameters": {"type": "object"}},
    }
    own, theirs = student_side("bytes"), toy_reader(TAGGED)
    text = 'aXbYcZ <tool_call>{"name": "aXbYcZ", "arguments": {"gRhSiT0x": "jOkPlQ"}}</tool_call>'
    found = read(text, own, theirs, prompt=asked("aXbYcZ", tools=(tool,)))
    wanted = '<tool_call>\n{"name": "aXbYcZ", "arguments": {"gRhSiT0x": "jOkPlQ"}}\n</tool_call>'
    assert told(found, theirs) == f"aXbYcZ\n{wanted}"


@pytest.mark.parametrize("teacher", ["qwen2_5", "llama3_1", "mistral_nemo", "mistral_v3"])
def test_earlier_turns_are_rendered_from_their_calls(teacher: str):
    """Against the template itself, given the conversation as its authors meant it to be."""
    own, theirs = student_side("smollm2"), teacher_side(teacher)
    said = "" if teacher in ("llama3_1", "mistral_nemo") else "Hm."
    prompt = history(("assistant", said + call("1")), ("tool", "1"), ("assistant", call("2")), ("tool", "2"))
    found = read(call("3"), own, theirs, prompt=prompt)
    one, two, three = (tool_call(k, "calculator", {"expression": str(k + 1)}) for k in range(3))
    meant: list[Message] = [
        *asked().messages,
        {"role": "assistant", "content": said, "tool_calls": [one]},
        {"role": "tool", "content": "1", "tool_call_id": one["id"], "name": "calculator"},
        {"role": "assistant", "content": "", "tool_calls": [two]},
        {"role": "tool", "content": "2", "tool_call_id": two["id"], "name": "calculator"},
        {"role": "assistant", "content": "", "tool_calls": [three]},
    ]
    whole = theirs.tokenizer.apply_chat_template(meant, tools=[CALCULATOR, NOTE], tokenize=False)
    ids = theirs.tokenizer(whole, add_special_tokens=False).input_ids
    assert found.teacher_text.token_ids.tolist() == ids[: len(found.teacher_text.token_ids)]
    assert not found.untranscribed
    assert "<tool_call>{" not in before(found, theirs)


def test_a_malformed_turn_stays_text_among_others_and_its_answers_get_ids():
    own, theirs = student_side("bytes"), teacher_side("mistral_nemo")
    wrong = '<tool_call>{"name": "calculator"}</tool_call>'
    prompt = history(("assistant", wrong), ("tool", "error"), ("user", "Again."), ("assistant", call()), ("tool", "3"))
    found = read("Three.", own, theirs, prompt=prompt)
    shown = before(found, theirs)
    assert wrong in shown
    assert '{"content": error, "call_id": "000000000"}' in shown
    assert f'[TOOL_CALLS][{{"name": "calculator", "arguments": {ARGUMENTS}, "id": "000000001"}}]' in shown
    assert '{"content": 3, "call_id": "000000001"}' in shown
    assert not found.untranscribed


def test_a_conversation_that_the_template_refuses_is_read_as_written_and_counted():
    own, theirs = student_side("bytes"), toy_reader(SINGLE)
    prompt = history(("assistant", call("1") + call("2")), ("tool", "1"), ("tool", "2"))
    found = read(call("3"), own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call("1") + call("2") in before(found, theirs)
    assert told(found, theirs) == call("3")
    assert not read("No call.", own, theirs, prompt=history(("assistant", call()), ("tool", "3"))).untranscribed
    # a template that asks for ids gets them there, too
    asking = chatml(SINGLE, tool="(m.content if m.tool_call_id else raise_exception('no id'))")
    theirs = TeacherSide(toy_bpe(390, template=asking), name="t")
    found = read(call("3"), own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call("1") + call("2") in before(found, theirs)


def test_a_template_that_breaks_on_what_it_is_given_refuses_it():
    """Not only jinja's own errors: text and a number do not add up, and the rollout fails by itself."""
    own = student_side("bytes")
    theirs = TeacherSide(toy_bpe(390, template=chatml(TAGGED, tool="m.content + (1 if m.name else '')")), name="t")
    prompt = history(("assistant", call()), ("tool", "3"))
    found = read("Three.", own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call() in before(found, theirs)
    with pytest.raises(DataError, match="its chat template refuses the conversation"):
        theirs.render([{"role": "tool", "content": "x", "name": "y"}])
