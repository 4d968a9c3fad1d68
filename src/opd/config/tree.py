"""The recipes of `opd train` and `opd sft`, and their smaller tables (docs/configuration.md)."""

import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeAlias

import regex
from pydantic import Field, field_validator, model_validator

from opd.config.detectors import DetectorsConfig
from opd.config.node import EachOnce, Node, NonNegative, Positive
from opd.config.objective import MaskConfig, ObjectiveConfig, RewardConfig
from opd.config.rules import require_consistent
from opd.config.teachers import ClusterConfig, RemoteConfig, TeacherConfig

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
    """Limits of an episode of several turns, and of the environments and tools that answer the student.

    max_turns: turns of the student in one episode. max_concurrent: environments that run at once. step_timeout_s: seconds in which
    an environment must answer. tool_timeout_s: seconds in which one tool must answer; all tools of one turn get 0.8 of
    `step_timeout_s`. max_observation_chars: characters of one message of an environment or a tool. tool_syntax: how the student
    writes a call; "hermes" is <tool_call>{...}</tool_call>, "json" is a message that is one JSON object.
    """

    max_turns: Positive = 8
    max_concurrent: Positive = 64
    step_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    tool_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    max_observation_chars: Positive = 4000
    tool_syntax: Literal["hermes", "json"] = "hermes"


class ChecksConfig(Node):
    """Format errors that opd looks for in the student's turns: one for each of `rules` (docs/safeguards.md), none by default.

    tags: tags that the last turn must have, in this order, once each. answer_pattern: a regular expression that must match within
    the last 8,192 characters of the last turn, in one second. answer_end: the text after which a turn must say nothing more.
    max_repetition: the fraction of 3-grams that may repeat earlier ones.
    """

    rules: Annotated[list[Rule], EachOnce] = Field(default_factory=list)
    tags: Annotated[list[str], EachOnce] = Field(default_factory=list)
    answer_pattern: str | None = None
    answer_end: str | None = None
    max_repetition: Annotated[float, Field(gt=0, lt=1)] = 0.7

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
                raise ValueError(f"rule '{rule}' needs the setting {setting}: write {advice}, or drop the rule")
            if rule not in self.rules and not self.is_default(setting):
                raise ValueError(f"{setting} belongs to the rule '{rule}': add '{rule}' to rules, or drop {setting}")
        return self


class GeneratedTask(Node):
    """The keys of every task whose prompts are generated: `size` training prompts and `held_out_size` others, from `seed`."""

    teacher: str
    size: Positive = 1000
    held_out_size: NonNegative = 200
    seed: NonNegative = 0
    weight: Annotated[float, Field(gt=0)] = 1.0
    checks: ChecksConfig = ChecksConfig()


class LoraConfig(Node):
    """The student's adapter (used when `trainable = "lora"`).

    start: an adapter of the same shape whose weights the student starts with, such as one that `opd sft` wrote. Without it the
    student starts as its base.
    """

    rank: Positive = 16
    alpha: Positive = 32
    target_modules: str | list[str] = "all-linear"
    start: str | None = None


class RecordTask(Node):
    """The keys of every task whose prompts are records.

    columns: from keys of a record to the data's own names, such as `{ prompt = "question", answer = "solution" }`. A field
    whose key another one takes goes into `meta`.

    completion: the use of an assistant's message at the end of a record: the `answer` that is verified, the `demonstration`
    of fine-tuning, or nothing ("drop"). By default `messages` must not end with one, and in records that keep it apart
    ("completion", ShareGPT's "conversations") it is the demonstration. grader: another verifier, for the held-out reward in
    training (`evaluation.every`).
    """

    teacher: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    completion: Literal["answer", "demonstration", "drop"] | None = None
    verifier: Literal["exact", "math", "number", "none"] = "exact"
    grader: Literal["exact", "math", "number"] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    checks: ChecksConfig = ChecksConfig()


class FileTask(RecordTask):
    """Prompts from a file of JSON lines, of one JSON array, of CSV or of Parquet (docs/configuration.md lists a record's keys)."""

    type: Literal["file"]
    path: str
    held_out_path: str | None = None


class PythonTask(RecordTask):
    """Prompts that are passed to `opd.Trainer(prompts=...)`."""

    type: Literal["python"]


class ReasoningGymTask(GeneratedTask):
    """Prompts generated by a reasoning-gym data set; held-out prompts never repeat a training question."""

    type: Literal["reasoning_gym"]
    dataset: str
    params: dict[str, Any] = Field(default_factory=dict)


class ToolTask(GeneratedTask):
    """Generated problems that need a tool: sums and a calculator, codes and a table to look them up in."""

    type: Literal["tools"]
    problems: Literal["calculator", "lookup"]


class TextArenaTask(GeneratedTask):
    """Games of TextArena for one player, such as "GuessTheNumber-v0", a prompt for each seed of the game; held-out seeds are never
    trained on. A game that opens in the same way with every seed (TowerOfHanoi) is the same game in both splits.

    params: of the game, for `textarena.make`.
    """

    type: Literal["textarena"]
    game: str
    params: dict[str, Any] = Field(default_factory=dict)


TaskConfig: TypeAlias = Annotated[
    FileTask | PythonTask | ReasoningGymTask | ToolTask | TextArenaTask, Field(discriminator="type")
]


class SamplingConfig(Node):
    """How the student samples. The full distribution is sampled: see `_no_truncation`."""

    prompts_per_step: Positive = 32
    group_size: Positive = 1
    max_new_tokens: Positive = 256
    max_rows: Positive = 64
    top_p: float = 1.0
    top_k: int = 0

    @model_validator(mode="after")
    def _no_truncation(self) -> "SamplingConfig":
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "top_p and top_k sampling are refused: the learner scores the untruncated distribution, so every "
                "token's weight would be off by the nucleus mass; leave top_p = 1.0 and top_k = 0"
            )
        return self


class OptimizerConfig(Node):
    """AdamW with a warm-up and a schedule. Gradients are clipped at `max_grad_norm` (global 2-norm)."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegative = 5
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _betas_below_one(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class WarmupConfig(Node):
    """Fine-tuning on teachers' own responses before the first step: `steps` updates (0: none) at `lr` (by default optimizer.lr)."""

    steps: NonNegative = 0
    lr: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "WarmupConfig":
        if self.lr is not None and not self.steps:
            raise ValueError("lr belongs to steps > 0, got steps = 0; drop it, or set steps")
        return self


class ComputeConfig(Node):
    """Where and how models run.

    max_tokens: tokens of one packed forward pass. score_cache: scored responses that training keeps in memory (0: none).
    score_cache_folder: a folder that keeps them for this run and others. activation_checkpointing: the student keeps only the
    input of each layer for the gradient, and computes the layer again. threads: of torch (0: its own choice).
    """

    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_tokens: Positive = 2048
    score_cache: NonNegative = 0
    score_cache_folder: str | None = None
    activation_checkpointing: bool = False
    threads: NonNegative = 0

    @property
    def keeps_scores(self) -> bool:
        """Whether a response is scored only once."""
        return bool(self.score_cache) or self.score_cache_folder is not None


class CheckpointConfig(Node):
    """A checkpoint after every `every` steps and at the end. The newest `keep` are kept."""

    every: Positive = 20
    keep: Positive = 2


class EvaluationConfig(Node):
    """The parity table: `num_prompts` prompts of each task and split (0: no table).

    The untrained student is measured on the first `before_prompts` of them only (0: not at all), because its long responses cost
    most. Every `every` steps (0: never) training measures the held-out reward on `held_out_prompts` of each task.
    """

    num_prompts: NonNegative = 128
    before_prompts: NonNegative = 32
    every: NonNegative = 0
    held_out_prompts: Positive = 32


class SftEvaluationConfig(Node):
    """After fine-tuning: the accuracy on `num_prompts` prompts of each task and split (0: none)."""

    num_prompts: NonNegative = 128


class AlignmentConfig(Node):
    """Settings for teachers of another tokenizer.

    credit: each token of a chunk gets the log ratio of the rest of the chunk ("causal"), or that of the whole chunk ("full").
    non_canonical: "mask" leaves out tokens that the student's tokenizer would not produce for the text, because one tokenization
    has a lower log-probability than the text. tool_calls: the teacher reads every call as the student wrote it ("as_written") or
    as the teacher's chat template writes it ("own_syntax"). With "own_syntax", text around a call's name and arguments that the
    template writes in another way is left out.
    """

    credit: Literal["causal", "full"] = "causal"
    non_canonical: Literal["keep", "mask"] = "keep"
    tool_calls: Literal["as_written", "own_syntax"] = "as_written"


WriterName: TypeAlias = Literal["tensorboard", "trackio"]


class LoggingConfig(Node):
    """Writers besides metrics.jsonl. Sampled responses are shown every `samples_every` steps (0: never)."""

    writers: Annotated[list[WriterName], EachOnce] = Field(default_factory=list)
    samples_every: NonNegative = 20


class RunNode(Node):
    """The keys of both recipes.

    template_time: the time that chat templates read as now (a template may write the date). By default it is the time at which the
    run starts, and the run's config.json keeps it.
    """

    student: str
    output: str
    seed: NonNegative = 0
    template_time: datetime | None = None
    steps: Positive = 100
    trainable: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()

    def started(self) -> Self:
        """The recipe with a time for chat templates: now, where the recipe has none."""
        if self.template_time is not None:
            return self
        return self.model_copy(update={"template_time": datetime.now().replace(microsecond=0)})

    @model_validator(mode="after")
    def _trainable(self) -> "RunNode":
        if self.trainable == "full" and self.compute.dtype != "float32":
            raise ValueError(
                f"trainable = 'full' needs compute.dtype = 'float32', got '{self.compute.dtype}': a weight in half precision loses "
                "small updates; train an adapter (trainable = 'lora'), whose weights stay float32"
            )
        if self.trainable == "full" and self.lora.start is not None:
            raise ValueError("lora.start is for an adapter, and trainable = 'full' has none; drop one")
        return self


class Config(RunNode):
    """An on-policy distillation run: `opd train`."""

    backend: Literal["local", "ray"] = "local"
    cluster: ClusterConfig = ClusterConfig()
    temperature: Annotated[float, Field(gt=0)] = 1.0
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    remote: RemoteConfig = RemoteConfig()
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    mask: MaskConfig = MaskConfig()
    episodes: EpisodesConfig = EpisodesConfig()
    warmup: WarmupConfig = WarmupConfig()
    detectors: DetectorsConfig = DetectorsConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _across_tables(self) -> "Config":
        require_consistent(self)
        return self


class SftConfig(RunNode):
    """Supervised fine-tuning on (prompt, answer) pairs: `opd sft`."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    batch_size: Positive = 32
    max_new_tokens: Positive = 64
    episodes: EpisodesConfig = EpisodesConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: SftEvaluationConfig = SftEvaluationConfig()

    @model_validator(mode="after")
    def _no_scores(self) -> "SftConfig":
        for key in ("score_cache", "score_cache_folder"):
            if getattr(self.compute, key):
                raise ValueError(f"compute.{key} keeps teachers' scores, and fine-tuning has no teacher; drop it")
        return self
