"""The first half of a step: prompts, the student's responses, and their teachers' scores."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from opd.config import Config
from opd.data.stream import PromptStream
from opd.records import FailedScore, Prompt, Rollout, ScoredRollout
from opd.rewards.judge import Judge
from opd.roles import Sampler, Seed, Teacher


@dataclass(frozen=True)
class Collected:
    """What a step was given: its scored rollouts; where the stream of prompts stood behind them; seconds by phase ("sample" and
    "score" overlap where both are behind servers)."""

    scored: tuple[ScoredRollout, ...]
    cursor: Mapping[str, int]
    phases: Mapping[str, float]


def collect(
    config: Config, stream: PromptStream, sampler: Sampler, teachers: Teacher, *, step: int, per_prompt: bool
) -> Collected:
    """Sample and score the prompts that come next.

    per_prompt: each prompt by itself, all of them at once, so that a response is scored as soon as its group is there: for samplers
    and teachers that wait for servers rather than for this machine.
    """
    start = time.perf_counter()
    prompts = stream.next(config.sampling.prompts_per_step)
    units = _by_prompt(prompts) if per_prompt else []

    def work(unit: Sequence[Prompt]) -> tuple[list[ScoredRollout], float]:
        seed: Seed = (config.seed, "sample", step, *(("prompt", unit[0].id) if per_prompt else ()))
        rollouts = sampler.sample(unit, num_samples=config.sampling.group_size, seed=seed)
        sampled = time.perf_counter()
        return score_usable(teachers, rollouts), sampled

    if not per_prompt:
        found = [work(prompts)]
    else:
        most = max(1, config.episodes.max_concurrent // config.sampling.group_size)
        with ThreadPoolExecutor(min(most, len(units)), thread_name_prefix="opd-unit") as pool:
            found = list(pool.map(work, units))
    last = max(sampled for _, sampled in found)
    phases = {"sample": last - start, "score": time.perf_counter() - last}
    return Collected(tuple(item for scored, _ in found for item in scored), dict(stream.cursor), phases)


def judged(judge: Judge, scored: Sequence[ScoredRollout]) -> tuple[ScoredRollout, ...]:
    """The same with rewards and flags."""
    rollouts = judge([item.rollout for item in scored])
    return tuple(replace(item, rollout=rollout) for item, rollout in zip(scored, rollouts, strict=True))


def score_usable(teachers: Teacher, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
    """Each rollout with its own teacher's score, in the order given; teachers are not asked about rollouts that failed."""
    usable = [r for r in rollouts if r.failure is None]
    scored = iter(teachers.score(usable) if usable else [])
    # an episode that a server lost is lost with all its parts, of which one carries what happened
    lost = {(r.prompt.id, r.sample) for r in rollouts if r.events.get("lost")}
    return [
        next(scored)
        if r.failure is None
        else ScoredRollout(r, FailedScore(r.prompt.teacher, r.failure, lost=(r.prompt.id, r.sample) in lost))
        for r in rollouts
    ]


def _by_prompt(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """One that stands twice stays in one unit, so that its samples are numbered through."""
    units: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        units.setdefault(prompt.id, []).append(prompt)
    return list(units.values())
