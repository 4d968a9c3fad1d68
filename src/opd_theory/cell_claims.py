"""A claim on comparing what two vocabularies have in common: where descent on its mean ends, beside the sampled chunks'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from torch import Tensor

from opd.objectives.advantages import log_ratio_to_go
from opd.objectives.vocabulary import SharedVocabularyIds, TeacherStates, VocabularyLoss, vocabulary_loss
from opd.text.chunks import align
from opd.text.tokenizer import TokenBytes, shared_vocabulary
from opd_theory.byte_claims import END, TokenModel, ToyTokenizer, some_language, trained_on
from opd_theory.claim import Claim
from opd_theory.written_out import gap, log_softmax, slope

_LONGEST, _STEPS, _RATE = 4, 150, 0.1
_ALL = VocabularyLoss(top_k=1000)  # every common cell


@dataclass(frozen=True)
class Responses:
    """All that a student with a table row at every prefix can write, as flat tokens [tokens] of `paths` responses.

    rows, columns: which logit each token is; owners: its response; places: its place in the response; chunks [tokens];
    given [tokens]: the teacher's log-probability of a chunk at its last token; free [tokens] bool: the token was a choice.
    compared [tokens] bool: both sides chose that token; theirs [compared, teacher's ids]: the teacher's log-probabilities there.
    texts [paths]: which text each response spells; targets [texts]: log q of each.
    """

    rows: Tensor
    columns: Tensor
    owners: Tensor
    places: Tensor
    chunks: Tensor
    given: Tensor
    free: Tensor
    compared: Tensor
    theirs: Tensor
    texts: Tensor
    targets: Tensor
    num_rows: int


def table_of(tokens: Sequence[str]) -> TokenBytes:
    """The bytes of a toy's tokens; the last ends a text."""
    pieces = [t.encode() for t in tokens]
    none = np.zeros(len(pieces), dtype=bool)
    flat = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    return TokenBytes("byte_level", flat, starts, none, none, {}, {}, False)


def everything(student: Sequence[str], teacher: TokenModel) -> Responses:
    """Every response of at most `_LONGEST` tokens, which ends before that or there."""
    columns = [*student, END]
    prefixes: list[tuple[str, ...]] = [()]
    for prefix in prefixes:  # grows while it is walked
        if len(prefix) < _LONGEST - 1:
            prefixes += [(*prefix, token) for token in student]
    rows = {prefix: i for i, prefix in enumerate(prefixes)}
    whole = [(*p, t) for p in prefixes if len(p) == _LONGEST - 1 for t in student]
    names = ("rows", "columns", "owners", "places", "chunks", "given", "free", "compared")
    found: dict[str, list[float]] = {name: [] for name in names}
    theirs: list[list[float]] = []
    texts: list[int] = []
    targets: dict[str, float] = {}
    for owner, tokens in enumerate([*prefixes, *whole]):
        read = [*teacher.tokenizer.encode("".join(tokens)), END]
        chunks = align(np.cumsum([*map(len, tokens), 1]), np.cumsum([len(t) for t in read]))
        each = [log(teacher.chance(tuple(read[:j]), t)) for j, t in enumerate(read)]
        sums, (ours, others) = np.bincount(chunks.teacher, weights=each), chunks.counts()
        text = "".join(tokens)
        targets[text] = sum(each)
        texts.append(list(targets).index(text))
        sampled = [*tokens, END]  # at the full length it has to end: no choice, but the teacher counts it
        for i, token in enumerate(sampled):
            chunk = int(chunks.student[i])
            last = i + 1 == len(chunks.student) or chunks.student[i + 1] != chunk
            free = i < _LONGEST
            alone = free and bool(ours[chunk] == others[chunk] == 1)
            if alone:
                before = tuple(read[: int(np.flatnonzero(chunks.teacher == chunk)[0])])
                theirs.append([log(teacher.chance(before, t)) for t in teacher.tokenizer.tokens])
            values = (
                rows.get(tuple(sampled[:i]), 0),
                columns.index(token),
                owner,
                i,
                chunk,
                sums[chunk] * last,
                free,
                alone,
            )
            for column, value in zip(found.values(), values, strict=True):
                column.append(value)
    wide = torch.float64
    flat = {n: torch.tensor(v, dtype=wide if n == "given" else None) for n, v in found.items()}
    return Responses(
        **flat,
        theirs=torch.tensor(theirs, dtype=wide),
        texts=torch.tensor(texts),
        targets=torch.tensor([*targets.values()], dtype=wide),
        num_rows=len(rows),
    )


def chosen(table: Tensor, every: Responses) -> Tensor:
    """log pi of every token, 0 where it was no choice."""
    return torch.where(every.free, table.log_softmax(-1)[every.rows, every.columns], 0.0)


def mean_loss(table: Tensor, every: Responses, discount: float, cells: SharedVocabularyIds | None) -> Tensor:
    """A loss whose gradient is the mean of the estimator's: chunks of `discount`, and with `cells` the comparison where there is
    one."""
    logp = chosen(table, every)
    paths = len(every.texts)
    sums = torch.zeros(paths, dtype=torch.float64).index_add(0, every.owners, logp.detach())
    chance = sums.exp()[every.owners]
    shape = (paths, _LONGEST + 1)

    def padded(values: Tensor, empty: float) -> Tensor:
        return torch.full(shape, empty, dtype=values.dtype).index_put((every.owners, every.places), values)

    mask = padded(torch.ones_like(every.chunks), 0) > 0
    credit = log_ratio_to_go(padded(every.given - logp.detach(), 0.0), mask, discount, padded(every.chunks, -1))
    advantages = credit[every.owners, every.places]
    if cells is None:
        return -(chance * advantages * logp).sum()
    sampled = -(chance * advantages * logp * ~every.compared).sum()
    states = table[every.rows[every.compared]]
    ours, others = (torch.eye(n, dtype=torch.float64) for n in (states.shape[1], every.theirs.shape[1]))
    compared, _ = vocabulary_loss(
        states, ours, [TeacherStates(every.theirs, others, 1.0, cells)], chance[every.compared], _ALL,
        sampled_ids=every.columns[every.compared],
    )  # fmt: skip
    return sampled + compared


def cells_of(student: Sequence[str], teacher: ToyTokenizer) -> SharedVocabularyIds:
    ours, theirs = (table_of(t) for t in ([*student, END], teacher.tokens))
    common = shared_vocabulary(ours, [len(ours) - 1], theirs, [len(theirs) - 1])
    return SharedVocabularyIds(torch.from_numpy(common.student), torch.from_numpy(common.teacher), common.num)


def end_of_descent(
    student: Sequence[str], teacher: TokenModel, discount: float, *, compare: bool, steps: int = _STEPS
) -> float:
    """KL of the student's texts to the teacher's after Adam on the mean gradient, nats."""
    every = everything(student, teacher)
    cells = cells_of(student, teacher.tokenizer) if compare else None
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(every.num_rows, len(student) + 1, generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([table], lr=_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / steps)
        optimizer.zero_grad()
        mean_loss(table, every, discount, cells).backward()
        optimizer.step()
    logp = chosen(table.detach(), every)
    paths = torch.zeros(len(every.texts), dtype=torch.float64).index_add(0, every.owners, logp).exp()
    mass = torch.zeros(len(every.targets), dtype=torch.float64).index_add(0, every.texts, paths)
    return float((mass * (mass.log() - every.targets)).sum())


def _same_cells(student: Sequence[str], teacher: ToyTokenizer) -> bool:
    """Whether tokens share a cell where the longest beginning that both vocabularies have is one, and the ends have their own."""
    both = set(student) & set(teacher.tokens)

    def beginning(token: str) -> str:
        return max((t for t in both if token.startswith(t)), key=len, default="") if token != END else END

    cells = cells_of(student, teacher)
    names = [*map(beginning, [*student, END]), *map(beginning, teacher.tokens)]
    numbers = [*cells.student.tolist(), *cells.teacher.tolist()]
    pairs = set(zip(names, numbers, strict=True))
    one_to_one = len(pairs) == len({n for n, _ in pairs}) == len({c for _, c in pairs})
    return one_to_one and all((name == "") == (number == cells.num - 1) for name, number in pairs)


def _loss_gaps(student: Sequence[str], teacher: TokenModel, discounts: Sequence[float]) -> tuple[float, float]:
    """How far the mean estimates are from sums over responses, of chunks and of the comparison of cells."""
    every = everything(student, teacher)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(every.num_rows, len(student) + 1, generator=generator, dtype=torch.float64).requires_grad_()
    cells = cells_of(student, teacher.tokenizer)
    chunks = 0.0
    for discount in discounts:
        found = torch.autograd.grad(mean_loss(table, every, discount, None), table)[0]
        chunks = max(chunks, gap(found, _written_out(table, every, discount, None)))
    found = torch.autograd.grad(mean_loss(table, every, 0.0, cells), table)[0]
    return chunks, gap(found, _written_out(table, every, 0.0, cells))


def _written_out(table: Tensor, every: Responses, discount: float, cells: SharedVocabularyIds | None) -> np.ndarray:
    """The slope of `mean_loss` [rows, vocab] by loops over responses; with cells, by complex steps of the KL over cells."""
    logits = table.detach().numpy()
    logp = log_softmax(logits)
    rows, columns, chunks = every.rows.tolist(), every.columns.tolist(), every.chunks.tolist()
    own = [float(logp[r, c]) if free else 0.0 for r, c, free in zip(rows, columns, every.free.tolist(), strict=True)]
    given, owners = every.given.tolist(), every.owners.tolist()
    compared = (np.cumsum(every.compared.numpy()) - 1).tolist()
    found = np.zeros_like(logits)
    for owner in range(len(every.texts)):
        tokens = [i for i, o in enumerate(owners) if o == owner]
        chance = np.exp(sum(own[i] for i in tokens))
        for place, i in enumerate(tokens):
            if not every.free[i]:
                continue
            if cells is not None and every.compared[i]:
                target = every.theirs[compared[i]].numpy()
                found[rows[i]] += chance * slope(lambda z, t=target: _cell_kl(z, t, cells), logits[rows[i]])
                continue
            later = tokens[place:]
            # what is open of its own chunk, and each later chunk at one more discount
            credit = sum(
                discount ** (chunks[j] - chunks[i]) * (given[j] - own[j]) for j in later if chunks[j] > chunks[i]
            ) + sum(given[j] - own[j] for j in later if chunks[j] == chunks[i])
            found[rows[i]] += chance * credit * np.exp(logp[rows[i]])
            found[rows[i], columns[i]] -= chance * credit
    return found


def _cell_kl(logits: np.ndarray, theirs: np.ndarray, cells: SharedVocabularyIds) -> np.ndarray:
    """The reverse KL of distributions over cells; what the teacher has not and the student has apart counts as one tail."""
    p, q = np.exp(log_softmax(logits)), np.exp(theirs)
    found = np.zeros(p.shape[:-1], dtype=p.dtype)
    for cell in range(cells.num):
        ours, others = (side.numpy() == cell for side in (cells.student, cells.teacher))
        if ours.any():
            mine = p[..., ours].sum(-1)
            found = found + mine * (np.log(mine) - np.log(max(q[others].sum(), np.exp(-50.0))))
    return found


PAIRS: Mapping[str, tuple[Sequence[str], tuple[tuple[str, str], ...]]] = {
    "a b ab / none": (("a", "b", "ab"), ()),
    "a b / ab": (("a", "b"), (("a", "b"),)),
    "a b ab / ba bb": (("a", "b", "ab"), (("b", "a"), ("b", "b"))),
    "a b ba / ab aba bb": (("a", "b", "ba"), (("a", "b"), ("ab", "a"), ("b", "b"))),
}


def comparison(pairs: Sequence[str] = tuple(PAIRS), *, steps: int = _STEPS) -> Claim:
    """Pairs of toys, three estimators each; the first pair's teacher merges nothing."""
    language = some_language(1, longest=8)
    ends: dict[str, dict[str, float]] = {}
    chunks, compared, cells = 0.0, 0.0, True
    for name in pairs:
        student, merges = PAIRS[name]
        teacher = trained_on(language, ToyTokenizer("ab", merges))
        ways = {"immediate": (0.0, False), "top_k": (0.0, True), "to_go": (1.0, False)}
        ends[name] = {w: end_of_descent(student, teacher, d, compare=c, steps=steps) for w, (d, c) in ways.items()}
        by_chunks, by_cells = _loss_gaps(student, teacher, (0.0, 0.5, 1.0))
        chunks, compared = max(chunks, by_chunks), max(compared, by_cells)
        cells = cells and _same_cells(student, teacher.tokenizer)
    free, *merged = ends.values()
    parts = {
        "below the chunks where nothing merges across": free["top_k"] < free["immediate"],
        "above them where it does": all(e["top_k"] > e["immediate"] for e in merged),
        "to-go below both": all(e["to_go"] < e["immediate"] for e in ends.values()),
        "cells are the longest common beginnings": cells,
        "the mean of the chunks, written out": chunks < 1e-10,
        "the mean of the comparison, written out": compared < 1e-10,
    }
    return Claim(
        "16c", "comparing common cells", "docs/concepts/tokenizers.md, what the two vocabularies have in common",
        "below the sampled chunks where no token of the teacher's spans several of the student's; above them where it merges "
        "across, since where a cut lies then tells of letters to come",
        "; ".join(f"{n}: " + ", ".join(f"{way} {end:.2f}" for way, end in e.items()) for n, e in ends.items()),
        all(parts.values()), {"kl_to_text": ends}, parts,
    )  # fmt: skip
