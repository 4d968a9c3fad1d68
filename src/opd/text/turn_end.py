"""Where a turn ends: read from the chat template, beside what the tokenizer and the generation config declare."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.errors import ModelError
from opd.text.special_tags import TAGS
from opd.text.template import REFUSALS, Frame, frame_of
from opd.text.tokenizer import end_token_ids


@dataclass(frozen=True)
class TurnEnd:
    """ids: every token that ends a turn, sorted; written: the one that the model's chat template writes behind an answer, or the
    tokenizer's end token where the template writes none; note: how template, tokenizer and generation config disagree, "" where
    they agree."""

    ids: tuple[int, ...]
    written: int
    note: str = ""


def turn_end(tokenizer: Any, generation_config: Any = None, *, who: str) -> TurnEnd:
    """The tokens that end a turn of a model: its template's, its tokenizer's and its generation config's.

    Raises ModelError where the template ends a turn with a text that holds no token of its own, and where nothing ends a turn.
    """
    template = _of_template(tokenizer, who)
    declared = end_token_ids(tokenizer, generation_config)
    ids = tuple(sorted({*declared} if template is None else {*declared, template}))
    if not ids:
        raise ModelError(
            f"{who}: neither its chat template, its tokenizer nor its generation config has an end token, so no response could "
            "end; set eos_token in its tokenizer_config.json"
        )
    own, config = end_token_ids(tokenizer), _declared(generation_config)
    written: int = template if template is not None else own[0] if own else ids[0]
    agree = written in (own or ids) and written in (config or ids)
    return TurnEnd(ids, written, "" if agree else _disagreement(tokenizer, template, config, written))


def _of_template(tokenizer: Any, who: str) -> int | None:
    """The first added token that the template writes behind an answer, or behind one that a question follows; None where it writes
    white space alone, or has no place for an answer."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        frame = frame_of(tokenizer)
    except REFUSALS:
        return None
    if frame is None:
        return None
    added = {str(token): int(i) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    names = sorted((name for name in added if name.strip() and name not in TAGS), key=len, reverse=True)
    found = [piece for piece in _pieces(frame.after, names) or _behind_answer(frame, names) if piece in names]
    if found:
        return added[found[0]]
    if not frame.after.strip():
        return None
    count = len(tokenizer(frame.after.strip(), add_special_tokens=False).input_ids)
    declared = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in end_token_ids(tokenizer)) or "none"
    raise ModelError(
        f"{who}: its chat template ends a turn with {frame.after.strip()!r}, which holds no special or added token "
        f"({count} tokens of text; the tokenizer's end token: {declared}), so no turn could end there; add it to the tokenizer as "
        "one token, or give the model a chat template that ends a turn with its end token"
    )


def _pieces(text: str, names: Sequence[str]) -> list[str]:
    """A text cut at these names, without the white space between."""
    cut = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return [piece.strip() for piece in cut if piece.strip()]


def _behind_answer(frame: Frame, names: Sequence[str]) -> list[str]:
    """What ends an answer of a template that ends it only where a question follows: without what opens every question."""
    between, opening = _pieces(frame.between, names), _pieces(frame.opening, names)
    while between and opening and between[-1] == opening[-1]:
        between.pop()
        opening.pop()
    return between


def _declared(generation_config: Any) -> tuple[int, ...]:
    """The end tokens of a generation config alone."""
    declared = getattr(generation_config, "eos_token_id", None)
    every = declared if isinstance(declared, list | tuple) else [declared]
    return tuple(i for i in every if i is not None)


def _disagreement(tokenizer: Any, template: int | None, config: Sequence[int], written: int) -> str:
    own = tokenizer.eos_token_id
    said = [] if template is None else [f"the chat template ends a turn with {_name(tokenizer, template)}"]
    if own is not None:
        said.append(f"the tokenizer's end token is {_name(tokenizer, own)}")
    if config:
        said.append(f"the generation config names {', '.join(_name(tokenizer, i) for i in config)}")
    return f"{', '.join(said)}: any of them ends a turn, and fine-tuning teaches {_name(tokenizer, written)}"


def _name(tokenizer: Any, index: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(index)!r} (id {index})"
