"""[tasks.NAME]: where the prompts of a run come from."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field

from opd.config.episodes import ChecksConfig
from opd.config.node import Node, NonNegative, Positive


class GeneratedTask(Node):
    """The keys of every task that generates its prompts."""

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

    type: Literal["tools"]
    problems: Literal["calculator", "lookup"]
    """The problems: sums and a calculator, or codes and a table to look them up in."""


class TextArenaTask(GeneratedTask):
    """Games of TextArena for one player, a prompt for each seed of the game. Held-out seeds are never trained on.

    A game that opens in the same way with every seed (TowerOfHanoi) is the same game in both splits.
    """

    type: Literal["textarena"]
    game: str
    """The id of the game, such as "GuessTheNumber-v0"."""
    params: dict[str, Any] = Field(default_factory=dict)
    """The parameters of the game, for `textarena.make`."""


TaskConfig: TypeAlias = Annotated[
    FileTask | PythonTask | ReasoningGymTask | ToolTask | TextArenaTask, Field(discriminator="type")
]
