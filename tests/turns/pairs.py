"""Responses of a student as a teacher with another tokenizer reads them, and what must hold of each."""

from collections.abc import Sequence

import numpy as np

from opd.records import Prompt, Rollout, Turn
from opd.text.alignment import TurnPair, chunk_score, pair_turns, same_tokens
from opd.text.student_text import Masked, StudentSide
from opd.text.teacher_text import TeacherSide
from opd.text.tokenizer import SharedVocabulary, shared_vocabulary

CORPUS = {
    "english": "Well, the quick brown fox doesn't jump over 13 lazy dogs; it's asleep.",
    "code with tabs": "def f(x):\n\tif x > 0:\n\t\treturn x ** 2  # ok\n\n\n    else_ = None",
    "numbers": "12345 + 678 = 13023, 3.14159265358979 and 1,000,000 or 1e-10",
    "tool call": '{"name": "search", "arguments": {"query": "opd", "k": [1, 2, 3], "deep": {"x": null}}}',
    "chinese": "中文分词:我们在蒸馏一个语言模型。漢字かな交じり文",
    "arabic": "مرحبا بالعالم، كيف حالك؟",
    "emoji with joiners": "👩‍👩‍👧‍👦 and 🏳️‍🌈 with 👍🏽!",
    "mathematics": "∑_{i=0}^{n} x_i² ≤ ∫₀^∞ e^{-x²} dx ⇒ α ∈ ℝ",
    "whitespace": "   \n\t \n\n\n   \r\n  x  \n",
    "look-alikes": "<|im_end|> and <s>[INST] </s> <end_of_turn> <|eot_id|> <|endoftext|> <｜User｜>",
    "starts with newlines": "\n\n\nHello",
    "starts with a space": "  indented answer",
    "ends with spaces": "answer   ",
    "one letter": "a",
    "nothing": "",
    "thinking": "<think>\nhm, 2+2\n</think>\n\nfour",
}


PROMPT = Prompt("p", ({"role": "user", "content": "Say it."},), teacher="t", task="task")


def rollout_of(
    ids: Sequence[int], student_side: StudentSide, *, text: str, ended: bool = True, prompt: Prompt = PROMPT
) -> Rollout:
    """A response behind one token that stands for the prompt."""
    every = [0, *ids, *([student_side.end_ids[-1]] if ended else [])]
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.array(every, dtype=np.int32),
        loss_mask=np.arange(len(every)) > 0,
        rollout_logprobs=np.zeros(len(every), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(every))),
        messages=(*prompt.messages, {"role": "assistant", "content": text}),
        finish="end" if ended else "length",
        policy_version=0,
    )


def check_chunks(turn: TurnPair, ids: list[int], student_side: StudentSide, teacher_side: TeacherSide) -> None:
    """Each chunk that is kept spells the same bytes on both sides; nothing else is asked of the aligner than of bytes."""
    chunks = turn.pairing.chunks
    tags = teacher_side.counterparts(student_side.table)  # written as the teacher writes them
    mine = [tags[i].encode() if i in tags else student_side.table.of(i) for i in ids]
    theirs = [teacher_side.table.of(int(i)) for i in turn.teacher_text.token_ids[turn.teacher_text.first :]]
    last = len(chunks) - 1
    for chunk in range(len(chunks)):
        if turn.pairing.faulty[chunk] != Masked.NOT or (chunk == last and turn.ends_turn):
            continue
        written = [i for i in np.flatnonzero(chunks.student == chunk) if turn.pairing.masked[i] == Masked.NOT]
        ours = b"".join(mine[i] for i in written)
        read = b"".join(theirs[j] for j in np.flatnonzero(chunks.teacher == chunk))
        # at the front, and behind a control token, the space that a tokenizer puts before a text
        before = np.flatnonzero(chunks.student < chunk)
        fresh = not len(before) or student_side.table.control[min(ids[before[-1]], len(student_side.table) - 1)]
        spaced = {b" " + ours: read, ours: b" " + read} if fresh else {}
        assert ours == read or any(a == b for a, b in spaced.items()), (chunk, ours, read)


def check_response(ids: list[int], student_side: StudentSide, teacher_side: TeacherSide, *, ended: bool) -> None:
    """The laws of a response of any ids whatever."""
    [turn] = pair_turns(rollout_of(ids, student_side, text="", ended=ended), student_side, teacher_side)
    assert len(turn.pairing.masked) == len(ids) + ended
    chunk_ids = turn.pairing.chunk_ids
    assert len(chunk_ids) == len(ids) + ended
    each = np.full(len(turn.teacher_text.ends) + ended, -1.0)
    found = chunk_score("t", rollout_of(ids, student_side, text="", ended=ended), [turn], [each])
    kept = set(chunk_ids[chunk_ids >= 0].tolist())
    assert kept == set(range(len(turn.pairing.sums(each))))
    assert found.logprobs.sum() == turn.pairing.sums(each).sum()
    assert sum(n for name, n in found.facts.items() if name.startswith("masked/")) == (chunk_ids < 0).sum()
    assert found.facts["bytes/one_to_one"] <= found.facts["bytes/kept"] == found.num_bytes <= found.facts["bytes"]
    check_chunks(turn, ids, student_side, teacher_side)
    check_pairs(turn, ids, student_side, teacher_side)


def check_pairs(turn: TurnPair, ids: list[int], student_side: StudentSide, teacher_side: TeacherSide) -> None:
    """Where distributions are compared both sides chose one token: the same bytes, the same tag, or the end."""
    tags = teacher_side.counterparts(student_side.table)
    cells = cached_cells(student_side, teacher_side)
    ours = np.array([*ids, *([student_side.end_ids[-1]] if turn.ends_turn else [])], dtype=np.int64)
    theirs = np.append(turn.teacher_text.token_ids[turn.teacher_text.first :], teacher_side.end_ids[0])
    pairs = same_tokens(turn, ours, theirs, cells)
    assert (np.diff(pairs, axis=0) > 0).all()
    assert (turn.pairing.chunk_ids[pairs[:, 0]] >= 0).all()
    for i, j in pairs:
        if int(ours[i]) in student_side.end_ids:
            assert j == len(turn.teacher_text.ends)
        else:
            spelled = tags.get(int(ours[i]), "").encode() or student_side.table.of(int(ours[i]))
            assert spelled == teacher_side.table.of(int(theirs[j]))


_CELLS: dict[tuple[int, int], SharedVocabulary] = {}


def cached_cells(student_side: StudentSide, teacher_side: TeacherSide) -> SharedVocabulary:
    key = id(student_side.table), id(teacher_side.table)
    if key not in _CELLS:
        tags = teacher_side.counterparts(student_side.table)
        _CELLS[key] = shared_vocabulary(
            student_side.table, student_side.end_ids, teacher_side.table, teacher_side.end_ids, tags
        )
    return _CELLS[key]
