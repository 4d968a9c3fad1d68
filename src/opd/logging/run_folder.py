"""The files of a run folder: writing them, and reading them back.

config.json        the resolved configuration
metrics.jsonl      one line a step
rollouts/          step-000012.jsonl.gz: every rollout of the step with its per-token scores
checkpoints/       the states that `--resume` continues from
alarms.jsonl       the alarms of the detectors of reward hacking
before.json        the student's evaluation before the first step
parity.json        the parity table; parity.md the same as text
evaluations/       the parity tables of earlier checkpoints, by step
curves.png         the curves of the metrics
student/           the trained student, a PEFT adapter or a Hugging Face folder
changes.jsonl      settings that a resumed run changed on request
own_code.txt       the names of the user's callables, when the run was started with any
.lock              held while a process trains in the folder
"""

import contextlib
import fcntl
import gzip
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from opd.checkpoint import explain_io, replace_file
from opd.config import AnyConfig, Config, SftConfig, dump_config, parse_config
from opd.errors import RunError
from opd.records import ChunkScore, FailedScore, Flag, Prompt, Rollout, SampledScore, Score, ScoredRollout, Turn

_OWN_CODE = "own_code.txt"
_CHANGES = "changes.jsonl"
_WRITTEN = frozenset(
    ("config.json", "metrics.jsonl", "rollouts", "checkpoints", "alarms.jsonl", "before.json", "parity.json", "parity.md",
     "evaluations", "curves.png", "student", "export", "tensorboard", "trackio", _OWN_CODE, _CHANGES, ".lock")
)  # fmt: skip
_LOCK = ".lock"  # not config.json, which is replaced when a run has moved
_PLAIN = ("sample", "part", "reward", "finish", "policy_version")  # fields of a rollout that JSON holds as they are


class RunFolder:
    """One run on disk. A file is written whole or not at all; metrics.jsonl grows by one line a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @classmethod
    def create(cls, path: str | Path, config: Config | SftConfig, *, own_code: Sequence[str] = ()) -> "RunFolder":
        """A new run folder; raises RunError when there is one already. own_code: the names of the user's Python callables, which
        the folder cannot hold."""
        cls.require_absent(path)
        folder = cls(Path(path))
        with explain_io(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
            try:
                if own_code:
                    folder.write_text(_OWN_CODE, "".join(f"{name}\n" for name in own_code))
                folder.write_text("config.json", dump_config(config))  # the last: it makes a folder a run
            except BaseException:
                (folder.path / _OWN_CODE).unlink(missing_ok=True)  # the same command can be run again
                raise
        return folder

    def require_own_code(self, given: Sequence[str]) -> None:
        """Raise RunError unless the user's Python objects that are given now are those with which the run was started."""
        path = self.path / _OWN_CODE
        began = path.read_text().split() if path.exists() else []
        if added := [name for name in given if name not in began]:
            raise RunError(
                f"run '{self.path}' was started without {', '.join(added)} from Python; leave it out, or start a new run with it"
            )
        missing = [name for name in began if name not in given]
        if missing:
            arguments = ", ".join(f"{name}=..." for name in missing)
            raise RunError(
                f"run '{self.path}' was started with {', '.join(missing)} from Python, which it cannot store; continue it from "
                f"Python: opd.Trainer('{self.path}', {arguments}).resume(), and evaluate it in the same way"
            )

    def how_to_resume(self) -> str:
        """The command, or the Python, that continues this run."""
        own = self.path / _OWN_CODE
        if own.is_file():
            arguments = ", ".join(f"{name}=..." for name in own.read_text().split())
            return f"opd.Trainer('{self.path}', {arguments}).resume(), in Python"
        return f"opd {'sft' if self._is_sft() else 'train'} --resume {shlex.quote(str(self.path))}"

    def _is_sft(self) -> bool:
        try:
            tree = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(tree, dict) and "teachers" not in tree and "batch_size" in tree

    @staticmethod
    def require_absent(path: str | Path) -> None:
        """Raise RunError when the folder is not empty: a run never overwrites another."""
        place = Path(path)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            other = "choose another folder with output=..."
            if (place / "config.json").is_file():
                other = f"continue it with: {RunFolder(place).how_to_resume()}; or {other}"
            raise RunError(f"run folder '{path}' exists and is not empty; {other}")

    def require_removable(self) -> None:
        """Raise RunError for a folder that is no run of opd, or that holds files of others."""
        self.config()
        if self.path.is_symlink():
            raise RunError(f"run folder '{self.path}' is a symbolic link; name the folder itself")
        written = _WRITTEN | {f".{name}.partial" for name in _WRITTEN}
        others = sorted(path.name for path in self.path.iterdir() if path.name not in written)
        if others:
            raise RunError(
                f"run folder '{self.path}' holds '{others[0]}', which opd did not write; move it, or choose another output"
            )

    def remove(self) -> None:
        """Delete the run folder. Raises RunError when it is not removable, or when a process trains in it."""
        self.require_removable()
        with self.locked():
            shutil.rmtree(self.path)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run folder; raises RunError when it is none."""
        if not (Path(path) / "config.json").is_file():
            raise RunError(f"'{path}' is no run folder: it has no config.json")
        return cls(Path(path))

    def config(self, kind: type[AnyConfig] = Config) -> AnyConfig:
        """The recipe of the run; raises RunError when the file is damaged, and for a run of another command."""
        path = self.path / "config.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(f"'{path}' is damaged: {error}") from None
        if self._is_sft() != (kind is SftConfig):
            own, other = ("sft", "train") if self._is_sft() else ("train", "sft")
            raise RunError(
                f"'{self.path}' is a run of 'opd {own}', not of 'opd {other}'; continue it with: {self.how_to_resume()}"
            )
        return parse_config(tree, kind=kind, source=str(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process; raises RunError when another process trains in it. A killed process leaves no lock."""
        with explain_io(self.path / _LOCK):
            file = (self.path / _LOCK).open("a")  # over NFS a lock that excludes others needs a file open for writing
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"another process trains in run folder '{self.path}'; stop it first (SIGINT saves and exits)"
                ) from None
            yield

    def write_text(self, name: str, text: str) -> None:
        with explain_io(self.path / name):
            replace_file(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def note_changes(self, step: int, changes: Sequence[tuple[str, Any, Any]]) -> None:
        """Keep which settings changed after which step, one line each: (key, value before, value after)."""
        with explain_io(self.path / _CHANGES), (self.path / _CHANGES).open("a", encoding="utf-8") as file:
            for key, before, after in changes:
                file.write(json.dumps({"after_step": step, "key": key, "before": before, "now": after}) + "\n")

    def first_values(self) -> dict[str, Any]:
        """The value at the run's start of each key that changed since."""
        path = self.path / _CHANGES
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {change["key"]: change["before"] for change in map(json.loads, reversed(lines))}

    def append_metrics(self, step: int, values: Mapping[str, float]) -> None:
        with explain_io(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of steps after `step`, and a last line that a kill cut short."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def write_rollouts(self, step: int, scored: Sequence[ScoredRollout]) -> None:
        """Write the rollouts of a step; token ids and scores read back exactly."""
        text = "".join(json.dumps(_to_plain(s), ensure_ascii=False) + "\n" for s in scored)
        path = self.path / "rollouts" / f"step-{step:06d}.jsonl.gz"
        with explain_io(path):
            path.parent.mkdir(exist_ok=True)
            # Without a time stamp the same rollouts give the same bytes.
            replace_file(path, lambda p: p.write_bytes(gzip.compress(text.encode(), compresslevel=6, mtime=0)))


class Background:
    """Runs one job at a time in a thread of its own, such as `write_rollouts`, whose compression would delay the next step.

    The next `start` or `wait` raises the error of a job; `again` repeats that job. Leaving the context waits for the last job.
    After an error in the context, the job's own failure is not raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="opd-records")
        self._job: Future[None] | None = None
        self._failed: Callable[[], None] | None = None
        self._doing: Callable[[], None] | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job after the previous one is done, so that memory holds the records of one step only."""
        self.wait()
        self._doing = job
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Return when the job is done; raises its error."""
        job, self._job = self._job, None
        if job is not None:
            try:
                job.result()
            except Exception:
                self._failed = self._doing
                raise

    def again(self) -> None:
        """Return when the job is done. Runs a job that failed once more, and raises its error if it fails again."""
        with contextlib.suppress(Exception):
            self.wait()
        job, self._failed = self._failed, None
        if job is not None:
            job()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if error is None:
            self.wait()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The metrics of a run: one dict for each step, by metric. A last line that a kill cut short is left out.

    Raises:
        RunError: For a folder that is no run folder, and for a damaged line.
    """
    path = RunFolder.open(run).path / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [json.loads(line)] if line else []
        except json.JSONDecodeError:
            if number < len(lines):
                raise RunError(f"'{path}', line {number} is damaged; remove the line") from None
    return found


def read_rollouts(run: str | Path, step: int | None = None) -> Iterator[ScoredRollout]:
    """Every rollout of a run with its score, in order.

    The files hold no hidden states, so a full-vocabulary score is read as the log-probabilities of its sampled tokens. They hold
    only the part of a prompt's `meta` that is plain JSON.

    Args:
        run: The run folder.
        step: Only the rollouts of this step.

    Raises:
        RunError: If the run has no such rollouts.
    """
    folder = Path(run) / "rollouts"
    pattern = "step-*.jsonl.gz" if step is None else f"step-{step:06d}.jsonl.gz"
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise RunError(f"'{run}' has no rollouts" + ("" if step is None else f" of step {step}"))
    for path in paths:
        for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]:
            yield _from_plain(json.loads(line))


def _to_plain(scored: ScoredRollout) -> dict[str, Any]:
    rollout, score, prompt = scored.rollout, scored.score, scored.rollout.prompt
    actions = rollout.loss_mask
    plain: dict[str, Any] = {
        "id": rollout.id,
        "prompt": {
            "id": prompt.id,
            "messages": [dict(m) for m in prompt.messages],
            "teacher": prompt.teacher,
            "task": prompt.task,
            "answer": prompt.answer,
            "meta": _json_or_nothing(prompt.meta),
            "tools": list(prompt.tools),
        },
        **{name: getattr(rollout, name) for name in ("response", *_PLAIN)},
        "messages": [dict(m) for m in rollout.messages[len(prompt.messages) :]],
        "flags": [astuple(flag) for flag in rollout.flags],
        "events": dict(rollout.events),
        "turns": [astuple(turn) for turn in rollout.turns],
        "token_ids": rollout.token_ids.tolist(),
        "rollout_logprobs": _numbers(rollout.rollout_logprobs[actions]),
    }
    sometimes = {"opened": rollout.opened, "episode_failure": rollout.failure, "retries": scored.retries}
    plain |= {name: value for name, value in sometimes.items() if value}
    if isinstance(score, FailedScore):
        return plain | {"failure": score.reason} | ({"lost": True} if score.lost else {})
    plain["teacher_logprobs"] = _numbers(score.logprobs[actions])
    if isinstance(score, ChunkScore):
        plain |= {"chunks": score.chunks[actions].tolist(), "num_bytes": score.num_bytes, "facts": dict(score.facts)}
    return plain


def _from_plain(plain: Mapping[str, Any]) -> ScoredRollout:
    head = plain["prompt"]
    prompt = Prompt(
        head["id"], tuple(head["messages"]), teacher=head["teacher"], task=head["task"], answer=head["answer"],
        meta=MappingProxyType(head["meta"]), tools=tuple(head["tools"]),
    )  # fmt: skip
    turns = tuple(Turn(*turn) for turn in plain["turns"])
    mask = np.zeros(len(plain["token_ids"]), dtype=bool)
    for turn in turns:
        mask[turn.start : turn.end] = turn.author == "student"
    rollout = Rollout(
        prompt=prompt,
        token_ids=np.array(plain["token_ids"], dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=_spread(plain["rollout_logprobs"], mask),
        turns=turns,
        messages=(*prompt.messages, *plain["messages"]),
        flags=tuple(Flag(*flag) for flag in plain["flags"]),
        events=MappingProxyType(plain["events"]),
        failure=plain.get("episode_failure"),
        opened=plain.get("opened", ""),
        **{name: plain[name] for name in _PLAIN},
    )
    return ScoredRollout(rollout, _score_from(plain, mask), retries=plain.get("retries", 0))


def _score_from(plain: Mapping[str, Any], mask: np.ndarray) -> Score:
    teacher = plain["prompt"]["teacher"]
    if "failure" in plain:
        return FailedScore(teacher, plain["failure"], lost=plain.get("lost", False))
    logprobs = _spread(plain["teacher_logprobs"], mask)
    if "chunks" not in plain:
        return SampledScore(teacher, logprobs)
    chunks = np.full(len(mask), -1, dtype=np.int32)
    chunks[mask] = plain["chunks"]
    return ChunkScore(teacher, logprobs, chunks, plain["num_bytes"], MappingProxyType(plain["facts"]))


def _json_or_nothing(meta: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(meta)
    try:
        return plain if json.loads(json.dumps(plain)) == plain else {}
    except (TypeError, ValueError):
        return {}


def _numbers(values: np.ndarray) -> list[float]:
    """float32 values by their shortest decimal that reads back as the same float32."""
    return [float(str(v)) for v in values.astype(np.float32)]


def _spread(values: Sequence[float], mask: np.ndarray) -> np.ndarray:
    spread = np.zeros(len(mask), dtype=np.float32)
    spread[mask] = values
    return spread
