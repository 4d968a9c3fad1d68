"""A teacher with the student's vocabulary and another chat template: it reads the sampled tokens behind its own prompt.

Equal ids do not prove equal prompts. The response stays as it was sampled. The teacher's own template renders the conversation
before each turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd.errors import DataError
from opd.records import Message, Prompt, Rollout, Turn, read_only
from opd.text.chat import Chat
from opd.text.encoding import Quotes
from opd.text.special_tags import opens_thinking, thinking_opening
from opd.text.student_text import student_turns
from opd.text.template import frame_or_none, require_generation_prompt, variables_of

_QUESTION: Message = {"role": "user", "content": "?"}
# some templates drop the thoughts of earlier turns
_THOUGHT: Message = {"role": "assistant", "content": "<think>\n...\n</think>\n\n!"}
_FUNCTION = {"name": "f", "description": "", "parameters": {"type": "object"}}
_TOOL: Mapping[str, Any] = {"type": "function", "function": _FUNCTION}
_CONVERSATIONS: Sequence[tuple[Sequence[Message], Sequence[Mapping[str, Any]]]] = (
    ((_QUESTION,), ()),
    (({"role": "system", "content": "!"}, _QUESTION), ()),
    ((_QUESTION, _THOUGHT, _QUESTION), ()),
    ((_QUESTION,), (_TOOL,)),
)


@dataclass(frozen=True)
class Shown:
    """Tokens that a teacher reads: token_ids [tokens] int32; mask [tokens] bool, the actions of the student."""

    token_ids: np.ndarray
    mask: np.ndarray


def as_sampled(rollout: Rollout) -> list[Shown]:
    """A rollout as the student saw it."""
    return [Shown(rollout.token_ids, rollout.loss_mask)]


class OwnPrompt:
    """Shows one teacher the student's turns, each behind the prompt of the teacher's own template."""

    def __init__(self, chat: Chat, student: Chat, *, name: str) -> None:
        """chat: the teacher's; student: the student's. Raises ModelError when the teacher's template has no generation prompt."""
        self._name = name
        self._chat, self._student = chat, student
        frame = frame_or_none(chat.tokenizer)
        if frame is not None and frame.before == frame.plain:
            require_generation_prompt(chat.tokenizer, who=f"teacher '{name}'")
        self._gap = "" if frame is None else frame.gap

    def read(self, rollout: Rollout) -> list[Shown]:
        """The rollout itself where both templates render its conversation alike, else one sequence for each turn.

        The actions of the sequences, in order, are those of the rollout. Raises DataError when the template refuses the
        conversation.
        """
        found, same = [], True
        for turn, answer in student_turns(rollout):
            before, text = rollout.messages[:answer], rollout.messages[answer]["content"]
            trusted = len(rollout.prompt.messages)
            own, quotes = self._render(rollout.prompt, before, trusted)
            theirs, other = _render(self._student, rollout.prompt, before, trusted)
            same = same and own == theirs and quotes.restore(own) == other.restore(theirs)
            found.append(self._behind(self._begun(own, theirs, text), quotes, rollout, turn))
        return as_sampled(rollout) if same else found

    def length(self, prompt: Prompt) -> int:
        """How many tokens the prompt has as this teacher reads it. Raises DataError when its template refuses it."""
        own, quotes = self._render(prompt, prompt.messages, len(prompt.messages))
        return len(self._chat.encode(own + self._gap, quotes, prompt))

    def _render(self, prompt: Prompt, messages: Sequence[Message], trusted: int) -> tuple[str, Quotes]:
        try:
            return _render(self._chat, prompt, messages, trusted)
        except DataError as error:
            raise DataError(f"teacher '{self._name}': {error}") from None

    def _begun(self, own: str, student: str, text: str) -> str:
        """The teacher's prompt. A thinking block is open at its end where one is open for the student, and only one."""
        if opens_thinking(text):
            return own[: len(own) - len(thinking_opening(own))]
        if not thinking_opening(own) and (opening := thinking_opening(student)):
            return own + opening
        gap = self._gap if text and not text.startswith(self._gap) else ""
        return own + gap

    def _behind(self, shown: str, quotes: Quotes, rollout: Rollout, turn: Turn) -> Shown:
        try:
            prompt = self._chat.encode(shown, quotes, rollout.prompt)
        except DataError as error:
            raise DataError(f"teacher '{self._name}': {error}") from None
        response = rollout.token_ids[turn.start : turn.end]
        token_ids = np.concatenate([np.array(prompt, dtype=np.int32), response])
        return Shown(read_only(token_ids), read_only(np.arange(len(token_ids)) >= len(prompt)))


def _render(chat: Chat, prompt: Prompt, messages: Sequence[Message], trusted: int) -> tuple[str, Quotes]:
    quotes = chat.quotes()
    return chat.render(prompt, messages, quotes, trusted=trusted), quotes


@dataclass(frozen=True)
class Renderings:
    """One short conversation as the student's template renders it, and as a teacher's does."""

    student: str
    teacher: str


def same_template(student: Any, teacher: Any) -> bool:
    """Whether two tokenizers have one chat template, with the same variables, and the same special tokens for it to write."""
    ours, theirs = ((t.chat_template or None, dict(t.special_tokens_map), variables_of(t)) for t in (student, teacher))
    return ours == theirs


def different_renderings(student: Any, teacher: Any) -> Renderings | None:
    """The first of a few short conversations that two chat templates render otherwise; None where they render all alike."""
    for messages, tools in _CONVERSATIONS:
        ours, theirs = (_shown(tokenizer, messages, tools) for tokenizer in (student, teacher))
        if ours != theirs:
            return Renderings(ours, theirs)
    return None


def _shown(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    chat = Chat(tokenizer)
    try:
        quotes = chat.quotes()
        asked = Prompt("?", tuple(messages), teacher="", task="", tools=tuple(tools))
        return quotes.restore(chat.render(asked, messages, quotes))
    except DataError as error:
        return f"({error})"
