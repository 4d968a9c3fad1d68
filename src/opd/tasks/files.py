"""Prompts from JSONL files, checked line by line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opd.config import FileTask, nearest
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.tasks.demonstrate import recorded_turn
from opd.tasks.verify import VERIFIERS, is_number
from opd.text.chat import user_message
from opd.text.tool_calls import check_tools

_KEYS = ("id", "messages", "prompt", "teacher", "answer", "meta", "tools", "demonstration")
_DEMONSTRATION = "demonstration"
_ROLES = ("system", "user", "assistant", "tool")


class PromptFile:
    """A task read from one JSONL file a split; ids are unique within the task."""

    def __init__(self, name: str, config: FileTask) -> None:
        self.name = name
        self._config = config
        self._verify = VERIFIERS[config.verifier]

    def prompts(self, split: str) -> list[Prompt]:
        path = self._config.path if split == "train" else self._config.held_out_path
        found = [] if path is None else read_prompts(path, task=self.name, teacher=self._config.teacher)
        for prompt in found:
            if self._config.verifier == "number" and prompt.answer is not None and not is_number(prompt.answer):
                raise DataError(
                    f"{path}: prompt '{prompt.id}': answer {prompt.answer!r} is no number; correct it, or choose another "
                    f"verifier (tasks.{self.name}.verifier = 'number')"
                )
        return found

    def reward(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._verify(response, prompt.answer)

    def grade(self, prompt: Prompt, response: str) -> float | None:
        grader = self._config.grader
        return None if prompt.answer is None else VERIFIERS[grader or self._config.verifier](response, prompt.answer)

    def environment(self, prompt: Prompt) -> None:
        """None: a file has no environment; training on a prompt with tools needs one of the user's."""

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        if not prompt.demonstration:
            return prompt.answer
        return recorded_turn(prompt.demonstration, len(messages) - len(prompt.messages))


def read_prompts(path: str | Path, *, task: str, teacher: str | None = None) -> list[Prompt]:
    """The prompts of a JSONL file; `teacher` is used where a record names none.

    Raises DataError naming file and line: broken JSON, unknown or missing keys, an empty prompt, a repeated id.
    """
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"prompt file '{path}' does not exist (tasks.{task}.path)") from None
    except IsADirectoryError:
        raise DataError(f"prompt file '{path}' is a folder; name a .jsonl file (tasks.{task}.path)") from None
    except OSError as error:
        raise DataError(f"prompt file '{path}' cannot be read: {error.strerror} (tasks.{task}.path)") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8: {error.reason}") from None
    lines: dict[str, int] = {}
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompt = _parse(line, where, task, teacher)
        if prompt.id in lines:
            raise DataError(f"{where}: id '{prompt.id}' was used on line {lines[prompt.id]}; ids must be unique")
        lines[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no prompts; expected one JSON record a line")
    return prompts


def _parse(line: str, where: str, task: str, teacher: str | None) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise DataError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for key in record:
        if key not in _KEYS:
            raise DataError(f"{where}: unknown key '{key}'{nearest(key, _KEYS)}; known: {', '.join(_KEYS)}")
    identity = record.get("id")
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f"{where}: 'id' must be a non-empty string, got {identity!r}")
    chosen = record.get("teacher", teacher)
    if not isinstance(chosen, str):
        raise DataError(f'{where}: no teacher; add "teacher" to the record or set tasks.{task}.teacher')
    answer, meta, tools = record.get("answer"), record.get("meta", {}), record.get("tools", [])
    if answer is not None and (not isinstance(answer, str | int | float) or isinstance(answer, bool)):
        raise DataError(f"{where}: 'answer' must be a string or a number, got {type(answer).__name__}")
    if not isinstance(meta, Mapping):
        raise DataError(f"{where}: 'meta' must be an object, got {type(meta).__name__}")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of JSON schemas, got {type(tools).__name__}")
    try:
        check_tools(tools)
    except DataError as error:
        raise DataError(f"{where}: 'tools': {error}") from None
    demonstration = _demonstration(record[_DEMONSTRATION], where) if _DEMONSTRATION in record else ()
    return Prompt(
        id=f"{task}:{identity}",
        messages=_messages(record, where),
        teacher=chosen,
        task=task,
        answer=None if answer is None else str(answer),
        meta=MappingProxyType(dict(meta)),
        tools=tuple(tools),
        demonstration=demonstration,
    )


def _messages(record: dict[str, Any], where: str) -> tuple[Message, ...]:
    if ("messages" in record) == ("prompt" in record):
        raise DataError(f"{where}: give exactly one of 'messages' and 'prompt'")
    if "prompt" in record:
        text = record["prompt"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: 'prompt' is empty or no string: {text!r}")
        return user_message(text)
    messages = _conversation(record["messages"], "messages", where)
    if not any(m["content"].strip() for m in messages):
        raise DataError(f"{where}: every message is empty")
    return messages


def _demonstration(messages: Any, where: str) -> tuple[Message, ...]:
    """The student's turns and what its environment said in between: begins and ends with the student's."""
    found = _conversation(messages, _DEMONSTRATION, where)
    if found[0]["role"] != "assistant" or found[-1]["role"] != "assistant":
        raise DataError(f"{where}: '{_DEMONSTRATION}' must begin and end with a message of role 'assistant'")
    return found


def _conversation(messages: Any, key: str, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: '{key}' must be a non-empty list, got {messages!r}")
    for i, message in enumerate(messages):
        good = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in _ROLES
        if not good or set(message) - {"role", "content"}:
            raise DataError(
                f"{where}: {key}[{i}] needs 'role' (one of {', '.join(_ROLES)}), a string 'content', and nothing else; a "
                "call is written into the content, as episodes.tool_syntax has it"
            )
    return tuple(MappingProxyType({"role": m["role"], "content": m["content"]}) for m in messages)
