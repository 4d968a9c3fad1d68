"""Tools and the environment that calls them; the calculator against Python's own arithmetic."""

import re
import threading
from fractions import Fraction

import pytest
from games import SCHEMA, heard, take_step, tool_call, tool_environment
from hypothesis import given
from hypothesis import strategies as st

import opd
from opd.config import EpisodesConfig
from opd.episodes.tool_problems import calculate
from opd.episodes.tools import Tool, ToolEnvironment
from opd.roles import Step


def test_a_call_is_made_and_its_result_observed():
    found = take_step(tool_environment(lambda x: x + 1), "Let me see. " + tool_call())
    assert (heard(found), found.done, found.reward) == (["4"], False, None)
    assert found.events["tool_calls"] == 1


def test_results_that_are_no_text_are_json():
    assert heard(take_step(tool_environment(lambda x: {"doubled": 2 * x, "when": complex(1, 2)}), tool_call())) == [
        '{"doubled": 6, "when": "(1+2j)"}'
    ]


def test_several_calls_of_a_turn_are_answered_in_their_order():
    text = tool_call('{"x": 1}') + tool_call('{"x": "one"}') + tool_call('{"x": 2}')
    first, refused, second = heard(take_step(tool_environment(lambda x: 10 * x), text))
    assert (first, second) == ("10", "20")
    assert refused.startswith("error: ")


def test_a_turn_without_a_call_is_the_answer():
    for text, reward in (("right", 1.0), ("wrong", 0.0), ("", 0.0)):
        found = take_step(tool_environment(lambda x: x), text)
        assert (found.done, found.reward, heard(found)) == (True, reward, [])


MALFORMED = (
    tool_call(name="g"),
    tool_call('{"x": "3"}'),
    tool_call("{}"),
    tool_call('{"x": 3, "y": 4}'),
    "<tool_call>f(3)</tool_call>",
    "<tool_call>{",
    '{"name": "f"}',
)


@pytest.mark.parametrize("text", MALFORMED)
def test_what_cannot_be_called_is_told_and_the_episode_goes_on(text: str):
    called: list[int] = []
    found = take_step(tool_environment(called.append), text)
    assert (called, found.done, found.reward) == ([], False, None)
    assert heard(found)[0].startswith("error: ")
    assert found.events["tool_calls_refused"] >= 1


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("lost"), "error: KeyError: 'lost'"),
        (SystemExit(1), "error: SystemExit: 1"),
        (StopIteration(), "error: StopIteration"),
        (KeyboardInterrupt(), "error: KeyboardInterrupt"),
        (Unspeakable(), "error: Unspeakable: (its message cannot be read)"),
        (ValueError("\x1b[2J" + "x" * 9999), "error: ValueError: \ufffd[2Jxxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_tool_that_raises_is_told_to_the_student(error: BaseException, told: str):
    def fail(x: int) -> None:
        raise error

    found = take_step(tool_environment(fail), tool_call())
    assert heard(found)[0].startswith(told)
    assert len(heard(found)[0]) < 300
    assert found.events["tool_errors"] == 1


def test_a_tool_that_hangs_is_left_and_the_others_are_not():
    release = threading.Event()
    slow = Tool("slow", "", SCHEMA, lambda x: release.wait(60.0))
    quick = Tool("quick", "", SCHEMA, lambda x: "done")
    environment = ToolEnvironment([slow, quick], lambda text: None, EpisodesConfig(tool_timeout_s=1.0))
    found = take_step(environment, tool_call(name="slow") + tool_call(name="quick"))
    assert not release.is_set()
    release.set()
    assert heard(found) == ["error: slow gave no answer in 1 s", "done"]
    assert found.events["tool_timeouts"] == 1


def test_the_names_for_python_are_those_of_the_package():
    assert (opd.Tool, opd.ToolEnvironment, opd.Step) == (Tool, ToolEnvironment, Step)


NUMBERS = st.integers(0, 999).map(str) | st.decimals(0, 99, places=2, allow_nan=False).map(lambda d: format(d, "f"))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join),
        inner.map(lambda e: f"({e})"),
        inner.map(lambda e: f"-{e}"),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_the_calculator_agrees_with_pythons_arithmetic(expression: str):
    """The same text with every number a Fraction, by Python's own parser."""
    exact = re.sub(r"\d+(?:\.\d+)?", lambda m: f"Fraction('{m[0]}')", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            calculate(expression)
        return
    found = calculate(expression)
    assert abs(Fraction(found) - expected) <= Fraction(1, 2 * 10**6)
    if expected.denominator == 1:
        assert found == str(expected)


@given(st.text(max_size=80) | st.text("0123456789.+-*/() eE_jx", max_size=600))
def test_the_calculator_answers_or_says_what_it_cannot_read(text: str):
    reason = ""
    try:
        calculate(text)
    except ValueError as error:
        reason = str(error)
    assert reason.isascii()
    assert len(reason) < 120


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "the expression ends too early"),
        ("1 +", "the expression ends too early"),
        ("2 ** 3", "expected a number, got '*'"),
        ("__import__('os')", "unexpected '_' at character 0"),
        ("(" * 40 + "1" + ")" * 40, "more than 30 brackets deep"),
        ("9" * 600, "the expression has 600 characters, at most 500 are read"),
        ("*".join(["99999999999"] * 41), "the value is too large"),
        ("1 2", "unexpected '2'"),
        ("(1", "a bracket is not closed"),
        ("1/(2-2)", "division by zero"),
    ],
)
def test_what_the_calculator_refuses(expression: str, reason: str):
    with pytest.raises(ValueError) as caught:
        calculate(expression)
    assert reason in str(caught.value)
