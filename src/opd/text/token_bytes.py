"""The bytes that each token stands for, read from the tokenizer itself.

Three families write text in three ways: byte-level BPE maps each byte to a printable character, SentencePiece writes a space
as U+2581 and bytes that it has no piece for as <0xAB>, WordPiece marks what continues a word with ##. Which one a tokenizer
is stands in its own description (its decoder); nothing here knows a model's name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from opd.errors import ModelError

Family: TypeAlias = Literal["byte_level", "sentencepiece", "wordpiece"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SPACE = "\u2581"


@dataclass(frozen=True)
class TokenBytes:
    """The text that every id of a vocabulary stands for.

    flat: all tokens' bytes, one after the other; starts [ids + 1]: token i is flat[starts[i]:starts[i + 1]]. control [ids]
    bool: special tokens, whose bytes are their name and never part of a text; unknown [ids] bool: ids that the tokenizer has
    no token for (a model's padded vocabulary), or its model no row. names: the special tokens, by id. dummy_prefix: a text's
    first space is the tokenizer's own, and its decoder takes it away. added: every added token's literal, by id, special
    or not; stripping: those that take the white space beside them.
    """

    family: Family
    flat: np.ndarray
    starts: np.ndarray
    control: np.ndarray
    unknown: np.ndarray
    names: Mapping[int, str]
    added: Mapping[int, str]
    dummy_prefix: bool
    stripping: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def writable(self) -> np.ndarray:
        """Which bytes have a token of their own, [256] bool; a byte-level tokenizer leaves the others out of a text."""
        found = np.zeros(256, dtype=bool)
        single = np.flatnonzero((np.diff(self.starts) == 1) & ~self.control)
        found[self.flat[self.starts[single]]] = True
        return found

    def of(self, token_id: int) -> bytes:
        """One token's bytes; none for an id beyond the vocabulary."""
        if not 0 <= token_id < len(self):
            return b""
        return self.flat[self.starts[token_id] : self.starts[token_id + 1]].tobytes()

    def lengths(self, token_ids: np.ndarray) -> np.ndarray:
        """How many bytes each token has, [tokens] int64; 0 for ids beyond the vocabulary."""
        known = np.minimum(token_ids, len(self) - 1)
        return np.where(token_ids < len(self), self.starts[known + 1] - self.starts[known], 0)

    def join(self, token_ids: np.ndarray) -> np.ndarray:
        """The bytes of a sequence [bytes] uint8."""
        lengths = self.lengths(token_ids)
        ends = np.cumsum(lengths)
        if not len(ends) or not ends[-1]:
            return np.zeros(0, dtype=np.uint8)
        first = self.starts[np.minimum(token_ids, len(self) - 1)]
        # where in `flat` each byte of the result lies: its token's start plus its place within the token
        return self.flat[np.arange(ends[-1]) + np.repeat(first - (ends - lengths), lengths)]


def token_bytes(tokenizer: Any, *, vocab_size: int | None = None) -> TokenBytes:
    """The table of a Hugging Face fast tokenizer, for at least the `vocab_size` ids of its model; ids behind these, which the
    model can neither read nor write, are unknown.

    Raises ModelError when the tokenizer does not say how its tokens are written (no fast tokenizer, another decoder), and when it
    gives one id to two tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__} has no fast implementation, so its tokens' bytes are not known; save the model "
            "with a tokenizer.json (transformers' AutoTokenizer with use_fast=True)"
        )
    described = json.loads(backend.to_str())
    family = _family(described, type(tokenizer).__name__)
    vocab: dict[str, int] = tokenizer.get_vocab()
    _require_distinct(vocab, type(tokenizer).__name__)
    added = {int(t["id"]): t for t in described.get("added_tokens") or ()}
    model = described["model"].get("vocab") or {}
    own = set(model) if isinstance(model, dict) else {token for token, _ in model}
    size = max([vocab_size or 0, *(i + 1 for i in vocab.values())])
    pieces: list[bytes] = [b""] * size
    unknown = np.ones(size, dtype=bool)
    for token, index in vocab.items():
        literal = added.get(index)
        # An added token of the model's own alphabet (Gemma's runs of spaces) is written as the others are.
        plain = literal is None or (family == "sentencepiece" and not literal["special"] and token in own)
        pieces[index] = _piece(token, family) if plain or literal is None else literal["content"].encode()
        unknown[index] = vocab_size is not None and index >= vocab_size
    names = {i: t["content"] for i, t in added.items() if t["special"]}
    control = np.zeros(size, dtype=bool)
    control[list(names)] = True
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
    return TokenBytes(
        family,
        np.frombuffer(b"".join(pieces), dtype=np.uint8),
        starts,
        control,
        unknown,
        names,
        {i: t["content"] for i, t in added.items()},
        _dummy_prefix(described, family),
        frozenset(i for i, t in added.items() if t.get("lstrip") or t.get("rstrip")),
    )


def _require_distinct(vocab: Mapping[str, int], name: str) -> None:
    """Raise ModelError where two tokens have one id: what is sampled could not be told, nor what is read."""
    token_of: dict[int, str] = {}
    for token, index in sorted(vocab.items()):
        if token_of.setdefault(index, token) != token:
            raise ModelError(
                f"tokenizer {name} gives id {index} to {token_of[index]!r} and to {token!r}; a vocabulary with gaps moves added "
                "tokens that it lacks to other ids: list them in model.vocab of tokenizer.json too"
            )


def _family(described: Mapping[str, Any], name: str) -> Family:
    parts = _parts(described.get("decoder"))
    kinds = [part["type"] for part in parts]
    if "ByteLevel" in kinds:
        return "byte_level"
    if "WordPiece" in kinds:
        return "wordpiece"
    if any(_SPACE in (part.get("replacement"), (part.get("pattern") or {}).get("String")) for part in parts):
        return "sentencepiece"
    raise ModelError(
        f"tokenizer {name} decodes with {kinds or 'nothing'}: expected ByteLevel, WordPiece, or a Metaspace or Replace of U+2581 "
        "(SentencePiece), from which its tokens' bytes could be told"
    )


def _dummy_prefix(described: Mapping[str, Any], family: Family) -> bool:
    """Whether decoding takes a space from the front of a text."""
    parts = _parts(described.get("decoder"))
    strips = any(part["type"] == "Strip" and part.get("content") == " " and part.get("start") for part in parts)
    metaspace = any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
    return family == "wordpiece" or strips or metaspace


def _parts(node: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """A component of a tokenizer's description, taken out of its sequences."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        inner = node.get("decoders") or node.get("normalizers") or node.get("pretokenizers") or ()
        return [part for child in inner for part in _parts(child)]
    return [node]


def _piece(token: str, family: Family) -> bytes:
    match family:
        case "byte_level":
            # a character outside the alphabet stands for itself, as the decoder takes it
            if all(c in _BYTE_OF for c in token):
                return bytes(_BYTE_OF[c] for c in token)
            return token.encode()
        case "sentencepiece":
            found = _BYTE_TOKEN.match(token)
            return bytes([int(found[1], 16)]) if found else token.replace(_SPACE, " ").encode()
        case "wordpiece":
            return token[2:].encode() if token.startswith("##") else b" " + token.encode()


def _byte_alphabet() -> dict[str, int]:
    """The characters with which byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + k): b for k, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
