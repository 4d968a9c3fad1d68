"""Scores on disk, one file each, so that runs share them. A kill, a full disk or a damaged file costs only the scores it touches.

    FOLDER/IDENTITY-PROBE/teacher.json           what the scores depend on, and the teacher's own scores of a probe text
    FOLDER/IDENTITY-PROBE/ab/cdef....score       a score, under the hash of the rollout
    FOLDER/partial/...                           files that are being written, or that a killed process left

A file is written in `partial` and renamed, so no reader sees half a file. Two processes that write one score write the same file.
There are no locks, so several machines may mount the folder. A checksum over a file and its name detects damage.
"""

import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from opd.errors import RunError
from opd.records import FailedScore, Score
from opd.score_cache.cache import Key, Probe

FORMAT = b"opd score 2\n"
_CHECKSUM = 32  # bytes of a SHA-256
_ABANDONED_S = 24 * 3600.0  # a file that is unfinished after a day belongs to a killed process

TOLERANCE = 0.1
"""Nats a token, on average over the probe text, within which a teacher counts as unchanged. A 135M model in bfloat16 moves by
0.039 when others are in its batch; two light LoRA experts of it lie 0.98 and 1.21 away."""

_KINDS: dict[str, type[Score]] = {kind.__name__: kind for kind in get_args(Score)}


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
    """Scores in a folder that outlives the process (`opd.score_cache.cache.ScoreStore`). Other runs may use it at the same time.

    identities: by teacher, everything but the rollout that its scores depend on (`opd.score_cache.cache.identities`). probe:
    probes the teachers; called before the first score is read or written. Later trouble costs scores, never the run, and calls
    `warn` with one line. Threads may share it.

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
        self._lock = threading.Lock()
        self._folders: dict[str, Path] | None = None  # by teacher; None before the probe
        self._writes = True
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
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
                path.parent.mkdir(parents=True, exist_ok=True)
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
        # no other process, thread or machine uses this name
        staging = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            staging.write_bytes(content)
            staging.replace(path)
        except FileNotFoundError:  # somebody deleted the folder
            self._partial.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
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
            failure: OSError | None = None
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
                    failure = error
            self._folders = folders
        if failure is not None:
            self._stop_writing(failure)
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
                distances[path.parent] = _distance(then, probe)
            except (OSError, ValueError, TypeError, KeyError):
                self._warn(f"warning: '{path}' is damaged; opd ignores the scores beside it")
        nearest = min(distances, key=lambda folder: distances[folder], default=None)
        if nearest is not None and distances[nearest] <= TOLERANCE:
            return nearest
        if nearest is not None:
            self._warn(
                f"warning: teacher '{name}' has changed since its scores in '{self._folder}' were made (a probe text differs by "
                f"{distances[nearest]:.2g} nats a token, more than {TOLERANCE:g}); opd ignores them and caches new ones"
            )
        folder = self._folder / f"{digest}-{hashlib.sha256(probe.tobytes()).hexdigest()[:8]}"
        folder.mkdir(exist_ok=True)
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


def _distance(then: np.ndarray, now: np.ndarray) -> float:
    """Mean absolute difference in nats a token; infinite for probes of different texts, 0 for empty probes."""
    if then.shape != now.shape:
        return float("inf")
    if not now.size:
        return 0.0
    gap = float(np.abs(then - now).mean())
    return gap if np.isfinite(gap) else float("inf")
