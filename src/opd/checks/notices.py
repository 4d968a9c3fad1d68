"""Notices before the first step: keys and data without effect, the use of rewards, and objectives that reward errors."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from opd.config import Config, FileTask, PythonTask, SftConfig, TaskConfig
from opd.config.node import Node
from opd.data.tasks import PromptSets, has_verdict
from opd.objectives.mask_law import largest_kl
from opd.records import Prompt


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


REWARD = "reward"
"""The name of the finding on the use of rewards."""
_NO_EFFECT = "no effect"
_GROUP_MASK = (
    "warning: mask.format_errors with baseline = 'leave_one_out' and no reward can increase format errors (opd theory, claim "
    "H-d: from the teacher's 10 % to 21 % in groups of 4, and to 45 % in groups of 2); set reward.coef > 0, or "
    "objective.type = 'exact', or objective.type = 'immediate' with objective.baseline = 'kl'"
)
_SAFE_DISCOUNT = 0.9
_TRAIN_ON_IT = (
    "reward.coef = 0, so opd does not train on it; to train on it set reward.coef above 0, with sampling.group_size of 2 or "
    "more (or reward.baseline = 'none')"
)


def notices(config: Config, prompts: PromptSets, *, reward: bool, environment: bool) -> list[Finding]:
    """Keys without effect, prompts that repeat, and the use of rewards. reward, environment: whether the user gave one."""
    findings = rewards_used(config, prompts, reward=reward, environment=environment)
    lines = without_effect(config) + _of_prompts(config, prompts, environment=environment)
    lines += _replaced(config) if reward else _idle_verifiers(config, prompts) + _unread_answers(config, prompts)
    lines += _repeated(prompts, config, "sampling.prompts_per_step", config.sampling.prompts_per_step, "step")
    lines += _held_out_prompts_in_training(config.tasks, prompts)
    shown = sum(bool(p.demonstration) for splits in prompts.values() for p in splits["train"])
    if shown:
        lines.append(f"the demonstrations of {shown} prompts: 'opd sft' trains on them, 'opd train' does not")
    if not config.evaluation.every and not config.evaluation.num_prompts:
        for name, task in config.tasks.items():
            if isinstance(task, FileTask) and task.held_out_path is not None:
                lines.append(f"tasks.{name}.held_out_path: evaluation.every = 0 and evaluation.num_prompts = 0")
    return findings + [_warning(line) for line in lines]


def notices_of_tuning(config: SftConfig, prompts: PromptSets) -> list[Finding]:
    """The same for `opd sft`."""
    lines = without_effect(config) + _of_prompts(config, prompts, environment=False)
    lines += _idle_verifiers(config, prompts) + _held_out_prompts_in_training(config.tasks, prompts)
    return [_warning(line) for line in lines + _repeated(prompts, config, "batch_size", config.batch_size, "batch")]


def rewards_used(config: Config, prompts: PromptSets, *, reward: bool, environment: bool) -> list[Finding]:
    """The use of rewards: measured only, or trained on; and the tasks without one."""
    given = [
        name for name, splits in prompts.items() if any(has_verdict(p, config.tasks[name]) for p in splits["train"])
    ]
    if not config.reward.coef:
        if reward:
            return [Finding(REWARD, True, f"the reward function is only measured: {_TRAIN_ON_IT}", warning=True)]
        who = "the environments" if environment else "tasks." + ", tasks.".join(given)
        detail = f"the rewards of {who} are only measured: reward.coef = 0"
        return [Finding(REWARD, True, detail)] if environment or given else []
    if reward or environment:
        return []
    findings = []
    for name, splits in prompts.items():
        task = config.tasks[name]
        without = sum(not has_verdict(p, task) for p in splits["train"])
        if without and not task.checks.rules:
            why = (
                "its verifier is 'none'"
                if isinstance(task, FileTask | PythonTask) and task.verifier == "none"
                else "they have no answer"
            )
            detail = (
                f"reward.coef has no effect on {without} of {len(splits['train'])} prompts of tasks.{name}: {why}; add "
                "answers and a verifier, or pass a reward"
            )
            findings.append(Finding(REWARD, True, detail, warning=True))
    return findings


def clock_unread(config: Config | SftConfig, *, reads_clock: bool) -> list[Finding]:
    """A recipe that sets a moment where no chat template reads one. reads_clock: whether one does."""
    lines = [] if reads_clock else changed(config, "template_time")
    return [_warning(f"{line}: no chat template reads the clock") for line in lines]


def _warning(line: str) -> Finding:
    return Finding(_NO_EFFECT, True, line, warning=True)


def _of_prompts(config: Config | SftConfig, prompts: PromptSets, *, environment: bool) -> list[str]:
    """Keys that the prompts leave without effect."""
    every = [p for splits in prompts.values() for found in splits.values() for p in found]
    played = environment or any(task.has_environment for task in config.tasks.values())
    played = played or any(p.demonstration or p.tools for p in every)
    lines = []
    for name in type(config.episodes).model_fields if not played else ():
        bounds_servers = name == "max_concurrent" and isinstance(config, Config) and config.backend == "ray"
        keys = [] if bounds_servers else changed(config, f"episodes.{name}")
        lines += [f"{key}: no prompt has an environment or tools, so every episode is one turn" for key in keys]
    return lines


def _named_verifiers(config: Config | SftConfig, task: TaskConfig) -> dict[str, str]:
    """The verifier and the grader that a task of records names, by key; a grader only where one is asked."""
    if not isinstance(task, FileTask | PythonTask):
        return {}
    verifier = task.verifier if task.verifier in ("math", "number") else None
    grader = task.grader if isinstance(config, Config) and config.evaluation.every else None
    return {key: value for key, value in (("verifier", verifier), ("grader", grader)) if value}


def _idle_verifiers(config: Config | SftConfig, prompts: PromptSets) -> list[str]:
    """Verifiers and graders that the recipe names, without an answer to compare with."""
    return [
        f"tasks.{name}.{key} = '{value}': no prompt has an answer (the key 'answer' of its record)"
        for name, splits in prompts.items()
        if all(p.answer is None for found in splits.values() for p in found)
        for key, value in _named_verifiers(config, config.tasks[name]).items()
    ]


def _replaced(config: Config) -> list[str]:
    """Verifiers and graders that the recipe names, and that the user's reward replaces."""
    return [
        f"tasks.{name}.{key} = '{value}': the reward function takes its place"
        for name, task in config.tasks.items()
        for key, value in _named_verifiers(config, task).items()
    ]


def _held_out_prompts_in_training(configs: Mapping[str, TaskConfig], prompts: PromptSets) -> list[str]:
    """Held-out prompts that some task trains on: they do not measure generalisation."""
    trained = {_content(prompt) for splits in prompts.values() for prompt in splits["train"]}
    found: list[str] = []
    for name, config in configs.items():
        mine = (
            [p for p in prompts[name]["held_out"] if _content(p) in trained]
            if isinstance(config, FileTask | PythonTask)
            else []
        )
        if mine:
            found.append(
                f"{len(mine)} of {len(prompts[name]['held_out'])} held-out prompts of tasks.{name} are training prompts too, the "
                f"first '{mine[0].id}'; take them out of one of the files"
            )
    return found


def _unread_answers(config: Config, prompts: PromptSets) -> list[str]:
    """Answers that no verifier reads."""
    lines = []
    for name, task in config.tasks.items():
        answered = sum(p.answer is not None for found in prompts[name].values() for p in found)
        if isinstance(task, FileTask | PythonTask) and answered and task.verifier == "none" and task.grader is None:
            lines.append(f"{answered} answers of tasks.{name}: verifier = 'none'; choose a verifier")
    return lines


def _repeated(prompts: PromptSets, config: Config | SftConfig, key: str, count: int, what: str) -> list[str]:
    """A task with more places in a step than prompts: some prompts repeat."""
    total = sum(task.weight for task in config.tasks.values())
    lines = []
    for name, splits in prompts.items():
        share = count * config.tasks[name].weight / total
        has = len(splits["train"])
        if share > has:
            lines.append(
                f"{key} = {count} takes {share:.0f} prompts of tasks.{name} per {what}, and it has {has}: prompts repeat within a "
                f"{what}; lower {key}"
            )
    return lines


def _content(prompt: Prompt) -> str:
    """The messages and tools that the student is shown."""
    return json.dumps([[dict(m) for m in prompt.messages], list(prompt.tools)], sort_keys=True, default=dict)


def warmup_warning(config: Config | SftConfig) -> str | None:
    """One line where a run ends before its learning rate has reached `optimizer.lr`; else None."""
    warmup = config.optimizer.warmup_steps
    if warmup < config.steps:
        return None
    return (
        f"warning: optimizer.warmup_steps = {warmup} is not below steps = {config.steps}: the learning rate rises to "
        f"{config.steps / (warmup + 1):.0%} of optimizer.lr and never reaches it"
    )


def discount_warning(config: Config) -> str | None:
    """One line where the discount of a recipe favours short or empty branches; else None."""
    discount = config.objective.discount
    if discount is None or discount <= _SAFE_DISCOUNT:
        return None
    return (
        f"warning: with objective.discount = {discount}, a student that cannot match its teacher may learn short or empty "
        "responses, because they have less total KL. Set it to 0.9 or less (docs/concepts/objectives.md)"
    )


def mask_warning(config: Config) -> str | None:
    """One line where the mask of a recipe can reward errors, with the bounds that its own numbers give; else None."""
    objective = config.objective
    if config.mask.format_errors == "off" or objective.coef == 0:
        return None
    if not objective.centred:
        return _outweighed(config)
    return _GROUP_MASK if objective.baseline == "leave_one_out" and not config.reward.coef else None


def _outweighed(config: Config) -> str:
    """How much KL the reward outweighs: a bound for every start, and one for a start without errors."""
    objective, reward = config.objective, config.reward
    coef = reward.coef / objective.coef
    # "grpo" divides by what the rewards of a group differ by
    weight = coef if reward.baseline == "grpo" else coef * (1.0 - reward.format_error)
    everywhere, best = largest_kl(
        weight, objective.normalizer, baseline=reward.baseline, group_size=config.sampling.group_size
    )
    text = (
        "warning: mask.format_errors with this objective increases format errors, unless the reward outweighs the KL of a response "
        f"without errors. At reward 1, errors always decrease if this KL is below {everywhere:.3g} nats per response"
    )
    if best - everywhere < 0.01 * best:
        return f"{text}, and increase if it is above (docs/concepts/safeguards.md)"
    episodes = config.sampling.prompts_per_step * config.sampling.group_size
    longer = " (lower if errors are longer than other responses)" if objective.normalizer == "token" else ""
    other = f", or set objective.normalizer = 'constant' with objective.constant = {episodes}"
    return (
        f"{text}{longer}; from {everywhere:.3g} to {best:.3g} nats they decrease only if there are few at the start. "
        f"Raise reward.coef{other if objective.normalizer != 'constant' else ''} (docs/concepts/safeguards.md)"
    )


_Row: TypeAlias = tuple[str, bool, str]
_OBJECTIVE = ("type", "divergence", "top_k", "tail_residual", "discount", "baseline", "extrapolation")


def without_effect(config: Config | SftConfig) -> list[str]:
    """A line for each key that differs from its default and changes nothing, with the reason."""
    rows = [*_shared(config), *(_trained(config) if isinstance(config, Config) else _tuned(config))]
    found = [f"{key}: {why}" for path, idle, why in rows if idle for key in changed(config, path)]
    return found + [f"{key}: {why}" for key, why in _of_tasks(config)]


def changed(config: Node, path: str) -> list[str]:
    """`key = value` for every key at or below `path` that differs from its default."""
    *tables, leaf = path.split(".")
    node: Node = config
    for table in tables:
        node = getattr(node, table)
    value = getattr(node, leaf)
    if isinstance(value, Node):
        return [line for name in type(value).model_fields for line in changed(config, f"{path}.{name}")]
    return [] if node.is_default(leaf) else [f"{path} = {json.dumps(value, default=str)}"]


def _shared(config: Config | SftConfig) -> Iterator[_Row]:
    yield "lora", config.trainable == "full", "trainable = 'full' trains no adapter"
    constant = config.optimizer.schedule == "constant"
    yield "optimizer.final_lr_fraction", constant, "with optimizer.schedule = 'constant' the rate does not fall"


def _of_tasks(config: Config | SftConfig) -> Iterator[tuple[str, str]]:
    train = isinstance(config, Config)
    for name, task in config.tasks.items():
        if len(config.tasks) == 1 and task.weight != 1.0:
            yield f"tasks.{name}.weight = {task.weight:g}", "there is no other task"
        if isinstance(task, FileTask) and task.grader is not None and not (train and config.evaluation.every):
            why = "evaluation.every = 0" if train else "'opd sft' measures none"
            yield f"tasks.{name}.grader = {json.dumps(task.grader)}", f"it grades held-out rewards, and {why}"
        if not train and task.checks.rules and not config.evaluation.num_prompts:
            yield f"tasks.{name}.checks", "evaluation.num_prompts = 0, so no response is checked"


def _trained(config: Config) -> Iterator[_Row]:
    off = config.reward.coef == 0
    for key in ("baseline", "format_error"):
        yield f"reward.{key}", off, "reward.coef = 0, so no reward is trained on"
    for key in (*(f"objective.{name}" for name in _OBJECTIVE), "mask.format_errors", "alignment.credit"):
        yield key, config.objective.coef == 0, "objective.coef = 0, so nothing is distilled"
    clips = config.objective.epochs > 1 or config.backend == "ray"
    yield (
        "objective.loss",
        not clips,
        "in the first epoch the student is the policy that sampled, so nothing is clipped",
    )
    yield from _measured(config)
    yield "cluster.merge_adapter", config.trainable == "full", "trainable = 'full' trains no adapter"
    checked = any(task.checks.rules for task in config.tasks.values())
    yield "reward.format_error", not off and not checked, "no task has checks, so there is no format error to see"
    for name in ("format_errors", "flagged_advantage"):
        sees = checked or getattr(config.detectors, name).action == "off"
        yield f"detectors.{name}", not sees, "no task has checks, so there is no format error to see"
    for name in type(config.detectors).model_fields:
        detector = getattr(config.detectors, name)
        if isinstance(detector, Node) and getattr(detector, "action", "") == "off":
            for key in set(type(detector).model_fields) - {"action"}:
                yield f"detectors.{name}.{key}", True, f"detectors.{name}.action = 'off'"


def _measured(config: Config) -> Iterator[_Row]:
    evaluation = config.evaluation
    why = "evaluation.every = 0, so no held-out reward is measured"
    yield "evaluation.held_out_prompts", not evaluation.every, why
    yield "detectors.held_out", not evaluation.every and config.detectors.held_out.action != "off", why
    late = evaluation.every > config.steps
    yield "evaluation.every", late, f"steps = {config.steps}, so no held-out reward is measured"
    few = evaluation.before_prompts > evaluation.num_prompts
    why = "so there is no table" if not evaluation.num_prompts else "and no others are measured before the first step"
    yield "evaluation.before_prompts", few, f"evaluation.num_prompts = {evaluation.num_prompts}, {why}"


def _tuned(config: SftConfig) -> Iterator[_Row]:
    yield "max_new_tokens", not config.evaluation.num_prompts, "evaluation.num_prompts = 0, so nothing is sampled"
