"""Each detector on a stream with a cause for an alarm and on one without, and replays."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.detectors import DetectorsConfig
from opd.detectors.monitor import Alarm, Monitor

Line = dict[str, Any]
Curve = Callable[[int], float]
STEPS = 160

# A run without fault, step by step: a level and the standard deviation about it.
HEALTHY: dict[str, tuple[float, float]] = {
    "reward/mean": (0.6, 0.05),
    "held_out/reward/mean": (0.55, 0.02),
    "kl/token/mean": (0.5, 0.03),
    "kl/sequence/mean": (50.0, 3.0),
    "kl/token/letters/mean": (0.4, 0.04),
    "kl/token/sums/mean": (0.6, 0.04),
    "detectors/reward/letters/mean": (0.5, 0.05),
    "detectors/reward/sums/mean": (0.7, 0.05),
    "response/length/mean": (100.0, 4.0),
    "response/truncated/mean": (0.04, 0.02),
    "detectors/episodes/sum": (64.0, 0.0),
    "format/errors/mean": (0.03, 0.015),
    "detectors/auroc/mean": (0.66, 0.07),
    "detectors/auroc_pairs/sum": (900.0, 0.0),
    "detectors/auroc_of/sum": (64.0, 0.0),
    "detectors/flagged_advantage/mean": (-0.6, 0.1),
    "detectors/unflagged_advantage/mean": (-0.5, 0.05),
    "detectors/looping/mean": (0.03, 0.01),
    "detectors/low_kl/mean": (0.02, 0.01),
    "detectors/special_tokens/mean": (0.05, 0.03),
    "detectors/common_gain/mean": (0.4, 0.2),
    "detectors/common_actions/mean": (0.35, 0.02),
    "student/topk_overlap/mean": (0.7, 0.02),
    "student/entropy_gap/mean": (0.05, 0.1),
    "teacher/entropy/mean": (0.5, 0.05),
}


def stream(
    changed: Mapping[str, Curve | None] = {}, *, steps: int = STEPS, seed: int = 0, scale: float = 1.0
) -> list[Line]:
    """A healthy run in which some metrics follow a curve instead (None: are missing), with `scale` times their noise."""
    noise = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        line: Line = {"step": step}
        for name, (level, deviation) in HEALTHY.items():
            drawn = scale * deviation * float(noise.standard_normal())
            curve = changed.get(name, lambda _, level=level: level)
            if curve is not None and (name != "held_out/reward/mean" or step % 5 == 0):
                line[name] = curve(step) + drawn
        lines.append(line)
    return lines


def observe(lines: Sequence[Line], config: DetectorsConfig | None = None) -> list[Alarm]:
    monitor = Monitor(config or DetectorsConfig())
    return [alarm for line in lines for alarm in monitor.observe(line["step"], line)]


def ramp(before: float, after: float, first: int = 60, last: int = 90) -> Curve:
    """One level, then another, with a straight line from step `first` to step `last`."""
    return lambda step: before + (after - before) * min(1.0, max(0.0, (step - first) / (last - first)))


def level(value: float) -> Curve:
    return lambda _: value


FIRES: dict[str, tuple[str, dict[str, Curve | None], str]] = {
    "the reward falls while the reverse KL of a token falls": (
        "goodhart",
        {"reward/mean": ramp(0.6, 0.3), "kl/token/mean": ramp(0.5, 0.1)},
        "reward fell from 0.6",
    ),
    "the reward falls while the reverse KL of a sequence falls": (
        "goodhart",
        {"reward/mean": ramp(0.6, 0.3), "kl/token/mean": ramp(0.5, 0.9), "kl/sequence/mean": ramp(50.0, 20.0)},
        "KL fell per sequence",
    ),
    "scores do not tell rewards apart": (
        "log_ratio_reward_auroc",
        {"detectors/auroc/mean": ramp(0.66, 0.48)},
        "threshold 0.55",
    ),
    "errors are masked under an uncentred advantage": (
        "flagged_advantage",
        {"detectors/flagged_advantage/mean": level(0.0)},
        "errors are rewarded",
    ),
    "errors are liked by the teacher": (
        "flagged_advantage",
        {"detectors/flagged_advantage/mean": level(0.2), "detectors/unflagged_advantage/mean": None},
        "errors are rewarded",
    ),
    "responses become loops": ("repetition", {"detectors/looping/mean": ramp(0.03, 0.3)}, "are loops"),
    "responses begin as loops and stay": ("repetition", {"detectors/looping/mean": level(0.3)}, "are loops: 30"),
    "responses are cut more often": ("truncation", {"response/truncated/mean": ramp(0.04, 0.3)}, "cut at a limit"),
    "responses double within fifty steps": ("truncation", {"response/length/mean": ramp(100.0, 250.0)}, "grew from"),
    "responses end at once": (
        "truncation",
        {"response/length/mean": ramp(100.0, 10.0), "kl/token/mean": ramp(0.5, 1.5)},
        "shrank from",
    ),
    "long responses hide where the teacher is sure": (
        "low_kl_windows",
        {"detectors/low_kl/mean": ramp(0.02, 0.4)},
        "256 tokens",
    ),
    "likeliest tokens part": ("overlap", {"student/topk_overlap/mean": ramp(0.7, 0.45)}, "likeliest tokens fell"),
    "entropies part": ("overlap", {"student/entropy_gap/mean": ramp(0.05, -1.5)}, "entropies of student and teacher"),
    "the student is far surer than its teacher": (
        "overlap",
        {"teacher/entropy/mean": level(0.5), "student/entropy_gap/mean": ramp(0.0, 0.45, 20, 40)},
        "no longer explores",
    ),
    "special tokens are artefacts": ("special_tokens", {"detectors/special_tokens/mean": level(0.5)}, "15 nats: 50"),
    "few tokens take the advantage": (
        "common_tokens",
        {"detectors/common_gain/mean": ramp(0.4, 0.95), "detectors/common_actions/mean": level(0.2)},
        "five most common",
    ),
    "one teacher is left": ("teacher_drift", {"kl/token/letters/mean": ramp(0.4, 1.2)}, "teacher 'letters' rose"),
    "one teacher's reward is lost": (
        "teacher_drift",
        {"detectors/reward/sums/mean": ramp(0.7, 0.3)},
        "prompts of teacher 'sums' fell",
    ),
    "format errors become frequent": ("format_errors", {"format/errors/mean": ramp(0.03, 0.15)}, "format errors rose"),
    "the verifier is exploited": (
        "held_out",
        {"held_out/reward/mean": ramp(0.55, 0.3), "reward/mean": ramp(0.6, 0.8)},
        "verifier of the training tasks",
    ),
}

QUIET: dict[str, tuple[str, dict[str, Curve | None]]] = {
    "the reward falls while the reverse KL rises": (
        "goodhart",
        {"reward/mean": ramp(0.6, 0.3), "kl/token/mean": ramp(0.5, 0.9), "kl/sequence/mean": ramp(50.0, 90.0)},
    ),
    "the reverse KL falls while the reward stays": ("goodhart", {"kl/token/mean": ramp(0.5, 0.1)}),
    "the reward falls by less than is allowed": (
        "goodhart",
        {"reward/mean": ramp(0.6, 0.56), "kl/token/mean": ramp(0.5, 0.1)},
    ),
    "scores tell rewards apart a little": ("log_ratio_reward_auroc", {"detectors/auroc/mean": level(0.6)}),
    "few pairs say nothing": (
        "log_ratio_reward_auroc",
        {
            "detectors/auroc/mean": level(0.48),
            "detectors/auroc_pairs/sum": level(9.0),
            "detectors/auroc_of/sum": level(10.0),
        },
    ),
    "errors cost a little more than the rest": (
        "flagged_advantage",
        {"detectors/flagged_advantage/mean": level(-0.55)},
    ),
    "an untrained student's loops go away": ("repetition", {"detectors/looping/mean": ramp(0.4, 0.02, 1, 45)}),
    "an untrained student learns to end": ("truncation", {"response/truncated/mean": ramp(0.9, 0.01, 1, 45)}),
    "responses grow slowly": ("truncation", {"response/length/mean": ramp(100.0, 250.0, 1, 160)}),
    "responses become as short as the answers": (
        "truncation",
        {"response/length/mean": ramp(100.0, 10.0), "kl/token/mean": ramp(0.5, 0.1)},
    ),
    "some long responses copy": ("low_kl_windows", {"detectors/low_kl/mean": ramp(0.02, 0.04)}),
    "likeliest tokens part a little": ("overlap", {"student/topk_overlap/mean": ramp(0.7, 0.63)}),
    "entropies part a little": ("overlap", {"student/entropy_gap/mean": ramp(0.05, -0.4)}),
    "the student becomes as sure as its teacher": (
        "overlap",
        {"teacher/entropy/mean": ramp(2.0, 0.2, 10, 60), "student/entropy_gap/mean": level(0.0)},
    ),
    "an untrained student ends where it must not": (
        "special_tokens",
        {"detectors/special_tokens/mean": ramp(0.5, 0.05, 1, 30)},
    ),
    "common tokens are most of the text": (
        "common_tokens",
        {"detectors/common_gain/mean": level(0.9), "detectors/common_actions/mean": level(0.8)},
    ),
    "a teacher is a little farther": ("teacher_drift", {"kl/token/letters/mean": ramp(0.4, 0.6)}),
    "a teacher's reward falls by less than is allowed": (
        "teacher_drift",
        {"detectors/reward/sums/mean": ramp(0.7, 0.63)},
    ),
    "format errors become rare": ("format_errors", {"format/errors/mean": ramp(0.4, 0.03)}),
    "format errors are as frequent as ever": ("format_errors", {"format/errors/mean": level(0.3)}),
    "both rewards fall": ("held_out", {"held_out/reward/mean": ramp(0.55, 0.3), "reward/mean": ramp(0.6, 0.3)}),
    "the held-out reward falls by less than is allowed": (
        "held_out",
        {"held_out/reward/mean": ramp(0.55, 0.54), "reward/mean": ramp(0.6, 0.8)},
    ),
}


def test_every_detector_has_a_stream_that_alarms_it_and_one_that_does_not():
    named = {name for name in DetectorsConfig.model_fields if name != "rearm_steps"}
    assert len(named) == 12
    assert {detector for detector, *_ in FIRES.values()} == {detector for detector, _ in QUIET.values()} == named


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed: int):
    assert observe(stream(steps=400, seed=seed)) == []


@pytest.mark.parametrize("case", FIRES)
def test_a_stream_that_must_alarm_does(case: str):
    detector, changed, words = FIRES[case]
    mine = [alarm for alarm in observe(stream(changed)) if alarm.detector == detector]
    assert any(words in alarm.message for alarm in mine), mine
    assert all("\n" not in alarm.message for alarm in mine)


@pytest.mark.parametrize("case", QUIET)
def test_a_near_miss_does_not_alarm(case: str):
    detector, changed = QUIET[case]
    assert [alarm for alarm in observe(stream(changed)) if alarm.detector == detector] == []


# What a configuration allows, in a stream without noise: a metric, its level before, and the level after at the bound.
BOUNDS: dict[str, tuple[str, float, float, dict[str, Curve | None]]] = {
    "goodhart": ("reward/mean", 0.6, 0.5, {"kl/token/mean": ramp(0.5, 0.1)}),
    "log_ratio_reward_auroc": ("detectors/auroc/mean", 0.7, 0.55, {}),
    "repetition": ("detectors/looping/mean", 0.0, 0.1, {}),
    "truncation": ("response/truncated/mean", 0.0, 0.1, {}),
    "low_kl_windows": ("detectors/low_kl/mean", 0.0, 0.05, {}),
    "special_tokens": ("detectors/special_tokens/mean", 0.0, 0.25, {}),
    "common_tokens": ("detectors/common_gain/mean", 0.35, 0.65, {}),
    "overlap": ("student/topk_overlap/mean", 0.7, 0.6, {}),
    "teacher_drift": ("detectors/reward/sums/mean", 0.7, 0.55, {}),
    "held_out": ("held_out/reward/mean", 0.55, 0.5, {}),
}


@pytest.mark.parametrize("detector", BOUNDS)
def test_without_noise_an_alarm_begins_where_the_configuration_says(detector: str):
    name, before, bound, beside = BOUNDS[detector]
    for share, alarmed in ((0.95, False), (1.15, True)):
        after = before + share * (bound - before)
        lines = stream(beside | {name: ramp(before, after)}, steps=400, scale=0.0)
        assert any(alarm.detector == detector for alarm in observe(lines)) is alarmed, share


@pytest.mark.parametrize("case", ["likeliest tokens part", "one teacher is left", "format errors become frequent"])
def test_an_alarm_comes_soon_after_its_cause(case: str):
    detector, changed, _ = FIRES[case]
    [alarm] = [alarm for alarm in observe(stream(changed)) if alarm.detector == detector]
    assert 60 < alarm.step <= 90


@pytest.mark.parametrize("cut", [1, 30, 75, 110])
def test_a_replay_of_the_metrics_file_goes_on_as_if_never_stopped(cut: int):
    everything: dict[str, Curve | None] = {}
    for _, changed, _ in FIRES.values():
        everything |= changed
    lines = stream(everything)
    whole, first, second = (Monitor(DetectorsConfig()) for _ in range(3))
    alarms = [whole.observe(line["step"], line) for line in lines]
    assert {alarm.detector for found in alarms for alarm in found} >= {"repetition", "overlap", "format_errors"}
    written = []
    for line in lines[:cut]:
        first.observe(line["step"], line)
        written.append(
            json.dumps(line | first.values)
        )  # as in metrics.jsonl, the detectors' own figures among the rest
    for text in written:
        line = json.loads(text)
        second.observe(line["step"], line)
    assert [second.observe(line["step"], line) for line in lines[cut:]] == alarms[cut:]
    assert second.values == whole.values
    assert second.inactive == whole.inactive


def test_a_cause_that_lasts_alarms_once_and_again_after_it_was_gone():
    def wave(step: int) -> float:
        return 0.4 if 40 <= step < 100 or step >= 160 else 0.03

    alarms = [a for a in observe(stream({"detectors/looping/mean": wave}, steps=220)) if a.detector == "repetition"]
    assert [40 <= a.step < 60 or 160 <= a.step < 180 for a in alarms] == [True, True]
    lasting = DetectorsConfig(rearm_steps=100)
    assert len([a for a in observe(stream({"detectors/looping/mean": wave}, steps=220), lasting)]) == 1


@pytest.mark.parametrize("action", ["log", "warn", "stop"])
def test_an_alarm_carries_the_action_of_its_detector(action: Any):
    config = DetectorsConfig.model_validate({"repetition": {"action": action}})
    [alarm] = observe(stream({"detectors/looping/mean": ramp(0.03, 0.4)}), config)
    assert alarm[1:3] == ("repetition", action)


def test_a_detector_that_is_off_neither_measures_nor_alarms():
    tables = {name: {"action": "off"} for name in DetectorsConfig.model_fields if name != "rearm_steps"}
    monitor = Monitor(DetectorsConfig.model_validate(tables))
    assert [monitor.observe(i, line) for i, line in enumerate(stream({"detectors/looping/mean": level(0.9)}))] == [
        []
    ] * STEPS
    assert monitor.values == {}
    assert monitor.inactive == {}


def test_a_table_of_one_setting_keeps_the_detectors_other_defaults():
    config = DetectorsConfig.model_validate({"special_tokens": {"action": "stop"}, "common_tokens": {"patience": 9}})
    assert (config.special_tokens.threshold, config.special_tokens.patience) == (0.25, 30)
    assert (config.common_tokens.action, config.common_tokens.threshold) == ("log", 0.3)


def test_a_detector_without_data_says_what_it_needs():
    monitor = Monitor(DetectorsConfig())
    assert set(monitor.inactive) == set(DetectorsConfig.model_fields) - {"rearm_steps"}
    for line in stream({"held_out/reward/mean": None, "detectors/auroc/mean": None, "student/topk_overlap/mean": None}):
        monitor.observe(line["step"], line)
    assert set(monitor.inactive) == {"held_out", "log_ratio_reward_auroc", "overlap"}
    assert "held_out/reward/mean" in monitor.inactive["held_out"]


def test_the_values_of_detectors_are_metrics():
    monitor = Monitor(DetectorsConfig())
    for line in stream():
        monitor.observe(line["step"], line)
    assert monitor.values["detectors/truncation/value"] == pytest.approx(0.04, abs=0.03)
    assert monitor.values["detectors/truncation/length/value"] == pytest.approx(1.0, abs=0.1)
    assert monitor.values["detectors/teacher_drift/letters/kl/value"] == pytest.approx(1.0, abs=0.2)
    assert monitor.values["detectors/overlap/topk/value"] == pytest.approx(0.7, abs=0.05)
    assert all(name.startswith("detectors/") and name.endswith("/value") for name in monitor.values)


odd = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 1e308, -1e308, 5e-324]))


@settings(max_examples=100)
@given(
    st.lists(
        st.dictionaries(st.sampled_from([*HEALTHY, "kl/token//mean", "kl/token/a/b/mean", "else"]), odd), max_size=40
    )
)
def test_no_values_make_it_fail(lines: list[Line]):
    monitor = Monitor(
        DetectorsConfig.model_validate(
            {name: {"memory": 2} for name in DetectorsConfig.model_fields if name != "rearm_steps"}
        )
    )
    for step, line in enumerate(lines):
        for alarm in monitor.observe(step, line):
            assert alarm.message
            assert "\n" not in alarm.message
        assert all(math.isfinite(value) for value in monitor.values.values())


def test_a_detector_that_has_its_metrics_and_too_few_steps_says_so():
    monitor = Monitor(DetectorsConfig())
    monitor.observe(1, {"kl/token/first/mean": 0.1, "kl/token/mean": 0.1})
    assert monitor.inactive["teacher_drift"] == "more steps"
    assert monitor.inactive["goodhart"].startswith("needs reward/mean")
