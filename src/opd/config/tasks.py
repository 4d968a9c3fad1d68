"""[tasks.NAME]: where the prompts of a run come from, and their format checks; [episodes]: the limits of an episode."""

import re
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import regex
from pydantic import Field, field_validator, model_validator

from opd.config.node import EachOnce, Node, NonNegative, Positive

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


class EpisodesConfig(Node):
    """Limits of an episode of several turns, and of the environments and tools that answer the student."""

    max_turns: Positive = 8
    """The maximum number of turns of the student in one episode."""
    max_concurrent: Positive = 64
    """The maximum number of environments at once. With `backend = "ray"` and no teacher in process it also limits the rollouts
    that are sampled or scored at once."""
    step_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """The time in which an environment must answer, in seconds. All tools of one turn together get 0.8 of it."""
    tool_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """The time in which one tool must answer, in seconds."""
    max_observation_chars: Positive = 4000
    """The maximum number of characters in one message of an environment or a tool. opd cuts longer ones and counts them."""
    tool_syntax: Literal["hermes", "json"] = "hermes"
    """The syntax in which the student writes a tool call. "hermes" is `<tool_call>{...}</tool_call>`; "json" is a message that is
    one JSON object."""


class ChecksConfig(Node):
    """The format errors that opd looks for in the text of the student. By default none."""

    rules: Annotated[list[Rule], EachOnce] = Field(default_factory=list)
    """The format checks to run, by [name](#format-checks)."""
    tags: Annotated[list[str], EachOnce] = Field(default_factory=list)
    """With the rule "tags": the tags that the last turn must have, in this order, once each. Write names without brackets."""
    answer_pattern: str | None = None
    """With the rule "answer_pattern": a regular expression that must match in the last turn. opd searches its last 8,192
    characters for at most one second."""
    answer_end: str | None = None
    """With the rule "after_answer": the text that ends an answer. Any text after it is an error."""
    max_repetition: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """With the rule "repetition": the fraction of 3-grams that may repeat earlier ones."""

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
            if rule in self.rules and not getattr(self, setting):
                raise ValueError(f"rule '{rule}' needs the setting {setting}: write {advice}, or remove the rule")
            if rule not in self.rules and not self.is_default(setting):
                raise ValueError(
                    f"{setting} works only with the rule '{rule}': add '{rule}' to rules, or remove {setting}"
                )
        return self


class GeneratedTask(Node):
    """The keys of every task that generates its prompts."""

    has_environment: ClassVar[bool] = False
    teacher: str
    """The name of the teacher of these prompts."""
    size: Positive = 1000
    """The number of training prompts."""
    held_out_size: NonNegative = 200
    """The number of prompts that are evaluated and never trained on."""
    seed: NonNegative = 0
    """The seed of the prompts. It is not the run's `seed`, so that runs with other seeds train on the same prompts."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """The task's part of a step's prompts, relative to the weights of the other tasks."""
    checks: ChecksConfig = ChecksConfig()


class RecordTask(Node):
    """The keys of every task whose prompts are records ([their format](#records))."""

    has_environment: ClassVar[bool] = False
    teacher: str | None = None
    """The teacher of records that name none. By default the recipe's only teacher."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Keys of a record and the names that the data has for them, such as `{ prompt = "question", answer = "solution" }`. A field
    that opd does not read under its own key goes into `meta`."""
    completion: Literal["answer", "demonstration", "drop"] | None = None
    """The use of an assistant's message at the end of a record. "answer": the verifier compares with it; "demonstration": `opd
    sft` learns it; "drop": opd cuts it off. By default opd refuses it in `messages` and takes it as the demonstration where the
    record keeps it apart (`completion`, ShareGPT's `conversations`)."""
    verifier: Literal["exact", "math", "number", "none"] = "exact"
    """The verifier of the reward ([what each accepts](#verifiers)). "exact" pays for the answer alone, so its
    verdicts need no explanation."""
    grader: Literal["exact", "math", "number"] | None = None
    """Another verifier, for the held-out reward in training (`evaluation.every`). A reward that only one of them pays is a sign
    of reward hacking."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """The task's part of a step's prompts, relative to the weights of the other tasks."""
    checks: ChecksConfig = ChecksConfig()


class FileTask(RecordTask):
    """Prompts from a file of JSON lines, of one JSON array, of CSV or of Parquet."""

    type: Literal["file"]
    path: str
    """The file of training prompts."""
    held_out_path: str | None = None
    """The file of prompts that are evaluated and never trained on."""


class PythonTask(RecordTask):
    """Prompts that are passed to `opd.Trainer(prompts=...)`."""

    type: Literal["python"]


class ReasoningGymTask(GeneratedTask):
    """Prompts of a reasoning-gym data set. Held-out prompts never repeat a training question."""

    type: Literal["reasoning_gym"]
    dataset: str
    """The name of the data set in reasoning-gym."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of that data set."""


class ToolTask(GeneratedTask):
    """Generated problems that need a tool."""

    has_environment: ClassVar[bool] = True
    type: Literal["tools"]
    problems: Literal["calculator", "lookup"]
    """The problems: sums and a calculator, or codes and a table to look them up in."""


class TextArenaTask(GeneratedTask):
    """Games of TextArena for one player, a prompt for each seed of the game. Held-out seeds are never trained on.

    A game that opens in the same way with every seed (TowerOfHanoi) is the same game in both splits.
    """

    has_environment: ClassVar[bool] = True
    type: Literal["textarena"]
    game: str
    """The id of the game, such as "GuessTheNumber-v0"."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of the game, for `textarena.make`."""


TaskConfig: TypeAlias = Annotated[
    FileTask | PythonTask | ReasoningGymTask | ToolTask | TextArenaTask, Field(discriminator="type")
]
