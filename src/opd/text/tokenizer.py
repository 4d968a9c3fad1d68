"""Facts read from a tokenizer itself, and whether two tokenizers are one."""

import hashlib
import json
from typing import Any

PROBE = "The 3 tokens: naïve café,\n\tdef f(x): return x**2  # 漢字 🙂 12345"


def end_token_ids(tokenizer: Any, generation_config: Any = None) -> tuple[int, ...]:
    """The ids that end the student's turn: the tokenizer's end token and those of the generation config."""
    ids = {tokenizer.eos_token_id}
    declared = getattr(generation_config, "eos_token_id", None)
    ids.update(declared if isinstance(declared, list | tuple) else [declared])
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
    """What tells the teacher's tokenizer from the student's, in words; None when they are one.

    Only what was asked of the tokenizer counts: models of one tokenizer may pad their vocabularies differently.
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
