"""Every start-up check of a recipe, on the real weights, in the order in which they run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from opd.checks.notices import Finding, clock_unread, notices
from opd.config import Config
from opd.data.tasks import SPLITS, TaskData, require_teachers
from opd.errors import CheckError, DataError
from opd.models.packing_check import PACKED_WITHIN, PACKING_CAUSES, first_wrong
from opd.records import ChunkScore, FailedScore, Prompt, Rollout, ScoredRollout
from opd.roles import Backend, Limit, OtherTemplate, OwnReading, Teacher, TeacherFacts
from opd.text.alignment import describe, total
from opd.text.chat import Chat

_PROBES_PER_TEACHER = 2


def run_checks(config: Config, backend: Backend, task_data: TaskData) -> list[Finding]:
    """The findings of every start-up check, on the real weights. Raises DataError for a prompt that cannot be used."""
    every = [p for splits in task_data.prompts.values() for split in SPLITS for p in splits[split]]
    require_teachers(every, config.teachers)
    detail = f"{len(every)} prompts, {len(config.teachers)} teachers"
    findings = [Finding("every prompt's teacher exists", True, detail)]
    findings += notices(
        config, task_data.prompts, reward=bool(task_data.own_reward), environment=task_data.own_environment
    )
    findings += tools_are_answered(every, task_data.make_environment)
    facts = backend.facts()
    findings += clock_unread(config, reads_clock=facts.reads_clock)
    chat = Chat(backend.tokenizer, rows=facts.vocab_size)
    findings.append(
        lengths_fit(
            every,
            lambda p: len(chat.encode_prompt(p)),
            max_new_tokens=config.sampling.max_new_tokens,
            contexts={"the student": backend.student_context},
            teacher_contexts=facts.contexts,
            own_readings=facts.own_readings,
        )
    )
    by_teacher = {name: [p for p in every if p.teacher == name][:_PROBES_PER_TEACHER] for name in config.teachers}
    probes = [p for chosen in by_teacher.values() for p in chosen]
    half = config.compute.dtype != "float32" or config.cluster.mixed_precision
    tolerance = 0.5 if half else 2e-3
    findings += models_described(facts)
    packed = packing_findings(backend)
    findings += packed
    if not all(finding.passed for finding in packed):
        return findings  # what such a model samples and scores says nothing
    sampled = backend.sampler().sample(probes, num_samples=1, seed=(config.seed, "check"))
    rollouts = [r for r in sampled if r.failure is None and r.num_actions]
    findings.append(episodes_play(sampled, rollouts))
    if not rollouts:
        return findings
    findings += unprobed(sampled, rollouts)
    findings.append(same_policy(rollouts, backend.student_as_teacher().score(rollouts), tolerance=tolerance))
    teachers = backend.teachers(keep_hidden=False)
    scored = teachers.score(rollouts)
    if any(not isinstance(s.score, FailedScore) for s in scored):
        # a server's batching changes its scores a little, in half precision more
        tolerance = 0.5 if facts.unknown_tokenizers else tolerance
        findings.append(deterministic(scored, teachers, tolerance=tolerance))
    # A model that no prompt names alone (a part of a mixture, a reference) is asked by itself too.
    unnamed = [name for name in backend.model_names() if not by_teacher.get(name)]
    asked = [replace(r, prompt=replace(r.prompt, teacher=name)) for name in unnamed for r in rollouts]
    scored += backend.models_as_teachers(unnamed).score(asked)
    findings += can_score(scored)
    findings += informative(scored, vocab_size=facts.vocab_size, cross_tokenizer=facts.cross_tokenizer)
    return findings + lined_up(scored) + _distances(backend, rollouts)


def packing_findings(backend: Backend) -> list[Finding]:
    """Whether the forward passes of each model equal its own."""
    return [passes_equal_own(who, *found) for who, found in backend.check_passes().items()]


def _distances(backend: Backend, rollouts: Sequence[Rollout]) -> list[Finding]:
    """How far the student is from each teacher that gives distributions over its tokens, on its own responses."""
    apart = backend.facts().without_distributions
    own = [r for r in rollouts if r.prompt.teacher not in apart and r.num_actions]
    if not own:
        return []
    scored = [s for s in backend.teachers(keep_hidden=True).score(own) if not isinstance(s.score, FailedScore)]
    if not scored:
        return []
    return [near_enough(teacher, *found) for teacher, found in backend.distances(scored).items()]


_NEAR_OVERLAP, _NEAR_KL = 0.6, 1.0  # nats a token
_UNIFORM_WITHIN = 0.01  # nats; a teacher that lost its weights gives every token -ln V


def require(findings: Sequence[Finding]) -> None:
    """Raise CheckError naming the first check that failed."""
    for finding in findings:
        if not finding.passed:
            raise CheckError(f"start-up check '{finding.name}' failed: {finding.detail}")


def tools_are_answered(prompts: Sequence[Prompt], make_environment: Callable[[Prompt], object]) -> list[Finding]:
    """Warns of a task with tools and no environment that answers their calls, by its first prompt with tools."""
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
            detail = (
                f"prompt '{prompt.id}' shows tools, and no environment answers their calls: one turn is all "
                "(docs/how-to/agents.md)"
            )
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
    """Prompt and response fit the context of the student and of the prompt's teacher. Raises DataError for the first that does not.

    contexts: of the student, by a name to show; teacher_contexts: by teacher; own_readings: by teacher, the models that read a
    prompt in their own template or tokens. `can_score` finds prompts that their template refuses.
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
    """At least one episode can be played to its end: its environment answers, and the student has a turn."""
    detail = f"{len(usable)} of {len(sampled)} can be scored"
    kept = {r.id for r in usable}
    left_out = [r for r in sampled if r.id not in kept]
    if left_out:
        detail += f" (first: '{left_out[0].id}': {left_out[0].failure or 'no turn of the student'})"
    return Finding("episodes can be played", bool(usable), detail, warning=bool(left_out))


def unprobed(sampled: Sequence[Rollout], usable: Sequence[Rollout]) -> list[Finding]:
    """The teachers that the later checks leave out, because none of their probes could be played."""
    seen = {r.prompt.teacher for r in usable}
    missing = dict.fromkeys(r.prompt.teacher for r in sampled if r.prompt.teacher not in seen)
    return [
        Finding(f"teacher '{name}' is checked", True, "not checked: none of its probes could be played", warning=True)
        for name in missing
    ]


def same_policy(rollouts: Sequence[Rollout], rescored: Sequence[ScoredRollout], *, tolerance: float) -> Finding:
    """A teacher equal to the student gives a log ratio of about 0 on every sampled token."""
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
    """No teacher is uniform: a teacher that lost its weights gives every token -ln V, and the loss would still fall.

    cross_tokenizer: the vocabulary size of each teacher with another tokenizer, which would give a chunk of n tokens -n ln V.
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


def models_described(facts: TeacherFacts) -> list[Finding]:
    """How the models were loaded, where their turns end, and which prompts and tokens each teacher reads."""
    findings = [Finding("models are loaded as their files say", True, note, warning=True) for note in facts.notes]
    for model, disagreement in facts.turn_ends.items():
        findings.append(Finding(f"where a turn of '{model}' ends", True, disagreement, warning=True))
    findings += [_prompts_compared(f"teacher '{name}' reads", found) for name, found in facts.templates.items()]
    for name, unknown in facts.unknown_tokenizers.items():
        detail = f"cannot be compared ({unknown}); see to it that they are one"
        detail = detail if unknown else "a probe text has the same tokens"
        findings.append(Finding(f"teacher '{name}' has the student's tokenizer", True, detail, warning=bool(unknown)))
    return findings


def _prompts_compared(reader: str, found: OtherTemplate) -> Finding:
    """A teacher with another chat template reads prompts of its own, or the student's."""
    if found.unknown:
        detail = f"its chat template could not be compared ({found.unknown}), and it is scored in the student's prompts"
        return Finding(f"{reader} the student's prompts", True, detail, warning=True)
    if found.own:
        detail = f"its chat template writes {found.teacher!r} where the student's writes {found.student!r}"
        return Finding(f"{reader} prompts of its own", True, detail)
    detail = f"it is scored after {found.student!r}, and its own chat template writes {found.teacher!r}"
    return Finding(f"{reader} the student's prompts", True, detail, warning=True)


def lined_up(scored: Sequence[ScoredRollout]) -> list[Finding]:
    """How the text of the student is aligned with each teacher of another tokenizer; fails when no chunk is kept."""
    findings = []
    for teacher in dict.fromkeys(s.score.teacher for s in scored if isinstance(s.score, ChunkScore)):
        facts = total(s.score.facts for s in scored if isinstance(s.score, ChunkScore) and s.score.teacher == teacher)
        name = f"teacher '{teacher}' reads the student's text"
        findings.append(Finding(name, facts.get("chunks", 0) > 0, describe(facts)))
    return findings


def near_enough(teacher: str, reverse_kl: float, overlap: float) -> Finding:
    """The distance of the student to a teacher on its own responses: the reverse KL in nats a token, and the overlap of their 16
    likeliest tokens. A far teacher is no fault, but its scores of the student's responses teach little."""
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


def passes_equal_own(name: str, gaps: Mapping[str, float], padded_because: str | None = None) -> Finding:
    """The packed or padded passes of a model equal its own forward pass of one row, in float32 (`opd.models.packing_check`)."""
    wrong = first_wrong(gaps)
    title = f"forward passes equal the model's own ({name})"
    worst = float(np.max(list(gaps.values()))) if gaps else math.inf  # np.max keeps a nan, max() may lose it
    kind = "packed passes"
    if padded_because is not None:
        kind = f"padded passes, one row for each sequence, because {padded_because}"
    detail = f"{kind}; largest difference {worst:.1e} of the spread of the logits (allowed {PACKED_WITHIN:.0e})"
    if wrong is not None:
        if math.isnan(gaps[wrong]):
            detail = (
                "its logits are no numbers (nan): weights of it are nan or infinite, or too large for compute.dtype; copy them "
                "again, or use compute.dtype = 'float32'"
            )
            return Finding(title, False, detail)
        cause = PACKING_CAUSES.get(wrong, wrong)
        if padded_because is not None and wrong != "head":
            cause = f"this model's passes of several rows differ from those of one ('{wrong}')"
        detail = f"{cause}; {detail}; use another model (a teacher of this kind can be served: teachers.NAME.url)"
    return Finding(title, bool(gaps) and wrong is None, detail)
