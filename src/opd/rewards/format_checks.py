"""Format errors of the student: one rule each, from the text of a turn to the places of its errors, and to their tokens.

A turn may be any text that a model can write. Every rule takes time linear in its length (a pattern of the user: at most a
second) and raises nothing.
"""

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import regex

from opd.config.tasks import ChecksConfig, Rule
from opd.records import Flag, Rollout
from opd.text.encoding import byte_offsets
from opd.text.student_text import UNWRITTEN, Masked, StudentText, spell
from opd.text.tokenizer import TokenBytes
from opd.text.tool_calls import Parsed, Reason, Syntax, parse_calls

MIN_WORDS = 20
"""The repetition of words is not checked in a turn of fewer."""
MIN_CHARACTERS = 128
"""The repetition of characters is not checked in a shorter stretch without white space."""
SEARCHED_CHARACTERS = 8192
"""Length of a turn's end in which `answer_pattern` is searched: `.*` in a pattern costs the square of it."""

_PATTERN_TIMEOUT_S = 1.0  # a pattern of the user may take exponential time
_CHARACTERS = 12  # of an n-gram: in prose, in CJK text and among digits hardly one repeats, in a loop all do
_WORD = re.compile(r"\S+")
_FENCE = re.compile(r"^[ \t]*+(`{3,}+|~{3,}+)([^\n]*+)", re.MULTILINE)
_TAIL = 16  # tokens before a turn, in which a tag that the prompt opened is searched
_ESCAPED = re.compile("[\udc80-\udcff]+")


Span: TypeAlias = tuple[int, int]
"""Characters [start, end) of a turn; start = end where something is missing."""


class Found(NamedTuple):
    """A format error: its rule, and its characters [start, end)."""

    rule: Rule
    start: int
    end: int


@dataclass(frozen=True)
class CheckedTurn:
    """One turn of the student, as rules read it.

    text: raw.decode(errors="replace"); raw: its bytes. last: whether the episode ends with it; cut: whether a limit on tokens
    ended it. opened: the tag that the prompt opened for it, such as <think> at the end of a template.
    """

    text: str
    tools: Sequence[Mapping[str, Any]]
    syntax: Syntax
    last: bool
    cut: bool
    raw: bytes
    settings: ChecksConfig
    opened: str = ""

    @cached_property
    def parsed(self) -> Parsed:
        return parse_calls(self.text, self.tools, syntax=self.syntax)

    @property
    def end(self) -> Span:
        """The place of something missing."""
        return len(self.text), len(self.text)


def check_turn(turn: CheckedTurn, rules: Sequence[Rule]) -> list[Found]:
    """The errors of these rules: rule by rule, in the order of the text."""
    return [Found(rule, start, end) for rule in rules for start, end in CHECKS[rule](turn)]


def _call_errors(turn: CheckedTurn, reason: Reason) -> list[Span]:
    return [(error.start, error.end) for error in turn.parsed.errors if error.reason == reason]


def tool_call(turn: CheckedTurn) -> list[Span]:
    """Calls that are not the JSON object of the syntax, or that have no end."""
    return _call_errors(turn, "unparsed")


def unknown_tool(turn: CheckedTurn) -> list[Span]:
    """Calls of a tool that the prompt does not have."""
    return _call_errors(turn, "unknown")


def tool_arguments(turn: CheckedTurn) -> list[Span]:
    """Calls with arguments outside the tool's schema."""
    return _call_errors(turn, "arguments")


def dropped_call(turn: CheckedTurn) -> list[Span]:
    """Text that looks like a call and is none in the syntax."""
    return _call_errors(turn, "dropped")


def tags(turn: CheckedTurn) -> list[Span]:
    """Repeated tags and tags in a wrong order; and the end of the turn where tags are missing.

    The last turn needs all tags; another turn needs only the counterparts of those that it has.
    """
    names = turn.settings.tags
    order = {tag: i for i, tag in enumerate(tag for name in names for tag in (f"<{name}>", f"</{name}>"))}
    if not order:
        return []
    seen = {order[f"<{turn.opened}>"]} if turn.opened in names else set()
    wrong: list[Span] = []
    for found in re.finditer("|".join(map(re.escape, order)), turn.text):
        rank = order[found[0]]
        if rank in seen or rank < max(seen, default=0):
            wrong.append(found.span())
        seen.add(rank)
    unpaired = any((rank in seen) != (rank + 1 in seen) for rank in range(0, len(order), 2))
    if unpaired or (turn.last and len(seen) < len(order)):
        wrong.append(turn.end)
    return wrong


def code_fence(turn: CheckedTurn) -> list[Span]:
    """The fence (``` or ~~~) of a code block that does not end. A block ends with a fence as long, of the same sign, alone."""
    opened: re.Match[str] | None = None
    for found in _FENCE.finditer(turn.text):
        sign, behind = found[1], found[2]
        if opened is None:
            if sign[0] == "~" or "`" not in behind:  # otherwise it is code within a line
                opened = found
        elif sign[0] == opened[1][0] and len(sign) >= len(opened[1]) and not behind.strip():
            opened = None
    return [] if opened is None else [(opened.start(1), opened.end())]


def answer_pattern(turn: CheckedTurn) -> list[Span]:
    """The end of a last turn in which the pattern of the task finds no answer within a second."""
    pattern = turn.settings.answer_pattern
    if pattern is None or not turn.last:
        return []
    searched = max(0, len(turn.text) - SEARCHED_CHARACTERS)
    try:
        found = regex.compile(pattern).search(turn.text, searched, timeout=_PATTERN_TIMEOUT_S)
    except TimeoutError:
        found = None
    return [] if found else [turn.end]


def truncated(turn: CheckedTurn) -> list[Span]:
    """The end of a turn that a limit on tokens cut."""
    return [turn.end] if turn.cut else []


def repetition(turn: CheckedTurn) -> list[Span]:
    """Text that repeats itself: more than the allowed fraction of its 3-grams of words, or of the 12-grams of characters in a
    stretch without white space, has occurred before. A text of few words counts as one stretch."""
    limit = turn.settings.max_repetition
    words = list(_WORD.finditer(turn.text))
    if len(words) < MIN_WORDS:
        return _loops(turn.text, 0, limit) if len(turn.text) >= MIN_CHARACTERS else []
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(word[0], len(numbers)) for word in words], dtype=np.uint64)
    found = _repeated(codes, 3, limit)
    if found is not None:
        return [(words[found[0]].start(), words[found[1] - 1].end())]
    long = [word for word in words if len(word[0]) >= MIN_CHARACTERS]
    return [span for word in long for span in _loops(word[0], word.start(), limit)]


def _loops(text: str, offset: int, limit: float) -> list[Span]:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    found = _repeated(codes, _CHARACTERS, limit)
    return [] if found is None else [(offset + found[0], offset + found[1])]


def _repeated(codes: np.ndarray, width: int, limit: float) -> tuple[int, int] | None:
    """[start, end) of the items [n] from the first to the last n-gram that has occurred before; None while their fraction is
    within the limit."""
    count = len(codes) - width + 1
    grams = np.zeros(count, dtype=np.uint64)
    for k in range(width):  # a polynomial of each n-gram modulo 2^64; two that differ hardly ever share one
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + count] + np.uint64(1)
    _, first = np.unique(grams, return_index=True)
    again = np.ones(count, dtype=bool)
    again[first] = False
    if again.mean() <= limit:
        return None
    places = np.flatnonzero(again)
    return int(places[0]), int(places[-1]) + width


def invalid_utf8(turn: CheckedTurn) -> list[Span]:
    """Bytes that are not UTF-8, U+FFFD in the text; a character that a limit on tokens cut at the end is no error."""
    text, _ = codecs.utf_8_decode(turn.raw, "surrogateescape", not turn.cut)
    spans: list[Span] = []
    surplus = 0  # characters that `text` has more than the turn's, each of its invalid bytes being one
    for found in _ESCAPED.finditer(text):
        width = len(found[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        start = found.start() - surplus
        spans.append((start, start + width))
        surplus += len(found[0]) - width
    return spans


def after_answer(turn: CheckedTurn) -> list[Span]:
    """Text after the first end of an answer, other than white space."""
    ending = turn.settings.answer_end
    place = turn.text.find(ending) if ending else -1
    if ending is None or place < 0:
        return []
    behind = turn.text[place + len(ending) :]
    start = len(turn.text) - len(behind.lstrip())
    return [(start, len(turn.text.rstrip()))] if behind.strip() else []


CHECKS: Mapping[Rule, Callable[[CheckedTurn], list[Span]]] = MappingProxyType(
    {
        "tool_call": tool_call,
        "unknown_tool": unknown_tool,
        "tool_arguments": tool_arguments,
        "dropped_call": dropped_call,
        "tags": tags,
        "code_fence": code_fence,
        "answer_pattern": answer_pattern,
        "truncated": truncated,
        "repetition": repetition,
        "invalid_utf8": invalid_utf8,
        "after_answer": after_answer,
    }
)


def flag_errors(
    rollout: Rollout, checks: ChecksConfig, table: TokenBytes, *, syntax: Syntax, final: bool = True
) -> Rollout:
    """The rollout with the format errors of its student's turns as `flags`, in the order of its tokens.

    Every flag covers at least one token and lies within its turn; something missing is flagged at the turn's last token. The text
    of a turn is that of its sampled tokens; special tokens count as text if they are tags of calls or named in `checks`.

    final: whether the episode ends in this rollout, so that its last turn is the episode's last and may be cut.
    """
    if not checks.rules:
        return rollout
    wanted = _wanted(checks)
    symbols = {index: name for index, name in table.names.items() if name in wanted}
    turns = [turn for turn in rollout.turns if turn.author == "student" and turn.end > turn.start]
    flags: set[Flag] = set()
    for turn in turns:
        ids = rollout.token_ids[turn.start : turn.end]
        student_text = spell(table, ids, symbols)
        last = final and turn is turns[-1]
        checked = CheckedTurn(
            text=student_text.text,
            tools=rollout.prompt.tools,
            syntax=syntax,
            last=last,
            # a turn that ended itself is whole, also where the context has no room for another one
            cut=last and rollout.truncated and not (rollout.finish == "context" and int(ids[-1]) in table.names),
            raw=_raw(student_text, ids, table),
            settings=checks,
            opened=_opened(rollout.token_ids[max(0, turn.start - _TAIL) : turn.start], table, symbols, checks),
        )
        places = byte_offsets(student_text.text)
        for found in check_turn(checked, checks.rules):
            start, end = _tokens(student_text, int(places[found.start]), int(places[found.end]))
            flags.add(Flag(found.rule, turn.start + start, turn.start + end))
    return replace(rollout, flags=tuple(sorted(flags, key=lambda flag: (flag.start, flag.end, flag.rule))))


def _wanted(checks: ChecksConfig) -> frozenset[str]:
    """The special tokens that count as text."""
    tags = [f"<{sign}{tag}>" for tag in (*checks.tags, "tool_call") for sign in ("", "/")]
    return frozenset((*tags, checks.answer_end or ""))


def _raw(student_text: StudentText, ids: np.ndarray, table: TokenBytes) -> bytes:
    """The bytes of a turn's text."""
    raw = table.join(ids[~np.isin(student_text.masked, UNWRITTEN)]).tobytes()
    return raw.removeprefix(b" ") if table.dummy_prefix else raw


def _opened(before: np.ndarray, table: TokenBytes, symbols: Mapping[int, str], checks: ChecksConfig) -> str:
    """The tag at the end of the tokens before a turn, white space ignored; "" for none."""
    if not checks.tags:
        return ""
    text = spell(table, before, symbols).text.rstrip()
    return next((tag for tag in checks.tags if text.endswith(f"<{tag}>")), "")


def _tokens(student_text: StudentText, start: int, end: int) -> tuple[int, int]:
    """The tokens [first, stop) of a turn whose text is the bytes [start, end); the last token where there are none."""
    ends = student_text.ends
    if start == end:
        return len(ends) - 1, len(ends)
    first = int(np.searchsorted(ends, start, side="right"))
    stop = int(np.searchsorted(ends, end, side="left")) + 1
    # the last token of invalid bytes has their text; the tokens before it have none
    while first and ends[first - 1] == start and student_text.masked[first - 1] == Masked.INVALID_UTF8:
        first -= 1
    return first, stop
