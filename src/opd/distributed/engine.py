"""One vLLM server on one node: started, watched, started again, and given the student's weights."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import httpx2
import numpy as np
from safetensors import SafetensorError

from opd.distributed.engine_log import keep, lines_of, reason
from opd.errors import RunError, one_line

_POLL_S = 0.25
_PULSES = 4  # times that a server is asked whether it lives
_LOG = "server.log"
_NOT_LOADED = b"weights were not loaded"

Files = Mapping[str, np.ndarray]
"""The files of a folder by name, as bytes (uint8)."""


@dataclass(frozen=True)
class EnginePlan:
    """How an engine is started: the command, what it serves and under which name, and for how long it may start.

    teachers: who speaks through it, if not the student. adapter: is merged into the model before the start, in `dtype`. holds: what
    `load` gives it: adapters beside its base, weights in place of its own (an adapter is merged first), or nothing. kept: how many
    adapters it holds, for requests that began with an older one go on with it. sleeps: it can free its device and take it again.
    secret: the key that it asks for.
    """

    command: Sequence[str]
    model: str
    name: str
    args: Sequence[str]
    start_s: float
    holds: Literal["adapters", "weights", "nothing"] = "nothing"
    kept: int = 1
    sleeps: bool = False
    secret: str | None = field(default=None, repr=False)
    adapter: str | None = None
    dtype: str = "float32"
    teachers: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """Whose it is, in errors."""
        names = " and ".join(f"'{name}'" for name in self.teachers)
        return f"teacher{'s' * (len(self.teachers) > 1)} {names}" if names else "the student"


@dataclass(frozen=True)
class EngineState:
    """A server that answers: its URL, the longest sequence that it takes, the versions that it holds, and how often it was
    started."""

    url: str
    context: int | None
    versions: tuple[str, ...]
    starts: int = 1


class Engine:
    """A vLLM server as a child of this process, with the weights that `load` was given, by version.

    A server that died is started again by the next `state`, with what it held. Meant to live in a Ray actor; knows nothing of Ray.
    """

    def __init__(self, plan: EnginePlan, host: str) -> None:
        self._plan = plan
        self._host = host
        self._folder: Path | None = None
        self._detectors: subprocess.Popen[bytes] | None = None  # removes the folder when this process is gone
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._context: int | None = None
        self._versions: deque[str] = deque()
        self.awake = False
        self.starts = 0
        # servers of this run, which no proxy of the environment stands before
        key = {"Authorization": f"Bearer {plan.secret}"} if plan.secret else {}
        self._client = httpx2.Client(trust_env=False, headers=key, timeout=plan.start_s)

    def state(self) -> EngineState:
        """Where the server is, once it answers, awake. One that died, or answers no more, is started again. Raises RunError when it
        does not start."""
        if not self._lives():
            self._start()
            for name in self._versions if self._plan.holds == "adapters" else ():
                self._show(name)
        elif not self.awake:
            self._asked(lambda: self._post("/wake_up"))
            self.awake = True
        url = f"http://{self._host}:{self._port}"
        return EngineState(url, self._context, tuple(self._versions), self.starts)

    def sleep(self) -> None:
        """Free the device; the weights wait in main memory. `state` wakes it."""
        if self.awake and self._plan.sleeps and self._process is not None and self._process.poll() is None:
            try:
                self._post("/sleep?level=1&mode=wait")
            except _Unanswered:
                self._end()  # it is started again when it is needed
        self.awake = False

    def load(self, name: str, files: Files) -> None:
        """Serve a version of the student; returns once the server has it. Versions before the last few are dropped."""
        self.state()
        if name in self._versions:
            return
        place = self._home / name
        with self._writes("the student", place):
            self._write(place, files)
        if self._plan.holds == "adapters" and len(self._versions) >= self._plan.kept:
            old = self._versions.popleft()
            self._asked(lambda: self._post("/v1/unload_lora_adapter", {"lora_name": old}))
            self._drop(old)
        if not self._asked(lambda: self._show(name)):
            self._show(name)
        self._versions.append(name)
        while self._plan.holds == "weights" and len(self._versions) > 1:
            self._drop(self._versions.popleft())

    def _lives(self) -> bool:
        """Whether the server answers, given some time: the process may outlive what computes in it."""
        for attempt in range(_PULSES):
            if self._process is None or self._process.poll() is not None:
                return False
            if self._answers():
                return True
            time.sleep(_POLL_S * (attempt + 1))
        return False

    def _asked(self, ask: Callable[[], None]) -> bool:
        """Whether the server did what it was asked; one that died meanwhile was started again instead."""
        try:
            ask()
        except _Unanswered:
            self._end()
            self.state()
            return False
        return True

    def stop(self) -> None:
        """End the server and all that it started, and remove what was written for it."""
        self._end()
        self._client.close()
        if self._detectors is not None:
            assert self._detectors.stdin is not None
            self._detectors.stdin.close()
            self._detectors.wait()

    @property
    def _home(self) -> Path:
        assert self._folder is not None, "state() comes first"
        return self._folder

    def _drop(self, name: str) -> None:
        shutil.rmtree(self._home / name, ignore_errors=True)

    @contextlib.contextmanager
    def _writes(self, what: str, place: Path) -> Iterator[None]:
        """Whatever was left there is gone; a disk that takes no more is one line."""
        shutil.rmtree(place, ignore_errors=True)
        try:
            yield
        except (OSError, SafetensorError) as error:
            full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            advice = "; free space there (or set TMPDIR)" if full else ""
            raise RunError(
                f"engine of {self._plan.who} cannot write {what} to '{place}' on {socket.gethostname()}: "
                f"{one_line(str(error))}{advice}"
            ) from None

    def _write(self, place: Path, files: Files) -> None:
        """A version's folder; an adapter whose engine holds weights becomes a whole model."""
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content.data)
        if self._plan.holds == "weights" and (place / "adapter_config.json").exists():
            adapter = place.rename(place.with_name(f".{place.name}.adapter"))
            self._merge(adapter, place)
            shutil.rmtree(adapter)

    def _merge(self, adapter: Path, place: Path) -> None:
        from opd.models.lora import write_merged  # torch and all that reads models: most engines do without

        whose = self._plan.teachers[0] if self._plan.teachers else self._plan.name
        write_merged(self._plan.model, adapter, place, dtype=self._plan.dtype, whose=whose)

    def _show(self, name: str) -> None:
        """Let the server read a version from its folder."""
        place = str(self._home / name)
        if self._plan.holds == "adapters":
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": place})
            return
        # what is asked is answered first; what was computed for shared beginnings belongs to the weights before
        self._post("/pause?mode=wait&clear_cache=true")
        said = (self._home / _LOG).stat().st_size
        try:
            self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": place}})
        finally:
            self._post("/resume")
        with (self._home / _LOG).open("rb") as log:
            log.seek(said)
            if _NOT_LOADED in log.read():  # which vLLM takes for a success
                raise RunError(
                    f"engine of {self._plan.who} did not find all weights of '{self._plan.model}' in what it was sent, as its log "
                    "says; this architecture cannot be reloaded: leave merge_adapter out"
                )

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"ended")  # its folder stays, it may be started again
            self._process.stdin.close()  # the keeper ends what it keeps
        self._process.wait()
        self._process = None

    def _start(self) -> None:
        self._end()
        plan = self._plan
        if shutil.which(plan.command[0]) is None:
            raise RunError(
                f"cluster.engine_command = '{plan.command[0]}' is no command on {socket.gethostname()}; name one of an environment "
                "that has vLLM"
            )
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="opd-engine-"))
            self._detectors = _kept(self._folder, ["sleep", "infinity"], stdout=subprocess.DEVNULL)
        source = self._source()  # which may take minutes
        self._port = _free_port(self._port)  # the same one again if it can be, which its clients know
        command = [*plan.command, "--model", source, "--served-model-name", plan.name]
        command += ["--host", self._host, "--port", str(self._port), *plan.args]
        with (self._folder / _LOG).open("a") as said:
            began = said.tell()
            try:
                self._process = _kept(self._folder, command, stdout=said, env=self._environment())
            except OSError as error:
                raise RunError(f"engine of {plan.who} cannot be started: {error}") from None
        self._wait(began)
        self.starts += 1
        self.awake = True

    def _source(self) -> str:
        """What the server reads when it starts: the weights that it was given, for who still knows its address asks it at once."""
        if self._plan.holds == "weights" and self._versions:
            return str(self._home / self._versions[-1])
        return self._plan.model if self._plan.adapter is None else self._merged(self._plan.adapter)

    def _merged(self, adapter: str) -> str:
        """The folder of the model with an adapter in its weights, written before the first start."""
        place = self._home / "merged"
        if not place.exists():
            staging = self._home / ".merged"
            with self._writes("its merged model", staging):
                self._merge(Path(adapter), staging)
            staging.rename(place)
        return str(place)

    def _environment(self) -> dict[str, str]:
        found = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        found.pop("OMP_NUM_THREADS", None)  # Ray sets it to the CPUs that were booked
        if self._plan.holds == "weights" or self._plan.sleeps:
            found["VLLM_SERVER_DEV_MODE"] = "1"  # it has the paths that weights are replaced by, and sleep
        if self._plan.secret:
            found["VLLM_API_KEY"] = self._plan.secret
        return found

    def _wait(self, began: int) -> None:
        """Until the server answers, and says what it takes. began: where its log begins."""
        plan, log = self._plan, self._home / _LOG
        assert self._process is not None
        end = time.monotonic() + plan.start_s
        while True:
            if self._process.poll() is None and self._answers():
                break  # not somebody else's server at its port
            if (code := self._process.poll()) is not None:
                raise RunError(f"engine of {plan.who} ended while it started: {reason(log, began, code)}; {keep(log)}")
            if time.monotonic() > end:
                self._end()
                raise RunError(
                    f"engine of {plan.who} did not answer in cluster.engine_start_s = {plan.start_s:g} s; last it said: "
                    f"{(lines_of(log, began) or ['nothing'])[-1][:200]}; {keep(log)}"
                )
            time.sleep(_POLL_S)
        models = self._ask("GET", "/v1/models").json()["data"]
        self._context = next((entry.get("max_model_len") for entry in models if entry["id"] == plan.name), None)

    def _answers(self) -> bool:
        try:
            return self._client.get(self._at("/health"), timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def _at(self, path: str) -> str:
        return f"http://{self._host}:{self._port}{path}"

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx2.Response:
        try:
            answer = self._client.request(method, self._at(path), json=body)
        except httpx2.TransportError as error:
            raise _Unanswered(
                f"engine of {self._plan.who} cannot be asked for {path}: {error or type(error)}"
            ) from None
        if answer.status_code != 200:
            refused = f"engine of {self._plan.who} refuses {path}: {answer.status_code}: {one_line(answer.text)[:200]}"
            raise _Unanswered(refused) if answer.status_code >= 500 else RunError(refused)
        return answer


class _Unanswered(RunError):
    """A server that is not there, or that failed: it may answer once it is started again."""


def _kept(
    folder: Path, command: Sequence[str], stdout: int | IO[str], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A command that ends with this process, and the folder with both (`opd.distributed.supervisor`)."""
    keeper = [sys.executable, "-m", "opd.distributed.supervisor", str(folder), *command]
    return subprocess.Popen(keeper, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT, env=env)


def _free_port(wanted: int) -> int:
    for port in dict.fromkeys((wanted, 0)):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were cut linger
            found.bind(("", port))
            return int(found.getsockname()[1])
    raise RunError("no port of this machine is free for an engine")
