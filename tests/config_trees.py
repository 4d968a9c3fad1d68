"""The smallest recipe as plain data, a change of it, and the message of what is wrong with one."""

import copy
from typing import Any

import pytest

from opd.config import Config, parse_config
from opd.errors import ConfigError


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest recipe, with one file task and one generated task; `changes` are whole top-level keys."""
    base: dict[str, Any] = {
        "student": "some/model",
        "output": "runs/x",
        "teachers": {"even": {"model": "some/teacher"}, "odd": {"adapter": "some/adapter"}},
        "tasks": {
            "words": {"type": "file", "path": "words.jsonl", "teacher": "even"},
            "sums": {"type": "reasoning_gym", "dataset": "basic_arithmetic", "teacher": "odd"},
        },
    }
    return copy.deepcopy(base | changes)


def put(dotted: str, value: Any) -> dict[str, Any]:
    """The smallest recipe with one value put at a dotted key."""
    whole = tree()
    *tables, leaf = dotted.split(".")
    node = whole
    for name in tables:
        node = node.setdefault(name, {})
    node[leaf] = value
    return whole


def fault(data: dict[str, Any], kind: Any = Config) -> str:
    """The message of the ConfigError that this tree raises; always one line."""
    with pytest.raises(ConfigError) as caught:
        parse_config(data, kind=kind)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("config: ")
    return message.removeprefix("config: ")
