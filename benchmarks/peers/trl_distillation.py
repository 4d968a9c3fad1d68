"""TRL's DistillationTrainer on given work; prints the seconds of its steps and the process's peak memory as JSON.

Runs in the peers' environment (`make peers`), which has no opd.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """Seconds of training at the end of each step; the time that keeping adapters takes does not count."""

    def __init__(self, every, folder):
        self.every, self.folder = every, folder
        self.ends, self.kept, self.lost = [], [], 0.0

    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now = time.perf_counter()
        self.ends.append(now - self.start - self.lost)
        if self.every and state.global_step % self.every == 0:
            folder = Path(self.folder) / f"step-{state.global_step}"
            model.save_pretrained(folder)
            self.kept.append({"step": state.global_step, "seconds": self.ends[-1], "adapter": str(folder)})
        self.lost += time.perf_counter() - now


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endless", action="store_true", help="no end token ends a response")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--keep-every", type=int, default=0, metavar="STEPS")
    parser.add_argument("--keep-in", metavar="FOLDER")
    options = parser.parse_args()
    with open(options.prompts, encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    # One response a row: a group is its prompt repeated.
    rows = [
        {"prompt": [{"role": "user", "content": texts[(step * options.num_prompts + i) % len(texts)]}]}
        for step in range(options.steps)
        for i in range(options.num_prompts)
        for _ in range(options.group)
    ]
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32, trust_remote_code=False)
    # The expert's weights merged into its base: no adapter slows the teacher down.
    teacher = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32, trust_remote_code=False),
        options.expert,
        trust_remote_code=False,
    ).merge_and_unload()
    clock = Clock(options.keep_every, options.keep_in)
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            seed=options.seed,
            per_device_train_batch_size=options.num_prompts * options.group,
            max_steps=options.steps,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            max_completion_length=options.tokens,
            generation_kwargs={"min_new_tokens": options.tokens} if options.endless else None,
            gradient_checkpointing=options.checkpointing,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            shuffle_dataset=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(
                options.student, padding_side="left", trust_remote_code=False
            ),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"ends_s": clock.ends, "kept": clock.kept, "peak_gb": peak}))


if __name__ == "__main__":
    main()
