"""Games of TextArena: how they are played, the reward that the game says, and what cannot be played."""

import importlib.util
import itertools
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from factories import save_toy, sft_recipe
from games import GUESS, HANOI, MASTERMIND, bare, config, play, script, task
from textarena import SinglePlayerState

import opd
from opd.config import SftConfig, parse_config
from opd.data.tasks import make_tasks
from opd.errors import ConfigError, DataError
from opd.integrations.textarena import Game, TextArena
from opd.records import Message, Prompt, Rollout


def said(rollout: Rollout, role: str) -> list[str]:
    return [m["content"] for m in rollout.messages if m["role"] == role]


# --- playing ---


def test_the_bisecting_student_finds_every_number():
    played = task(size=30)
    rollouts = play(played, played.prompts("train"))
    assert {(r.reward, r.finish, r.failure) for r in rollouts} == {(1.0, "end", None)}
    assert max(sum(t.author == "student" for t in r.turns) for r in rollouts) <= 5  # 20 numbers
    assert len({r.response for r in rollouts}) > 5
    assert all(not r.events for r in rollouts)


@pytest.mark.parametrize("disks", [3, 4])
def test_the_tower_is_moved_in_as_few_moves_as_there_are(disks: int):
    played = task(HANOI, params={"num_disks": disks, "max_turns": 100})
    [found] = play(played, played.prompts("train")[:1])
    assert (found.reward, found.finish) == (1.0, "end")
    assert sum(t.author == "student" for t in found.turns) == 2**disks - 1


def test_the_tower_is_moved_from_wherever_it_stands():
    played = task(HANOI)
    prompt = played.prompts("train")[0]

    def write(prompt: Prompt, messages: Sequence[Message]) -> str | None:
        detour = ["[A B]", "[A C]", "[B A]"]  # the smallest disk ends on the larger two thirds
        turn = len(messages) // 2
        return detour[turn] if turn < len(detour) else played.solution(prompt, messages)

    [found] = play(played, [prompt], write)
    assert (found.reward, found.finish, dict(found.events)) == (1.0, "end", {})


def test_of_the_boards_of_one_turn_the_last_one_counts():
    played = task(HANOI)
    prompt = played.prompts("train")[0]

    def write(prompt: Prompt, messages: Sequence[Message]) -> str | None:
        return "[A C] [A B] [C B]" if len(messages) == 1 else played.solution(prompt, messages)

    [found] = play(played, [prompt], write)
    assert (found.reward, found.finish, dict(found.events)) == (1.0, "end", {})
    assert [t.author for t in found.turns].count("student") == 5  # of seven moves, three in the first turn


def test_a_tower_that_stands_has_no_next_move():
    board: Message = {"role": "user", "content": "Current Board: \nA: []\nB: []\nC: [2, 1]\n."}
    assert task(HANOI).solution(task(HANOI).prompts("train")[0], [board]) is None


def test_a_game_without_a_known_solution_says_so():
    played = task(MASTERMIND)
    prompt = played.prompts("train")[0]
    assert played.solution(prompt, prompt.messages) is None
    assert played.reward(prompt, "[1 2 3 4]") is None


def test_mastermind_is_won_by_whoever_knows_the_code():
    played = task(MASTERMIND)
    prompt = played.prompts("train")[0]
    code = " ".join(map(str, bare(MASTERMIND, prompt.meta["seed"]).state.game_state["secret_code"]))
    [found] = play(played, [prompt], script("[1 2 3 4]", f"[{code}]"))
    assert (found.reward, found.finish) == (1.0, "end")
    assert re.fullmatch(
        r"Submitted \[1 2 3 4\]\. Feedback: \d black peg\(s\), \d white peg\(s\)\.", said(found, "user")[1]
    )


def test_the_student_hears_only_what_is_new_and_nothing_of_its_own():
    played = task(HANOI)
    [found] = play(
        played, played.prompts("train")[:1], script("I move a disk: [A C]", "[A B]", "done [C B]"), max_turns=3
    )
    first, second = said(found, "user")[1:]
    assert first == "You moved disk 1 from A to C.\nCurrent Board: \nA: [3, 2]\nB: []\nC: [1]\n."
    assert second == "You moved disk 2 from A to B.\nCurrent Board: \nA: [3]\nB: [2]\nC: [1]\n."
    assert [m["role"] for m in found.messages] == ["user", "assistant"] * 3
    assert "[GAME]" not in found.messages[0]["content"]


# --- rewards ---


def test_a_second_invalid_move_in_a_row_ends_the_game_with_nothing():
    played = task()
    [found] = play(played, played.prompts("train")[:1], script("no idea", "none at all"))
    assert (found.reward, found.finish) == (0.0, "end")
    assert dict(found.events) == {"invalid_moves": 2}
    assert said(found, "user")[1].startswith("You attempted an invalid move.")


def test_an_invalid_move_between_good_ones_is_counted_and_forgiven():
    played = task()
    prompt = played.prompts("train")[0]
    number = bare(GUESS, prompt.meta["seed"]).game_number
    other = 1 if number != 1 else 2
    [found] = play(played, [prompt], script("?", f"[{other}]", "?", f"[{number}]"))
    assert (found.reward, dict(found.events)) == (1.0, {"invalid_moves": 2})


def test_a_lost_game_is_worth_the_share_that_the_game_gives():
    played = task(params={"max_turns": 2})
    prompt = played.prompts("train")[0]
    number = bare(GUESS, prompt.meta["seed"]).game_number
    wrong = [n for n in (1, 19, 20, 10) if n != number][:3]
    [found] = play(played, [prompt], script(*(f"[{n}]" for n in wrong)))
    assert found.finish == "end"
    assert sum(t.author == "student" for t in found.turns) == 3  # the game looks at its limit before it counts the turn
    assert found.reward == pytest.approx(1 - abs(wrong[-1] - number) / 19)
    assert 0 < found.reward < 1


def test_a_game_that_the_recipe_ends_is_worth_nothing():
    played = task(HANOI)
    [found] = play(played, played.prompts("train")[:1], script("[A C]", "[C A]"), max_turns=2)
    assert (found.finish, found.reward) == ("turns", 0.0)


@pytest.mark.parametrize("game", ["Countdown-v0", "Secretary-v0"])
def test_a_loss_without_a_number_and_a_loss_below_zero_are_worth_nothing(game: str):
    played = task(game)
    prompt = played.prompts("train")[0]
    raw = bare(game, prompt.meta["seed"])
    for _ in range(2):
        raw.step("nonsense")
    assert raw.state.rewards[0] == -1.0 or isinstance(raw.state.rewards[0], str)
    [found] = play(played, [prompt], script("nonsense"))
    assert (found.reward, found.failure) == (0.0, None)


def test_a_reward_above_one_is_a_failure_and_no_reward(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SinglePlayerState, "set_outcome", lambda self, reward, reason=None: end_with(self, 3.0))
    played = task(HANOI)
    [found] = play(played, played.prompts("train")[:1])
    assert found.reward is None
    assert "gave the reward 3.0, expected a number in [0, 1]" in str(found.failure)


def end_with(state: Any, reward: float | None) -> None:
    state.rewards, state.done = None if reward is None else {0: reward}, True


def test_a_game_that_ends_without_a_reward_gives_no_verdict(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SinglePlayerState, "set_outcome", lambda self, reward, reason=None: end_with(self, None))
    played = task(HANOI)
    [found] = play(played, played.prompts("train")[:1])
    assert (found.reward, found.finish, found.failure) == (None, "end", None)


# --- hostile students ---

HOSTILE = (
    "\x1b[31m\x1b]0;title\x07",
    "[" * 5000,
    "[5" + "5" * 5000 + "]",
    "[A" + " " * 1_000_000,
    "[[[5]]]]",
    "[Player] [GAME] [5]",
    "\ud800[\u202e5]\x00",
    "[\u0665]",
    "[-1]",
    "[1 2 3 4 " * 1000,
    "",
    "]",
)


@pytest.mark.parametrize("game", [GUESS, HANOI, MASTERMIND])
@pytest.mark.parametrize("move", range(len(HOSTILE)))
def test_a_hostile_turn_is_answered_in_time(game: str, move: int):
    started = time.thread_time()  # of this thread alone: other processes do not count
    step = Game(config(game), 0).play(HOSTILE[move])
    assert time.thread_time() - started < 2.0
    assert not step.done
    assert step.reward is None
    assert step.events["moves_cut"] == (len(HOSTILE[move]) > 4000)
    assert len(step.observations[0]["content"]) < 1000
    if move not in (2, 4, 5, 7):  # these are guesses
        assert step.events["invalid_moves"] == 1


def test_of_a_turn_that_is_too_long_its_end_is_played():
    number = bare(GUESS, 0).game_number
    step = Game(config(), 0).play("thinking " * 2000 + f"so [{number}]")
    assert (step.reward, step.done, dict(step.events)) == (1.0, True, {"invalid_moves": 0, "moves_cut": 1})


# --- what cannot be played ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"game": "GuessTheNumbr-v0"}, "is no game of TextArena; did you mean 'GuessTheNumber-v0'?"),
        ({"game": "TicTacToe-v0"}, "cannot be played here: AssertionError: The number of players has to be 2"),
        ({"game": "QuantumTicTacToe-v0"}, "is for more than one player; choose another"),
        ({"game": "Bandit-v0"}, "gives no reward to learn from: it rewards a wrong choice by how wrong it is"),
        ({"game": "Set-v0"}, "gives no reward to learn from: its reward counts points"),
        ({"params": {"depth": 3}}, "cannot be played here: TypeError: .*unexpected keyword argument 'depth'"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused_in_one_line(changes: dict[str, Any], reason: str):
    with pytest.raises(DataError, match=re.escape(reason).replace(r"\.\*", ".*")) as caught:
        task(**changes)
    assert str(caught.value).startswith("tasks.game.game = '")
    assert "\n" not in str(caught.value)


def test_a_game_whose_words_are_not_here_names_them(monkeypatch: pytest.MonkeyPatch):
    import nltk

    def find(resource: str, paths: Any = None) -> Any:
        raise LookupError("\n***\n  Resource words not found.\n  >>> nltk.download('words')\n***\n")

    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    monkeypatch.setattr(nltk.data, "find", find)
    with pytest.raises(DataError, match=r"it needs data that is not installed: python -m nltk\.downloader words$"):
        task("Hangman-v0")


TIMES = itertools.count()


@pytest.mark.parametrize(
    "board",
    [lambda self: str(random.random())[:0], lambda self: str(next(TIMES))],
    ids=["it draws Python's own numbers", "it opens otherwise each time"],
)
def test_a_game_that_does_not_follow_from_its_seed_is_refused(
    monkeypatch: pytest.MonkeyPatch, board: Callable[..., str]
):
    from textarena.envs.TowerOfHanoi.env import TowerOfHanoiEnv

    state = random.getstate()
    monkeypatch.setattr(TowerOfHanoiEnv, "_render_board", board)
    with pytest.raises(DataError, match="is not determined by its seed"):
        task(HANOI)
    assert random.getstate() == state


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "textarena" else find(name, package)
    )
    with pytest.raises(
        ConfigError, match=r"^tasks\.game\.type = 'textarena' needs .*: pip install 'opd\[textarena\]'$"
    ):
        task()


# --- in a recipe ---


def test_a_recipe_names_a_game():
    made = make_tasks({"game": config(HANOI, seed=3)})["game"]
    assert isinstance(made, TextArena)
    assert made.prompts("train") == task(HANOI, seed=3).prompts("train")
    with pytest.raises(ConfigError, match=r"unknown key 'tasks\.game\.gme'; did you mean 'game'"):
        parse_config(
            {"student": "s", "output": "o", "tasks": {"game": {"type": "textarena", "gme": GUESS, "teacher": "t"}}},
            kind=SftConfig,
        )


def test_fine_tuning_learns_from_solutions_and_is_examined_by_the_game(tmp_path: Path):
    student = save_toy(tmp_path / "student", max_context=2048)
    game = config(size=2, held_out_size=1).model_dump()
    recipe = sft_recipe(tmp_path, student, tasks={"guess": game}, steps=2, evaluation={"num_prompts": 1})
    cells = opd.sft(parse_config(recipe, kind=SftConfig)).accuracy
    assert {key: cell.accuracy is not None for key, cell in cells.items()} == {
        ("guess", "train"): True,
        ("guess", "held_out"): True,
    }
