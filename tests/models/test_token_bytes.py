"""The bytes that every token stands for, against what the tokenizers themselves decode."""

import numpy as np
import pytest
from factories import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from zoo import REAL, TOYS, real, toy, toy_wordpiece

from opd.errors import ModelError
from opd.text.tokenizer import encode_text, token_bytes

TEXT = 'The 3 cats: naïve café,\n\tdef f(x): return x**2  # 漢字 🙂👩‍👩‍👧 12345 {"a": [1]}  \n\n'


@pytest.mark.parametrize("name", REAL)
def test_a_published_tokenizers_tokens_spell_the_text(name: str):
    table = token_bytes(real(name))
    ids = np.array(encode_text(real(name), TEXT, parse_special=False))
    spelled = table.join(ids).tobytes()
    assert spelled == (" " if table.dummy_prefix else "").encode() + TEXT.encode()


@pytest.mark.parametrize("name", REAL)
def test_every_id_of_a_published_tokenizer_decodes_to_its_bytes(name: str):
    """Token by token against the tokenizer's own decoder, wherever that one can show a token's bytes by themselves."""
    tokenizer = real(name)
    table = token_bytes(tokenizer)
    compared = 0
    for index in range(0, len(table), 7):
        own = table.of(index)
        if table.control[index] or table.unknown[index]:
            continue
        shown = tokenizer.backend_tokenizer.decode([index], skip_special_tokens=False)
        if "\ufffd" in shown and "\ufffd".encode() not in own:  # part of a character
            with pytest.raises(UnicodeDecodeError):
                own.decode()
            continue
        assert (own[1:] if table.dummy_prefix and own.startswith(b" ") else own) == shown.encode(), (index, own, shown)
        compared += 1
    assert compared > 3000


@pytest.mark.parametrize("name", TOYS)
@settings(max_examples=60)
@given(st.text(max_size=40).filter(lambda t: "\u2581" not in t))
def test_a_toys_tokens_spell_any_text(name: str, text: str):
    table = token_bytes(toy(name))
    ids = np.array(encode_text(toy(name), text, parse_special=False), dtype=np.int64)
    expected = (" " if table.dummy_prefix and text else "") + text
    assert table.join(ids).tobytes() == expected.encode()


def test_control_tokens_padding_and_names():
    table = token_bytes(byte_tokenizer(), vocab_size=300)
    assert len(table) == 300
    assert dict(table.names) == {256: "<|im_start|>", 257: "<|im_end|>"}
    assert table.control[[256, 257]].all()
    assert not table.control[:256].any()
    assert table.unknown[258:].all()
    assert not table.unknown[:258].any()
    assert table.of(299) == b""
    assert table.of(1_000_000) == b""
    assert table.lengths(np.array([0, 257, 299, 1000])).tolist() == [1, 10, 0, 0]


def test_join_is_the_tokens_one_after_the_other():
    table = token_bytes(toy("bpe400"), vocab_size=500)
    ids = np.random.default_rng(0).integers(0, 520, 200)
    assert table.join(ids).tobytes() == b"".join(table.of(int(i)) for i in ids)
    assert table.join(np.zeros(0, dtype=np.int64)).tobytes() == b""


def test_families_are_told_from_the_decoder():
    found = {name: token_bytes(toy(name)).family for name in TOYS}
    assert found == {
        "bytes": "byte_level", "bpe300": "byte_level", "bpe400": "byte_level",
        "sentencepiece": "sentencepiece", "sentencepiece, no prefix": "sentencepiece",
    }  # fmt: skip
    assert token_bytes(toy("sentencepiece")).dummy_prefix
    assert not token_bytes(toy("sentencepiece, no prefix")).dummy_prefix
    words = token_bytes(toy_wordpiece())
    assert words.family == "wordpiece"
    assert words.dummy_prefix


def test_a_tokenizer_that_does_not_say_how_it_writes_is_refused():
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="decodes with nothing: expected ByteLevel"):
        token_bytes(odd)

    class Slow:
        pass

    with pytest.raises(ModelError, match="no fast implementation"):
        token_bytes(Slow())
