"""`verifier = "math"` by kinds of answers: brackets, prose, the imaginary unit, choices."""

import time

import pytest

from opd.rewards import math_values
from opd.rewards.verifiers import mathematical, reference_fault

BRACKETS_RIGHT = [
    ("1,2", r"\{1,2\}"),
    (r"\{1,2,3\}", "3, 1 and 2"),
    (r"\{1,2\}", r"\lbrace 2,1 \rbrace"),
    (r"\{1,2\}", r"x\in\{1,2\}"),
    (r"\{(1,2),(3,4)\}", "(3,4), (1,2)"),
    (r"\{1,2\}\cup(3,4)", r"(3,4)\cup\{1,2\}"),
]
BRACKETS_WRONG = [
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", "(1,2)"),
    (r"\{1,2,3\}", r"\boxed{(1,2,3)}"),
    (r"\{1,2,3\}", "[1,2,3]"),
    ("(x,y)=(1,2)", r"(x,y)=\{1,2\}"),
    (r"\{(1,2),(3,4)\}", r"\{\{1,2\},\{3,4\}\}"),
    ("1<x<2", r"\{1,2\}"),
    ("1<x<2", r"x\in\{1,2\}"),
    ("1<x<2", "1,2"),
]
PROSE_RIGHT = [
    ("20", "The answer is 20."),
    ("12", "He has 12 apples on June 20."),
    ("5", "So it is 5, as in step 2."),
    ("7", "In step 2, 3 + 4 = 7"),
    ("60", "The answer is 60 miles per hour."),
    ("5", "The answer is 5 (see step 2)."),
    ("5", "The answer is 5, since 2 and 3 are 5."),
    ("3", "We round 2.67 to 3."),
    ("12", "In that case 12 apples remain."),
    ("12", "Each step 12 apples are sold."),
    ("5", "The answer is 5 in 3 days."),
    (r"\text{June 20}", r"So it is $\text{June 20}$."),
    (r"\text{20 June}", "20 June"),
]
PROSE_WRONG = [
    ("1", "The answer is 1 out of 2"),
    ("2", "1 out of 2"),
    ("4", "3 of 4"),
    ("6", "1 in 6"),
    ("1", "The answer is 1 in 6."),
    ("8", "The answer is 8 students out of 10."),
    ("5", "The answer is 5 apples and 3 pears."),
    ("5", "The answer is 5 or maybe 6."),
    ("2", "The answer is 2 hours and 30 minutes."),
    ("20", "June 20"),
    ("20", "The answer is June 20."),
    ("20", r"\boxed{20 June}"),
    ("20", "It is on the 20th of June."),
    ("2", "So it is 5, as in step 2."),
]
UNIT_RIGHT = [
    ("-1", r"e^{i\pi}"),
    ("-1", r"\boxed{\mathrm{e}^{\mathrm{i}\pi}}"),
    ("-1", "i^2"),
    ("i", r"\sqrt{-1}"),
    ("2i", "(1+i)^2"),
    ("x=2i", "2i"),
    ("i<3", "3>i"),
    ("6", r"\sum_{i=1}^{3} i"),
]
UNIT_WRONG = [
    ("1", r"e^{i\pi}"),
    ("1", "i^2"),
    ("2i", "2"),
]
CHOICES_RIGHT = [
    ("C", "(C)"),
    ("C", "C) 12"),
    ("C", "C."),
    (r"\text{C}", "The answer is (C) 12."),
    (r"\textbf{(C)}", r"\boxed{\textbf{(C)}\ 12}"),
    ("C", "2 + 10 is 12.\nOption C"),
    ("E", "E) none of these"),
    ("12", r"\boxed{\textbf{(C)}\ 12}"),
]
CHOICES_WRONG = [
    ("C", "B) 12"),
    ("C", "The answer is C, not D"),
    ("A", "A) 3 B) 4 C) 12"),
    ("C", r"\boxed{C, D}"),
    ("A", "A book"),
    ("3", "C) 12"),
]


@pytest.mark.parametrize(("reference", "response"), BRACKETS_RIGHT)
def test_a_set_is_no_tuple_and_no_interval_and_a_bare_list_is_any_of_them(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 1.0


@pytest.mark.parametrize(("reference", "response"), BRACKETS_WRONG)
def test_another_bracket_is_another_answer(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 0.0


@pytest.mark.parametrize(("reference", "response"), PROSE_RIGHT)
def test_a_number_in_prose_counts_unless_it_is_a_part_of_a_longer_answer_a_date_or_a_name(
    reference: str, response: str
):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 1.0


@pytest.mark.parametrize(("reference", "response"), PROSE_WRONG)
def test_a_part_of_an_answer_in_prose_a_date_or_a_name_is_worth_nothing(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 0.0


@pytest.mark.parametrize(("reference", "response"), UNIT_RIGHT)
def test_the_letter_i_is_the_imaginary_unit(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 1.0


@pytest.mark.parametrize(("reference", "response"), UNIT_WRONG)
def test_another_complex_number_is_worth_nothing(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 0.0


@pytest.mark.parametrize(("reference", "response"), CHOICES_RIGHT)
def test_a_choice_is_read_by_its_letter_and_by_its_text(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 1.0


@pytest.mark.parametrize(("reference", "response"), CHOICES_WRONG)
def test_another_choice_and_several_are_worth_nothing(reference: str, response: str):
    assert reference_fault("math", reference) == ""
    assert mathematical(response, reference) == 0.0


def test_a_reference_that_takes_too_long_is_refused_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(math_values, "_sympy", lambda text: time.sleep(30))
    monkeypatch.setattr(math_values, "_SECONDS", 1)
    assert reference_fault("math", r"\sqrt{17}+\sqrt{19}") == "takes too long to read"
