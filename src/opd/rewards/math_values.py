"""One mathematical answer: from its text, LaTeX or plain, to a value, all of it or nothing; and when two values are equal.

The parser and the comparison of expressions are those of math-verify. What its parser passes over in silence is read here, or
refused: a part of an answer is another answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from opd.rewards.math_text import (
    FUNCTIONS,
    TEXT,
    alike,
    brackets_of,
    closing_brace,
    grouped,
    without_scale,
    without_unit,
)
from opd.rewards.time_limit import limited

_MAX_CHARS, _MAX_EXPONENT = 1000, 400
_SECONDS = 5  # of one reading or one comparison
_DIGITS, _SAME, _ROUNDED, _ROUNDED_SHARE = 60, Fraction(1, 10**45), Fraction(1, 2 * 10**6), Fraction(1, 10**5)

_BARE = re.compile(rf"(?<![A-Za-z\\])({'|'.join(FUNCTIONS)})(?![A-Za-z])")
_SHORT = "so is it of to we if as by in at an be he me my no up us do go am"
_SHORT_WORDS = frozenset(_SHORT.split())
_SENTENCE = re.compile(r"(?<![A-Za-z])[A-Za-z]{3} +[A-Za-z\d]")  # "was 12": no product of three letters
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}(?![A-Za-z])")
_UNICODE = {
    "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ", "\u00f7": r"\div ",
    "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ",
    "\u00b0": r"^\circ ", "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ",
    "\u2248": r"\approx ", "\u00b2": "^2", "\u00b3": "^3", "\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}", "\u221a": r"\sqrt ", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u211d": r"\mathbb{R}",
    "\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b8": r"\theta ", "\u03bb": r"\lambda ",
}  # fmt: skip
_PLAIN = (
    (re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)[lr]?(?![A-Za-z])\s*\.?"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])"), " "),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|\\ |,\\! ?)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\\bmod(?![A-Za-z])"), r"\\mod"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:mathrm|operatorname)\s*\{([ei])\}"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(leq|geq)slant(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\*\*"), "^"),
)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d{1,4})?"
_DECIMAL = re.compile(_NUMBER)
_QUOTIENT = re.compile(r"([-+]?)(?:(\d+)[ ]+|(\d+)[ ]*(?=\\))?(?:\\frac\{([-+]?\d+)\}\{(\d+)\}|([-+]?\d+) ?/ ?(\d+))")
_SCIENTIFIC = re.compile(
    rf"({_NUMBER})\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{{([-+]?\d{{1,4}})\}}|([-+]?\d{{1,4}}))"
)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar)\{(\d+)\}")
_IN_BASE = re.compile(r"([-+]?)([0-9A-Za-z]+)_(?:\{(\d+)\}|(\d))")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")  # no ratio: a quarter past three is not three quarters past nine
_DROPPED = re.compile(
    r"\\(?:ldots|dots|cdots|vdots|ddots|dotsc)(?![A-Za-z])|\.\.\.|\u2026"  # how it goes on is anybody's guess
    r"|\d_|(?<!_)\d\s+\d|\d\.\d*\.\d|\d\\(?:overline|bar)"  # numbers side by side; a base; two points
    r"|\d\s*[A-Za-z]\s*\d|['\"]"  # 5 R 2, 1e5x; derivatives, feet and inches
)


@dataclass(frozen=True)
class Value:
    """value: an expression of sympy, a Fraction, or words in lower case; unit: "" for none; rounded: it has decimal places;
    brackets: `brackets_of` its text."""

    value: Any
    unit: str = ""
    rounded: bool = False
    brackets: frozenset[tuple[int, str]] = frozenset()


@lru_cache(maxsize=1 << 16)
def read_value(text: str) -> Value | None:
    """The value of a text; None where any part of it is not understood. Raises TimeoutError where it takes too long."""
    text = _bare(text)
    if not text or len(text) > _MAX_CHARS:
        return None
    words = _words(text)
    if words is not None:
        return Value(words)
    if quoted := TEXT.fullmatch(text):
        said = " ".join(quoted[1].casefold().split())
        return read_value(quoted[1]) or (Value(said) if _WORD.search(said) else None)
    text, unit = without_unit(text)
    if _CLOCK.fullmatch(text):
        return Value(text, unit)
    scale, unit = without_scale(unit)
    number = _number(text)
    if number is not None:
        number *= scale
    elif scale != 1:
        return None
    if number is not None:
        return Value(number, unit, rounded=bool(re.search(r"[.eE]", text)) and "overline" not in text)
    parsed = _parsed(text)
    return None if parsed is None else Value(parsed, unit, rounded="." in text, brackets=brackets_of(text))


def equal_values(reference: Value, response: Value) -> bool:
    """Whether a response has the value of the reference. It may leave out the unit, and a name before "=".

    Raises TimeoutError where it takes too long.
    """
    ours, theirs = reference.value, response.value
    if not alike(reference.brackets, response.brackets):
        return False
    scale: tuple[Fraction, ...] = (Fraction(1),)
    if reference.unit and response.unit and reference.unit != response.unit:
        return False
    if (reference.unit == "%") != (response.unit == "%"):
        # 50 % is 0.5; and where a question asks for percent the sign is often left out, by one side or the other
        hundredth = Fraction(100) if response.unit == "%" else Fraction(1, 100)
        number = ours if response.unit == "%" else theirs
        scale = (hundredth, Fraction(1)) if isinstance(number, Fraction) and number.denominator == 1 else (hundredth,)
    if isinstance(ours, str) or isinstance(theirs, str):
        return _as_words(ours) == _as_words(theirs)
    rounded = reference.rounded or response.rounded
    with limited(_SECONDS):
        return bool(_tried(lambda: any(_equal(ours, theirs, factor, rounded) for factor in scale)))


def _bare(text: str) -> str:
    """An answer without the marks around it: white space, emphasis, delimiters of mathematics, a box, a full stop."""
    text = "".join(_UNICODE.get(c, c) for c in text)
    before = None
    while text != before:
        before = text
        text = text.strip().strip("`")
        text = re.sub(r"(?<=[^.])[.;,:]$", "", text)
        text = re.sub(
            r"^\*\*(.*)\*\*$|^\*(.*)\*$|^__(.*)__$", lambda m: m[1] or m[2] or m[3] or "", text, flags=re.DOTALL
        )
        text = re.sub(
            r"^\$\$(.*)\$\$$|^\\\[(.*)\\\]$|^\\\((.*)\\\)$", lambda m: m[1] or m[2] or m[3] or "", text, flags=re.DOTALL
        )
        boxed = re.match(r"\\f?boxed\s*(?=\{)|\\fbox\s*(?=\{)|\{", text)
        if boxed and closing_brace(text, boxed.end() - (boxed[0] == "{")) == len(text) - 1:
            text = text[boxed.end() + (boxed[0] != "{") : -1]
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return re.sub(r"\s+", " ", text).strip()


def _words(text: str) -> str | None:
    """A text of words, in lower case: "even", "no solution"; None for mathematics."""
    plain = " ".join(TEXT.sub(r" \1 ", text).replace("-", " ").replace("'", "").split())
    if not re.fullmatch(r"[^\W\d_]+(?: [^\W\d_]+)*", plain):
        return None
    longest = max(plain.split(), key=len)
    spelled = len(longest) > 2 or (TEXT.fullmatch(text) is not None and len(longest) > 1)
    return plain.casefold() if spelled and longest not in FUNCTIONS else None


def _as_words(value: Any) -> str:
    """Words, or the product of letters that a parser makes of a word."""
    return value if isinstance(value, str) else str(value).casefold()


def _number(text: str) -> Fraction | None:
    """A number that is written out: digits, a quotient of integers, a mixed number, scientific, repeating, in another base."""
    if _DECIMAL.fullmatch(text):
        return _decimal(text)
    if found := _QUOTIENT.fullmatch(text):
        sign, whole = found[1], found[2] or found[3]
        above, below = int(found[4] or found[6]), int(found[5] or found[7])
        if not below or (whole and above < 0):
            return None
        value = Fraction(above, below) + (int(whole) if whole else 0)
        return -value if sign == "-" else value
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int(found[2] or found[3])
        first = _decimal(found[1])
        return first * Fraction(10) ** exponent if first is not None and abs(exponent) <= _MAX_EXPONENT else None
    if found := _REPEATING.fullmatch(text):
        whole, fixed, again = found[2] or "0", found[3], found[4]
        value = Fraction(int(whole + fixed)) + Fraction(int(again), 10 ** len(again) - 1)
        value /= 10 ** len(fixed)
        return -value if found[1] == "-" else value
    if (found := _IN_BASE.fullmatch(text)) and found[2][0].isdigit():
        try:
            return Fraction(int(found[1] + found[2], int(found[3] or found[4])))
        except ValueError:
            return None
    return None


def _decimal(text: str) -> Fraction | None:
    digits, _, exponent = text.replace(",", "").replace(" ", "").casefold().partition("e")
    if not any(c.isdigit() for c in digits) or (exponent and abs(int(exponent)) > _MAX_EXPONENT):
        return None
    return Fraction(digits.removesuffix(".")) * Fraction(10) ** int(exponent or 0)


def _parsed(text: str) -> Any:
    """The text as an expression of sympy; None where it is none, or where the parser would pass over a part of it."""
    text = _BARE.sub(r"\\\1", text).replace(r"\infinity", r"\infty").replace(r"\inf ", r"\infty ")
    text = re.sub(r",?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*", ",", text)
    text = grouped(text)
    if _DROPPED.search(text) or _prose(text):
        return None
    if r"\approx" in text:  # about as much as something exact is that, and a name is about what follows it
        left, right = re.split(r"\\approx\s*", text, maxsplit=1)
        text = right if re.fullmatch(r"\s*[A-Za-z](?:_\w)?\s*", left) else left
    with limited(_SECONDS):
        value = _tried(lambda: _sympy(text))
        if value is None and len(_PLUS_MINUS.findall(text)) == 1:
            value = _tried(lambda: _either(*(_sympy(_PLUS_MINUS.sub(sign, text)) for sign in "+-")))
    return None if value is None or _undefined(value) else value


def _tried(work: Callable[[], Any]) -> Any:
    """The result of a function; None where it raises."""
    try:
        return work()
    except Exception:
        return None


def _either(first: Any, second: Any) -> Any:
    """A list of two answers; None where one of them is none."""
    from latex2sympy2_extended.sets import FiniteSet

    return None if first is None or second is None else FiniteSet(first, second)


def _prose(text: str) -> bool:
    """Whether there are words between the mathematics."""
    outside = re.sub(
        r"\\begin\{\w+\}(?:\{[clr|]+\})?|\\end\{\w+\}|\\math(?:bb|cal|frak)\s*\{\w\}", " ", TEXT.sub(" ", text)
    )
    named = re.sub(r"\\[A-Za-z]+", " ", outside)
    if _SENTENCE.search(named):
        return True
    return any(len(word) > 3 or word.casefold() in _SHORT_WORDS for word in _WORD.findall(named)) or bool(
        any(" " in word for word in TEXT.findall(text))
    )


def _sympy(text: str) -> Any:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    normal = normalize_latex(text, config)
    if _DROPPED.search(normal) or not _known_commands(normal):
        return None
    try:
        real = not (should_treat_as_complex(normal) or re.search(r"\di(?![A-Za-z])", normal))
        return _complex(latex2sympy(normal, is_real=real, convert_degrees=False, normalization_config=None))
    except Exception:  # its own code raises errors of many kinds
        return None


def _complex(value: Any) -> Any:
    """With the imaginary unit for the letter i, unless that is the index of a sum, or has an order as a real number has."""
    from sympy import I

    letters = {symbol: I for symbol in getattr(value, "free_symbols", ()) if symbol.name == "i"}
    try:
        return value.subs(letters) if letters else value
    except (TypeError, ValueError):
        return value


def _known_commands(text: str) -> bool:
    """Whether the parser sees no other command, and letters behind it, in one that it does not know (\\pm, o, d for \\pmod)."""
    from antlr4 import InputStream
    from latex2sympy2_extended.antlr_parser import PSLexer

    lexer = PSLexer(InputStream(text))
    lexer.removeErrorListeners()
    stops = {token.start: token.stop for token in lexer.getAllTokens()}
    return all(stops.get(c.start(), c.end()) >= c.end() - 1 for c in re.finditer(r"\\[A-Za-z]+", text))


def _undefined(value: Any) -> bool:
    from sympy import S

    undefined = (S.NaN, S.ComplexInfinity)
    return value in undefined or (hasattr(value, "has") and bool(value.has(*undefined)))


def _equal(reference: Any, response: Any, factor: Fraction, rounded: bool) -> bool:
    """reference * factor is the response."""
    from math_verify import grader

    if _listed(reference, response) or _listed(response, reference):
        return False
    if grader.is_equation(response) and not grader.is_relation(reference):
        named = grader.is_assignment_relation(response)
        if not named and grader.take_last_relation(response).lhs.free_symbols:
            return False  # an equation, and not the number behind its sign
        response = grader.take_last_relation(response).rhs
    elif grader.is_relation(reference) and not grader.is_relation(response) and grader.is_equation(reference):
        if not _is_name(grader.take_first_relation(reference).lhs):
            return False  # the other way round: the number behind its sign, and not the equation
        reference = grader.take_last_relation(reference).rhs
    if _number_of(reference) and _number_of(response):
        return _close(_exact(reference) * _exact(factor), _exact(response), rounded)
    if factor != 1:
        return False
    reference, response = _exact(reference), _exact(response)
    if (
        not grader.is_relation(reference)
        and not grader.is_relation(response)
        and _length(reference) != _length(response)
    ):
        return False
    return grader.sympy_expr_eq(reference, response, 6, 15, allow_set_relation_comp=True)


def _listed(ends: Any, relation: Any) -> bool:
    """Whether one side lists values, and the other is an inequality: the ends of an interval are not the interval."""
    from math_verify.grader import is_equation, is_relation, take_last_relation
    from sympy import FiniteSet

    values = take_last_relation(ends).rhs if is_equation(ends) else ends
    return isinstance(values, FiniteSet) and is_relation(relation) and not is_equation(relation)


def _is_name(value: Any) -> bool:
    """Whether the left side of an equation is a name of the right side: x, f(x), (x, y)."""
    from sympy import Symbol, Tuple
    from sympy.core.function import AppliedUndef

    if isinstance(value, Tuple):
        return all(isinstance(part, Symbol) for part in value)
    return isinstance(value, Symbol | AppliedUndef)


def _exact(value: Any) -> Any:
    from sympy import Rational

    return Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def _number_of(value: Any) -> bool:
    return isinstance(value, Fraction) or (
        getattr(value, "is_number", False) and not getattr(value, "is_Matrix", False)
    )


def _length(value: Any) -> int:
    """How many answers a list of answers has, those that come twice included."""
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(value, Interval):
        return 2 if value.is_open else 1
    return len(getattr(value, "_unsorted_args", value.args)) if isinstance(value, FiniteSet | Tuple) else 1


def _close(ours: Any, theirs: Any, rounded: bool) -> bool:
    """Whether two numbers are one; of one with decimal places those beyond the sixth do not count."""
    ours, theirs = ours.doit(), theirs.doit()
    if ours == theirs:
        return True
    if ours.is_infinite or theirs.is_infinite or (ours.is_Rational and theirs.is_Rational and not rounded):
        return False
    apart, size = abs((ours - theirs).evalf(_DIGITS)), abs(theirs.evalf(_DIGITS))
    limit = _exact(_SAME) * size
    if rounded:
        limit = max(limit, min(_exact(_ROUNDED), _exact(_ROUNDED_SHARE) * size))
    return bool(apart <= limit)
