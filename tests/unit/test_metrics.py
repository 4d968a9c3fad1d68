"""Metric values merge to the value of the whole; the Wilson interval against known figures."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.metrics import Max, Mean, Metrics, Sum, mean_of, merge, values, wilson_interval

quick = settings(max_examples=60)
numbers = st.lists(st.floats(-1e6, 1e6), min_size=0, max_size=8)


def measured(items: list[float]) -> Metrics:
    """What a part of a batch would report about its numbers."""
    counted: Metrics = {"a/mean": mean_of(items), "a/sum": Sum(math.fsum(items))}
    return counted | ({"a/max": Max(max(items))} if items else {})


@quick
@given(st.lists(numbers, min_size=1, max_size=5))
def test_the_merge_of_parts_is_the_value_of_the_whole(parts):
    whole = [x for part in parts for x in part]
    got, expected = values(merge(measured(p) for p in parts)), values(measured(whole))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-6)


@quick
@given(numbers, numbers, numbers)
def test_merging_is_associative(first, second, third):
    a, b, c = (measured(p) for p in (first, second, third))
    left, right = values(merge([merge([a, b]), c])), values(merge([a, merge([b, c])]))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert right[name] == pytest.approx(value, rel=1e-9, abs=1e-6)


def test_a_mean_over_parts_of_unequal_size_is_no_mean_of_means():
    merged = merge([{"x": mean_of([1.0])}, {"x": mean_of([4.0, 4.0, 4.0])}])
    assert merged["x"].value == pytest.approx(3.25)


def test_means_are_weighted():
    assert (Mean(2.0, 4.0) + Mean(9.0, 1.0)).value == pytest.approx(11 / 5)


def test_merge_keeps_names_that_only_one_part_has_and_its_arguments_as_they_were():
    first: Metrics = {"x": Sum(1.0)}
    merged = merge([first, {"y": Max(2.0)}, {"x": Sum(2.0), "y": Max(-3.0)}])
    assert values(merged) == {"x": 3.0, "y": 2.0}
    assert first == {"x": Sum(1.0)}


def test_nothing_merges_to_nothing():
    assert merge([]) == {}


@pytest.mark.parametrize(
    ("first", "second"), [(Mean(1.0), Sum(1.0)), (Sum(1.0), Mean(1.0)), (Sum(1.0), Max(1.0)), (Max(1.0), Sum(1.0))]
)
def test_values_of_different_kinds_do_not_merge(first, second):
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        merge([{"x": first}, {"x": second}])


def test_a_mean_of_nothing_is_left_out_of_the_plain_values():
    assert math.isnan(mean_of([]).value)
    assert values({"b": mean_of([]), "c": Sum(1.0), "a": mean_of([2.0])}) == {"a": 2.0, "c": 1.0}


def test_plain_values_are_sorted_by_name():
    assert list(values({"b": Sum(1.0), "a": Sum(2.0)})) == ["a", "b"]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
        (0, 0, 0.0, 1.0),
        (7, 10, 0.3968, 0.8922),
    ],
)
def test_the_wilson_interval_has_its_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


trials_with_successes = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@quick
@given(trials_with_successes)
def test_the_wilson_interval_holds_the_proportion_and_stays_within_zero_and_one(pair):
    low, high = wilson_interval(*pair)
    assert 0.0 <= low < high <= 1.0
    assert low - 1e-12 <= pair[0] / pair[1] <= high + 1e-12


@quick
@given(trials_with_successes)
def test_the_wilson_interval_of_failures_mirrors_that_of_successes(pair):
    low, high = wilson_interval(*pair)
    mirrored = wilson_interval(pair[1] - pair[0], pair[1])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@quick
@given(trials_with_successes)
def test_the_ends_of_the_wilson_interval_are_where_the_score_test_turns(pair):
    # At an interior end p0 of the interval |p - p0| = z sqrt(p0 (1 - p0) / n).
    p, n = pair[0] / pair[1], pair[1]
    for end in wilson_interval(*pair):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-9)


@quick
@given(trials_with_successes)
def test_the_wilson_interval_narrows_with_more_trials(pair):
    low, high = wilson_interval(*pair)
    narrow_low, narrow_high = wilson_interval(4 * pair[0], 4 * pair[1])
    assert narrow_high - narrow_low < high - low
