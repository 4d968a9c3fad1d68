"""Chat templates and what tells two tokenizers apart."""

from types import SimpleNamespace
from typing import Any

import pytest
from factories import byte_tokenizer, prompt, save_toy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.errors import DataError
from opd.records import Prompt
from opd.text.chat import Chat, user_message
from opd.text.tokenizer import difference, end_token_ids, fingerprint


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without special tokens or chat template."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def alphabet() -> dict[str, int]:
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


# --- chat ---


def test_a_prompt_is_written_in_the_chat_template_with_the_generation_prompt():
    tokenizer = byte_tokenizer()
    ids = Chat(tokenizer).encode_prompt(prompt(text="hé"))
    assert tokenizer.decode(ids) == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    # The markers are one token each, not their letters.
    assert ids.count(256) == 2
    assert ids.count(257) == 1
    assert all(isinstance(i, int) for i in ids)


def test_every_message_of_a_conversation_is_in_the_prompt_in_order():
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    ids = Chat(byte_tokenizer()).encode_prompt(Prompt("p", messages, teacher="t", task="task"))
    assert byte_tokenizer().decode(ids) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_chat_template_the_texts_are_joined_by_blank_lines():
    tokenizer = byte_level(alphabet())
    assert not tokenizer.chat_template
    messages = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    ids = Chat(tokenizer).encode_prompt(Prompt("p", messages, teacher="t", task="task"))
    assert tokenizer.decode(ids) == "be brief\n\nhi"


def test_a_prompt_without_tokens_is_named():
    with pytest.raises(DataError, match="prompt 'p7': no tokens after tokenization"):
        Chat(byte_level(alphabet())).encode_prompt(prompt("p7", text=""))


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂", " spaced  out , here .", "a\n\n\tb", "don 't"])
def test_decoding_undoes_encoding_and_leaves_out_the_end_token(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert Chat(tokenizer).decode([*ids, tokenizer.eos_token_id]) == text


def test_a_response_cut_within_a_character_still_decodes():
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé", add_special_tokens=False).input_ids
    assert Chat(tokenizer).decode(ids[:-1]) == "a\ufffd"


def test_a_user_message_is_a_conversation_of_one():
    assert user_message("hi") == ({"role": "user", "content": "hi"},)


# --- end tokens ---


@pytest.mark.parametrize(
    ("declared", "expected"), [(None, (257,)), (3, (3, 257)), ([5, 257, 4], (4, 5, 257)), ((1,), (1, 257))]
)
def test_end_ids_are_those_of_the_tokenizer_and_of_the_generation_config(declared, expected):
    config = SimpleNamespace(eos_token_id=declared)
    assert end_token_ids(byte_tokenizer(), config) == expected


def test_end_ids_without_a_generation_config_are_the_tokenizers_own():
    assert end_token_ids(byte_tokenizer()) == (257,)
    assert end_token_ids(byte_level(alphabet())) == ()
    assert end_token_ids(byte_level(alphabet()), SimpleNamespace(eos_token_id=0)) == (0,)


# --- difference ---


def swapped(a: str, b: str) -> PreTrainedTokenizerFast:
    vocab = alphabet()
    vocab[a], vocab[b] = vocab[b], vocab[a]
    return byte_level(vocab)


def test_copies_of_a_tokenizer_do_not_differ(tmp_path):
    ours = byte_tokenizer()
    ours.save_pretrained(tmp_path)
    loaded: Any = AutoTokenizer.from_pretrained(tmp_path)
    for copy in (byte_tokenizer(), loaded):
        assert difference(ours, copy) is None
        assert fingerprint(ours) == fingerprint(copy)


def test_models_whose_vocabularies_are_padded_differently_share_a_tokenizer(tmp_path):
    plain = AutoTokenizer.from_pretrained(save_toy(tmp_path / "a", vocab_size=258))
    padded = AutoTokenizer.from_pretrained(save_toy(tmp_path / "b", vocab_size=320))
    assert difference(plain, padded) is None


def test_a_token_under_another_id_is_named():
    ours, theirs = byte_level(alphabet()), swapped("A", "B")
    first = alphabet()["A"]
    message = difference(ours, theirs)
    assert message == (
        f"256 tokens against 256, 2 of the student's under another id or absent; first: id {first} is 'A' for the student and "
        f"'B' for the teacher"
    )
    assert fingerprint(ours) != fingerprint(theirs)


def test_a_token_that_only_the_teacher_has_is_named():
    message = difference(byte_level(alphabet()), byte_level(alphabet() | {"zz": 256}))
    assert message == (
        "256 tokens against 257, 0 of the student's under another id or absent; first: id 256 is 'zz' for the teacher and "
        "absent for the student"
    )


def test_a_token_that_only_the_student_has_is_named():
    message = difference(byte_level(alphabet() | {"zz": 256}), byte_level(alphabet()))
    assert message == (
        "257 tokens against 256, 1 of the student's under another id or absent; first: id 256 is 'zz' for the student and "
        "absent for the teacher"
    )


def test_one_vocabulary_with_other_merges_is_told_apart():
    vocab = alphabet() | {"de": 256}
    plain, merging = byte_level(vocab), byte_level(vocab, [("d", "e")])
    message = difference(plain, merging)
    assert message is not None
    assert "cut differently" in message
    assert fingerprint(plain) != fingerprint(merging)
