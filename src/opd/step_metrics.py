"""Every metric that a run writes, with its unit and meaning, and the metrics that follow from a step's rollouts alone.

A name is `area/name/stat`; the stat says how values merge: `mean` (weighted), `sum` or `max`; `value` is a detector's own.
`make reference` writes docs/reference/metrics.md from it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from opd.metrics import Max, Mean, Metrics, Sum, mean_of
from opd.records import ChunkScore, FailedScore, Rollout, ScoredRollout
from opd.rewards.reward import TIMEOUTS
from opd.text.alignment import LARGEST, shares, total


class Declared(NamedTuple):
    """One metric. name: parts in capitals stand for a name; unit: "" for a pure number; meaning: one sentence."""

    name: str
    unit: str
    meaning: str


PLACEHOLDERS = {
    "TASK": "a table of `[tasks]`",
    "TEACHER": "a table of `[teachers]`",
    "RULE": "a rule of a task's `checks.rules`",
    "EVENT": "an event that the environment counts, such as `tool_calls` or `observation_cut`",
    "REASON": "why a token has no log ratio, such as `no_counterpart`, `straddle` or `syntax`",
    "DETECTOR": "a table of `[detectors]`",
    "ASPECT": "what a detector with several values measures, such as `topk` or `length`",
}

GROUPS: Mapping[str, tuple[tuple[str, str, str], ...]] = MappingProxyType({
    "Distance of student and teacher": (
        ("kl/token/mean", "nats", "Reverse KL per token; without distributions an estimate from the sampled tokens."),
        ("kl/token/TEACHER/mean", "nats", "The same on the prompts of one teacher."),
        ("kl/sequence/mean", "nats", "Reverse KL of an episode, summed over its tokens."),
        ("kl/byte/mean", "nats", "Reverse KL per byte of text, for teachers with another tokenizer."),
        ("divergence/token/mean", "nats", "The divergence that the loss minimises, where it is not the full reverse KL."),
        ("student/entropy/mean", "nats", "Entropy of the student at the states where distributions are compared."),
        ("student/nll/mean", "nats", "Negative log-likelihood of the tokens that train."),
        ("student/topk_overlap/mean", "fraction", "Of the 16 likeliest tokens, those in common with the teacher, at some states."),
        ("student/topk_overlap/TEACHER/mean", "fraction", "The same on the prompts of one teacher."),
        ("student/entropy_gap/mean", "nats", "Entropy of the teacher minus that of the student, at the same states."),
        ("teacher/entropy/mean", "nats", "Entropy of the teacher at the same states."),
        ("teacher/floored_mass/mean", "fraction", "Probability of the student where that of the teacher was raised to the floor."),
        ("top_k/tail_mass/mean", "fraction", "Probability of the student outside the top-k tokens."),
        ("top_k/compared/mean", "fraction", "Actions with compared distributions, for a teacher with another tokenizer."),
    ),
    "The update": (
        ("loss/total/sum", "", "The loss of the update; with sampled advantages only its gradient has a meaning."),
        ("loss/clipped/mean", "fraction", "Trained actions whose importance ratio PPO clips."),
        ("optim/grad_norm/mean", "", "Norm of the gradient before clipping."),
        ("optim/lr/max", "", "Learning rate."),
        ("update/skipped/sum", "updates", "1 for a step without an update, because nothing of it could be trained on."),
        ("mask/tokens/sum", "tokens", "Tokens that the format mask leaves out of the distillation term."),
        ("mask/rollouts/sum", "rollouts", "Rollouts with such tokens."),
        ("correction/weight/mean", "", "Importance weight of the trained actions, before it is truncated or rejected."),
        ("correction/gap/mean", "nats", "Distance of the sampled log-probabilities from those of the student now."),
        ("correction/gap/max", "nats", "The largest such distance."),
        ("correction/truncated/sum", "tokens", "Actions whose importance weight was cut to the cap."),
        ("correction/rejected/sum", "tokens", "Actions that the bounds on importance weights left out."),
        ("staleness/mean", "updates", "Updates between the student that sampled and the student that learns."),
        ("staleness/max", "updates", "The largest such number."),
    ),
    "The batch": (
        ("batch/rollouts/sum", "rollouts", "Rollouts of the step."),
        ("batch/tokens/sum", "tokens", "Tokens of these rollouts, prompts included."),
        ("batch/packed_tokens/sum", "tokens", "Distinct tokens in the passes of the learner."),
        ("batch/dropped/sum", "rollouts", "Rollouts that are not trained on."),
        ("batch/unscored/sum", "rollouts", "Rollouts without a score of the teacher, on which the reward still trains."),
        ("batch/floored/sum", "tokens", "Sampled tokens whose teacher log-probability was raised to the floor."),
        ("batch/cached/sum", "rollouts", "Rollouts whose score the score cache had."),
        ("failed/TEACHER/sum", "rollouts", "Rollouts that this teacher did not score."),
        ("verifier/timeouts/sum", "responses", "Responses worth 0 because the math verifier did not compare them in time."),
        ("held_out/timeouts/sum", "responses", "The same among the held-out responses."),
        ("remote/retried/sum", "requests", "Requests to servers that were repeated; absent where there are none."),
        ("remote/lost/sum", "rollouts", "Rollouts that servers lost; absent where there are none."),
    ),
    "Responses and rewards": (
        ("reward/mean", "", "Mean reward of the episodes that have one."),
        ("reward/TASK/mean", "", "The same for one task."),
        ("held_out/reward/mean", "", "Mean reward of held-out prompts, every `evaluation.every` steps."),
        ("held_out/reward/TASK/mean", "", "The same for one task."),
        ("response/length/mean", "tokens", "Tokens of the student in an episode."),
        ("response/truncated/mean", "fraction", "Episodes that a limit on tokens cut."),
        ("format/errors/mean", "fraction", "Episodes with a format error."),
        ("format/RULE/sum", "episodes", "Episodes with an error that this rule found."),
        ("episode/turns/mean", "turns", "Turns of the student in an episode, where any has several."),
        ("episode/EVENT/sum", "events", "Events of the environments."),
    ),
    "A teacher with another tokenizer": (
        ("align/TEACHER/one_to_one/mean", "fraction", "Bytes of text in chunks of one token on both sides."),
        ("align/TEACHER/masked/mean", "fraction", "Tokens of the student without a log ratio."),
        ("align/TEACHER/masked/REASON/mean", "fraction", "The same by reason."),
        ("align/TEACHER/tokens_per_chunk/mean", "tokens", "Tokens of the student in a chunk."),
        ("align/TEACHER/bytes_per_chunk/mean", "bytes", "Bytes of a chunk."),
        ("align/TEACHER/largest_chunk/max", "bytes", "Bytes of the largest chunk."),
        ("align/TEACHER/straddles/mean", "per turn", "Teacher tokens that begin before the response."),
        ("align/TEACHER/rewritten/mean", "fraction", "Turns that the template of the teacher writes differently."),
        ("align/TEACHER/non_canonical/mean", "fraction", "Turns in other tokens than the tokenizer of the student would choose."),
        ("align/TEACHER/untranscribed/mean", "fraction", "Turns whose tool calls stayed in the syntax of the student."),
        ("align/TEACHER/alarms/mean", "per turn", "One-to-one chunks whose log-probability under the teacher is below -15 nats."),
    ),
    "Detectors": (
        ("detectors/episodes/sum", "episodes", "Episodes of the step."),
        ("detectors/repeated/mean", "fraction", "3-grams of a response that occurred in it before."),
        ("detectors/compression/mean", "", "Bytes of a response divided by those of its zlib form, from 200 characters on."),
        ("detectors/looping/mean", "fraction", "Responses that are one loop, by repeated 3-grams or by compression."),
        ("detectors/reward/TEACHER/mean", "", "Mean reward on the prompts of one teacher."),
        ("detectors/auroc/mean", "", "AUROC of the log ratio of a response against its reward."),
        ("detectors/auroc_pairs/sum", "pairs", "Pairs of responses with different rewards."),
        ("detectors/auroc_of/sum", "episodes", "Episodes with both a log ratio and a reward."),
        ("detectors/special_tokens/mean", "fraction", "Special tokens with a log ratio beyond 15 nats."),
        ("detectors/special_tokens/sum", "tokens", "The number of such tokens."),
        ("detectors/special_log_ratio/max", "nats", "Largest absolute log ratio on a special token."),
        ("detectors/low_kl/mean", "fraction", "Responses with four windows of 64 tokens of low KL in a row, from 256 tokens on."),
        ("detectors/low_kl_run/max", "windows", "The longest row of such windows."),
        ("detectors/flagged_advantage/mean", "", "Advantage of tokens with format errors."),
        ("detectors/unflagged_advantage/mean", "", "Advantage of the other tokens."),
        ("detectors/common_gain/mean", "fraction", "Positive advantage on the five most common tokens."),
        ("detectors/common_actions/mean", "fraction", "Actions that are one of the five most common tokens."),
        ("detectors/DETECTOR/value", "", "The value of a detector ([what it measures](configuration.md#detectors))."),
        ("detectors/DETECTOR/ASPECT/value", "", "The same, for a detector with several values."),
        ("detectors/DETECTOR/TEACHER/ASPECT/value", "", "The same by teacher."),
    ),
    "Time": (
        ("time/step_s/sum", "s", "The whole step."),
        ("time/sample_s/sum", "s", "Sampling."),
        ("time/score_s/sum", "s", "Scores of the teachers."),
        ("time/update_s/sum", "s", "Student scores, gradient and update."),
        ("time/wait_s/sum", "s", "Time of the step outside the phases of the training thread."),
        ("time/tokens_per_s/mean", "tokens/s", "Tokens of the rollouts, prompts included, divided by the time of the step."),
    ),
})  # fmt: skip
METRICS = tuple(Declared(*row) for rows in GROUPS.values() for row in rows)


def matches(pattern: str, name: str) -> bool:
    """Whether a metric of a run has this declared name."""
    return re.fullmatch(re.sub(r"\b[A-Z]+\b", "[^/]+", re.escape(pattern)), name) is not None


def declared(name: str) -> Declared | None:
    """The declaration of a metric of a run; None where there is none."""
    return next((metric for metric in METRICS if matches(metric.name, name)), None)


def reference() -> str:
    """The text of docs/reference/metrics.md."""
    head = "| metric | unit | meaning |\n| --- | --- | --- |\n"
    return (
        "# Metrics\n\n"
        "This page lists every metric that a run writes, with its unit and meaning.\n\n"
        "`metrics.jsonl` of a run folder holds one line for each step, and `opd.read_metrics(run)` returns\n"
        "these lines as dicts. The last part of a name says how values merge: `mean`, `sum` or `max`. A\n"
        "metric without data is absent.\n\n"
        "Parts in capitals stand for names:\n\n"
        + "".join(f"- `{part}`: {meaning}.\n" for part, meaning in PLACEHOLDERS.items())
        + "\n`make reference` generates this page from `opd.step_metrics`.\n"
        + "".join(
            f"\n## {title}\n\n{head}" + "".join(f"| `{name}` | {unit} | {meaning} |\n" for name, unit, meaning in rows)
            for title, rows in GROUPS.items()
        )
    )


def sampling_metrics(scored: Sequence[ScoredRollout]) -> Metrics:
    """The metrics of what was sampled, of rollouts that teachers did not score, and of requests to servers."""
    failures = [s.score for s in scored if isinstance(s.score, FailedScore)]
    metrics = rollout_metrics([item.rollout for item in scored])
    metrics |= {f"failed/{teacher}/sum": Sum(n) for teacher, n in Counter(f.teacher for f in failures).items()}
    retries = sum(s.retries + s.rollout.events.get("retried", 0) for s in scored)
    lost = sum(failure.lost for failure in failures)
    return metrics | {f"remote/{name}/sum": Sum(n) for name, n in (("retried", retries), ("lost", lost)) if n}


def rollout_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Reward, length and truncation, over all and by task, and what happened in environments."""
    episodes = [r for r in rollouts if r.part == 0]
    metrics: Metrics = {
        "response/length/mean": Mean(sum(r.num_actions for r in rollouts), len(episodes)),
        "response/truncated/mean": mean_of(r.truncated for r in episodes),
        "batch/rollouts/sum": Sum(len(rollouts)),
        "batch/tokens/sum": Sum(sum(len(r.token_ids) for r in rollouts)),
    }
    metrics["reward/mean"] = mean_of(r.reward for r in episodes if r.reward is not None)
    for task in dict.fromkeys(r.prompt.task for r in rollouts):
        metrics[f"reward/{task}/mean"] = mean_of(
            r.reward for r in episodes if r.prompt.task == task and r.reward is not None
        )
    events = sum((Counter(r.events) for r in rollouts), Counter())
    if late := events.pop(TIMEOUTS, 0):
        metrics["verifier/timeouts/sum"] = Sum(late)
    for name in ("lost", "retried"):  # of servers, not of environments
        events.pop(name, None)
    turns = [sum(t.author == "student" for t in r.turns) for r in rollouts]
    if events or max(turns, default=0) > 1:
        metrics["episode/turns/mean"] = Mean(sum(turns), len(episodes))
        metrics |= {f"episode/{name}/sum": Sum(count) for name, count in sorted(events.items())}
    return metrics


def alignment_metrics(scored: Sequence[ScoredRollout]) -> Metrics:
    """How each teacher with another tokenizer read the responses (`opd.text.alignment.shares`)."""
    found: dict[str, list[Mapping[str, int]]] = {}
    for item in scored:
        if isinstance(item.score, ChunkScore):
            found.setdefault(item.score.teacher, []).append(item.score.facts)
    metrics: Metrics = {}
    for teacher, facts in found.items():
        found_shares = shares(total(facts))
        metrics[f"align/{teacher}/{LARGEST}/max"] = Max(found_shares.pop(LARGEST))
        metrics |= {f"align/{teacher}/{name}/mean": mean_of([share]) for name, share in found_shares.items()}
    return metrics
