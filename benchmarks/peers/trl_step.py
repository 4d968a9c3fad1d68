"""Steps of TRL's DistillationTrainer on given work; prints seconds a step and the process's peak memory as JSON.

Runs in the peers' environment (`make peers`), which has no opd.
"""

import argparse
import json
import resource
import tempfile
import time

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    def __init__(self):
        self.starts, self.ends = [], []

    def on_step_begin(self, *args, **kwargs):
        self.starts.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", required=True)
    parser.add_argument("--expert", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    with open(options.prompts, encoding="utf-8") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    steps = options.steps + 1
    # One response a row: a group is its prompt repeated.
    rows = [
        {"prompt": [{"role": "user", "content": texts[(step * options.num_prompts + i) % len(texts)]}]}
        for step in range(steps)
        for i in range(options.num_prompts)
        for _ in range(options.group)
    ]
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    # The expert's weights merged into its base: no adapter slows the teacher down.
    teacher = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32), options.expert
    ).merge_and_unload()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=options.num_prompts * options.group,
            max_steps=steps,
            learning_rate=1e-5,
            max_completion_length=options.tokens,
            generation_kwargs={"min_new_tokens": options.tokens},
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
            processing_class=AutoTokenizer.from_pretrained(options.student, padding_side="left"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    # From one step's end to the next: sampling lies before a step's beginning.
    times = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    print(
        json.dumps(
            {
                "step_s": sum(times) / len(times),
                "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
