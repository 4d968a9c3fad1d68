"""Prompts are records: lines of JSON Lines, items of one JSON array, rows of CSV or Parquet, or dicts in Python.

CSV has a header. Parquet needs `pip install 'opd[datasets]'`. Text is UTF-8. A record has one of these forms:

    {"id": "p17", "prompt": "What is 2 + 2?", "teacher": "sums", "answer": "4", "meta": {}}
    {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}]}
    {"prompt": [{"role": "user", "content": "..."}], "completion": [{"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}

| key of a record | meaning |
| --- | --- |
| `prompt`, `messages` or `conversations` | exactly one: the user's text, or a list of messages |
| `id` | a text or an integer, unique in its file; by default made from the record's content |
| `teacher` | the prompt's teacher, in place of `tasks.NAME.teacher` |
| `answer` | the reference answer of the verifier: the final answer alone |
| `completion` | the assistant's answer to the prompt, as text or messages (TRL) |
| `tools` | JSON schemas of the tools that the student may call |
| `demonstration` | the messages after the prompt, for `opd sft` |
| `meta` | any table, kept as `prompt.meta` for a reward of your own |

opd puts other keys, such as `solution`, into `prompt.meta` too. It refuses keys that look like a misspelt key, images, sound
and `chat_template_kwargs`.

A conversation has an optional system message, then turns of `user`, `assistant` and `tool`. The last message is a user's or a
tool's, and the student answers it; `tasks.NAME.completion` says what to do with an assistant's message at the end. Earlier
messages of the assistant may have `tool_calls`, with arguments as an object or as its JSON text. Each model reads these calls as
its own chat template writes them. A template without tool calls gets them as text between `<tool_call>` tags.

opd refuses half of a character (a lone surrogate), a repeated key or id, NaN, a message in a place where it cannot be, and a
column of `columns` that no record has. The error names file, line (or row) and field. These rules hold for every type of task,
and for the first messages of an environment.

At the start opd warns of data without effect: more prompts in a step than the task has, held-out prompts that are training prompts
too, answers with `verifier = "none"`, a verifier without answers, and an unused grader.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from opd.config import nearest
from opd.data.conversations import check_prompt, read_messages
from opd.data.rows import Rows, rows_of_file, rows_of_records
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.verifiers import reference_fault
from opd.text.tool_calls import check_tools

_CONVERSATIONS = ("prompt", "messages", "conversations")
_KEYS = ("id", *_CONVERSATIONS, "completion", "teacher", "answer", "meta", "tools", "demonstration")
_MISSPELT = 0.82  # how similar a misspelt key is to a known one
_NO_TEXT = "opd trains on text alone; remove the key, or the record"
_ELSEWHERE = {  # keys that other trainers know, and that must not be lost in meta
    "system": "write a message of role 'system' that begins the conversation",
    "chat_template_kwargs": "every prompt is rendered alike; remove it",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NO_TEXT),
}

Completion = Literal["answer", "demonstration", "drop"]


def read_prompts(
    path: str | Path,
    *,
    task: str,
    teacher: str | None = None,
    columns: Mapping[str, str] | None = None,
    completion: Completion | None = None,
    verifiers: Sequence[str] = (),
    key: str = "path",
) -> list[Prompt]:
    """The prompts of a file of JSON lines, of one JSON array, of CSV or of Parquet (needs the extra `datasets`).

    teacher: for the records that name none; columns, completion: as in `FileTask`. verifiers: the names of those that will compare
    with the answers. key: the key of the task that names the file. A record without an id gets one that is made from its content;
    the second of two equal ones gets a number.

    Raises DataError that names file and line, row or record: a record that is no prompt, an answer that a verifier cannot compare
    with, a repeated id, and a column that no record has.
    """
    columns = columns or {}
    reading = _Reading(str(path), task, teacher, columns, completion, verifiers, setting=f"tasks.{task}.")
    return reading.prompts(rows_of_file(path, f"tasks.{task}.{key}"))


def read_prompts_from(
    records: Any,
    *,
    task: str,
    teacher: str | None = None,
    columns: Mapping[str, str] | None = None,
    completion: Completion | None = None,
    verifiers: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of an iterable, read and checked as those of a file (`read_prompts`).

    records: dicts in any form that a file may have (TRL's and ShareGPT's too), texts, `Prompt` objects of this task, a
    `datasets.Dataset` or a pyarrow table. Values of numpy, torch and pyarrow become plain ones; other fields become `meta`.

        read_prompts_from([{"question": "2 + 2?", "answer": 4}], task="sums", teacher="t", columns={"prompt": "question"})

    Raises DataError that names the record: "prompts[17]: ...".
    """
    reading = _Reading("prompts", task, teacher, columns or {}, completion, verifiers)
    return reading.prompts(rows_of_records(records))


@dataclass(frozen=True)
class _Reading:
    """Makes prompts of a task from the records of a source. setting: the beginning of the names of settings in errors."""

    source: str
    task: str
    teacher: str | None
    columns: Mapping[str, str]
    completion: Completion | None
    verifiers: Sequence[str]
    setting: str = ""

    def prompts(self, rows: Rows) -> list[Prompt]:
        """The prompts of all rows, with unique ids; raises DataError."""
        items = list(rows)
        self._require_columns([record for _, record in items if not isinstance(record, Prompt)])
        places: dict[str, str] = {}
        prompts: list[Prompt] = []
        completed = False
        for where, record in items:
            try:
                prompt, ended = self._prompt(record)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            check_prompt(prompt, where)
            completed |= ended
            if not isinstance(record, Prompt) and "id" not in record and self.columns.get("id") not in record:
                prompt = _numbered(prompt, places)
            if prompt.id in places:
                first = places[prompt.id].removeprefix(f"{self.source}, ")
                raise DataError(f"{where}: id '{prompt.id}' was used in {first}; ids must be unique")
            places[prompt.id] = where
            self._require_comparable(prompt, where)
            prompts.append(prompt)
        if not prompts:
            raise DataError(f"{self.source}: no prompts; expected at least one record")
        if self.completion is not None and not completed:
            raise DataError(
                f"{self.source}: no record ends with an assistant's message, so {self.setting}completion = "
                f"'{self.completion}' has no effect; remove the key"
            )
        return prompts

    def _require_columns(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raise DataError where `columns` maps to an unknown key, or from a column that no record has."""
        for key, column in self.columns.items():
            name = f"{self.setting}columns.{key}"
            if key not in _KEYS:
                raise DataError(
                    f"{name}: '{key}' is no key of a record{nearest(key, _KEYS)}; known: {', '.join(_KEYS)}"
                )
            if not any(column in record for record in records):
                known = list(records[0]) if records else []
                has = f"; the first record has {_quoted(known)}" if records else ""
                raise DataError(f"{self.source}: no record has '{column}' ({name}){nearest(column, known) or has}")

    def _prompt(self, record: Mapping[str, Any] | Prompt) -> tuple[Prompt, bool]:
        """The prompt, and whether an assistant's message followed it in the record; raises DataError."""
        if isinstance(record, Prompt):
            if record.task != self.task:
                raise DataError(f"prompt '{record.id}' is of the task '{record.task}', expected '{self.task}'")
            return record, False
        record, displaced = _renamed(record, self.columns)
        given = {key: value for key, value in record.items() if value is not None or key == "id"}
        meta = _meta(given, displaced)
        identity = given.get("id") if "id" in given else _content_id(record)
        if not isinstance(identity, str | int) or isinstance(identity, bool) or not str(identity).strip():
            raise DataError(f"'id' must be a non-empty string, got {identity!r}")
        teacher = given.get("teacher", self.teacher)
        if not isinstance(teacher, str) or not teacher:
            raise DataError(f'no teacher; add "teacher" to the record or set {self.setting}teacher')
        messages, completed = _conversation(given, self.completion, self.setting)
        self._require_turn(messages)
        answer = _answer(given)
        demonstration = read_messages(given["demonstration"], "demonstration") if "demonstration" in given else ()
        if completed and self.completion == "answer":
            answer = _as_answer(completed, answer)
        elif completed and self.completion != "drop":
            if demonstration:
                raise DataError("the record has a 'demonstration' and ends with an assistant's message; keep one")
            demonstration = completed
        prompt = Prompt(
            id=f"{self.task}:{identity}",
            messages=messages,
            teacher=teacher,
            task=self.task,
            answer=answer,
            meta=MappingProxyType(meta),
            tools=_tools(given),
            demonstration=demonstration,
        )
        return prompt, bool(completed)

    def _require_turn(self, messages: Sequence[Message]) -> None:
        """Raise DataError where the last of several messages is the assistant's, and `completion` is not set."""
        if self.completion is None and messages[-1]["role"] == "assistant" and len(messages) > 1:
            used = " ('answer' and 'demonstration' cut it off and use it)"
            raise DataError(
                f"the last message is the assistant's, and the student would continue after it; set {self.setting}completion = "
                f"'drop' to cut it off{'' if messages[-1].get('tool_calls') else used}, or remove it"
            )

    def _require_comparable(self, prompt: Prompt, where: str) -> None:
        """Raise DataError for an answer that one of the verifiers cannot compare with."""
        for verifier in self.verifiers if prompt.answer is not None else ():
            if fault := reference_fault(verifier, prompt.answer or ""):
                raise DataError(
                    f"{where}: prompt '{prompt.id}': answer {prompt.answer!r:.80} {fault}; write the answer alone, or choose "
                    f"another verifier ({self.setting}verifier or .grader = '{verifier}')"
                )


def _numbered(prompt: Prompt, taken: Mapping[str, str]) -> Prompt:
    """The prompt with an id that is not taken."""
    times = 1
    while (identity := prompt.id if times == 1 else f"{prompt.id}-{times}") in taken:
        times += 1
    return replace(prompt, id=identity)


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The record with its columns under the keys that they are mapped to, and the fields that these displace.

    A column displaces a field that has its key; a conversation displaces every other conversation.
    """
    found = {key: record[column] for key, column in columns.items() if column in record}
    others = {key: value for key, value in record.items() if key not in columns.values()}
    taken = {*found, *(_CONVERSATIONS if any(key in found for key in _CONVERSATIONS) else ())}
    displaced = {key: value for key, value in others.items() if key in taken}
    return {key: value for key, value in others.items() if key not in taken} | found, displaced


def _meta(given: Mapping[str, Any], displaced: Mapping[str, Any]) -> dict[str, Any]:
    """The record's meta, with its fields of other keys and those that a mapped column displaced."""
    meta = given.get("meta", {})
    if not isinstance(meta, Mapping):
        raise DataError(f"'meta' must be an object, got {type(meta).__name__}")
    others = {key: value for key, value in given.items() if key not in _KEYS}
    for key in others:
        if key in _ELSEWHERE:
            raise DataError(f"'{key}' is no key of a record; {_ELSEWHERE[key]}")
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=_MISSPELT)
        if near and near[0] not in given:
            raise DataError(f"unknown key '{key}'; did you mean '{near[0]}'?; known: {', '.join(_KEYS)}")
    others |= {key: value for key, value in displaced.items() if value is not None}
    if both := [key for key in others if key in meta]:
        raise DataError(f"'{both[0]}' is in the record and in its 'meta'; keep one")
    return {**meta, **others}


def _content_id(record: Mapping[str, Any]) -> str:
    """An id that is a function of the record's content."""
    content = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key:.40}'" for key in list(keys)[:8]) or "no key"


def _conversation(
    given: Mapping[str, Any], completion: Completion | None, setting: str
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages before the student's turn, and the assistant's messages that follow them in the record."""
    named = [key for key in _CONVERSATIONS if key in given]
    if len(named) != 1:
        raise DataError(
            f"give exactly one of 'messages' and 'prompt' (or 'conversations'), or choose a column of yours "
            f"({setting}columns.prompt); the record has {_quoted(named or given)}"
        )
    value = given[named[0]]
    if named[0] == "prompt" and not (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"'prompt' is empty or no string: {value!r:.80}")
        messages: tuple[Message, ...] = ({"role": "user", "content": value},)
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
    """The text of the message at the end of a record."""
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
        raise DataError("the assistant's message, which becomes the answer, is empty; write it, or remove it")
    return first["content"]


def _tools(given: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools = given.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"'tools' must be a list of JSON schemas, got {type(tools).__name__}")
    try:
        check_tools(tools)
    except DataError as error:
        raise DataError(f"'tools': {error}") from None
    return tuple(tools)
