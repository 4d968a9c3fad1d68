"""A teacher that keeps its scores: a frozen one says the same of the same response, so it need not be asked twice."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from opd.records import FailedScore, Rollout, Score, ScoredRollout
from opd.roles import Teacher


class Key(NamedTuple):
    """Whose score, by the name that prompts call a teacher, and of what: a hash of all that its score depends on."""

    teacher: str
    response: str


class Kept(Protocol):
    """A place where scores are kept. Threads may share one."""

    def find(self, keys: Collection[Key]) -> dict[Key, Score]:
        """Those of the scores that are there."""
        ...

    def keep(self, scores: Mapping[Key, Score]) -> None:
        """Put scores there; a place that is full may forget."""
        ...


class InMemory:
    """The scores that were used last, `size` of them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._scores: OrderedDict[Key, Score] = OrderedDict()

    def find(self, keys: Collection[Key]) -> dict[Key, Score]:
        """Those of the scores that are there, now the youngest."""
        with self._lock:
            found = {key: self._scores[key] for key in keys if key in self._scores}
            for key in found:
                self._scores.move_to_end(key)
        return found

    def keep(self, scores: Mapping[Key, Score]) -> None:
        """Put scores there, the oldest out."""
        with self._lock:
            self._scores.update(scores)
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


class CachedTeacher:
    """A teacher whose scores are kept in one place or several, the first of which is asked first; failures are kept nowhere.

    A student that is nearly sure writes the same responses to the same prompts over and over, and a large teacher is most of a
    step. A score that is kept was computed in another packed pass, so it may differ in the last digits from one made anew.
    """

    def __init__(self, teacher: Teacher, places: Sequence[Kept]) -> None:
        self._teacher = teacher
        self._places = tuple(places)

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout's score, marked as cached where it was made in an earlier call; equal rollouts of one call share one."""
        keys = [key_of(r) for r in rollouts]
        known: dict[Key, Score] = {}
        missed = []
        for place in self._places:
            missed.append([key for key in dict.fromkeys(keys) if key not in known])
            known |= place.find(missed[-1])
            missed[-1] = [key for key in missed[-1] if key not in known]
        new = {key: rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known}
        asked = self._teacher.score(list(new.values())) if new else []
        fresh = dict(zip(new, asked, strict=True))
        made = {key: item.score for key, item in fresh.items() if not isinstance(item.score, FailedScore)}
        for place, lacking in zip(self._places, missed, strict=True):
            place.keep({key: score for key in lacking if (score := known.get(key) or made.get(key)) is not None})
        found = []
        for key, rollout in zip(keys, rollouts, strict=True):
            if key in known:
                found.append(ScoredRollout(rollout, known[key], cached=True))
            else:
                own = fresh[key].rollout is rollout  # one of several equal ones was asked for
                found.append(ScoredRollout(rollout, fresh[key].score, retries=fresh[key].retries if own else 0))
        return found


def key_of(rollout: Rollout) -> Key:
    """Who is asked, and of what: the conversation with its tools, the sampled tokens, and which of them are actions.

    Neither what came of it (reward, finish) nor how likely it was counts: no score depends on that.
    """
    turns = [(turn.author, turn.start, turn.end) for turn in rollout.turns]
    said = json.dumps([rollout.messages, rollout.prompt.tools, turns], sort_keys=True, default=dict)
    # JSON says itself where it ends, and the arrays behind it are of one length
    arrays = rollout.token_ids.astype("<i8").tobytes() + rollout.loss_mask.astype(np.bool_).tobytes()
    digest = hashlib.sha256(said.encode() + arrays)
    return Key(rollout.prompt.teacher, digest.hexdigest())
