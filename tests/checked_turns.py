"""Turns to check for format errors, and the settings of every rule."""

from typing import Any, get_args

from call_texts import TOOLS
from hypothesis import settings

from opd.config.tasks import ChecksConfig, Rule
from opd.rewards.format_checks import CheckedTurn
from opd.text.tool_calls import Syntax

thorough = settings(max_examples=200, deadline=None, derandomize=True)
RULES: tuple[Rule, ...] = get_args(Rule)
SETTINGS: dict[str, dict[str, Any]] = {
    "tags": {"tags": ["think", "answer"]},
    "answer_pattern": {"answer_pattern": r"Answer: \d+"},
    "after_answer": {"answer_end": "</answer>"},
}
ALL = ChecksConfig(rules=list(RULES), **{k: v for each in SETTINGS.values() for k, v in each.items()})
WHOLE = "<think>so</think> <answer>3</answer>"


def config(rule: Rule, **changes: Any) -> ChecksConfig:
    return ChecksConfig(rules=[rule], **(SETTINGS.get(rule, {}) | changes))


def turn_of(
    text: str | bytes,
    checks: ChecksConfig = ALL,
    *,
    last: bool = True,
    cut: bool = False,
    syntax: Syntax = "hermes",
    opened: str = "",
) -> CheckedTurn:
    raw = text if isinstance(text, bytes) else text.encode()
    return CheckedTurn(raw.decode(errors="replace"), TOOLS, syntax, last, cut, raw, checks, opened)
