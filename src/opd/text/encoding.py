"""A text in a tokenizer's own tokens, with quoted special tokens kept text.

Placeholder characters replace quotes before a template renders a conversation, until the text is encoded. So every special token
in the rendering is the template's own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from opd.errors import DataError
from opd.text.tokenizer import TokenBytes, encode_text

_FIRST, _LAST = 0x100000, 0x10FFFD  # placeholders: the last private-use plane
PLANE = f"[{chr(_FIRST)}-{chr(_LAST)}]"


def byte_offsets(text: str) -> np.ndarray:
    """The byte at which each character of a text starts, and the last one ends, [characters + 1] int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lengths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(lengths)])


class Quotes:
    """Placeholders for text that looks like a special token. Characters of the placeholders' own plane count as quotes, so a
    placeholder is unambiguous."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self._quoted: list[str] = []

    def mark(
        self, text: str, *, outside: Sequence[tuple[int, int]] = (), pattern: re.Pattern[str] | None = None
    ) -> str:
        """The text with placeholders for its quotes, or for the matches of another `pattern`; the spans `outside` stay."""
        pattern = pattern or self._pattern
        found, position = [], 0
        for start, stop in outside:
            found += [pattern.sub(self._placeholder, text[position:start]), text[start:stop]]
            position = stop
        return "".join([*found, pattern.sub(self._placeholder, text[position:])])

    def mark_all(self, value: Any, *, pattern: re.Pattern[str] | None = None) -> Any:
        """A JSON value with placeholders in its strings and keys."""
        if isinstance(value, str):
            return self.mark(value, pattern=pattern)
        if isinstance(value, Mapping):
            return {self.mark_all(k, pattern=pattern): self.mark_all(v, pattern=pattern) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.mark_all(item, pattern=pattern) for item in value)
        return value

    def restore(self, marked: str) -> str:
        return re.sub(PLANE, lambda m: self._quoted[ord(m[0]) - _FIRST], marked) if self._quoted else marked

    def unquoted(self, marked: str) -> tuple[tuple[int, int], ...]:
        """The characters [start, end) of the restored text that are no quotes."""
        found: list[tuple[int, int]] = []
        position = 0
        for part in re.split(f"({PLANE})", marked):
            end = position + len(self.restore(part))
            if part and not re.fullmatch(PLANE, part):
                found.append((position, end))
            position = end
        return tuple(found)

    @property
    def plain_in_json(self) -> bool:
        """Whether JSON escapes no character of the quotes."""
        return all(json.dumps(quoted, ensure_ascii=False)[1:-1] == quoted for quoted in self._quoted)

    def neutral(self, marked: str) -> str:
        """The marked text with an ordinary letter for every quote."""
        return re.sub(PLANE, "x", marked)

    def _placeholder(self, match: re.Match[str]) -> str:
        if match[0] not in self._quoted:
            self._quoted.append(match[0])
        return chr(_FIRST + self._quoted.index(match[0]))


@dataclass(frozen=True)
class Encoded:
    """ids: of the text `whole` (UTF-8). runs: (first character, the tokenizer's encoding) of each stretch encoded by itself."""

    ids: list[int]
    text: str
    runs: tuple[tuple[int, Any], ...]

    @cached_property
    def whole(self) -> bytes:
        return self.text.encode()

    def byte_offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of the text at which each token starts and stops, by the tokenizer's own offsets, [tokens] each."""
        byte_of = byte_offsets(self.text)
        pairs = [(start + base, stop + base) for base, run in self.runs for start, stop in run.offsets]
        spans = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return byte_of[spans[:, 0]], byte_of[spans[:, 1]]


@dataclass(frozen=True)
class _Literal:
    """A special token as a run of its own."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Encoder:
    """One tokenizer, and its tokens that are special where a template writes them and text where they are quoted."""

    def __init__(self, tokenizer: Any, table: TokenBytes, literals: Sequence[str], *, name: str) -> None:
        self._tokenizer = tokenizer
        self._id_of = {literal: index for index, literal in table.added.items()}
        self._literals = sorted(set(literals), key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._literals)) + ")") if self._literals else None
        self._quotable = re.compile("|".join([*map(re.escape, self._literals), PLANE]))
        self._name = name

    def quotes(self) -> Quotes:
        return Quotes(self._quotable)

    def encode(self, marked: str, quotes: Quotes) -> Encoded:
        """The tokenizer's encoding of the whole; with quotes in it, run by run between special tokens, quotes as text.

        Raises DataError when this tokenizer does not encode the text between special tokens by itself.
        """
        text = quotes.restore(marked)
        if text == marked:
            run = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            return Encoded(list(run.ids), text, ((0, run),))
        neutral = quotes.neutral(marked)
        apart = [i for _, run in self._runs(neutral, None) for i in run.ids]
        if apart != encode_text(self._tokenizer, neutral, parse_special=True):
            raise DataError(
                f"{self._name}: the conversation quotes a special token, and this tokenizer does not encode what "
                "stands between special tokens by itself"
            )
        runs = self._runs(marked, quotes)
        return Encoded([i for _, run in runs for i in run.ids], text, tuple(runs))

    def _runs(self, marked: str, quotes: Quotes | None) -> list[tuple[int, Any]]:
        """(first character in the restored text, encoding) of each special token and each stretch between them."""
        found: list[tuple[int, Any]] = []
        position = 0
        for part in self._pattern.split(marked) if self._pattern else [marked]:
            if not part:
                continue
            text = part if quotes is None else quotes.restore(part)
            if part in self._id_of and part in self._literals:
                found.append((position, _Literal([self._id_of[part]], [(0, len(part))])))
            else:
                found.append((position, self._plain.encode(text, add_special_tokens=False)))
            position += len(text)
        return found

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without the tokens that may be quoted: all of them are text to it."""
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        # Renamed, not removed: the ids of added tokens follow from their order. No text holds this noncharacter twice.
        renamed = {literal: f"\uffff\uffff{k}" for k, literal in enumerate(self._literals)}
        for token in described["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        vocab = described["model"]["vocab"]
        if isinstance(vocab, dict):
            described["model"]["vocab"] = {renamed.get(token, token): index for token, index in vocab.items()}
        else:
            described["model"]["vocab"] = [[renamed.get(token, token), score] for token, score in vocab]
        if described["model"].get("unk_token") in renamed:
            described["model"]["unk_token"] = renamed[described["model"]["unk_token"]]
        described["post_processor"] = None  # it names special tokens, and is not asked
        return Tokenizer.from_str(json.dumps(described))
