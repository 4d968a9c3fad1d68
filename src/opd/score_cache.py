"""A cache of teachers' scores, in memory and on disk, so that no teacher scores the same response twice.

On disk every score is a file, so that runs share them. A kill, a full disk or a damaged file costs only the scores it touches.

    FOLDER/IDENTITY-PROBE/teacher.json           what the scores depend on, and the teacher's own scores of a probe text
    FOLDER/IDENTITY-PROBE/ab/cdef....score       a score, under the hash of the rollout
    FOLDER/partial/...                           files that are being written, or that a killed process left

A file is written in `partial` and renamed, so no reader sees half a file. Two processes that write one score write the same file.
There are no locks, so several machines may mount the folder. A checksum over a file and its name detects damage.
"""

import hashlib
import json
import math
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args

import msgspec
import numpy as np

from opd.config import Config
from opd.errors import RunError
from opd.records import FailedScore, Prompt, Rollout, Score, ScoredRollout, Turn
from opd.roles import INITIAL_STUDENT, Backend, Teacher
from opd.text.tokenizer import PROBE

FORMAT = b"opd score 2\n"
_CHECKSUM = 32  # bytes of a SHA-256
_ABANDONED_S = 24 * 3600.0  # a file that is unfinished after a day belongs to a killed process

TOLERANCE = 0.1
"""Nats a token, on average over the probe text, within which a teacher counts as unchanged. A 135M model in bfloat16 moves by
0.039 when others are in its batch; two light LoRA experts of it lie 0.98 and 1.21 away."""

_KINDS: dict[str, type[Score]] = {kind.__name__: kind for kind in get_args(Score)}
_LOWEST = -50.0  # nats; a probability of 0 has no distance


Probe: TypeAlias = np.ndarray | str
"""A teacher's log-probabilities of a probe text [tokens], nats; or why it gave none. Empty where weights identify the teacher."""


class Key(NamedTuple):
    """The teacher, by the name that prompts use, and a hash of everything in the rollout that its score depends on."""

    teacher: str
    response: str


class MemoryScores:
    """The `size` scores that were used last. Threads may share them."""

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


def to_bytes(score: Score) -> bytes:
    """A score of any kind but a failed one, exact to the bit."""
    assert not isinstance(score, FailedScore)
    return msgspec.msgpack.encode((type(score).__name__, score), enc_hook=_plain)


def from_bytes(content: bytes, *, teacher: str) -> Score:
    """The score that `to_bytes` was given, under the name of this teacher."""
    kind, score = msgspec.msgpack.decode(content, type=tuple[str, msgspec.Raw])
    return replace(msgspec.msgpack.decode(score, type=_KINDS[kind], dec_hook=_array), teacher=teacher)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    return value.item()  # a scalar of numpy


def _array(_: type, parts: tuple[str, list[int], bytes]) -> np.ndarray:
    dtype, shape, content = parts
    return np.ndarray(shape, dtype, content)


class ScoreFiles:
    """Scores in a folder that outlives the process. Other runs may use it at the same time.

    identities: by teacher, everything but the rollout that its scores depend on (`identities`). probe: probes the teachers; called
    before the first score is read or written. Later trouble costs scores, never the run, and calls `warn` with one line. Threads
    may share it.

    Raises RunError when the folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | Path,
        identities: Mapping[str, Mapping[str, Any]],
        probe: Callable[[], Mapping[str, Probe]],
        warn: Callable[[str], None],
    ) -> None:
        self._folder = Path(folder)
        self._partial = self._folder / "partial"
        self._identities = identities
        self._probe = probe
        self._warn = warn
        self._lock = threading.RLock()
        self._folders: dict[str, Path] | None = None  # by teacher; None before the probe
        self._writes = True
        try:
            self._write(self._partial / "writable", b"")
            (self._partial / "writable").unlink(missing_ok=True)
        except OSError as error:
            raise RunError(
                f"compute.score_cache_folder = '{folder}' cannot be written to ({error.strerror}); name another folder, or leave "
                "it out"
            ) from None

    def get(self, keys: Collection[Key]) -> dict[Key, Score]:
        """The stored scores of these keys that are undamaged, exact to the bit."""
        folders = self._opened()
        found: dict[Key, Score] = {}
        damaged = 0
        for key in keys:
            if key.teacher not in folders:
                continue
            path = _path_of(folders[key.teacher], key)
            try:
                body = _checked(path, path.read_bytes())
            except FileNotFoundError:
                continue
            except OSError:
                body = None
            if body is None:
                damaged += 1
            else:
                found[key] = from_bytes(body, teacher=key.teacher)
        if damaged:
            self._warn(
                f"warning: {damaged} cached scores in '{self._folder}' are damaged; their teachers score these responses again"
            )
        return found

    def put(self, scores: Mapping[Key, Score]) -> None:
        """Write scores. After the first failure to write, nothing more is written."""
        folders = self._opened()
        for key, score in scores.items():
            if not self._writes or key.teacher not in folders:
                continue
            path = _path_of(folders[key.teacher], key)
            body = to_bytes(score)
            try:
                self._write(path, FORMAT + _checksum(path, body) + body)
            except OSError as error:
                self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            first, self._writes = self._writes, False
        if first:
            self._warn(
                f"warning: opd stops caching scores in '{self._folder}' ({error.strerror}). Training continues with the scores "
                "that are there; free space and restart, or delete the folder"
            )

    def _write(self, path: Path, content: bytes) -> None:
        """Write a whole file or none."""
        for folder in (self._partial, path.parent):
            folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted them
        # no other process, thread or machine uses this name
        staging = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            staging.write_bytes(content)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    def _opened(self) -> Mapping[str, Path]:
        """The folder of each teacher. The first caller probes the teachers; other threads wait."""
        with self._lock:
            if self._folders is not None:
                return self._folders
            self._remove_abandoned()
            folders: dict[str, Path] = {}
            for name, probe in self._probe().items():
                if isinstance(probe, str):
                    self._warn(
                        f"warning: scores of teacher '{name}' are not cached in '{self._folder}': it did not score a probe text: "
                        f"{probe}"
                    )
                    continue
                try:
                    folders[name] = self._folder_of(name, probe)
                except OSError as error:
                    self._stop_writing(error)
            self._folders = folders
            return folders

    def _remove_abandoned(self) -> None:
        """Remove the partial files of killed processes."""
        now = time.time()
        for path in self._partial.glob("*"):
            try:
                if now - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
            except OSError:
                continue  # another process removed it

    def _folder_of(self, name: str, probe: np.ndarray) -> Path:
        """The folder of the teacher with its present weights, made if there is none. Raises OSError when it cannot be made."""
        identity = dict(self._identities[name])
        digest = hashlib.sha256(FORMAT + json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        distances: dict[Path, float] = {}
        for path in sorted(self._folder.glob(f"{digest}-*/teacher.json")):
            try:
                then = np.array(json.loads(path.read_bytes())["probe"], dtype=np.float32)
                gap = float(np.abs(then - probe).sum()) / max(probe.size, 1) if then.shape == probe.shape else math.inf
                distances[path.parent] = gap if math.isfinite(gap) else math.inf
            except (OSError, ValueError, TypeError, KeyError):
                self._warn(f"warning: '{path}' is damaged; opd ignores the scores beside it")
        nearest = min(distances, key=lambda folder: distances[folder], default=None)
        if nearest is not None and distances[nearest] <= TOLERANCE:
            return nearest
        if nearest is not None:
            self._warn(
                f"warning: teacher '{name}' has changed since its scores in '{self._folder}' were computed (its log-probabilities "
                f"of a test text differ by {distances[nearest]:.2g} nats per token, limit {TOLERANCE:g}); opd ignores the old "
                "scores and caches new ones"
            )
        folder = self._folder / f"{digest}-{hashlib.sha256(probe.tobytes()).hexdigest()[:8]}"
        about = {"identity": identity, "probe": probe.tolist()}
        self._write(folder / "teacher.json", json.dumps(about, indent=1).encode())
        return folder


def _path_of(folder: Path, key: Key) -> Path:
    return folder / key.response[:2] / f"{key.response[2:]}.score"


def _checksum(path: Path, body: bytes) -> bytes:
    """Of a score and its path, so that no file can take another's place."""
    place = "/".join(path.parts[-3:])
    return hashlib.sha256(place.encode() + b"\n" + body).digest()


def _checked(path: Path, content: bytes) -> bytes | None:
    """The body of a file; None when the file is damaged."""
    start = len(FORMAT) + _CHECKSUM
    body = content[start:]
    return body if content[:start] == FORMAT + _checksum(path, body) else None


class CachedTeacher:
    """A teacher whose scores are stored; failed scores are not. Two of them, one around the other, search two stores in turn.

    A student with low entropy repeats its responses, and a large teacher takes most of a step. A cached score was computed in
    another packed pass, so it may differ from a new one in the last digits.
    """

    def __init__(self, teacher: Teacher, store: MemoryScores | ScoreFiles) -> None:
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
        identity["models"] = {part: [w, backend.identities[f"teacher '{part}'"]] for part, w in weights.items()}
        # the teacher's own chat template renders its prompts, and may read the clock
        own_tokenizers = {part: backend.identities.get(f"the tokenizer of teacher '{part}'") for part in weights}
        if name not in facts.cross_tokenizer and any(own_tokenizers.values()):
            identity["prompts"] = own_tokenizers
        identity["states"] = config.objective.needs_distributions
        dtypes = {config.teachers[part].dtype or config.compute.dtype for part in weights}
        identity["dtype"] = "mixed" if config.cluster.mixed_precision else "+".join(sorted(dtypes))
        if name in facts.cross_tokenizer:
            found[name] = identity | {  # what the alignment of its tokens with the student's depends on
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
                "vocab_size": facts.cross_tokenizer[name],
            }
            continue
        identity["vocab_size"] = facts.vocab_size  # ids beyond it have no probability
        if (reference := config.objective.reference) is not None:
            who = INITIAL_STUDENT if reference == "student" else reference
            identity["reference"] = [reference, config.objective.extrapolation, backend.identities[f"teacher '{who}'"]]
            if own := backend.identities.get(f"the tokenizer of teacher '{who}'"):
                identity["reference"].append(own)
        found[name] = identity
    return found


def probe(teacher: Teacher, names: Collection[str], *, known: Collection[str], tokenizer: Any) -> dict[str, Probe]:
    """Each teacher's log-probabilities of a probe text [tokens - 1], nats, or why it gave none. Empty for the `known` teachers,
    which their weights identify.

    A server may hold other weights tomorrow under today's name; the probe detects that.
    """
    token_ids = np.array(tokenizer(PROBE, add_special_tokens=False).input_ids, dtype=np.int32)
    size = len(token_ids)
    messages = ({"role": "user", "content": ""}, {"role": "assistant", "content": PROBE})
    found: dict[str, Probe] = {name: np.zeros(0, dtype=np.float32) for name in names}
    probes = [
        Rollout(
            prompt=Prompt(f"probe of {name}", messages[:1], teacher=name, task="probe"),
            sample=0,
            token_ids=token_ids,
            loss_mask=np.arange(size) >= 1,  # the student wrote all but the first token
            rollout_logprobs=np.zeros(size, dtype=np.float32),
            turns=(Turn("prompt", 0, 1), Turn("student", 1, size)),
            messages=messages,
            finish="end",
            policy_version=0,
        )
        for name in names
        if name not in known
    ]
    for item in teacher.score(probes) if probes else []:
        name = item.rollout.prompt.teacher
        if isinstance(item.score, FailedScore):
            found[name] = item.score.reason
        else:
            found[name] = np.maximum(item.score.logprobs[1:], np.float32(_LOWEST))
    return found
