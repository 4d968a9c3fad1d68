"""Teachers behind servers: they score the very tokens that the student sampled."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from opd.records import FailedScore, Rollout, SampledScore, Score, ScoredRollout, SupportScore
from opd.roles import Teacher
from opd.served.completions import PATH, Scores, read_scores, score_body
from opd.served.wire import Call, Endpoint, Wire


@dataclass(frozen=True)
class ServedTeacher:
    """A model that a server holds and that has the student's tokens; context: the longest sequence that it scores;
    top: how many of its likeliest tokens it names at each place (0: none); unknown: why its tokenizer could not be compared with
    the student's, if it could not."""

    name: str
    endpoint: Endpoint
    wire: Wire
    context: int | None = None
    top: int = 0
    unknown: str = ""

    def start(self, rollouts: Sequence[Rollout]) -> Callable[[], list[ScoredRollout]]:
        """Ask for the scores of rollouts, at once; returns what waits for them, in order. What the server could not score says
        why."""
        fits = [i for i, r in enumerate(rollouts) if self.context is None or len(r.token_ids) <= self.context]
        calls = [self._call(rollouts[i].token_ids) for i in fits]
        asked = self.wire.start(calls)

        def wait() -> list[ScoredRollout]:
            found: dict[int, ScoredRollout] = {}
            for i, answer in zip(fits, asked.result(), strict=True):
                rollout = rollouts[i]
                if answer.value is None:
                    score = FailedScore(self.name, answer.reason, lost=True)
                else:
                    score = self._score(rollout, answer.value)
                found[i] = ScoredRollout(rollout, score, retries=answer.retries)
            return [found[i] if i in found else self._too_long(r) for i, r in enumerate(rollouts)]

        return wait

    def _call(self, token_ids: np.ndarray) -> Call[Scores]:
        ids = token_ids.tolist()
        body = score_body(self.endpoint.model, ids, top=self.top)
        return Call(self.endpoint, PATH, body, partial(read_scores, token_ids=ids, top=self.top))

    def _score(self, rollout: Rollout, found: Scores) -> Score:
        mask = rollout.loss_mask
        logprobs = np.where(mask, found.logprobs, np.float32(0))
        if not self.top:
            return SampledScore(self.name, logprobs)
        return SupportScore(self.name, logprobs, found.ids[mask], found.named[mask])

    def _too_long(self, rollout: Rollout) -> ScoredRollout:
        reason = f"{len(rollout.token_ids)} tokens exceed the context of teacher '{self.name}' ({self.context})"
        return ScoredRollout(rollout, FailedScore(self.name, reason))


class WithServed:
    """Teachers behind servers, and others: while the servers are asked, the others score."""

    def __init__(self, others: Teacher, served: Mapping[str, ServedTeacher]) -> None:
        self._others = others
        self._served = dict(served)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        waiting = []
        for name, teacher in self._served.items():
            mine = [i for i, r in enumerate(rollouts) if r.prompt.teacher == name]
            if mine:
                waiting.append((mine, teacher.start([rollouts[i] for i in mine])))
        here = [i for i, r in enumerate(rollouts) if r.prompt.teacher not in self._served]
        found = dict(zip(here, self._others.score([rollouts[i] for i in here]) if here else [], strict=True))
        for mine, wait in waiting:
            found |= dict(zip(mine, wait(), strict=True))
        return [found[i] for i in range(len(rollouts))]
