"""Games of TextArena for one player, each made from the seed of its prompt.

The reward is TextArena's own where it lies in [0, 1]: 1 for a win; for a game that ends otherwise (no turn of the game left, a
second invalid move in a row) the game's partial credit, such as how near the last guess was. A reward below 0 counts as 0. A game
that `episodes.max_turns` ends has no reward of TextArena and gets 0.
"""

import functools
import importlib
import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from opd.config import TextArenaTask, nearest
from opd.data.generated import GeneratedPrompts
from opd.errors import ConfigError, DataError, describe_error
from opd.records import Message, Prompt
from opd.roles import Step
from opd.text.chat import user_message

_NUM_SEEDS = 2**31
# Characters of a turn's end, where the move is. The games' patterns take time quadratic in a run of spaces and block all games.
_MAX_MOVE_CHARS = 4000
_UNFIT = {
    "Bandit": "it rewards a wrong choice by how wrong it is",
    "Klondike": "its reward counts cards, without a bound of 1",
    "Set": "its reward counts points, without a bound of 1",
}


class TextArena(GeneratedPrompts):
    """A task whose prompts are the openings of one game, each from its own seed."""

    _config: TextArenaTask

    def __init__(self, name: str, config: TextArenaTask) -> None:
        super().__init__(name, config)
        self._family = _family(name, config)
        self._require_playable()

    def draw(self, count: int) -> list[Prompt]:
        return [
            self._prompt(seed) for seed in _draw_seeds(random.Random(f"{self._config.game}:{self._config.seed}"), count)
        ]

    def reward(self, prompt: Prompt, response: str) -> float | None:
        """None: the game gives the reward of an episode."""
        return None

    def environment(self, prompt: Prompt) -> "GameEnvironment":
        return GameEnvironment(self._config, prompt.meta["seed"], prompt.messages[0]["content"])

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        solve = _SOLUTIONS.get(self._family)
        return None if solve is None else solve(messages)

    def _prompt(self, seed: int) -> Prompt:
        return Prompt(
            id=f"{self.name}:{seed}",
            messages=user_message(Game(self._config, seed).opening),
            teacher=self._config.teacher,
            task=self.name,
            meta=MappingProxyType({"seed": seed}),
        )

    def _require_playable(self) -> None:
        where = f"tasks.{self.name}.game = '{self._config.game}'"
        before = random.getstate()
        try:
            first, again = Game(self._config, 0), Game(self._config, 0)
        except Exception as error:
            raise DataError(f"{where} cannot be played here: {_explain(error)}") from None
        drew = random.getstate() != before
        random.setstate(before)
        if not first.single_player:
            raise DataError(f"{where} is for more than one player; choose another")
        if drew or first.opening != again.opening:
            raise DataError(f"{where} is not determined by its seed; choose another")


class GameEnvironment:
    """One episode: the game of one seed."""

    def __init__(self, config: TextArenaTask, seed: int, opening: str) -> None:
        self._config = config
        self._seed = seed
        self._opening = opening
        self._game: Game | None = None

    async def reset(self) -> Sequence[Message]:
        """No message: the prompt is the opening of the game."""
        self._game = Game(self._config, self._seed)
        if self._game.opening != self._opening:
            raise ValueError("the game does not open as its prompt does")
        return ()

    async def step(self, message: Message) -> Step:
        assert self._game is not None
        return self._game.play(message["content"])


class Game:
    """One game of TextArena while it is played; `opening` is its text before the first move."""

    def __init__(self, config: TextArenaTask, seed: int) -> None:
        import textarena
        from textarena.envs.registration import ENV_REGISTRY

        spec: Any = ENV_REGISTRY[config.game]
        if isinstance(entry := spec.entry_point, str):
            _import_game(entry.partition(":")[0])
        self._numbers = random.Random(seed)
        with self._own_numbers():
            self._wrapped = textarena.make(config.game, **config.params)
            self._wrapped.reset(num_players=1, seed=seed)
        self._bare: Any = self._wrapped
        while isinstance(self._bare, textarena.Wrapper):
            self._bare = self._bare.env
        self._own_type = textarena.ObservationType.PLAYER_ACTION
        self.single_player = isinstance(self._bare.state, textarena.SinglePlayerState)
        self.opening = self._new_text()

    def play(self, text: str) -> Step:
        """The game's answer to a turn; errors of TextArena pass through."""
        state = self._bare.state
        errors = state.error_count
        move = text[-_MAX_MOVE_CHARS:]
        with self._own_numbers():
            done, _ = self._wrapped.step(move)
        invalid = state.error_count > errors or bool(state.game_info[0]["invalid_move"])
        events = {"invalid_moves": int(invalid), "moves_cut": int(len(move) < len(text))}
        if done:
            return Step(reward=_reward(state.rewards), done=True, events=events)
        return Step(user_message(self._new_text()), events=events)

    def _new_text(self) -> str:
        """The new text of the game, without the student's own."""
        _, said = self._bare.get_observation()
        # Three games of 0.7.4 pass the arguments of what the student said in the wrong order: its text is then no string.
        texts = [text for _, text, kind in said if kind != self._own_type and isinstance(text, str)]
        return "\n".join(text.strip("\n") for text in texts)

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        token = _numbers.set(self._numbers)
        try:
            yield
        finally:
            _numbers.reset(token)


_numbers: ContextVar[Any] = ContextVar("_numbers", default=random)


class _RandomOfTheGame:
    """The `random` of TextArena's modules: the generator of the current game, and Python's own between games.

    TextArena seeds Python's global generator and draws from it. Without this, games that are played at the same time would change
    each other, and all other users of `random`.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(_numbers.get() if hasattr(random.Random, name) else random, name)


_RANDOM = _RandomOfTheGame()


@functools.cache
def _import_game(home: str) -> None:
    importlib.import_module(home)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "textarena" and vars(module).get("random") is random:
            vars(module)["random"] = _RANDOM


def _family(name: str, config: TextArenaTask) -> str:
    """The name of the game without its variant; raises for an unknown game, one that gives no usable reward, and no TextArena."""
    if importlib.util.find_spec("textarena") is None:
        raise ConfigError(
            f"tasks.{name}.type = 'textarena' needs a package that is not installed: pip install 'opd[textarena]'"
        )
    from textarena.envs.registration import ENV_REGISTRY

    if config.game not in ENV_REGISTRY:
        hint = nearest(config.game, list(ENV_REGISTRY))
        raise DataError(f"tasks.{name}.game = '{config.game}' is no game of TextArena{hint}")
    family = config.game.partition("-v")[0]
    if family in _UNFIT:
        raise DataError(f"tasks.{name}.game = '{config.game}' gives no reward to learn from: {_UNFIT[family]}")
    return family


def _draw_seeds(draw: random.Random, count: int) -> list[int]:
    """Distinct seeds; a larger count keeps the first ones."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[draw.randrange(_NUM_SEEDS)] = None
    return list(found)


def _explain(error: Exception) -> str:
    resource = re.search(r"nltk\.download\('(\w+)'\)", str(error))
    if resource is not None:
        return f"it needs data that is not installed: python -m nltk.downloader {resource[1]}"
    return describe_error(error)


def _reward(rewards: Mapping[int, Any] | None) -> float | None:
    reward = (rewards or {}).get(0)
    if isinstance(reward, str):  # some games of 0.7.4 pass the reward of a loss and its reason in the wrong order
        return 0.0
    return None if reward is None else max(0.0, float(reward))


def _bisect(messages: Sequence[Message]) -> str | None:
    """The middle of the range that the hints leave."""
    limits = re.search(r"between (\d+) and (\d+)", messages[0]["content"])
    if limits is None:
        return None
    low, high = int(limits[1]), int(limits[2])
    guess = None
    for message in messages[1:]:
        if message["role"] == "assistant":
            guess = re.search(r"\[(\d+)\]", message["content"])
        elif guess is not None and "number is lower" in message["content"]:
            high = min(high, int(guess[1]) - 1)
        elif guess is not None and "number is higher" in message["content"]:
            low = max(low, int(guess[1]) + 1)
    return f"[{(low + high) // 2}]"


def _move_disk(messages: Sequence[Message]) -> str | None:
    """The first move of the shortest solution, to tower C."""
    boards = [
        re.findall(r"^([ABC]): \[([\d, ]*)\]", m["content"], re.MULTILINE) for m in messages if m["role"] == "user"
    ]
    seen = [board for board in boards if board]
    if not seen:
        return None
    place = {int(disk): tower for tower, disks in seen[-1][-3:] for disk in disks.split(",") if disk}
    move, goal = None, "C"
    for disk in sorted(place, reverse=True):
        if place[disk] != goal:  # the smaller disks move out of its way first
            move = f"[{place[disk]} {goal}]"
            goal = ({"A", "B", "C"} - {place[disk], goal}).pop()
    return move


_SOLUTIONS: Mapping[str, Callable[[Sequence[Message]], str | None]] = {
    "GuessTheNumber": _bisect,
    "TowerOfHanoi": _move_disk,
}
