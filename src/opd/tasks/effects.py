"""Data and options of tasks that a run makes no use of, each said in one line."""

import json
from collections.abc import Mapping, Sequence

from opd.config import FileTask, TaskConfig
from opd.records import Prompt

PromptSets = Mapping[str, Mapping[str, Sequence[Prompt]]]


def repeated_prompts(prompts: PromptSets, *, batch: int, key: str) -> list[str]:
    """Steps that ask for more prompts than there are. key: of the recipe, which says how many a step takes."""
    count = sum(len(splits["train"]) for splits in prompts.values())
    if batch <= count:
        return []
    return [
        f"{key} = {batch} is more than the {count} training prompts, so a step takes prompts twice; lower it to {count}"
    ]


def held_out_prompts_in_training(configs: Mapping[str, TaskConfig], prompts: PromptSets) -> list[str]:
    """Held-out prompts of files that are trained on, by any task: what they measure is no generalisation."""
    trained = {_content(prompt) for splits in prompts.values() for prompt in splits["train"]}
    found: list[str] = []
    for name, config in configs.items():
        mine = [p for p in prompts[name]["held_out"] if _content(p) in trained] if isinstance(config, FileTask) else []
        if mine:
            found.append(
                f"{len(mine)} of {len(prompts[name]['held_out'])} held-out prompts of tasks.{name} are training prompts too, the "
                f"first '{mine[0].id}'; take them out of one of the files"
            )
    return found


def unverified_data(configs: Mapping[str, TaskConfig], prompts: PromptSets, *, grades: bool) -> list[str]:
    """Answers that no verifier reads, verifiers that have no answer, graders that are not asked.

    grades: whether the run measures the held-out outcome, which is what a grader is for.
    """
    found: list[str] = []
    for name, config in configs.items():
        if not isinstance(config, FileTask):
            continue
        every = [p for split in prompts[name].values() for p in split]
        answered = sum(p.answer is not None for p in every)
        if answered and config.verifier == "none" and config.grader is None:
            found.append(f"tasks.{name}.verifier = 'none' leaves {answered} answers without effect; choose a verifier")
        if not answered and (config.verifier in ("math", "number") or config.grader is not None):
            option = f"verifier = '{config.verifier}'" if config.grader is None else f"grader = '{config.grader}'"
            found.append(
                f"tasks.{name}.{option} verifies nothing, because no record has an answer; add answers, or drop it"
            )
        elif config.grader is not None and not grades:
            found.append(
                f"tasks.{name}.grader = '{config.grader}' is never asked, because evaluation.every = 0; set it, or drop the grader"
            )
    return found


def _content(prompt: Prompt) -> str:
    """What the student is shown."""
    return json.dumps([[dict(m) for m in prompt.messages], list(prompt.tools)], sort_keys=True, default=dict)
