"""Teachers in process: adapters on the student's base, or models of their own, with the student's tokenizer or another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from opd.errors import DataError
from opd.local.cross_tokenizer import CrossTokenizerPolicy, score_cross_tokenizer
from opd.models.micro_batches import micro_batches
from opd.models.network import Network
from opd.objectives.logprobs import token_logprobs
from opd.records import FailedScore, HiddenPart, HiddenScore, Rollout, SampledScore, Score, ScoredRollout
from opd.text.teacher_prompt import OwnPrompt, Shown, as_sampled


@dataclass(frozen=True)
class Policy:
    """One policy: a network, the adapter that speaks (None: the network's own weights), and how it is shown rollouts (None: as the
    student sampled them)."""

    network: Network
    adapter: str | None
    prompts: OwnPrompt | None = None

    def shown(self, rollout: Rollout) -> list[Shown]:
        """What the network reads of a rollout. Raises DataError when its chat template refuses the conversation."""
        return as_sampled(rollout) if self.prompts is None else self.prompts.read(rollout)


@dataclass(frozen=True)
class Part:
    """One policy of a target: the name of its head, who speaks, and its weight in log q."""

    name: str
    policy: Policy
    weight: float = 1.0


Target: TypeAlias = tuple[Part, ...]
"""What a prompt's teacher key stands for, log q = sum_k weight_k log q_k: one part for an ordinary teacher."""


class LocalTeachers:
    """Scores each rollout by the teacher that its prompt names.

    With `keep_hidden` a score carries the teacher's hidden states before each action, from which the heads give the
    full distribution; without, the sampled tokens' log-probabilities alone. Teachers in `foreign` have another tokenizer and
    score in chunks.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        *,
        vocab_size: int,
        temperature: float,
        max_tokens: int,
        keep_hidden: bool,
        cross_tokenizer: Mapping[str, CrossTokenizerPolicy] | None = None,
    ) -> None:
        self._targets = dict(targets)
        self._cross_tokenizer = dict(cross_tokenizer or {})
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._keep_hidden = keep_hidden

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given; what cannot be scored says why."""
        scores: dict[int, Score] = {}
        # All of them, in their order: ranks that share a sharded teacher ask it together, with rollouts of it or without.
        for teacher in (*self._targets, *self._cross_tokenizer):
            if teacher in self._cross_tokenizer:
                mine = [i for i, r in enumerate(rollouts) if r.prompt.teacher == teacher]
                policy, asked = self._cross_tokenizer[teacher], [rollouts[i] for i in mine]
                found = score_cross_tokenizer(
                    teacher, policy, asked, temperature=self._temperature, max_tokens=self._max_tokens
                )
                scores.update(zip(mine, found, strict=True))
                continue
            target = self._targets[teacher]
            fits: dict[int, list[list[Shown]]] = {}
            for i, rollout in enumerate(rollouts):
                if rollout.prompt.teacher != teacher:
                    continue
                try:
                    fits[i] = _readings(teacher, target, rollout)
                except DataError as error:
                    scores[i] = FailedScore(teacher, str(error))
            found = self._score(teacher, target, [rollouts[i] for i in fits], list(fits.values()))
            scores.update(zip(fits, found, strict=True))
        return [ScoredRollout(r, scores[i]) for i, r in enumerate(rollouts)]

    def _score(
        self, teacher: str, target: Target, rollouts: Sequence[Rollout], readings: Sequence[Sequence[Sequence[Shown]]]
    ) -> list[Score]:
        """readings: of each rollout what each part of the target reads."""
        every = [
            (part, self._speak(part.policy, rollouts, [parts[k] for parts in readings]))
            for k, part in enumerate(target)
        ]
        scores: list[Score] = []
        for i in range(len(rollouts)):
            logprobs = np.zeros(len(rollouts[i].token_ids), dtype=np.float32)
            for part, (spread, _) in every:
                logprobs += np.float32(part.weight) * spread[i]
            components = tuple((part.weight, spread[i]) for part, (spread, _) in every)
            components = components if len(target) > 1 else ()
            if self._keep_hidden:
                parts = tuple(HiddenPart(part.name, part.weight, hidden[i]) for part, (_, hidden) in every)
                scores.append(HiddenScore(teacher, logprobs, parts, components))
            else:
                scores.append(SampledScore(teacher, logprobs, components))
        return scores

    @torch.no_grad()
    def _speak(
        self, policy: Policy, rollouts: Sequence[Rollout], readings: Sequence[Sequence[Shown]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """One policy's log-probabilities [tokens] of each rollout, and its hidden states [actions, hidden]."""
        network = policy.network
        network.activate(policy.adapter)
        head = network.head_weight()[: self._vocab_size]
        shown = [each for teacher_text in readings for each in teacher_text]
        sequences, masks = [each.token_ids for each in shown], [each.mask for each in shown]
        values = [np.zeros(int(mask.sum()), dtype=np.float32) for mask in masks]
        states: list[np.ndarray] = [np.zeros((0, head.shape[1]), dtype=np.float32) for _ in sequences]
        for micro in network.rounds(micro_batches(sequences, masks, max_tokens=self._max_tokens)):
            nodes, inverse = np.unique(micro.states, return_inverse=True)
            hidden = network.hidden_states(micro.tree)[torch.from_numpy(nodes).to(network.device)]
            every = hidden[torch.from_numpy(inverse).to(network.device)]
            targets = torch.from_numpy(micro.targets).to(network.device)
            found = token_logprobs(every, head, targets, temperature=self._temperature).cpu().numpy()
            plain = every.float().cpu().numpy() if self._keep_hidden else None
            for member in micro.members:
                mine = micro.owners == member
                values[member] = found[mine]
                if plain is not None:
                    states[member] = plain[mine]
        logprobs = [np.zeros(len(r.token_ids), dtype=np.float32) for r in rollouts]
        joined, first = [], 0
        for rollout, spread, teacher_text in zip(rollouts, logprobs, readings, strict=True):
            spread[rollout.loss_mask] = np.concatenate(values[first : first + len(teacher_text)])
            joined.append(np.concatenate(states[first : first + len(teacher_text)]))
            first += len(teacher_text)
        return logprobs, joined


def _readings(teacher: str, target: Target, rollout: Rollout) -> list[list[Shown]]:
    """What each part of a target reads of a rollout. Raises DataError for what it cannot read."""
    found = []
    for part in target:
        found.append(part.policy.shown(rollout))
        longest, limit = max(len(each.token_ids) for each in found[-1]), part.policy.network.limit
        if limit is not None and longest > limit.tokens:
            who = f"teacher '{teacher}'"
            raise DataError(f"{longest} tokens exceed {limit.of(who)}")
    return found
