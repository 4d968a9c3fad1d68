"""Coverage-guided fuzzing of the alignment: any bytes, read as tokens of one tokenizer by another one.

    make fuzz SECONDS=600

The first bytes of an input choose the two tokenizers and how the rest becomes tokens: a text that the student's tokenizer
encodes, bytes one by one (mostly no UTF-8), or ids, some beyond the vocabulary. Every response must keep the laws of
`check_response`; what breaks one is written to a file named crash-..., with which the program can be called again.
"""

import importlib
import itertools
import sys
from functools import cache
from pathlib import Path

import atheris
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))
sys.path.insert(0, str(Path(__file__).parents[1] / "turns"))
with atheris.instrument_imports(include=["opd.text"]):
    importlib.import_module("opd.text.alignment")  # what `check_response` calls
    from opd.text.student_text import StudentSide
    from opd.text.teacher_text import TeacherSide

from pairs import check_response  # behind the instrumented imports
from zoo import TOYS, real, toy

PAIRS = (
    *itertools.permutations(TOYS, 2),
    *[("smollm2", "qwen2_5"), ("qwen2_5", "smollm2"), ("mistral_v3", "qwen2_5"), ("smollm2", "llama2")],
)


def tokenizer(name: str):
    return toy(name) if name in TOYS else real(name)


@cache
def student_side(name: str) -> StudentSide:
    return StudentSide(tokenizer(name))


@cache
def teacher_side(student: str, teacher: str) -> TeacherSide:
    """One a pair: a reader remembers what it has in common with the last student alone."""
    return TeacherSide(tokenizer(teacher), name=teacher)


@cache
def id_of_byte(name: str) -> dict[int, int]:
    table = student_side(name).table
    return {table.of(i)[0]: i for i in np.flatnonzero(table.lengths(np.arange(len(table))) == 1).tolist()}


def tokens(kind: int, content: bytes, student: str) -> list[int]:
    mine = student_side(student)
    if kind == 0:
        return mine.encode(content.decode(errors="ignore"))
    if kind == 1:
        return [id_of_byte(student)[b] for b in content if b in id_of_byte(student)]
    return [int.from_bytes(content[k : k + 3]) % (len(mine.table) + 5) for k in range(0, len(content), 3)]


def one_input(raw: bytes) -> None:
    if len(raw) < 3:
        return
    student, teacher = PAIRS[raw[0] % len(PAIRS)]
    ids = [i for i in tokens(raw[1] % 3, raw[3:], student) if i not in student_side(student).end_ids]
    check_response(ids, student_side(student), teacher_side(student, teacher), ended=bool(raw[2] % 2))


def main() -> None:
    for student, teacher in PAIRS:
        teacher_side(student, teacher).counterparts(student_side(student).table)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
