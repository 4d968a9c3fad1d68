"""A game of TextArena is the same for the same seed, whoever else plays or draws, and its prompt is how it opens."""

import random
import threading
from typing import Any

import pytest
from games import DRAWING, GUESS, MASTERMIND, bare, config, play, script, task
from textarena import SinglePlayerState, make

from opd.integrations.textarena import Game
from opd.records import Prompt

# --- prompts and seeds ---


def test_prompts_are_named_after_distinct_seeds_that_the_splits_do_not_share():
    played = task(size=40, held_out_size=15)
    train, held_out = played.prompts("train"), played.prompts("held_out")
    assert (len(train), len(held_out)) == (40, 15)
    assert len({p.meta["seed"] for p in (*train, *held_out)}) == 55
    assert all(p.id == f"game:{p.meta['seed']}" for p in train)
    assert {(p.teacher, p.task, p.answer) for p in train} == {("t", "game", None)}


def test_prompts_are_a_function_of_game_and_seed():
    first, again, other = task(DRAWING), task(DRAWING), task(DRAWING, seed=1)
    assert first.prompts("train") == again.prompts("train")
    assert first.prompts("train") != other.prompts("train")
    assert {p.id for p in first.prompts("train")} != {p.id for p in task(GUESS).prompts("train")}


def test_more_training_prompts_leave_the_held_out_ones_as_they_were():
    assert task(size=4).prompts("held_out") == task(size=9).prompts("held_out")
    assert task(size=4).prompts("train") == task(size=9).prompts("train")[:4]


def test_nothing_held_out_is_nothing():
    assert task(held_out_size=0).prompts("held_out") == []


def test_a_prompt_has_no_lines_left_blank_at_its_ends():
    raw = bare(MASTERMIND, 0).get_observation()[1][0][1]
    assert raw.endswith("\n")
    assert Game(config(MASTERMIND), 0).opening == raw.rstrip("\n")


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_is_the_game_that_textarena_makes_of_it(seed: int):
    raw = bare(GUESS, seed)
    game = Game(config(), seed)
    assert game.opening == raw.get_observation()[1][0][1]
    assert game.play(f"[{raw.game_number}]").reward == 1.0


def test_the_prompt_is_how_the_episode_opens():
    played = task(DRAWING)
    prompt = played.prompts("train")[0]
    board = bare(DRAWING, prompt.meta["seed"]).get_observation()[1][1][1]
    assert prompt.messages[0]["content"].endswith(board.strip("\n"))
    [found] = play(played, [prompt], script("[up]"), max_turns=1)
    assert found.prompt == prompt


def test_a_game_that_is_not_the_one_of_its_prompt_is_not_played():
    played = task(DRAWING)
    first, second = played.prompts("train")[:2]
    mixed = Prompt(first.id, second.messages, teacher="t", task="game", meta=first.meta)
    bad, good = play(played, [mixed, first], script("[up]"), max_turns=1)
    assert bad.failure == "the environment raised ValueError: the game does not open as its prompt does"
    assert good.failure is None


# --- random numbers ---

MOVES = ("[up]", "[left]", "[down]", "[right]") * 5


def course(game: Game) -> list[str]:
    """What a game that draws a tile each turn says to the same moves."""
    return [game.play(move).observations[0]["content"] for move in MOVES]


def test_games_that_are_played_in_turn_do_not_change_each_other():
    alone = [course(Game(config(DRAWING), seed)) for seed in (1, 2)]
    assert alone[0] != alone[1]
    games = [Game(config(DRAWING), seed) for seed in (1, 2)]
    mixed: list[list[str]] = [[], []]
    for move in MOVES:
        for game, heard in zip(games, mixed, strict=True):
            heard.append(game.play(move).observations[0]["content"])
    assert mixed == alone


def test_games_that_are_played_at_once_do_not_change_each_other():
    alone = [course(Game(config(DRAWING), seed)) for seed in range(8)]
    found: dict[int, list[str]] = {}
    start = threading.Barrier(8)

    def run(seed: int) -> None:
        start.wait()
        found[seed] = course(Game(config(DRAWING), seed))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == alone


def test_pythons_own_random_numbers_go_on_as_if_nobody_played():
    random.seed(5)
    expected = [random.random() for _ in range(len(MOVES) + 2)]
    random.seed(5)
    drawn = [random.random()]
    game = Game(config(DRAWING), 1)
    drawn.append(random.random())
    heard = []
    for move in MOVES:
        heard.append(game.play(move).observations[0]["content"])
        drawn.append(random.random())
    assert drawn == expected
    assert heard == course(Game(config(DRAWING), 1))


def test_a_game_that_raises_leaves_the_random_numbers_of_the_others_alone(monkeypatch: pytest.MonkeyPatch):
    def fail(self: Any, **said: Any) -> None:
        raise KeyError("lost")

    game, other = Game(config(DRAWING), 1), Game(config(DRAWING), 2)
    with monkeypatch.context() as patch:
        patch.setattr(SinglePlayerState, "add_observation", fail)
        with pytest.raises(KeyError):
            game.play("[up]")
    assert course(other) == course(Game(config(DRAWING), 2))
    state = random.getstate()
    make(DRAWING).reset(num_players=1, seed=3)  # outside a game TextArena seeds Python's own, as ever
    assert random.getstate() != state
    random.setstate(state)
