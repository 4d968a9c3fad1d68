"""Environments for the tests: games of TextArena, scripted ones, and tools; students that play them."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any

from factories import byte_tokenizer, prompt
from textarena import Wrapper, make

from opd.config import EpisodesConfig, TextArenaTask
from opd.episodes.player import Demonstrator, EpisodePlayer
from opd.episodes.tools import Tool, ToolEnvironment
from opd.integrations.textarena import TextArena
from opd.records import Message, Prompt, Rollout
from opd.roles import Step
from opd.text.chat import Chat

GUESS, HANOI, MASTERMIND, DRAWING = "GuessTheNumber-v0", "TowerOfHanoi-v0", "Mastermind-v0", "2048-v0"


def config(game: str = GUESS, **changes: Any) -> TextArenaTask:
    fields = {"type": "textarena", "game": game, "teacher": "t", "size": 4, "held_out_size": 2}
    return TextArenaTask.model_validate(fields | changes)


def task(game: str = GUESS, **changes: Any) -> TextArena:
    return TextArena("game", config(game, **changes))


def play(
    played: TextArena,
    prompts: Sequence[Prompt],
    write: Callable[[Prompt, Sequence[Message]], str | None] | None = None,
    **limits: Any,
) -> list[Rollout]:
    """An episode a prompt; the student writes what `write` says, by default the task's own solution."""
    tokenizer = byte_tokenizer()
    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(**({"max_turns": 40} | limits)),
        end_ids=[tokenizer.eos_token_id],
        make_environment=played.environment,
    )
    student = Demonstrator(Chat(tokenizer), write or played.solution)
    return player.play([(p, 0) for p in prompts], student.take_turns, version=0)


def script(*turns: str) -> Callable[[Prompt, Sequence[Message]], str]:
    """A student that writes these turns, and the last of them from then on."""
    return lambda prompt, messages: turns[min(len(messages) // 2, len(turns) - 1)]


def bare(game: str, seed: int) -> Any:
    """The game of a seed as TextArena itself makes it, without wrappers."""
    state = random.getstate()
    found: Any = make(game)
    found.reset(num_players=1, seed=seed)
    random.setstate(state)
    while isinstance(found, Wrapper):
        found = found.env
    return found


class Scripted:
    """An environment made of one function of the turn's number and text."""

    def __init__(self, answer: Callable[[int, str], Any], opening: Any = ()) -> None:
        self.answer = answer
        self.opening = opening
        self.turn = 0

    async def reset(self) -> Sequence[Message]:
        return self.opening() if callable(self.opening) else self.opening

    async def step(self, message: Message) -> Step:
        self.turn += 1
        return self.answer(self.turn, message["content"])


def say(text: str, **rest: Any) -> Step:
    return Step([{"role": "tool", "content": text}], **rest)


def play_scripted(
    make: Callable[[Prompt], Any],
    *,
    prompts: Sequence[Prompt] | None = None,
    write: Callable[[Prompt, Sequence[Message]], str | None] = lambda p, messages: f"turn {len(messages)}",
    **limits: Any,
) -> list[Rollout]:
    tokenizer = byte_tokenizer()
    limits = {"step_timeout_s": 60.0} | limits
    player = EpisodePlayer(
        Chat(tokenizer), EpisodesConfig(**limits), end_ids=[tokenizer.eos_token_id], make_environment=make
    )
    chosen = [prompt()] if prompts is None else list(prompts)
    return player.play([(p, 0) for p in chosen], Demonstrator(Chat(tokenizer), write).take_turns, version=4)


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def tool_environment(function: Any, **limits: Any) -> ToolEnvironment:
    tool = Tool("f", "A function.", SCHEMA, function)
    return ToolEnvironment([tool], lambda text: float(text == "right"), EpisodesConfig(**limits))


def take_step(environment: ToolEnvironment, text: str) -> Step:
    return asyncio.run(environment.step({"role": "assistant", "content": text}))


def tool_call(arguments: str = '{"x": 3}', name: str = "f") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


def heard(found: Step) -> list[str]:
    assert all(m["role"] == "tool" for m in found.observations)
    return [m["content"] for m in found.observations]


def always_echo(prompt: Prompt) -> Scripted:
    """It tells how much it heard, twice; then the episode is over."""
    return Scripted(lambda turn, text: say(f"heard {len(text)}", reward=0.5, done=turn == 3, events={"heard": 1}))
