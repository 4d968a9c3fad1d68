"""Units of mathematical answers, before or after a number, and brackets in their text."""

import re
from typing import TypeAlias

COMMANDS = r"text|textbf|textit|textrm|textnormal|textsf|mathrm|mathbf|mathit|mathsf|mbox|operatorname|rm|bf"
TEXT = re.compile(rf"\\(?:{COMMANDS})\s*\{{([^{{}}]*)\}}")
_FUNCTION_NAMES = """
arcsin arccos arctan arccot sinh cosh tanh coth sin cos tan cot sec csc sqrt log ln exp max min gcd lcm mod pi theta alpha beta
gamma delta lambda infty infinity inf frac
"""
FUNCTIONS = tuple(_FUNCTION_NAMES.split())
_GLUED = (
    "mm cm dm km kg mg ml mi ft in yd lb oz hr min sec ms kw mph kmh hz"  # those that may stand right behind a number
)
_GLUED_UNITS = frozenset(_GLUED.split())
_UNIT_NAMES = {
    "percent": "%", "pct": "%", "percentage": "%", "degree": "\u00b0", "deg": "\u00b0", "dollar": "$", "usd": "$", "euro": "\u20ac",
    "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min",
    "hour": "h", "hr": "h", "foot": "ft", "feet": "ft", "inch": "in", "inche": "in", "mile": "mi", "liter": "l", "litre": "l",
    "sq": "square", "milliliter": "ml", "pound": "lb", "kmh": "km/h",
}  # fmt: skip
MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sep(?:t(?:ember)?)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b"
)
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = re.compile(r"^([-+]?)\s*(\\?\$|\u00a3|\u20ac|\u00a5)\s*(?=[-+]?[\d.])")
_PERCENT = re.compile(r"(?<=[\d.})])\s*(?:\\?%|\\text\{\s*%\s*\})$")
_DEGREES = re.compile(
    r"(?<=[\d.})])\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:\\text\{\s*)?([CF]?)\s*\}?$|\s*\\degrees?$"
)
_UNIT_TEXT = re.compile(rf"(?<=[\w)}}\]!])\s*((?:\\(?:{COMMANDS})\s*\{{[^{{}}]*\}}|\s|/|\\cdot|\^\s*\{{?-?\d\}}?)+)$")
_UNIT_WORDS = re.compile(r"(?<=[\d)}\]])(\s*)([A-Za-z]{2,}(?:[ /][A-Za-z]+)*\s*(?:\^\s*\{?[23]\}?)?)$")


def without_unit(text: str) -> tuple[str, str]:
    """The text without a unit at its end or a currency before it, and that unit."""
    if found := _CURRENCY.search(text):
        amount, sign = found[1] + text[found.end() :], found[2].lstrip("\\")
        scaled = re.fullmatch(rf"(.*\d) *({'|'.join(SCALES)})", amount)
        return (scaled[1], f"{scaled[2]} {sign}") if scaled else (amount, sign)
    for pattern, name in ((_PERCENT, "%"), (_DEGREES, "\u00b0")):
        if found := pattern.search(text):
            return text[: found.start()].strip(), name + ((found[1] or "").casefold() if found.lastindex else "")
    if (found := _UNIT_TEXT.search(text)) and TEXT.search(found[1]) and not re.search(r"(?:and|or)\s*\}", found[1]):
        return text[: found.start()].strip(), _unit(TEXT.sub(r"\1", found[1]).replace(r"\cdot", " "))
    found = _UNIT_WORDS.search(text)
    if found:
        first = re.split(r"[ /^]", found[2])[0]
        known = first.casefold() in _GLUED_UNITS
        if first not in FUNCTIONS and not re.match(MONTH, first) and (known or (found[1] and len(first) > 2)):
            return text[: found.start()].strip(), _unit(found[2])
    return text, ""


def _unit(text: str) -> str:
    """One spelling of a unit."""
    words = re.sub(r"[\^{}\s.]+", " ", text.casefold().replace("per ", "/")).split()
    names = [w if len(w) < 3 else w.removesuffix("s") for w in words]
    return " ".join(_UNIT_NAMES.get(name, name) for name in names)


def without_scale(unit: str) -> tuple[int, str]:
    """The factor in a unit, such as that of "million", and the rest of the unit."""
    first, _, rest = unit.partition(" ")
    return (SCALES[first], rest) if first in SCALES else (1, unit)


Brackets: TypeAlias = frozenset[tuple[int, str]]


def closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` is closed; -1 where it is not."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return -1


def brackets_of(text: str) -> Brackets:
    """(depth, kind) of the brackets that hold several elements, the innermost at depth 1: "{" of a set, "(" of any other."""
    found: set[tuple[int, str]] = set()
    # of each open bracket: its kind, whether it holds several elements, the depth of what it holds
    inside: list[tuple[str, bool, int]] = [("", False, 0)]
    for mark in re.findall(r"\\[{}]|[()\[\],;]", text):
        kind, several, depth = inside[-1]
        if mark in ",;":
            inside[-1] = (kind, True, depth)
        elif mark in (r"\{", "(", "["):
            inside.append((mark[-1].replace("[", "("), False, 0))
        elif len(inside) > 1:
            inside.pop()
            if several:
                depth += 1
                found.add((depth, kind))
            outer, listed, deepest = inside[-1]
            inside[-1] = (outer, listed, max(deepest, depth))
    return frozenset(found)


def alike(ours: Brackets, theirs: Brackets) -> bool:
    """Whether no set stands where the other text has a tuple, a list or an interval. One without brackets there may be any."""
    depths = {depth for depth, _ in ours} & {depth for depth, _ in theirs}
    return all(any(depth == shared for depth, _ in ours & theirs) for shared in depths)


def grouped(text: str) -> str:
    """Brackets of plain text as LaTeX: sqrt(...), ^(...); and a product sign between factors in brackets."""
    for opening, command in ((r"\\sqrt\s*\(", r"\sqrt{"), (r"\^\s*\(", "^{")):
        while found := re.search(opening, text):
            depth, place = 1, found.end()
            while place < len(text) and depth:
                depth += {"(": 1, ")": -1}.get(text[place], 0)
                place += 1
            if depth:
                return text
            text = f"{text[: found.start()]}{command}{text[found.end() : place - 1]}}}{text[place:]}"
    text = re.sub(r"\\sqrt\s+(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.^}])(\d+) ?/ ?(\d+)(?= ?(?:\\pi|\\sqrt|[a-zA-Z(]))", r"\\frac{\1}{\2}", text)  # 4/3 r
    return re.sub(r"(?<=[\d)])\s*(?=\()(?!\(\d+\)_)", r"\\cdot ", text)
