"""Toy models whose chat templates differ while their vocabulary does not."""

from pathlib import Path
from typing import Any

from factories import byte_tokenizer, toy_model
from tokenizers import AddedToken

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
