"""One vLLM server on one node: started, restarted when it fails, and loaded with the student's weights."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy as np
from safetensors import SafetensorError

from opd.distributed.supervisor import keep_log, lines_of, reason_of, supervised
from opd.errors import RunError, one_line

_POLL_S = 0.25
_HEALTH_CHECKS = 4  # before a server counts as dead
_LOG = "server.log"
_NOT_LOADED = b"weights were not loaded"  # in the log of vLLM

Files = Mapping[str, np.ndarray]
"""The files of a folder by name, as bytes (uint8)."""


@dataclass(frozen=True)
class EnginePlan:
    """How an engine is started: the command, the model, its name at the server, and the time that it may take to start, in seconds.

    loads: what `Engine.load` gives it: LoRA adapters beside its base, whole weights that replace its own (an adapter is merged
    first), or nothing. max_versions: how many adapters it holds, since requests that began with an older one continue with it.
    sleeps: it can free its device (vLLM's sleep mode). api_key: the key that it requires. adapter: is merged into the model
    before the start, in `dtype`. teachers: those that it serves; none at an engine of the student.
    """

    command: Sequence[str]
    model: str
    name: str
    args: Sequence[str]
    start_s: float
    loads: Literal["adapters", "weights", "nothing"] = "nothing"
    max_versions: int = 1
    sleeps: bool = False
    api_key: str | None = field(default=None, repr=False)
    adapter: str | None = None
    dtype: str = "float32"
    teachers: tuple[str, ...] = ()

    @property
    def who(self) -> str:
        """Whom it serves, in errors."""
        names = " and ".join(f"'{name}'" for name in self.teachers)
        return f"teacher{'s' * (len(self.teachers) > 1)} {names}" if names else "the student"


@dataclass(frozen=True)
class EngineState:
    """A server that answers: its URL, the longest sequence that it takes, the versions of the student that it holds, and how often
    it was started."""

    url: str
    context: int | None
    versions: tuple[str, ...]
    starts: int = 1


class Engine:
    """A vLLM server as a child of this process, with the versions of the student that `load` was given.

    After a failure the next call of `state` restarts it with those versions. A Ray actor holds it; this class does not use Ray.
    """

    def __init__(self, plan: EnginePlan, host: str) -> None:
        self._plan = plan
        self._host = host
        self._folder: Path | None = None
        self._remover: subprocess.Popen[bytes] | None = None  # removes the folder when this process dies
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._context: int | None = None
        self._versions: deque[str] = deque()
        self.awake = False
        self.starts = 0
        # no proxy stands before servers of this run
        key = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
        self._client = httpx2.Client(trust_env=False, headers=key, timeout=plan.start_s)

    def state(self) -> EngineState:
        """The server's state, once it answers and is awake. A server that died or does not answer is restarted. Raises RunError
        when it does not start."""
        if not self._is_alive():
            self._start()
            for name in self._versions if self._plan.loads == "adapters" else ():
                self._load_version(name)
        elif not self.awake:
            self._try_or_restart(lambda: self._ask("/wake_up"))
            self.awake = True
        return EngineState(self._url, self._context, tuple(self._versions), self.starts)

    def sleep(self) -> None:
        """Free the device; the weights stay in main memory. `state` wakes the server."""
        if self.awake and self._plan.sleeps and self._process is not None and self._process.poll() is None:
            try:
                self._ask("/sleep?level=1&mode=wait")
            except _Unanswered:
                self._end()  # `state` restarts it
        self.awake = False

    def load(self, name: str, files: Files) -> None:
        """Load a version of the student; returns when the server has it. Old versions are unloaded."""
        self.state()
        if name in self._versions:
            return
        place = self._home / name
        with self._writes("the student", place):
            self._write(place, files)
        if self._plan.loads == "adapters" and len(self._versions) >= self._plan.max_versions:
            old = self._versions.popleft()
            self._try_or_restart(lambda: self._ask("/v1/unload_lora_adapter", {"lora_name": old}))
            shutil.rmtree(self._home / old, ignore_errors=True)
        if not self._try_or_restart(lambda: self._load_version(name)):
            self._load_version(name)
        self._versions.append(name)
        while self._plan.loads == "weights" and len(self._versions) > 1:
            shutil.rmtree(self._home / self._versions.popleft(), ignore_errors=True)

    def _is_alive(self) -> bool:
        """Whether the server answers, within some time: its process may outlive its engine core."""
        for attempt in range(_HEALTH_CHECKS):
            if self._process is None or self._process.poll() is not None:
                return False
            if self._answers():
                return True
            time.sleep(_POLL_S * (attempt + 1))
        return False

    def _try_or_restart(self, call: Callable[[], object]) -> bool:
        """Whether the call succeeded; if the server failed meanwhile, it was restarted instead."""
        try:
            call()
        except _Unanswered:
            self._end()
            self.state()
            return False
        return True

    def stop(self) -> None:
        """End the server with its processes, and remove its folder."""
        self._end()
        self._client.close()
        if self._remover is not None:
            assert self._remover.stdin is not None
            self._remover.stdin.close()
            self._remover.wait()

    @property
    def _home(self) -> Path:
        assert self._folder is not None, "state() comes first"
        return self._folder

    @contextlib.contextmanager
    def _writes(self, what: str, place: Path) -> Iterator[None]:
        """Remove what is at `place`, then write there. Raises RunError for an error of the disk."""
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
        """Write the folder of a version; where the engine loads weights, an adapter becomes a whole model."""
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content.data)
        if self._plan.loads == "weights" and (place / "adapter_config.json").exists():
            adapter = place.rename(place.with_name(f".{place.name}.adapter"))
            self._merge(adapter, place)
            shutil.rmtree(adapter)

    def _merge(self, adapter: Path, place: Path) -> None:
        from opd.models.export import write_merged  # imports torch, which most engines do not need

        whose = self._plan.teachers[0] if self._plan.teachers else self._plan.name
        write_merged(self._plan.model, adapter, place, dtype=self._plan.dtype, whose=whose)

    def _load_version(self, name: str) -> None:
        """Let the server load a version from its folder."""
        place = str(self._home / name)
        if self._plan.loads == "adapters":
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": place})
            return
        # running requests end first; the prefix cache belongs to the old weights
        self._ask("/pause?mode=wait&clear_cache=true")
        log_size = (self._home / _LOG).stat().st_size
        try:
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": place}})
        finally:
            self._ask("/resume")
        with (self._home / _LOG).open("rb") as log:
            log.seek(log_size)
            if _NOT_LOADED in log.read():  # vLLM reports success all the same
                raise RunError(
                    f"engine of {self._plan.who} did not find all weights of '{self._plan.model}' in the update, as its log says; "
                    "vLLM cannot reload this architecture: leave merge_adapter out"
                )

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"ended")  # keeps the folder for a restart
            self._process.stdin.close()  # the supervisor ends the server
        self._process.wait()
        self._process = None

    def _start(self) -> None:
        self._end()
        plan = self._plan
        if shutil.which(plan.command[0]) is None:
            raise RunError(
                f"cluster.engine_command = '{plan.command[0]}' was not found on {socket.gethostname()}; give the path of the vllm "
                "command of an environment with vLLM"
            )
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="opd-engine-"))
            self._remover = supervised(self._folder, ["sleep", "infinity"], stdout=subprocess.DEVNULL)
        source = self._source()  # which may take minutes
        self._port = _free_port(self._port)  # its old port if possible, which its clients know
        command = [*plan.command, "--model", source, "--served-model-name", plan.name]
        command += ["--host", self._host, "--port", str(self._port), *plan.args]
        with (self._folder / _LOG).open("a") as log:
            began = log.tell()
            try:
                self._process = supervised(self._folder, command, stdout=log, env=self._environment())
            except OSError as error:
                raise RunError(f"engine of {plan.who} cannot be started: {error}") from None
        self._wait(began)
        self.starts += 1
        self.awake = True

    def _source(self) -> str:
        """The model that the server starts with: the last loaded weights, since clients know its address already."""
        if self._plan.loads == "weights" and self._versions:
            return str(self._home / self._versions[-1])
        return self._plan.model if self._plan.adapter is None else self._merged(self._plan.adapter)

    def _merged(self, adapter: str) -> str:
        """The folder of the model with the adapter merged, written before the first start."""
        place = self._home / "merged"
        if not place.exists():
            staging = self._home / ".merged"
            with self._writes("its merged model", staging):
                self._merge(Path(adapter), staging)
            staging.rename(place)
        return str(place)

    def _environment(self) -> dict[str, str]:
        found = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        found.pop("OMP_NUM_THREADS", None)  # Ray sets it to the actor's CPUs
        if self._plan.loads == "weights" or self._plan.sleeps:
            found["VLLM_SERVER_DEV_MODE"] = "1"  # enables the paths for sleep and for new weights
        if self._plan.api_key:
            found["VLLM_API_KEY"] = self._plan.api_key
        return found

    def _wait(self, began: int) -> None:
        """Wait until the server answers, and read its context. began: where its log begins, in bytes."""
        plan, log = self._plan, self._home / _LOG
        assert self._process is not None
        end = time.monotonic() + plan.start_s
        while True:
            if self._process.poll() is None and self._answers():
                break  # our server, not another one at its port
            if (code := self._process.poll()) is not None:
                raise RunError(
                    f"engine of {plan.who} ended while it started: {reason_of(log, began, code)}; {keep_log(log)}"
                )
            if time.monotonic() > end:
                self._end()
                raise RunError(
                    f"engine of {plan.who} did not answer in cluster.engine_start_s = {plan.start_s:g} s; its last log line: "
                    f"{(lines_of(log, began) or ['none'])[-1][:200]}; {keep_log(log)}"
                )
            time.sleep(_POLL_S)
        models = self._ask("/v1/models", method="GET").json()["data"]
        self._context = next((entry.get("max_model_len") for entry in models if entry["id"] == plan.name), None)

    def _answers(self) -> bool:
        try:
            return self._client.get(f"{self._url}/health", timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    @property
    def _url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def _ask(self, path: str, body: Mapping[str, Any] | None = None, *, method: str = "POST") -> httpx2.Response:
        try:
            answer = self._client.request(method, self._url + path, json=body)
        except httpx2.TransportError as error:
            raise _Unanswered(f"engine of {self._plan.who} does not answer {path}: {error or type(error)}") from None
        if answer.status_code != 200:
            refused = f"engine of {self._plan.who} refuses {path}: {answer.status_code}: {one_line(answer.text)[:200]}"
            raise _Unanswered(refused) if answer.status_code >= 500 else RunError(refused)
        return answer


class _Unanswered(RunError):
    """A server that does not answer, or failed; a restart may help."""


def _free_port(wanted: int) -> int:
    for port in dict.fromkeys((wanted, 0)):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were cut linger
            found.bind(("", port))
            return int(found.getsockname()[1])
    raise RunError("no port of this machine is free for an engine")
