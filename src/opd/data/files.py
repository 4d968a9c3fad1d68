"""Prompts from JSONL files, checked line by line."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opd.config import FileTask, PythonTask
from opd.data.json_lines import read_json_lines
from opd.data.prompt_records import Completion, checked, read_record
from opd.episodes.demonstrations import recorded_turn
from opd.errors import DataError
from opd.records import Message, Prompt
from opd.rewards.verifiers import VERIFIERS, reference_fault


class _Records:
    """What tasks of records have in common: verifiers that compare with their answers, and no environment."""

    def __init__(self, name: str, config: FileTask | PythonTask) -> None:
        self.name = name
        self._config = config
        self._verify = VERIFIERS[config.verifier]
        self._grade = VERIFIERS[config.grader or config.verifier]

    def reward(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._verify(response, prompt.answer)

    def grade(self, prompt: Prompt, response: str) -> float | None:
        return None if prompt.answer is None else self._grade(response, prompt.answer)

    def environment(self, prompt: Prompt) -> None:
        """None: a file has no environment; training on a prompt with tools needs one of the user's."""

    def solution(self, prompt: Prompt, messages: Sequence[Message]) -> str | None:
        if not prompt.demonstration:
            return prompt.answer
        return recorded_turn(prompt.demonstration, len(messages) - len(prompt.messages))


class PromptFile(_Records):
    """A task read from one JSONL file a split; ids are unique within the task."""

    _config: FileTask

    def prompts(self, split: str) -> list[Prompt]:
        config = self._config
        path, key = (config.path, "path") if split == "train" else (config.held_out_path, "held_out_path")
        if path is None:
            return []
        verifiers = dict.fromkeys((config.verifier, config.grader or config.verifier))
        return read_prompts(
            path,
            task=self.name,
            teacher=config.teacher,
            completion=config.completion,
            verifiers=tuple(verifiers),
            key=key,
        )


class PassedRecords(_Records):
    """A task whose records were passed as Python objects, one iterable a split."""

    def __init__(self, name: str, config: PythonTask, train: Iterable[Any], held_out: Iterable[Any] | None) -> None:
        super().__init__(name, config)
        self._splits = {"train": train, "held_out": held_out}

    def prompts(self, split: str) -> list[Prompt]:
        records = self._splits[split]
        if records is None:
            return []
        config = self._config
        return read_records(records, task=self.name, teacher=config.teacher, completion=config.completion)


def read_records(
    records: Iterable[Any], *, task: str, teacher: str | None, completion: Completion | None
) -> list[Prompt]:
    """The prompts of records that were passed as Python objects."""
    return [
        item
        if isinstance(item, Prompt)
        else checked(
            read_record(item, task=task, teacher=teacher, completion=completion), f"prompts[{number}]", completion
        )
        for number, item in enumerate(records)
    ]


def read_prompts(
    path: str | Path,
    *,
    task: str,
    teacher: str | None = None,
    completion: Completion | None = None,
    verifiers: Sequence[str] = (),
    key: str = "path",
) -> list[Prompt]:
    """The prompts of a JSONL file; `teacher` is used where a record names none.

    completion: as in `FileTask`; verifiers: those that compare with the answers. A record without an id gets one that is made from
    its content; the second of two equal ones gets a number. key: the key of the task that names the file.

    Raises DataError naming file and line: a record that is no prompt, an answer that a verifier cannot compare with, a repeated id.
    """
    lines: dict[str, int] = {}
    prompts: list[Prompt] = []
    completed = False
    for number, record in read_json_lines(path, f"tasks.{task}.{key}"):
        where = f"{path}, line {number}"
        try:
            read = read_record(record, task=task, teacher=teacher, completion=completion)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        prompt = checked(read, where, completion)
        completed |= read.completed
        if "id" not in record:
            prompt = _numbered(prompt, lines)
        if prompt.id in lines:
            raise DataError(f"{where}: id '{prompt.id}' was used on line {lines[prompt.id]}; ids must be unique")
        lines[prompt.id] = number
        _require_comparable(prompt, verifiers, where)
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{path}: no prompts; expected one JSON record a line")
    if completion is not None and not completed:
        raise DataError(
            f"{path}: no record ends with an assistant's message, so tasks.{task}.completion = '{completion}' has no effect; "
            "drop it"
        )
    return prompts


def _numbered(prompt: Prompt, lines: dict[str, int]) -> Prompt:
    """The prompt with an id that is not taken."""
    times = 1
    while (identity := prompt.id if times == 1 else f"{prompt.id}-{times}") in lines:
        times += 1
    return replace(prompt, id=identity)


def _require_comparable(prompt: Prompt, verifiers: Sequence[str], where: str) -> None:
    """Raise DataError for an answer that one of the verifiers cannot compare with."""
    for verifier in verifiers if prompt.answer is not None else ():
        if fault := reference_fault(verifier, prompt.answer or ""):
            raise DataError(
                f"{where}: prompt '{prompt.id}': answer {prompt.answer!r:.80} {fault}; write the answer alone, or choose "
                f"another verifier (tasks.{prompt.task}.verifier or .grader = '{verifier}')"
            )
