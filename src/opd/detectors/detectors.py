"""The detectors of reward hacking: each takes the plain metrics of every step, in order, and measures one symptom.

A detector depends on nothing else, so a resumed run rebuilds its state from metrics.jsonl. The settings of each, with the reason
for each default, are in `opd.config.detectors`. To add a detector, write its class and name it in `make_detectors`.
"""

import math
from typing import Any

from opd.config import detectors as settings
from opd.detectors.statistics import (
    Detector,
    Mark,
    Measurement,
    Measurements,
    Smoothed,
    Threshold,
    Tracked,
    Values,
    above,
    began,
    cusum,
    finite,
)

_FEW_STEPS = 5  # with fewer a standard error from successive differences says little
_SURE = 4.0  # standard errors above a fixed threshold, which no choice of the most extreme mean has made small


def make_detectors(config: settings.DetectorsConfig) -> dict[str, list[Detector[Any]]]:
    """The detectors of each table of the recipe, as they are before the first step."""
    loops = Threshold(
        config.repetition,
        "detectors/looping/mean",
        symptom="responses that are loops",
        advice="read them; lower objective.discount, or set reward.coef > 0 and the check 'repetition'",
    )
    cut = Threshold(
        config.truncation,
        "response/truncated/mean",
        symptom="responses cut at a limit of tokens",
        advice="raise sampling.max_new_tokens, or set reward.coef > 0 and the check 'truncated'",
    )
    low_kl = Threshold(
        config.low_kl_windows,
        "detectors/low_kl/mean",
        symptom="long responses with 256 tokens on which the teacher is five times nearer to the student than on the rest",
        advice="read them: the student may hide in passages of which the teacher is sure",
    )
    special_tokens = Threshold(
        config.special_tokens,
        "detectors/special_tokens/mean",
        symptom="special tokens with a log ratio beyond 15 nats",
        advice="where responses are whole, compare the tokenizers and chat templates (opd align); where they end early, lower "
        "objective.discount",
    )
    common_tokens = Threshold(
        config.common_tokens,
        "detectors/common_gain/mean",
        "detectors/common_actions/mean",
        symptom="positive advantage on the five most common tokens, above their fraction of the tokens",
        advice="read the responses: a style may be learned instead of answers",
    )
    return {
        "goodhart": [Goodhart(config.goodhart)],
        "log_ratio_reward_auroc": [Auroc(config.log_ratio_reward_auroc)],
        "flagged_advantage": [FlaggedAdvantage(config.flagged_advantage)],
        "repetition": [loops],
        "truncation": [cut, Length(config.truncation)],
        "low_kl_windows": [low_kl],
        "overlap": [Overlap(config.overlap)],
        "special_tokens": [special_tokens],
        "common_tokens": [common_tokens],
        "teacher_drift": [TeacherDrift(config.teacher_drift)],
        "format_errors": [FormatErrors(config.format_errors)],
        "held_out": [HeldOut(config.held_out, train_memory=config.goodhart.memory)],
    }


class Goodhart(Detector[settings.GoodhartConfig]):
    """1: the distillation reward rises while the reward falls. Value: how far the reward is below its best."""

    reads = ("reward/mean", "kl/token/mean", "kl/sequence/mean")
    where = "a task with a verifier"

    def __init__(self, config: settings.GoodhartConfig) -> None:
        super().__init__(config)
        self._reward = Tracked(config.memory)
        self._kl = [Smoothed(config.memory), Smoothed(config.memory)]

    def measure(self, step: int, *found: float) -> Measurements:
        self._kl = [kl.add(value) for kl, value in zip(self._kl, found[1:], strict=True)]
        best = self._reward.add(found[0], step, *(kl.mean for kl in self._kl))
        if best is None:
            return {}
        reward, message = self._reward.now, None
        fallen = [
            f"per {unit} from {then:.3g} to {now.mean:.3g}"
            for unit, now, then in zip(("token", "sequence"), self._kl, best.beside, strict=True)
            if now.mean < (1.0 - self.config.gain) * then
        ]
        if fallen and above(best.stream, reward, self.config.drop):
            message = (
                f"the reward fell from {best.mean:.2f} to {reward.mean:.2f} since step {best.step} (allowed: "
                f"{self.config.drop:.2f}) while the reverse KL fell {' and '.join(fallen)}: the teacher prefers other responses "
                "than right answers; read the responses, set reward.coef > 0"
            )
        return {"": Measurement(best.mean - reward.mean, message)}


class Auroc(Detector[settings.AurocConfig]):
    """2: AUROC of the log ratio of a response against its reward, pooled over steps.

    A step weighs by its precision where scores say nothing of rewards, 12 pairs / (n + 1) for n responses, the inverse of
    the Wilcoxon statistic's variance; older steps by (1 - 1 / memory) a step.
    """

    reads = ("detectors/auroc/mean", "detectors/auroc_pairs/sum", "detectors/auroc_of/sum")
    where = "steps in which responses differ in reward"

    def __init__(self, config: settings.AurocConfig) -> None:
        super().__init__(config)
        self._total = self._precision = self._squares = 0.0
        self._since: int | None = None

    def measure(self, step: int, *found: float) -> Measurements:
        area, pairs, num = found
        if pairs <= 0.0 or num < 0.0:
            return {}
        kept, weight = 1.0 - 1.0 / self.config.memory, 12.0 * pairs / (num + 1.0)
        self._total = kept * self._total + weight * area
        self._precision = kept * self._precision + weight
        self._squares = kept * kept * self._squares + weight
        pooled, error = self._total / self._precision, math.sqrt(self._squares) / self._precision
        low = pooled < self.config.threshold and error <= self.config.max_error
        self._since = began(self._since, step, low)
        message = None
        if low:
            message = (
                f"log ratios tell right from wrong with an AUROC of {pooled:.2f} (standard error {error:.2f}; threshold "
                f"{self.config.threshold:.2f}) since step {self._since}: the teacher does not prefer right answers; evaluate it "
                "on these tasks, set reward.coef > 0"
            )
        return {"": Measurement(pooled, message)}


class FlaggedAdvantage(Detector[settings.FlaggedAdvantageConfig]):
    """3: the mean advantage of tokens with format errors, less that of the others (0 where it is integrated)."""

    reads = ("detectors/flagged_advantage/mean",)
    where = "responses with format errors"

    def __init__(self, config: settings.FlaggedAdvantageConfig) -> None:
        super().__init__(config)
        self._gap = Smoothed(config.memory)
        self._since: int | None = None

    def observe(self, step: int, values: Values) -> Measurements:
        flagged = finite(values, *self.reads)
        if flagged is None:
            return {}
        others = finite(values, "detectors/unflagged_advantage/mean") or (0.0,)
        self._gap = gap = self._gap.add(flagged[0] - others[0])
        pushed = gap.ready and gap.mean > max(self.config.threshold, _SURE * gap.error)
        self._since = began(self._since, step, pushed)
        message = None
        if pushed:
            message = (
                f"tokens with format errors have an advantage {gap.mean:.3g} above the others' (threshold "
                f"{self.config.threshold:g}) since step {self._since}: errors are rewarded; set reward.coef > 0, so that every "
                "error costs reward.format_error, and set a baseline"
            )
        return {"": Measurement(gap.mean, message)}


class Length(Detector[settings.TruncationConfig]):
    """5: responses that grow fast, or that shrink while the reverse KL of a token rises.

    Value: the mean length, divided by the shortest of the last `window` steps.
    """

    reads = ("response/length/mean",)

    def __init__(self, config: settings.TruncationConfig) -> None:
        super().__init__(config)
        self._length, self._kl = Smoothed(config.memory), Smoothed(config.memory)
        self._marks: list[Mark] = []

    def observe(self, step: int, values: Values) -> Measurements:
        found = finite(values, *self.reads)
        if found is None:
            return {}
        self._length, paid = self._length.add(found[0]), finite(values, "kl/token/mean")
        self._kl = self._kl if paid is None else self._kl.add(paid[0])
        length, kl = self._length, self._kl
        # From the first step on: a student can learn to end at once before an average has filled its memory.
        self._marks = [*self._marks, Mark(length, step, (kl.mean,))][-self.config.window :]
        short, long = (extreme(self._marks, key=lambda mark: mark.mean) for extreme in (min, max))
        message = None
        if length.ready and above(length, short.stream, (self.config.growth - 1.0) * short.mean):
            message = (
                f"responses grew from {short.mean:.0f} tokens (step {short.step}) to {length.mean:.0f} (allowed: "
                f"{self.config.growth:g} times in {self.config.window} steps); look for loops and padding, or lower "
                "objective.discount"
            )
        dearer = kl.mean > 1.25 * long.beside[0] > 0.0
        if dearer and above(long.stream, length, (1.0 - 1.0 / self.config.shrink) * long.mean):
            message = (
                f"responses shrank from {long.mean:.0f} tokens (step {long.step}) to {length.mean:.1f} (allowed: "
                f"{self.config.shrink:g} times) while the reverse KL of a token rose from {long.beside[0]:.3g} to {kl.mean:.3g}: "
                "the student learns to end at once; lower objective.discount"
            )
        return {"length": Measurement(length.mean / short.mean if short.mean > 0.0 else math.nan, message)}


class Overlap(Detector[settings.OverlapConfig]):
    """7: student and teacher differ more and more, by their likeliest tokens ("topk") or by their entropies ("gap"); or the student
    becomes far more certain than its teacher ("entropy").

    Values: the top-k overlap; |teacher's - student's entropy| in nats; the student's entropy divided by that of its start.
    """

    reads = ("student/topk_overlap/mean", "student/entropy_gap/mean", "teacher/entropy/mean")
    where = "an objective with distributions"

    def __init__(self, config: settings.OverlapConfig) -> None:
        super().__init__(config)
        self._overlap, self._gap = Tracked(config.memory), Tracked(config.memory, lowest=True)
        self._student, self._teacher = Smoothed(config.memory), Smoothed(config.memory)
        self._start: Mark | None = None

    def measure(self, step: int, *found: float) -> Measurements:
        best, least = self._overlap.add(found[0], step), self._gap.add(abs(found[1]), step)
        self._teacher, self._student = self._teacher.add(found[2]), self._student.add(found[2] - found[1])
        if self._start is None and self._student.count == _FEW_STEPS:
            self._start = Mark(self._student, step)
        measured: Measurements = {}
        if best is not None and least is not None:
            measured = {"topk": self._topk(best), "gap": self._entropy_gap(least)}
        if self._start is not None and self._start.mean > 0.0:
            measured["entropy"] = self._entropy(self._start)
        return measured

    def _topk(self, best: Mark) -> Measurement:
        now, message = self._overlap.now, None
        if above(best.stream, now, self.config.drop):
            message = (
                f"the overlap of the student's and the teacher's likeliest tokens fell from {best.mean:.2f} to {now.mean:.2f} "
                f"since step {best.step} (allowed: {self.config.drop:.2f} less): the student leaves the states that the teacher "
                "knows; lower optimizer.lr, or warm up on the teacher's samples"
            )
        return Measurement(now.mean, message)

    def _entropy_gap(self, least: Mark) -> Measurement:
        now, message = self._gap.now, None
        if above(now, least.stream, self.config.entropy_gap):
            message = (
                f"the entropies of student and teacher differ by {now.mean:.2f} nats, {least.mean:.2f} at step {least.step} "
                f"(allowed: {self.config.entropy_gap:.2f} more): the student leaves the states that the teacher knows; lower "
                "optimizer.lr"
            )
        return Measurement(now.mean, message)

    def _entropy(self, start: Mark) -> Measurement:
        student, teacher, fraction, message = self._student, self._teacher, self.config.entropy_fraction, None
        if above(start.stream, student, (1.0 - fraction) * start.mean) and student.mean < fraction * teacher.mean:
            message = (
                f"the student's entropy fell from {start.mean:.2f} nats (step {start.step}) to {student.mean:.2f}, the teacher's "
                f"is {teacher.mean:.2f} (allowed: {fraction:.0%} of either): the student no longer explores; lower optimizer.lr, "
                "or try objective.divergence = 'forward_kl'"
            )
        return Measurement(student.mean / start.mean, message)


class TeacherDrift(Detector[settings.TeacherDriftConfig]):
    """10: the student loses one of its teachers.

    Values, by teacher: the reverse KL divided by its lowest, and how far the reward is below its best.
    """

    reads = ("kl/token/TEACHER/mean",)

    def __init__(self, config: settings.TeacherDriftConfig) -> None:
        super().__init__(config)
        self._kl: dict[str, Tracked] = {}
        self._reward: dict[str, Tracked] = {}

    def observe(self, step: int, values: Values) -> Measurements:
        measured: Measurements = {}
        prefix, suffix = "kl/token/", "/mean"
        for key in sorted(values):
            if not key.startswith(prefix) or not key.endswith(suffix) or len(key) <= len(prefix + suffix):
                continue
            name = key[len(prefix) : -len(suffix)]
            kl, reward = finite(values, key), finite(values, f"detectors/reward/{name}/mean")
            if kl is not None:
                tracked = self._kl.setdefault(name, Tracked(self.config.memory, lowest=True))
                if (nearest := tracked.add(kl[0], step)) is not None:
                    measured[f"{name}/kl"] = self._kl_of(name, tracked.now, nearest)
            if reward is not None:
                tracked = self._reward.setdefault(name, Tracked(self.config.memory))
                if (best := tracked.add(reward[0], step)) is not None:
                    measured[f"{name}/reward"] = self._reward_of(name, tracked.now, best)
        return measured

    def _kl_of(self, name: str, now: Smoothed, nearest: Mark) -> Measurement:
        message = None
        if above(now, nearest.stream, max(self.config.min_rise, (self.config.rise - 1.0) * nearest.mean)):
            message = (
                f"the reverse KL to teacher '{name}' rose from {nearest.mean:.3g} to {now.mean:.3g} nats a token since step "
                f"{nearest.step} (allowed: {self.config.rise:g} times): lower optimizer.lr, or give its tasks more weight"
            )
        return Measurement(now.mean / nearest.mean if nearest.mean > 0.0 else math.nan, message)

    def _reward_of(self, name: str, now: Smoothed, best: Mark) -> Measurement:
        message = None
        if above(best.stream, now, self.config.drop):
            message = (
                f"the reward on the prompts of teacher '{name}' fell from {best.mean:.2f} to {now.mean:.2f} since step "
                f"{best.step} (allowed: {self.config.drop:.2f}): lower optimizer.lr, or give its tasks more weight"
            )
        return Measurement(best.mean - now.mean, message)


class FormatErrors(Detector[settings.FormatErrorsConfig]):
    """11: a CUSUM of the rate of format errors. Value: the sum.

    z = (rate - p) / sqrt(p (1 - p) / episodes) with the reference p = low + 3 sqrt(low (1 - low) / (episodes memory)), low the
    lowest moving average before this step: that far below its mean a moving average comes within a run by chance.
    """

    reads = ("format/errors/mean", "detectors/episodes/sum")

    def __init__(self, config: settings.FormatErrorsConfig) -> None:
        super().__init__(config)
        self._rate = Tracked(config.memory, lowest=True)
        self._total = 0.0
        self._since: int | None = None

    def measure(self, step: int, *found: float) -> Measurements:
        rate, num_episodes = found
        if num_episodes <= 0.0:
            return {}
        usual = self._reference(rate, num_episodes)
        excess = (rate - usual) / math.sqrt(usual * (1.0 - usual) / num_episodes)
        self._total = cusum(self._total, excess, self.config.slack)
        self._since = began(self._since, step, self._total > 0.0)
        self._rate.add(rate, step)
        message = None
        if self._total > self.config.limit:
            message = (
                f"format errors rose to {rate:.1%} of the responses from {usual:.1%} (CUSUM {self._total:.1f}, limit "
                f"{self.config.limit:g}) since step {self._since}: read the flagged responses; set reward.coef > 0, so that every "
                "error costs reward.format_error"
            )
        return {"": Measurement(self._total, message)}

    def _reference(self, rate: float, num_episodes: float) -> float:
        """p; the rate of this step itself while there are too few earlier steps."""
        now, lowest, least = self._rate.now, self._rate.extreme, self.config.acceptable
        usual = lowest.mean if lowest else now.mean if now.count >= _FEW_STEPS else rate
        low = min(max(usual, least), 1.0 - least)
        steps = max(1, min(now.count, self.config.memory))
        return min(low + 3.0 * math.sqrt(low * (1.0 - low) / (num_episodes * steps)), 1.0 - least)


class HeldOut(Detector[settings.HeldOutConfig]):
    """12: the held-out reward falls and the training reward does not follow. Value: how far the former is below its best."""

    reads = ("reward/mean", "held_out/reward/mean")

    def __init__(self, config: settings.HeldOutConfig, *, train_memory: int) -> None:
        super().__init__(config)
        self._train, self._held_out = Smoothed(train_memory), Tracked(config.memory)

    def observe(self, step: int, values: Values) -> Measurements:
        trained, measured = finite(values, "reward/mean"), finite(values, "held_out/reward/mean")
        self._train = train = self._train if trained is None else self._train.add(trained[0])
        if measured is None or not train.count:
            return {}
        best, now, message = self._held_out.add(measured[0], step, train.mean), self._held_out.now, None
        if best is None:
            return {}
        fall = best.mean - now.mean
        if above(best.stream, now, self.config.drop) and best.beside[0] - train.mean < fall / 2.0:
            message = (
                f"the held-out reward fell from {best.mean:.2f} to {now.mean:.2f} since step {best.step} (allowed: "
                f"{self.config.drop:.2f}) while the training reward went from {best.beside[0]:.2f} to {train.mean:.2f}: the "
                "student exploits the verifier of the training tasks; read the responses that it accepts"
            )
        return {"": Measurement(fall, message)}
