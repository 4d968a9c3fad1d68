"""The student's side of an alignment: the text of its sampled tokens, and where each token ends in it.

The sampled ids stay as they are; nothing is decoded and encoded again. Tokens without a place in a text are left out of it and
marked with the reason: control tokens without a counterpart, ids beyond the vocabulary, bytes that are no UTF-8.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np

from opd.records import Rollout, Turn
from opd.text.template import opened_by, turn_end
from opd.text.tokenizer import TokenBytes, encode_text, token_bytes


class Masked(IntEnum):
    """Why a student token has no log ratio; NOT is for those that have one."""

    NOT = 0
    NO_COUNTERPART = 1  # a control token that the teacher's vocabulary has nothing for, or no bytes to compare
    UNKNOWN_ID = 2  # an id beyond the student's own tokenizer
    INVALID_UTF8 = 3  # bytes that are no text, or a character cut by the end
    STRADDLE = 4  # the teacher's token begins before the response
    LOSSY = 5  # the teacher's tokenizer changes the text
    NON_CANONICAL = 6  # the student spelled a text in other tokens than its tokenizer would
    SYNTAX = 7  # around a tool call's name and arguments, where the teacher's template writes something else


UNWRITTEN = (Masked.NO_COUNTERPART, Masked.UNKNOWN_ID)  # no part of the text that the teacher reads


@dataclass(frozen=True)
class StudentText:
    """text: for the teacher to read; ends [tokens]: the byte of `text` at which each token ends; masked [tokens]: `Masked`;
    tags: the characters [start, stop) of `text` that are the teacher's own tokens rather than text that looks so."""

    text: str
    ends: np.ndarray
    masked: np.ndarray
    tags: tuple[tuple[int, int], ...] = ()

    @property
    def num_bytes(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


def student_turns(rollout: Rollout) -> list[tuple[Turn, int]]:
    """The turns of the student in a rollout, each with the place of its message in `rollout.messages`."""
    first = len(rollout.prompt.messages)
    places = [i for i, message in enumerate(rollout.messages) if i >= first and message["role"] == "assistant"]
    turns = [turn for turn in rollout.turns if turn.author == "student"]
    assert len(turns) == len(places), rollout.id
    return list(zip(turns, places, strict=True))


class StudentSide:
    """The student's tokenizer, the bytes of its tokens, its end tokens; opened: the thinking tag at the end of its generation
    prompt."""

    def __init__(self, tokenizer: Any, *, generation_config: Any = None, vocab_size: int | None = None) -> None:
        """Raises ModelError when the bytes of the tokens are unknown, or when no token ends a turn."""
        self.tokenizer = tokenizer
        self.table = token_bytes(tokenizer, vocab_size=vocab_size)
        self.end = turn_end(tokenizer, generation_config, who="the student")
        self.end_ids, self.end_id = self.end.ids, self.end.written
        self.opened = opened_by(tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens that the tokenizer itself writes a text in, special tokens in it as text."""
        return encode_text(self.tokenizer, text, parse_special=False)

    def strange(self, token_ids: np.ndarray, symbols: Mapping[int, str]) -> np.ndarray:
        """The tokens that the tokenizer would not produce for the text, [tokens] bool.

        A text has many tokenizations, and log pi of the sampled one is below that of the text. A student that uses many of them
        looks further from its teachers than it is. Each stretch between control tokens is compared with the tokenizer's encoding
        of it. A stretch that is no UTF-8, or that the tokenizer changes, is not compared.
        """
        found = np.zeros(len(token_ids), dtype=bool)
        for start, stop in self._stretches(token_ids, symbols):
            ids = token_ids[start:stop]
            raw = self.table.join(ids).tobytes()
            try:
                text = raw.removeprefix(b" ").decode() if self.table.dummy_prefix else raw.decode()
            except UnicodeDecodeError:
                continue
            plain = np.array(self.encode(text), dtype=np.int64)
            if np.array_equal(plain, ids) or self.table.join(plain).tobytes() != raw:
                continue
            usual, ours = (np.cumsum(self.table.lengths(x)) for x in (plain, ids))
            # the ids too: a vocabulary with byte tokens has two tokens for one letter
            spans = set(zip(np.append(0, usual[:-1]).tolist(), usual.tolist(), plain.tolist(), strict=True))
            mine = zip(np.append(0, ours[:-1]).tolist(), ours.tolist(), ids.tolist(), strict=True)
            found[start:stop] = [span not in spans for span in mine]
        return found

    def _stretches(self, token_ids: np.ndarray, symbols: Mapping[int, str]) -> Iterator[tuple[int, int]]:
        """[start, stop) of each run of tokens that are text."""
        inside = np.minimum(token_ids, len(self.table) - 1)
        apart = (token_ids >= len(self.table)) | self.table.unknown[inside] | self.table.control[inside]
        apart |= np.isin(token_ids, list(symbols))
        edges = [-1, *np.flatnonzero(apart).tolist(), len(token_ids)]
        for before, after in pairwise(edges):
            if after - before > 1:
                yield before + 1, after


def spell(table: TokenBytes, token_ids: np.ndarray, symbols: Mapping[int, str]) -> StudentText:
    """The text of one response, its end-of-turn token left out.

    symbols: ids that the teacher has a token of its own for, and how it writes it; every other control token is masked and not
    written. A byte that is no UTF-8 is written as U+FFFD.
    """
    masked = np.zeros(len(token_ids), dtype=np.uint8)
    inside = np.minimum(token_ids, len(table) - 1)
    beyond = (token_ids >= len(table)) | table.unknown[inside]
    masked[beyond] = Masked.UNKNOWN_ID
    masked[table.control[inside] & ~beyond] = Masked.NO_COUNTERPART
    tagged = np.flatnonzero(np.isin(token_ids, list(symbols)))
    masked[tagged] = Masked.NOT
    if masked.any() or len(tagged):
        written = {int(i): symbols[int(token_ids[i])].encode() for i in tagged}
        pieces = [b"" if masked[i] else written.get(i, table.of(int(t))) for i, t in enumerate(token_ids)]
        raw = b"".join(pieces)
        lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    else:
        raw, lengths = table.join(token_ids).tobytes(), table.lengths(token_ids)
    if table.dummy_prefix and raw.startswith(b" "):
        # the space that the tokenizer puts before a text, and its decoder takes away again
        raw = raw[1:]
        lengths[np.flatnonzero(lengths)[0]] -= 1
    ends = np.cumsum(lengths)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text, ends, masked = _repaired(raw, ends, masked)
    return StudentText(text, ends, masked, _characters(text, ends, tagged))


def _characters(text: str, ends: np.ndarray, tokens: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The characters [start, stop) that these tokens spell."""
    whole = text.encode() if len(tokens) else b""
    spans = [(int(ends[i - 1]) if i else 0, int(ends[i])) for i in tokens]
    return tuple((len(whole[:start].decode()), len(whole[:stop].decode())) for start, stop in spans)


def _repaired(raw: bytes, ends: np.ndarray, masked: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """(text, ends, masked) with each invalid stretch written as one U+FFFD, and the tokens that share bytes with one masked."""
    place = np.zeros(len(raw) + 1, dtype=np.int64)  # raw offset -> offset in the text's bytes
    broken = np.zeros(len(raw), dtype=bool)
    text: list[str] = []
    position = written = 0
    while position < len(raw):
        try:
            good, bad = raw[position:].decode(), 0
        except UnicodeDecodeError as error:
            good, bad = raw[position : position + error.start].decode(), error.end - error.start
        length = len(good.encode())
        place[position : position + length + 1] = written + np.arange(length + 1)
        position, written = position + length, written + length
        text.append(good)
        if bad:
            # within the stretch every offset lies at its start, so that no cut falls inside it
            place[position : position + bad] = written
            broken[position : position + bad] = True
            position, written = position + bad, written + len("\ufffd".encode())
            text.append("\ufffd")
            place[position] = written
    counts = np.concatenate([[0], np.cumsum(broken)])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    touched = (counts[ends] > counts[starts]) & (masked == Masked.NOT)
    return "".join(text), place[ends], np.where(touched, np.uint8(Masked.INVALID_UTF8), masked)
