"""Format errors of a rollout, as the tokens in which they lie."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from opd.config.episodes import ChecksConfig
from opd.records import Flag, Rollout
from opd.rewards.format_checks import CheckedTurn, check_turn
from opd.text.student_text import UNWRITTEN, Masked, StudentText, spell
from opd.text.token_bytes import TokenBytes
from opd.text.tool_calls import Syntax

_TAIL = 16  # tokens before a turn, in which stands the tag that a prompt has opened


def flag_errors(
    rollout: Rollout, checks: ChecksConfig, table: TokenBytes, *, syntax: Syntax, final: bool = True
) -> Rollout:
    """The rollout with the format errors of its student's turns as `flags`, in the order of its tokens.

    Every flag covers at least one token and lies within its turn; what is missing is flagged at the turn's last token. A turn's
    text is what its sampled tokens spell; special tokens count as text where they are tags of calls or what `checks` ask for.

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
            # without room for another turn the last one was whole
            cut=last and rollout.truncated and not (rollout.finish == "context" and int(ids[-1]) in table.names),
            raw=_raw(student_text, ids, table),
            settings=checks,
            opened=_opened(rollout.token_ids[max(0, turn.start - _TAIL) : turn.start], table, symbols, checks),
        )
        places = _byte_offsets(student_text.text)
        for found in check_turn(checked, checks.rules):
            start, end = _tokens(student_text, int(places[found.start]), int(places[found.end]))
            flags.add(Flag(found.rule, turn.start + start, turn.start + end))
    return replace(rollout, flags=tuple(sorted(flags, key=lambda flag: (flag.start, flag.end, flag.rule))))


def _wanted(checks: ChecksConfig) -> frozenset[str]:
    """The texts that a turn may have to have, special token or not."""
    tags = [f"<{sign}{tag}>" for tag in (*checks.tags, "tool_call") for sign in ("", "/")]
    return frozenset((*tags, checks.answer_end or ""))


def _raw(student_text: StudentText, ids: np.ndarray, table: TokenBytes) -> bytes:
    """The bytes that a turn's text was read from."""
    raw = table.join(ids[~np.isin(student_text.masked, UNWRITTEN)]).tobytes()
    return raw.removeprefix(b" ") if table.dummy_prefix else raw


def _opened(before: np.ndarray, table: TokenBytes, symbols: Mapping[int, str], checks: ChecksConfig) -> str:
    """The tag that the tokens before a turn end with, white space apart; "" for none."""
    if not checks.tags:
        return ""
    text = spell(table, before, symbols).text.rstrip()
    return next((tag for tag in checks.tags if text.endswith(f"<{tag}>")), "")


def _byte_offsets(text: str) -> np.ndarray:
    """The byte at which each character of a text starts, and the last ends, [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(lengths)])


def _tokens(student_text: StudentText, start: int, end: int) -> tuple[int, int]:
    """The tokens [first, stop) of a turn that spell the bytes [start, end); the last token where there are none."""
    ends = student_text.ends
    if start == end:
        return len(ends) - 1, len(ends)
    first = int(np.searchsorted(ends, start, side="right"))
    stop = int(np.searchsorted(ends, end, side="left")) + 1
    # an invalid stretch of bytes is spelled by the last of its tokens; those before spell nothing
    while first and ends[first - 1] == start and student_text.masked[first - 1] == Masked.INVALID_UTF8:
        first -= 1
    return first, stop
