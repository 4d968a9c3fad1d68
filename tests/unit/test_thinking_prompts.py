"""A generation prompt that opens a thinking block, or writes an empty one, opens the assistant's turn as well."""

from dataclasses import replace

import pytest
from factories import prompt, rollout
from templated import templated
from zoo import toy_bpe

from opd.errors import ModelError
from opd.text.alignment import pair_turns
from opd.text.student_text import StudentSide
from opd.text.teacher_text import TeacherSide

HEAD = "<|im_start|>{{ m.role }}\n"
SHOWN = {
    # how a template shows an answer, and what it writes as a generation prompt
    "open, history without": ("{{ m.content }}", "<think>\n"),
    "open, history with an empty block": (
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
        "<think>\n",
    ),
    "open, history with an empty block on lines": (
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        "<think>\n",
    ),
    "empty block, history without": ("{{ m.content }}", "<think>\n\n</think>\n\n"),
    "empty block, history with another": (
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
        "<think>\n\n</think>\n\n",
    ),
    "plain, history with an empty block": (
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
        "",
    ),
    "history drops what was thought": ("{{ m.content.split('</think>')[-1] }}", "<think>\n"),
    "another tag": (
        "{% if m.role == 'assistant' %}[THINK][/THINK]{% endif %}{{ m.content }}",
        "[THINK]",
    ),
    "a tag in words": (
        "{% if m.role == 'assistant' %}<|START_THINKING|><|END_THINKING|>{% endif %}{{ m.content }}",
        "<|START_THINKING|>",
    ),
}


def thinking(name: str) -> str:
    shown, opened = SHOWN[name]
    opens = "{% if add_generation_prompt %}<|im_start|>assistant\n" + opened + "{% endif %}"
    return "{% for m in messages %}" + HEAD + shown + "<|im_end|>\n{% endfor %}" + opens


def read(teacher_side: TeacherSide, student: str, said: str) -> tuple[str, str]:
    """The prompt and the response as the teacher reads them."""
    student_side = StudentSide(templated(student))
    ids = [256, *student_side.encode(said), student_side.end_id]
    item = rollout(ids, 1, prompt=prompt(text="hi"))
    item = replace(item, messages=(*item.prompt.messages, {"role": "assistant", "content": said}))
    [turn] = pair_turns(item, student_side, teacher_side)
    assert int((turn.pairing.chunk_ids >= 0).sum()) > 0
    cut = turn.teacher_text.first
    ids = turn.teacher_text.token_ids
    before, response = (teacher_side.table.join(part).tobytes().decode() for part in (ids[:cut], ids[cut:]))
    return before, response


OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + OPENED


@pytest.mark.parametrize("name", SHOWN)
def test_a_teacher_whose_prompts_differ_only_in_the_thinking_block_reads_behind_its_generation_prompt(name: str):
    teacher_side = TeacherSide(toy_bpe(300, template=thinking(name)), name="t")
    before, said = read(teacher_side, PLAIN, "an answer")
    assert before == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + SHOWN[name][1]
    assert said == "an answer"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}" + HEAD + "<think></think>{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<think>\n{% endif %}",
        thinking("open, history with an empty block").replace("assistant\n<think>", "tool\n<think>"),
    ],
    ids=["none at all", "a block alone", "another role"],
)  # fmt: skip
def test_a_template_that_does_not_open_the_turn_is_still_refused(template: str):
    with pytest.raises(ModelError, match="its chat template has no generation prompt"):
        TeacherSide(toy_bpe(300, template=template), name="t")


def test_a_thought_that_the_students_prompt_opens_is_a_thought_for_its_teacher():
    student = thinking("open, history without")
    plain = TeacherSide(toy_bpe(300, template=PLAIN), name="t")
    assert read(plain, student, "so</think>yes")[0].endswith("assistant\n<think>\n")
    thinks = TeacherSide(toy_bpe(300, template=student), name="t")
    assert read(thinks, student, "so</think>yes")[0].endswith("assistant\n<think>\n")
    assert read(thinks, PLAIN, "<think>so</think>yes")[0].endswith("assistant\n")
    assert read(plain, student, "<think>so</think>yes")[0].endswith("assistant\n")
