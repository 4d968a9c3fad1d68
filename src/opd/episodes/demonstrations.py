"""Demonstrated episodes, from which fine-tuning learns: a solution or a recording provides the student's turns."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from opd.episodes.player import Episode, Taken
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.roles import Step
from opd.text.chat import Chat

Solution: TypeAlias = Callable[[Prompt, Sequence[Message]], str | None]
"""The next turn of a perfect student, from the conversation so far; None where it is not known."""


class Demonstrator:
    """Writes the student's turns from a solution, in the tokens of the student's tokenizer."""

    def __init__(self, chat: Chat, solution: Solution) -> None:
        self._chat = chat
        self._solution = solution

    def take_turns(self, episodes: Sequence[Episode]) -> list[Taken]:
        """One turn of each episode, with its end token; raises DataError that names a prompt without an answer."""
        return [self._turn(episode.conversation.prompt, episode.conversation.messages) for episode in episodes]

    def _turn(self, prompt: Prompt, messages: Sequence[Message]) -> Taken:
        text = self._solution(prompt, messages)
        if not text:
            raise DataError(f"prompt '{prompt.id}' has no answer to learn from; add \"answer\" to the record")
        ids = [*self._chat.encode_turn(text, record=f"prompt '{prompt.id}'"), self._chat.end.written]
        return Taken(ids, [0.0] * len(ids), "end")


class Replay:
    """An environment that repeats its messages of a recorded conversation, which begins with a turn of the student."""

    def __init__(self, recorded: Sequence[Message]) -> None:
        self._recorded = list(recorded)
        self._place = 0

    async def reset(self) -> Sequence[Message]:
        return ()

    async def step(self, message: Message) -> Step:
        self._place += 1  # past the student's turn
        first = self._place
        while self._place < len(self._recorded) and self._recorded[self._place]["role"] != "assistant":
            self._place += 1
        return Step(self._recorded[first : self._place], done=self._place == len(self._recorded))


def recorded_turn(recorded: Sequence[Message], num_messages: int) -> str | None:
    """The student's turn that follows the first `num_messages` of a recorded conversation."""
    return recorded[num_messages]["content"] if num_messages < len(recorded) else None
