"""One record of a prompt file: from plain data to a prompt."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from opd.data.conversations import check_prompt, read_messages
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.text.chat import user_message
from opd.text.tool_calls import check_tools

_CONVERSATIONS = ("prompt", "messages", "conversations")
_KEYS = ("id", *_CONVERSATIONS, "completion", "teacher", "answer", "meta", "tools", "demonstration")
_MISSPELT = 0.82  # how near a key is to a known one that is meant
_NO_TEXT = "opd trains on text alone; remove the key, or the record"
_ELSEWHERE = {  # known elsewhere, and not to be lost in meta
    "system": "write a message of role 'system' that begins the conversation",
    "chat_template_kwargs": "every prompt is rendered alike; remove it",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NO_TEXT),
}

Completion = Literal["answer", "demonstration", "drop"]


@dataclass(frozen=True)
class Read:
    """A prompt; completed: whether its record ended with an assistant's message, which is no part of the prompt."""

    prompt: Prompt
    completed: bool


def read_record(record: Mapping[str, Any], *, task: str, teacher: str | None, completion: Completion | None) -> Read:
    """The prompt of a record of plain text and numbers; `teacher` is used where it names none. Raises DataError."""
    given = {key: value for key, value in record.items() if value is not None or key == "id"}
    meta = _meta(given)
    identity = given.get("id") if "id" in given else _content_id(record)
    if not isinstance(identity, str | int) or isinstance(identity, bool) or not str(identity).strip():
        raise DataError(f"'id' must be a non-empty string, got {identity!r}")
    chosen = given.get("teacher", teacher)
    if not isinstance(chosen, str) or not chosen:
        raise DataError(f'no teacher; add "teacher" to the record or set tasks.{task}.teacher')
    messages, completed = _conversation(given, task, completion)
    answer, demonstration = _answer(given), _demonstration(given)
    if completed and completion == "answer":
        answer = _as_answer(completed, answer)
    elif completed and completion != "drop":
        if demonstration:
            raise DataError("the record has a 'demonstration' and ends with an assistant's message; keep one")
        demonstration = completed
    prompt = Prompt(
        id=f"{task}:{identity}",
        messages=messages,
        teacher=chosen,
        task=task,
        answer=answer,
        meta=MappingProxyType(meta),
        tools=_tools(given),
        demonstration=demonstration,
    )
    return Read(prompt, bool(completed))


def checked(read: Read, where: str, completion: Completion | None) -> Prompt:
    """The prompt of a record, where it is one; raises DataError, which says where, otherwise."""
    roles = [m["role"] for m in read.prompt.messages]
    if completion is None and roles[-1:] == ["assistant"] and len(roles) > 1:
        used = (
            ""
            if read.prompt.messages[-1].get("tool_calls")
            else " ('answer' and 'demonstration' cut it off and use it)"
        )
        raise DataError(
            f"{where}: the last message is the assistant's, and the student would continue after it; set "
            f"tasks.{read.prompt.task}.completion = 'drop' to cut it off{used}, or remove it"
        )
    check_prompt(read.prompt, where)
    return read.prompt


def _meta(given: Mapping[str, Any]) -> dict[str, Any]:
    """The record's meta, with the fields that it has beside the known ones."""
    meta = given.get("meta", {})
    if not isinstance(meta, Mapping):
        raise DataError(f"'meta' must be an object, got {type(meta).__name__}")
    others = {key: value for key, value in given.items() if key not in _KEYS}
    for key in others:
        if key in _ELSEWHERE:
            raise DataError(f"'{key}' is no key of a record; {_ELSEWHERE[key]}")
        if near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=_MISSPELT):
            raise DataError(f"unknown key '{key}'; did you mean '{near[0]}'?; known: {', '.join(_KEYS)}")
        if key in meta:
            raise DataError(f"'{key}' is in the record and in its 'meta'; keep one")
    return {**meta, **others}


def _content_id(record: Mapping[str, Any]) -> str:
    """An id that is a function of what the record holds."""
    content = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _quoted(given: Mapping[str, Any]) -> str:
    return ", ".join(f"'{key:.40}'" for key in list(given)[:8]) or "no key"


def _conversation(
    given: Mapping[str, Any], task: str, completion: Completion | None
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages before the student's turn, and the assistant's that the record has behind them."""
    named = [key for key in _CONVERSATIONS if key in given]
    if len(named) != 1:
        got = f", got {' and '.join(map(repr, named))}" if named else f"; the record has {_quoted(given)}"
        raise DataError(f"give exactly one of 'messages' and 'prompt' (or 'conversations'){got}")
    value = given[named[0]]
    if named[0] == "prompt" and not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"'prompt' is empty or no string: {value!r:.80}")
        messages = user_message(value)
    else:
        messages = read_messages(value, named[0])
    if "completion" in given:
        behind = given["completion"]
        if isinstance(behind, str):
            behind = [{"role": "assistant", "content": behind}]
        return messages, read_messages(behind, "completion")
    ends = messages[-1]["role"] == "assistant" and len(messages) > 1
    if ends and (completion is not None or named[0] == "conversations"):
        return messages[:-1], messages[-1:]
    return messages, ()


def _answer(given: Mapping[str, Any]) -> str | None:
    answer = given.get("answer")
    if answer is None:
        return None
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise DataError(f"'answer' must be a string or a number, got {type(answer).__name__}")
    if not str(answer).strip():
        raise DataError("'answer' is empty; write one, or leave the key out")
    return str(answer)


def _as_answer(completed: tuple[Message, ...], answer: str | None) -> str:
    """The text of the message that a record ends with."""
    if answer is not None:
        raise DataError(
            "the record has an 'answer' and ends with an assistant's message; completion = 'drop' keeps the answer"
        )
    first, *others = completed
    if others or first["role"] != "assistant" or first.get("tool_calls"):
        called = any(message.get("tool_calls") for message in completed)
        other = "'drop'" if called else "'demonstration' or 'drop'"  # no demonstration has a call as data
        raise DataError(f"completion = 'answer' needs one assistant's message with text and no call; use {other}")
    if not first["content"].strip():
        raise DataError("the assistant's message that is to be the answer is empty; write it, or remove it")
    return first["content"]


def _demonstration(given: Mapping[str, Any]) -> tuple[Message, ...]:
    return read_messages(given["demonstration"], "demonstration") if "demonstration" in given else ()


def _tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = given.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"'tools' must be a list of JSON schemas, got {type(tools).__name__}")
    try:
        check_tools(tools)
    except DataError as error:
        raise DataError(f"'tools': {error}") from None
    return tuple(tools)
