"""Verifiers: what a response is worth against a reference answer, in [0, 1]."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from types import MappingProxyType


def exact(response: str, answer: str) -> float | None:
    """1 where the response is the answer, white space around both apart."""
    return float(response.strip() == answer.strip())


def mathematical(response: str, answer: str) -> float | None:
    """1 where math-verify finds the two mathematically equal; a response that it cannot parse is worth 0."""
    from math_verify import parse, verify

    return float(verify(parse(answer), parse(response)))


_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\d[\d,]*(?:\.\d+)?")  # a minus behind a digit or a bracket takes away


def last_number(response: str, answer: str) -> float | None:
    """1 where the last number of the response is the answer, thousands' commas apart; a response without one is worth 0."""
    found = _NUMBER.findall(response)
    return float(bool(found) and Decimal(found[-1].replace(",", "")) == Decimal(answer.strip().replace(",", "")))


def is_number(answer: str) -> bool:
    """Whether `last_number` can compare with it."""
    return _NUMBER.fullmatch(answer.strip()) is not None


def nothing(response: str, answer: str) -> float | None:
    """No verdict."""
    return None


VERIFIERS: Mapping[str, Callable[[str, str], float | None]] = MappingProxyType(
    {"exact": exact, "math": mathematical, "number": last_number, "none": nothing}
)
