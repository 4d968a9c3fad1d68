"""Limits of what happens between the student's turns (docs/configuration.md)."""

from typing import Annotated, Literal

from pydantic import Field

from opd.config.node import Node, Positive


class EpisodesConfig(Node):
    """Episodes of several turns: at most `max_turns` of the student, `max_concurrent` environments at once, each of which
    answers within `step_timeout_s` seconds and says no more than `max_observation_chars` characters a message.

    A tool answers within `tool_timeout_s`, and all of one turn's within 0.8 of `step_timeout_s`. tool_syntax: how the student
    writes a call; "hermes" is <tool_call>{...}</tool_call>, "json" a message that is one JSON object.
    """

    max_turns: Positive = 8
    max_concurrent: Positive = 64
    step_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    tool_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_observation_chars: Positive = 4000
    tool_syntax: Literal["hermes", "json"] = "hermes"
