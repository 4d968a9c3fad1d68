"""Runs a server for as long as the process that started it lives, and reads from its log why it ended.

    python -m opd.distributed.supervisor FOLDER COMMAND ...

The server is a tree of processes in its own session. If the process that started it is killed, its end of standard input closes;
the supervisor then ends the whole tree and removes FOLDER. To end it in order, write to standard input before closing it; FOLDER
stays. Ray kills the children of an actor with it, so a detached process watches standard input. The process that was
started waits for it, and exits with its code.
"""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from opd.errors import one_line

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h
# "ValueError: ...", a bare "AssertionError", "error: ..." of a command line, and the second line of pydantic's errors
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception)(?:: .*|$)|\berror: .*|\b(?:Value error|Assertion failed), .*")
# Not the reason: a handled error, one that only points above, and an interpreter's last words.
_NO_REASON = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b|root cause above|Python is likely shutting down")
_SHOWN = 300  # characters


def supervised(
    folder: Path, command: Sequence[str], stdout: int | IO[str], env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process; `folder` is then removed."""
    whole = [sys.executable, "-m", "opd.distributed.supervisor", str(folder), *command]
    return subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT, env=env)


def lines_of(log: Path, began: int) -> list[str]:
    """The lines of a log from byte `began` on, without blank ones."""
    with log.open("rb") as text:
        text.seek(began)
        return [one_line(line) for line in text.read().decode(errors="replace").splitlines() if line.strip()]


def reason_of(log: Path, began: int, code: int) -> str:
    """Why a server ended: the last error in its log, or else the signal that ended it and the last line of its log.

    code: the supervisor's exit code, one byte.
    """
    lines = lines_of(log, began)
    errors = [found[0] for line in lines if not _NO_REASON.search(line) and (found := _ERROR.search(line))]
    if errors:
        return errors[-1][:_SHOWN]
    last = f"its last log line: {lines[-1][:_SHOWN]}" if lines else "its log is empty"
    number = 256 - code
    if number not in set(signal.Signals):
        return last
    memory = ", as when main memory is full" if number == signal.SIGKILL else ""
    return f"{signal.Signals(number).name} ended it{memory}; {last}"


def keep_log(log: Path) -> str:
    """Copy a log to where it outlives its server, and say where."""
    try:
        handle, place = tempfile.mkstemp(prefix="opd-engine-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log, place)
    except OSError as error:
        return f"its log could not be kept ({error.strerror})"
    return f"its whole log: {place} on {socket.gethostname()}"


def main() -> int:
    """Start the command and end it when standard input ends; returns its exit code."""
    ended, said = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(ended)
            os.write(said, bytes([_watch(sys.argv[1], sys.argv[2:]) & 0xFF]))
        os._exit(0)
    os.close(said)
    os.wait()
    return (os.read(ended, 1) or b"\x01")[0]


def _watch(folder: str, command: list[str]) -> int:
    abandoned: list[str] = []
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent)

    def wait_for_end() -> None:
        if not sys.stdin.buffer.read():
            abandoned.append(folder)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()
    code = child.wait()
    with contextlib.suppress(ProcessLookupError):  # processes that the command left
        os.killpg(child.pid, signal.SIGKILL)
    for place in abandoned:
        shutil.rmtree(place, ignore_errors=True)
    return code


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
