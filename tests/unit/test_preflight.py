"""Every start-up check passes on what is right and fails on what is wrong."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from factories import prompt, rollout, scored

from opd.checks import startup
from opd.checks.notices import Finding
from opd.data.tasks import require_teachers
from opd.errors import CheckError, DataError
from opd.records import FailedScore, Prompt, Rollout, ScoredRollout
from opd.roles import Limit, OwnReading

VOCAB = 258


def rollouts(count: int = 3) -> list[Rollout]:
    """Rollouts of different lengths with figures of their own."""
    return [
        rollout(
            list(range(i + 4)), 2, prompt=prompt(f"p{i}"), logprobs=[-0.5 - 0.1 * i - 0.01 * t for t in range(i + 2)]
        )
        for i in range(count)
    ]


def own_scores(items: Sequence[Rollout], shift: float = 0.0) -> list[ScoredRollout]:
    """What a teacher would say that is the student itself, `shift` nats off."""
    return [scored(r, (r.rollout_logprobs[r.loss_mask] + shift).tolist()) for r in items]


def failed(item: Rollout) -> ScoredRollout:
    return ScoredRollout(item, FailedScore(item.prompt.teacher, "too long"))


class Stub:
    """A teacher whose score of a rollout is a function of the rollout and of how often it was asked."""

    def __init__(self, score: Callable[[Rollout, int], ScoredRollout]) -> None:
        self._score, self.calls = score, 0

    def score(self, items: Sequence[Rollout]) -> list[ScoredRollout]:
        self.calls += 1
        return [self._score(r, self.calls) for r in items]


def steady(item: Rollout, call: int) -> ScoredRollout:
    return own_scores([item])[0]


# --- require ---


def test_require_is_silent_when_all_checks_pass():
    assert startup.require([Finding("a", True, ""), Finding("b", True, "")]) is None


def test_require_names_the_first_check_that_failed():
    findings = [Finding("a", True, "x"), Finding("b", False, "got 3"), Finding("c", False, "z")]
    with pytest.raises(CheckError, match=r"^start-up check 'b' failed: got 3$"):
        startup.require(findings)


# --- require_teachers ---


def test_prompts_whose_teachers_are_there_pass():
    assert require_teachers([prompt(teacher="even"), prompt(teacher="odd")], ["even", "odd", "spare"]) is None


def test_a_prompt_with_a_wrong_teacher_is_named():
    with pytest.raises(DataError) as caught:
        require_teachers([prompt("a", teacher="even"), prompt("b", teacher="evne")], {"odd": 1, "even": 2})
    assert str(caught.value) == ("prompt 'b': teacher 'evne' is not in [teachers] (even, odd); did you mean 'even'?")


# --- lengths_fit ---


def fits(lengths: dict[str, int], *, student: int | None, teacher: int | None) -> Finding:
    def length(item: Prompt) -> int:
        return lengths[item.id]

    return startup.lengths_fit(
        [prompt(name, teacher="t") for name in lengths],
        length,
        max_new_tokens=10,
        contexts={"the student": None if student is None else Limit(student)},
        teacher_contexts={"t": None if teacher is None else Limit(teacher), "other": Limit(1)},
    )


def test_lengths_that_just_fit_pass():
    found = fits({"a": 5, "b": 90}, student=100, teacher=100)
    assert found.passed
    assert found.detail == "longest prompt 90 + 10 new tokens"


@pytest.mark.parametrize(("student", "teacher", "who"), [(99, 100, "the student (99)"), (100, 99, "teacher 't' (99)")])
def test_a_prompt_that_is_one_token_too_long_is_named_with_the_context_that_it_exceeds(student, teacher, who):
    with pytest.raises(DataError) as caught:
        fits({"a": 5, "b": 90}, student=student, teacher=teacher)
    assert str(caught.value).startswith(
        f"prompt 'b': 90 tokens + sampling.max_new_tokens = 10 exceed the context of {who}; shorten the prompt"
    )


@pytest.mark.parametrize(
    "cause", ["its rope ('longrope') changes beyond 9 tokens", "its attention has a sliding window of 9 tokens"]
)
def test_a_limit_that_is_no_context_says_its_cause_and_which_key_to_lower(cause: str):
    limits = {"the student": Limit(9, cause)}
    with pytest.raises(DataError) as caught:
        startup.lengths_fit([prompt("p")], lambda p: 5, max_new_tokens=6, contexts=limits, teacher_contexts={})
    assert str(caught.value) == (
        f"prompt 'p': 5 tokens + sampling.max_new_tokens = 6 exceed the limit of the student (9: {cause}); shorten the prompt "
        "or lower sampling.max_new_tokens"
    )


def test_an_unknown_context_limits_nothing():
    assert fits({"a": 10**9}, student=None, teacher=None).passed


@pytest.mark.parametrize(("limit", "passes"), [(99, False), (100, True)])
def test_a_prompt_that_is_too_long_as_its_teacher_reads_it_is_named_with_teacher_tokens_and_limit(limit, passes):
    def asked() -> Finding:
        own = {"t": [OwnReading(lambda p: 90, Limit(limit), 10)], "other": [OwnReading(lambda p: 10**6, Limit(1), 1)]}
        return startup.lengths_fit(
            [prompt("b", teacher="t")],
            lambda p: 5,
            max_new_tokens=10,
            contexts={},
            teacher_contexts={},
            own_readings=own,
        )

    if passes:
        assert asked().passed
        return
    with pytest.raises(DataError) as caught:
        asked()
    assert str(caught.value) == (
        "prompt 'b': teacher 't' reads it as 90 tokens in its own template; with at least 10 of a response they exceed the context "
        "of that teacher (99); shorten the prompt, lower sampling.max_new_tokens or take another teacher"
    )


# --- same_policy ---


def test_a_teacher_that_equals_the_student_passes():
    items = rollouts()
    found = startup.same_policy(items, own_scores(items, shift=5e-4), tolerance=1e-3)
    assert found.passed
    assert "over 3 rollouts" in found.detail


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_log_ratios_that_are_off_fail(shift):
    items = rollouts()
    found = startup.same_policy(items, own_scores(items, shift=shift), tolerance=1e-3)
    assert not found.passed
    assert "1.0e-01" in found.detail


def test_one_log_ratio_that_is_off_fails():
    items = rollouts()
    rescored = own_scores(items)
    off = items[1].rollout_logprobs[items[1].loss_mask].copy()
    off[-1] -= 0.5
    rescored[1] = scored(items[1], off.tolist())
    assert not startup.same_policy(items, rescored, tolerance=1e-3).passed


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_log_ratio_that_is_no_number_fails_wherever_it_stands(place):
    items = rollouts()
    rescored = own_scores(items)
    rescored[place] = scored(items[place], [math.nan] * items[place].num_actions)
    assert not startup.same_policy(items, rescored, tolerance=1e-3).passed


def test_nothing_scored_by_the_student_itself_fails():
    items = rollouts()
    assert not startup.same_policy(items, [failed(r) for r in items], tolerance=1e-3).passed


# --- deterministic ---


def test_a_teacher_that_repeats_itself_passes():
    teacher = Stub(steady)
    assert startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-6).passed


def test_a_teacher_that_gives_other_scores_the_second_time_fails():
    teacher = Stub(lambda r, call: own_scores([r], shift=0.01 * call)[0])
    found = startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-3)
    assert not found.passed
    assert "1.0e-02" in found.detail


def test_a_teacher_whose_scores_depend_on_the_order_fails():
    class ByPlace(Stub):
        def score(self, items: Sequence[Rollout]) -> list[ScoredRollout]:
            return [own_scores([r], shift=0.1 * i)[0] for i, r in enumerate(items)]

    teacher = ByPlace(steady)
    assert not startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-3).passed


@pytest.mark.parametrize("call", [1, 2])
def test_a_rollout_that_cannot_be_scored_is_named(call):
    teacher = Stub(lambda r, n: failed(r) if n == call and r.id == "p1/0" else own_scores([r])[0])
    found = startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-3)
    assert not found.passed
    assert found.detail == "rollout 'p1/0' could be scored once of twice"


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("calls", [(1, 2), (2,)])
def test_scores_that_are_no_numbers_are_not_called_deterministic(place, calls):
    teacher = Stub(
        lambda r, n: (
            scored(r, [math.nan] * r.num_actions) if n in calls and r.id == f"p{place}/0" else own_scores([r])[0]
        )
    )
    assert not startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-3).passed


# --- informative ---


def test_teachers_that_tell_tokens_apart_pass_each_by_name():
    items = [rollout([1, 2, 3], 1, prompt=prompt(f"p{i}", teacher=t)) for i, t in enumerate(["even", "odd", "even"])]
    found = startup.informative(own_scores(items), vocab_size=VOCAB)
    assert [f.name for f in found] == ["teacher 'even' is not uniform", "teacher 'odd' is not uniform"]
    assert all(f.passed for f in found)
    assert "on 4 tokens" in found[0].detail


def test_only_the_uniform_teacher_fails():
    items = [rollout([1, 2, 3], 1, prompt=prompt(f"p{i}", teacher=t)) for i, t in enumerate(["even", "odd"])]
    uniform = scored(items[0], [-math.log(VOCAB)] * 2)
    found = startup.informative([uniform, *own_scores(items[1:])], vocab_size=VOCAB)
    assert [f.passed for f in found] == [False, True]
    assert f"uniform: {-math.log(VOCAB):.2f}" in found[0].detail


def test_a_teacher_whose_tokens_are_on_average_like_uniform_passes():
    [item] = rollouts(1)
    around = scored(item, [-math.log(VOCAB) - 1.0, -math.log(VOCAB) + 1.0])
    assert all(f.passed for f in startup.informative([around], vocab_size=VOCAB))


def test_a_teacher_whose_scores_are_no_numbers_is_not_informative():
    [item] = rollouts(1)
    found = startup.informative([scored(item, [math.nan, -1.0])], vocab_size=VOCAB)
    assert not any(f.passed for f in found)


def test_a_teacher_that_could_score_nothing_fails_a_check_of_that_name_with_the_reason():
    items = rollouts()
    lost = [failed(r) for r in items]
    [found] = startup.can_score(lost)
    assert not found.passed
    assert found.name == "teacher 't' can score what the student writes"
    assert found.detail == "none of 3 rollouts (first: 'p0/0': too long)"
    assert startup.informative(lost, vocab_size=VOCAB) == []
    assert startup.can_score([*lost[1:], *own_scores(items[:1])]) == []


# --- passes_equal_own ---


@pytest.mark.parametrize("probe", ["head", "several sequences", "gradients"])
@pytest.mark.parametrize(
    ("difference", "passed"), [(0.0, True), (1e-3, True), (2e-3, False), (math.nan, False), (math.inf, False)]
)
def test_packed_logits_must_equal_plain_ones_in_every_probe(probe, difference, passed):
    found = startup.passes_equal_own("the student", {"plan": 0.0, probe: difference})
    assert found.passed is passed
    assert found.name == "forward passes equal the model's own (the student)"


def test_a_packing_check_that_probed_nothing_fails():
    assert not startup.passes_equal_own("the student", {}).passed


def test_a_packing_check_that_fails_says_the_cause_the_figures_and_what_to_do():
    found = startup.passes_equal_own("teacher 'even'", {"head": 1e-6, "several sequences": 0.25})
    assert found.detail == (
        "this model's layers carry state across packed sequences; packed passes; largest difference 2.5e-01 of the spread of "
        "the logits (allowed 1e-03); use another model (a teacher of this kind can be served: teachers.NAME.url)"
    )


def test_findings_are_plain_booleans():
    items = rollouts()
    for found in (
        startup.same_policy(items, own_scores(items), tolerance=1e-3),
        *startup.informative(own_scores(items), vocab_size=VOCAB),
        startup.passes_equal_own("student", {"head": float(np.float32(0.0))}),
    ):
        assert isinstance(found.passed, bool)


def test_one_rollout_that_cannot_be_scored_is_named_and_no_refusal():
    teacher = Stub(lambda r, n: failed(r) if r.id == "p1/0" else own_scores([r])[0])
    found = startup.deterministic(teacher.score(rollouts()), teacher, tolerance=1e-3)
    assert found.passed
    assert found.warning
    assert found.detail.endswith("; 1 of 3 not scored (first: 'p1/0': too long)")
    nothing = Stub(lambda r, n: failed(r))
    assert not startup.deterministic(nothing.score(rollouts()), nothing, tolerance=1e-3).passed


def test_a_teacher_none_of_whose_probes_could_be_played_is_named():
    sampled = rollouts()
    teachers = {r.prompt.teacher for r in sampled}
    assert startup.unprobed(sampled, sampled) == []
    found = startup.unprobed(sampled, [])
    assert {f.name for f in found} == {f"teacher '{name}' is checked" for name in teachers}
    assert all(f.warning for f in found)


def test_prompts_with_tools_and_nobody_who_answers_are_named():
    asked = [prompt("a"), replace(prompt("b"), tools=({"type": "function"},)), prompt("c")]
    [found] = startup.tools_are_answered(asked, lambda p: None)
    assert found.warning
    assert found.detail.startswith("prompt 'b' shows tools, and no environment answers their calls")
    assert startup.tools_are_answered(asked, lambda p: object()) == []
    assert startup.tools_are_answered([prompt("a")], lambda p: None) == []
