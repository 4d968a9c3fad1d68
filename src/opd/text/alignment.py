"""A rollout in two tokenizations, turn by turn: its chunks, the reasons of masked tokens, its score, and a report."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd.errors import DataError
from opd.records import ChunkScore, Rollout
from opd.text.chunks import Chunks, align, fold
from opd.text.student_text import UNWRITTEN, Masked, StudentSide, StudentText, spell, student_turns
from opd.text.teacher_text import TeacherSide, TeacherText
from opd.text.tokenizer import SharedVocabulary
from opd.text.tool_calls import Syntax
from opd.text.transcribe import OwnSyntax, Seen

ALARM = (
    -15.0
)  # nats; a lower log ratio of one token is more likely a fault of the alignment than a choice of the student
LARGEST = "largest_chunk"  # bytes; the only fact that is a maximum, the others are counts


@dataclass(frozen=True)
class Pairing:
    """One response in the tokens of the student and of the teacher.

    chunks: of both sides' tokens, with the end of the turn where the student ended it; -1 for tokens around a call that are in no
    chunk. masked [student tokens]: `Masked`. faulty [chunks]: the `Masked` of a chunk with a masked token, for all of its tokens.
    """

    chunks: Chunks
    masked: np.ndarray
    faulty: np.ndarray
    ends_turn: bool

    @property
    def chunk_ids(self) -> np.ndarray:
        """The chunk of each student token [tokens] int64, numbered over the kept chunks; -1 for a masked token."""
        kept = self.faulty == Masked.NOT
        numbers = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # the last one for tokens without a chunk
        return np.where(self.masked == Masked.NOT, numbers[self.chunks.student], -1)

    @property
    def single(self) -> np.ndarray:
        """The kept chunks with one token on each side, [chunks] bool."""
        ours = np.bincount(self.chunks.student[self.chunk_ids >= 0], minlength=len(self.chunks))
        _, theirs = self.chunks.counts()
        return (ours == 1) & (theirs == 1) & (self.faulty == Masked.NOT)

    @property
    def kept_sizes(self) -> np.ndarray:
        """Bytes of each kept chunk of text, so without the end of the turn, [chunks of text]."""
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
    """Align the student's and the teacher's tokens of a response. With `ends_turn` both sides get one more token of length 1, the
    end of the turn.

    blocks: the bytes that both texts have, where the teacher reads another text (`Transcript`). Only these are compared.
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
        # such as a response that is one space, which the student's decoder removes
        alone = np.where(masked == Masked.NOT, np.uint8(Masked.NO_COUNTERPART), masked)
        return Pairing(chunks, alone, np.zeros(0, dtype=np.uint8), ends_turn=False)
    found = align(*lined_up)
    chunks = Chunks(_spread(found.student, ours.inside), _spread(found.teacher, theirs.inside), found.ends)
    faulty = np.zeros(len(chunks), dtype=np.uint8)
    read = chunks.teacher >= 0
    np.maximum.at(faulty, chunks.teacher[read], bad[read])
    # A control token that is not written has no bytes, so it is masked alone, and its chunk stays whole.
    written = np.isin(masked, UNWRITTEN, invert=True) & (chunks.student >= 0)
    np.maximum.at(faulty, chunks.student[written], masked[written])
    of_chunk = np.append(faulty, np.uint8(Masked.NOT))[chunks.student]
    return Pairing(chunks, np.maximum(masked, of_chunk), faulty, ends_turn)


@dataclass(frozen=True)
class _Side:
    """The tokens of one side: where they end, why they are masked, whether they are compared, [tokens] each."""

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
    """The chunks of all tokens of a side, -1 for those that are not inside. The end of the turn, behind them, keeps its own."""
    found = np.full(len(inside) + len(chunks) - int(inside.sum()), -1, dtype=np.int64)
    found[np.append(np.flatnonzero(inside), np.arange(len(inside), len(found)))] = chunks
    return found


@dataclass(frozen=True)
class TurnPair:
    """One turn of the student, the tokens [start, stop) of the rollout, aligned with the teacher's tokens of its text.

    ends_turn: the turn ends with the student's end token. rewritten: the teacher's template now renders the earlier turns in
    another way than before. canonical: the student's tokenizer gives the same tokens for the text. untranscribed: the teacher
    reads calls in this turn or before it as the student wrote them, although its own syntax was asked for. end_ids: the teacher's
    tokens for the student's end token.
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
    """Align every turn of the student with the teacher's tokens of it.

    The teacher reads a turn behind the conversation before it, as its own template renders that. own_syntax: the syntax of the
    student's calls; the teacher then reads calls as its own template writes them. Raises DataError when the teacher cannot read
    the conversation.
    """
    shared = teacher_side.counterparts(student_side.table)
    own = (
        OwnSyntax(rollout, student_side.table, teacher_side, own_syntax)
        if own_syntax and rollout.prompt.tools
        else None
    )
    found: list[TurnPair] = []
    written = ""
    for turn, answer in student_turns(rollout):
        ids = rollout.token_ids[turn.start : turn.end].astype(np.int64)
        ends_turn = len(ids) > 0 and int(ids[-1]) in student_side.end_ids
        body = ids[: len(ids) - ends_turn]
        student_text = spell(student_side.table, body, shared)
        strange = student_side.strange(body, shared)
        if mask_non_canonical:
            other = strange & (student_text.masked == Masked.NOT)
            student_text = replace(
                student_text, masked=np.where(other, np.uint8(Masked.NON_CANONICAL), student_text.masked)
            )
        if own is None:
            seen = Seen(teacher_side.render(rollout.messages[:answer], rollout.prompt.tools), None, untranscribed=False)
        else:
            seen = own.see(answer, body, student_text)
        teacher_text = teacher_side.read(seen.before, student_text, seen.transcript, opened=student_side.opened)
        if teacher_text.first == 0:
            raise DataError(
                f"teacher '{teacher_side.name}': the response starts in the first token of the teacher's text, so no token "
                "precedes it and the teacher cannot score it; check the teacher's chat template"
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
    """The places where both sides chose the same token, or both ended the turn: [pairs, 2], in the turn's tokens and in the
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
    """The score of a rollout. logprobs: the teacher's log-probabilities of its own tokens, turn by turn."""
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
    """Figures of an alignment that add up over turns and rollouts (`total`).

    tokens: the student's; teacher_tokens; bytes: of the text, bytes/kept: in kept chunks, bytes/one_to_one: in chunks of one token
    on each side; chunks: kept chunks of text; largest_chunk: bytes; alarms: one-to-one chunks below -15 nats; rewritten,
    non_canonical, untranscribed: turns; straddles, masked/REASON: tokens.
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
    """The figures of several turns or rollouts: sums, and the largest chunk."""
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
    """The figures of a report: fractions in [0, 1], means, and counts per turn; nan where there is nothing to count.

    one_to_one: of the bytes, in chunks of one token on both sides. masked, masked/REASON: of the student's tokens.
    tokens_per_chunk (the student's), bytes_per_chunk: means. largest_chunk: bytes. straddles, alarms, rewritten, non_canonical,
    untranscribed: per turn.
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
        f"{found['tokens_per_chunk']:.2f} student tokens per chunk, the largest {facts.get(LARGEST, 0)} bytes, "
        f"{100 * found['masked']:.1f} % of tokens masked"
        + (f" ({', '.join(reasons)})" if reasons else "")
        + (f"; a turn: {', '.join(per_turn)}" if per_turn else "")
    )


@dataclass(frozen=True)
class Side:
    """One chunk of a response: the bytes of its tokens on both sides, and the reason if it is masked."""

    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]
    masked: str | None


def sides(turn: TurnPair, token_ids: Sequence[int], student_side: StudentSide, teacher_side: TeacherSide) -> list[Side]:
    """A turn chunk by chunk. A masked token without a chunk stands alone; the two sides' tokens around a call stand together.

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
