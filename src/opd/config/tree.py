"""The recipes of `opd train` and `opd sft`, and their smaller tables."""

from datetime import datetime
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from opd.config.detectors import DetectorsConfig
from opd.config.node import EachOnce, Node, NonNegative, Positive
from opd.config.objective import MaskConfig, ObjectiveConfig, RewardConfig
from opd.config.rules import require_consistent
from opd.config.tasks import EpisodesConfig, TaskConfig
from opd.config.teachers import ClusterConfig, Dtype, Quantization, RemoteConfig, TeacherConfig, TemplateArgs


class LoraConfig(Node):
    """The student's adapter, used when `trainable = "lora"`."""

    rank: Positive = 16
    """The rank of the adapter. The demo's student of 135M reaches its experts with 16."""
    alpha: Positive = 32
    """The adapter is multiplied by `alpha / rank`. Twice the rank is the usual choice."""
    target_modules: str | list[str] = "all-linear"
    """The layers with an adapter: names of modules, or every linear layer but the output head."""
    start: str | None = None
    """The student starts with the weights of this adapter, such as one that `opd sft` wrote. It must have the same layers, rank and
    scale. Without one the student starts as its base."""


class ChatConfig(Node):
    """How conversations are written for the student."""

    template_args: TemplateArgs = Field(default_factory=dict)
    """Variables for the student's chat template, such as `{ enable_thinking = false }`. A teacher in process reads them too, unless
    it has its own (`teachers.NAME.template_args`)."""


class SamplingConfig(Node):
    """How the student samples. It samples the whole distribution, because the learner scores the whole distribution."""

    prompts_per_step: Positive = 32
    """The prompts of one step."""
    group_size: Positive = 1
    """The responses to each prompt. 1, because "exact" needs no group and other prompts tell more than other samples; a reward or
    "leave_one_out" needs 2 or more, such as 4."""
    max_new_tokens: Positive = 256
    """The maximum number of tokens in a response, or in one turn of an episode. Raise it if `response/truncated/mean` is
    not near 0."""
    max_rows: Positive = 64
    """The maximum number of responses that the local backend samples at once. Lower it if memory runs out while sampling."""
    top_p: float = 1.0
    """Only 1.0 is accepted. With a nucleus every token's weight would be off by the mass outside it."""
    top_k: int = 0
    """Only 0 is accepted, for the same reason."""

    @model_validator(mode="after")
    def _no_truncation(self) -> "SamplingConfig":
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                "top_p and top_k sampling are refused: the learner scores the untruncated distribution, so every "
                "token's weight would be off by the nucleus mass; leave top_p = 1.0 and top_k = 0"
            )
        return self


class OptimizerConfig(Node):
    """AdamW with a warm-up and a schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The learning rate after the warm-up. 1e-4 is careful for an adapter: the demo of 60 steps takes 1.2e-3. All weights take
    less, such as 1e-5."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas. 0.95 instead of torch's 0.999, because runs have hundreds of steps, not many thousands."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon, as in torch."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay. 0, because decay pulls an adapter back to the base model."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The maximum 2-norm of all gradients together; larger ones are clipped. With normalizer "trajectory" norms are tens even for
    short responses: see `optim/grad_norm/mean`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape of the learning rate after the warm-up. "cosine" ends low, because a student close to its teacher follows noise."""
    warmup_steps: NonNegative = 5
    """The number of steps in which the rate rises from 0. It should be below `steps`, or the rate never reaches `lr`: for a first
    try of a few steps write 1."""
    final_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The last rate as a fraction of `lr`."""

    @model_validator(mode="after")
    def _betas_below_one(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class WarmupConfig(Node):
    """Fine-tuning on the teachers' own responses before the first step. It needs the local backend and teachers in process."""

    steps: NonNegative = 0
    """The updates of this fine-tuning. At 0 training is on-policy from the first step."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """The learning rate of these updates. By default `optimizer.lr`."""

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "WarmupConfig":
        if self.lr is not None and not self.steps:
            raise ValueError("lr works only with steps > 0, got steps = 0; remove lr, or set steps")
        return self


class ComputeConfig(Node):
    """Where and how models run."""

    device: str = "auto"
    """The torch device, such as "cpu" or "cuda:1". "auto" takes a CUDA device where there is one."""
    dtype: Dtype = "float32"
    """The data type of weights and passes. "float32", because passes in bfloat16 differ by 0.06 to 0.14 nats per token, and a
    student close to its teacher follows that noise."""
    quantization: Quantization | None = None
    """Keeps the linear layers of the student's base in 4 ("nf4") or 8 bits ("int8"), by bitsandbytes (`opd[quantized]`); an adapter
    trains on it (QLoRA). A teacher that is a whole model has a key of its own."""
    max_tokens: Positive = 2048
    """The maximum number of distinct tokens in one packed forward pass. Lower it if memory runs out; it changes results by rounding
    only."""
    score_cache: NonNegative = 0
    """The scored responses that training keeps in memory. opd does not score the same response to the same prompt again, and
    `batch/cached/sum` counts these. 0, because it helps only where the teacher is large, prompts are few and answers short; with
    "exact" and "top_k" a response takes 4 bytes times tokens times the teacher's width. It starts empty after a resume."""
    score_cache_folder: str | None = None
    """A folder that keeps every score for this run and for others ([how](../concepts/architecture.md#the-score-cache))."""
    activation_checkpointing: bool = False
    """Keeps only the input of each layer for the gradient and computes the layer again. It saves memory and costs one more
    forward pass."""
    threads: NonNegative = 0
    """The threads of torch. 0 leaves the number to torch."""

    @property
    def keeps_scores(self) -> bool:
        """Whether a response is scored only once."""
        return bool(self.score_cache) or self.score_cache_folder is not None


class CheckpointConfig(Node):
    """When checkpoints are written. One is always written at the end."""

    every: Positive = 20
    """The steps between two checkpoints. A run that is killed repeats at most so many."""
    keep: Positive = 2
    """The newest checkpoints that opd keeps. 2, because each has the optimizer's state too."""


class EvaluationConfig(Node):
    """The parity table at the end, and the held-out reward during training."""

    num_prompts: NonNegative = 128
    """The prompts of each task and split in the parity table. 128 give a 95 % interval of at most ±9 points; 0 means no table."""
    before_prompts: NonNegative = 32
    """How many of them measure the untrained student (0: none). Fewer, because its long responses cost most."""
    every: NonNegative = 0
    """The steps between two measurements of the held-out reward (0: none)."""
    held_out_prompts: Positive = 32
    """The held-out prompts of each task in such a measurement."""


class SftEvaluationConfig(Node):
    """The evaluation after fine-tuning."""

    num_prompts: NonNegative = 128
    """The prompts of each task and split whose answers are verified (0: none)."""


class AlignmentConfig(Node):
    """Settings for teachers of another tokenizer ([tokenizers](../concepts/tokenizers.md))."""

    credit: Literal["causal", "full"] = "causal"
    """The log ratio that a token of a chunk gets: of the rest of the chunk ("causal") or of the whole chunk ("full"). "causal",
    because a token cannot change what was written before it."""
    non_canonical: Literal["keep", "mask"] = "keep"
    """The treatment of tokens that the student's tokenizer would not produce for the text. "mask" leaves them out, because one
    tokenization has a lower log-probability than the text."""
    tool_calls: Literal["as_written", "own_syntax"] = "as_written"
    """The syntax in which the teacher reads tool calls. With "own_syntax" it reads them as its chat template writes them. Text
    around a call is left out where the template writes it in another way."""


WriterName: TypeAlias = Literal["tensorboard", "trackio"]


class LoggingConfig(Node):
    """What is shown and written besides `metrics.jsonl`."""

    writers: Annotated[list[WriterName], EachOnce] = Field(default_factory=list)
    """More writers of metrics. Install `opd[tensorboard]` or `opd[trackio]` for them."""
    samples_every: NonNegative = 20
    """The steps between two displays of sampled responses (0: never)."""


class RunNode(Node):
    """The keys of both recipes."""

    student: str
    """The model to train: hub id, folder or GGUF file. A GGUF file is converted once into `OPD_CACHE` (by default
    `~/.cache/opd`)."""
    output: str
    """The run folder. It must not exist."""
    seed: NonNegative = 0
    """The seed of everything random in the run, except generated prompts."""
    template_time: datetime | None = None
    """The date and time that chat templates read as now, such as `2026-11-30T12:00:00`. By default the start of the run, which the
    run's `config.json` keeps."""
    steps: Positive = 100
    """The number of updates."""
    trainable: Literal["lora", "full"] = "lora"
    """The weights that train. "full" trains all weights, in float32. "lora", because adapter teachers then share the student's
    base, and AdamW's state stays small."""
    chat: ChatConfig = ChatConfig()
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
        if self.trainable == "full" and self.compute.quantization is not None:
            raise ValueError(
                f"compute.quantization = '{self.compute.quantization}' works only with trainable = 'lora': weights of a few bits "
                "cannot train; remove one of the two keys"
            )
        if self.trainable == "full" and self.lora.start is not None:
            raise ValueError(
                "lora.start works only with trainable = 'lora', got trainable = 'full'; remove one of the two keys"
            )
        return self


class Config(RunNode):
    """An on-policy distillation run: `opd train`."""

    backend: Literal["local", "ray"] = "local"
    """Where the parts of the run are. "local": in one process; "ray": on a Ray cluster (`[cluster]`)."""
    cluster: ClusterConfig = ClusterConfig()
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The temperature of sampling and of both models' distributions. 1.0, because servers score at temperature 1 only."""
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
    """Supervised fine-tuning on answers and demonstrations: `opd sft`. A task still needs a `teacher`, which is not used: write
    `teacher = "-"`."""

    tasks: dict[str, TaskConfig] = Field(min_length=1)
    batch_size: Positive = 32
    """The examples of one update."""
    max_new_tokens: Positive = 64
    """The maximum number of tokens in a response of the evaluation after training."""
    episodes: EpisodesConfig = EpisodesConfig()
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The data type of the saved student."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: SftEvaluationConfig = SftEvaluationConfig()

    @model_validator(mode="after")
    def _no_scores(self) -> "SftConfig":
        for key in ("score_cache", "score_cache_folder"):
            if getattr(self.compute, key):
                raise ValueError(
                    f"compute.{key} has no effect in opd sft, because fine-tuning has no teacher; remove the key"
                )
        return self
