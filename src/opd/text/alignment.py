"""A rollout in two tokenisations, turn by turn: chunks, what is masked and why, and the score that comes of it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd.errors import DataError
from opd.records import ChunkScore, Rollout
from opd.text.chunks import Chunks, align, fold
from opd.text.student_text import UNWRITTEN, Masked, StudentSide, StudentText, spell
from opd.text.teacher_text import TeacherSide, TeacherText
from opd.text.tokenizer import SharedVocabulary
from opd.text.tool_calls import Syntax
from opd.text.transcribe import OwnSyntax, Seen

# nats: a token that the student chose and its teacher all but rules out is an artefact, until shown otherwise
ALARM = -15.0
LARGEST = "largest_chunk"  # the one fact that is a maximum, in bytes; the others are counts


@dataclass(frozen=True)
class Pairing:
    """chunks: over the student's tokens and the teacher's, the end of the turn on both sides included when the student chose
    it, -1 for tokens of a call's wrapper that stand in none; masked [student tokens], faulty [chunks]: `Masked`, the latter for
    every token of a chunk that has a masked one."""

    chunks: Chunks
    masked: np.ndarray
    faulty: np.ndarray
    ends_turn: bool

    @property
    def chunk_ids(self) -> np.ndarray:
        """The chunk of each student token [tokens] int64, numbered over the chunks that are kept; -1 where it is masked."""
        kept = self.faulty == Masked.NOT
        numbers = np.where(kept, np.cumsum(kept) - 1, -1)
        found = (
            np.where(self.chunks.student >= 0, numbers[self.chunks.student], -1)
            if len(numbers)
            else self.chunks.student
        )
        return np.where(self.masked == Masked.NOT, found, -1)

    @property
    def single(self) -> np.ndarray:
        """The chunks that are kept and have one token on each side, [chunks] bool."""
        ours = np.bincount(self.chunks.student[self.chunk_ids >= 0], minlength=len(self.chunks))
        _, theirs = self.chunks.counts()
        return (ours == 1) & (theirs == 1) & (self.faulty == Masked.NOT)

    @property
    def kept_sizes(self) -> np.ndarray:
        """Bytes of each chunk of text that is kept (the end of a turn is none), [chunks of text]."""
        whole = self.chunks.sizes()[: len(self.chunks) - self.ends_turn]
        return whole[self.faulty[: len(whole)] == Masked.NOT]

    def totals(self, teacher_logprobs: np.ndarray) -> np.ndarray:
        """log q of each chunk, from the log-probabilities of the teacher's tokens, [chunks]."""
        inside = self.chunks.teacher >= 0
        return np.bincount(self.chunks.teacher[inside], weights=teacher_logprobs[inside], minlength=len(self.chunks))

    def sums(self, teacher_logprobs: np.ndarray) -> np.ndarray:
        """`totals` of the chunks that are kept."""
        return self.totals(teacher_logprobs)[self.faulty == Masked.NOT]


def pair(
    student_text: StudentText, teacher_text: TeacherText, *, ends_turn: bool, blocks: np.ndarray | None = None
) -> Pairing:
    """Line up a response with itself. With `ends_turn` both sides get one more token of one unit, the end of the turn.

    blocks: where the teacher reads another text (`Transcript`), the bytes that both have; nothing else is compared.
    """
    ours = _side(student_text.ends, student_text.masked, blocks, 0)
    theirs = _side(teacher_text.ends, teacher_text.masked, blocks, 1)
    size = student_text.num_bytes if blocks is None else int(blocks[:, 2].sum())
    end = np.array([size + 1] if ends_turn else [], dtype=np.int64)
    not_masked = np.zeros(len(end), dtype=np.uint8)
    masked, bad = (np.concatenate([side.masked, not_masked]) for side in (ours, theirs))
    lined_up = [np.concatenate([side.ends[side.inside], end]).astype(np.int64) for side in (ours, theirs)]
    if len(lined_up[0]) == 0 or lined_up[0][-1] == 0:
        nothing = np.zeros(0, dtype=np.int64)
        chunks = Chunks(np.full(len(masked), -1), np.full(len(bad), -1), nothing)
        # nothing but, say, the first space of a text, which the student's own decoder takes away
        alone = np.where(masked == Masked.NOT, np.uint8(Masked.NO_COUNTERPART), masked)
        return Pairing(chunks, alone, np.zeros(0, dtype=np.uint8), ends_turn=False)
    found = align(*lined_up)
    chunks = Chunks(_spread(found.student, ours.inside), _spread(found.teacher, theirs.inside), found.ends)
    faulty = np.zeros(len(chunks), dtype=np.uint8)
    read = chunks.teacher >= 0
    np.maximum.at(faulty, chunks.teacher[read], bad[read])
    # A control token that is not written has no bytes: it is masked alone, the chunk in which it stands is whole without it.
    written = np.isin(masked, UNWRITTEN, invert=True) & (chunks.student >= 0)
    np.maximum.at(faulty, chunks.student[written], masked[written])
    of_chunk = np.append(faulty, np.uint8(Masked.NOT))[chunks.student]
    return Pairing(chunks, np.maximum(masked, of_chunk), faulty, ends_turn)


@dataclass(frozen=True)
class _Side:
    """One side's tokens: where they end, why they are masked, whether they have a part in what is compared, [tokens] each."""

    ends: np.ndarray
    masked: np.ndarray
    inside: np.ndarray


def _side(ends: np.ndarray, masked: np.ndarray, blocks: np.ndarray | None, column: int) -> _Side:
    if blocks is None:
        return _Side(ends, masked, np.ones(len(ends), dtype=bool))
    folded = fold(ends, blocks[:, column], blocks[:, 2])
    cross_tokenizer = folded.torn | ~folded.inside
    reasons = np.where(cross_tokenizer & (masked == Masked.NOT), np.uint8(Masked.SYNTAX), masked)
    return _Side(folded.ends, reasons, folded.inside)


def _spread(chunks: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The chunks of all tokens of a side, -1 for those that are not inside; behind them, the end of the turn keeps its own."""
    found = np.full(len(inside) + len(chunks) - int(inside.sum()), -1, dtype=np.int64)
    found[np.append(np.flatnonzero(inside), np.arange(len(inside), len(found)))] = chunks
    return found


@dataclass(frozen=True)
class TurnPair:
    """One turn of the student: its tokens [start, stop) in the rollout, what they spell, how the teacher reads it, the chunks.

    ends_turn: the student chose to end it, which is its last token. rewritten: the teacher's template shows the turns before
    otherwise than it showed them when they were written. canonical: the student's own tokenizer would write the text so.
    untranscribed: calls in it or before it are read as they were written, though the teacher's own syntax was asked for.
    end_ids: the teacher's tokens for the student's end, where it ended the turn.
    """

    start: int
    stop: int
    student_text: StudentText
    teacher_text: TeacherText
    pairing: Pairing
    ends_turn: bool
    rewritten: bool
    canonical: bool
    untranscribed: bool = False
    end_ids: tuple[int, ...] = ()


def pair_turns(
    rollout: Rollout,
    student_side: StudentSide,
    teacher_side: TeacherSide,
    *,
    mask_non_canonical: bool = False,
    own_syntax: Syntax | None = None,
) -> list[TurnPair]:
    """Line up every turn of the student with the teacher's reading of it.

    Each turn is read behind the conversation as the teacher's own template renders it at that point. With `own_syntax`, how
    the student writes calls, the teacher reads them as its own template writes them. Raises DataError when the teacher cannot
    read the conversation.
    """
    turns = [t for t in rollout.turns if t.author == "student"]
    answers = [
        i for i, m in enumerate(rollout.messages) if i >= len(rollout.prompt.messages) and m["role"] == "assistant"
    ]
    assert len(turns) == len(answers), rollout.id
    shared = teacher_side.counterparts(student_side.table)
    own = (
        OwnSyntax(rollout, student_side.table, teacher_side, own_syntax)
        if own_syntax and rollout.prompt.tools
        else None
    )
    found: list[TurnPair] = []
    written = ""
    for turn, answer in zip(turns, answers, strict=True):
        ids = rollout.token_ids[turn.start : turn.end].astype(np.int64)
        ends_turn = len(ids) > 0 and int(ids[-1]) in student_side.end_ids
        body = ids[: len(ids) - ends_turn]
        student_text = spell(student_side.table, body, shared)
        strange = student_side.strange(body, shared)
        if mask_non_canonical:
            reason = np.where(
                strange & (student_text.masked == Masked.NOT), np.uint8(Masked.NON_CANONICAL), student_text.masked
            )
            student_text = replace(student_text, masked=reason)
        if own is None:
            seen = Seen(teacher_side.render(rollout.messages[:answer], rollout.prompt.tools), None, untranscribed=False)
        else:
            seen = own.see(answer, body, student_text)
        teacher_text = teacher_side.read(seen.before, student_text, seen.transcript, opened=student_side.opened)
        if teacher_text.first == 0:
            raise DataError(
                f"teacher '{teacher_side.name}': the response begins within the first token of its rendering"
            )
        blocks = None if seen.transcript is None else seen.transcript.blocks
        pairing = pair(student_text, teacher_text, ends_turn=ends_turn, blocks=blocks)
        rewritten = not seen.before.text.startswith(written)
        found.append(
            TurnPair(
                turn.start, turn.end, student_text, teacher_text, pairing, ends_turn, rewritten, not strange.any(),
                seen.untranscribed, teacher_side.ends_of(int(ids[-1]), student_side) if ends_turn else (),
            )
        )  # fmt: skip
        written = seen.before.text + (student_text.text if seen.transcript is None else seen.transcript.text)
    return found


def same_tokens(turn: TurnPair, token_ids: np.ndarray, teacher_ids: np.ndarray, cells: SharedVocabulary) -> np.ndarray:
    """Where both sides chose the same token, or both ended the turn: [pairs, 2], places in the turn's tokens and in the
    teacher's tokens of the response.

    token_ids: of the turn; teacher_ids: of the response, its end included when the turn ends.
    """
    single = turn.pairing.single
    ours = np.flatnonzero((turn.pairing.chunk_ids >= 0) & _at(single, turn.pairing.chunks.student))
    theirs = np.flatnonzero(_at(single, turn.pairing.chunks.teacher))  # chunk by chunk, as the student's are
    same = cells.same(token_ids[ours], teacher_ids[theirs])
    return np.stack([ours[same], theirs[same]], axis=1)


def _at(flags: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """The flag of each token's chunk; False for a token without one."""
    return np.append(flags, False)[chunks]


def chunk_score(
    teacher: str, rollout: Rollout, turns: Sequence[TurnPair], logprobs: Sequence[np.ndarray]
) -> ChunkScore:
    """The score of a rollout from the teacher's log-probabilities of its tokens, turn by turn."""
    chunks = np.full(len(rollout.token_ids), -1, dtype=np.int32)
    spread = np.zeros(len(rollout.token_ids), dtype=np.float32)
    facts: list[Mapping[str, int]] = []
    first = num_bytes = 0
    for turn, values in zip(turns, logprobs, strict=True):
        mine = turn.pairing.chunk_ids
        sums = turn.pairing.sums(values)
        places = np.flatnonzero(mine >= 0)
        chunks[turn.start + places] = mine[places] + first
        last = places[np.append(mine[places][1:] != mine[places][:-1], True)] if len(places) else places
        spread[turn.start + last] = sums[mine[last]]
        first += len(sums)
        num_bytes += int(turn.pairing.kept_sizes.sum())
        facts.append(turn_facts(turn, values))
    return ChunkScore(teacher, spread, chunks, num_bytes, total(facts))


def turn_facts(turn: TurnPair, logprobs: np.ndarray) -> dict[str, int]:
    """How the two sides lined up, in figures that add up over turns and rollouts (`total`).

    tokens: the student's; teacher_tokens; bytes, of which bytes/kept lie in chunks that are kept and bytes/one_to_one in chunks
    of one token on each side; chunks of text, kept; largest_chunk: bytes; alarms: one-to-one chunks below -15 nats; straddles;
    rewritten, non_canonical and untranscribed turns; masked/REASON tokens.
    """
    pairing = turn.pairing
    text = len(pairing.chunks) - pairing.ends_turn
    single = pairing.single
    sizes = pairing.kept_sizes
    masked = {
        f"masked/{reason.name.lower()}": int((pairing.masked == reason).sum())
        for reason in Masked
        if reason != Masked.NOT
    }
    return {
        "turns": 1,
        "ended": int(turn.ends_turn),
        "tokens": turn.stop - turn.start,
        "teacher_tokens": len(turn.teacher_text.ends) + turn.ends_turn,
        "bytes": turn.student_text.num_bytes,
        "bytes/kept": int(sizes.sum()),
        "bytes/one_to_one": int(pairing.chunks.sizes()[:text][single[:text]].sum()),
        "chunks": len(sizes),
        LARGEST: int(sizes.max(initial=0)),
        "alarms": int((pairing.totals(logprobs)[single] < ALARM).sum()),
        "straddles": int((turn.teacher_text.masked == Masked.STRADDLE).sum()),
        "rewritten": int(turn.rewritten),
        "non_canonical": int(not turn.canonical),
        "untranscribed": int(turn.untranscribed),
        **masked,
    }


def total(facts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The figures of several turns or rollouts together: sums, and the largest chunk."""
    every = list(facts)
    whole: Counter[str] = Counter()
    for each in every:
        whole.update(each)
    if every:
        whole[LARGEST] = max(each.get(LARGEST, 0) for each in every)
    return dict(whole)


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
