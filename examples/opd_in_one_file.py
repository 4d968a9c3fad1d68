"""On-policy distillation in one file, with nothing hidden: torch and transformers only.

The student samples its own responses, each prompt's teacher gives its distribution at every token, and the student
descends the exact reverse KL on the states that it visited. Several LoRA experts of one base are merged into one fresh
LoRA student. The library's first steps are the same, number for number; it adds packing, caching, checks, checkpoints.

    python examples/opd_in_one_file.py --model models/smollm2-135m-instruct --steps 10 \
        --task letters=examples/merge/letters_train.jsonl --teacher letters=examples/merge/letters
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file  # a part of every transformers installation
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


class Lora(nn.Module):
    """A frozen linear layer with named low-rank updates, one of which is active: y = W x + scale B A x."""

    active = "student"  # shared by all layers: one name switches the whole model

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        self.scale: dict[str, float] = {}

    def add(self, name: str, rank: int, scale: float) -> None:
        self.down[name] = nn.Linear(self.base.in_features, rank, bias=False)
        self.up[name] = nn.Linear(rank, self.base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.up[name].weight)  # the update starts at zero: the student starts as the base
        self.scale[name] = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up[self.active](self.down[self.active](x)) * self.scale[self.active]


def add_lora_layers(model: nn.Module) -> dict[str, Lora]:
    """Wrap every linear layer but the output head; returns the wrappers by the layer's name."""
    model.requires_grad_(False)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    layers = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layers[name] = Lora(model.get_submodule(name))
        setattr(model.get_submodule(parent), leaf, layers[name])
    return layers


def load_expert(layers: dict[str, Lora], name: str, folder: str) -> None:
    """Load a PEFT LoRA adapter as the frozen update `name`."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    weights = load_file(Path(folder) / "adapter_model.safetensors")
    for layer, lora in layers.items():
        lora.add(name, config["r"], config["lora_alpha"] / config["r"])
        for part, suffix in ((lora.down, "lora_A"), (lora.up, "lora_B")):
            part[name].weight.data.copy_(weights[f"base_model.model.{layer}.{suffix}.weight"])
        lora.down[name].requires_grad_(False)
        lora.up[name].requires_grad_(False)


def read_prompts(tokenizer, name: str, path: str) -> list[tuple[list[int], str]]:
    """(token ids of the rendered prompt, name of its teacher) of each line of a JSONL file."""
    prompts = []
    for line in filter(str.strip, Path(path).read_text(encoding="utf-8").split("\n")):
        record = json.loads(line)
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        prompts.append((list(ids), record.get("teacher", name)))
    return prompts


def generator_of(*parts: int | str) -> torch.Generator:
    """Random numbers for one place in the run; hashed, because torch reads only 32 bits of a seed."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def prompt_batches(tasks: list[list], size: int, seed: int):
    """Endless batches: tasks take turns, each in its own order, reshuffled every epoch."""
    drawn = [0] * len(tasks)
    while True:
        batch = []
        for _ in range(size):
            due = max(range(len(tasks)), key=lambda i: (sum(drawn) + 1) / len(tasks) - drawn[i])
            epoch, index = divmod(drawn[due], len(tasks[due]))
            order = torch.randperm(len(tasks[due]), generator=generator_of(seed, "prompts", due, epoch)).tolist()
            batch.append(tasks[due][order[index]])
            drawn[due] += 1
        yield batch


def logits_of(model: nn.Module, sequences: list[list[int]]) -> Tensor:
    """Logits [rows, longest, vocab] of right-padded rows; a causal model does not see what is behind a token."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    return model(input_ids=ids, use_cache=False).logits.float()


@torch.no_grad()
def sample(model: nn.Module, prompts: list[list[int]], uniforms: Tensor, end: set[int], temperature: float):
    """Extend every prompt, token by token, until it ends its turn or the random numbers are used up."""
    Lora.active = "student"
    sequences = [list(p) for p in prompts]
    growing = list(range(len(prompts)))
    for step in range(uniforms.shape[1]):
        rows = [sequences[i] for i in growing]
        logits = logits_of(model, rows)[range(len(rows)), [len(r) - 1 for r in rows]]
        # Inversion: the first token whose cumulative probability exceeds the uniform number.
        cdf = torch.log_softmax(logits / temperature, dim=-1).double().exp().cumsum(-1)
        marks = uniforms[growing, step, None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, marks, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1).tolist()
        for i, token in zip(growing, tokens, strict=True):
            sequences[i].append(token)
        growing = [i for i, token in zip(growing, tokens, strict=True) if token not in end]
        if not growing:
            break
    return sequences


def action_logprobs(
    model: nn.Module, sequences: list[list[int]], starts: list[int], temperature: float
) -> list[Tensor]:
    """Log-probabilities [actions, vocab] over the vocabulary before each sampled token, one tensor a sequence."""
    logits = logits_of(model, sequences) / temperature
    rows = zip(logits, starts, sequences, strict=True)
    return [torch.log_softmax(row[start - 1 : len(s) - 1], dim=-1) for row, start, s in rows]


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student, teacher) at every action, [actions]."""
    return (student.exp() * (student - teacher)).sum(-1)


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then a line down to zero."""
    if step < args.warmup:
        return args.lr * (step + 1) / (args.warmup + 1)
    return args.lr * (1 - (step - args.warmup) / max(1, args.steps - args.warmup))


def distill(args: argparse.Namespace) -> list[dict[str, float]]:
    """The whole loop; returns the reverse KL per token and the gradient norm of every step."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False).eval()
    layers = add_lora_layers(model)
    torch.manual_seed(args.seed)
    for lora in layers.values():
        lora.add("student", args.rank, args.alpha / args.rank)
    trained = [p for lora in layers.values() for m in (lora.down, lora.up) for p in m["student"].parameters()]
    for name, folder in args.teacher.items():
        load_expert(layers, name, folder)
    declared = model.generation_config.eos_token_id
    end = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
    batches = prompt_batches(
        [read_prompts(tokenizer, n, p) for n, p in args.task.items()], args.prompts_per_step, args.seed
    )
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)

    history = []
    for step in range(args.steps_to_run or args.steps):
        # 1. The student samples: one row of random numbers a rollout.
        batch = next(batches)
        prompts = [ids for ids, _ in batch for _ in range(args.group_size)]
        chosen = [teacher for _, teacher in batch for _ in range(args.group_size)]
        generator = generator_of(args.seed, "sample", step + 1)
        uniforms = torch.rand(len(prompts), args.max_new_tokens, dtype=torch.float64, generator=generator)
        sequences = sample(model, prompts, uniforms, end, args.temperature)

        # 2. Every rollout is scored by its own teacher T(x), over the whole vocabulary.
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for name in args.teacher:
            mine = [i for i, teacher in enumerate(chosen) if teacher == name]
            if mine:
                Lora.active = name
                with torch.no_grad():
                    starts = [len(prompts[i]) for i in mine]
                    found = action_logprobs(model, [sequences[i] for i in mine], starts, args.temperature)
                for i, logprobs in zip(mine, found, strict=True):
                    scores[i] = logprobs.clamp(min=-50.0)

        # 3. The update: sum over the tokens of a trajectory, mean over the trajectories.
        Lora.active = "student"
        students = action_logprobs(model, sequences, [len(p) for p in prompts], args.temperature)
        kl = [reverse_kl(student, teacher) for student, teacher in zip(students, scores, strict=True)]
        loss = torch.stack([k.sum() for k in kl]).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad()
        history.append({"kl": float(torch.cat(kl).detach().mean()), "grad_norm": float(norm)})
        print(
            f"step {step + 1}  kl/token {history[-1]['kl']:.4f}  grad norm {history[-1]['grad_norm']:.4f}", flush=True
        )
    return history


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="the student's base: a hub id or a folder")
    parser.add_argument("--teacher", action="append", required=True, metavar="NAME=ADAPTER_FOLDER")
    parser.add_argument("--task", action="append", required=True, metavar="TEACHER=PROMPTS.jsonl")
    parser.add_argument("--steps", type=int, default=90, help="the length of the schedule")
    parser.add_argument("--steps-to-run", type=int, help="stop after this many of them")
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.teacher = dict(pair.split("=", 1) for pair in args.teacher)
    args.task = dict(pair.split("=", 1) for pair in args.task)
    return args


if __name__ == "__main__":
    distill(parse())
