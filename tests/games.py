"""Games of TextArena for the tests, and students that play them."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from factories import byte_tokenizer
from textarena import Wrapper, make

from opd.config import EpisodesConfig, TextArenaTask
from opd.episodes.player import Demonstrator, EpisodePlayer
from opd.integrations.textarena import TextArena
from opd.records import Message, Prompt, Rollout
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
