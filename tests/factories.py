"""Builders that the tests share: a toy transformer, a byte tokenizer, prompts, rollouts and recipes."""

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd.config import Config, parse_config
from opd.errors import ConfigError
from opd.records import Prompt, Rollout, SampledScore, ScoredRollout, Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, plus two special tokens that delimit turns; 258 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )
    fast.add_special_tokens({"additional_special_tokens": []})
    return fast


def toy_model(seed: int = 0, *, vocab_size: int = 258, scale: float = 0.3, max_context: int = 256) -> LlamaForCausalLM:
    """A two-layer Llama of about 30k parameters whose next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, scale)
    return model.eval()


def save_toy(folder: Path, seed: int = 0, **kwargs: Any) -> str:
    """A toy model and its tokenizer as a Hugging Face folder; returns the path as text."""
    toy_model(seed, **kwargs).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def prompt(identity: str = "p0", text: str = "hi", *, teacher: str = "t", answer: str | None = None) -> Prompt:
    return Prompt(identity, ({"role": "user", "content": text},), teacher=teacher, task="task", answer=answer)


def rollout(
    token_ids: list[int], num_prompt: int, *, prompt: Prompt, sample: int = 0, logprobs: list[float] | None = None
) -> Rollout:
    """A rollout whose first `num_prompt` tokens are the prompt and whose other tokens are actions."""
    n = len(token_ids)
    actions = n - num_prompt
    values = [0.0] * num_prompt + (logprobs or [-1.0] * actions)
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=np.array(token_ids, dtype=np.int32),
        loss_mask=np.arange(n) >= num_prompt,
        rollout_logprobs=np.array(values, dtype=np.float32),
        turns=(Turn("prompt", 0, num_prompt), Turn("student", num_prompt, n)),
        messages=(*prompt.messages, {"role": "assistant", "content": "response"}),
        finish="end",
        policy_version=0,
        reward=0.5,
    )


def scored(item: Rollout, logprobs: list[float]) -> ScoredRollout:
    """A sampled-token score; `logprobs` one an action."""
    spread = np.zeros(len(item.token_ids), dtype=np.float32)
    spread[item.loss_mask] = logprobs
    return ScoredRollout(item, SampledScore(item.prompt.teacher, spread))


def write_prompts(path: Path, count: int = 12, *, teacher: str | None = None) -> str:
    """A prompt file of short questions with answers; returns the path as text."""
    lines = []
    for i in range(count):
        record = {"id": str(i), "prompt": f"say {chr(97 + i % 26)}", "answer": chr(97 + i % 26)}
        lines.append(json.dumps(record | ({"teacher": teacher} if teacher else {})))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def toy_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe, as plain data, that trains a toy student on two toy teachers in well under a second a step.

    `changes` are top-level tables; a table given here is merged into the default one.
    """
    student = save_toy(folder / "student", 0)
    tree: dict[str, Any] = {
        "student": student,
        "output": str(folder / "run"),
        "steps": 4,
        "lora": {"rank": 4, "alpha": 8},
        "teachers": {
            "even": {"model": save_toy(folder / "even", 1)},
            "odd": {"model": save_toy(folder / "odd", 2)},
        },
        "tasks": {
            "first": {"type": "file", "path": write_prompts(folder / "first.jsonl"), "teacher": "even"},
            "second": {
                "type": "file",
                "path": write_prompts(folder / "second.jsonl"),
                "held_out_path": write_prompts(folder / "second_held_out.jsonl", 4),
                "teacher": "odd",
            },
        },
        "sampling": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 6},
        "optimizer": {"lr": 1e-2, "warmup_steps": 1},
        "evaluation": {"num_prompts": 4},
        "checkpoint": {"every": 2},
        "compute": {"threads": 1, "device": "cpu"},
    }
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


def save_adapter(folder: Path, base: str, seed: int = 0, *, rank: int = 4, scale: float = 0.2) -> str:
    """A LoRA adapter of random weights on a toy base, as peft alone writes it (without opd.json); returns its path."""
    from peft import LoraConfig, get_peft_model  # slow to import, and toy engines start often

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for names that it has renamed
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(base),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, scale)
        model.save_pretrained(str(folder))
    return str(folder)


def merged_model(base: str, adapter: str) -> LlamaForCausalLM:
    """A plain model into whose weights an adapter was merged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
        return model.merge_and_unload().eval()


@torch.no_grad()
def plain_logprobs(model: Any, item: Rollout, *, temperature: float = 1.0, vocab_size: int | None = None) -> np.ndarray:
    """The log-probability of each action by a plain forward pass of the rollout alone, [actions]."""
    ids = torch.tensor(item.token_ids.tolist())
    logits = model(input_ids=ids[None]).logits[0, :-1, :vocab_size].double() / temperature
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[1:, None])[:, 0]
    return logprobs.numpy()[item.loss_mask[1:]]


def sft_recipe(folder: Path, student: str, **changes: Any) -> dict[str, Any]:
    """A fine-tuning recipe, as plain data, that makes a toy expert in a second."""
    folder.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {
        "student": student,
        "output": str(folder / "expert"),
        "steps": 20,
        "batch_size": 8,
        "lora": {"rank": 4, "alpha": 8},
        "tasks": {"answers": {"type": "file", "path": write_prompts(folder / "answers.jsonl"), "teacher": "-"}},
        "optimizer": {"lr": 2e-2, "warmup_steps": 1},
        "max_new_tokens": 4,
        "evaluation": {"num_prompts": 4},
        "compute": {"threads": 1, "device": "cpu"},
    }
    return tree | changes


def write_toml(path: Path, tree: Mapping[str, Any]) -> str:
    """A recipe of plain data as a TOML file; returns the path as text."""

    def lines(table: Mapping[str, Any], prefix: str) -> list[str]:
        found = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
        for key, value in table.items():
            if isinstance(value, dict):
                found += [f"[{prefix}{key}]", *lines(value, f"{prefix}{key}.")]
        return found

    path.write_text("\n".join(lines(tree, "")) + "\n", encoding="utf-8")
    return str(path)


def config_tree(**changes: Any) -> dict[str, Any]:
    """The smallest recipe, with one file task and one generated task; `changes` are whole top-level keys."""
    base: dict[str, Any] = {
        "student": "some/model",
        "output": "runs/x",
        "teachers": {"even": {"model": "some/teacher"}, "odd": {"adapter": "some/adapter"}},
        "tasks": {
            "words": {"type": "file", "path": "words.jsonl", "teacher": "even"},
            "sums": {"type": "reasoning_gym", "dataset": "basic_arithmetic", "teacher": "odd"},
        },
    }
    return copy.deepcopy(base | changes)


def put(dotted: str, value: Any) -> dict[str, Any]:
    """The smallest recipe with one value put at a dotted key."""
    whole = config_tree()
    *tables, leaf = dotted.split(".")
    node = whole
    for name in tables:
        node = node.setdefault(name, {})
    node[leaf] = value
    return whole


def fault(data: dict[str, Any], kind: Any = Config) -> str:
    """The message of the ConfigError that this tree raises; always one line."""
    try:
        parse_config(data, kind=kind)
    except ConfigError as error:
        message = str(error)
    else:
        raise AssertionError(f"accepted: {data}")
    assert "\n" not in message
    assert message.startswith("config: ")
    return message.removeprefix("config: ")


CHECKED = {"task": {"type": "file", "path": "p", "teacher": "t", "checks": {"rules": ["truncated"]}}}


def objective_config(group_size: int = 2, **tables: Any) -> Config:
    """A whole recipe of these tables, for what reads no model."""
    tree: dict[str, Any] = {
        "student": "s",
        "output": "o",
        "teachers": {"t": {"model": "m"}},
        "tasks": {"task": {"type": "file", "path": "p", "teacher": "t"}},
        "sampling": {"group_size": group_size},
    }
    return parse_config(tree | tables)
