"""A teacher in process that has another tokenizer: it reads the text in its own tokens, and its score comes back in chunks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from opd.errors import DataError
from opd.models.micro_batches import micro_batches
from opd.models.network import Network
from opd.objectives.logprobs import token_logprobs
from opd.objectives.target import target_logprobs
from opd.records import ChunkScore, FailedScore, HiddenPart, Rollout, Score
from opd.text.alignment import TurnPair, chunk_score, pair_turns, same_tokens
from opd.text.shared_vocabulary import SharedVocabulary
from opd.text.student_text import StudentSide
from opd.text.teacher_text import TeacherSide
from opd.text.tokenizer import described_token
from opd.text.tool_calls import Syntax


@dataclass(frozen=True)
class CrossTokenizerPolicy:
    """A network, how it reads, and how the student writes whose tokens it is asked about; with `cells` its scores carry its
    states where both sides chose the same token. own_syntax: how the student writes tool calls, where the network is to read them
    as its own template writes them."""

    network: Network
    adapter: str | None
    teacher_side: TeacherSide
    student_side: StudentSide
    logprob_floor: float
    mask_non_canonical: bool = False
    cells: SharedVocabulary | None = None
    own_syntax: Syntax | None = None


def score_cross_tokenizer(
    teacher: str, policy: CrossTokenizerPolicy, rollouts: Sequence[Rollout], *, temperature: float, max_tokens: int
) -> list[Score]:
    """Each rollout's score in chunks; what the teacher cannot read says why."""
    scores: dict[int, Score] = {}
    turns: list[TurnPair] = []
    owners: list[int] = []
    for i, rollout in enumerate(rollouts):
        if not rollout.num_actions:
            scores[i] = FailedScore(teacher, "no turn of the student")
            continue
        try:
            lined_up = pair_turns(
                rollout,
                policy.student_side,
                policy.teacher_side,
                mask_non_canonical=policy.mask_non_canonical,
                own_syntax=policy.own_syntax,
            )
        except DataError as error:
            scores[i] = FailedScore(teacher, str(error))
            continue
        longest = max(len(t.teacher_text.token_ids) + 1 for t in lined_up)
        limit = policy.network.limit
        if limit is not None and longest > limit.tokens:
            who = f"teacher '{teacher}'"
            scores[i] = FailedScore(teacher, f"{longest} tokens exceed {limit.of(who)}")
            continue
        beyond = next(
            (i for t in lined_up for i in t.teacher_text.token_ids.tolist() if i >= policy.network.vocab_size), None
        )
        if beyond is not None:
            token = described_token(policy.teacher_side.tokenizer, beyond)
            scores[i] = FailedScore(
                teacher, f"the text needs token {token}, for which teacher '{teacher}' has no embedding"
            )
            continue
        turns += lined_up
        owners += [i] * len(lined_up)
    spoken = _token_logprobs(policy, turns, temperature=temperature, max_tokens=max_tokens)
    for i, rollout in enumerate(rollouts):
        if i not in scores:
            mine = [k for k, owner in enumerate(owners) if owner == i]
            scores[i] = _score(teacher, policy, rollout, [turns[k] for k in mine], [spoken[k] for k in mine])
    return [scores[i] for i in range(len(rollouts))]


def _score(
    teacher: str, policy: CrossTokenizerPolicy, rollout: Rollout, turns: Sequence[TurnPair], spoken: Sequence["_Spoken"]
) -> ChunkScore:
    # The floor is of a token, as everywhere; a chunk's sum may be lower, so its tokens have theirs here.
    logprobs, floored = [], 0
    for said in spoken:
        found, below = target_logprobs([(torch.from_numpy(said.logprobs.copy()), 1.0)], policy.logprob_floor)
        logprobs.append(found.numpy())
        floored += 0 if below is None else int(below.sum())
    found = chunk_score(teacher, rollout, turns, logprobs)
    found = replace(found, facts={**found.facts, "floored": floored})
    if policy.cells is None:
        return found
    compared = np.zeros(len(rollout.token_ids), dtype=bool)
    states = []
    for turn, said in zip(turns, spoken, strict=True):
        theirs = np.append(turn.teacher_text.token_ids[turn.teacher_text.first :], [policy.teacher_side.end_ids[0]])
        ours = rollout.token_ids[turn.start : turn.stop].astype(np.int64)
        pairs = same_tokens(turn, ours, theirs, policy.cells)
        compared[turn.start + pairs[:, 0]] = True
        states.append(said.hidden[pairs[:, 1]])
    return replace(found, compared=compared, part=HiddenPart(teacher, 1.0, np.concatenate(states)))


@dataclass(frozen=True)
class _Spoken:
    """A teacher on one turn: log-probabilities of its tokens of the response and of the end where it is asked for [tokens],
    and, where they are wanted, its states before them [tokens, width]."""

    logprobs: np.ndarray
    hidden: np.ndarray


@torch.no_grad()
def _token_logprobs(
    policy: CrossTokenizerPolicy, turns: Sequence[TurnPair], *, temperature: float, max_tokens: int
) -> list[_Spoken]:
    """Each turn as the teacher's tokens have it, and ending the turn where the student did."""
    network = policy.network
    network.activate(policy.adapter)
    head = network.head_weight()
    end_ids = torch.tensor(policy.teacher_side.end_ids, device=network.device)
    sequences = [np.append(t.teacher_text.token_ids, policy.teacher_side.end_ids[0]) for t in turns]
    masks = [_asked(t) for t in turns]
    nothing = _Spoken(np.zeros(0), np.zeros((0, head.shape[1]), dtype=np.float32))
    found = [nothing] * len(turns)
    for micro in network.rounds(micro_batches(sequences, masks, max_tokens=max_tokens)):
        nodes, inverse = np.unique(micro.states, return_inverse=True)
        hidden = network.hidden_states(micro.tree)[torch.from_numpy(nodes).to(network.device)]
        every = hidden[torch.from_numpy(inverse).to(network.device)]
        targets = torch.from_numpy(micro.targets).to(network.device)
        logprobs = token_logprobs(every, head, targets, temperature=temperature)
        lengths = np.array([len(s) for s in sequences])
        last = micro.places == lengths[micro.owners] - 1  # asked for only where the student ended its turn
        if last.any():
            where = torch.from_numpy(np.flatnonzero(last)).to(network.device)
            states = every[where].repeat_interleave(len(end_ids), 0)
            each = token_logprobs(states, head, end_ids.repeat(len(where)), temperature=temperature)
            meant = [[i in turns[owner].end_ids for i in policy.teacher_side.end_ids] for owner in micro.owners[last]]
            others = ~torch.tensor(meant, device=network.device)
            logprobs[where] = each.view(len(where), -1).masked_fill(others, -torch.inf).logsumexp(-1)
        plain = logprobs.double().cpu().numpy()
        states = every.float().cpu().numpy() if policy.cells is not None else nothing.hidden
        for member in micro.members:
            mine = micro.owners == member
            found[member] = _Spoken(plain[mine], states[mine] if policy.cells is not None else nothing.hidden)
    return found


def _asked(turn: TurnPair) -> np.ndarray:
    """Which tokens of the teacher's sequence are scored: those of the response, and the end where the student chose it."""
    mask = np.arange(len(turn.teacher_text.token_ids) + 1) >= turn.teacher_text.first
    mask[-1] = turn.ends_turn
    return mask
