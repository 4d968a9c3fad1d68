"""Alignment of two tokenisations: speed and correctness, beside TRL's GOLD in the same process.

    .venv/bin/python benchmarks/align.py --student models/smollm2-135m-instruct --teacher FOLDER

The corpus is this repository's own text, cut into responses. Tokenisation is not timed: both aligners get where each token
ends and give back groups. A pair is wrong when its two groups spell different bytes; coverage is the share of bytes in pairs
that are right. Without trl (`pip install trl==1.16.0`) only opd's own figures are shown.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from opd.models.loading import load_tokenizer
from opd.text.chunks import align
from opd.text.student_text import StudentSide

Groups = list[tuple[list[int], list[int]]]
Ends = tuple[np.ndarray, np.ndarray]


def responses(size: int) -> list[str]:
    """The repository's Markdown and Python, cut every `size` characters."""
    root = Path(__file__).parents[1]
    files = [p for kind in ("*.md", "src/**/*.py", "tests/**/*.py", "docs/**/*.md") for p in sorted(root.glob(kind))]
    text = "\n".join(p.read_text(encoding="utf-8") for p in files)
    return [text[i : i + size] for i in range(0, len(text), size)]


def ours(sides: Sequence[Ends]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The chunk of each token on both sides, response by response."""
    return [(found.student, found.teacher) for found in (align(*ends) for ends in sides)]


def ours_at_once(sides: Sequence[Ends]) -> list[tuple[np.ndarray, np.ndarray]]:
    """All responses in one call: each one's ends go on where the one before stopped."""
    seams = np.concatenate([[0], np.cumsum([ends[0][-1] for ends in sides])[:-1]])
    joined = [np.concatenate([ends[k] + s for ends, s in zip(sides, seams, strict=True)]) for k in (0, 1)]
    found = align(*joined)
    return [(found.student, found.teacher)]


def groups_of(student: np.ndarray, teacher: np.ndarray) -> Groups:
    """Token indices by chunk."""
    cuts = [np.flatnonzero(np.diff(side)) + 1 for side in (student, teacher)]
    parts = [np.split(np.arange(len(side)), cut) for side, cut in zip((student, teacher), cuts, strict=True)]
    return [(a.tolist(), b.tolist()) for a, b in zip(*parts, strict=True)]


def checked(groups: Groups, student: list[bytes], teacher: list[bytes]) -> tuple[int, int]:
    """(pairs that spell different bytes, bytes in pairs that are right)."""
    wrong = covered = 0
    for mine, theirs in groups:
        spelled, read = b"".join(student[i] for i in mine), b"".join(teacher[j] for j in theirs)
        wrong += spelled != read
        covered += len(spelled) * (spelled == read)
    return wrong, covered


def timed(run: Callable[[], object], repeats: int) -> float:
    """The least seconds of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--characters", type=int, default=2000, help="of one response")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tables = []
    writers = []
    for source in (options.student, options.teacher):
        tokenizer = load_tokenizer(source).tokenizer
        start = time.perf_counter()
        writers.append(StudentSide(tokenizer))
        tables.append(writers[-1].table)
        print(f"table of {source}: {len(tables[-1])} ids in {time.perf_counter() - start:.2f} s")
    texts = responses(options.characters)
    ids = [[np.array(w.encode(t), dtype=np.int64) for t in texts] for w in writers]
    sides: list[Ends] = []
    for a, b in zip(*ids, strict=True):
        ends = [np.cumsum(table.lengths(x)) for table, x in zip(tables, (a, b), strict=True)]
        sides.append((ends[0], ends[1] - (ends[1][-1] - ends[0][-1])))  # a dummy space in front, if there is one
    tokens = sum(len(a) for a in ids[0])
    size = sum(len(t.encode()) for t in texts)
    print(f"{len(texts)} responses, {tokens} student tokens, {sum(map(len, ids[1]))} teacher tokens, {size} bytes")
    pieces = [[[table.of(int(i)) for i in x] for x in side] for table, side in zip(tables, ids, strict=True)]

    def report(name: str, seconds: float, every: list[Groups]) -> None:
        found = [checked(g, a, b) for g, a, b in zip(every, *pieces, strict=True)]
        wrong, covered = (sum(x) for x in zip(*found, strict=True))
        print(
            f"{name}: {tokens / seconds / 1e6:.2f} million student tokens a second; {100 * covered / size:.3f} % of bytes covered, "
            f"{wrong} of {sum(map(len, every))} pairs wrong"
        )

    each = timed(lambda: ours(sides), options.repeats)
    report("opd, one call a response", each, [groups_of(*found) for found in ours(sides)])
    whole = timed(lambda: ours_at_once(sides), options.repeats)
    print(f"opd, all in one call: {tokens / whole / 1e6:.2f} million student tokens a second")
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
        from trl.experimental.utils import encode_with_byte_offsets
    except ImportError as error:
        print(f"GOLD: not measured ({error})")
        return
    offsets = []
    for student_side in writers:
        encoded = encode_with_byte_offsets(student_side.tokenizer.backend_tokenizer, texts, add_special_tokens=False)
        offsets.append([list(spans) for _, spans in encoded])
    pairs = list(zip(*offsets, strict=True))
    seconds = timed(lambda: [ULDLoss._align_by_byte_offsets(a, b) for a, b in pairs], options.repeats)
    found = [list(zip(*ULDLoss._align_by_byte_offsets(a, b), strict=True)) for a, b in pairs]
    report("GOLD (trl)", seconds, found)
    print(f"ratio: {seconds / each:.1f} (one call a response), {seconds / whole:.1f} (all in one call)")


if __name__ == "__main__":
    main()
