"""How a teacher with another tokenizer reads a turn: what its normaliser, its tags and its chat template change."""

import pytest
from factories import CHATML
from test_tokenizer_pairs import rollout_of
from zoo import real, toy, toy_bpe, toy_wordpiece

from opd.errors import DataError, ModelError
from opd.text.alignment import pair_turns
from opd.text.student_text import Masked, Writer
from opd.text.teacher_text import Reader


def test_a_lossy_normaliser_masks_what_it_changes_and_counts_it():
    """T10: a teacher that composes characters, one that lower-cases."""
    writer, reader = Writer(real("smollm2")), Reader(real("qwen2_5"), name="t")  # Qwen composes (NFC)
    text = "plain cafe\u0301 and then more plain text"
    [turn] = pair_turns(rollout_of(writer.encode(text), writer, text=text), writer, reader)
    reasons = set(turn.pairing.masked.tolist()) - {0}
    assert reasons == {int(Masked.LOSSY)}
    assert turn.pairing.kept_sizes.sum() == len(text.encode()) - len(" cafe\u0301".encode())
    lower = Reader(toy_wordpiece(), name="t")
    bytes_ = Writer(toy("bytes"))
    [turn] = pair_turns(rollout_of(bytes_.encode("the Cat sat"), bytes_, text=""), bytes_, lower)
    assert (turn.pairing.masked == Masked.LOSSY).any()
    assert turn.pairing.kept_sizes.sum() > 0


def test_a_token_across_the_boundary_is_masked_and_counted():
    """T6: the newline of the generation prompt and those of the response become one token of the teacher's."""
    writer, reader = Writer(real("smollm2")), Reader(real("qwen2_5"), name="t")
    text = "\n\nHello there"
    [turn] = pair_turns(rollout_of(writer.encode(text), writer, text=text), writer, reader)
    assert (turn.reading.masked == Masked.STRADDLE).sum() == 1
    assert turn.pairing.masked[0] == Masked.STRADDLE
    assert turn.pairing.masked[-3:].tolist() == [0, 0, 0]


def test_thinking_tags_are_mapped_by_role():
    """T4: a control token here, another spelling there."""
    ours, theirs = toy_bpe(300), toy_bpe(330)
    ours.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    theirs.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    writer, reader = Writer(ours), Reader(theirs, name="t")
    tag, close = ours.convert_tokens_to_ids(["<think>", "</think>"])
    ids = [tag, *writer.encode("hm"), close, *writer.encode("yes")]
    [turn] = pair_turns(rollout_of(ids, writer, text=""), writer, reader)
    assert turn.spelling.text == "[THINK]hm[/THINK]yes"
    assert not turn.pairing.masked.any()
    assert turn.canonical
    read = turn.reading.token_ids[turn.reading.first :].tolist()
    assert [i for i in read if theirs.convert_ids_to_tokens(i).endswith("THINK]")] == theirs.convert_tokens_to_ids(
        ["[THINK]", "[/THINK]"]
    )


def test_a_template_that_puts_a_space_before_an_answer():
    """The teacher always writes it, so it is a part of the first chunk rather than missing from the prompt."""
    spaced = CHATML.replace("'\n' + m['content']", "'\n' + (' ' if m['role'] == 'assistant' else '') + m['content']")
    assert spaced != CHATML
    writer, reader = Writer(toy("bytes")), Reader(toy_bpe(340, template=spaced), name="t")
    [turn] = pair_turns(rollout_of(writer.encode("the cat"), writer, text=""), writer, reader)
    pieces = [reader.table.of(int(i)) for i in turn.reading.token_ids[turn.reading.first :]]
    assert b"".join(pieces) == b" the cat"
    assert not turn.pairing.masked.any()
    assert turn.pairing.kept_sizes.sum() == len("the cat")


def test_a_generation_prompt_that_opens_thinking_is_not_doubled():
    opening = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert opening != CHATML
    theirs = toy_bpe(345, template=opening)
    writer, reader = Writer(toy("bytes")), Reader(theirs, name="t")
    [turn] = pair_turns(rollout_of(writer.encode("<think>hm</think>yes"), writer, text=""), writer, reader)
    assert theirs.decode(turn.reading.token_ids).count("<think>") == 1
    assert not turn.pairing.masked.any()


def test_templates_that_do_not_open_the_turn_are_refused():
    closed = toy_bpe(
        310, template=CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
    )
    with pytest.raises(ModelError, match="teacher 't': its chat template has no generation prompt"):
        Reader(closed, name="t")
    mute = toy_bpe(310, template="{{ messages[0]['content'] }}")
    with pytest.raises(ModelError, match="does not show an assistant's answer"):
        Reader(mute, name="t")
    strict = toy_bpe(
        310, template=CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(DataError, match="its chat template refuses the conversation: no system"):
        Reader(strict, name="t").render([{"role": "system", "content": "x"}])
