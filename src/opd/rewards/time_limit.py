"""Calls with a strict time limit: they run in a separate process, which is killed at the limit.

Signals alone would not do. They work in the main thread alone, and none interrupts a power of large numbers that Python computes
in C.
"""

import atexit
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from opd.errors import RunError

_START_S = 120.0  # to import what the first call needs, on a busy machine


class Bounded:
    """A process that calls functions of importable modules, one call at a time. Threads may share it; it starts with the first call
    and is started again after one that it was killed for."""

    def __init__(self, *imports: str) -> None:
        """imports: modules that the process imports before the first call, which takes no time of its limit."""
        self._imports = list(imports)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def call(self, function: Callable[..., Any], *arguments: str, limit_s: float) -> Any:
        """function(*arguments), which has to be plain data; the function is found by its module and name.

        Raises TimeoutError after `limit_s` seconds, RuntimeError with what the function raised, and RunError where no process can
        be started.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                answer = self._ask({"call": [function.__module__, function.__qualname__, *arguments]}, limit_s)
            except BaseException:  # its answer would be taken for that of the next call
                self.close()
                raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        self.close()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                start_new_session=True,  # Ctrl-C in a terminal is for the run
            )
            self._ask({"import": self._imports}, _START_S)
        except (OSError, TimeoutError) as error:
            self.close()
            raise RunError(f"the process that verifies answers cannot be started: {error}") from None

    def _ask(self, question: dict[str, list[str]], limit_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise TimeoutError("it ended") from None
        end, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no answer in {limit_s:g} s")
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                raise TimeoutError("it ended")  # out of memory, say
            line += part
        return json.loads(line)


BOUNDED = Bounded("math_verify", "opd.rewards.verifiers")
"""The process that verifiers share."""


class _TooLong(BaseException):
    """Passes through the handlers of somebody's code."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in code that takes longer. Only the main thread has this limit, which is a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except _TooLong:
        raise TimeoutError(f"no answer in {seconds} s") from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _serve() -> None:
    """Answer one question a line until there is none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what somebody's code prints is no answer
    for line in sys.stdin:
        question = json.loads(line)
        try:
            value = None
            for name in question.get("import", ()):
                importlib.import_module(name)
            if "call" in question:
                module, name, *arguments = question["call"]
                value = getattr(importlib.import_module(module), name)(*arguments)
            said = json.dumps({"value": value})
        except Exception as error:
            said = json.dumps({"error": f"{type(error).__name__}: {error}"})
        answers.write(said + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
