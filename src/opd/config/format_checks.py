"""Which format errors are looked for in what the student writes (docs/configuration.md)."""

import re
from typing import Annotated, Literal, TypeAlias

import regex
from pydantic import Field, field_validator, model_validator

from opd.config.node import Node

Rule: TypeAlias = Literal[
    "tool_call",
    "unknown_tool",
    "tool_arguments",
    "dropped_call",
    "tags",
    "code_fence",
    "answer_pattern",
    "truncated",
    "repetition",
    "invalid_utf8",
    "after_answer",
]

_TAG_NAME = re.compile(r"[A-Za-z][\w-]*")
# setting -> the rule that reads it, and what to write where that rule is asked for without it
_READ_BY = {
    "tags": ("tags", "tags = ['think', 'answer'] for <think>...</think><answer>...</answer>"),
    "answer_pattern": ("answer_pattern", r"answer_pattern = 'Answer: \d+', a regular expression"),
    "answer_end": ("after_answer", "answer_end = '</answer>', the text that an answer ends with"),
    "max_repetition": ("repetition", ""),
}


class ChecksConfig(Node):
    """Format errors that are looked for; each rule of `rules` is one (docs/safeguards.md), and none is by default.

    tags: those that the last turn must have, in this order, once each. answer_pattern: what the last turn must have somewhere in
    its last 8,192 characters (Python's `re`; a pattern that backtracks without end, such as (a+)+b, holds up the run).
    answer_end: the text behind which a turn says nothing. max_repetition: the share of 3-grams that may repeat earlier ones.
    """

    rules: list[Rule] = Field(default_factory=list)
    tags: list[str] = Field(default_factory=list)
    answer_pattern: str | None = None
    answer_end: str | None = None
    max_repetition: Annotated[float, Field(gt=0, lt=1)] = 0.7

    @field_validator("rules", "tags")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'{name}' stands {names.count(name)} times; name it once")
        return names

    @field_validator("tags")
    @classmethod
    def _tag_names(cls, tags: list[str]) -> list[str]:
        for tag in tags:
            if not _TAG_NAME.fullmatch(tag):
                raise ValueError(f"'{tag}' is no name of a tag; write it without brackets, such as 'think' for <think>")
        return tags

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            regex.compile(pattern or "")
        except (regex.error, OverflowError, RecursionError) as error:
            raise ValueError(f"answer_pattern is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _rules_and_settings(self) -> "ChecksConfig":
        for setting, (rule, advice) in _READ_BY.items():
            value = getattr(self, setting)
            if rule in self.rules and not value:
                raise ValueError(f"rule '{rule}' needs the setting {setting}: write {advice}, or drop the rule")
            if rule not in self.rules and value != type(self).model_fields[setting].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{setting} belongs to the rule '{rule}': add '{rule}' to rules, or drop {setting}")
        return self
