"""One vLLM server on one node: started, watched, started again, and given the student's adapters."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import RunError, one_line

_POLL_S = 0.25
_SAID = 40  # lines of a server's log that an error looks back on


@dataclass(frozen=True)
class EnginePlan:
    """How an engine is started: the command, what it serves and under which name, and for how long it may start; kept: how many
    versions of the student it holds, for requests that began with an older one go on with it."""

    command: Sequence[str]
    model: str
    name: str
    args: Sequence[str]
    start_s: float
    kept: int = 2


def _free_port(wanted: int) -> int:
    for port in dict.fromkeys((wanted, 0)):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were cut linger
            found.bind(("", port))
            return int(found.getsockname()[1])
    raise RunError("no port of this machine is free for an engine")


class Engine:
    """A vLLM server as a child of this process. Its adapters are those that `load` was given, by version.

    A server that died is started again by the next `address`, with the newest adapter. Meant to live in a Ray actor; knows nothing
    of Ray.
    """

    def __init__(self, plan: EnginePlan, host: str) -> None:
        self._plan = plan
        self._host = host
        self._folder = Path(tempfile.mkdtemp(prefix="opd-engine-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        self._versions: deque[str] = deque()

    def address(self) -> str:
        """The server's URL, once it answers. Raises RunError when it does not start."""
        if self._process is None or self._process.poll() is not None:
            self._start()
            for name in self._versions:
                self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder / name)})
        return f"http://{self._host}:{self._port}"

    def load(self, name: str, files: Mapping[str, bytes]) -> str:
        """Serve an adapter under a name; returns the name once the server has it. Older ones beyond the last few are dropped."""
        self.address()
        if name in self._versions:
            return name
        place = self._folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for file, content in files.items():
            (place / file).write_bytes(content)
        while len(self._versions) >= self._plan.kept:
            old = self._versions.popleft()
            self._post("/v1/unload_lora_adapter", {"lora_name": old})
            shutil.rmtree(self._folder / old, ignore_errors=True)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        self._versions.append(name)
        return name

    def stop(self) -> None:
        """End the server and all that it started, and remove what was written for it."""
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # the keeper ends what it keeps
        self._process.wait()
        self._process = None

    def _start(self) -> None:
        self._end()
        self._port = _free_port(self._port)  # the same one again if it can be, which its clients know
        plan = self._plan
        if shutil.which(plan.command[0]) is None:
            raise RunError(
                f"cluster.engine_command = '{plan.command[0]}' is no command on {socket.gethostname()}; name one of an environment "
                "that has vLLM"
            )
        command = [*plan.command, "--model", plan.model, "--served-model-name", plan.name]
        command += ["--host", "0.0.0.0", "--port", str(self._port), *plan.args]
        env = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        env.pop("OMP_NUM_THREADS", None)  # Ray sets it to the CPUs that were booked
        log = self._folder / "server.log"
        with log.open("a") as said:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "opd.distributed.keeper", *command],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
            except OSError as error:
                raise RunError(f"engine '{plan.name}' cannot be started: {error}") from None
        end = time.monotonic() + plan.start_s
        while not self._answers():
            if self._process.poll() is not None:
                raise RunError(f"engine '{plan.name}' ended while it started: {self._last_words(log)}")
            if time.monotonic() > end:
                self._end()
                raise RunError(
                    f"engine '{plan.name}' did not answer in cluster.engine_start_s = {plan.start_s:g} s: {self._last_words(log)}"
                )
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _last_words(self, log: Path) -> str:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-_SAID:]
        telling = [line for line in lines if "rror" in line] or lines
        return one_line(telling[-1])[-300:] if telling else "it said nothing"

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._plan.start_s):
                return
        except urllib.error.HTTPError as error:
            said = one_line(error.read().decode(errors="replace"))[:200]
            raise RunError(f"engine '{self._plan.name}' refuses {path}: {error.code}: {said}") from None
        except OSError as error:
            raise RunError(f"engine '{self._plan.name}' cannot be asked for {path}: {error}") from None
