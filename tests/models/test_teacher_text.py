"""How a teacher with another tokenizer reads a turn: what its normaliser, its tags and its chat template change."""

import pytest
from factories import CHATML
from pairs import rollout_of
from zoo import real, toy, toy_bpe, toy_wordpiece

from opd.errors import DataError, ModelError
from opd.text.alignment import pair_turns
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide


def test_a_lossy_normaliser_masks_what_it_changes_and_counts_it():
    """T10: a teacher that composes characters, one that lower-cases."""
    student_side, teacher_side = (
        StudentSide(real("smollm2")),
        TeacherSide(real("qwen2_5"), name="t"),
    )  # Qwen composes (NFC)
    text = "plain cafe\u0301 and then more plain text"
    [turn] = pair_turns(rollout_of(student_side.encode(text), student_side, text=text), student_side, teacher_side)
    reasons = set(turn.pairing.masked.tolist()) - {0}
    assert reasons == {int(Masked.LOSSY)}
    assert turn.pairing.kept_sizes.sum() == len(text.encode()) - len(" cafe\u0301".encode())
    lower = TeacherSide(toy_wordpiece(), name="t")
    bytes_ = StudentSide(toy("bytes"))
    [turn] = pair_turns(rollout_of(bytes_.encode("the Cat sat"), bytes_, text=""), bytes_, lower)
    assert (turn.pairing.masked == Masked.LOSSY).any()
    assert turn.pairing.kept_sizes.sum() > 0


def test_a_token_across_the_boundary_is_masked_and_counted():
    """T6: the newline of the generation prompt and those of the response become one token of the teacher's."""
    student_side, teacher_side = StudentSide(real("smollm2")), TeacherSide(real("qwen2_5"), name="t")
    text = "\n\nHello there"
    [turn] = pair_turns(rollout_of(student_side.encode(text), student_side, text=text), student_side, teacher_side)
    assert (turn.teacher_text.masked == Masked.STRADDLE).sum() == 1
    assert turn.pairing.masked[0] == Masked.STRADDLE
    assert turn.pairing.masked[-3:].tolist() == [0, 0, 0]


def test_thinking_tags_are_mapped_by_role():
    """T4: a control token here, another spelling there."""
    ours, theirs = toy_bpe(300), toy_bpe(330)
    ours.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    theirs.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    student_side, teacher_side = StudentSide(ours), TeacherSide(theirs, name="t")
    tag, close = ours.convert_tokens_to_ids(["<think>", "</think>"])
    ids = [tag, *student_side.encode("hm"), close, *student_side.encode("yes")]
    [turn] = pair_turns(rollout_of(ids, student_side, text=""), student_side, teacher_side)
    assert turn.student_text.text == "[THINK]hm[/THINK]yes"
    assert not turn.pairing.masked.any()
    assert turn.canonical
    read = turn.teacher_text.token_ids[turn.teacher_text.first :].tolist()
    assert [i for i in read if theirs.convert_ids_to_tokens(i).endswith("THINK]")] == theirs.convert_tokens_to_ids(
        ["[THINK]", "[/THINK]"]
    )


def test_a_template_that_puts_a_space_before_an_answer():
    """The teacher always writes it, so it is a part of the first chunk rather than missing from the prompt."""
    spaced = CHATML.replace("'\n' + m['content']", "'\n' + (' ' if m['role'] == 'assistant' else '') + m['content']")
    assert spaced != CHATML
    student_side, teacher_side = StudentSide(toy("bytes")), TeacherSide(toy_bpe(340, template=spaced), name="t")
    [turn] = pair_turns(rollout_of(student_side.encode("the cat"), student_side, text=""), student_side, teacher_side)
    pieces = [teacher_side.table.of(int(i)) for i in turn.teacher_text.token_ids[turn.teacher_text.first :]]
    assert b"".join(pieces) == b" the cat"
    assert not turn.pairing.masked.any()
    assert turn.pairing.kept_sizes.sum() == len("the cat")


def test_a_generation_prompt_that_opens_thinking_is_not_doubled():
    opening = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert opening != CHATML
    theirs = toy_bpe(345, template=opening)
    student_side, teacher_side = StudentSide(toy("bytes")), TeacherSide(theirs, name="t")
    [turn] = pair_turns(
        rollout_of(student_side.encode("<think>hm</think>yes"), student_side, text=""), student_side, teacher_side
    )
    assert theirs.decode(turn.teacher_text.token_ids).count("<think>") == 1
    assert not turn.pairing.masked.any()


def test_templates_that_do_not_open_the_turn_are_refused():
    closed = toy_bpe(
        310, template=CHATML.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
    )
    with pytest.raises(ModelError, match="teacher 't': its chat template has no generation prompt"):
        TeacherSide(closed, name="t")
    mute = toy_bpe(310, template="{{ messages[0]['content'] }}")
    with pytest.raises(ModelError, match="does not show an assistant's answer"):
        TeacherSide(mute, name="t")
    strict = toy_bpe(
        310, template=CHATML + "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(DataError, match="its chat template refuses the conversation: no system"):
        TeacherSide(strict, name="t").render([{"role": "system", "content": "x"}])
