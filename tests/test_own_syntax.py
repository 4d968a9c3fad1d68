"""Tool calls that a teacher reads as its own chat template writes them: what it reads, what is compared, and what is left out."""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from call_templates import (
    BY_KEY,
    CALCULATOR,
    ESCAPED,
    FENCED,
    LISTED,
    LLAMA,
    MISTRAL,
    NOTE,
    SINGLE,
    TAGGED,
    THINKING,
    TURNED,
    asked,
    chatml,
)
from factories import CHATML, byte_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_foreign_teacher import toy_without
from test_tokenizer_pairs import check_chunks
from zoo import real, toy, toy_bpe

from opd.errors import DataError
from opd.records import Message, Prompt, Rollout, Turn
from opd.text.align import fold
from opd.text.call_template import tool_call
from opd.text.lineup import describe, shares, sides
from opd.text.pairing import TurnPair, chunk_score, pair, pair_turns, turn_facts
from opd.text.reading import Reader, Reading
from opd.text.spelling import Masked, Spelling, Writer
from opd.text.tool_calls import Syntax, parse_calls

Segment = tuple[str, str]
"""("both" | "student" | "teacher", text): who writes it."""
ARGUMENTS = '{"expression": "1 + 2"}'
TEMPLATES = {"llama3_1": LLAMA, "mistral_v3": MISTRAL}


def call(expression: str = "1 + 2", **style: Any) -> str:
    """A call in the Hermes syntax, as json.dumps writes it."""
    written = json.dumps({"name": "calculator", "arguments": {"expression": expression}}, **style)
    return f"<tool_call>{written}</tool_call>"


def tagged(expression: str = "1 + 2") -> str:
    """The same call as `TAGGED` and Qwen2.5 write it."""
    return f'<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}\n</tool_call>'


@functools.cache
def writer(name: str) -> Writer:
    return Writer(toy(name) if name == "bytes" else real(name))


@functools.cache
def reader(name: str) -> Reader:
    """A published tokenizer with its own template, or one like its model's where the archive's writes no calls."""
    tokenizer = copy.copy(real(name))
    tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    return Reader(tokenizer, name=name)


@functools.cache
def toy_reader(answer: str) -> Reader:
    return Reader(toy_bpe(390, template=chatml(answer)), name="t")


@functools.cache
def bytes_reader(answer: str) -> Reader:
    """A teacher that writes bytes, so that no token has a part in two things."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chatml(answer)
    return Reader(tokenizer, name="t")


def turn_of(text: str, own: Writer, prompt: Prompt | None = None, *, ended: bool = True) -> Rollout:
    """A rollout of one turn, behind one token that stands for the prompt."""
    prompt = prompt or asked()
    ids = [0, *own.encode(text), *([own.end_ids[-1]] if ended else [])]
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
        messages=(*prompt.messages, {"role": "assistant", "content": text}),
        finish="end" if ended else "length",
        policy_version=0,
    )


def read(text: str, own: Writer, theirs: Reader, *, syntax: Syntax | None = "hermes", **kwargs: Any) -> TurnPair:
    [turn] = pair_turns(turn_of(text, own, **kwargs), own, theirs, own_syntax=syntax)
    return turn


def told(turn: TurnPair, theirs: Reader) -> str:
    """What the teacher reads of a turn, from its tokens."""
    return theirs.table.join(turn.reading.token_ids[turn.reading.first :]).tobytes().decode()


def left_out(turn: TurnPair, own: Writer, text: str) -> list[str]:
    """The student's tokens that are masked."""
    pieces = [own.table.of(i).decode(errors="replace") for i in own.encode(text)]
    return [piece for piece, why in zip(pieces, turn.pairing.masked, strict=False) if why]


def same(one: TurnPair, other: TurnPair) -> bool:
    """Whether two readings agree in everything that a score depends on."""
    pairs = [
        (one.reading.token_ids, other.reading.token_ids),
        (one.reading.ends, other.reading.ends),
        (one.pairing.masked, other.pairing.masked),
        (one.pairing.chunk_ids, other.pairing.chunk_ids),
        (one.pairing.chunks.ends, other.pairing.chunks.ends),
        (one.pairing.chunks.teacher, other.pairing.chunks.teacher),
    ]
    return one.reading.first == other.reading.first and all(np.array_equal(a, b) for a, b in pairs)


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


def kept_by_hand(pieces: tuple[list[str], list[str]], segments: Sequence[Segment]) -> tuple[list[bool], list[bool]]:
    """Which tokens of the student and of the teacher are compared, letter by letter.

    Tokens that share a letter of "both" belong together; all that do are left out when one of them has a letter which the other
    side has not, or goes on past a place where the other side has one.
    """
    common: tuple[dict[int, int], dict[int, int]] = ({}, {})  # a side's letter -> letter of "both"
    segment_of: list[int] = []
    for side, name in enumerate(("student", "teacher")):
        letters = [(k, who) for k, (who, text) in enumerate(segments) if who in ("both", name) for _ in text]
        both = [i for i, (_, who) in enumerate(letters) if who == "both"]
        common[side].update({i: n for n, i in enumerate(both)})
        segment_of = [letters[i][0] for i in both]
    tokens: list[tuple[set[int], bool]] = []
    for side, texts in enumerate(pieces):
        ends = np.cumsum([len(text) for text in texts]).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            shared = {common[side][i] for i in range(start, end) if i in common[side]}
            tokens.append((shared, len(shared) < end - start or len({segment_of[n] for n in shared}) > 1))
    kept = [not torn for _, torn in tokens]
    while True:
        lost = set().union(*(shared for (shared, _), keep in zip(tokens, kept, strict=True) if not keep))
        fewer = [keep and not shared & lost for (shared, _), keep in zip(tokens, kept, strict=True)]
        if fewer == kept:
            return kept[: len(pieces[0])], kept[len(pieces[0]) :]
        kept = fewer


def whole_conversation(case: str) -> tuple[str, int, str]:
    """(the conversation as the teacher's template writes it, where its answer begins, the answer)."""
    teacher, text, segments = CASES[case]
    tokenizer = reader(teacher).tokenizer
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
    own, theirs = writer(student), reader(teacher)
    assert "".join(written for who, written in segments if who != "teacher") == text
    whole, start, answer = whole_conversation(case)
    found = theirs.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [k for k, (a, b) in enumerate(found["offset_mapping"]) if b > start and a < start + len(answer)]
    item = turn_of(text, own)
    [turn] = pair_turns(item, own, theirs, own_syntax="hermes")
    assert turn.reading.token_ids.tolist() == found["input_ids"][: inside[-1] + 1]
    assert turn.reading.first == inside[0]
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


def check_laws(turn: TurnPair, own: Writer, theirs: Reader, text: str) -> None:
    """Chunks part what is kept, in order, and spell the same bytes on both sides; the counts agree."""
    ids = [*own.encode(text), *([own.end_ids[-1]] if turn.ends_turn else [])]
    check_chunks(turn, ids, own, theirs)
    numbers = turn.pairing.chunk_ids[turn.pairing.chunk_ids >= 0]
    assert (np.diff(numbers) >= 0).all()
    assert set(numbers.tolist()) == set(range(int((turn.pairing.faulty == Masked.NOT).sum())))
    assert (np.diff(turn.pairing.chunks.ends) > 0).all()
    for side in (turn.pairing.chunks.student, turn.pairing.chunks.teacher):
        assert (np.diff(side[side >= 0]) >= 0).all()
    shown = sides(turn, ids, own, theirs)
    assert b"".join(piece for side in shown for piece in side.student) == own.table.join(np.array(ids)).tobytes()
    read = b"".join(piece for side in shown for piece in side.teacher).removesuffix(b"<end of turn>")
    assert read == theirs.table.join(turn.reading.token_ids[turn.reading.first :]).tobytes()


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
    own, theirs = writer(student), reader(teacher)
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
    own, theirs = writer("smollm2"), reader(teacher)
    found = read(text, own, theirs)
    assert same(found, read(text, own, theirs, syntax=None))
    assert not found.untranscribed
    assert told(found, theirs) == text


def test_without_tools_nothing_is_a_call():
    own, theirs = writer("smollm2"), reader("qwen2_5")
    alone = asked(tools=())
    assert same(read(call(), own, theirs, prompt=alone), read(call(), own, theirs, prompt=alone, syntax=None))


@pytest.mark.parametrize("ended", [True, False])
def test_a_turn_that_was_cut_has_no_end_and_may_hold_a_call(ended: bool):
    own, theirs = writer("smollm2"), toy_reader(TAGGED)
    found = read(call(), own, theirs, ended=ended)
    assert found.ends_turn is ended
    assert told(found, theirs) == tagged()
    check_laws(found, own, theirs, call())


def with_control(text: str, place: int) -> Rollout:
    """A control token of the student's in the middle of a turn; its message does not show it."""
    own = writer("bytes")
    item = turn_of(text, own)
    ids = np.insert(item.token_ids, 1 + place, own.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    return replace(
        item,
        token_ids=ids,
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
    )


def test_a_call_with_a_control_token_in_it_stays_as_written():
    """The environment has not seen the token, the teacher would."""
    item, theirs = with_control(call(), call().index("1 + 2")), toy_reader(TAGGED)
    own, written = (pair_turns(item, writer("bytes"), theirs, own_syntax=syntax)[0] for syntax in ("hermes", None))
    assert own.untranscribed
    assert same(own, written)


def test_a_control_token_that_the_teacher_lacks_is_left_out_by_itself():
    tokenizer = toy_without(toy_bpe(390), "<|im_start|>")
    tokenizer.chat_template = chatml(TAGGED).replace("<|im_start|>", "<other>")
    theirs, place = Reader(tokenizer, name="t"), call().index("1 + 2")
    [found] = pair_turns(with_control(call(), place), writer("bytes"), theirs, own_syntax="hermes")
    usual = read(call(), writer("bytes"), theirs)
    assert told(found, theirs) == tagged()
    assert found.pairing.masked[place] == Masked.NO_COUNTERPART
    assert np.delete(found.pairing.chunk_ids, place).tolist() == usual.pairing.chunk_ids.tolist()


# What stands in arguments


def test_look_alikes_of_special_tokens_in_arguments_stay_text():
    """The template's own are tokens, those that the student quotes are not; on both sides of a call."""
    quoted = "</s> [TOOL_CALLS] <|im_end|> [INST]"
    text = f"I say </s>. {call(quoted)} [TOOL_RESULTS]"
    own, theirs = writer("smollm2"), reader("mistral_nemo")
    found = read(text, own, theirs)
    ids = found.reading.token_ids[found.reading.first :].tolist()
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
    own, theirs = writer("smollm2"), reader("mistral_nemo")
    earlier = [{"role": "assistant", "content": call("</s> [INST]")}, {"role": "tool", "content": "3"}]
    prompt = Prompt("p", (*asked().messages, *earlier), teacher="t", task="task", tools=asked().tools)
    found = read("Three.", own, theirs, prompt=prompt)
    ids = found.reading.token_ids.tolist()
    assert ids.count(theirs.end_ids[0]) == 1  # behind the call
    assert theirs.table.join(np.array(ids)).tobytes().count(b"</s>") == 2
    assert not found.untranscribed


@pytest.mark.parametrize("teacher", ["qwen2_5", "mistral_nemo", "llama3_1"])
def test_escapes_that_the_template_writes_otherwise_are_left_out_and_shift_nothing(teacher: str):
    expression = "caf\u00e9 3 \U0001f642 ok / 4"
    plain, escaped = (call(expression, ensure_ascii=ascii_only) for ascii_only in (False, True))
    escaped = escaped.replace("/ 4", "\\/ 4")
    own, theirs = writer("bytes"), reader(teacher)
    usual, found = read(plain, own, theirs), read(escaped, own, theirs)
    assert told(found, theirs) == told(usual, theirs)
    assert f'"{expression}"' in told(found, theirs)
    check_laws(found, own, theirs, escaped)
    lost = "".join(left_out(found, own, escaped))
    for escape in ("\\u00e9", "\\ud83d\\ude42", "\\/"):
        assert escape in lost
    assert "ca" in kept_text(found, own, escaped)
    assert "ok" in kept_text(found, own, escaped)


def kept_text(turn: TurnPair, own: Writer, text: str) -> str:
    ids = own.encode(text)
    kept = [own.table.of(i) for i, why in zip(ids, turn.pairing.masked, strict=False) if not why]
    return b"".join(kept).decode(errors="replace")


def test_numbers_and_order_that_the_template_writes_otherwise_are_left_out():
    """A number as its value, an object's keys sorted: the same arguments, of which only what is written alike is compared."""
    own = writer("bytes")
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
    own, theirs = writer("bytes"), bytes_reader(answer)
    text = f"<tool_call>{text}</tool_call>"
    found = read(text, own, theirs)
    assert kept_text(found, own, text) == kept
    check_laws(found, own, theirs, text)


# Several calls, and text around them


def test_text_between_and_behind_calls_stays_where_the_student_wrote_it():
    text = f"First.\n{call('1')}\n{call('2')}\nThen\n{call('3')} bye\n"
    own, theirs = writer("bytes"), toy_reader(LISTED)
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
    own, theirs = writer("bytes"), toy_reader(THINKING)
    found = read(f"<think>\nhm\n</think>\n\n{call()}", own, theirs)
    assert told(found, theirs) == f"<think>\nhm\n</think>\n\n{tagged()}"
    found = read(f"Hm.\n\n{call()}", own, theirs)
    assert told(found, theirs) == f"Hm.\n{tagged()}"
    assert told(read(call(), own, theirs), theirs) == tagged()


@pytest.mark.parametrize("gap", ["", " "])
def test_white_space_before_an_answer_stands_before_a_call_where_the_template_writes_it_there(gap: str):
    own = writer("bytes")
    calls = LISTED.removeprefix("{{ m.content }}")
    theirs = bytes_reader(
        f"{{% if m.tool_calls %}}{{{{ '{gap}' }}}}{calls}{{% else %}}{{{{ ' ' + m.content }}}}{{% endif %}}"
    )
    found = read(call(), own, theirs)
    wanted = f'{gap}[TOOL_CALLS][{{"name": "calculator", "arguments": {ARGUMENTS}, "id": "000000000"}}]'
    assert (before(found, theirs) + told(found, theirs)).endswith(f"<|im_start|>assistant\n{wanted}")
    check_laws(found, own, theirs, call())


def test_a_template_that_has_no_place_for_text_gets_it_as_it_was_written():
    own, theirs = writer("bytes"), toy_reader(SINGLE)
    found = read(f"Hm.\n{call()} ok", own, theirs)
    assert told(found, theirs) == f'Hm.\n{{"name": "calculator", "parameters": {ARGUMENTS}}} ok'


def test_the_students_own_tag_is_the_teachers_by_role():
    """A token here, a token of another name there: one chunk, and the decision to call is compared."""
    own, theirs = writer("qwen2_5"), reader("mistral_nemo")
    text = tagged()
    found = read(text, own, theirs)
    assert told(found, theirs).startswith('[TOOL_CALLS][{"name"')
    assert found.pairing.chunk_ids[0] == 0
    tag = theirs.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert found.reading.token_ids[found.reading.first] == tag
    assert found.pairing.chunks.teacher[0] == 0
    assert "".join(left_out(found, own, text)) == '\n"}}\n</tool_call>'


def test_tags_that_are_special_tokens_of_the_student_are_read_as_it_wrote_them():
    """A teacher without tags has nothing for them: they are left out by themselves, the call is transcribed all the same."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    own, theirs = Writer(tokenizer), bytes_reader(SINGLE)
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
    own, theirs = writer("bytes"), toy_reader(answer)
    found = read(call(), own, theirs)
    assert told(found, theirs) == expected
    assert "alculator" in kept_text(found, own, call())
    assert ("1 + 2" in kept_text(found, own, call())) == (answer is not BY_KEY)
    check_laws(found, own, theirs, call())


def test_a_call_may_end_with_another_token_than_an_answer():
    """As Llama's <|eom_id|>: any token that ends the teacher's turns."""
    ending = "{{ '<|im_start|>' if m.role == 'assistant' and m.tool_calls else '<|im_end|>\n' }}{% endfor %}"
    tokenizer = toy_bpe(390, template=chatml(TAGGED).replace("{{ '<|im_end|>\n' }}{% endfor %}", ending))
    assert Reader(tokenizer, name="t").calls is None  # nothing ends the turn
    ends = SimpleNamespace(eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    theirs = Reader(tokenizer, name="t", generation_config=ends)
    assert told(read(call(), writer("bytes"), theirs), theirs) == tagged()


def test_a_template_that_writes_no_calls_leaves_them_as_written_and_counts_that():
    own = writer("bytes")
    theirs = Reader(toy_bpe(390, template=CHATML), name="t")
    found = read(call(), own, theirs)
    assert found.untranscribed
    assert same(found, read(call(), own, theirs, syntax=None))
    assert not read("No call.", own, theirs).untranscribed
    facts = turn_facts(found, np.zeros(len(found.reading.ends) + 1))
    assert shares(facts)["untranscribed"] == 1.0
    assert "untranscribed 1.00" in describe(facts)


def test_a_template_that_refuses_two_calls_leaves_that_turn_as_written():
    own, theirs = writer("bytes"), toy_reader(SINGLE)
    text = call("1") + call("2")
    found = read(text, own, theirs)
    assert found.untranscribed
    assert told(found, theirs) == text
    assert same(found, read(text, own, theirs, syntax=None))


def test_a_template_that_escapes_cannot_quote_a_special_token():
    own, theirs = writer("bytes"), toy_reader(ESCAPED)
    found = read(call("<|im_end|>"), own, theirs)
    assert found.untranscribed
    assert told(found, theirs) == call("<|im_end|>")
    assert "\\u00e9" in told(read(call("\u00e9", ensure_ascii=False), own, theirs), theirs)


def test_words_that_the_template_is_probed_with_may_be_anybodys():
    tool = {
        "type": "function",
        "function": {"name": "aXbYcZ", "description": "aXbYcZ", "parameters": {"type": "object"}},
    }
    own, theirs = writer("bytes"), toy_reader(TAGGED)
    text = 'aXbYcZ <tool_call>{"name": "aXbYcZ", "arguments": {"gRhSiT0x": "jOkPlQ"}}</tool_call>'
    found = read(text, own, theirs, prompt=asked("aXbYcZ", tools=(tool,)))
    wanted = '<tool_call>\n{"name": "aXbYcZ", "arguments": {"gRhSiT0x": "jOkPlQ"}}\n</tool_call>'
    assert told(found, theirs) == f"aXbYcZ\n{wanted}"


# Earlier turns


def history(*messages: tuple[str, str]) -> Prompt:
    said = [{"role": role, "content": content} for role, content in messages]
    return Prompt("p", (*asked().messages, *said), teacher="t", task="task", tools=asked().tools)


def before(turn: TurnPair, theirs: Reader) -> str:
    return theirs.table.join(turn.reading.token_ids[: turn.reading.first]).tobytes().decode()


@pytest.mark.parametrize("teacher", ["qwen2_5", "llama3_1", "mistral_nemo", "mistral_v3"])
def test_earlier_turns_are_rendered_from_their_calls(teacher: str):
    """Against the template itself, given the conversation as its authors meant it to be."""
    own, theirs = writer("smollm2"), reader(teacher)
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
    assert found.reading.token_ids.tolist() == ids[: len(found.reading.token_ids)]
    assert not found.untranscribed
    assert "<tool_call>{" not in before(found, theirs)


def test_a_malformed_turn_stays_text_among_others_and_its_answers_get_ids():
    own, theirs = writer("bytes"), reader("mistral_nemo")
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
    own, theirs = writer("bytes"), toy_reader(SINGLE)
    prompt = history(("assistant", call("1") + call("2")), ("tool", "1"), ("tool", "2"))
    found = read(call("3"), own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call("1") + call("2") in before(found, theirs)
    assert told(found, theirs) == call("3")
    assert not read("No call.", own, theirs, prompt=history(("assistant", call()), ("tool", "3"))).untranscribed
    # a template that asks for ids gets them there, too
    asking = chatml(SINGLE, tool="(m.content if m.tool_call_id else raise_exception('no id'))")
    theirs = Reader(toy_bpe(390, template=asking), name="t")
    found = read(call("3"), own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call("1") + call("2") in before(found, theirs)


def test_a_template_that_breaks_on_what_it_is_given_refuses_it():
    """Not only jinja's own errors: text and a number do not add up, and the rollout fails by itself."""
    own = writer("bytes")
    theirs = Reader(toy_bpe(390, template=chatml(TAGGED, tool="m.content + (1 if m.name else '')")), name="t")
    prompt = history(("assistant", call()), ("tool", "3"))
    found = read("Three.", own, theirs, prompt=prompt)
    assert found.untranscribed
    assert call() in before(found, theirs)
    with pytest.raises(DataError, match="its chat template refuses the conversation"):
        theirs.render([{"role": "tool", "content": "x", "name": "y"}])


# Any turn at all

WORDS = st.text(alphabet='ab .\n{}<>"\\é漢🙂', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(-2, 2) | WORDS | st.just("<|im_end|>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
STYLES = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "separators": st.sampled_from([None, (",", ":"), (" ,", ": ")]),
        "indent": st.sampled_from([None, 1]),
    }
)


@st.composite
def turns(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A turn with calls in any style, and the texts around them."""
    around = [draw(WORDS)]
    text = around[0]
    for _ in range(draw(st.integers(1, 3))):
        arguments = draw(st.dictionaries(WORDS, VALUES, max_size=3))
        members = [("name", "note"), ("arguments", arguments)]
        written = json.dumps(dict(members[:: draw(st.sampled_from([1, -1]))]), **draw(STYLES))
        space = draw(st.sampled_from(["", "\n", " "]))
        around.append(draw(WORDS))
        text += f"<tool_call>{space}{written}{space}</tool_call>{around[-1]}"
    return text, around


@pytest.mark.parametrize("answer", [TAGGED, LISTED, FENCED, BY_KEY, ESCAPED, THINKING], ids=range(6))
@settings(max_examples=40, deadline=None)
@given(turn=turns(), ended=st.booleans())
def test_any_turn_with_calls_keeps_the_laws(answer: str, turn: tuple[str, list[str]], ended: bool):
    text, around = turn
    parsed = parse_calls(text, asked().tools, syntax="hermes")
    assume(not parsed.errors and len(parsed.calls) == len(around) - 1)
    for student, teacher in (("bytes", toy_reader(answer)), ("smollm2", toy_reader(answer))):
        own = writer(student)
        assume("\x13" not in text)
        found = read(text, own, teacher, ended=ended)
        check_laws(found, own, teacher, text)
        facts = turn_facts(found, np.zeros(len(found.reading.ends) + ended))
        hidden = sum(count for name, count in facts.items() if name.startswith("masked/"))
        assert hidden == (found.pairing.chunk_ids < 0).sum()
        assert set(found.pairing.masked.tolist()) <= {Masked.NOT, Masked.SYNTAX, Masked.STRADDLE}
        if not found.untranscribed and student == "bytes":
            # text outside calls is compared, letter by letter, but for white space where the template has its own
            kept, position = kept_text(found, own, text), 0
            for said in (x for part in around for x in part.split()):
                position = kept.find(said[1:-1], position)
                assert position >= 0, (said, kept)


def test_tokens_without_bytes_belong_to_what_their_place_starts():
    """Two blocks, [0, 2) and [3, 5) of 6 bytes."""
    ends = np.array([0, 1, 2, 2, 3, 3, 5, 5, 6])
    found = fold(ends, np.array([0, 3]), np.array([2, 2]))
    assert found.inside.tolist() == [True, True, True, False, False, True, True, False, False]
    assert found.ends.tolist() == [0, 1, 2, 2, 2, 2, 4, 4, 4]
    assert not found.torn.any()
    last = fold(np.array([2, 2]), np.array([0]), np.array([2]))
    assert last.inside.tolist() == [True, True]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_of_any_two_texts_line_up_as_by_hand(data: st.DataObject):
    """The pairing alone, against `kept_by_hand`: any blocks, any two tokenisations."""
    kinds = st.sampled_from(["both", "student", "teacher"])
    segments = data.draw(st.lists(st.tuples(kinds, st.integers(1, 4)), max_size=6))
    segments = [(who, "x" * size) for who, size in segments]
    merged: list[Segment] = []
    for who, text in segments:  # two segments of both that touch are one
        if merged and who == merged[-1][0]:
            merged[-1] = (who, merged[-1][1] + text)
        else:
            merged.append((who, text))
    totals = [sum(len(t) for who, t in merged if who in ("both", side)) for side in ("student", "teacher")]
    cuts = [sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=6)) - {total}) for total in totals]
    ends = [np.array([*c, total] if total else [], dtype=np.int64) for c, total in zip(cuts, totals, strict=True)]
    blocks, places = [], [0, 0]
    for who, text in merged:
        if who == "both":
            blocks.append((*places, len(text)))
        places = [
            p + len(text) * (who in ("both", side)) for p, side in zip(places, ("student", "teacher"), strict=True)
        ]
    spelling = Spelling("x" * totals[0], ends[0], np.zeros(len(ends[0]), dtype=np.uint8))
    reading = Reading(np.arange(len(ends[1])), 0, ends[1], np.zeros(len(ends[1]), dtype=np.uint8))
    found = pair(spelling, reading, ends_turn=True, blocks=np.array(blocks, dtype=np.int64).reshape(-1, 3))
    pieces = tuple(["x" * n for n in np.diff(e, prepend=0)] for e in ends)
    kept, kept_there = kept_by_hand(pieces, merged)  # type: ignore[arg-type]  # two lists
    assert (found.chunk_ids >= 0).tolist() == [*kept, True]
    logprobs = -np.arange(1.0, len(ends[1]) + 2)
    assert found.sums(logprobs).sum() == logprobs[:-1][np.array(kept_there, dtype=bool)].sum() + logprobs[-1]
