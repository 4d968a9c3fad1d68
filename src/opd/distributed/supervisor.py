"""Runs a command for as long as somebody holds the other end of this process's standard input.

A server is a tree of processes in a session of its own. Whoever started it may be killed without a word; its end of the pipe then
closes, and the whole tree goes with it, and the folder that was made for it. Who ends it in order says so before closing the pipe,
and keeps the folder. Ray kills an actor's children with it, so the process that watches the pipe is nobody's
child: the one that was started waits for it, and ends with its exit code.

    python -m opd.distributed.supervisor FOLDER COMMAND ...
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def main() -> int:
    """Start the command, end it when standard input ends; returns its exit code."""
    ended, said = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(ended)
            os.write(said, bytes([_keep(sys.argv[1], sys.argv[2:]) & 0xFF]))
        os._exit(0)
    os.close(said)
    os.wait()
    return (os.read(ended, 1) or b"\x01")[0]


def _keep(folder: str, command: list[str]) -> int:
    left: list[str] = []
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent)

    def watch() -> None:
        if not sys.stdin.buffer.read():
            left.append(folder)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    with contextlib.suppress(ProcessLookupError):  # what it leaves behind
        os.killpg(child.pid, signal.SIGKILL)
    for place in left:
        shutil.rmtree(place, ignore_errors=True)
    return code


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
