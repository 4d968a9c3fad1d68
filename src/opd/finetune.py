"""Supervised fine-tuning: how the experts of a merge are made (`opd sft`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from opd.config import ObjectiveConfig, SftConfig
from opd.data.stream import PromptStream
from opd.embedded.build import build_student, export
from opd.embedded.learner import EmbeddedLearner
from opd.embedded.sampler import EmbeddedSampler
from opd.embedded.sft import answer_batch
from opd.embedded.teacher import Voice
from opd.errors import DataError
from opd.evaluate import SPLITS, Cell, evaluate, pick
from opd.metrics import values
from opd.records import Prompt
from opd.report.console import ProgressLine
from opd.report.curves import draw_curves
from opd.report.run_folder import RunFolder, explain_io, read_metrics
from opd.tasks import make_tasks


def sft(config: SftConfig) -> Mapping[tuple[str, str], Cell]:
    """Fine-tune a student on the reference answers of its tasks and write it to `output`/student.

    Returns its accuracy by task and split. The loss is the mean negative log-likelihood of the answers' tokens, end token
    included.
    """
    tasks = make_tasks(config.tasks)
    prompts = {name: {split: task.prompts(split) for split in SPLITS} for name, task in tasks.items()}
    for name, splits in prompts.items():
        if not splits["train"]:
            raise DataError(f"tasks.{name} has no training prompts")
    RunFolder.require_absent(config.output)
    student = build_student(config)
    for splits in prompts.values():
        _require_learnable(splits["train"], student)
    folder = RunFolder.create(config.output, config)
    learner = EmbeddedLearner(
        student.network,
        adapter=student.adapter,
        objective=ObjectiveConfig(type="immediate", normalizer="token"),
        optimizer=config.optimizer,
        steps=config.steps,
        heads={},
        temperature=1.0,
        max_tokens=config.compute.max_tokens,
    )
    weights = {name: task.weight for name, task in config.tasks.items()}
    stream = PromptStream({t: splits["train"] for t, splits in prompts.items()}, weights, seed=config.seed)
    with ProgressLine(config.steps) as line:
        for step in range(1, config.steps + 1):
            batch = answer_batch(student.network.tokenizer, stream.next(config.batch_size))
            metrics = learner.forward_backward(batch) | learner.optim_step()
            plain = {name: value for name, value in values(metrics).items() if not name.startswith("kl/")}
            folder.append_metrics(step, plain)
            line.step(step, plain)
        with explain_io(folder.student):
            export(student, folder.student, dtype=config.save_dtype)
            draw_curves(read_metrics(folder.path), folder.path / "curves.png", title=str(Path(config.output)))
        sampler = EmbeddedSampler(
            student.network,
            adapter=student.adapter,
            temperature=1.0,
            max_new_tokens=config.max_new_tokens,
            max_rows=64,
            max_tokens=config.compute.max_tokens,
        )
        found: dict[tuple[str, str], Cell] = {}
        for name, splits in prompts.items():
            for split in SPLITS:
                chosen = pick(splits[split], config.evaluation.num_prompts, seed=0)
                if not chosen:
                    continue
                cell = found[name, split] = evaluate(sampler, chosen, tasks[name].reward)
                if cell.accuracy is not None and cell.interval is not None:
                    low, high = cell.interval
                    line.say(f"{name} {split}: {cell.accuracy:.3f} [{low:.3f}, {high:.3f}] exact match of {cell.total}")
    return found


def _require_learnable(prompts: Sequence[Prompt], student: Voice) -> None:
    """Raise DataError for the first prompt whose answer is missing or does not fit the context."""
    limit = student.network.max_context
    for prompt in prompts:
        tokens = len(answer_batch(student.network.tokenizer, [prompt]).token_ids)
        if limit is not None and tokens > limit:
            raise DataError(
                f"prompt '{prompt.id}': {tokens} tokens with its answer exceed the model's context ({limit})"
            )
