"""Facts of a tokenizer: the bytes of its tokens, its end tokens, and the tokens that its vocabulary shares with another one.

Three families write text in three ways: byte-level BPE maps each byte to a printable character, SentencePiece writes a space
as U+2581 and bytes that it has no piece for as <0xAB>, WordPiece marks what continues a word with ##. The tokenizer's own
description (its decoder) tells the family; nothing here knows a model's name.

Shared vocabulary: a token that both vocabularies have is a cell. A token of one side alone lies in the cell of its longest
beginning that both have: a teacher's "the" counts for the "th" with which a student without it starts that word. A tag that
both have is a cell, and so is ending the turn; other tokens without text lie in the last cell.
"""

import hashlib
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
    """The bytes of every id of a vocabulary.

    flat: the bytes of all tokens, joined; starts [ids + 1]: token i is flat[starts[i]:starts[i + 1]]. control [ids] bool: special
    tokens; their bytes are their name, and never part of a text. unknown [ids] bool: ids without a token (a padded vocabulary), or
    without a row in the model. names: the special tokens, by id. added: all added tokens, by id. dummy_prefix: the tokenizer adds
    a space before a text, and its decoder removes it. stripping: the added tokens that take the white space beside them.
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
    """The table of a Hugging Face fast tokenizer, for at least the `vocab_size` ids of its model. Larger ids, which the model can
    neither read nor write, are unknown.

    Raises ModelError for a slow tokenizer, for an unknown decoder, and when the tokenizer gives one id to two tokens.
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
    """Raise ModelError where two tokens have one id: its text would be ambiguous."""
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


PROBE = "The 3 tokens: naïve café,\n\tdef f(x): return x**2  # 漢字 🙂 12345"


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """The ids that end a turn, sorted: the tokenizer's end token and those of the generation config."""
    declared = getattr(generation_config, "eos_token_id", None)
    ids = {getattr(tokenizer, "eos_token_id", None), *(declared if isinstance(declared, list | tuple) else [declared])}
    return tuple(sorted(i for i in ids if i is not None))


def described_token(tokenizer: Any, index: int) -> str:
    """A token's text and id, as an error names it."""
    return f"{tokenizer.convert_ids_to_tokens(int(index))!r} (id {int(index)})"


def ids_without_rows(tokenizer: Any, rows: int) -> list[int]:
    """The ids of a tokenizer for which a model of so many rows has none, in order; an image token, say, of a text model."""
    return sorted(i for i in tokenizer.get_vocab().values() if i >= rows)


def encode_text(tokenizer: Any, text: str, *, parse_special: bool) -> list[int]:
    """A fast tokenizer's ids of a text, nothing added; without `parse_special` a special token in it is text that looks so."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = not parse_special
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    finally:
        backend.encode_special_tokens = before


def fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, of how a probe text is cut, and of the chat template; equal for copies of one tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    content = json.dumps([sorted(tokenizer.get_vocab().items()), _probe_ids(tokenizer), template])
    return hashlib.sha256(content.encode()).hexdigest()


def difference(student: Any, teacher: Any) -> str | None:
    """How the teacher's tokenizer differs from the student's, in words; None when they are equal.

    The models' sizes do not count: models of one tokenizer may pad their vocabularies differently.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        missing = sorted((i, t) for t, i in ours.items() if theirs.get(t) != i)
        extra = sorted((i, t) for t, i in theirs.items() if ours.get(t) != i)
        index, token = (missing or extra)[0]
        return (
            f"{len(ours)} tokens against {len(theirs)}, {len(missing)} of the student's under another id or absent; "
            f"first: id {index} is "
            f"{token!r} for the {'student' if missing else 'teacher'} and "
            f"{_token_of(theirs if missing else ours, index)} for the {'teacher' if missing else 'student'}"
        )
    if _probe_ids(student) != _probe_ids(teacher):
        return "the vocabularies are equal but a probe text is cut differently (merges, normaliser or pre-tokenizer)"
    return None


def _probe_ids(tokenizer: Any) -> list[int]:
    return list(tokenizer(PROBE, add_special_tokens=False).input_ids)


def _token_of(vocab: dict[str, int], index: int) -> str:
    return next((repr(token) for token, i in vocab.items() if i == index), "absent")


@dataclass(frozen=True)
class SharedVocabulary:
    """student [ids], teacher [teacher ids]: the cell of each id, int64. The last of `num` cells holds ids without a cell of their
    own, the one before it the end tokens. student_whole, teacher_whole: whether the id is the token of its cell, not a longer one.
    """

    student: np.ndarray
    teacher: np.ndarray
    num: int
    student_whole: np.ndarray
    teacher_whole: np.ndarray

    def same(self, student_ids: np.ndarray, teacher_ids: np.ndarray) -> np.ndarray:
        """The pairs that are the same token on both sides, [pairs] bool."""
        whole = self.student_whole[student_ids] & self.teacher_whole[teacher_ids]
        return whole & (self.student[student_ids] == self.teacher[teacher_ids])


def shared_vocabulary(
    student: TokenBytes,
    student_ends: Sequence[int],
    teacher: TokenBytes,
    teacher_ends: Sequence[int],
    tags: Mapping[int, str] | None = None,
) -> SharedVocabulary:
    """The cells of two vocabularies. `.._ends`: the ids that end a turn; `tags`: the student's tags and the teacher's names of them
    (`opd.text.special_tags.counterparts`)."""
    id_of = {literal: index for index, literal in teacher.added.items()}
    pairs = [(ours, id_of[literal]) for ours, literal in (tags or {}).items()]
    apart = ([*student_ends, *(ours for ours, _ in pairs)], [*teacher_ends, *(theirs for _, theirs in pairs)])
    sides = ((student, student_ends), (teacher, teacher_ends))
    spelled = [_spelled(table, ids) for (table, _), ids in zip(sides, apart, strict=True)]
    both = sorted(set(spelled[0].values()) & set(spelled[1].values()))
    number = {raw: cell for cell, raw in enumerate(both)}
    tag_cell = {theirs: len(number) + k for k, theirs in enumerate(dict.fromkeys(theirs for _, theirs in pairs))}
    end = len(number) + len(tag_cell)
    none = end + 1
    cells, whole = [], []
    tagged = ({ours: tag_cell[theirs] for ours, theirs in pairs}, tag_cell)
    for (table, ends), mine, tags_here in zip(sides, spelled, tagged, strict=True):
        found = np.full(len(table), none, dtype=np.int64)
        for index, raw in mine.items():
            found[index] = _longest(raw, number, none)
        for index, cell in tags_here.items():
            found[index] = cell
        found[list(ends)] = end
        cells.append(found)
        plain = np.array([mine.get(i) in number for i in range(len(table))])
        whole.append(plain | ((found >= len(number)) & (found <= end)))
    return SharedVocabulary(cells[0], cells[1], none + 1, whole[0], whole[1])


def _spelled(table: TokenBytes, others: Sequence[int]) -> dict[int, bytes]:
    """The bytes of every id that writes text; `others` do not."""
    apart = table.control | table.unknown | np.isin(np.arange(len(table)), list(others))
    return {i: raw for i in np.flatnonzero(~apart).tolist() if (raw := table.of(i))}


def _longest(raw: bytes, number: Mapping[bytes, int], none: int) -> int:
    """The cell of the longest beginning that has one."""
    for stop in range(len(raw), 0, -1):
        if raw[:stop] in number:
            return number[raw[:stop]]
    return none
