"""Rendering chat templates, the text that they write around an answer, and the tokens that end a turn.

A template may read the clock (`strftime_now`) and draw at random (`random`, `lipsum`). Both are frozen here: every rendering of one
tokenizer sees the moment that `freeze` gave it, and the same draws. It may also read variables of the recipe, such as
`enable_thinking`: those of `set_variables`.
"""

import json
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, meta
from jinja2.defaults import DEFAULT_NAMESPACE
from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

from opd.errors import ModelError
from opd.records import Message
from opd.text.special_tags import TAGS, thinking_opening, without_thinking
from opd.text.tokenizer import described_token, end_token_ids
from opd.text.tool_calls import tools_text

_PROBE, _PROBE_QUESTION = "aXbYcZ", "dXeYfZ"
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}},
}
_QUESTION: Sequence[Message] = ({"role": "user", "content": "?"},)
_SYSTEM: Message = {"role": "system", "content": "?"}  # some templates want one
_MOMENT, _VARIABLES = "_opd_moment", "_opd_variables"
_CLOCK = "strftime_now"
_DRAWS = re.compile(r"\|\s*random\b|\blipsum\b|['\"]random['\"]")
_WORLD = threading.Lock()  # the clock and the generator are those of the process
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a tag of transformers, which marks text alone
# Names that a template gets in any case: a recipe cannot set them.
_GIVEN = frozenset(DEFAULT_NAMESPACE) | {
    "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"
}  # fmt: skip
REFUSALS = (TemplateError, TypeError, ValueError)  # what an expression in a template runs into, too


def freeze(tokenizer: Any, moment: datetime) -> None:
    """From now on the tokenizer's chat template reads this moment as the time."""
    setattr(tokenizer, _MOMENT, moment)


def set_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """From now on the tokenizer's chat template reads these variables."""
    setattr(tokenizer, _VARIABLES, dict(variables))


def variables_of(tokenizer: Any) -> dict[str, Any]:
    """The variables of `set_variables` that the chat template reads, by name."""
    given = getattr(tokenizer, _VARIABLES, {})
    return {name: value for name, value in sorted(given.items()) if name in _names_read(_text_of(tokenizer))}


def require_variables(tokenizer: Any, variables: Mapping[str, Any], *, key: str, source: str) -> None:
    """Raise ModelError for a variable that the chat template of a model, `source`, does not read; key: of the recipe."""
    template = _text_of(tokenizer)
    names = _names_read(template)
    for name in variables:
        if name in _GIVEN:
            raise ModelError(f"{key}.{name}: opd itself gives '{name}' to chat templates; remove the key")
        if name not in names:
            known = ", ".join(sorted(n for n in names if n not in _GIVEN and not n.endswith("_token"))) or "none"
            why = f"does not read it; the template's variables: {known}" if template else "does not exist"
            raise ModelError(
                f"{key}.{name} has no effect, because the chat template of '{source}' {why}; remove the key"
            )


def _text_of(tokenizer: Any) -> str:
    """A chat template, or all that a tokenizer has, one after the other."""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")


@lru_cache
def _names_read(template: str) -> frozenset[str]:
    """The names that a chat template reads and does not set itself; none where it cannot be read, which a rendering then says."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateError:
        return frozenset()
    return frozenset(meta.find_undeclared_variables(parsed))


def clock_of(tokenizer: Any) -> str:
    """The moment that a chat template reads, as text; "" where it reads no clock."""
    moment = getattr(tokenizer, _MOMENT, None)
    return str(moment) if moment is not None and _CLOCK in str(getattr(tokenizer, "chat_template", None)) else ""


def world_of(tokenizer: Any) -> str:
    """What a chat template reads beside conversations: the moment and the variables, as text."""
    clock, variables = clock_of(tokenizer), variables_of(tokenizer)
    return (f" at {clock}" if clock else "") + (f" with {json.dumps(variables)}" if variables else "")


def apply_template(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Any] = (),
    *,
    natively: bool = False,
    generate: bool = True,
) -> str:
    """A conversation as a chat template renders it. Where it does not show tools (`natively`), the system message does."""
    if tools and not natively:
        messages = with_tools(messages, tools_text(tools))
    shown = [dict(tool) for tool in tools] if tools and natively else None
    with _frozen(tokenizer):
        return tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=shown,
            add_generation_prompt=generate,
            tokenize=False,
            **variables_of(tokenizer),
        )


def template_shows_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template writes the tools that it is given."""
    try:
        return _PROBE in apply_template(tokenizer, _QUESTION, [_PROBE_TOOL], natively=True)
    except REFUSALS:
        return _PROBE in apply_template(tokenizer, [_SYSTEM, *_QUESTION], [_PROBE_TOOL], natively=True)


def with_tools(messages: Sequence[Message], text: str) -> list[Message]:
    """The conversation with a text about tools in its system message."""
    first, *rest = messages
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


@contextmanager
def _frozen(tokenizer: Any) -> Iterator[None]:
    """Rendering with the tokenizer's moment for the clock, and the same draws every time."""
    template = str(getattr(tokenizer, "chat_template", None))
    moment = getattr(tokenizer, _MOMENT, None) if _CLOCK in template else None
    if moment is None and not _DRAWS.search(template):
        yield
        return
    with _WORLD:
        # transformers passes no functions to a template: its `strftime_now` asks this name of its module
        clock, state = getattr(chat_template_utils, "datetime"), random.getstate()  # noqa: B009
        if moment is not None:
            setattr(chat_template_utils, "datetime", _Clock(moment))  # noqa: B010
        random.seed(0)
        try:
            yield
        finally:
            setattr(chat_template_utils, "datetime", clock)  # noqa: B010
            random.setstate(state)


@dataclass(frozen=True)
class _Clock:
    """A clock that stands."""

    moment: datetime

    def now(self) -> datetime:
        return self.moment


@dataclass(frozen=True)
class Frame:
    """The text that a template writes around an answer to one question.

    before: the question with the generation prompt; plain: without it; head: all text before the answer, once it is given; after:
    the text behind it; opening, between: the text before a first question, and between an answer and a next question ("" where the
    template refuses these).
    """

    before: str
    plain: str
    head: str
    after: str
    opening: str = ""
    between: str = ""

    @property
    def whole(self) -> str:
        """All of the template's own text."""
        return self.head + self.after + self.before

    @property
    def gap(self) -> str:
        """White space before an answer that is not part of the generation prompt."""
        rest = self.head.removeprefix(self.before) if self.head.startswith(self.before) else ""
        return rest if not rest.strip() else ""

    @property
    def opens(self) -> bool:
        """Whether the generation prompt opens the assistant's turn; a thinking block, open or empty, makes no difference."""
        rest = self.head.removeprefix(self.before) if self.head.startswith(self.before) else None
        if self.before.startswith(self.head.rstrip()):
            return True
        if rest is not None and (self.before != self.plain or not rest.strip()):
            return True
        head, before = without_thinking(self.head), without_thinking(self.before)
        return (head, before) != (self.head, self.before) and before.startswith(head.rstrip())


def frame_of(tokenizer: Any) -> Frame | None:
    """The text that a chat template writes around an answer; None where it shows no answer. Raises one of `REFUSALS` where it
    renders no question and answer."""
    question: Sequence[Message] = _QUESTION
    answer: Message = {"role": "assistant", "content": _PROBE}
    try:
        before = apply_template(tokenizer, question)
    except REFUSALS:
        question = [_SYSTEM, *_QUESTION]
        before = apply_template(tokenizer, question)
    plain = apply_template(tokenizer, question, generate=False)
    whole = apply_template(tokenizer, [*question, answer], generate=False)
    head, found, after = whole.partition(_PROBE)
    return Frame(before, plain, head, after, *_questions(tokenizer, question, answer)) if found else None


def _questions(tokenizer: Any, question: Sequence[Message], answer: Message) -> tuple[str, str]:
    """The text before a first question, and between an answer and a next question."""
    further: Message = {"role": "user", "content": _PROBE_QUESTION}
    try:
        opening = apply_template(tokenizer, [*question[:-1], further], generate=False)
        whole = apply_template(tokenizer, [*question, answer, further], generate=False)
    except REFUSALS:
        return "", ""
    return opening.partition(_PROBE_QUESTION)[0], whole.partition(_PROBE)[2].partition(_PROBE_QUESTION)[0]


def frame_or_none(tokenizer: Any) -> Frame | None:
    """The text that a chat template writes around an answer; None where it shows none, and without a template."""
    try:
        return frame_of(tokenizer)
    except REFUSALS:
        return None


def opened_by(tokenizer: Any) -> str:
    """The thinking tag, and the white space behind it, with which a chat template's generation prompt ends; "" without one."""
    frame = frame_or_none(tokenizer)
    return thinking_opening(frame.before) if frame else ""


def require_generation_prompt(tokenizer: Any, *, who: str) -> Frame:
    """The text around an answer. Raises ModelError when the generation prompt does not open the model's turn."""
    try:
        frame = frame_of(tokenizer)
    except REFUSALS as error:
        raise ModelError(f"{who}: its chat template refuses a question and its answer: {error}") from None
    if frame is None:
        raise ModelError(f"{who}: its chat template does not show an assistant's answer")
    if not frame.opens:
        raise ModelError(
            f"{who}: its chat template has no generation prompt: an answer follows {frame.head[-40:]!r}, but "
            f"add_generation_prompt = true ends with {frame.before[-40:]!r}; give it a template that opens the assistant's turn"
        )
    return frame


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
    own, config = end_token_ids(tokenizer), end_token_ids(None, generation_config)
    written: int = template if template is not None else own[0] if own else ids[0]
    agree = written in (own or ids) and written in (config or ids)
    return TurnEnd(ids, written, "" if agree else _disagreement(tokenizer, template, config, written))


def _of_template(tokenizer: Any, who: str) -> int | None:
    """The first added token that the template writes behind an answer, or behind one that a question follows; None where it writes
    white space alone, or has no place for an answer."""
    frame = frame_or_none(tokenizer)
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
    """The end of an answer that a template writes only before a next question, without the text that opens every question."""
    between, opening = _pieces(frame.between, names), _pieces(frame.opening, names)
    while between and opening and between[-1] == opening[-1]:
        between.pop()
        opening.pop()
    return between


def _disagreement(tokenizer: Any, template: int | None, config: Sequence[int], written: int) -> str:
    own = tokenizer.eos_token_id
    said = [] if template is None else [f"the chat template ends a turn with {described_token(tokenizer, template)}"]
    if own is not None:
        said.append(f"the tokenizer's end token is {described_token(tokenizer, own)}")
    if config:
        said.append(f"the generation config names {', '.join(described_token(tokenizer, i) for i in config)}")
    return f"{', '.join(said)}: any of them ends a turn, and fine-tuning teaches {described_token(tokenizer, written)}"
