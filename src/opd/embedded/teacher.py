"""Teachers in process: adapters on the student's base, or models of their own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opd.data.micro import micro_batches
from opd.embedded.network import Network
from opd.objectives.logprobs import token_logprobs
from opd.records import FailedScore, HiddenScore, Rollout, SampledScore, Score, ScoredRollout


@dataclass(frozen=True)
class Voice:
    """One policy: a network and the adapter that speaks (None: the network's own weights)."""

    network: Network
    adapter: str | None


class EmbeddedTeachers:
    """Scores each rollout by the teacher that its prompt names.

    With `keep_hidden` a score carries the teacher's hidden states before each action, from which `head(name)` gives the
    full distribution; without, the sampled tokens' log-probabilities alone.
    """

    def __init__(
        self, voices: Mapping[str, Voice], *, vocab_size: int, temperature: float, max_tokens: int, keep_hidden: bool
    ) -> None:
        self._voices = dict(voices)
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._keep_hidden = keep_hidden

    def head(self, teacher: str) -> Tensor:
        """The teacher's output head over the shared vocabulary, [vocab, hidden]."""
        return self._voices[teacher].network.head_weight()[: self._vocab_size]

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given; what cannot be scored says why."""
        scores: dict[int, Score] = {}
        for teacher in dict.fromkeys(r.prompt.teacher for r in rollouts):
            mine = [i for i, r in enumerate(rollouts) if r.prompt.teacher == teacher]
            voice = self._voices[teacher]
            limit = voice.network.max_context
            short = [i for i in mine if limit is None or len(rollouts[i].token_ids) <= limit]
            for i in set(mine) - set(short):
                reason = f"{len(rollouts[i].token_ids)} tokens exceed the context of teacher '{teacher}' ({limit})"
                scores[i] = FailedScore(teacher, reason)
            scores.update(zip(short, self._score(teacher, voice, [rollouts[i] for i in short]), strict=True))
        return [ScoredRollout(r, scores[i]) for i, r in enumerate(rollouts)]

    @torch.no_grad()
    def _score(self, teacher: str, voice: Voice, rollouts: Sequence[Rollout]) -> list[Score]:
        network = voice.network
        network.activate(voice.adapter)
        head = self.head(teacher)
        found: list[Score | None] = [None] * len(rollouts)
        sequences, masks = [r.token_ids for r in rollouts], [r.loss_mask for r in rollouts]
        for micro in micro_batches(sequences, masks, max_tokens=self._max_tokens):
            nodes, inverse = np.unique(micro.states, return_inverse=True)
            hidden = network.hidden_states(micro.tree)[torch.from_numpy(nodes).to(network.device)]
            every = hidden[torch.from_numpy(inverse).to(network.device)]
            targets = torch.from_numpy(micro.targets).to(network.device)
            logprobs = token_logprobs(every, head, targets, temperature=self._temperature).cpu().numpy()
            states = every.float().cpu().numpy() if self._keep_hidden else None
            for member in micro.members:
                mine = micro.owners == member
                spread = np.zeros(len(sequences[member]), dtype=np.float32)
                spread[micro.places[mine]] = logprobs[mine]
                found[member] = (
                    SampledScore(teacher, spread) if states is None else HiddenScore(teacher, spread, states[mine])
                )
        return [score for score in found if score is not None]
