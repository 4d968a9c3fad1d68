"""Notices before the first step: keys and data without effect, and objectives that reward what they should not."""

import json
from collections.abc import Mapping

from opd.checks.rules import Finding
from opd.config import Config, FileTask, PythonTask, SftConfig, TaskConfig, changed, without_effect
from opd.data.task_data import PromptSets, has_verdict
from opd.objectives.mask_law import largest_kl
from opd.records import Prompt

REWARD = "reward"
"""The name of the finding that says what becomes of rewards."""
_NO_EFFECT = "no effect"
_PLAYED = ("tools", "textarena")  # types of tasks that have environments
_GROUP_MASK = (
    "warning: mask.format_errors with baseline = 'leave_one_out' and no reward: other samples centre an advantage only where they "
    "still go on, so errors keep a part of their reward (P 0.45 in pairs, 0.21 in groups of 4, where the teacher has 0.10; opd "
    "theory, H-d); set reward.coef > 0, or type = 'exact', or with type = 'immediate' baseline = 'kl'"
)
_SAFE_DISCOUNT = 0.9
_TRAIN_ON_IT = (
    "reward.coef = 0, so nothing trains on it; to train on it set reward.coef above 0, with sampling.group_size of 2 or "
    "more (or reward.baseline = 'none')"
)


def notices(config: Config, prompts: PromptSets, *, reward: bool, environment: bool) -> list[Finding]:
    """Keys without effect, prompts that repeat, and what becomes of rewards. reward, environment: whether the user gave one."""
    findings = rewards_used(config, prompts, reward=reward, environment=environment)
    lines = without_effect(config) + _of_prompts(config, prompts, environment=environment)
    lines += _replaced(config) if reward else _idle_verifiers(config, prompts) + _unread_answers(config, prompts)
    lines += _repeated(prompts, config, "sampling.prompts_per_step", config.sampling.prompts_per_step, "step")
    lines += _held_out_prompts_in_training(config.tasks, prompts)
    shown = sum(bool(p.demonstration) for splits in prompts.values() for p in splits["train"])
    if shown:
        lines.append(f"the demonstrations of {shown} prompts: 'opd sft' learns from them, 'opd train' does not")
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
    """What becomes of rewards: measured only, or trained on, and where nothing gives one."""
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
    played = environment or any(task.type in _PLAYED for task in config.tasks.values())
    played = played or any(p.demonstration or p.tools for p in every)
    lines = []
    for name in type(config.episodes).model_fields if not played else ():
        bounds_servers = name == "max_concurrent" and isinstance(config, Config) and config.backend == "ray"
        keys = [] if bounds_servers else changed(config, f"episodes.{name}")
        lines += [f"{key}: no prompt has an environment or tools, so every episode is one turn" for key in keys]
    return lines


def _idle_verifiers(config: Config | SftConfig, prompts: PromptSets) -> list[str]:
    """Verifiers and graders that the recipe names, and that have no answer to compare with."""
    graded = isinstance(config, Config) and config.evaluation.every > 0  # otherwise no grader is asked, which is said
    lines = []
    for name, splits in prompts.items():
        task = config.tasks[name]
        if not isinstance(task, FileTask | PythonTask) or any(
            p.answer is not None for found in splits.values() for p in found
        ):
            continue
        named = {"verifier": task.verifier if task.verifier in ("math", "number") else None}
        named |= {"grader": task.grader if graded else None}
        lines += [
            f"tasks.{name}.{key} = '{value}': no prompt has an answer (the key 'answer' of its record)"
            for key, value in named.items()
            if value
        ]
    return lines


def _held_out_prompts_in_training(configs: Mapping[str, TaskConfig], prompts: PromptSets) -> list[str]:
    """Held-out prompts of files that are trained on, by any task: what they measure is no generalisation."""
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


def _replaced(config: Config) -> list[str]:
    """What the user's reward takes the place of, where the recipe names it."""
    named: dict[str, str | None] = {}
    for name, task in config.tasks.items():
        if isinstance(task, FileTask | PythonTask):
            named[f"tasks.{name}.verifier"] = task.verifier if task.verifier in ("math", "number") else None
            named[f"tasks.{name}.grader"] = task.grader if config.evaluation.every else None
    return [f"{key} = '{value}': the reward function takes its place" for key, value in named.items() if value]


def _repeated(prompts: PromptSets, config: Config | SftConfig, key: str, count: int, what: str) -> list[str]:
    """A task with more places in a step than prompts: some prompts repeat."""
    total = sum(task.weight for task in config.tasks.values())
    lines = []
    for name, splits in prompts.items():
        share = count * config.tasks[name].weight / total
        has = len(splits["train"])
        if share > has:
            lines.append(
                f"{key} = {count} takes {share:.0f} prompts of tasks.{name} a {what}, and it has {has}: prompts repeat within a "
                f"{what}; lower {key}"
            )
    return lines


def _content(prompt: Prompt) -> str:
    """What the student is shown."""
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
        f"warning: objective.discount = {discount} lets a student that cannot match its teacher everywhere prefer short or empty "
        "branches: a branch of teacher probability 5 % can become 46 % in 32 steps at discount 1 (docs/concepts/objectives.md)"
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
        "warning: mask.format_errors with an uncentred advantage rewards errors unless the reward outweighs the KL that a response"
        f" without errors pays. At reward 1, errors fade from every start below {everywhere:.3g} nats a response"
    )
    if best - everywhere < 0.01 * best:
        return f"{text}, and grow above it (docs/concepts/safeguards.md)"
    episodes = config.sampling.prompts_per_step * config.sampling.group_size
    longer = ", less where errors are longer than other responses" if objective.normalizer == "token" else ""
    other = f", or set objective.normalizer = 'constant' with objective.constant = {episodes}"
    return (
        f"{text}{longer}; from {everywhere:.3g} to {best:.3g} nats they fade only from a start with few of them. Raise reward.coef"
        f"{other if objective.normalizer != 'constant' else ''} (docs/concepts/safeguards.md)"
    )
