"""Conversations as the student's tokens: its own chat template around its sampled tokens.

Sampled tokens are never rendered or encoded again. Text of others (a prompt, an observation) stays text, even where it looks like
a special token.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from jinja2.exceptions import TemplateError

from opd.errors import DataError
from opd.records import Message, Prompt, Turn
from opd.text.call_template import CallTemplate, call_template, shown_calls
from opd.text.encoding import PLANE, Encoder, Quotes
from opd.text.special_tags import TAGS, thinking_opening
from opd.text.template import TurnEnd, apply_template, template_shows_tools, turn_end, with_tools
from opd.text.tokenizer import TokenBytes, described_token, token_bytes
from opd.text.tool_calls import tools_text

_SAID = ("content", "tool_call_id", "name")  # the text in a message


class Chat:
    """How one tokenizer writes conversations."""

    def __init__(self, tokenizer: Any, *, rows: int | None = None, generation_config: Any = None) -> None:
        """rows: the models have embeddings for the ids below (None: for all). generation_config: of the model; it may name more end
        tokens."""
        self.tokenizer = tokenizer
        self._rows = rows
        self._generation_config = generation_config
        self._templated = bool(getattr(tokenizer, "chat_template", None))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, generation prompt included.

        A tokenizer without a chat template (a base model) gets the messages' texts, joined by blank lines.
        Raises DataError when the template refuses the prompt, and when nothing is left to condition on.
        """
        quotes = self.quotes()
        return self.encode(self.render(prompt, prompt.messages, quotes), quotes, prompt)

    def quotes(self) -> Quotes:
        """Placeholders for text that looks like one of this tokenizer's special tokens."""
        return Quotes(_any_of(self._literals - TAGS))

    def quoted(self, message: Message, quotes: Quotes, *, trusted: bool = True) -> Message:
        """A message with placeholders. Tags of calls and of thinking are real in a message of the student, and in the system
        message of a prompt (`trusted`). From a user, a tool or an environment they are text."""
        own = message["role"] == "assistant" or (trusted and message["role"] == "system")
        if "tool_calls" in message:
            message = shown_calls(self._calls, message, quotes)
        calls = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        pattern = None if own else self._every_literal
        said = {key: quotes.mark(message[key], pattern=pattern) for key in _SAID if key in message}
        return {"role": message["role"], **said, **calls}

    def render(self, prompt: Prompt, messages: Sequence[Message], quotes: Quotes, *, trusted: int | None = None) -> str:
        """The conversation with the generation prompt, quoted special tokens as placeholders; `trusted`: how many of the messages
        are the prompt's (all)."""
        quoted = [self.quoted(m, quotes, trusted=trusted is None or i < trusted) for i, m in enumerate(messages)]
        tools = [quotes.mark_all(tool, pattern=self._every_literal) for tool in prompt.tools]
        if not self._templated:
            return "\n\n".join(m["content"] for m in (with_tools(quoted, tools_text(tools)) if tools else quoted))
        try:
            return self._apply(quoted, tools, generate=True)
        except DataError as error:
            raise DataError(f"prompt '{prompt.id}': {error}") from None

    def _apply(self, messages: Sequence[Message], tools: Sequence[Any], *, generate: bool) -> str:
        try:
            natively = bool(tools) and self._shows_tools
            return apply_template(self.tokenizer, messages, tools, natively=natively, generate=generate)
        except (TemplateError, TypeError) as error:  # TypeError: what an expression in a template runs into
            who = f"the chat template of '{self.tokenizer.name_or_path}'"
            raise DataError(f"{who} refuses {self._refused(messages, tools)}: {error}") from None

    def _refused(self, messages: Sequence[Message], tools: Sequence[Any]) -> str:
        """What a chat template refuses of a conversation."""

        def shown(messages: Sequence[Message]) -> bool:
            try:
                apply_template(self.tokenizer, messages)
            except (TemplateError, TypeError):
                return False
            return True

        if tools and shown(messages):
            return "its tools"
        return "its system message" if messages[0]["role"] == "system" and shown(messages[1:]) else "it"

    @cached_property
    def _calls(self) -> CallTemplate | None:
        """The template as one that writes calls; None where it writes none."""
        return call_template(self._apply, [self.literal(i) for i in self.end.ids]) if self._templated else None

    def encode(self, marked: str, quotes: Quotes, prompt: Prompt, *, opens: bool = True) -> list[int]:
        """The token ids of a rendering, or of text behind it (`opens` False); raises DataError when there are none."""
        alone = not self._templated and opens  # a base model's text begins as its tokenizer begins texts
        if quotes.restore(marked) != marked:
            leading = list(self.tokenizer("").input_ids) if alone else []
            ids = leading + self._encoder.encode(marked, quotes).ids
        else:
            ids = list(self.tokenizer(marked, add_special_tokens=alone).input_ids)
        if not ids:
            raise DataError(f"prompt '{prompt.id}': no tokens after tokenization; expected at least one")
        return self._with_rows(ids, f"prompt '{prompt.id}'")

    def encode_turn(self, text: str, *, record: str = "a turn") -> list[int]:
        """The token ids of a turn that was written for the student, without an end token. record: names it in errors."""
        quotes = self.quotes()
        return self._with_rows(self._encoder.encode(quotes.mark(text), quotes).ids, record)

    def _with_rows(self, ids: list[int], record: str) -> list[int]:
        """The ids; raises DataError naming the first for which the models have no embedding."""
        index = next((i for i in ids if i >= self._rows), None) if self._rows is not None else None
        if index is None:
            return ids
        written = self.literal(index) in str(getattr(self.tokenizer, "chat_template", None) or "")
        what, where = ("the chat template", "template") if written else ("its text", "record")
        raise DataError(
            f"{record}: {what} needs token {described_token(self.tokenizer, index)}, and the models have embeddings for ids below "
            f"{self._rows}; take it out of the {where}, or give the model a row for it (transformers: resize_token_embeddings)"
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, its special tokens (end of turn) left out, but for tags of thinking and of tool calls."""
        if not self._special_tags:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        shown = [i for i in token_ids if i not in self._hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def literal(self, token_id: int) -> str:
        """A special token as a template writes it."""
        return self.tokenizer.convert_ids_to_tokens(token_id)

    @cached_property
    def end(self) -> TurnEnd:
        """The tokens that end a turn. Raises ModelError where there are none."""
        return turn_end(self.tokenizer, self._generation_config, who=f"model '{self.tokenizer.name_or_path}'")

    @cached_property
    def table(self) -> TokenBytes:
        return token_bytes(self.tokenizer)

    @cached_property
    def _literals(self) -> frozenset[str]:
        """Tokens that text cannot produce: special tokens, named or not, and added tokens that the template writes."""
        tokens = list(getattr(self.tokenizer, "added_tokens_decoder", {}).values())
        added, special = {str(token) for token in tokens}, {str(token) for token in tokens if token.special}
        template = getattr(self.tokenizer, "chat_template", None) or ""
        structural = {t for t in added if t.strip() and t in str(template)}
        return frozenset(self.tokenizer.all_special_tokens) | special | structural | (TAGS & added)

    @cached_property
    def _every_literal(self) -> re.Pattern[str]:
        """Any of `_literals`: in text that the student did not write, tags are text too."""
        return _any_of(self._literals)

    @cached_property
    def _hidden(self) -> frozenset[int]:
        """The special tokens that `decode` leaves out."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(special - self._special_tags)

    @cached_property
    def _special_tags(self) -> frozenset[int]:
        """The tags of thinking and of tool calls that this tokenizer has as special tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return frozenset(i for i, token in added.items() if token.special and str(token) in TAGS)

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.table, sorted(self._literals), name="the student")

    @cached_property
    def _shows_tools(self) -> bool:
        return template_shows_tools(self.tokenizer)


def _any_of(literals: Collection[str]) -> re.Pattern[str]:
    """Any of these, the longest first, and the placeholders' own characters."""
    return re.compile("|".join([*map(re.escape, sorted(literals, key=len, reverse=True)), PLANE]))


def user_message(text: str) -> tuple[Message, ...]:
    """A conversation that holds one user message."""
    return ({"role": "user", "content": text},)


@dataclass
class Stretch:
    """Tokens of a conversation up to the point where the template rewrites it. A stretch becomes one rollout.

    before: the messages of its prompt; messages: with those that followed, up to the student's last answer. opened: the thinking
    tag that the template wrote before that answer.
    """

    before: tuple[Message, ...]
    messages: tuple[Message, ...]
    token_ids: list[int]
    logprobs: list[float]
    turns: list[Turn]
    opened: str = ""


@dataclass
class Conversation:
    """A conversation in which the student takes turns, as tokens.

    A template may rewrite an earlier turn (Qwen3 drops its thoughts). Then the next prompt does not continue the tokens that the
    student has seen, and a new stretch begins.
    """

    chat: Chat
    prompt: Prompt
    stretches: list[Stretch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._quotes = self.chat.quotes()
        self._messages: list[Message] = []
        self.open_with(self.prompt.messages)

    def open_with(self, messages: Sequence[Message]) -> None:
        """Add messages before the student's first turn; raises DataError, and keeps the messages and tokens that it has, where
        they cannot be shown."""
        before = list(self._messages)
        self._messages.extend(messages)
        try:
            self._rendering = self.chat.render(
                self.prompt, self._messages, self._quotes, trusted=len(self.prompt.messages)
            )
            self.stretches[:] = [self._stretch()]
        except DataError:
            self._messages[:] = before
            raise

    @property
    def token_ids(self) -> list[int]:
        """The context of the student's next turn."""
        return self.stretches[-1].token_ids

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    def answer(self, token_ids: Sequence[int], logprobs: Sequence[float], ends: frozenset[int]) -> Message:
        """Add a sampled turn of the student; returns its message."""
        stretch = self.stretches[-1]
        ended = len(token_ids) > 0 and token_ids[-1] in ends
        said = token_ids[:-1] if ended else token_ids  # not every tokenizer calls the end of a turn special
        message: Message = MappingProxyType({"role": "assistant", "content": self.chat.decode(said)})
        start = len(stretch.token_ids)
        stretch.token_ids.extend(token_ids)
        stretch.logprobs.extend(logprobs)
        stretch.turns.append(Turn("student", start, start + len(token_ids)))
        self._messages.append(message)
        stretch.messages = tuple(self._messages)
        stretch.opened = thinking_opening(self._rendering).strip()
        closing = self.chat.literal(token_ids[-1]) if ended else ""
        self._seen = _Seen(self._rendering, self._quotes.mark(message["content"]), closing)
        return message

    def observe(self, observations: Sequence[Message]) -> None:
        """Add the environment's messages and open the student's next turn."""
        self._messages.extend(observations)
        self._rendering = self.chat.render(self.prompt, self._messages, self._quotes, trusted=len(self.prompt.messages))
        added = self._seen.continued(self._rendering)
        if added is None:
            self.stretches.append(self._stretch())
            return
        stretch = self.stretches[-1]
        ids = self.chat.encode(added, self._quotes, self.prompt, opens=False) if added else []
        start = len(stretch.token_ids)
        stretch.token_ids.extend(ids)
        stretch.logprobs.extend([0.0] * len(ids))
        stretch.turns.append(Turn("observation", start, start + len(ids)))

    def _stretch(self) -> Stretch:
        """A new stretch. Its prompt is the conversation so far."""
        ids = self.chat.encode(self._rendering, self._quotes, self.prompt)
        messages = tuple(self._messages)
        return Stretch(messages, messages, list(ids), [0.0] * len(ids), [Turn("prompt", 0, len(ids))])

    def prompt_of(self, stretch: Stretch) -> Prompt:
        """The prompt of a stretch, with the turns before it."""
        return replace(self.prompt, messages=stretch.before)


@dataclass(frozen=True)
class _Seen:
    """The last context of the student as text, its answer, and the end token of that answer."""

    rendering: str
    answer: str
    closing: str

    def continued(self, rendering: str) -> str | None:
        """The text that a later rendering adds behind the answer; None where it does not begin with the context and the answer.

        White space around the answer may differ: templates trim it, and the sampled tokens stay.
        """
        if not rendering.startswith(self.rendering):
            return None
        rest = rendering[len(self.rendering) :]
        if rest.startswith(self.answer):
            rest = rest[len(self.answer) :]
        elif rest.lstrip().startswith(self.answer.strip()):
            rest = rest.lstrip()[len(self.answer.strip()) :]
        else:
            return None
        return rest.removeprefix(self.closing)
