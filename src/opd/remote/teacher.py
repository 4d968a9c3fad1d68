"""Teachers behind servers: they score the tokens that the student sampled."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from opd.records import FailedScore, Rollout, SampledScore, Score, ScoredRollout, TopKScore
from opd.remote.client import Client, Deployment, Endpoint, Request
from opd.remote.protocol import Scores, ServerProtocol
from opd.remote.vllm import VllmProtocol
from opd.roles import OtherTemplate, Teacher


@dataclass(frozen=True)
class RemoteTeacher:
    """A model behind servers with the student's tokens. identity: its name there, or its weights. context: the longest sequence
    that it scores, in tokens. top: how many of its likeliest tokens it returns at each place (0: none). unknown: why its tokenizer
    could not be compared with the student's, "" where it was. template: both renderings of a prompt, where its chat template may
    differ from the student's."""

    name: str
    deployment: Deployment
    identity: str
    client: Client
    context: int | None = None
    top: int = 0
    unknown: str = ""
    protocol: ServerProtocol = field(default_factory=VllmProtocol)
    template: OtherTemplate | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The scores of rollouts in order, requested all at once. A FailedScore says why the server gave none."""
        fits = [i for i, r in enumerate(rollouts) if self.context is None or len(r.token_ids) <= self.context]
        with self.deployment.in_use():
            endpoint = self.deployment.latest()
            requests = [self._request(endpoint, rollouts[i].token_ids) for i in fits]
            answers = self.client.send_to(self.deployment, requests)
        found: dict[int, ScoredRollout] = {}
        for i, answer in zip(fits, answers, strict=True):
            if answer.value is None:
                score: Score = FailedScore(self.name, answer.reason, lost=True)
            else:
                score = self._score(rollouts[i], answer.value)
            found[i] = ScoredRollout(rollouts[i], score, retries=answer.retries)
        return [found[i] if i in found else self._too_long(r) for i, r in enumerate(rollouts)]

    def _request(self, endpoint: Endpoint, token_ids: np.ndarray) -> Request[Scores]:
        ids = token_ids.tolist()
        body = self.protocol.score_body(endpoint, ids, top=self.top)
        read = partial(self.protocol.read_scores, token_ids=ids, top=self.top)
        return Request(endpoint, self.protocol.path, body, read, decoder=self.protocol.score_decoder)

    def _score(self, rollout: Rollout, found: Scores) -> Score:
        mask = rollout.loss_mask
        logprobs = np.where(mask, found.logprobs, np.float32(0))
        if not self.top:
            return SampledScore(self.name, logprobs)
        return TopKScore(self.name, logprobs, found.ids[mask], found.top_k_logprobs[mask])

    def _too_long(self, rollout: Rollout) -> ScoredRollout:
        reason = f"{len(rollout.token_ids)} tokens exceed the context of teacher '{self.name}' ({self.context})"
        return ScoredRollout(rollout, FailedScore(self.name, reason))


class LocalAndRemoteTeachers:
    """Teachers behind servers and teachers in process; both kinds score at the same time."""

    def __init__(self, local: Teacher, remote: Mapping[str, RemoteTeacher]) -> None:
        self._local = local
        self._remote = dict(remote)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        local = [i for i, r in enumerate(rollouts) if r.prompt.teacher not in self._remote]
        remote: dict[str, list[int]] = {}
        for i, r in enumerate(rollouts):
            if r.prompt.teacher in self._remote:
                remote.setdefault(r.prompt.teacher, []).append(i)
        with ThreadPoolExecutor(max(1, len(remote)), thread_name_prefix="opd-remote") as pool:
            waiting = [
                (places, pool.submit(self._remote[name].score, [rollouts[i] for i in places]))
                for name, places in remote.items()
            ]
            found = dict(zip(local, self._local.score([rollouts[i] for i in local]) if local else [], strict=True))
            for places, scored in waiting:
                found |= dict(zip(places, scored.result(), strict=True))
        return [found[i] for i in range(len(rollouts))]


def identities_of(remote: Mapping[str, RemoteTeacher]) -> dict[str, str]:
    """What must not change during a run, in words."""
    return {f"teacher '{name}'": f"served model '{teacher.identity}'" for name, teacher in remote.items()}


def templates_of(remote: Mapping[str, RemoteTeacher]) -> dict[str, OtherTemplate]:
    """The teachers whose chat template may differ from the student's."""
    return {name: teacher.template for name, teacher in remote.items() if teacher.template is not None}
