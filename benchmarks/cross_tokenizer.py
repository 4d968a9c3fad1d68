"""A student learns from a teacher with another tokenizer: opd beside TRL's GOLD, the same prompts, samples and steps.

    .venv/bin/python benchmarks/cross_tokenizer.py recipes/sums.toml --output runs/foreign

Needs trl (`pip install trl==1.16.0`, into an environment of its own that has opd too); without it only opd's runs are done. Both
train a LoRA adapter of the recipe's size at the recipe's rate and schedule, sampling at temperature 1; both are then judged by the
same code: accuracy on prompts that neither saw, and the reverse KL a byte, estimated from the samples. opd keeps no scores here
(compute.score_cache), so that seconds a step are of the same work. "immediate" has a leave-one-out baseline, "top_k" and GOLD
have no sampled advantages that want one. What is there already is not done again.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import opd
from opd.config import Config
from opd.data.tasks import make_tasks
from opd.evaluate import evaluate, pick
from opd.local.build import build
from opd.rewards.judge import Judge

VARIANTS = {
    "immediate": ["objective.type=immediate", "objective.baseline=leave_one_out"],
    "top_k": ["objective.type=top_k", "objective.baseline=none"],
}


def by_opd(name: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.output) / name
    config = opd.load_config(
        options.recipe, [*options.overrides, *VARIANTS[name], "compute.score_cache=0", f"output={folder}"]
    )
    if not (folder / "parity.json").exists():
        opd.Trainer(folder).resume() if folder.exists() else opd.train(config)
    [row] = [r for r in json.loads((folder / "parity.json").read_text()) if r["split"] == "held_out"]
    steps = [line["time/step_s/sum"] for line in opd.read_metrics(folder)]
    return {
        "before": row["student_before"],
        "after": row["student_after"],
        "teacher": row["teacher_alone"],
        "step_s": steps,
    }


def by_gold(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.output) / "gold"
    config = opd.load_config(options.recipe, [*options.overrides, f"output={folder}"])
    if not (folder / "student").exists():
        _train_gold(config, folder)
    after = _judge(config, folder)
    return {
        "after": asdict(after) | {"accuracy": after.accuracy},
        "step_s": json.loads((folder / "steps.json").read_text()),
    }


def _train_gold(config: Config, folder: Path) -> None:
    """TRL's trainer with the recipe's numbers. Where its settings leave a choice, what is nearest: only samples of the student
    (lmbda 1), temperature 1 and the whole distribution, the reverse KL on matched tokens (beta 1), tokens predicted by the
    state before them ("bayesian"), ends of turns included."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    torch.set_num_threads(config.compute.threads or torch.get_num_threads())
    [task] = make_tasks(config.tasks).values()
    [teacher] = config.teachers.values()
    assert teacher.model is not None
    turns = [
        {"messages": [*map(dict, p.messages), {"role": "assistant", "content": p.answer}]}
        for p in task.prompts("train")
    ]
    batch = config.sampling.prompts_per_step * config.sampling.group_size
    args = GOLDConfig(
        output_dir=str(folder), max_steps=config.steps, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
        num_generations=config.sampling.group_size, learning_rate=config.optimizer.lr, lr_scheduler_type="linear",
        warmup_steps=config.optimizer.warmup_steps, adam_beta1=config.optimizer.betas[0], adam_beta2=config.optimizer.betas[1],
        weight_decay=config.optimizer.weight_decay, max_grad_norm=config.optimizer.max_grad_norm, seed=config.seed, lmbda=1.0,
        temperature=config.temperature, top_p=1.0, top_k=0, max_completion_length=config.sampling.max_new_tokens, beta=1.0,
        use_uld_loss=True, uld_use_hybrid_loss=True, uld_token_merge_strategy="bayesian", uld_skip_student_eos=False,
        uld_skip_teacher_eos=False, logging_steps=1, save_strategy="no", report_to="none", bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_length=512,
    )  # fmt: skip
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    student = AutoModelForCausalLM.from_pretrained(config.student, dtype=torch.float32, trust_remote_code=False)
    lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear", lora_dropout=0.0)
    trainer = GOLDTrainer(
        model=student,
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher.model, dtype=torch.float32, trust_remote_code=False),
        args=args,
        train_dataset=Dataset.from_list(turns),
        processing_class=AutoTokenizer.from_pretrained(config.student, trust_remote_code=False),
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.json").write_text(json.dumps(times))
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.model.merge_and_unload().save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(config.student, trust_remote_code=False).save_pretrained(folder / "student")


def _judge(config: Config, folder: Path) -> Any:
    """What opd's own table says of a student, of this one."""
    judged = config.model_copy(update={"student": str(folder / "student")})
    backend = build(judged)
    if not backend.cross_tokenizer:
        raise SystemExit("the teacher has the student's tokenizer; GOLD is for another one")
    [task] = make_tasks(judged.tasks).values()
    prompts = pick(task.prompts("held_out"), config.evaluation.num_prompts, seed=0)  # as opd's own table has them
    teachers = backend.teachers(keep_hidden=True)
    return evaluate(backend.sampler(), prompts, Judge(task.reward), teachers=teachers, reverse_kl=lambda _: [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--output", default="runs/foreign")
    parser.add_argument("--only", choices=[*VARIANTS, "gold"])
    options = parser.parse_args()
    found: dict[str, Any] = {n: by_opd(n, options) for n in VARIANTS if options.only in (None, n)}
    if options.only in (None, "gold"):
        try:
            found["gold"] = by_gold(options)
        except ImportError as error:
            print(f"GOLD: not measured ({error})")
    print("| | accuracy, held out | KL a byte | KL a response | seconds a step |\n|---|---|---|---|---|")
    rows = [(name, figures["after"], statistics.median(figures["step_s"])) for name, figures in found.items()]
    before = next((f["before"] for f in found.values() if f.get("before")), None)
    for name, cell, seconds in [*([("before", before, None)] if before else []), *rows]:
        values = [f"{100 * cell['accuracy']:.1f} % of {cell['verified']}"]
        values += ["-" if cell[key] is None else f"{cell[key]:.3f}" for key in ("kl_byte", "kl_sequence")]
        print(f"| {name} | {' | '.join(values)} | {'-' if seconds is None else f'{seconds:.1f}'} |")
    Path(options.output).mkdir(parents=True, exist_ok=True)
    (Path(options.output) / "foreign.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
