"""Losses over the whole vocabulary at every state, from hidden states and heads, in chunks: [states, vocab] logits never
exist at once. Each has its gradient in closed form,

    d D / d logits_a = p_a (h_a - sum_b p_b h_b)

with h_a = log p_a - log q_a for the reverse KL, -q_a / p_a for the forward KL, (1 - beta) (log p_a - log m_a) for the JSD,
and on a support the log ratio of the token's bucket. Source: each divergence's derivative in p_a, up to a constant.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from opd.objectives.baselines import score_weighted_mean
from opd.objectives.divergences import magnified, mixture, resolution, resolved
from opd.objectives.target import target_logprobs
from opd.objectives.tiles import blocks, soft_capped, tiles

_TINY = 1e-35  # a probability below it is none

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "jsd"]


class SharedVocabularyIds(NamedTuple):
    """Two vocabularies sorted into cells that mean the same on both sides: student [vocab], teacher [teacher vocab] int64, the
    cell of each id; the last of `num` cells is for ids that have no counterpart and is never part of a support."""

    student: Tensor
    teacher: Tensor
    num: int


class TeacherHead(NamedTuple):
    """What turns a teacher's states into distributions: rows [vocab, width], the cells of another vocabulary, and the soft cap of
    the logits."""

    rows: Tensor
    cells: SharedVocabularyIds | None = None
    softcap: float | None = None


class TeacherStates(NamedTuple):
    """One teacher at every state: hidden [states, width], head [vocab, width], and its weight in log q.

    cells: of a teacher that has another vocabulary, which then stands alone: the loss compares cells, not ids. softcap: its logits
    are c tanh(hidden head^T / c).
    """

    hidden: Tensor
    head: Tensor
    weight: float = 1.0
    cells: SharedVocabularyIds | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class VocabularyLoss:
    """Which loss, and how it is computed.

    divergence: of the whole distributions; jsd_beta belongs to "jsd". support: with k, the reverse KL on the union of the
    student's and the teacher's k likeliest tokens and the sampled one, all others as one bucket; with tail_residual the
    sampled token stays out of the support and what the bucket hides is added as a policy-gradient term, which makes the
    gradient's mean that of the reverse KL. softcap: the student's, as `TeacherStates` has the teacher's. max_logits: how many
    logits of one model may exist at once.
    """

    divergence: Divergence = "reverse_kl"
    jsd_beta: float = 0.5
    top_k: int | None = None
    tail_residual: bool = False
    temperature: float = 1.0
    logprob_floor: float = -50.0
    softcap: float | None = None
    max_logits: int = 2**26


class StateStatistics(NamedTuple):
    """What a loss saw at each state, all [states] and without gradient.

    divergence: the loss's own (nats); reverse_kl: over the full vocabulary; entropy: of the student; floored: the student's
    mass on tokens whose teacher log-probability was floored; tail: its mass off the support (0 without one);
    score_weighted: the baseline b* (nan unless asked for).
    """

    divergence: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    floored: Tensor
    tail: Tensor
    score_weighted: Tensor


class Agreement(NamedTuple):
    """How near student and teacher are at each state, all [states] and without gradient.

    topk_overlap: of their k likeliest tokens, the share that both have; student_entropy, teacher_entropy: in nats.
    """

    topk_overlap: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


def vocabulary_loss(
    student_hidden: Float[Tensor, "states width"],
    student_head: Float[Tensor, "vocab width"],
    teachers: Sequence[TeacherStates],
    weights: Float[Tensor, " states"],
    how: VocabularyLoss,
    *,
    sampled_ids: Int[Tensor, " states"] | None = None,
) -> tuple[Float[Tensor, ""], StateStatistics]:
    """sum_i weights_i D_i for the divergence D that `how` names, and what was seen at each state.

    The target is log q = sum_k weight_k log q_k over `teachers`, weights summing to one. The reverse KL takes it as it is,
    so its value is the weighted mean of the KLs to each and its optimum their normalised geometric mean; the others
    normalise it first. Negative weights extrapolate away from a reference. `sampled_ids` [states] is needed with a support.

    With a teacher of another vocabulary every distribution is that over cells, P(c) = sum of p_a over the ids of c, and the
    gradient is p_a (h_c(a) - sum_c P(c) h_c).
    """
    assert how.top_k is None or sampled_ids is not None
    assert len(teachers) == 1 or all(teacher.cells is None for teacher in teachers)
    # autograd.Function wants tensors one by one
    flat = [t for teacher in teachers for t in (teacher.hidden, teacher.head)]
    shares = tuple((teacher.weight, teacher.cells, teacher.softcap) for teacher in teachers)
    found = _VocabularyLoss.apply(student_hidden, student_head, weights, sampled_ids, shares, how, *flat)
    loss, divergence, reverse_kl, entropy, floored, tail = cast(tuple[Tensor, ...], found)
    return loss, StateStatistics(divergence, reverse_kl, entropy, floored, tail, torch.full_like(tail, torch.nan))


@torch.no_grad()
def state_statistics(
    student_hidden: Float[Tensor, "states width"],
    student_head: Float[Tensor, "vocab width"],
    teachers: Sequence[TeacherStates],
    how: VocabularyLoss,
    *,
    score_weighted: bool = False,
) -> StateStatistics:
    """What the reverse KL of `vocabulary_loss` sees at each state, and on demand the baseline b*; without gradient."""
    whole = replace(how, divergence="reverse_kl", top_k=None)
    empty = student_hidden.new_full((len(student_hidden),), torch.nan, dtype=_wide(student_hidden))
    found = StateStatistics(*(empty.clone() for _ in range(6)))
    for chunk in _all_chunks(student_hidden, student_head, teachers, how):
        seen = _pull(chunk, None, whole)[1:]
        best = empty[chunk.rows]
        if score_weighted:  # 0 where only rounding differs, as the KL is
            best = score_weighted_mean(chunk.logp, chunk.logq).where(seen[1] != 0.0, 0.0)
        for column, part in zip(found, (*seen, best), strict=True):
            column[chunk.rows] = part
    return found


@torch.no_grad()
def agreement(
    student_hidden: Float[Tensor, "states width"],
    student_head: Float[Tensor, "vocab width"],
    teachers: Sequence[TeacherStates],
    how: VocabularyLoss,
    *,
    k: int = 16,
) -> Agreement:
    """The overlap |top-k(p) and top-k(q)| / k and the entropies of p and q at each state, q the normalised target.

    The overlap is 1 for equal distributions and unchanged when a constant is added to either's logits. With a teacher of another
    vocabulary both are distributions over cells, and the last cell is no token. k is at most the number of tokens.
    """
    empty = student_hidden.new_zeros(len(student_hidden), dtype=_wide(student_hidden))
    found = Agreement(empty, empty.clone(), empty.clone())
    for chunk in _all_chunks(student_hidden, student_head, teachers, how):
        logq = torch.log_softmax(chunk.logq, -1)
        events = logq.shape[-1] - chunk.apart
        most = min(k, events)
        ours, theirs = (x[:, :events].topk(most, dim=-1).indices for x in (chunk.logp, logq))
        inside = torch.zeros_like(logq, dtype=torch.bool).scatter_(-1, ours, True)
        found.topk_overlap[chunk.rows] = inside.gather(-1, theirs).to(empty.dtype).mean(-1)
        found.student_entropy[chunk.rows] = -(chunk.p * chunk.logp).sum(-1)
        found.teacher_entropy[chunk.rows] = -(logq.exp() * logq).sum(-1)
    return found


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, weights, sampled_ids, shares, how, *flat):  # type: ignore[override]  # torch declares (*args)
        teachers = [TeacherStates(h, w, *share) for h, w, share in zip(flat[::2], flat[1::2], shares, strict=True)]
        cells = teachers[0].cells
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head) if need_head else None
        stats = tuple(hidden.new_zeros(len(hidden), dtype=_wide(hidden)) for _ in range(5))
        plain = how.divergence == "reverse_kl" and how.top_k is None and cells is None
        models = [(hidden, head), *((t.hidden, t.head) for t in teachers)]
        for rows, logits in tiles(models, max_logits=how.max_logits):
            for chunk in _chunks(rows, logits, teachers, how):
                scale = (weights[chunk.rows] / how.temperature)[:, None]
                # of a row's logits nothing is needed any more: their gradient takes their place
                place = logits[0][chunk.place]
                if plain:
                    found = _reverse_kl(chunk, scale, out=place)
                else:
                    pull, *found = _pull(chunk, _sampled(chunk, sampled_ids, cells), how)
                    torch.mul(_of_logits(chunk, pull, cells), scale, out=place)
                if chunk.slope is not None:
                    place.mul_(chunk.slope)
                for whole, part in zip(stats, found, strict=True):
                    whole[chunk.rows] = part
            if grad_hidden is not None:
                torch.mm(logits[0], head, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(logits[0].T, hidden[rows])
        ctx.gradients = (grad_hidden, grad_head)
        ctx.mark_non_differentiable(*stats)
        return (stats[0] * weights).sum(), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):  # type: ignore[override]  # torch declares (*args)
        scaled = tuple(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.gradients)
        return *scaled, *(None for _ in range(len(ctx.needs_input_grad) - 2))


def _sampled(chunk: "_Chunk", sampled_ids: Tensor | None, cells: SharedVocabularyIds | None) -> Tensor | None:
    if sampled_ids is None:
        return None
    sampled = sampled_ids[chunk.rows]
    return sampled if cells is None else cells.student[sampled]


def _of_logits(chunk: "_Chunk", pull: Tensor, cells: SharedVocabularyIds | None) -> Tensor:
    """The gradient p_a (h_a - sum_b p_b h_b) [states, vocab], from `pull`, which it writes over."""
    # of p_a h_a, or, from cells, of the id's share of P(c) h_c
    total = pull.sum(-1, keepdim=True)
    if cells is not None:
        pull = pull[:, cells.student].mul_(chunk.ids / chunk.p[:, cells.student].clamp(min=_TINY))
    return pull.addcmul_(chunk.ids, total, value=-1.0)


class _Chunk(NamedTuple):
    """Some states: rows, which they are; place, where they are in their tile; ids, p of each of the student's ids
    [states, vocab]; log p, p and log q of what is compared, [states, ids or cells]; entropy of the student, floored mass, both
    [states]; apart: whether the last cell is no event of its own; rounding: the log ratio that is none (`divergences`); slope: of
    the student's soft cap."""

    rows: slice
    place: slice
    ids: Tensor
    logp: Tensor
    p: Tensor
    logq: Tensor
    entropy: Tensor
    floored: Tensor
    apart: bool
    rounding: float
    slope: Tensor | None


def _all_chunks(
    hidden: Tensor, head: Tensor, teachers: Sequence[TeacherStates], how: VocabularyLoss
) -> Iterator[_Chunk]:
    """The distributions at all states, a few at a time."""
    models = [(hidden, head), *((t.hidden, t.head) for t in teachers)]
    for rows, logits in tiles(models, max_logits=how.max_logits):
        yield from _chunks(rows, logits, teachers, how)


def _chunks(
    rows: slice, logits: Sequence[Tensor], teachers: Sequence[TeacherStates], how: VocabularyLoss
) -> Iterator[_Chunk]:
    """The distributions at a tile's states, a few at a time."""
    rounding = resolution(_wide(logits[0])) * magnified(how.temperature, [t.weight for t in teachers])
    for place, which in blocks(rows, max(x.shape[-1] for x in logits), logits[0].device):
        own, slope = soft_capped(logits[0][place], how.softcap)
        logp = _log_softmax(own, how.temperature)
        p = ids = logp.exp()
        entropy = -(p * logp).sum(-1)
        cells = teachers[0].cells
        if cells is not None:
            p = _in_cells(ids, cells.student, cells.num)
            logp = p.clamp(min=_TINY).log()
        models = ((_logprobs(t, x[place], how), t.weight) for t, x in zip(teachers, logits[1:], strict=True))
        logq, below = target_logprobs(models, how.logprob_floor)
        floored = torch.zeros_like(entropy) if below is None else (p * below).sum(-1)
        yield _Chunk(which, place, ids, logp, p, logq, entropy, floored, cells is not None, rounding, slope)


def _logprobs(teacher: TeacherStates, logits: Tensor, how: VocabularyLoss) -> Tensor:
    """One teacher's log-probabilities of the ids or cells that are compared, [states, ids or cells]."""
    logprobs = _log_softmax(soft_capped(logits, teacher.softcap)[0], how.temperature)
    if teacher.cells is None:
        return logprobs
    return _in_cells(logprobs.exp(), teacher.cells.teacher, teacher.cells.num).log()


def _in_cells(p: Tensor, cells: Tensor, num: int) -> Tensor:
    """Probabilities of ids [states, vocab] summed into cells [states, cells]."""
    return p.new_zeros(len(p), num).index_add_(1, cells, p)


def _pull(chunk: _Chunk, sampled: Tensor | None, how: VocabularyLoss) -> tuple[Tensor, ...]:
    """p h [states, ids or cells], up to a multiple of p and 0 where only rounding differs, and (divergence, reverse_kl, entropy,
    floored, tail), each [states]."""
    gap = chunk.logp - chunk.logq
    pull = chunk.p * gap
    reverse_kl = divergence = pull.sum(-1)
    centred, tail = gap - reverse_kl[:, None], torch.zeros_like(chunk.entropy)
    kl_differs = differ = resolved(chunk.p, centred, reverse_kl, chunk.rounding)
    if how.top_k is not None and sampled is not None:
        pull, divergence, tail = _at_top_k(chunk, gap, sampled, how)
    elif how.divergence != "reverse_kl":
        pull, divergence, q = _of_normalised(chunk, how)
        # what the student leaves out weighs by the teacher's probability here
        differ = torch.maximum(differ, resolved(q, centred, reverse_kl, chunk.rounding))
    return pull * differ[:, None], divergence * differ, reverse_kl * kl_differs, chunk.entropy, chunk.floored, tail


def _of_normalised(chunk: _Chunk, how: VocabularyLoss) -> tuple[Tensor, Tensor, Tensor]:
    """(p h, the forward KL or the JSD, q), which take the target q normalised."""
    q = (logq := torch.log_softmax(chunk.logq, -1)).exp()
    if how.divergence == "forward_kl":
        return -q, (q * (logq - chunk.logp)).sum(-1), q
    logm = mixture(chunk.logp, logq, how.jsd_beta)
    pull = (1.0 - how.jsd_beta) * chunk.p * (chunk.logp - logm)
    return pull, how.jsd_beta * (q * (logq - logm)).sum(-1) + pull.sum(-1), q


def _reverse_kl(chunk: _Chunk, scale: Tensor, *, out: Tensor) -> tuple[Tensor, ...]:
    """What `_pull` says of each state for the plain reverse KL, in half its passes over the vocabulary: the gradient of the logits,
    scale p (log p - log q - KL), goes into `out`, and the chunk's tensors are written over."""
    gap = chunk.logp.sub_(chunk.logq)
    found = torch.linalg.vecdot(chunk.p, gap)
    differ = resolved(chunk.p, gap.sub_(found[:, None]), found, chunk.rounding)
    torch.mul(gap, chunk.p.mul_(scale * differ[:, None]), out=out)
    found = found * differ
    return found, found, chunk.entropy, chunk.floored, torch.zeros_like(found)


def _at_top_k(chunk: _Chunk, gap: Tensor, sampled: Tensor, how: VocabularyLoss) -> tuple[Tensor, Tensor, Tensor]:
    """(p h, the bucketed reverse KL, the student's mass in the tail) on the union of both models' likeliest tokens."""
    inside = torch.zeros_like(gap, dtype=torch.bool)
    events = gap.shape[-1] - chunk.apart
    for logprobs in (chunk.logp, chunk.logq):
        inside.scatter_(-1, logprobs[:, :events].topk(min(how.top_k or 0, events), dim=-1).indices, True)
    here = sampled[:, None]
    if not how.tail_residual:
        inside.scatter_(-1, here, True)
    if chunk.apart:
        inside[:, -1] = False
    # Summed off the support: one minus the sum on it would round a small tail away.
    log_p, log_q = (x.masked_fill(inside, -torch.inf).logsumexp(-1) for x in (chunk.logp, chunk.logq))
    # An empty tail has no ratio; one to which the student gives nothing has no weight in it.
    tail_gap = torch.where(inside.all(-1), 0.0, log_p.clamp(min=-1e4) - log_q)[:, None]
    bucketed = torch.where(inside, gap, tail_gap)
    divergence = (chunk.p * bucketed).sum(-1)
    pull = chunk.p * bucketed
    if how.tail_residual:
        # a policy-gradient term for the sampled token: its log ratio beyond that of the bucket, which is 0 inside the support
        pull.scatter_add_(-1, here, (gap - bucketed).gather(-1, here))
    return pull, divergence, (chunk.p * ~inside).sum(-1)


def _wide(tensor: Tensor) -> torch.dtype:
    """float32 or wider: reductions over a vocabulary are never done in half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
