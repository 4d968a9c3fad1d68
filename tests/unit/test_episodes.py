"""Episodes with environments: in order, bounded, and never the end of a run."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from factories import byte_tokenizer, prompt
from games import Scripted, play_scripted, say

from opd.config import EpisodesConfig
from opd.episodes import player as playing
from opd.episodes.player import Demonstrator, EpisodePlayer, Replay, Taken, recorded_turn
from opd.errors import DataError, RunError
from opd.records import Message
from opd.rewards.judge import Judge
from opd.roles import Step
from opd.text.chat import Chat


def test_an_episode_of_three_turns():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: say(f"saw {text}", reward=turn / 4, done=turn == 3)))
    assert [t.author for t in found.turns] == ["prompt", "student", "observation", "student", "observation", "student"]
    assert [m["content"] for m in found.messages] == ["hi", "turn 1", "saw turn 1", "turn 3", "saw turn 3", "turn 5"]
    assert (found.reward, found.finish, found.policy_version) == (0.75, "end", 4)
    decode = byte_tokenizer().decode
    for turn in found.turns:
        assert found.loss_mask[turn.start : turn.end].tolist() == [turn.author == "student"] * (turn.end - turn.start)
    students = [decode(found.token_ids[t.start : t.end]) for t in found.turns if t.author == "student"]
    assert students == ["turn 1<|im_end|>", "turn 3<|im_end|>", "turn 5<|im_end|>"]


def test_without_an_environment_one_turn_is_all():
    [found] = play_scripted(lambda p: None)
    assert [t.author for t in found.turns] == ["prompt", "student"]
    assert (found.reward, found.finish, found.failure) == (None, "end", None)


def test_turns_are_limited_and_an_unfinished_episode_is_worth_nothing():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: say("go on")), max_turns=3)
    assert (found.finish, found.reward) == ("turns", 0.0)
    assert sum(t.author == "student" for t in found.turns) == 3
    assert found.turns[-1].author == "student"


def test_a_reward_given_before_the_limit_stands():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: say("go on", reward=0.5)), max_turns=2)
    assert (found.finish, found.reward) == ("turns", 0.5)


def test_what_opens_an_episode_belongs_to_its_prompt():
    opening = [{"role": "user", "content": "the game begins"}]
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: Step(done=True), opening))
    assert [m["content"] for m in found.prompt.messages] == ["hi", "the game begins"]
    assert [t.author for t in found.turns] == ["prompt", "student"]


def holds_soon(condition: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Whether a condition holds within a limit that a slow machine keeps."""
    end = time.monotonic() + limit_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def raising(turn: int, text: str) -> Step:
    raise KeyError("lost \x1b[31m" + "x" * 1000)


def hanging(turn: int, text: str) -> Step:
    time.sleep(3.0)
    return Step(done=True)


class Waiting(Scripted):
    async def step(self, message: Message) -> Step:
        await asyncio.sleep(3.0)
        return Step(done=True)


BAD = {
    "raises": (lambda p: Scripted(raising), "raised KeyError: 'lost"),
    "hangs in code": (lambda p: Scripted(hanging), "gave no answer in 1 s"),
    "hangs in a wait": (lambda p: Waiting(raising), "gave no answer in 1 s"),
    "times out by itself": (
        lambda p: Scripted(lambda t, x: (_ for _ in ()).throw(TimeoutError())),
        "raised TimeoutError",
    ),
    "opens badly": (lambda p: Scripted(raising, lambda: 1 / 0), "raised ZeroDivisionError"),
    "cannot be made": (lambda p: 1 / 0, "could not be made: it raised ZeroDivisionError"),
    "no step": (lambda p: Scripted(lambda t, x: None), "gave NoneType for a step"),
    "no messages": (lambda p: Scripted(lambda t, x: Step("text")), "gave str for observations"),
    "no message": (lambda p: Scripted(lambda t, x: Step([{"role": "tool"}])), "gave an observation that is no message"),
    "the student's role": (
        lambda p: Scripted(lambda t, x: Step([{"role": "assistant", "content": "me"}])),
        "gave an observation that is no message with role",
    ),
    "a reward beyond": (lambda p: Scripted(lambda t, x: Step(reward=2.0, done=True)), "gave the reward 2.0, expected"),
    "no number": (
        lambda p: Scripted(lambda t, x: Step(reward="lots", done=True)),
        "gave the reward 'lots' (str), expected",
    ),  # type: ignore[arg-type]  # what is tested
    "not a number": (lambda p: Scripted(lambda t, x: Step(reward=float("nan"), done=True)), "gave the reward nan"),
    "exits": (lambda p: Scripted(lambda t, x: (_ for _ in ()).throw(SystemExit(3))), "raised SystemExit: 3"),
}


@pytest.mark.parametrize("how", BAD)
def test_an_environment_that_fails_is_data_with_a_reason(how: str):
    make, reason = BAD[how]
    good = Scripted(lambda turn, text: Step(reward=1.0, done=True))
    prompts = [prompt("bad"), prompt("good")]
    limit = 1.0 if "hangs" in how else 60.0  # the other episode keeps it, on a slow machine too
    bad, fine = play_scripted(lambda p: make(p) if p.id == "bad" else good, prompts=prompts, step_timeout_s=limit)
    assert bad.finish == "failed"
    assert bad.failure is not None
    assert bad.failure.startswith(f"the environment {reason}")
    assert len(bad.failure) < 300
    assert "\x1b" not in bad.failure
    assert bad.reward is None
    assert bad.events["failed"] == 1
    assert (fine.failure, fine.reward) == (None, 1.0)


def test_a_hanging_environment_holds_up_nobody_beyond_its_limit():
    began = time.monotonic()
    rollouts = play_scripted(
        lambda p: Scripted(hanging), prompts=[prompt(f"p{i}") for i in range(40)], step_timeout_s=0.5
    )
    assert time.monotonic() - began < 10.0  # one after the other would take 20 s
    assert all(r.finish == "failed" for r in rollouts)


def test_too_many_hanging_environments_stop_the_run_with_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(playing, "_MAX_HANGING", 2)
    with pytest.raises(RunError, match="threads of environments and tools do not return"):
        play_scripted(
            lambda p: Scripted(hanging),
            prompts=[prompt(f"p{i}") for i in range(6)],
            step_timeout_s=0.1,
            max_concurrent=1,
        )


def test_a_bounded_number_of_environments_lives_at_once():
    living: list[int] = []
    lock = threading.Lock()
    now = 0

    class Counted(Scripted):
        def __init__(self) -> None:
            nonlocal now
            super().__init__(self.finish)
            with lock:
                now += 1
                living.append(now)

        def finish(self, turn: int, text: str) -> Step:
            nonlocal now
            with lock:
                now -= 1
            return Step(done=True)

    play_scripted(lambda p: Counted(), prompts=[prompt(f"p{i}") for i in range(10)], max_concurrent=3)
    assert len(living) == 10
    assert max(living) == 3


def test_environments_are_asked_at_the_same_time():
    barrier = threading.Barrier(4, timeout=30.0)

    def meet(turn: int, text: str) -> Step:
        barrier.wait()  # only passes when all four are here at once
        return Step(reward=1.0, done=True)

    rollouts = play_scripted(lambda p: Scripted(meet), prompts=[prompt(f"p{i}") for i in range(4)])
    assert [r.reward for r in rollouts] == [1.0] * 4


def test_what_an_environment_says_is_cut_and_cleaned_and_counted():
    megabytes = "\x1b[2J\u202e\ud800" + "x" * 3_000_000
    [found] = play_scripted(
        lambda p: Scripted(lambda turn, text: say(megabytes, done=turn == 2)), max_observation_chars=50
    )
    observed = found.messages[2]["content"]
    assert observed.startswith("\ufffd[2J\ufffd\ufffdxxx")
    assert observed.endswith(f"[{len(megabytes) - 50} more characters cut]")
    assert dict(found.events) == {"observation_cut": 2, "control_characters": 2}


def test_events_of_an_environment_are_added_up():
    [found] = play_scripted(lambda p: Scripted(lambda turn, text: say("x", done=turn == 3, events={"moves": 2})))
    assert dict(found.events) == {"moves": 6}


def test_an_episode_split_by_its_template_is_trained_on_once():
    from test_conversation import FORGETFUL

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(),
        end_ids=[tokenizer.eos_token_id],
        make_environment=lambda p: Scripted(lambda turn, text: say("ok", reward=1.0, done=turn == 3)),
    )
    written = ["<think>a</think>one", "two", "three"]
    rollouts = player.play(
        [(prompt(), 2)], Demonstrator(Chat(tokenizer), lambda p, m: written[len(m) // 2]).take_turns, version=0
    )
    assert [r.id for r in rollouts] == ["p0/2", "p0/2.1"]
    assert [r.part for r in rollouts] == [0, 1]
    texts = [
        "".join(tokenizer.decode(r.token_ids[t.start : t.end]) for t in r.turns if t.author == "student")
        for r in rollouts
    ]
    assert texts == ["<think>a</think>one<|im_end|>", "two<|im_end|>three<|im_end|>"]
    assert [r.reward for r in rollouts] == [1.0, 1.0]
    assert [dict(r.events) for r in rollouts] == [{"rewritten": 1}, {}]
    assert [r.response for r in rollouts] == ["<think>a</think>one", "three"]
    judged = Judge(lambda p, response: float(response == "three"), own=["task"])(rollouts)
    assert [r.reward for r in judged] == [1.0, 1.0]


def test_a_cut_turn_ends_the_episode_without_asking_the_environment():
    asked: list[str] = []
    tokenizer = byte_tokenizer()
    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(),
        end_ids=[tokenizer.eos_token_id],
        make_environment=lambda p: Scripted(lambda turn, text: asked.append(text)),
    )
    [found] = player.play([(prompt(), 0)], lambda e: [Taken([97, 98], [-1.0, -2.0], "length")] * len(e), version=0)
    assert (found.finish, found.reward, asked) == ("length", 0.0, [])
    assert found.truncated
    assert found.rollout_logprobs[found.loss_mask].tolist() == [-1.0, -2.0]


def test_an_episode_without_room_keeps_the_turns_it_had():
    tokenizer = byte_tokenizer()
    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(),
        end_ids=[tokenizer.eos_token_id],
        make_environment=lambda p: Scripted(lambda turn, text: say("more")),
    )
    turns = [Taken([97, tokenizer.eos_token_id], [-1.0, -2.0], "end"), Taken([], [], "context")]
    [found] = player.play([(prompt(), 0)], lambda e: [turns[e[0].turn]], version=0)
    assert (found.finish, found.reward) == ("context", 0.0)
    assert [t.author for t in found.turns] == ["prompt", "student"]
    assert len(found.token_ids) == found.turns[-1].end


def test_a_demonstration_without_an_answer_names_the_prompt():
    with pytest.raises(DataError, match="prompt 'p0' has no answer to learn from"):
        play_scripted(lambda p: None, write=lambda p, messages: None)


def test_a_recorded_conversation_is_played_again():
    recorded = [
        {"role": "assistant", "content": "first"},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "last"},
    ]
    [found] = play_scripted(
        lambda p: Replay(recorded), write=lambda p, m: recorded_turn(recorded, len(m) - len(p.messages))
    )
    assert [dict(m) for m in found.messages[1:]] == recorded
    assert np.count_nonzero(found.loss_mask) == len("first") + len("last") + 2


def test_threads_of_environments_end_with_their_episodes():
    before = threading.active_count()
    play_scripted(lambda p: Scripted(lambda turn, text: Step(done=True)), prompts=[prompt(f"p{i}") for i in range(20)])
    assert holds_soon(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("kind", ["async", "plain", "raises"])
def test_an_environment_that_can_be_closed_is_closed_when_its_episode_is_over(kind: str):
    closed: list[str] = []

    class Closing(Scripted):
        def close(self) -> Any:
            closed.append(kind)
            if kind == "raises":
                raise OSError("gone")
            return asyncio.sleep(0) if kind == "async" else None

    play_scripted(lambda p: Closing(lambda turn, text: Step(done=True)))
    assert holds_soon(lambda: closed == [kind])


def test_a_template_that_refuses_an_observation_fails_that_episode_alone():
    tokenizer = byte_tokenizer()
    strict = "{% if messages[-1]['content'] == 'no' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    tokenizer.chat_template = strict + str(tokenizer.chat_template)
    player = EpisodePlayer(
        Chat(tokenizer),
        EpisodesConfig(),
        end_ids=[tokenizer.eos_token_id],
        make_environment=lambda p: Scripted(lambda turn, text: say(p.id, reward=1.0, done=turn == 2)),
    )
    scripted = Demonstrator(Chat(tokenizer), lambda p, m: "turn").take_turns
    refused, fine = player.play([(prompt("no"), 0), (prompt("yes"), 0)], scripted, version=0)
    assert refused.failure is not None
    assert "gave messages that the student cannot be shown" in refused.failure
    assert "roles must alternate" in refused.failure
    assert (fine.failure, fine.reward) == (None, 1.0)


def test_an_environment_that_stops_its_own_loop_ends_nothing_else():
    class Stopping(Scripted):
        async def step(self, message: Message) -> Step:
            asyncio.get_running_loop().stop()
            return Step(done=True)

    [found] = play_scripted(lambda p: Stopping(raising), step_timeout_s=0.3)
    assert found.finish in ("end", "failed")
