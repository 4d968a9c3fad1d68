"""How chat templates write tool calls, turns with calls as a teacher reads them, and by hand what of them is compared."""

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from factories import byte_tokenizer
from pairs import check_chunks, rollout_of
from zoo import real, toy, toy_bpe

from opd.records import Prompt, Rollout, Turn
from opd.text.alignment import TurnPair, pair_turns, sides
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide
from opd.text.tool_calls import Syntax

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate arithmetic.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
NOTE = {"type": "function", "function": {"name": "note", "description": "Keep.", "parameters": {"type": "object"}}}


def asked(text: str = "What is 1 + 2?", *, tools=(CALCULATOR, NOTE)) -> Prompt:
    return Prompt("p", ({"role": "user", "content": text},), teacher="t", task="task", tools=tuple(tools))


def chatml(answer: str, *, tool: str = "m.content") -> str:
    """The frame of ChatML around how an assistant's message `m` and a tool's are written."""
    return (
        "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + answer + "{% elif m.role == 'tool' %}{{ " + tool + " }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


# Text, then a call a line between tags (Qwen2.5, Hermes).
TAGGED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}"
    '{{ \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' + (c.function.arguments | tojson) }}'
    "{{ '}\n</tool_call>' }}{% endfor %}"
)
# One call and nothing else (Llama 3.1).
SINGLE = (
    "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content }}{% endif %}"
)
# All calls in one list, each with its id, behind the text (Mistral).
LISTED = (
    "{{ m.content }}{% if m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' + (', ' if not loop.last else ']') }}"
    "{% endfor %}{% endif %}"
)
# Arguments as the text of an object (DeepSeek); an object raises a TypeError.
FENCED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}{% endfor %}"
)
# Arguments one by one, no JSON (Qwen3-Coder).
BY_KEY = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>' + (v | string) + '</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}"
)
# The arguments before the name.
TURNED = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>{\"arguments\": ' + (c.function.arguments | tojson) + ', \"name\": \"' + c.function.name + '\"}</tool_call>' }}"
    "{% endfor %}"
)
# Nothing but ASCII.
ESCAPED = TAGGED.replace("| tojson", "| tojson(ensure_ascii=true)")
# A thought before every answer, an empty one where there was none (Qwen3).
THINKING = (
    "{% set said = m.content.split('</think>')[-1].lstrip() %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}" + TAGGED.replace("m.content", "said")
)

LLAMA = (
    "{{ bos_token }}{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    '{{ \'Respond in the format {"name": function name, "parameters": dictionary of arguments}.\n\n\' }}'
    "{% for t in tools %}{{ t | tojson(indent=4) + '\n\n' }}{% endfor %}{{ '<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'assistant' %}" + SINGLE + "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    '{{ \'[TOOL_RESULTS]{"content": "\' + m.content + \'", "call_id": "\' + m.tool_call_id + \'"}[/TOOL_RESULTS]\' }}'
    "{% else %}" + LISTED + "{{ eos_token }}{% endif %}{% endfor %}"
)


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
def student_side(name: str) -> StudentSide:
    return StudentSide(toy(name) if name == "bytes" else real(name))


@functools.cache
def teacher_side(name: str) -> TeacherSide:
    """A published tokenizer with its own template, or one like its model's where the archive's writes no calls."""
    tokenizer = copy.copy(real(name))
    tokenizer.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    return TeacherSide(tokenizer, name=name)


@functools.cache
def toy_reader(answer: str) -> TeacherSide:
    return TeacherSide(toy_bpe(390, template=chatml(answer)), name="t")


@functools.cache
def bytes_reader(answer: str) -> TeacherSide:
    """A teacher that writes bytes, so that no token has a part in two things."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chatml(answer)
    return TeacherSide(tokenizer, name="t")


def turn_of(text: str, own: StudentSide, prompt: Prompt | None = None, *, ended: bool = True) -> Rollout:
    """A rollout of one turn, behind one token that stands for the prompt."""
    return rollout_of(own.encode(text), own, text=text, ended=ended, prompt=prompt or asked())


def read(
    text: str, own: StudentSide, theirs: TeacherSide, *, syntax: Syntax | None = "hermes", **kwargs: Any
) -> TurnPair:
    [turn] = pair_turns(turn_of(text, own, **kwargs), own, theirs, own_syntax=syntax)
    return turn


def told(turn: TurnPair, theirs: TeacherSide) -> str:
    """What the teacher reads of a turn, from its tokens."""
    return theirs.table.join(turn.teacher_text.token_ids[turn.teacher_text.first :]).tobytes().decode()


def left_out(turn: TurnPair, own: StudentSide, text: str) -> list[str]:
    """The student's tokens that are masked."""
    pieces = [own.table.of(i).decode(errors="replace") for i in own.encode(text)]
    return [piece for piece, why in zip(pieces, turn.pairing.masked, strict=False) if why]


def same(one: TurnPair, other: TurnPair) -> bool:
    """Whether two readings agree in everything that a score depends on."""
    pairs = [
        (one.teacher_text.token_ids, other.teacher_text.token_ids),
        (one.teacher_text.ends, other.teacher_text.ends),
        (one.pairing.masked, other.pairing.masked),
        (one.pairing.chunk_ids, other.pairing.chunk_ids),
        (one.pairing.chunks.ends, other.pairing.chunks.ends),
        (one.pairing.chunks.teacher, other.pairing.chunks.teacher),
    ]
    return one.teacher_text.first == other.teacher_text.first and all(np.array_equal(a, b) for a, b in pairs)


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


def check_laws(turn: TurnPair, own: StudentSide, theirs: TeacherSide, text: str) -> None:
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
    assert read == theirs.table.join(turn.teacher_text.token_ids[turn.teacher_text.first :]).tobytes()


def with_control(text: str, place: int) -> Rollout:
    """A control token of the student's in the middle of a turn; its message does not show it."""
    own = student_side("bytes")
    item = turn_of(text, own)
    ids = np.insert(item.token_ids, 1 + place, own.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    return replace(
        item,
        token_ids=ids,
        loss_mask=np.arange(len(ids)) > 0,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(ids))),
    )


def kept_text(turn: TurnPair, own: StudentSide, text: str) -> str:
    """What the student's tokens spell that are compared."""
    ids = own.encode(text)
    kept = [own.table.of(i) for i, why in zip(ids, turn.pairing.masked, strict=False) if not why]
    return b"".join(kept).decode(errors="replace")


def history(*messages: tuple[str, str]) -> Prompt:
    """A prompt in which this has been said, (role, text) each."""
    said = [{"role": role, "content": content} for role, content in messages]
    return Prompt("p", (*asked().messages, *said), teacher="t", task="task", tools=asked().tools)


def before(turn: TurnPair, theirs: TeacherSide) -> str:
    """What the teacher reads before a turn."""
    return theirs.table.join(turn.teacher_text.token_ids[: turn.teacher_text.first]).tobytes().decode()
