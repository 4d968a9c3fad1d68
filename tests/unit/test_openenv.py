"""Episodes of OpenEnv against clients of this file: what the student hears, what it is worth, and that every session is closed."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from factories import byte_tokenizer, prompt
from pydantic import BaseModel

from opd.config import EpisodesConfig
from opd.episodes.player import Demonstrator, Episode, EpisodePlayer, Taken
from opd.integrations.openenv import OpenEnvEpisode, say
from opd.records import Message, Prompt, Rollout
from opd.text.chat import Chat


@dataclasses.dataclass
class Result:
    """As openenv.core.client_types.StepResult."""

    observation: Any
    reward: float | None = None
    done: bool = False


class Client:
    """Guess a number, asynchronously, with 0.25 for every guess but the last."""

    def __init__(self) -> None:
        self.loops = {asyncio.get_running_loop()}
        self.number = 0
        self.closed = 0

    async def reset(self, seed: int = 0) -> Result:
        self.loops.add(asyncio.get_running_loop())
        self.number = seed
        return Result({"hint": f"guess, seed {seed}", "metadata": {"secret": seed}})

    async def step(self, action: dict[str, int]) -> Result:
        self.loops.add(asyncio.get_running_loop())
        guess = action["number"]
        if guess == self.number:
            return Result({"hint": "yes"}, reward=0.5, done=True)
        return Result({"hint": "higher" if guess < self.number else "lower"}, reward=0.25)

    async def close(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        self.closed += 1


class Plain:
    """The same without a loop, as `client.sync()` gives it."""

    def __init__(self) -> None:
        self.inner = Client()

    @property
    def closed(self) -> int:
        return self.inner.closed

    def _run(self, asked: Any) -> Any:
        try:
            asked.send(None)
        except StopIteration as answer:
            return answer.value
        raise AssertionError("waited")

    def reset(self, **kwargs: Any) -> Any:
        return self._run(self.inner.reset(**kwargs))

    def step(self, action: Any) -> Any:
        return self._run(self.inner.step(action))

    def close(self) -> None:
        self._run(self.inner.close())


class Observation(BaseModel):
    """As an observation of openenv.core.env_server."""

    hint: str = ""
    done: bool = False
    reward: float | None = None


class Server(Plain):
    """The environment itself: its observation holds the reward and the end."""

    def reset(self, **kwargs: Any) -> Observation:
        return self._observation(super().reset(**kwargs))

    def step(self, action: Any) -> Observation:
        return self._observation(super().step(action))

    def _observation(self, result: Result) -> Observation:
        return Observation(hint=result.observation["hint"], reward=result.reward, done=result.done)


def number(text: str) -> dict[str, int]:
    return {"number": int(text)}


def play(
    make: Callable[[Prompt], Any],
    turns: Sequence[str] = ("1", "2", "3"),
    *,
    prompts: Sequence[Prompt] | None = None,
    take: Callable[[Sequence[Episode]], list[Taken]] | None = None,
    **limits: Any,
) -> list[Rollout]:
    """An episode a prompt in which the student says `turns` one after the other."""
    tokenizer = byte_tokenizer()

    def write(item: Prompt, messages: Sequence[Message]) -> str:
        return turns[sum(m["role"] == "assistant" for m in messages)]

    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(**({"step_timeout_s": 60.0, "max_turns": 3} | limits)),
        end_ids=[tokenizer.eos_token_id],
        make_environment=make,
    )
    take = take or Demonstrator(Chat(tokenizer), write).take_turns
    return player.play([(p, 0) for p in prompts or [prompt()]], take, version=0)


def guess(made: list[Any], kind: Callable[[], Any] = Client, *, seed: int = 3, **how: Any) -> Callable[[Prompt], Any]:
    """An episode for each prompt; its client is added to `made`."""

    def connect() -> Any:
        made.append(kind())
        return made[-1]

    def make(item: Prompt) -> OpenEnvEpisode:
        return OpenEnvEpisode(connect, reset={"seed": seed}, **({"act": number} | how))

    return make


def closed(made: Sequence[Any]) -> list[int]:
    """How often each client was closed, once the threads of their episodes have ended."""
    deadline = time.monotonic() + 60.0
    while not all(client.closed for client in made) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [client.closed for client in made]


@pytest.mark.parametrize("kind", [Client, Plain, Server])
def test_an_episode_is_played_to_its_end(kind: Callable[[], Any]):
    made: list[Any] = []
    [found] = play(guess(made, kind))
    assert [m["content"] for m in found.messages] == ["hi", "guess, seed 3", "1", "higher", "2", "higher", "3"]
    assert [m["role"] for m in found.messages[3::2]] == ["user", "user"]
    assert (found.reward, found.finish, found.failure) == (1.0, "end", None)
    assert [m["content"] for m in found.prompt.messages] == ["hi", "guess, seed 3"]
    assert closed(made) == [1]


def test_every_episode_has_a_client_of_its_own_in_one_event_loop():
    made: list[Any] = []
    prompts = [prompt(str(i)) for i in range(3)]
    found = play(guess(made), prompts=prompts)
    assert [r.reward for r in found] == [1.0] * 3
    assert closed(made) == [1, 1, 1]
    assert [len(client.loops) for client in made] == [1, 1, 1]
    assert len(set.union(*(client.loops for client in made))) == 3


def test_a_session_is_closed_where_turns_run_out():
    made: list[Any] = []
    [found] = play(guess(made, seed=9), max_turns=2)
    assert (found.finish, found.reward) == ("turns", 0.5)
    assert closed(made) == [1]


def test_a_session_is_closed_where_the_student_is_cut():
    made: list[Any] = []
    [found] = play(guess(made), take=lambda episodes: [Taken([65], [0.0], "length") for _ in episodes])
    assert found.finish == "length"
    assert closed(made) == [1]


class Lost(Client):
    async def step(self, action: dict[str, int]) -> Result:
        raise ConnectionError("lost")


class Silent(Client):
    async def step(self, action: dict[str, int]) -> Result:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "reason"), [(Lost, "raised ConnectionError: lost"), (Silent, "gave no answer in 1 s")]
)
def test_a_server_that_fails_ends_its_own_episode_only(kind: Callable[[], Any], reason: str):
    made: list[Any] = []
    bad, good = guess(made, kind), guess(made)
    prompts = [prompt("bad"), prompt("good")]
    limit = 1.0 if kind is Silent else 60.0  # the other episode keeps it, on a slow machine too
    lost, fine = play(lambda p: (bad if p.id == "bad" else good)(p), prompts=prompts, step_timeout_s=limit)
    assert lost.failure == f"the environment {reason}"
    assert (fine.failure, fine.reward) == (None, 1.0)
    assert closed(made) == [1, 1]


def test_what_is_no_action_is_told_to_the_student_and_the_episode_goes_on():
    [found] = play(guess([]), ["one", "3"])
    assert found.messages[3]["content"] == "error: ValueError: invalid literal for int() with base 10: 'one'"
    assert (found.reward, dict(found.events)) == (0.5, {"invalid_actions": 1})


def test_the_outcome_is_what_the_user_makes_of_the_rewards():
    seen: list[list[float]] = []

    def last(rewards: Sequence[float]) -> float:
        seen.append(list(rewards))
        return rewards[-1]

    [found] = play(guess([], reward=last))
    assert found.reward == 0.5
    assert seen == [[0.25], [0.25, 0.25], [0.25, 0.25, 0.5]]


def test_an_outcome_out_of_range_is_a_failure():
    [found] = play(guess([], reward=lambda rewards: -1.0))
    assert found.failure == "the environment gave the reward -1.0, expected a number in [0, 1] or None"


class Unrewarded(Client):
    async def step(self, action: dict[str, int]) -> Result:
        return Result({"hint": "bye"}, done=True)


def test_without_rewards_there_is_no_verdict():
    [found] = play(guess([], Unrewarded))
    assert (found.reward, found.finish, found.failure) == (None, "end", None)


class Over(Client):
    async def reset(self, seed: int = 0) -> Result:
        return Result({"hint": "over"}, done=True)


def test_an_environment_that_is_over_before_it_begins_is_a_failure():
    made: list[Any] = []
    [found] = play(guess(made, Over))
    assert found.failure == "the environment raised ValueError: the environment was done before the first turn"
    assert closed(made) == [1]


@dataclasses.dataclass
class Board:
    rows: list[str]
    turn: int = 2


@pytest.mark.parametrize(
    ("observation", "text"),
    [
        ({"hint": "lower", "done": False, "reward": 1.0, "metadata": {"secret": 5}}, "lower"),
        ({"hint": "lower", "left": 3}, '{"hint": "lower", "left": 3}'),
        ({"left": 3}, '{"left": 3}'),
        ({"word": "größer", "left": 1}, '{"word": "größer", "left": 1}'),
        ({}, "{}"),
        ("text", "text"),
        (Observation(hint="lower", reward=0.5), "lower"),
        (Board(["ab", "cd"]), '{"rows": ["ab", "cd"], "turn": 2}'),
        (3, "3"),
    ],
)
def test_an_observation_is_said_without_what_only_scores_it(observation: Any, text: str):
    assert say(observation) == text


def test_the_user_may_say_it_otherwise():
    [found] = play(guess([], say=lambda observation: json.dumps(observation["hint"]).upper()), max_turns=2)
    assert found.messages[1]["content"] == '"GUESS, SEED 3"'
    assert found.messages[3]["content"] == '"HIGHER"'


def test_the_package_itself_plays_in_this_process():
    interfaces = pytest.importorskip("openenv.core.env_server.interfaces", reason="openenv is no dependency of opd")
    types = pytest.importorskip("openenv.core.env_server.types")

    class Hint(types.Observation):
        hint: str = ""

    class Numbers(interfaces.Environment):
        closed = 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, **rest: Any) -> Any:
            self.number = seed
            return Hint(hint="guess")

        def step(self, action: Any, timeout_s: float | None = None, **rest: Any) -> Any:
            return Hint(hint="no", reward=float(action == self.number), done=action == self.number)

        @property
        def state(self) -> Any:
            return types.State()

        def close(self) -> None:
            self.closed += 1

    made: list[Any] = []
    [found] = play(guess(made, Numbers, act=int))
    assert [m["content"] for m in found.messages] == ["hi", "guess", "1", "no", "2", "no", "3"]
    assert (found.reward, found.finish) == (1.0, "end")
    assert closed(made) == [1]
