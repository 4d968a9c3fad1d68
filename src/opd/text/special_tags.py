"""The tags with which models mark thoughts and tool calls, and the text of a response behind its thoughts."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from opd.text.tokenizer import TokenBytes

THOUGHTS: Mapping[str, str] = MappingProxyType({
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<seed:think>": "</seed:think>",
    "<longcat_think>": "</longcat_think>",
    "<|inner_prefix|>": "<|inner_suffix|>",
    "\u25c1think\u25b7": "\u25c1/think\u25b7",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
})  # fmt: skip
"""How models open and close a thought."""

_THINK = frozenset(THOUGHTS)
_ROLES: Sequence[frozenset[str]] = (
    _THINK,
    frozenset(THOUGHTS.values()),
    frozenset({
        "<tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", "<｜tool▁calls▁begin｜>", "<|START_ACTION|>",
    }),
    frozenset({"</tool_call>", "<|/tool_call|>", "<｜tool▁calls▁end｜>", "<|END_ACTION|>"}),
)  # fmt: skip

TAGS = frozenset().union(*_ROLES)


def counterparts(student: TokenBytes, teacher: TokenBytes) -> dict[int, str]:
    """The student's added tokens that the teacher has too, by name or by role, and the teacher's names of them.

    An added token stays text if it is ordinary text for the student and the teacher has no tag for it.
    """
    theirs = set(teacher.added.values())
    found: dict[int, str] = {}
    for index, literal in student.added.items():
        role = next((r for r in _ROLES if literal in r), frozenset({literal}))
        same = literal if literal in theirs else next(iter(sorted(role & theirs)), None)
        if same is not None and (student.control[index] or same != literal):
            found[index] = same
    return found


def _any(tags: frozenset[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(tags))) + r")\s*"


_OPENING = re.compile(_any(_THINK) + r"\Z")
_BLOCK = re.compile(f"{_any(_THINK)}(?:{_any(_ROLES[1])})?" + r"\Z")


def thinking_opening(rendering: str) -> str:
    """The thinking tag, and the white space behind it, with which a rendering ends; "" where it ends otherwise."""
    found = _OPENING.search(rendering)
    return found[0] if found else ""


def thinking_tag(opening: str, teacher: TokenBytes) -> str:
    """The opening of a thinking block as a teacher writes it: in its own tag, where it has a token for one."""
    tag = opening.rstrip()
    theirs = sorted(_THINK & set(teacher.added.values()))
    return opening if not opening or tag in theirs or not theirs else theirs[0] + opening[len(tag) :]


def without_thinking(rendering: str) -> str:
    """A rendering without the thinking block, open or empty, with which it ends."""
    return _BLOCK.sub("", rendering)


def opens_thinking(text: str) -> bool:
    """Whether a response opens a thinking block itself."""
    return any(text.lstrip().startswith(tag) for tag in _THINK)


def opened_thinking(rendering: str, text: str) -> str:
    """The thinking tag, and the white space behind it, with which a generation prompt ends where the text opens its own."""
    return thinking_opening(rendering) if opens_thinking(text) else ""


_TAG = re.compile("|".join(re.escape(tag) for pair in THOUGHTS.items() for tag in pair), re.IGNORECASE)
_CLOSING = {opening.casefold(): closing.casefold() for opening, closing in THOUGHTS.items()}


def behind_thoughts(response: str) -> str | None:
    """The text behind the last closing tag of a thought, all of it without a tag; None while a thought is not closed.

    A closing tag alone closes a thought that the prompt opened. Within a thought only its own closing tag counts, in any case.
    """
    start, closing = 0, None
    for found in _TAG.finditer(response):
        tag = found[0].casefold()
        if closing is None and tag in _CLOSING:
            closing = _CLOSING[tag]
        elif closing is None or tag == closing:
            start, closing = found.end(), None
    return response[start:] if closing is None else None
