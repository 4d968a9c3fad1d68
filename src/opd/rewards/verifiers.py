r"""A verifier compares a response with the reference answer of its prompt. The reward is 1 or 0.

| `verifier` | the reward is 1 if |
| --- | --- |
| `exact` | the response is the answer, apart from white space around both |
| `number` | the last number of the response is the answer; `1,024.0` is `1024` |
| `math` | the answer that the response states has the value of the reference |
| `none` | never: there is no verdict, and no reward trains on the response |

Every verifier, and the scoring of reasoning-gym, reads the text after the last closing tag of a thought. A response with an
unclosed thought has reward 0, also if the generation prompt opened the thought. opd knows the tags `<think>`, `<thinking>`,
`<thought>`, `<reasoning>`, `[THINK]`, `<|START_THINKING|>`, `<|begin_of_thought|>`, `<seed:think>`, `<longcat_think>`,
`<|inner_prefix|>` and `◁think▷`, and the channels `analysis` and `final` of gpt-oss. A reward function in Python gets the whole
response.

At the start opd reads all reference answers. It refuses, by file and line, an answer that the verifier cannot compare with: an
empty one, a text with `number`, and one that `math` does not understand completely. The `answer` column of GSM8K is such a text:
keep the number after `####`.

The rules of `math`:

- It takes the last `\boxed{...}` of the response, with the boxes that ",", "and" or "or" join to it. Without a box it takes the
  text after "the answer is", and else the last mathematics of the text.
- It reads a box, and a response that is one answer, as a whole.
- It reads an answer completely or not at all. A part of a right answer has reward 0: `3` for `3\sqrt{13}`, or one of two
  solutions.
- In prose it takes a number by its place: `So I bought 12 apples and 20 pears` states 20. It takes no number from `1 out of 2`,
  `3 of 4`, `1 in 6`, a date (`June 20`), a reference (`see step 2`), or `5 apples and 3 pears` after "the answer is".
- Prose stays ambiguous: `Room 5` and `at least 5` state 5, and `3 to 1` states 1. Ask for `\boxed{...}` in the prompt.
- A single capital letter as the reference is a choice: `C`, `(C)`, `C.`, `Option C` and `C) 12` state `C`. `C) 12` also states
  12. Two choices in one answer state none.
- A set, a tuple and an interval are different answers: `\{1,2\}`, `(1,2)` and `[1,2]`. A list without brackets, `1,2`, equals
  the set and the tuple. `(1,2)` may be the pair or the open interval.
- The letter `i` is the imaginary unit: `e^{i\pi}` equals `-1`.
- The response may leave out a unit, and a name before "=". Two different units are two answers.
- `50\%` equals `0.5`, and `15 + 9` equals `24`. `0.333333` equals `\frac{1}{3}`: decimal places beyond the sixth do not count.
- It runs in a process of its own. A response that takes longer than 20 s, or 5 s for one step, has reward 0;
  `verifier/timeouts/sum` counts these.
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
