"""Finding the answer in a response: the last box, the text after "the answer is", or the last mathematics of the text."""

import re
from collections.abc import Iterator

from opd.rewards.math_text import MONTH, SCALES, TEXT, closing_brace
from opd.rewards.math_values import read_value

_BOX = re.compile(r"\\f?boxed\s*(\{)?|\\fbox\s*(\{)?")
_BETWEEN = re.compile(
    r"[\s$.]*(?:,|;|\band\b|\bor\b|\\(?:text|mathrm)\{\s*(?:and|or)\s*\}|\\quad|\\\)|\\\(|[\s$])*[\s$]*"
)
_ANCHOR = re.compile(r"(?i)\banswer\b[^.\n$\\]{0,60}?(?:\bis\b|:|=)[\s*:]*")
_EMPHASIS = re.compile(
    r"(?<![\w)\]*])\*\*(?=[^\s*])([^*\n]+)(?<=\S)\*\*(?![\w(*])"  # no power: 2**3
    r"|(?<![\w)\]*])\*(?=[^\s*])([^*\n]+)(?<=\S)\*(?![\w(*])"
)
_NEGATIVE = re.compile(r"(?i)(?:\bminus|\bnegative)\s*$")
_OTHER = re.compile(r"(?i)(?:\bnot|(?:less|fewer|more|greater|smaller|larger) than)\s*$")
_MATH = (
    r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<!\\)\$[^$\n]+?(?<!\\)\$(?!\d)"  # delimited
    r"|\\begin\{(?P<env>\w+)\}.+?\\end\{(?P=env)\}"
    r"|\\[A-Za-z]+(?:\s*\[[^\[\]]*\])?(?:\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*|\\[{}%$,;!]"  # a command, and what it takes
    r"|\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
    r"|(?<![A-Za-z])(?:sqrt|sin|cos|tan|log|ln|exp|pi|infinity|percent|degrees?)(?![A-Za-z])"
    rf"|(?<=\d )(?:{'|'.join(SCALES)})(?![A-Za-z])"
    r"|(?<![A-Za-z'])(?!(?:[aAI])(?=\s|$)(?!\s*[-+*/^=<>]))[A-Za-z](?![A-Za-z'])"
    r"|[-\u2212+*/^=<>()\[\]{}|!,;_&%:\u00b0\u221a\u03c0\u221e\u2264\u2265\u2260\u00b1\u00d7\u00b7\u00f7\u222a\u2208\u00b2\u00b3\u00bd\u00bc\u00be\u20ac\u00a3]"
)
_RUN = re.compile(
    rf"(?:{_MATH})(?:[ \t]*(?:,?[ \t]*\b(?:and|or)\b[ \t]*)?(?:{_MATH.replace('env', 'next')}))*", re.DOTALL
)
_NAMED = re.compile(
    rf"(?<![\w{{]){MONTH}\.?\s+\d{{1,2}}(?:st|nd|rd|th)?\b(?:,?\s+\d{{4}}\b)?"  # a date
    rf"|(?<![\w{{.,])\d{{1,2}}(?:st|nd|rd|th)?(?:\s+of)?\s+{MONTH}(?:,?\s+\d{{4}}\b)?"
    r"|(?:\b(?:Step|Case|Equation|Example|Figure|Theorem|Lemma|Method)"
    r"|(?:(?<=in )|(?<=In )|(?<=by )|(?<=By )|(?<=see )|(?<=from )|(?<=From ))(?:step|equation|figure|theorem|lemma|method))"
    r"\s+\(?\d+(?:\.\d+)*\b\)?[.:]?"  # no "in this case 12"
)
_PART_OF = re.compile(r"(?i)\bout of\s+(?:the\s+)?$|\d\$?\s+(?:of|in|per|by|over)\s+(?:the\s+)?$")
_WITH_MORE = re.compile(
    r"(?i)(?:\s+[a-z]+){0,2}?\s+out of\b|\s+of\s+(?:the\s+)?\$?\d"
    r"|\s+(?:in|per|by|over)\s+\$?\d[\d.,]*(?!\S*\s+[a-z])"  # no "in 3 days"
    r"|(?:\s+[a-z]+){0,3}?,?\s+(?:and|or)\s+(?:[a-z]+\s+)?\$?\d"
)
_CHOICE = re.compile(r"(?:(?i:option|choice)\s+)?(?:\(([A-Z])\)|([A-Z])(?:\)|[.:](?!\S)|$))[.:]?\s*(.*)", re.DOTALL)
_OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[B-HJ-Z]|[A-Z](?=[).:]))(?![A-Za-z])")
_BULLET = re.compile(r"^[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+", re.MULTILINE)
_EDGES = ",;: \t"


def stated_answer(response: str) -> str | None:
    """The text of the answer that a response states; None where it states none.

    The last box counts, and with it those before it that a comma, "and" or "or" joins to it. Without a box, what follows the last
    "answer is"; without that the whole response where it is one answer, or else the last mathematics in it.
    """
    response = _EMPHASIS.sub(lambda m: m[1] or m[2], response)
    if _BOX.search(response):
        return _boxed(response)
    anchored = _anchored(response)
    if anchored is not None:
        first = re.split(r"\n|(?<=\S)[.](?=\s|$)", anchored, maxsplit=1)[0]
        if read_value(first) is not None:
            return first
        return next(iter(_runs(anchored)), first)
    if "\n" not in response.strip() and read_value(response) is not None:
        return response
    found = list(_runs(_BULLET.sub("", response)))
    return found[-1] if found else None


def says(response: str, answer: str) -> bool:
    """Whether what a response states, or the whole of it, is an answer of words and numbers ("June 20") in the same letters."""
    response = _EMPHASIS.sub(lambda m: m[1] or m[2], response)
    stated = _boxed(response) if _BOX.search(response) else _anchored(response) or response
    return stated is not None and _letters(stated) == _letters(answer)


def choice(response: str) -> tuple[str, str] | None:
    """The letter and the text of the choice that a response states, as in "(C)" and "C) 12"; None for none, and for several."""
    response = _EMPHASIS.sub(lambda m: m[1] or m[2], response)
    if _BOX.search(response):
        stated = _boxed(response) or ""
    else:
        stated = (_anchored(response) or "").split("\n")[0] or response.strip().rpartition("\n")[2]
    plain = re.sub(r"\\[ ,;:!]|\\q?quad|[~$]", " ", TEXT.sub(r" \1 ", stated)).strip()
    found = _CHOICE.fullmatch(plain)
    return (found[1] or found[2], found[3]) if found and not _OTHER_CHOICE.search(found[3]) else None


def _letters(text: str) -> str:
    return " ".join(TEXT.sub(r"\1", text).replace("$", "").casefold().rstrip(" .").split())


def _anchored(response: str) -> str | None:
    """The text behind the last "answer is"."""
    anchors = list(_ANCHOR.finditer(response))
    return response[anchors[-1].end() :].strip() or None if anchors else None


def _boxed(response: str) -> str | None:
    """The content of the last box and of those that are joined to it; None where one is empty or not closed."""
    boxes: list[tuple[int, int, str]] = []  # of the outermost ones: where they start and end, and what is in them
    for found in _BOX.finditer(response):
        if boxes and found.start() < boxes[-1][1]:
            continue
        opening = found.start(1) if found[1] else found.start(2)
        end = closing_brace(response, opening) if opening >= 0 else -1
        if opening < 0:  # \boxed 5
            word = re.match(r"\S+", response[found.end() :])
            boxes.append((found.start(), found.end() + (word.end() if word else 0), word[0] if word else ""))
        elif end < 0:
            return None
        else:
            boxes.append((found.start(), end + 1, response[opening + 1 : end]))
    joined = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = response[end:start]
        if not _BETWEEN.fullmatch(between):
            break
        if content.strip() != joined[0].strip():
            joined.insert(0, content)
    if not all(part.strip() for part in joined):
        return None
    sign = re.match(r"\s*(?:\\?%|percent\b)", response[boxes[-1][1] :])
    return ",".join(joined) + (r"\%" if sign else "")


def _runs(text: str) -> Iterator[str]:
    """The stretches of mathematics in a text, in order: those with a number, a command or more than a letter."""
    text = _NAMED.sub(" that ", text)
    for found in _RUN.finditer(text):
        run = found[0].lstrip(_EDGES + "=").rstrip(_EDGES)  # what "15 + 9 = A book" says is none of the run's
        run = run.rstrip("([{").strip(_EDGES) if run.count("(") > run.count(")") else run
        run = run.lstrip(")]}").strip(_EDGES) if run.count(")") > run.count("(") and run.startswith(")") else run
        while run.endswith(")") and run.count(")") > run.count("("):
            run = run[:-1].strip(_EDGES)
        if re.search(r"\d|\\[A-Za-z]|[A-Za-z]\s*[-+*/^=<>]|[\u00bd\u00bc\u00be\u03c0\u221e]|\$", run):
            before = text[max(0, found.start() - 40) : found.start()]
            if _OTHER.search(before) or _PART_OF.search(before) or _WITH_MORE.match(text, found.end()):
                run = ""  # what it names is not the answer, or not all of it
            yield f"-{run}" if _NEGATIVE.search(before) and run[:1].isdigit() else run
