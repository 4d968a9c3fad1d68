"""A teacher that caches its scores, the keys of the cache, and a probe that detects changed weights."""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from opd.config import Config
from opd.records import FailedScore, Prompt, Rollout, Score, ScoredRollout, Turn
from opd.roles import INITIAL_STUDENT, Backend, Teacher
from opd.text.tokenizer import PROBE

_LOWEST = -50.0  # nats; a probability of 0 has no distance

Probe: TypeAlias = np.ndarray | str
"""A teacher's log-probabilities of a probe text [tokens], nats; or why it gave none. Empty where weights identify the teacher."""


class Key(NamedTuple):
    """The teacher, by the name that prompts use, and a hash of everything in the rollout that its score depends on."""

    teacher: str
    response: str


class ScoreStore(Protocol):
    """Holds scores by key. Threads may share one."""

    def get(self, keys: Collection[Key]) -> dict[Key, Score]:
        """The scores that are stored, of these keys."""
        ...

    def put(self, scores: Mapping[Key, Score]) -> None:
        """Store scores; a full store may forget some."""
        ...


class MemoryScores:
    """The `size` scores that were used last (`ScoreStore`)."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._scores: OrderedDict[Key, Score] = OrderedDict()

    def get(self, keys: Collection[Key]) -> dict[Key, Score]:
        with self._lock:
            found = {key: self._scores[key] for key in keys if key in self._scores}
            for key in found:
                self._scores.move_to_end(key)
        return found

    def put(self, scores: Mapping[Key, Score]) -> None:
        with self._lock:
            self._scores.update(scores)
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)


class CachedTeacher:
    """A teacher whose scores are stored; failed scores are not. Two of them, one around the other, search two stores in turn.

    A student with low entropy repeats its responses, and a large teacher takes most of a step. A cached score was computed in
    another packed pass, so it may differ from a new one in the last digits.
    """

    def __init__(self, teacher: Teacher, store: ScoreStore) -> None:
        self._teacher = teacher
        self._store = store

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout's score, marked as cached where an earlier call made it; equal rollouts of one call share one score."""
        keys = [key_of(r) for r in rollouts]
        known = self._store.get(list(dict.fromkeys(keys)))
        new = {key: rollout for key, rollout in zip(keys, rollouts, strict=True) if key not in known}
        fresh = dict(zip(new, self._teacher.score(list(new.values())) if new else [], strict=True))
        self._store.put({k: item.score for k, item in fresh.items() if not isinstance(item.score, FailedScore)})
        found = []
        for key, rollout in zip(keys, rollouts, strict=True):
            if key in known:
                found.append(ScoredRollout(rollout, known[key], cached=True))
            else:
                item = fresh[key]
                first = item.rollout is rollout  # the one of several equal rollouts that the teacher scored
                found.append(
                    ScoredRollout(rollout, item.score, cached=item.cached, retries=item.retries if first else 0)
                )
        return found


def key_of(rollout: Rollout) -> Key:
    """The key of a rollout: its teacher, its conversation with tools, its sampled tokens, and which of them are actions.

    The reward, the finish and the rollout log-probabilities are left out: no score depends on them.
    """
    turns = [(turn.author, turn.start, turn.end) for turn in rollout.turns]
    text = json.dumps([rollout.messages, rollout.prompt.tools, turns], sort_keys=True, default=dict)
    # JSON marks its own end, and the two arrays have one length, so no two rollouts give the same bytes
    arrays = rollout.token_ids.astype("<i8").tobytes() + rollout.loss_mask.astype(np.bool_).tobytes()
    return Key(rollout.prompt.teacher, hashlib.sha256(text.encode() + arrays).hexdigest())


def identities(config: Config, backend: Backend) -> dict[str, dict[str, Any]]:
    """By teacher, plain values that differ wherever its scores of one rollout may differ.

    Left out are settings that move scores by rounding alone (the device, the packing), and settings that no score depends on,
    such as seeds and the optimizer.
    """
    facts = backend.facts()
    found: dict[str, dict[str, Any]] = {}
    for name, teacher in config.teachers.items():
        identity: dict[str, Any] = {"name": name, "temperature": config.temperature}
        if teacher.remote:
            # the probe detects changed weights
            identity["model"] = backend.identities[f"teacher '{name}'"]
            identity["named"] = config.objective.top_k if config.objective.type == "top_k" else 0
            if teacher.engines is not None:
                identity["engine"] = [config.compute.dtype, teacher.engine_args]
            found[name] = identity
            continue
        weights = teacher.weights or {name: 1.0}
        identity["models"] = {
            part: [weight, backend.identities[f"teacher '{part}'"]] for part, weight in weights.items()
        }
        # the teacher's own chat template renders its prompts, and may read the clock
        tokenizers = {part: backend.identities.get(f"the tokenizer of teacher '{part}'") for part in weights}
        if name not in facts.cross_tokenizer and any(tokenizers.values()):
            identity["prompts"] = tokenizers
        identity["states"] = config.objective.needs_distributions
        identity["dtype"] = "mixed" if config.cluster.mixed_precision else config.compute.dtype
        if name in facts.cross_tokenizer:
            found[name] = identity | _alignment(config, backend, name)
            continue
        identity["vocab_size"] = facts.vocab_size  # ids beyond it have no probability
        if (reference := config.objective.reference) is not None:
            who = INITIAL_STUDENT if reference == "student" else reference
            identity["reference"] = [reference, config.objective.extrapolation, backend.identities[f"teacher '{who}'"]]
            if own := backend.identities.get(f"the tokenizer of teacher '{who}'"):
                identity["reference"].append(own)
        found[name] = identity
    return found


def _alignment(config: Config, backend: Backend, name: str) -> dict[str, Any]:
    """What the alignment of a cross-tokenizer teacher's tokens with the student's depends on."""
    return {
        "student": config.student,  # its tokens and its declared end tokens
        "ends": "as templates write them",
        "tokenizers": [
            backend.identities["the student's tokenizer"],
            backend.identities[f"the tokenizer of teacher '{name}'"],
        ],
        "shared_vocabulary": config.objective.type == "top_k",
        "floor": config.objective.teacher_logprob_floor,
        "non_canonical": config.alignment.non_canonical,
        "tool_calls": [config.alignment.tool_calls, config.episodes.tool_syntax],
        "vocab_size": backend.facts().cross_tokenizer[name],
    }


def probe(teacher: Teacher, names: Collection[str], *, known: Collection[str], tokenizer: Any) -> dict[str, Probe]:
    """Each teacher's log-probabilities of a probe text [tokens - 1], nats, or why it gave none. Empty for the `known` teachers,
    which their weights identify.

    A server may hold other weights tomorrow under today's name; the probe detects that.
    """
    token_ids = np.array(tokenizer(PROBE, add_special_tokens=False).input_ids, dtype=np.int32)
    found: dict[str, Probe] = {name: np.zeros(0, dtype=np.float32) for name in names}
    probes = [_probe_rollout(name, token_ids) for name in names if name not in known]
    for item in teacher.score(probes) if probes else []:
        name = item.rollout.prompt.teacher
        if isinstance(item.score, FailedScore):
            found[name] = item.score.reason
        else:
            found[name] = np.maximum(item.score.logprobs[1:], np.float32(_LOWEST))
    return found


def _probe_rollout(teacher: str, token_ids: np.ndarray) -> Rollout:
    """The probe text, all but its first token written by the student."""
    messages = ({"role": "user", "content": ""}, {"role": "assistant", "content": PROBE})
    size = len(token_ids)
    return Rollout(
        prompt=Prompt(f"probe of {teacher}", messages[:1], teacher=teacher, task="probe"),
        sample=0,
        token_ids=token_ids,
        loss_mask=np.arange(size) >= 1,
        rollout_logprobs=np.zeros(size, dtype=np.float32),
        turns=(Turn("prompt", 0, 1), Turn("student", 1, size)),
        messages=messages,
        finish="end",
        policy_version=0,
    )
