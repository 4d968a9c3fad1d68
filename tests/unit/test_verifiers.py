"""Episodes of verifiers' own tasks and environments, played with the student in the seat of their agent."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from factories import byte_tokenizer

from opd.config import EpisodesConfig
from opd.episodes.player import Demonstrator, EpisodePlayer
from opd.records import Message, Prompt, Rollout
from opd.text.chat import Chat

vf: Any = pytest.importorskip("verifiers.v1", reason="verifiers, with its seventy packages, is no dependency of opd")
from opd.integrations.verifiers import VerifiersEpisode, messages_of  # noqa: E402


class Data(vf.TaskData):
    answer: str = "4"


class Sum(vf.Task[Data, vf.State, vf.TaskConfig]):
    """A sum with a weighted reward for the answer, one for its form, and a metric that counts for nothing."""

    @vf.reward(weight=0.75)
    async def right(self, task: Any, trace: Any) -> float:
        return float(trace.last_reply == task.answer)

    @vf.reward(weight=0.25)
    async def short(self, trace: Any) -> float:
        return float(len(trace.last_reply) < 3)

    @vf.metric
    async def turns(self, trace: Any) -> float:
        return trace.num_turns


def sum_task(kind: Any = Sum, **data: Any) -> Any:
    return kind(Data(**({"idx": 7, "prompt": "2 + 2?", "system_prompt": "Be brief."} | data)))


MODULE = """
import verifiers.v1 as vf


class Data(vf.TaskData):
    number: int = 0


class Numbers(vf.Task[Data, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def found(self, task, trace):
        return float(trace.last_reply == str(task.number))


class NumbersTaskset(vf.Taskset[Numbers, vf.TasksetConfig]):
    def load(self):
        for number in (2, 3):
            yield Numbers(Data(name=str(number), number=number, prompt=self.opening), self.config.task)

    opening = {opening}


class NumbersConfig(vf.EnvConfig):
    {seats}


class NumbersEnv(vf.Env[NumbersConfig]):
    async def setup(self, agents):
        self.seen = [agents.player]

    async def run(self, task, agents):
        assert self.seen == [agents.player]
        async with agents.player.interaction(task) as talk:
            said = await talk.turn({first})
            for _ in range(4):
                guess = int(said.last_reply)
                if guess == task.data.number:
                    break
                said = await talk.turn("higher" if guess < task.data.number else "lower")
        talk.trace.record_reward("played", {played})

    async def finalize(self, task, episode):
        [trace] = episode.traces
        trace.record_metric("turns", trace.num_turns)


__all__ = ["NumbersTaskset", "NumbersEnv"]
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], Any]]:
    """The tasks and the environment of a taskset package, as verifiers loads them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[int] = []

    def load(**parts: str) -> tuple[list[Any], Any]:
        made.append(1)
        name = f"numbers_of_{tmp_path.name}_{len(made)}".replace("-", "_").lower()
        source = MODULE
        seats = {
            "opening": "'Guess.'",
            "first": "",
            "played": "0.5",
            "seats": "player: vf.AgentConfig = vf.AgentConfig()",
        }
        for key, text in (seats | parts).items():
            source = source.replace("{" + key + "}", text)
        (tmp_path / f"{name}.py").write_text(source)
        environment = vf.load_environment(vf.resolve_env_config({"taskset": {"id": name}}))
        return list(environment.taskset), environment

    return load


def play(
    make: Callable[[Prompt], Any], turns: Sequence[str], *, messages: Sequence[Message] = (), **limits: Any
) -> Rollout:
    tokenizer = byte_tokenizer()

    def write(item: Prompt, messages: Sequence[Message]) -> str:
        return turns[sum(m["role"] == "assistant" for m in messages)]

    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(**({"step_timeout_s": 60.0} | limits)),
        end_ids=[tokenizer.eos_token_id],
        make_environment=make,
    )
    opening = tuple(messages) or ({"role": "user", "content": "play"},)
    asked = Prompt("p", opening, teacher="t", task="task")
    [found] = player.play([(asked, 0)], Demonstrator(Chat(tokenizer), write).take_turns, version=0)
    return found


@pytest.mark.parametrize(("reply", "reward"), [("4", 1.0), ("5", 0.25), ("It is 4", 0.0), (" 4\n", 1.0)])
def test_a_task_alone_is_one_turn_that_its_rewards_judge(reply: str, reward: float):
    task = sum_task()
    found = play(lambda p: VerifiersEpisode(task), [reply], messages=messages_of(task))
    assert (found.reward, found.finish, found.failure) == (reward, "end", None)
    assert [m["content"] for m in found.messages] == ["Be brief.", "2 + 2?", reply]


def test_the_messages_of_a_task_are_its_system_prompt_and_its_prompt():
    assert messages_of(sum_task()) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2?"},
    ]
    several = [vf.UserMessage(content="a"), vf.AssistantMessage(content="b"), vf.UserMessage(content="c")]
    told = messages_of(sum_task(prompt=several, system_prompt=None))
    assert [(m["role"], m["content"]) for m in told] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert messages_of(sum_task(prompt=None, system_prompt=None)) == []


def test_pictures_are_refused():
    picture = vf.UserMessage(content=[vf.TextContentPart(text="look")])
    with pytest.raises(ValueError, match="more than text, such as images"):
        messages_of(sum_task(prompt=[picture]))


def test_an_environment_talks_with_the_student(load: Callable[..., Any]):
    [_, task], environment = load()
    found = play(lambda p: VerifiersEpisode(task, environment), ["1", "9", "3"], messages=messages_of(task))
    assert [m["content"] for m in found.messages] == ["Guess.", "1", "higher", "9", "lower", "3"]
    assert (found.reward, found.finish, found.failure) == (1.0, "end", None)


def test_an_environment_that_opens_says_so_behind_the_prompt(load: Callable[..., Any]):
    [task, _], environment = load(opening="None", first="'Your guess?'")
    found = play(lambda p: VerifiersEpisode(task, environment), ["2"])
    assert [m["content"] for m in found.messages] == ["play", "Your guess?", "2"]
    assert found.reward == 1.0


def test_what_rewards_see_is_the_conversation(load: Callable[..., Any]):
    [task, _], environment = load()
    traces: list[Any] = []
    finalize = environment.finalize

    async def look(task: Any, episode: Any) -> None:
        await finalize(task, episode)
        traces.extend(episode.traces)

    environment.finalize = look
    play(lambda p: VerifiersEpisode(task, environment), ["1", "2"], messages=messages_of(task))
    [trace] = traces
    assert [(m.role, m.content) for m in trace.messages] == [
        ("user", "Guess."),
        ("assistant", "1"),
        ("user", "higher"),
        ("assistant", "2"),
    ]
    assert [n.sampled for n in trace.nodes] == [False, True, False, True]
    assert trace.metrics == {"turns": 2.0}
    assert trace.ok


def test_an_episode_that_the_recipe_ends_is_worth_nothing_and_leaves_nobody_waiting(load: Callable[..., Any]):
    [task, _], environment = load()
    ended: list[str] = []
    run = environment.run

    async def watch(task: Any, agents: Any) -> None:
        try:
            await run(task, agents)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    environment.run = watch
    found = play(lambda p: VerifiersEpisode(task, environment), ["1", "1"], messages=messages_of(task), max_turns=2)
    assert (found.finish, found.reward) == ("turns", 0.0)
    for _ in range(3000):
        if ended:
            break
        asyncio.run(asyncio.sleep(0.02))
    assert ended == ["cancelled"]


def test_an_environment_that_raises_fails_its_episode(load: Callable[..., Any]):
    [task, _], environment = load()
    found = play(lambda p: VerifiersEpisode(task, environment), ["one"], messages=messages_of(task))
    assert str(found.failure).startswith("the environment raised ValueError: invalid literal for int()")


def test_a_sum_of_rewards_above_one_is_a_failure(load: Callable[..., Any]):
    [task, _], environment = load(played="2.0")
    found = play(lambda p: VerifiersEpisode(task, environment), ["2"], messages=messages_of(task))
    assert "gave the reward 2.5, expected a number in [0, 1]" in str(found.failure)


def test_without_rewards_there_is_no_verdict():
    task = vf.Task(vf.TaskData(prompt="hello"))
    assert play(lambda p: VerifiersEpisode(task), ["hi"]).reward is None


def test_several_agents_in_an_episode_are_refused(load: Callable[..., Any]):
    [task, _], environment = load(
        seats="player: vf.AgentConfig = vf.AgentConfig()\n    other: vf.AgentConfig = vf.AgentConfig()"
    )

    async def run(task: Any, agents: Any) -> None:
        await agents.player.run(task)
        await agents.other.run(task)

    environment.run = run
    found = play(lambda p: VerifiersEpisode(task, environment), ["2"], messages=messages_of(task))
    assert "asks for several agents or attempts in an episode, expected one" in str(found.failure)


def test_an_environment_that_asks_for_nothing_is_a_failure(load: Callable[..., Any]):
    [task, _], environment = load()

    async def run(task: Any, agents: Any) -> None:
        async with agents.player.interaction(task):
            pass

    environment.run = run
    found = play(lambda p: VerifiersEpisode(task, environment), ["2"], messages=messages_of(task))
    assert found.failure == "the environment raised ValueError: the environment was done before the first turn"


class Boxed(Sum):
    NEEDS_CONTAINER = True


class Stopping(Sum):
    @vf.stop
    async def enough(self, trace: vf.Trace) -> bool:
        return True


class Rewriting(Sum):
    @vf.intercept
    async def rewrite(self, response: vf.Response) -> Any:
        return response


class Prepared(Sum):
    async def setup(self, trace: Any, runtime: Any) -> None: ...


class ScoredInside(Sum):
    @vf.reward
    async def files(self, trace: Any, runtime: Any) -> float:
        return 1.0


class Tooled(Sum):
    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return [object()]


@pytest.mark.parametrize(
    ("task", "need"),
    [
        (sum_task(Boxed), "a container"),
        (sum_task(image="python:3.11"), "a container"),
        (sum_task(Tooled), "tools"),
        (sum_task(Stopping), "hooks on turns"),
        (sum_task(Rewriting), "hooks on turns"),
        (sum_task(Prepared), "a runtime that is set up"),
        (sum_task(ScoredInside), "a runtime to score in"),
    ],
)
def test_what_needs_more_than_a_conversation_is_refused(task: Any, need: str):
    with pytest.raises(ValueError, match=f"^task 7 of verifiers needs {need}, which opd does not have$"):
        VerifiersEpisode(task)


def test_a_task_that_the_environment_makes_is_looked_at_too(load: Callable[..., Any]):
    [task, _], environment = load()

    async def run(task: Any, agents: Any) -> None:
        await agents.player.run(sum_task(Boxed))

    environment.run = run
    found = play(lambda p: VerifiersEpisode(task, environment), ["2"], messages=messages_of(task))
    assert "task 7 of verifiers needs a container" in str(found.failure)


def test_tools_of_a_whole_taskset_are_refused(load: Callable[..., Any]):
    [task, _], environment = load()
    environment.taskset.toolsets = lambda config: [object()]
    with pytest.raises(ValueError, match="needs tools"):
        VerifiersEpisode(task, environment)
