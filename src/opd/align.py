"""`opd align`: compares a student's and a teacher's tokens of the same text, before any training."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from opd.errors import DataError
from opd.logging.run_folder import read_rollouts
from opd.models.loading import load_tokenizer
from opd.records import Prompt, Rollout, Turn
from opd.text.alignment import Side, describe, pair_turns, shares, sides, total, turn_facts
from opd.text.student_text import StudentSide
from opd.text.teacher_prompt import Renderings, different_renderings
from opd.text.teacher_text import TeacherSide
from opd.text.template import freeze
from opd.text.tokenizer import difference

SAMPLE = (
    'Let\'s see: 12345 + 678 = 13023.\n\n\tdef f(x):\n\t\treturn {"naïve": x ** 2}  # 漢字 🙂\n\n'
    "سلام — so the answer is \\boxed{13023}.\n"
)
_COLOURS = ("black on bright_cyan", "black on bright_green")


@dataclass(frozen=True)
class Comparison:
    """difference: how the tokenizers differ, None where they are equal; responses: the chunks of each; facts: counts over all;
    failures: why the teacher could not read a response; renderings: a short conversation in both chat templates, None where they
    are equal; ends: how a model's template, tokenizer and generation config disagree on where a turn ends."""

    student: str
    teacher: str
    difference: str | None
    responses: tuple[tuple[Side, ...], ...]
    facts: dict[str, int]
    failures: tuple[str, ...]
    renderings: Renderings | None = None
    ends: tuple[str, ...] = ()


def compare(student: str, teacher: str, rollouts: Sequence[Rollout] | str = SAMPLE) -> Comparison:
    """Line up rollouts, or one text as the student would write it, with the teacher's reading of them."""
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    now = datetime.now()
    for loaded in (ours, theirs):
        freeze(loaded.tokenizer, now)
    student_side = StudentSide(ours.tokenizer, generation_config=ours.generation_config)
    teacher_side = TeacherSide(theirs.tokenizer, name=teacher, generation_config=theirs.generation_config)
    items = [_as_rollout(rollouts, student_side)] if isinstance(rollouts, str) else list(rollouts)
    responses, facts, failures = [], [], []
    for item in items:
        try:
            turns = pair_turns(item, student_side, teacher_side)
        except DataError as error:
            failures.append(f"rollout '{item.id}': {error}")
            continue
        for turn in turns:
            responses.append(
                tuple(sides(turn, item.token_ids[turn.start : turn.stop].tolist(), student_side, teacher_side))
            )
            facts.append(turn_facts(turn, np.zeros(len(turn.teacher_text.ends) + turn.ends_turn)))
    gap = difference(ours.tokenizer, theirs.tokenizer)
    apart = different_renderings(ours.tokenizer, theirs.tokenizer)
    ends = [
        f"where a turn of '{who}' ends: {end.note}"
        for who, end in ((student, student_side.end), (teacher, teacher_side.end))
        if end.note
    ]
    return Comparison(student, teacher, gap, tuple(responses), total(facts), tuple(failures), apart, tuple(ends))


def rollouts_of(run: Path) -> list[Rollout]:
    found = [scored.rollout for scored in read_rollouts(run)]
    if not found:
        raise DataError(f"run '{run}' holds no rollouts yet")
    return found


def read_text(path: Path) -> str:
    """A text file, line ends as they are. Raises DataError where there is none, or it is no UTF-8."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is no UTF-8 at byte {error.start}; a response to compare is text") from None


def show(found: Comparison, console: Console, *, limit: int = 4) -> None:
    """The first responses side by side, chunks in alternating colours, masked tokens in red with the reason; then the report."""
    for response in found.responses[:limit]:
        for name, attribute in (("student", "student"), ("teacher", "teacher")):
            line = Text(f"{name}  ", style="bold")
            for k, side in enumerate(response):
                style = "white on red" if side.masked else _COLOURS[k % 2]
                line.append("|".join(_shown(piece) for piece in getattr(side, attribute)), style=style)
                line.append(" ")
            console.print(line, soft_wrap=True)
        masked = [f"{' '.join(map(_shown, s.student))!s}: {s.masked}" for s in response if s.masked]
        if masked:
            console.print("masked   " + ", ".join(masked), style="red", markup=False, highlight=False, soft_wrap=True)
        console.print()
    hidden = len(found.responses) - limit
    if hidden > 0:
        console.print(f"({hidden} more responses are counted below)", highlight=False)
    for line in _report(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_plain(found: Comparison) -> dict[str, Any]:
    """The comparison as plain data; bytes that are no UTF-8 are escaped."""

    def plain(side: Side) -> dict[str, Any]:
        texts = {k: [p.decode(errors="backslashreplace") for p in getattr(side, k)] for k in ("student", "teacher")}
        return texts | {"masked": side.masked}

    figures = {k: None if v != v else v for k, v in shares(found.facts).items()}
    return asdict(found) | {"responses": [[plain(s) for s in r] for r in found.responses], "shares": figures}


def _report(found: Comparison) -> Iterator[str]:
    if found.difference is None and found.renderings is None:
        yield "one tokenizer: every token is scored by itself"
    elif found.difference is None:
        yield "one tokenizer, two chat templates: every token is scored by itself, behind the teacher's own prompt"
    else:
        yield f"two tokenizers: {found.difference}"
    if found.renderings is not None:
        yield f"the student's template writes {found.renderings.student!r}, the teacher's {found.renderings.teacher!r}"
    yield from found.ends
    count = len(found.responses)
    yield f"{count} response{'s' * (count != 1)}: {describe(found.facts)}" if count else "nothing lined up"
    for failure in found.failures:
        yield f"not read: {failure}"


def _as_rollout(text: str, student_side: StudentSide) -> Rollout:
    """A text as the student would write it: in its tokenizer's own tokens, special tokens in it as text, the turn ended."""
    ids = [*student_side.encode(text), student_side.end_id]
    prompt = Prompt("text", ({"role": "user", "content": "?"},), teacher="teacher", task="text")
    token_ids = np.array([student_side.end_id, *ids], dtype=np.int32)  # one token stands for the prompt
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=token_ids,
        loss_mask=np.arange(len(token_ids)) >= 1,
        rollout_logprobs=np.zeros(len(token_ids), dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, len(token_ids))),
        messages=(*prompt.messages, {"role": "assistant", "content": text}),
        finish="end",
        policy_version=0,
    )


def _shown(piece: bytes) -> str:
    """A token's bytes for a terminal, with visible whitespace and controls; bytes that are no UTF-8 are escaped."""
    text = piece.decode(errors="backslashreplace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "∅"
