"""The terms of the loss of one packed pass: hidden states and a batch's columns in, a scalar and its metrics out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.batch import Batch
from opd.config import ObjectiveConfig
from opd.errors import ScoreError
from opd.metrics import Mean, Metrics, mean_of, merge
from opd.models.packing import MicroBatch
from opd.objectives.divergences import magnified, top_k_reverse_kl
from opd.objectives.logprobs import token_logprobs
from opd.objectives.losses import ppo, reinforce
from opd.objectives.top_k import logprobs_at
from opd.objectives.vocabulary import (
    SharedVocabularyIds,
    TeacherHead,
    TeacherStates,
    VocabularyLoss,
    agreement,
    state_statistics,
    vocabulary_loss,
)

# Where student and teacher are compared: a state costs two more rows of logits, at one in eight 2 to 3 % of an update.
_COMPARED_EVERY = 8
_MOST_COMPARED = 128


@dataclass(frozen=True)
class Pass:
    """One forward pass of the student: hidden [nodes, width], its head [vocab, width] and its teachers', and the soft cap of its
    logits."""

    batch: Batch
    micro: MicroBatch
    hidden: Tensor
    head: Tensor
    heads: Mapping[str, TeacherHead]
    softcap: float | None = None

    @property
    def targets(self) -> Tensor:
        """The actions' token ids, on the student's device, [actions]."""
        return torch.from_numpy(self.micro.targets).to(self.hidden.device)

    @property
    def states(self) -> Tensor:
        """The hidden state before each action, [actions, width]."""
        return self.hidden[torch.from_numpy(self.micro.states).to(self.hidden.device)]

    @property
    def flat(self) -> Tensor:
        """Where each action stands in the batch's flat columns, [actions]."""
        return torch.from_numpy(np.asarray(self.batch.offsets)[self.micro.owners] + self.micro.places)

    def column(self, values: Tensor) -> Tensor:
        """A flat column's values at the actions of this pass, on the student's device, [actions]."""
        return values[self.flat].to(self.hidden.device)


def vocabulary_settings(
    objective: ObjectiveConfig, *, temperature: float, softcap: float | None = None
) -> VocabularyLoss:
    """How the immediate term is computed over the vocabulary; softcap: of the student's logits."""
    return VocabularyLoss(
        divergence=objective.divergence,
        jsd_beta=objective.jsd_beta,
        top_k=objective.top_k if objective.type == "top_k" else None,
        tail_residual=objective.tail_residual,
        temperature=temperature,
        logprob_floor=objective.teacher_logprob_floor,
        softcap=softcap,
    )


def integrated_term(forward: Pass, how: VocabularyLoss, *, divisor: float, coef: float = 1.0) -> tuple[Tensor, Metrics]:
    """The divergence over the vocabulary at every visited state; a state that several samples share is done once."""
    if forward.batch.top_k_ids is not None:
        return _teacher_top_k_term(forward, how, divisor=divisor, coef=coef)
    device, micro = forward.hidden.device, forward.micro
    weights = coef * forward.batch.distill_mask[forward.flat].double().numpy() / divisor
    loss = forward.hidden.sum() * 0.0
    columns = {name: np.zeros(len(micro.states)) for name in ("divergence", "reverse_kl", "entropy", "floored", "tail")}
    compared = np.zeros(len(micro.states), dtype=bool)
    for actions, first, inverse, states, teachers in _by_teacher(forward, tokens_differ=how.top_k is not None):
        compared[actions] = True
        summed = np.bincount(inverse, weights=weights[actions], minlength=len(first))
        term, stats = vocabulary_loss(
            forward.hidden[states],
            forward.head,
            teachers,
            torch.from_numpy(summed).to(device, torch.float32),
            how,
            sampled_ids=forward.targets[torch.from_numpy(actions[first]).to(device)],
        )
        loss = loss + term
        for name, whole in columns.items():
            whole[actions] = getattr(stats, name).double().cpu().numpy()[inverse]
    refuse_nan(columns["divergence"], forward)
    metrics: Metrics = {
        "student/entropy/mean": mean_of(columns["entropy"][compared]),
        "teacher/floored_mass/mean": mean_of(columns["floored"][compared]),
    }
    if how.top_k is not None:
        metrics["top_k/tail_mass/mean"] = mean_of(columns["tail"][compared])
    if how.top_k is not None or how.divergence != "reverse_kl":
        metrics["divergence/token/mean"] = mean_of(columns["divergence"][compared])
    metrics |= agreement_metrics(forward, how)
    cross_tokenizer = np.array([_cross_tokenizer(forward, member) for member in micro.members])
    if not cross_tokenizer.any():
        return loss, metrics | kl_metrics(columns["reverse_kl"], forward)
    # The shared vocabulary is coarser than texts, so with another tokenizer the reverse KL is that of the sampled chunks.
    sampled = np.isin(micro.owners, np.array(micro.members)[cross_tokenizer])
    metrics["top_k/compared/mean"] = mean_of(compared[sampled & forward.batch.scored[forward.flat].numpy()])
    kl = np.where(sampled, sampled_kl(forward), columns["reverse_kl"])
    refuse_nan(kl, forward)
    return loss, metrics | kl_metrics(kl, forward)


def _teacher_top_k_term(forward: Pass, how: VocabularyLoss, *, divisor: float, coef: float) -> tuple[Tensor, Metrics]:
    """The same where teachers gave their top-k tokens: the reverse KL over those, the sampled one, and a bucket of the rest."""
    batch, micro, device = forward.batch, forward.micro, forward.hidden.device
    assert batch.top_k_ids is not None
    assert batch.logprobs_at is not None
    flat, scored = forward.flat, batch.scored[forward.flat].numpy()
    key = micro.states * (int(micro.targets.max()) + 1) + micro.targets
    teachers = dict.fromkeys(batch.teachers)
    key = key * len(teachers) + np.array([list(teachers).index(batch.teachers[o]) for o in micro.owners])
    key = key * 2 + ~scored  # the states of a rollout without a score are not those of its siblings
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    ids, logq = batch.top_k_ids[flat[first]].to(device), batch.logprobs_at[flat[first]].to(device)
    known = (ids >= 0) & (ids < len(forward.head))  # padding and ids beyond the shared ones count in the bucket
    states = forward.hidden[torch.from_numpy(micro.states[first]).to(device)]
    logp, entropy = logprobs_at(
        states, forward.head, ids.where(known, 0), temperature=how.temperature, softcap=forward.softcap
    )
    logq = logq.masked_fill(~known, -torch.inf)
    logp = logp.masked_fill(~known, -torch.inf)
    divergence = top_k_reverse_kl(
        logp, logq.to(logp.dtype), logprob_floor=how.logprob_floor, rounding=magnified(how.temperature)
    )
    weights = coef * batch.distill_mask[flat].double().numpy() / divisor
    summed = torch.from_numpy(np.bincount(inverse, weights=weights, minlength=len(first))).to(device, logp.dtype)
    loss = (divergence * summed).sum()
    found = divergence.detach().double().cpu().numpy()[inverse]
    refuse_nan(np.where(scored, found, 0.0), forward)
    tail = (1.0 - logp.detach().exp().sum(-1)).clamp(min=0.0).double().cpu().numpy()[inverse]
    metrics: Metrics = {
        "divergence/token/mean": mean_of(found[scored]),
        "top_k/tail_mass/mean": mean_of(tail[scored]),
        "student/entropy/mean": mean_of(entropy.double().cpu().numpy()[inverse][scored]),
    }
    return loss, metrics | kl_metrics(sampled_kl(forward), forward)


def _cross_tokenizer(forward: Pass, member: int) -> bool:
    """Whether a rollout's teacher has another tokenizer."""
    head = forward.heads.get(forward.batch.teachers[member])
    return head is not None and head.cells is not None


def policy_term(
    forward: Pass, objective: ObjectiveConfig, *, temperature: float, divisor: float
) -> tuple[Tensor, Metrics]:
    """REINFORCE or PPO over `batch.advantages`, at the actions that train."""
    batch = forward.batch
    assert batch.advantages is not None
    advantages = forward.column(batch.advantages)[None]
    mask = forward.column(batch.train_mask)[None]
    logprobs = token_logprobs(
        forward.states, forward.head, forward.targets, temperature=temperature, softcap=forward.softcap
    )[None]
    metrics: Metrics = {}
    if objective.loss == "ppo":
        # A correction accounts for the sampling policy, so the ratio is to the student as this update found it.
        before = batch.rollout_logprobs
        if objective.correction.type != "none":
            assert batch.student_logprobs is not None
            before = batch.student_logprobs
        low, high = objective.clip_low, objective.clip_high
        loss, clipped = ppo(
            logprobs, forward.column(before)[None], advantages, mask, low, high, clip_dual=objective.clip_dual, divisor=divisor
        )  # fmt: skip
        metrics["loss/clipped/mean"] = Mean(float(clipped), mask.sum().item())
    else:
        loss = reinforce(logprobs, advantages, mask, divisor=divisor)
    metrics["student/nll/mean"] = Mean(-float(logprobs.detach().sum()), logprobs.numel())
    if not objective.integrated:
        kl = sampled_kl(forward) if batch.reverse_kl is None else batch.reverse_kl[forward.flat].double().numpy()
        refuse_nan(kl, forward)
        metrics |= kl_metrics(kl, forward)
        if batch.teacher_parts is not None:
            metrics |= agreement_metrics(
                forward, vocabulary_settings(objective, temperature=temperature, softcap=forward.softcap)
            )
    return loss, metrics


def agreement_metrics(forward: Pass, how: VocabularyLoss) -> Metrics:
    """Top-k overlap, over all and by teacher, and entropies, at every eighth state of a pass, or at some 128 of many."""
    found: Metrics = {}
    num_teachers = len({forward.batch.teachers[m] for m in forward.micro.members})
    for actions, first, _, states, teachers in _by_teacher(forward, tokens_differ=False):
        some = slice(None, None, max(_COMPARED_EVERY, -(-len(first) * num_teachers // _MOST_COMPARED)))
        asked = [teacher._replace(hidden=teacher.hidden[some]) for teacher in teachers]
        seen = agreement(forward.hidden.detach()[states[some]], forward.head.detach(), asked, how)
        overlap = mean_of(seen.topk_overlap.tolist())
        part: Metrics = {
            "student/topk_overlap/mean": overlap,
            f"student/topk_overlap/{forward.batch.teachers[forward.micro.owners[actions[0]]]}/mean": overlap,
            "student/entropy_gap/mean": mean_of((seen.teacher_entropy - seen.student_entropy).tolist()),
            "teacher/entropy/mean": mean_of(seen.teacher_entropy.tolist()),
        }
        found = merge([found, part])
    return found


def sampled_kl(forward: Pass) -> np.ndarray:
    """log pi - log q of each action [actions], 0 without a score: in the mean over samples the reverse KL."""
    return -forward.batch.log_ratio[forward.flat].double().numpy()


@torch.no_grad()
def student_scores(forward: Pass, how: VocabularyLoss, *, score_weighted: bool) -> dict[str, Tensor]:
    """The student's log-probability of each action and, where teachers gave distributions, the reverse KL and b*."""
    logprobs = token_logprobs(
        forward.states, forward.head, forward.targets, temperature=how.temperature, softcap=forward.softcap
    )
    found = {"student_logprobs": logprobs.cpu()}
    if forward.batch.teacher_parts is None:
        return found
    kl, best = (found["student_logprobs"].new_zeros(len(logprobs)) for _ in range(2))
    for actions, _, inverse, nodes, teachers in _by_teacher(forward, tokens_differ=False):
        stats = state_statistics(forward.hidden[nodes], forward.head, teachers, how, score_weighted=score_weighted)
        where, back = torch.from_numpy(actions), torch.from_numpy(inverse)
        kl[where] = stats.reverse_kl.cpu()[back]
        best[where] = stats.score_weighted.cpu()[back]
    refuse_nan(kl.numpy(), forward)
    return found | {"reverse_kl": kl} | ({"best_baseline": best} if score_weighted else {})


def _by_teacher(
    forward: Pass, *, tokens_differ: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, Tensor, list[TeacherStates]]]:
    """For each teacher of the pass: (its actions, the first action of each distinct state, each action's distinct state,
    the states' nodes, the teacher's own states). With `tokens_differ` a state counts once a sampled token."""
    batch, micro, device = forward.batch, forward.micro, forward.hidden.device
    assert batch.teacher_parts is not None, "this objective needs teachers that give hidden states"
    teacher_of = np.array([batch.teachers[o] for o in micro.owners])
    has_state = np.ones(len(teacher_of), dtype=bool) if batch.compared is None else batch.compared[forward.flat].numpy()
    for teacher in dict.fromkeys(teacher_of.tolist()):
        actions = np.flatnonzero((teacher_of == teacher) & has_state)
        if not len(actions):
            continue
        key = micro.states[actions]
        if tokens_differ:
            key = key * (int(micro.targets.max()) + 1) + micro.targets[actions]
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        parts_of_rollouts = [batch.teacher_parts[m] for m in micro.members if batch.teachers[m] == teacher]
        members = [parts for parts in parts_of_rollouts if parts]  # none where a rollout has no score
        teachers = []
        for k, part in enumerate(members[0]):
            # Actions come rollout by rollout, so these rows are those of `actions`.
            hidden = torch.from_numpy(np.concatenate([parts[k].hidden for parts in members])[first])
            rows, cells, softcap = forward.heads[part.model]
            rows = rows.to(device)
            if cells is None:
                rows = rows[: len(forward.head)]
            else:
                cells = SharedVocabularyIds(
                    cells.student[: len(forward.head)].to(device), cells.teacher.to(device), cells.num
                )
            teachers.append(TeacherStates(hidden.to(device, rows.dtype), rows, part.weight, cells, softcap))
        yield actions, first, inverse, torch.from_numpy(micro.states[actions[first]]).to(device), teachers


def kl_metrics(kl: np.ndarray, forward: Pass) -> Metrics:
    """Reverse KL per token and per sequence, over all and by teacher, and per byte where a teacher has another tokenizer;
    `kl` [actions] in nats. Actions without a score do not count."""
    batch, micro = forward.batch, forward.micro
    scored = batch.scored[forward.flat].numpy()
    kl = np.where(scored, kl, 0.0)
    metrics: Metrics = {"kl/token/mean": mean_of(kl[scored])}
    per_sequence = {m: float(kl[micro.owners == m].sum()) for m in micro.members}
    # an episode's parts may lie in several passes
    metrics["kl/sequence/mean"] = Mean(sum(per_sequence.values()), float(batch.leading[list(micro.members)].sum()))
    for teacher in dict.fromkeys(batch.teachers[m] for m in micro.members):
        own = np.array([batch.teachers[o] == teacher for o in micro.owners])
        metrics[f"kl/token/{teacher}/mean"] = mean_of(kl[own & scored])
    if batch.num_bytes is not None and bool(batch.num_bytes.any()):
        sizes = {m: int(batch.num_bytes[m]) for m in micro.members if batch.num_bytes[m] > 0}
        metrics["kl/byte/mean"] = Mean(sum(per_sequence[m] for m in sizes), sum(sizes.values()))
    return metrics


def refuse_nan(values: np.ndarray, forward: Pass) -> None:
    """Raise ScoreError naming the rollout, the token and the teacher of the first value that is not finite."""
    bad = ~np.isfinite(values)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        owner = int(forward.micro.owners[index])
        raise ScoreError(
            f"rollout '{forward.batch.rollout_ids[owner]}': the reverse KL at token {int(forward.micro.places[index])} is "
            f"{values[index]}, expected a number; check the student and teacher '{forward.batch.teachers[owner]}' (opd check)"
        )
