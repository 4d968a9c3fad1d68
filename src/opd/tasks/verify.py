"""Verifiers: what a response is worth against a reference answer, in [0, 1]."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from types import MappingProxyType

from opd.tasks.bounded import BOUNDED

MATH_LIMIT_S = (
    20.0  # math-verify's own limits are 5 s for each of three steps; they hold where Python code is slow, not C code
)


def exact(response: str, answer: str) -> float | None:
    """1 where the response is the answer, white space around both apart."""
    return float(response.strip() == answer.strip())


def mathematical(response: str, answer: str) -> float | None:
    """1 where math-verify finds the two mathematically equal; a response that it cannot parse, or not within `MATH_LIMIT_S`, is
    worth 0. Any thread may ask."""
    try:
        return BOUNDED.call(compared, response, answer, limit_s=MATH_LIMIT_S)
    except TimeoutError:
        return 0.0


def compared(response: str, answer: str) -> float:
    """What `mathematical` says, in the process that is bounded in time."""
    from math_verify import parse, verify

    return float(verify(parse(answer), parse(response)))


_NUMBER = re.compile(
    r"""(?:(?<![\w.)])[-\u2212])?                   # a minus (also U+2212); behind a word, a point or a bracket it takes away
    (?:\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?    # thousands' commas
    |\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?""",
    re.VERBOSE,
)


def last_number(response: str, answer: str) -> float | None:
    """1 where the last number of the response is the answer, thousands' commas apart; a response without one is worth 0."""
    found = _NUMBER.findall(response)
    value = _value(found[-1]) if found else None
    return float(value is not None and value == _value(answer.strip()))


def _value(number: str) -> Decimal | None:
    """None for a number whose exponent is too large for any."""
    try:
        return Decimal(number.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        return None


def is_number(answer: str) -> bool:
    """Whether `last_number` can compare with it."""
    return _NUMBER.fullmatch(answer.strip()) is not None and _value(answer.strip()) is not None


def nothing(response: str, answer: str) -> float | None:
    """No verdict."""
    return None


VERIFIERS: Mapping[str, Callable[[str, str], float | None]] = MappingProxyType(
    {"exact": exact, "math": mathematical, "number": last_number, "none": nothing}
)
