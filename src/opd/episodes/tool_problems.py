"""Generated problems that need a tool, with their solutions: sums and a calculator, codes and a table to look them up in."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from opd.config import EpisodesConfig, ToolTask
from opd.data.generated import GeneratedPrompts
from opd.episodes.tools import Tool, ToolEnvironment
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.verifiers import exact
from opd.text.chat import user_message

_WORDS = """
apple anchor arrow badge basin beach bell bird board boat book bottle branch bread brick bridge brush bucket
button cabin cable camel candle canyon carpet castle chain chair cherry circle cliff clock cloud coast coffee
compass copper corner cotton cradle crown dagger desert diamond dragon drum eagle engine falcon feather fence
field flag flame flute forest fountain garden ginger glass globe glove grape hammer harbor hat hill honey
horse island ivory jacket jungle kettle key kite ladder lake lamp leaf lemon lion magnet maple marble meadow
melon mirror moon mountain needle ocean olive onion orange orchard otter owl palace paper pearl pencil pepper
piano pilot planet pond pumpkin rabbit raven river rocket rope saddle salt sand shell shield ship silver snow
spider spoon star stone storm sugar table temple thunder tiger tower train tulip turtle valley violin wagon
walnut whale wheel willow window wolf
"""
_KEYS = tuple(_WORDS.split())
_DRAWS_PER_PROBLEM = 50
_MAX_CHARS, _MAX_DEPTH, _MAX_BITS = 500, 30, 1000  # of an expression; of the numerator and denominator of a value
_TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+|[-+*/()])")


def _schema(argument: str) -> Mapping[str, Any]:
    """The schema of a tool that takes one text."""
    properties = {argument: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}


def calculate(expression: str) -> str:
    """The exact value of numbers, + - * / and brackets: an integer, or a decimal rounded to six places. Nothing runs as code.

    Raises ValueError for text that is no such expression, and for one that is too long, too deep or too large.
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


def _lookup(problem: Mapping[str, Any]) -> Tool:
    table = problem.get("table", {})

    def find(key: str) -> str:
        if key not in table:
            raise ValueError(f"no entry {key[:40]!a}")
        return table[key]

    return Tool("lookup", "Find a code in the table.", _schema("key"), find)


def _draw_sum(draw: random.Random) -> tuple[str, str, Mapping[str, Any]]:
    """A question, its answer, and meta with the arguments of the tool call that solves it."""
    numbers = [draw.randint(11, 99) for _ in range(3)]
    first, second = draw.choice(("*", "+", "-")), draw.choice(("+", "-"))
    text = f"{numbers[0]} {first} {numbers[1]} {second} {numbers[2]}"
    return f"What is {text}?", calculate(text), {"arguments": {"expression": text}}


def _draw_code(draw: random.Random) -> tuple[str, str, Mapping[str, Any]]:
    """The same for a random code in a table; random, so that the student cannot memorise it."""
    keys = draw.sample(_KEYS, 4)
    codes = [str(draw.randint(1000, 9999)) for _ in keys]
    table = dict(zip(keys, codes, strict=True))
    return f"What is the code of {keys[0]}?", codes[0], {"table": table, "arguments": {"key": keys[0]}}


_CALCULATOR = Tool("calculator", "Evaluate arithmetic.", _schema("expression"), calculate)
_TOOLS: Mapping[str, Callable[[Mapping[str, Any]], Tool]] = {
    "calculator": lambda problem: _CALCULATOR,
    "lookup": _lookup,
}
_DRAWS = {"calculator": _draw_sum, "lookup": _draw_code}


class ToolProblems(GeneratedPrompts):
    """A task of generated problems with one tool, which solves each; held-out problems are never trained on."""

    _config: ToolTask

    def __init__(self, name: str, config: ToolTask, limits: EpisodesConfig) -> None:
        super().__init__(name, config)
        self._limits = limits

    def reward(self, prompt: Prompt, response: str) -> float | None:
        """1 where the response, without its thoughts and the white space around it, is the answer."""
        return exact(response, prompt.answer or "")

    def environment(self, prompt: Prompt) -> ToolEnvironment:
        tool = _TOOLS[self._config.problems](prompt.meta)
        return ToolEnvironment([tool], lambda response: self.reward(prompt, response), self._limits)

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        """The correct next turn of the student: the call, then the result of the tool."""
        if messages[-1]["role"] == "tool":
            return messages[-1]["content"]
        name = _TOOLS[self._config.problems](prompt.meta).name
        return "<tool_call>" + json.dumps({"name": name, "arguments": prompt.meta["arguments"]}) + "</tool_call>"

    def draw(self, count: int) -> list[Prompt]:
        config = self._config
        draw = random.Random(f"{config.problems}:{config.seed}")
        found: dict[tuple[str, str], Prompt] = {}
        for index in range(_DRAWS_PER_PROBLEM * count):
            question, answer, meta = _DRAWS[config.problems](draw)
            found.setdefault(
                (question, answer),
                Prompt(
                    id=f"{self.name}:{index}",
                    messages=user_message(question),
                    teacher=config.teacher,
                    task=self.name,
                    answer=answer,
                    meta=MappingProxyType(dict(meta)),
                    tools=(_TOOLS[config.problems](meta).schema,),
                ),
            )
            if len(found) == count:
                break
        else:
            raise DataError(
                f"tasks.{self.name}: found {len(found)} distinct problems, expected {count}; lower size + held_out_size"
            )
        return list(found.values())
