"""Environments and tools that break every rule there is: each costs its own episode or call, never the run."""

import asyncio
import collections
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from factories import prompt
from games import Scripted, heard, play_scripted, say, take_step, tool_call, tool_environment

from opd.config import EpisodesConfig
from opd.episodes import environment as hosting
from opd.episodes import tools
from opd.episodes.tools import Tool, ToolEnvironment
from opd.errors import DataError, RunError
from opd.records import Prompt
from opd.roles import Step


class Odd:
    """A value that cannot be read."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __bool__(self) -> bool:
        raise RuntimeError("neither")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"events": None}, "a step that cannot be read: TypeError"),
        ({"events": {"moves": math.inf}}, "counted inf of the event 'moves'"),
        ({"reward": Odd()}, "a step that cannot be read: RuntimeError: no number"),
        ({"done": Odd()}, "a step that cannot be read: RuntimeError: neither"),
        ({"reward": math.nan}, "gave the reward nan"),
    ],
)
def test_a_step_that_cannot_be_read_fails_its_episode_alone(fields: dict[str, Any], reason: str):
    def answers(turn: int, text: str) -> Step:
        return Step([{"role": "tool", "content": "x"}], **fields)

    broken, whole = play_scripted(
        lambda p: Scripted(answers if p.id == "p0" else lambda turn, text: say("x", done=True, reward=1.0)),
        prompts=[prompt("p0"), prompt("p1")],
    )
    assert broken.finish == "failed"
    assert reason in (broken.failure or "")
    assert (whole.finish, whole.reward) == ("end", 1.0)


class Leaving(BaseException):
    """No Exception: what catches those lets it through."""


@pytest.mark.parametrize("error", [Leaving, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_an_environment_that_leaves_in_an_unusual_way_fails_its_episode_at_once(error: type[BaseException]):
    def leaves(turn: int, text: str) -> Step:
        raise error

    began = time.monotonic()
    [found] = play_scripted(lambda p: Scripted(leaves))
    assert time.monotonic() - began < 50.0  # its time limit is 60 s
    assert found.finish == "failed"
    assert "raised" in (found.failure or "") or "was cancelled" in (found.failure or "")


def test_a_thousand_messages_are_cut_and_counted():
    [found] = play_scripted(
        lambda p: Scripted(lambda turn, text: Step([{"role": "tool", "content": "x"}] * 1000, done=turn == 2))
    )
    assert found.events["observation_cut"] == 2 * (1000 - hosting._MAX_MESSAGES)


def test_lines_may_end_as_they_do_on_windows():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: say("one\r\ntwo\rthree", done=turn == 2)))
    assert found.messages[-2]["content"] == "one\ntwo\nthree"
    assert "control_characters" not in found.events


def test_a_system_without_room_for_another_environment_says_what_to_lower(monkeypatch: pytest.MonkeyPatch):
    def full() -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(hosting.asyncio, "new_event_loop", full)
    with pytest.raises(RunError, match=r"Too many open files; lower episodes.max_concurrent = 64"):
        play_scripted(lambda p: Scripted(lambda turn, text: say("x")))


def test_an_opening_that_cannot_be_shown_fails_its_episode_alone(monkeypatch: pytest.MonkeyPatch):
    from opd.errors import DataError
    from opd.text.chat import Conversation

    def refuses(self: Conversation, messages: Any) -> None:
        if len(self._messages) + len(messages) > 1:
            raise DataError("the template refuses it")
        plain(self, messages)

    plain = Conversation.open_with
    monkeypatch.setattr(Conversation, "open_with", refuses)
    [found] = play_scripted(
        lambda p: Scripted(lambda turn, text: say("x"), opening=[{"role": "user", "content": "go"}])
    )
    assert found.failure == "the environment gave messages that the student cannot be shown: the template refuses it"
    assert found.response == ""  # it never had a turn


def test_errors_of_tasks_that_an_environment_left_behind_are_not_printed(capfd: pytest.CaptureFixture[str]):
    class Leaky(Scripted):
        async def step(self, message: Any) -> Step:
            async def late() -> None:
                raise RuntimeError("\x1b[31mlate")

            task = asyncio.ensure_future(late())
            await asyncio.sleep(0.01)
            del task
            return Step(done=True)

    play_scripted(lambda p: Leaky(lambda turn, text: Step()))
    time.sleep(0.1)
    import gc

    gc.collect()
    assert "late" not in capfd.readouterr().err


def test_calls_that_hang_share_the_time_of_their_turn(monkeypatch: pytest.MonkeyPatch):
    now, release = [100.0], threading.Event()
    monkeypatch.setattr(tools, "time", SimpleNamespace(monotonic=lambda: now[0]))  # a clock that no slow machine moves

    def hangs(x: int) -> int:
        now[0] += 0.3
        release.wait(60.0)
        return x

    found = take_step(tool_environment(hangs, tool_timeout_s=0.3, step_timeout_s=1.0), tool_call() * 6)
    release.set()
    assert found.events["tool_timeouts"] == 6
    texts = heard(found)
    assert texts[2] == "error: f gave no answer in the time that was left of this turn"
    assert texts[0] == "error: f gave no answer in 0.3 s"
    assert texts[-1] == "error: f was not called: the earlier calls used up the time of this turn"


def test_hanging_tools_are_counted_among_the_threads(monkeypatch: pytest.MonkeyPatch):
    from opd.episodes import player as playing

    release = threading.Event()
    monkeypatch.setattr(playing, "_MAX_HANGING", 0)

    def environment(p: Any) -> Any:
        return tool_environment(lambda x: release.wait(10.0), tool_timeout_s=0.05)

    try:
        with pytest.raises(RunError, match=r"threads of environments and tools do not return"):
            play_scripted(environment, write=lambda p, m: tool_call() * 4 if len(m) == 1 else "done", max_concurrent=1)
    finally:
        release.set()


def test_a_result_that_cannot_be_written_is_the_tools_error():
    circle: list[Any] = []
    circle.append(circle)
    found = take_step(tool_environment(lambda x: circle), tool_call())
    assert heard(found) == ["error: ValueError: Circular reference detected"]
    assert found.events["tool_errors"] == 1


def test_an_async_tool_is_awaited():
    async def later(x: int) -> int:
        await asyncio.sleep(0.01)
        return x + 1

    assert heard(take_step(tool_environment(later), tool_call())) == ["4"]


class Leaves:
    def __float__(self) -> float:
        raise SystemExit(3)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"events": {"n": 10**400}}, "counted 10000"),
        ({"events": {"n": -1}}, "counted -1 of the event 'n'"),
        ({"reward": Leaves()}, "a step that cannot be read: SystemExit: 3"),
    ],
)
def test_counts_and_values_out_of_range_fail_their_episode(fields: dict[str, Any], reason: str):
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(**fields)))
    assert reason in (found.failure or "")


def test_an_events_name_can_be_written():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(done=True, events={"\ud800" + "x" * 100: 1})))
    assert dict(found.events) == {"\ufffd" + "x" * 63: 1}


def test_an_opening_that_cannot_be_read_fails_its_episode():
    class Strange(list[Any]):
        def __len__(self) -> int:
            raise RuntimeError("no length")

    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(), opening=lambda: Strange()))
    assert found.failure == "the environment gave an opening that cannot be read: RuntimeError: no length"
    several = collections.deque([{"role": "user", "content": "go"}])
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(done=True), opening=lambda: several))
    assert found.failure is None


def test_an_environment_that_ends_its_event_loop_fails_its_episode():
    class Ends(Scripted):
        async def step(self, message: Any) -> Step:
            loops.append(asyncio.get_running_loop())
            loops[0].call_later(0, loops[0].stop)
            return say("x")

    def write(item: Prompt, messages: Any) -> str:
        while loops and loops[0].is_running():
            time.sleep(0.01)
        return "turn"

    loops: list[asyncio.AbstractEventLoop] = []
    [found] = play_scripted(lambda p: Ends(lambda turn, text: Step()), write=write)
    assert found.failure == "the environment ended the event loop that it runs in"


def test_an_opening_that_cannot_be_encoded_leaves_a_record():
    """It holds the very characters that stand for a quoted token while a text is encoded."""
    odd = {"role": "user", "content": "<|im_end|> \uffff\uffff0"}
    [found, other] = play_scripted(
        lambda p: Scripted(lambda turn, text: Step(done=True), opening=[odd] if p.id == "p0" else ()),
        prompts=[prompt("p0"), prompt("p1")],
    )
    assert "gave messages that the student cannot be shown" in (found.failure or "")
    assert found.prompt.messages == prompt("p0").messages
    assert dict(found.events) == {"failed": 1}
    assert other.finish == "end"


@pytest.mark.parametrize("count", [0.25, "3", None])
def test_an_event_that_is_no_count_is_named(count: Any):
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(events={"distance": count})))
    assert f"counted {count!r} of the event 'distance', expected a whole number" in (found.failure or "")


def test_a_tool_that_is_none_is_refused_where_it_is_made():
    with pytest.raises(DataError, match="tool 'f': its function is int, expected a callable"):
        Tool("f", "", {"type": "object"}, 3)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(DataError, match="tool 'f': parameters is str, expected a JSON schema"):
        Tool("f", "", "object", print)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(DataError, match="parameters"):
        Tool("f", "", {"type": "nothing"}, print)
    tool = Tool("f", "", {"type": "object"}, print)
    with pytest.raises(DataError, match="'f'"):
        ToolEnvironment([tool, tool], lambda answer: None, EpisodesConfig())
    with pytest.raises(DataError, match=r"limits are dict, expected config.episodes"):
        ToolEnvironment([tool], lambda answer: None, {})  # type: ignore[arg-type]  # what is tested


def test_a_tools_error_is_told_as_it_was_raised():
    assert heard(take_step(tool_environment(lambda x: {}["Paris"]), tool_call())) == ["error: KeyError: 'Paris'"]
