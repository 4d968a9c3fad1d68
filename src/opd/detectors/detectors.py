"""The detectors of reward hacking as states that the plain metrics of a step advance, and nothing else.

What each measures, and from when on that is a cause for alarm, stands with its figures in `opd.config.detectors`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from opd.config.detectors import (
    AurocConfig,
    FlaggedAdvantageConfig,
    FormatErrorsConfig,
    GoodhartConfig,
    HeldOutConfig,
    OverlapConfig,
    TeacherDriftConfig,
    TruncationConfig,
)
from opd.detectors.statistics import (
    Mark,
    Reading,
    Readings,
    Smoothed,
    Values,
    above,
    began,
    cusum,
    finite,
    highest,
    lowest,
)

_FEW_STEPS = 5  # with fewer a standard error from successive differences says little
_SURE = 4.0  # standard errors above a fixed threshold, which no choice of the most extreme mean has made small


@dataclass(frozen=True)
class Goodhart:
    """1: the distillation reward rises while the reward falls. Value: how far the reward is below its best."""

    config: GoodhartConfig
    reward: Smoothed
    kl: tuple[Smoothed, Smoothed]
    best: Mark | None = None
    needs: str = "reward/mean, kl/token/mean and kl/sequence/mean (a task with a verifier)"

    def observe(self, step: int, values: Values) -> tuple["Goodhart", Readings]:
        found = finite(values, "reward/mean", "kl/token/mean", "kl/sequence/mean")
        if found is None:
            return self, {}
        reward, kl = self.reward.add(found[0]), (self.kl[0].add(found[1]), self.kl[1].add(found[2]))
        best = highest(self.best, reward, step, kl[0].mean, kl[1].mean)
        state = replace(self, reward=reward, kl=kl, best=best)
        if best is None:
            return state, {}
        message = None
        fallen = [
            f"per {unit} from {then:.3g} to {now.mean:.3g}"
            for unit, now, then in zip(("token", "sequence"), kl, best.beside, strict=True)
            if now.mean < (1.0 - self.config.gain) * then
        ]
        if fallen and above(best.stream, reward, self.config.drop):
            message = (
                f"the reward fell from {best.stream.mean:.2f} to {reward.mean:.2f} since step {best.step} (allowed "
                f"{self.config.drop:.2f}) while the reverse KL fell {' and '.join(fallen)}: the teacher likes something else than "
                "right answers; read the responses, set reward.coef > 0"
            )
        return state, {"": Reading(best.stream.mean - reward.mean, message)}


@dataclass(frozen=True)
class Auroc:
    """2: AUROC of the log ratio of a response against its reward, pooled over steps.

    A step weighs by its precision where scores say nothing of rewards, 12 pairs / (n + 1) for n responses, the inverse of
    the Wilcoxon statistic's variance; older steps by (1 - 1 / memory) a step.
    """

    config: AurocConfig
    total: float = 0.0
    precision: float = 0.0
    squares: float = 0.0
    since: int | None = None
    needs: str = "detectors/auroc/mean (steps in which responses differ in reward)"

    def observe(self, step: int, values: Values) -> tuple["Auroc", Readings]:
        found = finite(values, "detectors/auroc/mean", "detectors/auroc_pairs/sum", "detectors/auroc_of/sum")
        if found is None or found[1] <= 0.0 or found[2] < 0.0:
            return self, {}
        area, pairs, num = found
        kept, weight = 1.0 - 1.0 / self.config.memory, 12.0 * pairs / (num + 1.0)
        total, precision = kept * self.total + weight * area, kept * self.precision + weight
        squares = kept * kept * self.squares + weight
        pooled, error = total / precision, math.sqrt(squares) / precision
        low = pooled < self.config.threshold and error <= self.config.max_error
        since = began(self.since, step, low)
        message = None
        if low:
            message = (
                f"log ratios tell right from wrong with an AUROC of {pooled:.2f} (standard error {error:.2f}; threshold "
                f"{self.config.threshold:.2f}) since step {since}: what the teacher likes is not what is right; check it on these "
                "tasks, set reward.coef > 0"
            )
        state = replace(self, total=total, precision=precision, squares=squares, since=since)
        return state, {"": Reading(pooled, message)}


@dataclass(frozen=True)
class FlaggedAdvantage:
    """3: the mean advantage of tokens with format errors, less that of the others (0 where it is integrated)."""

    config: FlaggedAdvantageConfig
    gap: Smoothed
    since: int | None = None
    needs: str = "detectors/flagged_advantage/mean (responses with format errors)"

    def observe(self, step: int, values: Values) -> tuple["FlaggedAdvantage", Readings]:
        flagged = finite(values, "detectors/flagged_advantage/mean")
        if flagged is None:
            return self, {}
        others = finite(values, "detectors/unflagged_advantage/mean") or (0.0,)
        gap = self.gap.add(flagged[0] - others[0])
        pushed = gap.ready and gap.mean > max(self.config.threshold, _SURE * gap.error)
        since = began(self.since, step, pushed)
        message = None
        if pushed:
            message = (
                f"tokens with format errors have an advantage {gap.mean:.3g} above the others' (threshold "
                f"{self.config.threshold:g}) since step {since}: errors are rewarded; set reward.coef > 0, which makes every "
                "error cost reward.format_error, and a baseline"
            )
        return replace(self, gap=gap, since=since), {"": Reading(gap.mean, message)}


@dataclass(frozen=True)
class Length:
    """5: responses that grow fast, or shrink at the price of what the teacher thinks of each token.

    Value: the mean length, in terms of the shortest of the last `window` steps.
    """

    config: TruncationConfig
    length: Smoothed
    kl: Smoothed
    marks: tuple[Mark, ...] = ()
    needs: str = "response/length/mean"

    def observe(self, step: int, values: Values) -> tuple["Length", Readings]:
        found = finite(values, "response/length/mean")
        if found is None:
            return self, {}
        length, paid = self.length.add(found[0]), finite(values, "kl/token/mean")
        kl = self.kl if paid is None else self.kl.add(paid[0])
        # From the first step on: a student can learn to end at once before an average has filled its memory.
        marks = (*self.marks, Mark(length, step, (kl.mean,)))[-self.config.window :]
        state = replace(self, length=length, kl=kl, marks=marks)
        short = min(marks, key=lambda mark: mark.stream.mean)
        long = max(marks, key=lambda mark: mark.stream.mean)
        message = None
        if length.ready and above(length, short.stream, (self.config.growth - 1.0) * short.stream.mean):
            message = (
                f"responses grew from {short.stream.mean:.0f} tokens (step {short.step}) to {length.mean:.0f} (allowed: "
                f"{self.config.growth:g} times in {self.config.window} steps); look for loops and padding, or lower "
                "objective.discount"
            )
        dearer = kl.mean > 1.25 * long.beside[0] > 0.0
        if dearer and above(long.stream, length, (1.0 - 1.0 / self.config.shrink) * long.stream.mean):
            message = (
                f"responses shrank from {long.stream.mean:.0f} tokens (step {long.step}) to {length.mean:.1f} (allowed: "
                f"{self.config.shrink:g} times) while the reverse KL of a token rose from {long.beside[0]:.3g} to {kl.mean:.3g}: "
                "the student learns to end at once; lower objective.discount"
            )
        ratio = length.mean / short.stream.mean if short.stream.mean > 0.0 else math.nan
        return state, {"length": Reading(ratio, message)}


@dataclass(frozen=True)
class Overlap:
    """7: student and teacher part, by their likeliest tokens ("topk") or their entropies ("gap"); or the student becomes far more
    certain than its teacher ("entropy").

    Values: the top-k overlap; |teacher's - student's entropy| in nats; the student's entropy in terms of its start.
    """

    config: OverlapConfig
    overlap: Smoothed
    gap: Smoothed
    student: Smoothed
    teacher: Smoothed
    best: Mark | None = None
    least: Mark | None = None
    start: Mark | None = None
    needs: str = (
        "student/topk_overlap/mean, student/entropy_gap/mean and teacher/entropy/mean (an objective with distributions)"
    )

    def observe(self, step: int, values: Values) -> tuple["Overlap", Readings]:
        found = finite(values, "student/topk_overlap/mean", "student/entropy_gap/mean", "teacher/entropy/mean")
        if found is None:
            return self, {}
        overlap, gap = self.overlap.add(found[0]), self.gap.add(abs(found[1]))
        teacher, student = self.teacher.add(found[2]), self.student.add(found[2] - found[1])
        best, least = highest(self.best, overlap, step), lowest(self.least, gap, step)
        start = self.start or (Mark(student, step) if student.count == _FEW_STEPS else None)
        state = Overlap(self.config, overlap, gap, student, teacher, best, least, start)
        readings = {}
        if best is not None and least is not None:
            readings = {"topk": self._topk(overlap, best), "gap": self._gap(gap, least)}
        if start is not None and start.stream.mean > 0.0:
            readings["entropy"] = self._entropy(student, teacher, start)
        return state, readings

    def _topk(self, now: Smoothed, best: Mark) -> Reading:
        message = None
        if above(best.stream, now, self.config.drop):
            message = (
                f"the overlap of the student's and the teacher's likeliest tokens fell from {best.stream.mean:.2f} to "
                f"{now.mean:.2f} since step {best.step} (allowed: {self.config.drop:.2f} less): the student leaves the states that "
                "the teacher knows; lower optimizer.lr, or warm up on the teacher's samples"
            )
        return Reading(now.mean, message)

    def _gap(self, now: Smoothed, least: Mark) -> Reading:
        message = None
        if above(now, least.stream, self.config.entropy_gap):
            message = (
                f"the entropies of student and teacher differ by {now.mean:.2f} nats, {least.stream.mean:.2f} at step {least.step} "
                f"(allowed: {self.config.entropy_gap:.2f} more): the student leaves the states that the teacher knows; lower "
                "optimizer.lr"
            )
        return Reading(now.mean, message)

    def _entropy(self, student: Smoothed, teacher: Smoothed, start: Mark) -> Reading:
        share, message = self.config.entropy_fraction, None
        if above(start.stream, student, (1.0 - share) * start.stream.mean) and student.mean < share * teacher.mean:
            message = (
                f"the student's entropy fell from {start.stream.mean:.2f} nats (step {start.step}) to {student.mean:.2f}, the "
                f"teacher's is {teacher.mean:.2f} (allowed: {share:.0%} of either): it no longer explores; lower optimizer.lr, or "
                "try objective.divergence = 'forward_kl'"
            )
        return Reading(student.mean / start.stream.mean, message)


@dataclass(frozen=True)
class _Teacher:
    """What `TeacherDrift` knows of one teacher."""

    kl: Smoothed
    reward: Smoothed
    nearest: Mark | None = None
    best: Mark | None = None


@dataclass(frozen=True)
class TeacherDrift:
    """10: the student loses one of its teachers. Values, by teacher: the reverse KL in terms of its lowest, and how far the
    reward is below its best."""

    config: TeacherDriftConfig
    teachers: Mapping[str, _Teacher] = field(default_factory=dict)
    needs: str = "kl/token/TEACHER/mean"

    def observe(self, step: int, values: Values) -> tuple["TeacherDrift", Readings]:
        teachers, readings = dict(self.teachers), {}
        prefix, suffix = "kl/token/", "/mean"
        for key in sorted(values):
            if not key.startswith(prefix) or not key.endswith(suffix) or len(key) <= len(prefix + suffix):
                continue
            name = key[len(prefix) : -len(suffix)]
            kl, reward = finite(values, key), finite(values, f"detectors/reward/{name}/mean")
            state = teachers.get(name) or _Teacher(Smoothed(self.config.memory), Smoothed(self.config.memory))
            if kl is not None:
                stream = state.kl.add(kl[0])
                state = replace(state, kl=stream, nearest=lowest(state.nearest, stream, step))
                if state.nearest is not None:
                    readings[f"{name}/kl"] = self._kl(name, state.kl, state.nearest)
            if reward is not None:
                stream = state.reward.add(reward[0])
                state = replace(state, reward=stream, best=highest(state.best, stream, step))
                if state.best is not None:
                    readings[f"{name}/reward"] = self._reward(name, state.reward, state.best)
            teachers[name] = state
        return replace(self, teachers=teachers), readings

    def _kl(self, name: str, now: Smoothed, nearest: Mark) -> Reading:
        then, message = nearest.stream.mean, None
        if above(now, nearest.stream, max(self.config.min_rise, (self.config.rise - 1.0) * then)):
            message = (
                f"the reverse KL to teacher '{name}' rose from {then:.3g} to {now.mean:.3g} nats a token since step {nearest.step} "
                f"(allowed: {self.config.rise:g} times): lower optimizer.lr, or give its tasks more weight"
            )
        return Reading(now.mean / then if then > 0.0 else math.nan, message)

    def _reward(self, name: str, now: Smoothed, best: Mark) -> Reading:
        message = None
        if above(best.stream, now, self.config.drop):
            message = (
                f"the reward on the prompts of teacher '{name}' fell from {best.stream.mean:.2f} to {now.mean:.2f} since step "
                f"{best.step} (allowed: {self.config.drop:.2f}): lower optimizer.lr, or give its tasks more weight"
            )
        return Reading(best.stream.mean - now.mean, message)


@dataclass(frozen=True)
class FormatErrors:
    """11: a CUSUM of the rate of format errors. Value: the sum.

    z = (rate - p) / sqrt(p (1 - p) / episodes) with the reference p = low + 3 sqrt(low (1 - low) / (episodes memory)), low the
    lowest moving average before this step: that far below its mean a moving average comes within a run by chance.
    """

    config: FormatErrorsConfig
    rate: Smoothed
    low: Mark | None = None
    total: float = 0.0
    since: int | None = None
    needs: str = "format/errors/mean and detectors/episodes/sum"

    def observe(self, step: int, values: Values) -> tuple["FormatErrors", Readings]:
        found = finite(values, "format/errors/mean", "detectors/episodes/sum")
        if found is None or found[1] <= 0.0:
            return self, {}
        usual = self._reference(found[0], found[1])
        excess = (found[0] - usual) / math.sqrt(usual * (1.0 - usual) / found[1])
        total = cusum(self.total, excess, self.config.slack)
        since = began(self.since, step, total > 0.0)
        rate = self.rate.add(found[0])
        message = None
        if total > self.config.limit:
            message = (
                f"format errors rose to {found[0]:.1%} of the responses from {usual:.1%} (CUSUM {total:.1f}, limit "
                f"{self.config.limit:g}) since step {since}: read the flagged responses; set reward.coef > 0, which makes every "
                "error cost reward.format_error"
            )
        state = replace(self, rate=rate, low=lowest(self.low, rate, step), total=total, since=since)
        return state, {"": Reading(total, message)}

    def _reference(self, rate: float, num_episodes: float) -> float:
        """p; the step's own rate while there are too few others."""
        stream = self.low.stream if self.low else self.rate
        least = self.config.acceptable
        low = min(max(stream.mean if stream.count >= _FEW_STEPS else rate, least), 1.0 - least)
        steps = max(1, min(stream.count, self.config.memory))
        return min(low + 3.0 * math.sqrt(low * (1.0 - low) / (num_episodes * steps)), 1.0 - least)


@dataclass(frozen=True)
class HeldOut:
    """12: the held-out reward falls and the training reward does not follow. Value: how far the former is below its best."""

    config: HeldOutConfig
    train: Smoothed
    held_out: Smoothed
    best: Mark | None = None
    needs: str = "reward/mean and held_out/reward/mean"

    def observe(self, step: int, values: Values) -> tuple["HeldOut", Readings]:
        found = finite(values, "reward/mean")
        train = self.train if found is None else self.train.add(found[0])
        measured = finite(values, "held_out/reward/mean")
        if measured is None or not train.count:
            return replace(self, train=train), {}
        held_out = self.held_out.add(measured[0])
        best = highest(self.best, held_out, step, train.mean)
        state = HeldOut(self.config, train, held_out, best)
        if best is None:
            return state, {}
        fall, message = best.stream.mean - held_out.mean, None
        if above(best.stream, held_out, self.config.drop) and best.beside[0] - train.mean < fall / 2.0:
            message = (
                f"the held-out reward fell from {best.stream.mean:.2f} to {held_out.mean:.2f} since step {best.step} (allowed: "
                f"{self.config.drop:.2f}) while the training reward went from {best.beside[0]:.2f} to {train.mean:.2f}: the "
                "verifier of the training tasks is exploited; read the responses that it accepts"
            )
        return state, {"": Reading(fall, message)}
