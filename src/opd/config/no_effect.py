"""Keys of a recipe that have no effect because of other keys. They are named in a notice, not refused."""

import json
from collections.abc import Iterator
from typing import TypeAlias

from opd.config.node import Node
from opd.config.tasks import FileTask
from opd.config.tree import Config, SftConfig

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
