"""Scores that are kept: a frozen teacher says the same of the same response, so it need not be asked twice."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from opd.records import FailedScore, Rollout, Score, ScoredRollout
from opd.roles import Teacher


class CachedTeacher:
    """A teacher that remembers its scores of the last `size` distinct responses; failures are asked for again.

    A student that is nearly sure writes the same responses to the same prompts over and over, and a large teacher is most of a
    step. A score that is kept was computed in another packed pass, so it may differ in the last digits from one made anew.
    """

    def __init__(self, teacher: Teacher, *, size: int) -> None:
        self._teacher = teacher
        self._size = size
        self._lock = threading.Lock()  # units of a step score at once
        self._kept: OrderedDict[Hashable, Score] = OrderedDict()

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout's score, marked as cached where it was made in an earlier call; equal rollouts of one call share one."""
        keys = [_key(r) for r in rollouts]
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
        new = {key: rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known}
        asked = self._teacher.score(list(new.values())) if new else []
        fresh = dict(zip(new, asked, strict=True))
        with self._lock:
            for key in dict.fromkeys(keys):
                score = known.get(key) or fresh[key].score
                if not isinstance(score, FailedScore):
                    self._kept[key] = score
                    self._kept.move_to_end(key)
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        found = []
        for key, rollout in zip(keys, rollouts, strict=True):
            if key in known:
                found.append(ScoredRollout(rollout, known[key], cached=True))
            else:
                own = fresh[key].rollout is rollout  # one of several equal ones was asked for
                found.append(ScoredRollout(rollout, fresh[key].score, retries=fresh[key].retries if own else 0))
        return found


def _key(rollout: Rollout) -> Hashable:
    """All that a score depends on: who is asked, the conversation, the sampled tokens, and which of them are actions."""
    said = tuple(tuple(sorted(m.items())) for m in rollout.messages)
    return rollout.prompt.teacher, said, rollout.token_ids.tobytes(), rollout.loss_mask.tobytes(), rollout.turns
