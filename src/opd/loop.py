"""The training loop, written in roles only: embedded and distributed runs are this same loop.

Prompt -> Rollout -> ScoredRollout -> Batch -> advantages -> loss -> update
"""

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from opd.batch import pack, trainable
from opd.collect import Collected, collect, judged
from opd.config import Config
from opd.data.stream import PromptStream
from opd.detectors.metrics import detector_metrics
from opd.errors import RewardError, StalledError
from opd.metrics import Max, Metrics, Sum, mean_of, merge, values
from opd.objective import compute_advantages
from opd.prefetch import Prefetch
from opd.records import FailedScore, ScoredRollout
from opd.rewards.judge import Judge
from opd.roles import Learner, Sampler, Teacher
from opd.step_metrics import alignment_metrics, sampling_metrics

_MOST_EMPTY = 3  # steps in a row of which no rollout can be trained on, or none of one teacher: no accident any more


@dataclass(frozen=True)
class Parts:
    """What a run is made of; special_ids: the student's special tokens; per_prompt: prompts are sampled and scored each by itself,
    all at once (`opd.collect`)."""

    stream: PromptStream
    sampler: Sampler
    teachers: Teacher
    learner: Learner
    judge: Judge
    special_ids: frozenset[int] = frozenset()
    per_prompt: bool = False


@dataclass(frozen=True)
class StepReport:
    """What one step did: `step` counts from 1; `values` are the merged metrics as plain numbers; cursor: where the stream of
    prompts stood behind those of this step. failure: the step is done, and the sampler could not be given its weights."""

    step: int
    values: Mapping[str, float]
    scored: tuple[ScoredRollout, ...]
    cursor: Mapping[str, int]
    failure: Exception | None = None


@dataclass
class _Clock:
    """Seconds by phase of one step; "wait" is what no phase of this thread accounts for."""

    started: float = field(default_factory=time.perf_counter)
    phases: dict[str, float] = field(default_factory=dict)
    aside: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def metrics(self, num_tokens: int) -> Metrics:
        total = time.perf_counter() - self.started
        wait = max(0.0, total - sum(self.phases.values()))
        every = self.phases | self.aside | {"wait": wait, "step": total}
        times: Metrics = {f"time/{name}_s/sum": Sum(s) for name, s in every.items()}
        times["time/tokens_per_s/mean"] = mean_of([num_tokens / total])
        return times


def train_steps(config: Config, parts: Parts, *, start: int) -> Generator[StepReport]:
    """Run steps start + 1 ... config.steps, yielding a report after each update.

    With `cluster.max_staleness` above 0 the steps that follow are sampled and scored meanwhile, by a student that is at most so
    many updates older than the one that learns from them.

    A step of which no rollout can be trained on makes none; raises StalledError after several of them in a row, when a teacher
    loses all its rollouts as often, and when one step loses more than its share. Prompts of a step that raises count as not taken.
    """
    empty = 0
    silent: Counter[str] = Counter()
    staleness = config.cluster.max_staleness
    with Prefetch(partial(_collect, config, parts), first=start + 1, last=config.steps, ahead=staleness) as ahead:
        for step in range(start + 1, config.steps + 1):
            clock = _Clock()
            collected = ahead.take()
            # what was done meanwhile took none of this thread's time
            (clock.aside if staleness else clock.phases).update(collected.phases)
            report = update(config, parts, step, collected, clock)
            ahead.done(step)
            empty = 0 if trainable(report.scored, unscored=config.reward.coef > 0) else empty + 1
            yield report
            _require_answers(report.scored, silent)
            if empty == _MOST_EMPTY:
                reasons = {s.score.reason: None for s in report.scored if isinstance(s.score, FailedScore)}
                shown = "; ".join(list(reasons)[:3]) or "no turn of the student"
                raise StalledError(f"no rollout of the last {empty} steps can be trained on ({shown})")
            if report.failure is not None:
                raise report.failure


def _require_answers(scored: Sequence[ScoredRollout], silent: Counter[str]) -> None:
    """Raise StalledError when a teacher has lost all its rollouts of several steps in a row, which `silent` counts."""
    for teacher in dict.fromkeys(s.score.teacher for s in scored):
        mine = [s for s in scored if s.score.teacher == teacher]
        silent[teacher] = silent[teacher] + 1 if all(map(_lost, mine)) else 0
        if silent[teacher] == _MOST_EMPTY:
            raise StalledError(f"the last {_MOST_EMPTY} steps lost every rollout of teacher '{teacher}' ({_why(mine)})")


def _collect(config: Config, parts: Parts, step: int) -> Collected:
    return collect(config, parts.stream, parts.sampler, parts.teachers, step=step, per_prompt=parts.per_prompt)


def train_step(config: Config, parts: Parts, step: int) -> StepReport:
    """One step: sample, score, update. A pure function of the parts' state, (config, step) and nothing else."""
    clock = _Clock()
    collected = _collect(config, parts, step)
    clock.phases.update(collected.phases)
    report = update(config, parts, step, collected, clock)
    if report.failure is not None:
        raise report.failure
    return report


def update(config: Config, parts: Parts, step: int, collected: Collected, clock: _Clock) -> StepReport:
    """The second half of a step: what was collected moves the student, and the sampler follows it."""
    try:
        scored = judged(parts.judge, collected.scored)
    except RewardError as error:
        error.args = (f"step {step}: {error}",)
        raise
    rollouts = [item.rollout for item in scored]
    _require_most(config, step, scored)
    unscored = config.reward.coef > 0
    if not trainable(scored, unscored=unscored):
        # the same weights, and the version that a run has which is resumed here
        failure = _hand_over(parts, step)
        metrics: Metrics = {"update/skipped/sum": Sum(1), "batch/dropped/sum": Sum(len(scored))}
        metrics |= sampling_metrics(scored)
        metrics |= clock.metrics(sum(len(r.token_ids) for r in rollouts))
        return StepReport(step, values(metrics), scored, collected.cursor, failure)
    with clock.phase("update"):
        batch, counts = pack(scored, logprob_floor=config.objective.teacher_logprob_floor, unscored=unscored)
        if config.objective.needs_student_scores or config.cluster.max_staleness:
            batch = parts.learner.score_student(batch)
        batch, followed = compute_advantages(config, batch)
        # A batch of which nothing is left makes no update: an optimizer's momentum would move on it all the same.
        epochs = config.objective.epochs if bool(batch.train_mask.any()) else 0
        updates = [parts.learner.forward_backward(batch) | parts.learner.optim_step() for _ in range(epochs)]
        failure = _hand_over(parts, step)
    metrics = dict(updates[0]) if updates else {"update/skipped/sum": Sum(1)}
    metrics |= {k: v for k, v in merge(updates).items() if k.startswith(("optim/", "loss/"))}
    metrics |= followed | sampling_metrics(scored)
    metrics |= {f"batch/{name}/sum": Sum(n) for name, n in counts.items()}
    if config.compute.keeps_scores:
        metrics["batch/cached/sum"] = Sum(sum(s.cached for s in scored))
    metrics |= alignment_metrics(scored)
    integrated = config.objective.coef if config.objective.integrated else 0.0
    metrics |= detector_metrics(scored, batch, special_ids=parts.special_ids, integrated=integrated)
    metrics |= clock.metrics(sum(len(r.token_ids) for r in rollouts))
    if config.cluster.max_staleness:
        ages = [step - 1 - r.policy_version for r in rollouts]
        metrics |= {"staleness/mean": mean_of(ages), "staleness/max": Max(max(ages))}
    return StepReport(step, values(metrics), scored, collected.cursor, failure)


def _hand_over(parts: Parts, step: int) -> Exception | None:
    """Give the sampler the weights of this step; returns what it raised, for the step itself is done and can be saved."""
    try:
        parts.sampler.load_weights(parts.learner.weights(), policy_version=step)
    except Exception as error:
        return error
    return None


def _lost(scored: ScoredRollout) -> bool:
    """Whether a server lost it: it was never sampled, or never scored, for no reason of its own."""
    return isinstance(scored.score, FailedScore) and scored.score.lost


def _why(lost: Sequence[ScoredRollout]) -> str:
    """The first reason, and how many more there are."""
    reasons = list(dict.fromkeys(s.score.reason for s in lost if isinstance(s.score, FailedScore)))
    return reasons[0] + (f"; and {len(reasons) - 1} more reasons" if len(reasons) > 1 else "")


def _require_most(config: Config, step: int, scored: Sequence[ScoredRollout]) -> None:
    """Raise StalledError when servers lost more of a step than the recipe allows."""
    lost = [s for s in scored if _lost(s)]
    if len(lost) > config.remote.max_lost_fraction * len(scored):
        raise StalledError(
            f"step {step}: {len(lost)} of {len(scored)} rollouts were lost ({_why(lost)}), more than remote.max_lost_fraction = "
            f"{config.remote.max_lost_fraction:g}"
        )
