"""The detectors of reward hacking: their action on an alarm, and the thresholds of an alarm (docs/safeguards.md).

Streams are smoothed by moving averages over `memory` steps, and a change counts only beyond six of its own standard errors
(`opd.detectors.statistics`), so that small batches make detectors slower, not nervous.
"""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from opd.config.node import Node, Positive

Action: TypeAlias = Literal["off", "log", "warn", "stop"]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]
Above: TypeAlias = Annotated[float, Field(gt=0)]
Factor: TypeAlias = Annotated[float, Field(gt=1)]


class DetectorConfig(Node):
    """action: "off"; "log": into the run's files; "warn": on the screen too; "stop": save a checkpoint and end the run."""

    action: Action = "warn"
    memory: Positive = 10


class GoodhartConfig(DetectorConfig):
    """1: the distillation reward rises while the reward falls. The reward is `drop` below its best, and the reverse KL, per
    token or per sequence, has fallen by the share `gain` since then."""

    memory: Positive = 20
    drop: Share = 0.1
    gain: Share = 0.1


class AurocConfig(DetectorConfig):
    """2: the log ratio of a response hardly tells good rewards from bad ones: AUROC below `threshold`.

    One step cannot tell 0.55 from 0.65 (the standard error with 32 good and 32 bad responses is 0.07), so steps are pooled
    until it is at most `max_error`.
    """

    memory: Positive = 20
    threshold: Share = 0.55
    max_error: Share = 0.03


class FlaggedAdvantageConfig(DetectorConfig):
    """3: tokens with format errors are pushed up: their mean advantage exceeds that of the others by `threshold`.

    Not their advantage against 0: without a baseline every advantage has mean -KL, and an error that gets 0 is rewarded.
    It logs only, for without a baseline errors in passages of low KL look rewarded too.
    """

    action: Action = "log"
    threshold: Annotated[float, Field(ge=0)] = 0.0


class ThresholdConfig(DetectorConfig):
    """A share that must stay below `threshold`. It raises an alarm when it has risen there, or when it has been there for
    `patience` steps: a student that begins above it and improves is no case for one."""

    threshold: Share = 0.1
    patience: Positive = 50


class RepetitionConfig(ThresholdConfig):
    """4: responses that are loops, by their repeated 3-grams or by how well they compress (`opd.detectors.metrics`)."""


class TruncationConfig(ThresholdConfig):
    """5: more than `threshold` of the responses are cut; or their length has grown `growth` times within `window` steps; or
    it has shrunk `shrink` times while the reverse KL of a token rose, as of a student that learns to end at once."""

    window: Positive = 50
    growth: Factor = 2.0
    shrink: Factor = 3.0


class LowKlConfig(ThresholdConfig):
    """6: among responses of 256 tokens and more, those with four windows of 64 tokens in a row in which the teacher is five
    times closer to the student than elsewhere in the step. It logs only: copied text looks like this too."""

    action: Action = "log"
    threshold: Share = 0.05


class OverlapConfig(DetectorConfig):
    """7: student and teacher part: their top-k overlap falls `drop` below its best, or their entropies differ by `entropy_gap`
    nats more than they did; or the student's entropy is below `entropy_fraction` both of its start and of the teacher's.

    Not of its start alone: a student that follows a certain teacher becomes certain (from 3.4 to 0.02 nats in the demo).
    """

    drop: Share = 0.1
    entropy_gap: Above = 0.5
    entropy_fraction: Share = 0.5


class SpecialTokensConfig(ThresholdConfig):
    """8: special tokens with a log ratio beyond 15 nats. An untrained student ends a third of its turns where its teacher never
    would, for some ten steps; a tokenizer's artefact stays."""

    threshold: Share = 0.25
    patience: Positive = 30


class CommonTokensConfig(ThresholdConfig):
    """9: the share of the positive advantage that falls on the five most common tokens, above their share of the tokens. Not the
    former alone: where answers are digits it is large by nature. It logs only: few tokens carry most of the advantage, and which
    ones changes from step to step."""

    action: Action = "log"
    memory: Positive = 20
    threshold: Share = 0.3


class TeacherDriftConfig(DetectorConfig):
    """10: the student loses one of its teachers: the reverse KL to it is `rise` times its lowest and `min_rise` nats a token
    above it, or the reward on its prompts is `drop` below its best."""

    rise: Factor = 2.0
    min_rise: Above = 0.1
    drop: Share = 0.15


class FormatErrorsConfig(DetectorConfig):
    """11: format errors become more frequent: a CUSUM of their rate, in standard errors of a step above the lowest rate so far
    (at least `acceptable`), less `slack`, exceeds `limit`."""

    memory: Positive = 20
    acceptable: Share = 0.01
    slack: Above = 1.0
    limit: Above = 8.0


class HeldOutConfig(DetectorConfig):
    """12: the held-out reward, by another grader, falls `drop` below its best and the training reward does not follow it;
    `memory` counts evaluations."""

    memory: Positive = 3
    drop: Share = 0.05


class DetectorsConfig(Node):
    """The detectors. An alarm is repeated only after its cause has been gone for `rearm_steps`."""

    rearm_steps: Positive = 20
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
