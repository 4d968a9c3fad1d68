"""A teacher that is the student with other token ids is the student: nothing tells them apart, whatever is followed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import toy_recipe
from pairs import CORPUS
from templated import renumbered, save_renumbered
from zoo import real, toy

import opd
from opd.batch import pack
from opd.errors import ModelError
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.metrics import values
from opd.objective import compute_advantages
from opd.records import ChunkScore, Prompt, Rollout, SampledScore, Turn
from opd.text.chat import Chat
from opd.text.student_text import StudentSide
from opd.text.tokenizer import token_bytes

TOKENIZERS = {
    "bytes": lambda: toy("bytes"),
    "byte-level BPE": lambda: toy("bpe400"),
    "SentencePiece": lambda: toy("sentencepiece"),
    "SmolLM2": lambda: real("smollm2"),
}
ENDS = {"one end": ("<|im_end|>",), "two ends": ("<|im_end|>", "<|im_start|>")}
OBJECTIVES: list[dict[str, Any]] = [
    {"type": "immediate"},
    {"type": "immediate", "baseline": "leave_one_out"},
    {"type": "to_go", "discount": 1.0},
    {"type": "top_k", "top_k": 4},
]


def backend_of(folder: Path, tokenizer: str, ends: str, objective: dict[str, Any]) -> LocalBackend:
    student, teacher = save_renumbered(folder, TOKENIZERS[tokenizer](), ENDS[ends])
    tree = toy_recipe(folder, objective=objective)
    tree |= {"student": student, "teachers": {"even": {"model": teacher}}}
    tree["tasks"]["second"]["teacher"] = "even"
    return build(opd.parse_config(tree))


def rollouts(backend: LocalBackend) -> list[Rollout]:
    """The corpus as the student's tokenizer writes it behind a prompt, cut off, and ended in every way that the student has."""
    network, found = backend.student.network, []
    chat = Chat(network.tokenizer, generation_config=network.base.generation_config)
    prompt = Prompt("p", ({"role": "user", "content": "Say it."},), teacher="even", task="first")
    shown = chat.encode_prompt(prompt)
    rendered = network.tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    for text in CORPUS.values():
        if any(name in text for name in chat.table.names.values()) or text[:1].isspace():
            continue  # quoted special tokens are encoded apart; a dummy prefix takes a first space away
        whole = network.tokenizer(rendered + text, add_special_tokens=False).input_ids
        if whole[: len(shown)] != shown:
            continue  # a token straddles the boundary, which no student would sample
        for end in [[], *([i] for i in chat.end.ids)]:
            ids = [*whole, *end]
            if len(ids) == len(shown):
                continue
            item = Rollout(
                prompt=prompt,
                sample=len(found),
                token_ids=np.array(ids, dtype=np.int32),
                loss_mask=np.arange(len(ids)) >= len(shown),
                rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
                turns=(Turn("prompt", 0, len(shown)), Turn("student", len(shown), len(ids))),
                messages=(*prompt.messages, {"role": "assistant", "content": text}),
                finish="end" if end else "length",
                policy_version=0,
            )
            found.append(item)
    scored = [item.score for item in backend.student_as_teacher().score(found)]
    assert all(isinstance(score, SampledScore) for score in scored)
    return [replace(r, rollout_logprobs=s.logprobs) for r, s in zip(found, scored, strict=True)]  # type: ignore[union-attr]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_log_ratio_is_zero(tmp_path: Path, tokenizer: str, ends: str):
    backend = backend_of(tmp_path, tokenizer, ends, {"type": "immediate"})
    found = backend.teachers(keep_hidden=False).score(rollouts(backend))
    for item in found:
        score = item.score
        assert isinstance(score, ChunkScore), score
        inside = score.chunks >= 0
        ratios = np.bincount(score.chunks[inside], weights=(score.logprobs - item.rollout.rollout_logprobs)[inside])
        assert np.abs(ratios).max() < 1e-4, (item.rollout.response, ratios)
    assert sum(int((s.score.chunks >= 0).sum()) for s in found if isinstance(s.score, ChunkScore)) > 500


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_no_objective_moves_the_student(tmp_path: Path, objective: dict[str, Any], ends: str):
    backend = backend_of(tmp_path, "byte-level BPE", ends, objective)
    scored = backend.teachers(keep_hidden=backend.config.objective.needs_distributions).score(rollouts(backend))
    batch, _ = pack(scored, logprob_floor=backend.config.objective.teacher_logprob_floor)
    batch, _ = compute_advantages(backend.config, batch)
    learner = backend.learner()
    found = values(learner.forward_backward(batch))
    assert abs(found["kl/token/mean"]) < 1e-6
    assert found["kl/token/even/mean"] == found["kl/token/mean"]
    assert values(learner.optim_step())["optim/grad_norm/mean"] < 1e-5


@pytest.mark.parametrize("tokenizer", ["bytes", "byte-level BPE", "SentencePiece"])
def test_a_tokenizer_that_gives_two_tokens_one_id_is_refused(tokenizer: str):
    """Added tokens that a renumbered vocabulary lacks take ids that others have."""
    plain = TOKENIZERS[tokenizer]()
    broken = renumbered(plain, np.random.default_rng(1).permutation(len(plain)), added=False)
    with pytest.raises(ModelError, match=r"gives id \d+ to '.+' and to '.+'; .*tokenizer.json"):
        token_bytes(broken)


def test_a_letter_written_as_its_byte_token_is_not_canonical():
    """The tokenizer has a token for the letter, which ends at the same byte."""
    tokenizer = toy("sentencepiece, no prefix")
    writer = StudentSide(tokenizer)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "7x7"]
    spelled = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"7x7"]
    assert writer.encode("7x7") == letters
    for odd in ([0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]):
        ids = np.where(odd, spelled, letters)
        assert writer.strange(ids, {}).tolist() == [bool(each) for each in odd]
