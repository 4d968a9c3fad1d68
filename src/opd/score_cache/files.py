"""Scores on disk: one file each, so that runs share them and a kill, a full disk or a damaged file costs no more than itself.

    FOLDER/IDENTITY-PROBE/teacher.json           what these scores are of, and the teacher's own scores of a probe text
    FOLDER/IDENTITY-PROBE/ab/cdef....score       a score, under the hash of all that it depends on
    FOLDER/partial/...                           what is being written, or was when a process was killed

A file is written aside and renamed, so nobody reads half of one, whoever writes at once; two that write the same score write the
same file. Nothing is locked, so a folder that several machines mount will do. A checksum over a file and its own name tells
whether it is still what was written.
"""

import hashlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opd.errors import RunError
from opd.records import Score
from opd.score_cache.cached import Key
from opd.score_cache.encoding import from_bytes, to_bytes

FORMAT = b"opd score 1\n"
_CHECKSUM = 32  # bytes of a SHA-256
_ABANDONED_S = 24 * 3600.0  # what has not been finished for a day was killed

TOLERANCE = 0.1
"""Nats a token, on average over the probe text, within which a teacher is the one that it was. A 135M model in bfloat16 moves by
0.039 when others are in its batch; two light LoRA experts of it lie 0.98 and 1.21 away."""

Probe = np.ndarray | str
"""A teacher's log-probabilities of a probe text [tokens], nats, empty where it is known by its weights; or why there are none."""


class ScoreFiles:
    """Scores in a folder that outlives the process, and that other runs may use at the same time.

    identities: by teacher, all that its scores depend on beside the response (`opd.score_cache.identity`). probe: asks the teachers
    what they are, when the first score is looked for. What goes wrong later costs scores and never the run, and is one line to
    `warn`. Threads may share it.

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
        self._shelves: dict[str, Path] | None = None  # by teacher; None: nothing was looked for yet
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

    def find(self, keys: Collection[Key]) -> dict[Key, Score]:
        """Those of the scores that are there and whole, as they were written, to the bit."""
        shelves = self._opened()
        found: dict[Key, Score] = {}
        damaged = 0
        for key in keys:
            if key.teacher not in shelves:
                continue
            path = _place(shelves[key.teacher], key)
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
                f"warning: {damaged} kept scores in '{self._folder}' are damaged; their teachers are asked again"
            )
        return found

    def keep(self, scores: Mapping[Key, Score]) -> None:
        """Write scores, until one cannot be written: then no more are."""
        shelves = self._opened()
        for key, score in scores.items():
            if not self._writes or key.teacher not in shelves:
                continue
            path = _place(shelves[key.teacher], key)
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
                f"warning: no more scores are kept in '{self._folder}' ({error.strerror}): training goes on, and what is there is "
                "still used; make room and start again, or delete the folder"
            )

    def _write(self, path: Path, content: bytes) -> None:
        """Put a whole file in place, or none."""
        # no other process, thread or machine has this name
        staging = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            staging.write_bytes(content)
            staging.replace(path)
        except FileNotFoundError:  # the folder was deleted meanwhile
            self._partial.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            staging.write_bytes(content)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    def _opened(self) -> Mapping[str, Path]:
        """Where each teacher's scores lie. The first who asks finds out, the others wait."""
        with self._lock:
            if self._shelves is not None:
                return self._shelves
            self._tidy()
            shelves: dict[str, Path] = {}
            trouble: OSError | None = None
            for name, probe in self._probe().items():
                if isinstance(probe, str):
                    self._warn(
                        f"warning: no scores of teacher '{name}' are kept in '{self._folder}', for it did not score a probe text: "
                        f"{probe}"
                    )
                    continue
                try:
                    shelves[name] = self._shelf(name, probe)
                except OSError as error:
                    trouble = error
            self._shelves = shelves
        if trouble is not None:
            self._stop_writing(trouble)
        return shelves

    def _tidy(self) -> None:
        """Remove what killed processes left."""
        now = time.time()
        for path in self._partial.glob("*"):
            try:
                if now - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
            except OSError:
                continue  # somebody else did

    def _shelf(self, name: str, probe: np.ndarray) -> Path:
        """The folder of the teacher as it is now, made if there is none. Raises OSError where it cannot be."""
        identity = dict(self._identities[name])
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        apart: dict[Path, float] = {}
        for path in sorted(self._folder.glob(f"{digest}-*/teacher.json")):
            try:
                then = np.array(json.loads(path.read_bytes())["probe"], dtype=np.float32)
                apart[path.parent] = _distance(then, probe)
            except (OSError, ValueError, TypeError, KeyError):
                self._warn(f"warning: '{path}' is damaged; the scores beside it are left alone")
        nearest = min(apart, key=lambda shelf: apart[shelf], default=None)
        if nearest is not None and apart[nearest] <= TOLERANCE:
            return nearest
        if nearest is not None:
            self._warn(
                f"warning: teacher '{name}' is not what it was when its scores in '{self._folder}' were made (a probe text is "
                f"{apart[nearest]:.2g} nats a token away, more than {TOLERANCE:g}); they are left alone, new ones kept beside them"
            )
        shelf = self._folder / f"{digest}-{hashlib.sha256(probe.tobytes()).hexdigest()[:8]}"
        shelf.mkdir(exist_ok=True)
        about = {"identity": identity, "probe": probe.tolist()}
        self._write(shelf / "teacher.json", json.dumps(about, indent=1).encode())
        return shelf


def _place(shelf: Path, key: Key) -> Path:
    return shelf / key.response[:2] / f"{key.response[2:]}.score"


def _checksum(path: Path, body: bytes) -> bytes:
    """Of a score and of where it lies, so that no file can take another's place."""
    place = "/".join(path.parts[-3:])
    return hashlib.sha256(place.encode() + b"\n" + body).digest()


def _checked(path: Path, content: bytes) -> bytes | None:
    """What was written to a file; None where it is something else now."""
    start = len(FORMAT) + _CHECKSUM
    body = content[start:]
    return body if content[:start] == FORMAT + _checksum(path, body) else None


def _distance(then: np.ndarray, now: np.ndarray) -> float:
    """Mean difference in nats a token; infinite where the two are not of one text, and 0 where there is none."""
    if then.shape != now.shape:
        return float("inf")
    if not now.size:
        return 0.0
    gap = float(np.abs(then - now).mean())
    return gap if np.isfinite(gap) else float("inf")
