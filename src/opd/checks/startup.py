"""Every start-up check of a recipe, on the real weights, in the order in which they run."""

from collections.abc import Sequence
from dataclasses import replace

from opd.checks import rules
from opd.checks.notices import clock_unread, notices
from opd.checks.rules import Finding
from opd.config import Config
from opd.data.task_data import TaskData, require_teachers
from opd.data.tasks import SPLITS
from opd.records import FailedScore, Rollout
from opd.roles import Backend
from opd.text.chat import Chat

_PROBES_PER_TEACHER = 2


def run_checks(config: Config, backend: Backend, task_data: TaskData) -> list[Finding]:
    """Every start-up check, on the real weights: see `opd.checks.rules`."""
    every = [p for splits in task_data.prompts.values() for split in SPLITS for p in splits[split]]
    require_teachers(every, config.teachers)
    detail = f"{len(every)} prompts, {len(config.teachers)} teachers"
    findings = [Finding("every prompt's teacher exists", True, detail)]
    findings += notices(
        config, task_data.prompts, reward=bool(task_data.own_reward), environment=task_data.own_environment
    )
    findings += rules.tools_are_answered(every, task_data.make_environment)
    facts = backend.facts()
    findings += clock_unread(config, reads_clock=facts.reads_clock)
    chat = Chat(backend.tokenizer, rows=facts.vocab_size)
    findings.append(
        rules.lengths_fit(
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
    findings += rules.loaded_whole(facts.notes)
    findings += [rules.turns_end(model, disagreement) for model, disagreement in facts.turn_ends.items()]
    findings += [rules.prompts_compared(name, found) for name, found in facts.templates.items()]
    findings += [rules.tokens_compared(name, unknown) for name, unknown in facts.unknown_tokenizers.items()]
    packed = packing_findings(backend)
    findings += packed
    if not all(finding.passed for finding in packed):
        return findings  # what such a model samples and scores says nothing
    sampled = backend.sampler().sample(probes, num_samples=1, seed=(config.seed, "check"))
    rollouts = [r for r in sampled if r.failure is None and r.num_actions]
    findings.append(rules.episodes_play(sampled, rollouts))
    if not rollouts:
        return findings
    findings += rules.unprobed(sampled, rollouts)
    findings.append(rules.same_policy(rollouts, backend.student_as_teacher().score(rollouts), tolerance=tolerance))
    teachers = backend.teachers(keep_hidden=False)
    scored = teachers.score(rollouts)
    if any(not isinstance(s.score, FailedScore) for s in scored):
        # a server's batching changes its scores a little, in half precision more
        tolerance = 0.5 if facts.unknown_tokenizers else tolerance
        findings.append(rules.deterministic(scored, teachers, tolerance=tolerance))
    # A model that no prompt names alone (a part of a mixture, a reference) is asked by itself too.
    unnamed = [name for name in backend.model_names() if not by_teacher.get(name)]
    asked = [replace(r, prompt=replace(r.prompt, teacher=name)) for name in unnamed for r in rollouts]
    scored += backend.models_as_teachers(unnamed).score(asked)
    findings += rules.can_score(scored)
    findings += rules.informative(scored, vocab_size=facts.vocab_size, cross_tokenizer=facts.cross_tokenizer)
    return findings + rules.lined_up(scored) + _distances(backend, rollouts)


def packing_findings(backend: Backend) -> list[Finding]:
    """Whether packed passes of each model equal its own."""
    return [rules.packed_equals_plain(who, gaps) for who, gaps in backend.packing_errors().items()]


def _distances(backend: Backend, rollouts: Sequence[Rollout]) -> list[Finding]:
    """How far the student is from each teacher that gives distributions over its tokens, on its own responses."""
    apart = backend.facts().without_distributions
    own = [r for r in rollouts if r.prompt.teacher not in apart and r.num_actions]
    if not own:
        return []
    scored = [s for s in backend.teachers(keep_hidden=True).score(own) if not isinstance(s.score, FailedScore)]
    if not scored:
        return []
    return [rules.near_enough(teacher, *found) for teacher, found in backend.distances(scored).items()]
