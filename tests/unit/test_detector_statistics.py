"""The statistics that detectors rest on: averages and their noise, sums of excess, and pooled areas."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.detectors import AurocConfig, FormatErrorsConfig
from opd.detectors.detectors import Auroc, FormatErrors
from opd.detectors.statistics import Mark, Smoothed, Tracked, above, cusum

quick = settings(max_examples=60)


@quick
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(1, 40))
def test_a_young_average_is_the_plain_mean(values: list[float], memory: int):
    stream_ = Smoothed(memory)
    for value in values:
        stream_ = stream_.add(value)
    if len(values) <= (memory + 1) / 2:
        assert stream_.mean == pytest.approx(float(np.mean(values)), abs=1e-9)
    assert min(values) - 1e-9 <= stream_.mean <= max(values) + 1e-9
    assert stream_.ready == (len(values) >= memory)


def test_a_stream_is_not_compared_before_it_has_filled_its_memory():
    largest, smallest = Tracked(5), Tracked(5, lowest=True)
    for step, value in enumerate([9.0, -9.0, 1.0, 1.0]):
        assert largest.add(value, step) is smallest.add(value, step) is None
    assert largest.add(1.0, 4, 7.0) == smallest.add(1.0, 4, 7.0) == Mark(largest.now, 4, (7.0,))


@quick
@given(st.lists(st.floats(-100, 100), max_size=30), st.integers(1, 6))
def test_the_most_extreme_mean_is_the_first_of_the_largest_or_smallest(values: list[float], memory: int):
    largest, smallest, averaged, means = Tracked(memory), Tracked(memory, lowest=True), Smoothed(memory), []
    for step, value in enumerate(values):
        averaged = averaged.add(value)
        means += [averaged.mean] if averaged.ready else []
        best, least = largest.add(value, step), smallest.add(value, step)
        for mark, pick in ((best, max), (least, min)):
            assert (mark is None) == (not means)
            if mark is not None:
                assert (mark.mean, mark.step) == (pick(means), memory - 1 + means.index(pick(means)))


def test_the_noise_of_a_stream_is_its_variance_and_a_trend_adds_little():
    noise = np.random.default_rng(0).normal(0.0, 2.0, 3000)
    plain, sloping = Smoothed(300), Smoothed(300)
    for step, value in enumerate(noise):
        plain, sloping = plain.add(float(value)), sloping.add(float(value) + 0.1 * step)
    assert plain.noise == pytest.approx(4.0, rel=0.1)
    assert sloping.noise == pytest.approx(4.0, rel=0.1)
    assert plain.error == pytest.approx(2.0 / math.sqrt(300), rel=0.1)


def test_the_variance_of_the_average_is_what_its_error_says():
    rng = np.random.default_rng(1)
    means, errors = [], []
    for _ in range(300):
        averaged = Smoothed(10)
        for value in rng.normal(0.0, 1.0, 60):
            averaged = averaged.add(float(value))
        means.append(averaged.mean)
        errors.append(averaged.error)
    assert float(np.std(means)) == pytest.approx(float(np.mean(errors)), rel=0.1)


def test_chance_alone_does_not_leave_the_most_extreme_mean():
    rng = np.random.default_rng(2)
    for _ in range(10):
        tracked, left = Tracked(10), False
        for step, value in enumerate(rng.binomial(16, 0.7, 1000)):
            best = tracked.add(float(value), step)
            left |= best is not None and above(best.stream, tracked.now, 0.0)
        assert not left


@quick
@given(st.lists(st.floats(-10, 10), max_size=20), st.floats(0.1, 2.0))
def test_the_cusum_is_the_largest_sum_over_a_last_stretch(excess: list[float], slack: float):
    total = 0.0
    for z in excess:
        total = cusum(total, z, slack)
    stretches = [sum(z - slack for z in excess[start:]) for start in range(len(excess) + 1)]
    assert total == pytest.approx(max(stretches), abs=1e-9)


@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=30), st.integers(12, 80))
def test_the_format_errors_are_a_plain_loop(errors: list[int], num: int):
    config = FormatErrorsConfig(memory=4, acceptable=0.05, slack=0.5, limit=6.0)
    detector = FormatErrors(config)
    total, means, mean = 0.0, [], 0.0
    for step, count in enumerate(errors):
        rate = count / num
        low, steps = (rate, max(1, step)) if step < 4 else (min(means[3:step]), 4)
        low = min(max(low, 0.05), 0.95)
        usual = min(low + 3.0 * math.sqrt(low * (1.0 - low) / (num * min(steps, 4))), 0.95)
        total = max(0.0, total + (rate - usual) / math.sqrt(usual * (1.0 - usual) / num) - 0.5)
        mean += max(1.0 / (step + 1), 0.4) * (rate - mean)
        means.append(mean)
        found = detector.observe(step, {"format/errors/mean": rate, "detectors/episodes/sum": float(num)})[""]
        assert found.value == pytest.approx(total, abs=1e-9)
        assert (found.message is not None) == (total > 6.0) or total == pytest.approx(6.0)


def test_the_pooled_auroc_weighs_steps_by_their_precision():
    detector = Auroc(AurocConfig(memory=10**9))
    pooled_area = math.nan
    steps = [(0.9, 15.0, 8.0), (0.4, 1024.0, 64.0), (0.5, 256.0, 32.0)]
    for step, (area, pairs, num) in enumerate(steps):
        line = {"detectors/auroc/mean": area, "detectors/auroc_pairs/sum": pairs, "detectors/auroc_of/sum": num}
        pooled_area = detector.observe(step, line)[""].value
    precision = [12.0 * pairs / (num + 1.0) for _, pairs, num in steps]
    pooled = sum(p * area for p, (area, _, _) in zip(precision, steps, strict=True)) / sum(precision)
    assert pooled_area == pytest.approx(pooled)


def test_the_precision_of_a_step_is_that_of_the_rank_statistic():
    rng = np.random.default_rng(3)
    rewards = np.arange(40) < 15
    areas = []
    for _ in range(2000):
        scores = rng.standard_normal(40)
        areas.append(float((scores[rewards][:, None] > scores[~rewards][None, :]).mean()))
    assert 1.0 / float(np.var(areas)) == pytest.approx(12.0 * 15 * 25 / 41, rel=0.1)
