"""Checks before the first step. Each returns a `Finding`, or raises the error that says which record is wrong."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from opd.errors import CheckError, DataError
from opd.models.packing_check import PACKED_WITHIN
from opd.records import ChunkScore, FailedScore, Prompt, Rollout, ScoredRollout
from opd.roles import Limit, OtherTemplate, OwnReading, Teacher
from opd.text.alignment import total
from opd.text.alignment_report import describe

_NEAR_OVERLAP, _NEAR_KL = 0.6, 1.0  # nats a token
_PACKING_CAUSES = {
    "plan": "this model does not pass the arguments of a forward pass on to its attention",
    "head": "this model scales, caps or shifts its logits after the output head",
    "one sequence": "this model's layers do not see a token's predecessors by plain attention alone",
    "several sequences": "this model's layers carry state across packed sequences",
    "another order": "this model's layers carry state across packed sequences, which depends on their order",
    "distant positions": "in this model the longest sequence of a pass changes the others",
    "next pass": "this model keeps state from one pass to the next",
    "grown rows": "this model's decoding token by token differs from its forward pass (layers that run twice share one cache)",
    "gradients": "this model's gradient through a packed pass differs from that of its forward pass",
}
_UNIFORM_WITHIN = 0.01  # nats; a teacher that lost its weights gives every token -ln V


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it passed, and the figures; warning: it passed, and somebody should know the figures.

    As text it is the line of `opd check`.
    """

    name: str
    passed: bool
    detail: str
    warning: bool = False

    def __str__(self) -> str:
        verdict = ("warn" if self.warning else "ok  ") if self.passed else "FAIL"
        return f"{verdict}  {self.name}: {self.detail}"


def require(findings: Sequence[Finding]) -> None:
    """Raise CheckError naming the first check that failed."""
    for finding in findings:
        if not finding.passed:
            raise CheckError(f"start-up check '{finding.name}' failed: {finding.detail}")


def tools_are_answered(prompts: Sequence[Prompt], make_environment: Callable[[Prompt], object]) -> list[Finding]:
    """A prompt that shows tools has somebody who answers their calls; asked of the first such prompt of each task."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        if prompt.tools:
            first.setdefault(prompt.task, prompt)
    findings = []
    for task, prompt in first.items():
        try:
            missing = make_environment(prompt) is None
        except Exception:  # the episodes that are played show it, with its reason
            missing = False
        if missing:
            detail = f"prompt '{prompt.id}' shows tools, and no environment answers their calls: one turn is all (docs/concepts/agents.md)"
            findings.append(Finding(f"calls of tasks.{task} are answered", True, detail, warning=True))
    return findings


def lengths_fit(
    prompts: Sequence[Prompt],
    length: Callable[[Prompt], int],
    *,
    max_new_tokens: int,
    contexts: Mapping[str, Limit | None],
    teacher_contexts: Mapping[str, Limit | None],
    own_readings: Mapping[str, Sequence[OwnReading]] = MappingProxyType({}),
) -> Finding:
    """Prompt and response fit the student's context and the prompt's teacher's. Raises DataError for the first that does not.

    contexts: the student's, by a name to show; teacher_contexts: by teacher; own_readings: of each teacher's models that read a
    prompt otherwise than the student. A prompt that their template refuses is left to `can_score`.
    """
    longest = 0
    for prompt in prompts:
        tokens = length(prompt)
        longest = max(longest, tokens)
        for who, limit in (*contexts.items(), (f"teacher '{prompt.teacher}'", teacher_contexts.get(prompt.teacher))):
            if limit is not None and tokens + max_new_tokens > limit.tokens:
                raise DataError(
                    f"prompt '{prompt.id}': {tokens} tokens + sampling.max_new_tokens = {max_new_tokens} exceed {limit.of(who)}; "
                    "shorten the prompt or lower sampling.max_new_tokens"
                )
        for own in own_readings.get(prompt.teacher, ()):
            try:
                tokens = own.length(prompt)
            except DataError:
                continue
            if tokens + own.room > own.limit.tokens:
                raise DataError(
                    f"prompt '{prompt.id}': teacher '{prompt.teacher}' reads it as {tokens} tokens in its own template; with at "
                    f"least {own.room} of a response they exceed {own.limit.of('that teacher')}; shorten the prompt, lower "
                    "sampling.max_new_tokens or take another teacher"
                )
    return Finding("lengths fit the contexts", True, f"longest prompt {longest} + {max_new_tokens} new tokens")


def episodes_play(sampled: Sequence[Rollout], usable: Sequence[Rollout]) -> Finding:
    """Some episode can be played to its end: environments answer, and the student has a turn."""
    detail = f"{len(usable)} of {len(sampled)} can be scored"
    kept = {r.id for r in usable}
    left_out = [r for r in sampled if r.id not in kept]
    if left_out:
        detail += f" (first: '{left_out[0].id}': {left_out[0].failure or 'no turn of the student'})"
    return Finding("episodes can be played", bool(usable), detail, warning=bool(left_out))


def unprobed(sampled: Sequence[Rollout], usable: Sequence[Rollout]) -> list[Finding]:
    """The teachers about which the checks that follow say nothing, because none of their probes could be played."""
    seen = {r.prompt.teacher for r in usable}
    missing = dict.fromkeys(r.prompt.teacher for r in sampled if r.prompt.teacher not in seen)
    return [
        Finding(f"teacher '{name}' is checked", True, "not checked: none of its probes could be played", warning=True)
        for name in missing
    ]


def same_policy(rollouts: Sequence[Rollout], rescored: Sequence[ScoredRollout], *, tolerance: float) -> Finding:
    """A teacher that equals the student gives a log ratio of about 0 on every token that the student sampled."""
    gaps = [np.abs(s.score.logprobs - r.rollout_logprobs).max() for r, s in zip(rollouts, rescored, strict=True)
            if not isinstance(s.score, FailedScore)]  # fmt: skip
    worst = float(np.max(gaps)) if gaps else math.inf  # np.max keeps a nan, max() may lose it
    return Finding(
        "a teacher equal to the student gives KL 0",
        worst <= tolerance,
        f"largest |log ratio| {worst:.1e} over {len(gaps)} rollouts (allowed {tolerance:.0e})",
    )


def deterministic(first: Sequence[ScoredRollout], teachers: Teacher, *, tolerance: float) -> Finding:
    """Scoring the same rollouts again, in reverse order, gives the same scores."""
    again = teachers.score([s.rollout for s in reversed(first)])[::-1]
    worst, missing = 0.0, []
    for a, b in zip(first, again, strict=True):
        if isinstance(a.score, FailedScore) and isinstance(b.score, FailedScore):
            missing.append(f"'{a.rollout.id}': {a.score.reason}")
        elif isinstance(a.score, FailedScore) or isinstance(b.score, FailedScore):
            return Finding("scores are deterministic", False, f"rollout '{a.rollout.id}' could be scored once of twice")
        else:
            worst = float(np.maximum(worst, np.abs(a.score.logprobs - b.score.logprobs).max()))  # keeps a nan
    some = len(missing) < len(first)
    detail = f"largest difference {worst:.1e} (allowed {tolerance:.0e})" if some else "no rollout could be scored"
    if missing:
        detail += f"; {len(missing)} of {len(first)} not scored (first: {missing[0]})"
    return Finding("scores are deterministic", some and worst <= tolerance, detail, warning=bool(missing))


def can_score(scored: Sequence[ScoredRollout]) -> list[Finding]:
    """The teachers that could score none of their rollouts, and why."""
    findings = []
    for teacher in dict.fromkeys(s.score.teacher for s in scored):
        mine = [s for s in scored if s.score.teacher == teacher]
        reasons = [f"'{s.rollout.id}': {s.score.reason}" for s in mine if isinstance(s.score, FailedScore)]
        if len(reasons) == len(mine):
            detail = f"none of {len(mine)} rollouts (first: {reasons[0]})"
            findings.append(Finding(f"teacher '{teacher}' can score what the student writes", False, detail))
    return findings


def informative(
    scored: Sequence[ScoredRollout], *, vocab_size: int, cross_tokenizer: Mapping[str, int] | None = None
) -> list[Finding]:
    """No teacher is uniform: one that lost its weights gives every token -ln V while a loss still falls.

    foreign: the vocabulary of each teacher with another tokenizer, which gives a chunk of n tokens -n ln V.
    """
    findings = []
    for teacher in dict.fromkeys(s.score.teacher for s in scored):
        mine = [_units(s) for s in scored if not isinstance(s.score, FailedScore) and s.score.teacher == teacher]
        if not mine:
            continue  # `can_score` says why
        logprobs = np.concatenate(mine)
        if not len(logprobs):
            findings.append(Finding(f"teacher '{teacher}' is not uniform", True, "no text to judge it by"))
            continue
        unit = math.log((cross_tokenizer or {}).get(teacher, vocab_size))
        tokens = np.maximum(np.round(-logprobs / unit), 1) if cross_tokenizer and teacher in cross_tokenizer else 1
        spread = float(np.abs(logprobs + tokens * unit).max())
        findings.append(
            Finding(
                f"teacher '{teacher}' is not uniform",
                spread > _UNIFORM_WITHIN,
                f"mean log-probability {logprobs.mean():.2f} (uniform: {-unit:.2f}) on {len(logprobs)} tokens",
            )
        )
    return findings


def _units(scored: ScoredRollout) -> np.ndarray:
    """The log-probabilities of a rollout's actions, or of its chunks but the last (the end of a turn sums several tokens)."""
    score = scored.score
    assert not isinstance(score, FailedScore)
    if not isinstance(score, ChunkScore):
        return score.logprobs[scored.rollout.loss_mask]
    # log q of a chunk stands at its last token
    last = {int(chunk): place for place, chunk in enumerate(score.chunks) if chunk >= 0}
    places = [last[chunk] for chunk in sorted(last)]
    return score.logprobs[places[: len(places) - (scored.rollout.finish == "end")]]


def tokens_compared(teacher: str, unknown: str) -> Finding:
    """A server cuts a text as the student's tokenizer does; unknown: why that could not be asked."""
    detail = (
        f"cannot be compared ({unknown}); see to it that they are one"
        if unknown
        else "a probe text has the same tokens"
    )
    return Finding(f"teacher '{teacher}' has the student's tokenizer", True, detail, warning=bool(unknown))


def prompts_compared(teacher: str, found: OtherTemplate) -> Finding:
    """A teacher with another chat template reads its own prompts, or by choice the student's."""
    if found.unknown:
        detail = f"its chat template could not be compared ({found.unknown}), and it is scored in the student's prompts"
        return Finding(f"teacher '{teacher}' reads the student's prompts", True, detail, warning=True)
    if found.own:
        detail = f"its chat template writes {found.teacher!r} where the student's writes {found.student!r}"
        return Finding(f"teacher '{teacher}' reads prompts of its own", True, detail)
    detail = f"it is scored after {found.student!r}, and its own chat template writes {found.teacher!r}"
    return Finding(f"teacher '{teacher}' reads the student's prompts", True, detail, warning=True)


def turns_end(model: str, disagreement: str) -> Finding:
    """A model's chat template, tokenizer and generation config disagree on the token that ends a turn."""
    return Finding(f"where a turn of '{model}' ends", True, disagreement, warning=True)


def lined_up(scored: Sequence[ScoredRollout]) -> list[Finding]:
    """How each teacher with another tokenizer reads the student's text; it fails when nothing is left to follow."""
    findings = []
    for teacher in dict.fromkeys(s.score.teacher for s in scored if isinstance(s.score, ChunkScore)):
        facts = total(s.score.facts for s in scored if isinstance(s.score, ChunkScore) and s.score.teacher == teacher)
        name = f"teacher '{teacher}' reads the student's text"
        findings.append(Finding(name, facts.get("chunks", 0) > 0, describe(facts)))
    return findings


def near_enough(teacher: str, reverse_kl: float, overlap: float) -> Finding:
    """How far the student is from a teacher on its own responses: the reverse KL in nats a token, and the share of their 16
    likeliest tokens that both have. Far is no fault, but what a far teacher says of the student's attempts is little to go by."""
    far = overlap < _NEAR_OVERLAP or reverse_kl > _NEAR_KL
    advice = (
        f"; far (overlap below {_NEAR_OVERLAP} or KL above {_NEAR_KL:g}): a short warmup.steps helps" if far else ""
    )
    return Finding(
        f"distance to teacher '{teacher}'",
        True,
        f"KL {reverse_kl:.2f} nats per token, top-16 overlap {overlap:.2f}{advice}",
        far,
    )


def loaded_whole(notes: Sequence[str]) -> list[Finding]:
    """What a user should know of how models were loaded."""
    return [Finding("models are loaded as their files say", True, note, warning=True) for note in notes]


def packed_equals_plain(name: str, gaps: Mapping[str, float]) -> Finding:
    """Packed passes of a model equal its own forward pass, one row at a time, in float32 (`opd.models.packing_check`)."""
    wrong = next((probe for probe, gap in gaps.items() if not gap <= PACKED_WITHIN), None)
    worst = float(np.max(list(gaps.values()))) if gaps else math.inf  # np.max keeps a nan, max() may lose it
    detail = f"largest difference {worst:.1e} of the spread of the logits (allowed {PACKED_WITHIN:.0e})"
    if wrong is not None:
        if math.isnan(gaps[wrong]):
            detail = (
                "its logits are no numbers (nan): weights of it are nan or infinite, or too large for compute.dtype; copy them "
                "again, or use compute.dtype = 'float32'"
            )
            return Finding(f"packed logits equal plain logits ({name})", False, detail)
        detail = (
            f"{_PACKING_CAUSES.get(wrong, wrong)}; {detail}; use another model (a teacher of this kind can be served: "
            "teachers.NAME.url)"
        )
    return Finding(f"packed logits equal plain logits ({name})", bool(gaps) and wrong is None, detail)
