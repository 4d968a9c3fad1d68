"""Toy models with another tokenizer than the student's, as folders and as teachers."""

from pathlib import Path

from factories import CHATML, toy_model

from opd.config import ComputeConfig
from opd.local.teacher import CrossTokenizerPolicy
from opd.models.loading import load_network
from opd.text.student_text import StudentSide
from opd.text.teacher_text import TeacherSide

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
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = json.loads(tokenizer.backend_tokenizer.to_str().replace(name, "<other>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        eos_token="<|im_end|>",
        chat_template=CHATML.replace(name, "<other>"),
    )
