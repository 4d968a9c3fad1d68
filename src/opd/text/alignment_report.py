"""What a report says of two tokenisations: shares from counts, and the two sides of a response beside each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from opd.text.alignment import LARGEST, TurnPair
from opd.text.student_text import UNWRITTEN, Masked, StudentSide
from opd.text.teacher_text import TeacherSide

Facts = Mapping[str, int]

_PER_TURN = ("straddles", "rewritten", "non_canonical", "untranscribed", "alarms")


def shares(facts: Facts) -> dict[str, float]:
    """Figures of a report: shares in [0, 1], and mean sizes; nan where there is nothing to share.

    one_to_one: of the text's bytes, in chunks of one token on both sides. masked: of the student's tokens, and
    masked/REASON; tokens_per_chunk (the student's) and bytes_per_chunk: means; largest_chunk: bytes; straddles, alarms,
    rewritten, non_canonical, untranscribed: a turn.
    """

    def ratio(count: float, of: str) -> float:
        return count / facts[of] if facts.get(of) else float("nan")

    hidden = {name: count for name, count in facts.items() if name.startswith("masked/")}
    kept = facts.get("tokens", 0) - sum(hidden.values())
    return {
        "one_to_one": ratio(facts.get("bytes/one_to_one", 0), "bytes"),
        "masked": ratio(sum(hidden.values()), "tokens"),
        **{name: ratio(count, "tokens") for name, count in sorted(hidden.items())},
        "tokens_per_chunk": ratio(kept - facts.get("ended", 0), "chunks"),
        "bytes_per_chunk": ratio(facts.get("bytes/kept", 0), "chunks"),
        LARGEST: float(facts.get(LARGEST, 0)),
        **{name: ratio(facts.get(name, 0), "turns") for name in _PER_TURN},
    }


def describe(facts: Facts) -> str:
    """The figures in one line."""
    if not facts.get("bytes"):
        return "no text in it"
    found = shares(facts)
    reasons = [
        f"{name.removeprefix('masked/')} {100 * share:.1f} %"
        for name, share in found.items()
        if name.startswith("masked/") and share > 0
    ]
    per_turn = [f"{name} {found[name]:.2f}" for name in _PER_TURN if found[name] > 0]
    return (
        f"{100 * found['one_to_one']:.1f} % of {facts.get('bytes', 0)} bytes in one-to-one chunks, "
        f"{found['tokens_per_chunk']:.2f} student tokens a chunk, the largest {facts.get(LARGEST, 0)} bytes, "
        f"{100 * found['masked']:.1f} % of tokens masked"
        + (f" ({', '.join(reasons)})" if reasons else "")
        + (f"; a turn: {', '.join(per_turn)}" if per_turn else "")
    )


@dataclass(frozen=True)
class Side:
    """One chunk of a response: the pieces on both sides, and why it is masked, if it is."""

    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]
    masked: str | None


def sides(turn: TurnPair, token_ids: Sequence[int], student_side: StudentSide, teacher_side: TeacherSide) -> list[Side]:
    """A turn chunk by chunk; masked tokens without a chunk stand alone, those of the two wrappers of a call beside each other.

    token_ids: of the turn, [stop - start].
    """
    ours = [student_side.table.of(int(t)) for t in token_ids]
    theirs = [teacher_side.table.of(int(t)) for t in turn.teacher_text.token_ids[turn.teacher_text.first :]]
    theirs += [b"<end of turn>"] * turn.ends_turn
    pairing = turn.pairing
    if not len(pairing.chunks):
        return [Side((piece,), (), _name(reason)) for piece, reason in zip(ours, pairing.masked, strict=True)]
    found: list[Side] = []
    places = [_places(side, len(pairing.chunks)) for side in (pairing.chunks.student, pairing.chunks.teacher)]
    for place in range(2 * len(pairing.chunks) + 1):
        mine, other = (np.flatnonzero(side == place) for side in places)
        lonely = [i for i in mine if int(pairing.masked[i]) in UNWRITTEN]
        found += [Side((ours[i],), (), _name(pairing.masked[i])) for i in lonely]
        student = tuple(ours[i] for i in mine if i not in lonely)
        teacher = tuple(theirs[j] for j in other)
        if place % 2:
            found.append(Side(student, teacher, _name(pairing.faulty[place // 2])))
        elif student or teacher:
            found.append(Side(student, teacher, _name(Masked.SYNTAX)))
    return found


def _places(chunks: np.ndarray, num: int) -> np.ndarray:
    """Where each token is shown, [tokens]: 2 c + 1 in chunk c of `num`, 2 c before it where it is in none."""
    before = np.maximum.accumulate(np.where(chunks < 0, -1, chunks))
    behind = np.minimum.accumulate(np.where(chunks < 0, num, chunks)[::-1])[::-1]
    return np.where(before == behind, 2 * behind + 1, 2 * behind)


def _name(reason: int) -> str | None:
    return None if reason == Masked.NOT else Masked(int(reason)).name.lower()
