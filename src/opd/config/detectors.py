"""[detectors]: the detectors of reward hacking, what each does on an alarm, and from which figures it raises one.

Metrics are smoothed by moving averages over `memory` steps, and a change counts only beyond six of its own standard errors
(`opd.detectors.statistics`): small batches make a detector slower, and do not make it raise more false alarms.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from opd.config.node import Node, Positive

Action: TypeAlias = Literal["off", "log", "warn", "stop"]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
Above: TypeAlias = Annotated[float, Field(gt=0)]
Factor: TypeAlias = Annotated[float, Field(gt=1)]


class DetectorConfig(Node):
    """The keys of every detector."""

    action: Action = "warn"
    """The reaction to an alarm. "log" writes it to `alarms.jsonl`, "warn" prints it too, "stop" also saves a checkpoint and ends
    the run."""
    memory: Positive = 10
    """The steps of the moving average."""


class GoodhartConfig(DetectorConfig):
    """The reward falls while the student comes closer to its teacher."""

    memory: Positive = 20
    """The steps of the moving average. 20, because the reward of one batch is noisy."""
    drop: Share = 0.1
    """The fall of the mean reward from its best value that raises an alarm."""
    gain: Share = 0.1
    """The fraction by which the reverse KL, per token or per sequence, must have fallen since then."""


class AurocConfig(DetectorConfig):
    """The log ratio of a response does not tell good rewards from bad ones."""

    memory: Positive = 20
    """The steps of the moving average. 20, because one step says little about an AUROC."""
    threshold: Share = 0.55
    """The AUROC below which it raises an alarm. At 0.5 the log ratio says nothing about the reward."""
    max_error: Share = 0.03
    """The largest standard error of the AUROC. Steps are pooled until it is reached: with 32 good and 32 bad responses it is
    0.07, so one step cannot tell 0.55 from 0.65."""


class FlaggedAdvantageConfig(DetectorConfig):
    """Tokens with format errors get a higher advantage than the other tokens.

    The comparison is with the other tokens, because without a baseline every advantage has the mean -KL.
    """

    action: Action = "log"
    """The reaction to an alarm. "log", because without a baseline errors in passages of low KL look rewarded too."""
    threshold: Annotated[float, Field(ge=0)] = 0.0
    """The difference of the two mean advantages that raises an alarm."""


class ThresholdConfig(DetectorConfig):
    """The keys of a detector of a fraction that must stay low."""

    threshold: Share = 0.1
    """The fraction above which it raises an alarm."""
    patience: Positive = 50
    """The steps above the threshold after which it raises an alarm without a rise. A student that starts above the threshold
    may be about to improve."""


class RepetitionConfig(ThresholdConfig):
    """The fraction of responses that are loops, by repeated 3-grams or by compression."""


class TruncationConfig(ThresholdConfig):
    """The fraction of responses that a limit on tokens cut, and the length of responses."""

    window: Positive = 50
    """The steps within which lengths are compared."""
    growth: Factor = 2.0
    """Growth of the mean length, as a factor, that raises an alarm."""
    shrink: Factor = 3.0
    """Decrease of the mean length, as a factor, that raises an alarm while the reverse KL per token rises. Such a student learns
    to end at once."""


class LowKlConfig(ThresholdConfig):
    """The fraction of long responses with a passage in which the teacher is five times closer to the student than elsewhere.

    Long: at least 256 tokens. A passage: four windows of 64 tokens.
    """

    action: Action = "log"
    """The reaction to an alarm. "log", because copied text looks like this too."""
    threshold: Share = 0.05
    """The fraction above which it raises an alarm."""


class OverlapConfig(DetectorConfig):
    """Student and teacher disagree more and more, or the student becomes far more certain than its teacher."""

    drop: Share = 0.1
    """The fall of the top-k overlap from its best value that raises an alarm."""
    entropy_gap: Above = 0.5
    """The growth of the difference of their entropies that raises an alarm, in nats."""
    entropy_fraction: Share = 0.5
    """The fraction of both its first entropy and the teacher's below which the student's entropy raises an alarm. Not of the
    first entropy alone: a student of a certain teacher becomes certain (in the demo from 3.4 to 0.02 nats)."""


class SpecialTokensConfig(ThresholdConfig):
    """The fraction of special tokens with a log ratio beyond 15 nats."""

    threshold: Share = 0.25
    """The fraction above which it raises an alarm. An untrained student ends a third of its turns where its teacher never would,
    for some ten steps."""
    patience: Positive = 30
    """The steps above the threshold after which it raises an alarm without a rise. An artefact of a tokenizer stays."""


class CommonTokensConfig(ThresholdConfig):
    """The fraction of the positive advantage on the five most common tokens, minus their fraction of the tokens."""

    action: Action = "log"
    """The reaction to an alarm. "log", because few tokens carry most of the advantage and these change from step to step."""
    memory: Positive = 20
    """The steps of the moving average. 20, because this difference is noisy."""
    threshold: Share = 0.3
    """The difference above which it raises an alarm."""


class TeacherDriftConfig(DetectorConfig):
    """The student loses one of several teachers."""

    rise: Factor = 2.0
    """The rise of the reverse KL to a teacher from its lowest value, as a factor, that raises an alarm."""
    min_rise: Above = 0.1
    """The least rise of that reverse KL, in nats per token."""
    drop: Share = 0.15
    """The fall of the mean reward on a teacher's prompts from its best value that raises an alarm."""


class FormatErrorsConfig(DetectorConfig):
    """Format errors become more frequent, by a CUSUM of their rate in standard errors of a step."""

    memory: Positive = 20
    """The steps of the moving average. 20, because format errors are rare."""
    acceptable: Share = 0.01
    """The rate of errors from which the CUSUM counts, where the lowest rate so far is smaller."""
    slack: Above = 1.0
    """The standard errors that are subtracted at every step."""
    limit: Above = 8.0
    """The sum that raises an alarm, in standard errors."""


class HeldOutConfig(DetectorConfig):
    """The held-out reward falls and the training reward does not (see `evaluation.every`, `tasks.NAME.grader`)."""

    memory: Positive = 3
    """The evaluations of the moving average."""
    drop: Share = 0.05
    """The fall of the held-out reward from its best value that raises an alarm."""


class DetectorsConfig(Node):
    """The detectors of reward hacking. A change counts only beyond six of its own standard errors."""

    rearm_steps: Positive = 20
    """The steps without its cause after which a detector may raise the same alarm again."""
    goodhart: GoodhartConfig = GoodhartConfig()
    log_ratio_reward_auroc: AurocConfig = AurocConfig()
    flagged_advantage: FlaggedAdvantageConfig = FlaggedAdvantageConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    truncation: TruncationConfig = TruncationConfig()
    low_kl_windows: LowKlConfig = LowKlConfig()
    overlap: OverlapConfig = OverlapConfig()
    special_tokens: SpecialTokensConfig = SpecialTokensConfig()
    common_tokens: CommonTokensConfig = CommonTokensConfig()
    teacher_drift: TeacherDriftConfig = TeacherDriftConfig()
    format_errors: FormatErrorsConfig = FormatErrorsConfig()
    held_out: HeldOutConfig = HeldOutConfig()
