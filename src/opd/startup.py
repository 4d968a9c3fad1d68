"""Before the first step: the prompts of a recipe, and every start-up check on the real weights."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from opd.checks import findings as preflight
from opd.checks.findings import Finding
from opd.checks.no_effect import PromptSets, clock_unread, has_grade, has_verdict, notices
from opd.config import Config
from opd.data.stream import PromptStream
from opd.data.tasks import SPLITS, make_tasks, read_splits
from opd.episodes.player import MakeEnvironment
from opd.errors import DataError
from opd.loop import Parts
from opd.records import FailedScore, Prompt, Rollout
from opd.rewards.judge import Judge
from opd.rewards.reward import Reward
from opd.roles import Backend, Environment, Teacher
from opd.score_cache.cache import CachedTeacher, MemoryScores, identities, probe
from opd.score_cache.files import ScoreFiles
from opd.text.chat import Chat

_PROBES_PER_TEACHER = 2


def run_checks(config: Config, backend: Backend, task_data: "TaskData") -> list[Finding]:
    """Every start-up check, on the real weights: see `opd.checks.findings`."""
    every = [p for splits in task_data.prompts.values() for split in SPLITS for p in splits[split]]
    findings = [preflight.teachers_exist(every, config.teachers)]
    findings += notices(
        config, task_data.prompts, reward=bool(task_data.own_reward), environment=task_data.own_environment
    )
    findings += preflight.tools_are_answered(every, task_data.make_environment)
    facts = backend.facts()
    findings += clock_unread(config, reads_clock=facts.reads_clock)
    chat = Chat(backend.tokenizer, rows=facts.vocab_size)
    findings.append(
        preflight.lengths_fit(
            every,
            lambda p: len(chat.encode_prompt(p)),
            max_new_tokens=config.sampling.max_new_tokens,
            contexts={"the student": backend.student_context},
            teacher_contexts=facts.contexts,
        )
    )
    by_teacher = {name: [p for p in every if p.teacher == name][:_PROBES_PER_TEACHER] for name in config.teachers}
    probes = [p for chosen in by_teacher.values() for p in chosen]
    half = config.compute.dtype != "float32" or config.cluster.mixed_precision
    tolerance = 0.5 if half else 2e-3
    findings += preflight.loaded_whole(facts.notes)
    findings += [preflight.turns_end(model, disagreement) for model, disagreement in facts.turn_ends.items()]
    findings += [preflight.prompts_compared(name, found) for name, found in facts.templates.items()]
    findings += [preflight.tokens_compared(name, unknown) for name, unknown in facts.unknown_tokenizers.items()]
    packed = packing_findings(backend)
    findings += packed
    if not all(finding.passed for finding in packed):
        return findings  # what such a model samples and scores says nothing
    sampled = backend.sampler().sample(probes, num_samples=1, seed=(config.seed, "check"))
    rollouts = [r for r in sampled if r.failure is None and r.num_actions]
    findings.append(preflight.episodes_play(sampled, rollouts))
    if not rollouts:
        return findings
    findings += preflight.unprobed(sampled, rollouts)
    findings.append(preflight.same_policy(rollouts, backend.student_as_teacher().score(rollouts), tolerance=tolerance))
    teachers = backend.teachers(keep_hidden=False)
    scored = teachers.score(rollouts)
    # how a server batches moves its scores a little, in half precision more
    findings.append(preflight.deterministic(scored, teachers, tolerance=0.5 if facts.unknown_tokenizers else tolerance))
    # A model that no prompt names alone (a part of a mixture, a reference) is asked by itself too.
    unnamed = [name for name in backend.single_models() if not by_teacher.get(name)]
    asked = [replace(r, prompt=replace(r.prompt, teacher=name)) for name in unnamed for r in rollouts]
    scored += backend.per_model(unnamed).score(asked)
    findings += preflight.informative(scored, vocab_size=facts.vocab_size, cross_tokenizer=facts.cross_tokenizer)
    return findings + preflight.lined_up(scored) + _distances(backend, rollouts)


def packing_findings(backend: Backend) -> list[Finding]:
    """Whether packed passes of each model equal its own."""
    return [preflight.packed_equals_plain(who, gaps) for who, gaps in backend.packing_errors().items()]


def _distances(backend: Backend, rollouts: Sequence[Rollout]) -> list[Finding]:
    """How far the student is from each teacher that gives distributions over its tokens, on its own responses."""
    apart = backend.facts().without_distributions
    own = [r for r in rollouts if r.prompt.teacher not in apart and r.num_actions]
    if not own:
        return []
    scored = [s for s in backend.teachers(keep_hidden=True).score(own) if not isinstance(s.score, FailedScore)]
    if not scored:
        return []
    return [preflight.near_enough(teacher, *found) for teacher, found in backend.distances(scored).items()]


@dataclass(frozen=True)
class TaskData:
    """What a recipe's tasks give: prompts by task and split, the reward of a response and another grader's, environments, and
    the tasks whose environments' rewards the reward and the grader take the place of; own_code: reward and grade are a function of
    the user's; own_environment: so are the environments."""

    prompts: PromptSets
    reward: Reward
    grade: Reward
    make_environment: MakeEnvironment
    own_reward: frozenset[str] = frozenset()
    own_environment: bool = False
    own_grade: frozenset[str] = frozenset()
    own_code: bool = False

    def judge(self, config: Config, tokenizer: Any) -> Judge:
        """Rewards and format errors of rollouts that were sampled with this tokenizer."""
        return Judge(
            self.reward,
            {name: task.checks for name, task in config.tasks.items()},
            tokenizer=tokenizer,
            tool_syntax=config.episodes.tool_syntax,
            own=self.own_reward,
            own_code=self.own_code,
        )

    def grader(self) -> Judge:
        """Rewards by another grader, where there is one."""
        return Judge(self.grade, own=self.own_grade, own_code=self.own_code)


def read_tasks(config: Config, reward: Reward | None, make_environment: MakeEnvironment | None = None) -> TaskData:
    """Everything that the tasks of a recipe give; `reward` and `make_environment` take the place of the tasks' own.

    Raises DataError for a bad record.
    """
    require_callable("reward", reward, "prompt, response")
    require_callable("environment", make_environment, "prompt")
    if inspect.iscoroutinefunction(make_environment):
        raise DataError(
            "environment is a coroutine function, expected a plain one; its environments' reset and step may be async"
        )
    tasks = make_tasks(config.tasks, config.episodes)
    prompts = read_splits(tasks)
    for splits in prompts.values():
        for split in SPLITS:
            preflight.teachers_exist(splits[split], config.teachers)

    every = [p for splits in prompts.values() for split in SPLITS for p in splits[split]]
    inner = {part for teacher in config.teachers.values() for part in teacher.weights or ()}
    for name in config.teachers:
        if name not in inner | {config.objective.reference} and not any(p.teacher == name for p in every):
            raise DataError(f"teacher '{name}' of [teachers] is named by no prompt; remove it, or name it in a task")
    _require_cross_tokenizer_reference(config, every)
    _require_single_teachers(config, every)
    _require_measurable(config, prompts, given=reward is not None or make_environment is not None)
    if config.reward.coef > 0 and reward is None and make_environment is None and not _verdicts(config, every):
        raise DataError(
            "reward.coef > 0 needs verified rewards, and no prompt has an answer and a verifier; add them or pass a reward"
        )

    def verify(prompt: Prompt, response: str) -> float | None:
        return tasks[prompt.task].reward(prompt, response)

    def environment(prompt: Prompt) -> Environment | None:
        return tasks[prompt.task].environment(prompt)

    def grade(prompt: Prompt, response: str) -> float | None:
        return tasks[prompt.task].grade(prompt, response)

    every_task = frozenset(config.tasks)
    return TaskData(
        prompts,
        reward or verify,
        reward or grade,
        make_environment or environment,
        own_reward=every_task if reward is not None else frozenset(),
        own_environment=make_environment is not None,
        own_grade=every_task
        if reward is not None
        else frozenset(n for n, t in config.tasks.items() if getattr(t, "grader", None)),
        own_code=reward is not None,
    )


def require_callable(name: str, function: object, arguments: str) -> None:
    """Raise DataError for what cannot be called as it will be."""
    if function is None:
        return
    if not callable(function):
        raise DataError(f"{name} is {type(function).__name__}, expected a function of ({arguments})")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise DataError(f"{name} takes {signature}, expected ({arguments}): {error}") from None


def _require_measurable(config: Config, prompts: PromptSets, *, given: bool) -> None:
    """Raise DataError for an evaluation on the way that has nothing to measure."""
    if not config.evaluation.every:
        return
    every = f"evaluation.every = {config.evaluation.every} measures nothing: no task has held-out prompts"
    held_out = {name: splits["held_out"] for name, splits in prompts.items()}
    if not any(held_out.values()):
        raise DataError(f"{every}; set held_out_path or held_out_size of a task, or evaluation.every = 0")
    if not given and not any(has_grade(p, config.tasks[name]) for name, found in held_out.items() for p in found):
        raise DataError(f"{every} with an answer and a verifier; add them, or set evaluation.every = 0")


def _verdicts(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Whether anything says what a response is worth: a verifier, an environment, or a check for format errors."""
    return any(t.checks.rules for t in config.tasks.values()) or any(
        has_verdict(p, config.tasks[p.task]) for p in prompts
    )


def _require_single_teachers(config: Config, prompts: Sequence[Prompt]) -> None:
    """A warm-up learns what teachers do alone: refuse one with a prompt whose teacher is a mixture."""
    for prompt in prompts if config.warmup.steps else ():
        if config.teachers[prompt.teacher].weights:
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is several at once, none of whom answers alone, and "
                f"warmup.steps = {config.warmup.steps} learns from answers; leave it at 0"
            )


def _require_cross_tokenizer_reference(config: Config, prompts: Sequence[Prompt]) -> None:
    """Away from a teacher toward itself is nowhere: refuse a reference that is the teacher of a prompt."""
    reference = config.objective.reference
    for prompt in prompts:
        parts = config.teachers[prompt.teacher].weights or {prompt.teacher: 1.0}
        if reference in parts:
            raise DataError(
                f"prompt '{prompt.id}': its teacher '{prompt.teacher}' is the reference of objective.extrapolation, so there is "
                "nothing to extrapolate; choose another reference"
            )


def make_parts(config: Config, backend: Backend, task_data: TaskData, *, warn: Callable[[str], None] = print) -> Parts:
    """What a recipe's training loop is made of; warn: shows a line that the user should know of, then or later.

    Raises RunError when the folder for scores cannot be written to.
    """
    weights = {name: task.weight for name, task in config.tasks.items()}
    train = {name: splits["train"] for name, splits in task_data.prompts.items()}
    learner = backend.learner()
    teachers = backend.teachers(keep_hidden=config.objective.needs_distributions, followed=True)
    tokenizer = backend.tokenizer
    return Parts(
        stream=PromptStream(train, weights, seed=config.seed),
        sampler=backend.sampler(),
        teachers=_keeping(config, backend, teachers, warn),
        learner=learner,
        judge=task_data.judge(config, tokenizer),
        special_ids=frozenset(tokenizer.all_special_ids),
        per_prompt=_per_prompt(config),
    )


def _per_prompt(config: Config) -> bool:
    """Whether prompts go each its own way: where servers do the work, and no model would be woken for each."""
    cluster = config.backend == "ray" and not config.cluster.teachers_sleep
    return cluster and all(t.remote for t in config.teachers.values())


def _keeping(config: Config, backend: Backend, teachers: Teacher, warn: Callable[[str], None]) -> Teacher:
    """The teachers with the score caches that the recipe asks for: memory before disk."""
    found = teachers
    if (folder := config.compute.score_cache_folder) is not None:
        known = identities(config, backend)
        ask = partial(
            probe, teachers, tuple(known), known=frozenset(backend.facts().cross_tokenizer), tokenizer=backend.tokenizer
        )
        # from where the command runs, whatever the process does later
        found = CachedTeacher(found, ScoreFiles(Path(folder).absolute(), known, ask, warn))
    return CachedTeacher(found, MemoryScores(config.compute.score_cache)) if config.compute.score_cache else found
