"""Arithmetic from text by a parser of its own: numbers, + - * / and brackets, exact, bounded; nothing is ever evaluated as code."""

import re
from fractions import Fraction

_MAX_CHARS, _MAX_DEPTH, _MAX_BITS = 500, 30, 1000
_TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|[-+*/()])")


def calculate(expression: str) -> str:
    """The value of an expression: an integer, or a decimal rounded to six places.

    Raises ValueError saying what cannot be read, and for expressions that are too long, too deep or too large.
    """
    if len(expression) > _MAX_CHARS:
        raise ValueError(f"the expression has {len(expression)} characters, at most {_MAX_CHARS} are read")
    value = _Reader(_tokens(expression)).whole()
    if value.denominator == 1:
        return str(value.numerator)
    rounded = round(value, 6)
    sign, size = "-" if rounded < 0 else "", abs(rounded) * 10**6
    return f"{sign}{size // 10**6}.{int(size % 10**6):06d}".rstrip("0").rstrip(".")


def _tokens(expression: str) -> list[str]:
    found, position = [], 0
    text = expression.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"unexpected {text[position]!a} at character {position}")
        found.append(match[1])
        position = match.end()
    return found


class _Reader:
    """sum := product (("+" | "-") product)*; product := signed (("*" | "/") signed)*; signed := "-"* atom."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = [*tokens, ""]
        self._place = 0
        self._depth = 0

    def whole(self) -> Fraction:
        value = self._sum()
        if self._next:
            raise ValueError(f"unexpected '{self._next}'")
        return value

    @property
    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self) -> str:
        self._place += 1
        return self._tokens[self._place - 1]

    def _sum(self) -> Fraction:
        value = self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return _bounded(value)

    def _product(self) -> Fraction:
        value = self._signed()
        while self._next in ("*", "/"):
            if self._take() == "*":
                value = _bounded(value * self._signed())
            else:
                divisor = self._signed()
                if divisor == 0:
                    raise ValueError("division by zero")
                value = _bounded(value / divisor)
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while self._next in ("-", "+"):
            sign = -sign if self._take() == "-" else sign
        return sign * self._atom()

    def _atom(self) -> Fraction:
        token = self._take() if self._next else ""
        if token == "(":
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise ValueError(f"more than {_MAX_DEPTH} brackets deep")
            value = self._sum()
            if not self._next or self._take() != ")":
                raise ValueError("a bracket is not closed")
            self._depth -= 1
            return value
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise ValueError(f"expected a number, got '{token}'" if token else "the expression ends too early")
        return Fraction(token if not token.endswith(".") else token[:-1])


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("the value is too large")
    return value
