"""Units of mathematical answers, before or after a number."""

import re

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
    """What a unit multiplies its number with, as "million" does, and the rest of the unit."""
    first, _, rest = unit.partition(" ")
    return (SCALES[first], rest) if first in SCALES else (1, unit)
