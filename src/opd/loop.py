"""The training loop, in terms of roles alone: one process and a cluster run this same loop.

Prompt -> Rollout -> ScoredRollout -> Batch -> advantages -> loss -> update
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from opd.batch import pack, trainable
from opd.config import Config
from opd.data.tasks import PromptStream
from opd.detectors.metrics import detector_metrics
from opd.errors import RewardError, StalledError
from opd.metrics import Max, Metrics, Sum, mean_of, merge, values
from opd.objective import compute_advantages
from opd.records import FailedScore, Prompt, Rollout, ScoredRollout
from opd.rewards.judge import Judge
from opd.roles import Learner, Sampler, Seed, Teacher
from opd.step_metrics import alignment_metrics, sampling_metrics

_MAX_EMPTY_STEPS = 3  # steps in a row without a usable rollout, of all teachers or of one: no accident any more


@dataclass(frozen=True)
class Components:
    """The parts of a run. special_ids: the student's special tokens; per_prompt: each prompt is sampled and scored on its own,
    all at the same time, as servers allow."""

    stream: PromptStream
    sampler: Sampler
    teachers: Teacher
    learner: Learner
    judge: Judge
    special_ids: frozenset[int] = frozenset()
    per_prompt: bool = False


@dataclass(frozen=True)
class Collected:
    """The first half of a step: its scored rollouts; the position of the prompt stream behind them; seconds by phase ("sample" and
    "score" overlap where servers do both)."""

    scored: tuple[ScoredRollout, ...]
    cursor: Mapping[str, int]
    phases: Mapping[str, float]


@dataclass(frozen=True)
class StepReport:
    """The result of one step.

    step: counts from 1; values: the merged metrics as plain numbers; cursor: the position of the prompt stream behind this step.
    failure: the step is done, and the sampler could not take its weights.
    """

    step: int
    values: Mapping[str, float]
    scored: tuple[ScoredRollout, ...]
    cursor: Mapping[str, int]
    failure: Exception | None = None


@dataclass
class _Clock:
    """Seconds by phase of one step; "wait" is the time of this thread outside every phase."""

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


class _Prefetch:
    """Collects steps `first` ... `last` in order; step n once step n - ahead - 1 is done.

    With `ahead` = 0 a step is collected when it is taken, by the thread that takes it. `take` raises what collecting raised, and no
    later step is collected then. Leaving the context waits for the step that is being collected, and drops it.
    """

    def __init__(self, make: Callable[[int], Collected], *, first: int, last: int, ahead: int) -> None:
        self._make = make
        self._next = first
        self._last = last
        self._ahead = ahead
        self._failed = False
        self._made: deque[Future[Collected]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="opd-ahead")
        self.done(first - 1)

    def take(self, step: int) -> Collected:
        return self._made.popleft().result() if self._ahead else self._make(step)

    def done(self, step: int) -> None:
        """The update of this step is there for the steps that follow."""
        while self._ahead and self._next <= min(step + 1 + self._ahead, self._last):
            self._made.append(self._pool.submit(self._collect, self._next))
            self._next += 1

    def _collect(self, step: int) -> Collected:
        if self._failed:
            raise CancelledError
        try:
            return self._make(step)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> "_Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def train_steps(config: Config, components: Components, *, start: int) -> Generator[StepReport]:
    """Run steps start + 1 ... config.steps, yielding a report after each update.

    With `cluster.max_staleness` above 0 a thread samples and scores the next steps meanwhile, from a student that is at most so
    many updates older than the one that learns from them.

    A step without a usable rollout makes no update. Raises StalledError after several of them in a row, when a teacher loses all
    its rollouts as often, and when one step loses more than `remote.max_lost_fraction`.
    """
    empty = 0
    silent: Counter[str] = Counter()
    staleness = config.cluster.max_staleness
    make = partial(collect, config, components)
    with _Prefetch(make, first=start + 1, last=config.steps, ahead=staleness) as prefetch:
        for step in range(start + 1, config.steps + 1):
            clock = _Clock()
            collected = prefetch.take(step)
            # a thread that works ahead takes none of this thread's time
            (clock.aside if staleness else clock.phases).update(collected.phases)
            report = update(config, components, step, collected, clock)
            prefetch.done(step)
            empty = 0 if trainable(report.scored, unscored=config.reward.coef > 0) else empty + 1
            yield report
            _require_answers(report.scored, silent)
            if empty == _MAX_EMPTY_STEPS:
                reasons = {s.score.reason: None for s in report.scored if isinstance(s.score, FailedScore)}
                shown = "; ".join(list(reasons)[:3]) or "no turn of the student"
                raise StalledError(f"no rollout of the last {empty} steps can be trained on ({shown})")
            if report.failure is not None:
                raise report.failure


def train_step(config: Config, components: Components, step: int) -> StepReport:
    """One step: sample, score, update. A pure function of the components' state, (config, step) and nothing else."""
    clock = _Clock()
    collected = collect(config, components, step)
    clock.phases.update(collected.phases)
    report = update(config, components, step, collected, clock)
    if report.failure is not None:
        raise report.failure
    return report


def collect(config: Config, components: Components, step: int) -> Collected:
    """The first half of a step: the next prompts, the student's responses, and their teachers' scores."""
    start = time.perf_counter()
    prompts = components.stream.next(config.sampling.prompts_per_step)

    def sample_and_score(group: Sequence[Prompt]) -> tuple[list[ScoredRollout], float]:
        seed: Seed = (config.seed, "sample", step, *(("prompt", group[0].id) if components.per_prompt else ()))
        rollouts = components.sampler.sample(group, num_samples=config.sampling.group_size, seed=seed)
        sampled = time.perf_counter()
        return score_usable(components.teachers, rollouts), sampled

    if components.per_prompt:
        groups = _by_prompt(prompts)
        at_once = max(1, config.episodes.max_concurrent // config.sampling.group_size)
        with ThreadPoolExecutor(min(at_once, len(groups)), thread_name_prefix="opd-prompt") as pool:
            found = list(pool.map(sample_and_score, groups))
    else:
        found = [sample_and_score(prompts)]
    last = max(sampled for _, sampled in found)
    phases = {"sample": last - start, "score": time.perf_counter() - last}
    return Collected(tuple(item for scored, _ in found for item in scored), dict(components.stream.cursor), phases)


def update(config: Config, components: Components, step: int, collected: Collected, clock: "_Clock") -> StepReport:
    """The second half of a step: the student learns from the rollouts, and the sampler takes its weights."""
    scored = _judged(components.judge, collected.scored, step)
    _require_most(config, step, scored)
    unscored = config.reward.coef > 0
    metrics: Metrics = {"update/skipped/sum": Sum(1)}
    with clock.phase("update"):
        if trainable(scored, unscored=unscored):
            batch, counts = pack(scored, logprob_floor=config.objective.teacher_logprob_floor, unscored=unscored)
            if config.objective.needs_student_scores or config.cluster.max_staleness:
                batch = components.learner.score_student(batch)
            batch, advantage_metrics = compute_advantages(config, batch)
            # Without a token to train on there is no update: an optimizer's momentum would move the weights all the same.
            epochs = config.objective.epochs if bool(batch.train_mask.any()) else 0
            updates = [
                components.learner.forward_backward(batch) | components.learner.optim_step() for _ in range(epochs)
            ]
            metrics = dict(updates[0]) if updates else metrics
            metrics |= {k: v for k, v in merge(updates).items() if k.startswith(("optim/", "loss/"))}
            metrics |= advantage_metrics | {f"batch/{name}/sum": Sum(n) for name, n in counts.items()}
            metrics |= alignment_metrics(scored)
            integrated = config.objective.coef if config.objective.integrated else 0.0
            metrics |= detector_metrics(scored, batch, special_ids=components.special_ids, integrated=integrated)
            if config.compute.keeps_scores:
                metrics["batch/cached/sum"] = Sum(sum(s.cached for s in scored))
        else:
            metrics["batch/dropped/sum"] = Sum(len(scored))
        failure = _load_weights(components, step)
    rollouts = [item.rollout for item in scored]
    metrics |= sampling_metrics(scored) | clock.metrics(sum(len(r.token_ids) for r in rollouts))
    if config.cluster.max_staleness:
        ages = [step - 1 - r.policy_version for r in rollouts]
        metrics |= {"staleness/mean": mean_of(ages), "staleness/max": Max(max(ages))}
    return StepReport(step, values(metrics), scored, collected.cursor, failure)


def _judged(judge: Judge, scored: Sequence[ScoredRollout], step: int) -> tuple[ScoredRollout, ...]:
    """The same with rewards and format errors."""
    try:
        rollouts = judge([item.rollout for item in scored])
    except RewardError as error:
        error.args = (f"step {step}: {error}",)
        raise
    return tuple(replace(item, rollout=rollout) for item, rollout in zip(scored, rollouts, strict=True))


def _load_weights(components: Components, step: int) -> Exception | None:
    """Give the sampler the weights of this step; returns the sampler's error, since the step itself is done and can be saved."""
    try:
        components.sampler.load_weights(components.learner.weights(), policy_version=step)
    except Exception as error:
        return error
    return None


def score_usable(teachers: Teacher, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
    """Each rollout with its own teacher's score, in the order given; teachers are not asked about rollouts that failed."""
    usable = [r for r in rollouts if r.failure is None]
    scored = iter(teachers.score(usable) if usable else [])
    # an episode that a server lost is lost with all its parts, of which one has the event
    lost = {(r.prompt.id, r.sample) for r in rollouts if r.events.get("lost")}
    return [
        next(scored)
        if r.failure is None
        else ScoredRollout(r, FailedScore(r.prompt.teacher, r.failure, lost=(r.prompt.id, r.sample) in lost))
        for r in rollouts
    ]


def _by_prompt(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Prompts by id: a prompt that occurs twice has its samples numbered through."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.id, []).append(prompt)
    return list(groups.values())


def _require_answers(scored: Sequence[ScoredRollout], silent: Counter[str]) -> None:
    """Raise StalledError when a teacher has lost all its rollouts of several steps in a row, which `silent` counts."""
    for teacher in dict.fromkeys(s.score.teacher for s in scored):
        mine = [s for s in scored if s.score.teacher == teacher]
        silent[teacher] = silent[teacher] + 1 if all(map(_lost, mine)) else 0
        if silent[teacher] == _MAX_EMPTY_STEPS:
            raise StalledError(
                f"the last {_MAX_EMPTY_STEPS} steps lost every rollout of teacher '{teacher}' ({_why(mine)})"
            )


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
