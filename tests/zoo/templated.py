"""Toy models with another chat template or another tokenizer than the student's, as folders and as teachers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import CHATML, byte_tokenizer, toy_model, toy_recipe
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from opd.config import ComputeConfig
from opd.local.teacher import CrossTokenizerPolicy
from opd.models.loading import load_network
from opd.text.student_text import StudentSide
from opd.text.teacher_text import TeacherSide

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATTY = (
    "You talk with a person. Answer in full.\n"
    "{% for m in messages %}### {{ m.role | upper }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}### ASSISTANT\n{% endif %}"
)
TERSE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + OPENED
)
CLOCK = "<|im_start|>system\nIt is {{ strftime_now('%d %B %Y %H:%M:%S.%f') }}.<|im_end|>\n"
TEMPERATURE = 0.8
"""Of the runs of `own_templates`."""
TURN_END = 258
"""The id of the token <|turn_end|> of a tokenizer with three special tokens."""


def ending(end: str) -> str:
    """A template that writes this behind every message."""
    return TURN.replace("END", end) + OPENED


def templated(template: str | None, *, added: str | None = "<|turn_end|>", special: bool = True) -> Any:
    """The byte tokenizer with another chat template and one token more, id 258."""
    tokenizer = byte_tokenizer()
    if added is not None:
        tokenizer.add_tokens([AddedToken(added, special=special, normalized=False)], special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def save_templated(folder: Path, tokenizer: Any, seed: int = 0, *, eos: int | list[int] = 257, **options: Any) -> str:
    """A toy model with this tokenizer, and these end tokens in its generation config; returns its folder."""
    model = toy_model(seed, vocab_size=264, **options)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


COMPUTE = ComputeConfig(device="cpu", threads=1)


def save_cross_tokenizer(folder: Path, tokenizer, seed: int = 3, **kwargs) -> str:
    """A toy model with another tokenizer; returns its folder."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = toy_model(seed, vocab_size=max(260, len(tokenizer) + 3), **kwargs)  # rows of padding
    model.generation_config.eos_token_id = end
    model.config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def policy_of(source: str, student_tokenizer) -> CrossTokenizerPolicy:
    network = load_network(source, COMPUTE)
    teacher_side = TeacherSide(
        network.tokenizer, name="t", generation_config=network.base.generation_config, vocab_size=network.vocab_size
    )
    return CrossTokenizerPolicy(network, None, teacher_side, StudentSide(student_tokenizer), -50.0)


def toy_without(tokenizer, name: str):
    """The same tokenizer with one special token called otherwise."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str().replace(name, "<other>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        eos_token="<|im_end|>",
        chat_template=CHATML.replace(name, "<other>"),
    )


def renumbered(tokenizer, order: np.ndarray, *, added: bool = True) -> PreTrainedTokenizerFast:
    """The same tokenizer with id order[i] for id i. Without `added` the vocabulary lacks the added tokens: they then get the ids
    from its size on, whatever tokenizer.json says."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.get_vocab() if added else plain["model"]["vocab"]
    plain["model"]["vocab"] = {token: int(order[index]) for token, index in tokens.items()}
    for token in plain["added_tokens"]:
        token["id"] = int(order[token["id"]])
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    backend = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **names)


def save_renumbered(folder: Path, tokenizer, ends: tuple[str, ...]) -> tuple[str, str]:
    """A toy model whose turns end with each of `ends`, and the same model with other token ids: equal distributions over texts."""
    rows, ids = len(tokenizer) + 3, [tokenizer.convert_tokens_to_ids(end) for end in ends]
    order = np.append(np.random.default_rng(1).permutation(len(tokenizer)), np.arange(len(tokenizer), rows))
    model: Any = toy_model(4, vocab_size=rows)
    saved = []
    for name, own in (("mine", tokenizer), ("renumbered", renumbered(tokenizer, order))):
        for config in (model.config, model.generation_config):
            config.bos_token_id, config.pad_token_id = own.bos_token_id, own.pad_token_id
            config.eos_token_id = [int(i) for i in ids]
        model.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
        saved.append(str(folder / name))
        ids, table = order[ids], model.get_input_embeddings().weight
        with torch.no_grad():
            table[torch.from_numpy(order)] = table.clone()  # the head is tied to it
    return saved[0], saved[1]


def own_templates(
    folder: Path, student: str | None = TERSE, teacher: str | None = CHATTY, **changes: Any
) -> dict[str, Any]:
    """A student and a teacher of one vocabulary, each with its chat template."""
    ours = save_templated(folder / "mine", templated(student))
    theirs = save_templated(folder / "theirs", templated(teacher), 1)
    choice = changes.pop("template", None)
    teachers = {n: {"model": theirs} | ({"template": choice} if choice else {}) for n in ("even", "odd")}
    return toy_recipe(folder, student=ours, temperature=TEMPERATURE, teachers=teachers, **changes)
