"""The order of prompts: a function of the seed, whatever it is cut into, and every task in its turn."""

from collections import Counter

import pytest
from factories import prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.data.tasks import PromptStream

quick = settings(max_examples=50)


def stream(sizes: dict[str, int], weights: dict[str, float] | None = None, seed: int = 0) -> PromptStream:
    prompts = {name: [prompt(f"{name}{i}") for i in range(n)] for name, n in sizes.items()}
    return PromptStream(prompts, weights or dict.fromkeys(sizes, 1.0), seed=seed)


def ids(prompts: list) -> list[str]:
    return [p.id for p in prompts]


SIZES = {"a": 5, "b": 7, "c": 3}


def test_the_stream_is_a_function_of_the_seed():
    drawn = [ids(stream(SIZES, seed=s).next(60)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@quick
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_the_stream_does_not_depend_on_how_it_is_cut_into_batches(counts):
    pieces, whole = stream(SIZES), stream(SIZES)
    assert [i for n in counts for i in ids(pieces.next(n))] == ids(whole.next(sum(counts)))


@quick
@given(st.integers(0, 40), st.integers(1, 40))
def test_continuing_from_a_saved_cursor_equals_not_stopping(before, after):
    whole = stream(SIZES, {"a": 1.0, "b": 2.5, "c": 0.5})
    whole.next(before)
    fresh = stream(SIZES, {"a": 1.0, "b": 2.5, "c": 0.5})
    fresh.cursor = dict(sorted(whole.cursor.items(), reverse=True))
    assert ids(fresh.next(after)) == ids(whole.next(after))


@pytest.mark.parametrize("seed", [1, 2**23, 2**32, 20_260_131_235_959])
def test_a_seed_of_any_size_gives_an_order_of_its_own(seed):
    assert ids(stream({"a": 50}, seed=seed).next(50)) != ids(stream({"a": 50}, seed=0).next(50))


def test_a_task_keeps_its_order_when_another_task_grows():
    def order(drawn: list[str]) -> list[str]:
        return [i for i in drawn if i.startswith("a")][:10]

    small, large = stream({"a": 5, "b": 7}), stream({"a": 5, "b": 70})
    assert order(ids(small.next(40))) == order(ids(large.next(40)))


def test_every_prompt_is_visited_once_an_epoch_and_epochs_differ():
    drawn = ids(stream({"a": 8}).next(24))
    epochs = [drawn[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(e) == [f"a{i}" for i in range(8)] for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


@quick
@given(st.dictionaries(st.sampled_from("abcde"), st.floats(0.1, 10), min_size=1, max_size=5), st.integers(1, 60))
def test_tasks_take_turns_in_proportion_to_their_weights(weights, count):
    source = stream(dict.fromkeys(weights, 4), weights)
    drawn = Counter(i[0] for i in ids(source.next(count)))
    total = sum(weights.values())
    for name, weight in weights.items():
        ahead = drawn[name] - count * weight / total
        assert ahead < 1.0 + 1e-9
        assert ahead > -max(1, len(weights) - 1) - 1e-9


def test_equal_weights_alternate():
    assert [i[0] for i in ids(stream({"a": 3, "b": 3}).next(6))] in (list("ababab"), list("bababa"))


def test_a_weight_of_a_task_that_is_not_there_does_not_count():
    source = stream({"a": 4, "b": 4}, {"a": 1.0, "b": 1.0, "gone": 98.0})
    assert Counter(i[0] for i in ids(source.next(10))) == {"a": 5, "b": 5}


@quick
@given(st.integers(1, 5), st.integers(0, 9))
def test_a_prompt_repeats_within_a_batch_only_where_an_epoch_ends(count, seed):
    source = stream({"a": 5}, seed=seed)
    for _ in range(6):
        before = source.cursor["a"]
        batch = ids(source.next(count))
        if before // 5 == (source.cursor["a"] - 1) // 5:
            assert len(set(batch)) == len(batch)
        assert max(Counter(batch).values()) <= 2
