"""From messages to token ids and back."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from opd.errors import DataError
from opd.records import Message, Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt, generation prompt included, in the tokenizer's own chat template.

    A tokenizer without a chat template (a base model) gets the messages' texts, joined by blank lines.
    Raises DataError when nothing is left to condition on.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [dict(m) for m in prompt.messages]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except TemplateError as error:
            raise DataError(f"prompt '{prompt.id}': the model's chat template refuses it: {error}") from None
    else:
        ids = tokenizer("\n\n".join(m["content"] for m in prompt.messages)).input_ids
    if not ids:
        raise DataError(f"prompt '{prompt.id}': no tokens after tokenization; expected at least one")
    return list(ids)


def decode_response(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of a response, its special tokens (end of turn) left out."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def user_message(text: str) -> tuple[Message, ...]:
    """A conversation that holds one user message."""
    return ({"role": "user", "content": text},)
