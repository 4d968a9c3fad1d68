"""Teachers behind servers: they score the very tokens that the student sampled."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from opd.records import FailedScore, Rollout, SampledScore, Score, ScoredRollout, TopKScore
from opd.remote.client import Call, Client, Endpoint
from opd.remote.endpoints import RemoteModel
from opd.remote.protocol import Form, Scores
from opd.remote.vllm import VLLM
from opd.roles import OtherTemplate, Teacher


@dataclass(frozen=True)
class RemoteTeacher:
    """A model that a server holds and that has the student's tokens; served: its name there; context: the longest sequence that it
    scores; top: how many of its likeliest tokens it names at each place (0: none); unknown: why its tokenizer could not be compared
    with the student's, if it could not; form: how its servers are asked; template: where its chat template is not known to be the
    student's, in which it is asked, both."""

    name: str
    model: RemoteModel
    remote: str
    client: Client
    context: int | None = None
    top: int = 0
    unknown: str = ""
    form: Form = VLLM
    template: OtherTemplate | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The scores of rollouts, all asked for at once, in order. What the server could not score says why."""
        fits = [i for i, r in enumerate(rollouts) if self.context is None or len(r.token_ids) <= self.context]
        with self.model.using():
            endpoint = self.model.newest()
            calls = [self._call(endpoint, rollouts[i].token_ids) for i in fits]
            answers = self.client.ask_again(calls, self.client.ask(calls), self.model.again)
        found: dict[int, ScoredRollout] = {}
        for i, answer in zip(fits, answers, strict=True):
            if answer.value is None:
                score: Score = FailedScore(self.name, answer.reason, lost=True)
            else:
                score = self._score(rollouts[i], answer.value)
            found[i] = ScoredRollout(rollouts[i], score, retries=answer.retries)
        return [found[i] if i in found else self._too_long(r) for i, r in enumerate(rollouts)]

    def _call(self, endpoint: Endpoint, token_ids: np.ndarray) -> Call[Scores]:
        ids = token_ids.tolist()
        body = self.form.score_body(endpoint, ids, top=self.top)
        read = partial(self.form.read_scores, token_ids=ids, top=self.top)
        return Call(endpoint, self.form.path, body, read, decoder=self.form.scores)

    def _score(self, rollout: Rollout, found: Scores) -> Score:
        mask = rollout.loss_mask
        logprobs = np.where(mask, found.logprobs, np.float32(0))
        if not self.top:
            return SampledScore(self.name, logprobs)
        return TopKScore(self.name, logprobs, found.ids[mask], found.named[mask])

    def _too_long(self, rollout: Rollout) -> ScoredRollout:
        reason = f"{len(rollout.token_ids)} tokens exceed the context of teacher '{self.name}' ({self.context})"
        return ScoredRollout(rollout, FailedScore(self.name, reason))


class WithRemote:
    """Teachers behind servers, and others: while the servers are asked, the others score."""

    def __init__(self, others: Teacher, remote: Mapping[str, RemoteTeacher]) -> None:
        self._others = others
        self._remote = dict(remote)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        mine = {name: [i for i, r in enumerate(rollouts) if r.prompt.teacher == name] for name in self._remote}
        asked = {name: [rollouts[i] for i in places] for name, places in mine.items() if places}
        here = [i for i, r in enumerate(rollouts) if r.prompt.teacher not in self._remote]
        with ThreadPoolExecutor(max(1, len(asked)), thread_name_prefix="opd-served") as pool:
            waiting = {name: pool.submit(self._remote[name].score, own) for name, own in asked.items()}
            found = dict(zip(here, self._others.score([rollouts[i] for i in here]) if here else [], strict=True))
            for name, scored in waiting.items():
                found |= dict(zip(mine[name], scored.result(), strict=True))
        return [found[i] for i in range(len(rollouts))]


def identities_of(remote: Mapping[str, RemoteTeacher]) -> dict[str, str]:
    """What must not change under a run, in words."""
    return {f"teacher '{name}'": f"served model '{teacher.remote}'" for name, teacher in remote.items()}


def templates_of(remote: Mapping[str, RemoteTeacher]) -> dict[str, OtherTemplate]:
    """Those of which it is not known that they render prompts as the student does."""
    return {name: teacher.template for name, teacher in remote.items() if teacher.template is not None}
