"""Verifiers: they compare a response with a reference answer and give a reward in [0, 1].

Each reads what the response says behind its thoughts (`opd.text.special_tags`): a thought that is not closed is worth 0.
"""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from types import MappingProxyType

from opd.rewards.math_answers import choice, says, stated_answer
from opd.rewards.math_values import equal_values, read_value
from opd.rewards.reward import TimedOut
from opd.rewards.time_limit import BOUNDED
from opd.text.special_tags import behind_thoughts

MATH_LIMIT_S = 20.0  # the parser has 5 s for each of several steps, by signals, which do not interrupt C code


def exact(response: str, answer: str) -> float | None:
    """1 where the response is the answer, white space around both apart."""
    said = behind_thoughts(response)
    return float(said is not None and said.strip() == answer.strip())


def mathematical(response: str, answer: str) -> float | None:
    """1 where the answer that the response states has the value of the reference; both are read whole, by the same rules.

    A response is worth 0 of which nothing, or not all of the stated answer, is understood, and `TimedOut` where that is not known
    within `MATH_LIMIT_S`. Any thread may ask.
    """
    try:
        worth = BOUNDED.call(compared, response, answer, limit_s=MATH_LIMIT_S)
    except TimeoutError:
        worth = None
    return TimedOut() if worth is None else worth


def compared(response: str, answer: str) -> float | None:
    """The reward of `mathematical`, in the process with a time limit; None where a step takes too long."""
    try:
        return float(_equals(behind_thoughts(response), answer))
    except TimeoutError:
        return None


def _equals(said: str | None, answer: str) -> bool:
    reference = read_value(answer)
    if said is None or reference is None:
        return False
    if isinstance(reference.value, str) and says(said, answer):
        return True
    chosen = choice(said)
    if chosen is not None and choice(answer) == (chosen[0], ""):
        return True
    texts = (stated_answer(said), chosen and chosen[1])  # "(C) 12" states 12 too
    values = [read_value(text) for text in texts if text]
    return any(value is not None and equal_values(reference, value) for value in values)


_NUMBER = re.compile(
    r"""(?:(?<![\w.)])[-\u2212])?                   # a minus (also U+2212); behind a word, a point or a bracket it takes away
    (?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?    # thousands' commas
    |\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?""",
    re.VERBOSE,
)


def last_number(response: str, answer: str) -> float | None:
    """1 where the last number of the response is the answer, thousands' commas apart; a response without one is worth 0."""
    found = _NUMBER.findall(behind_thoughts(response) or "")
    value = _value(found[-1]) if found else None
    return float(value is not None and value == _value(answer.strip()))


def _value(number: str) -> Decimal | None:
    """None for a number whose exponent is too large for any."""
    try:
        return Decimal(number.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def nothing(response: str, answer: str) -> float | None:
    """No verdict."""
    return None


VERIFIERS: Mapping[str, Callable[[str, str], float | None]] = MappingProxyType(
    {"exact": exact, "math": mathematical, "number": last_number, "none": nothing}
)


def reference_fault(verifier: str, answer: str) -> str:
    """Why a verifier cannot compare with a reference answer; "" where it can."""
    if verifier == "none":
        return ""
    if not answer.strip():
        return "is empty"
    if verifier == "number" and (_NUMBER.fullmatch(answer.strip()) is None or _value(answer.strip()) is None):
        return "is no number"
    try:
        if verifier == "math" and read_value(answer) is None:
            return "is not understood, or only a part of it is"
    except TimeoutError:
        return "takes too long to read"
    return ""
