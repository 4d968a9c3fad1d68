"""Verifiers: what a response is worth against a reference answer, in [0, 1]."""

from collections.abc import Callable, Mapping
from types import MappingProxyType


def exact(response: str, answer: str) -> float | None:
    """1 where the response is the answer, white space around both apart."""
    return float(response.strip() == answer.strip())


def mathematical(response: str, answer: str) -> float | None:
    """1 where math-verify finds the two mathematically equal; a response that it cannot parse is worth 0."""
    from math_verify import parse, verify

    return float(verify(parse(answer), parse(response)))


def nothing(response: str, answer: str) -> float | None:
    """No verdict."""
    return None


VERIFIERS: Mapping[str, Callable[[str, str], float | None]] = MappingProxyType(
    {"exact": exact, "math": mathematical, "none": nothing}
)
