"""Runs a command for as long as somebody holds the other end of this process's standard input.

A server is a tree of processes in a session of its own. Whoever started it may be killed without a word; its end of the pipe then
closes, and the whole tree goes with it.

    python -m opd.distributed.keeper COMMAND ...
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Start the command, end it when standard input ends; returns its exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        sys.stdin.buffer.read()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    with contextlib.suppress(ProcessLookupError):  # what it leaves behind
        os.killpg(child.pid, signal.SIGKILL)
    return code


if __name__ == "__main__":
    sys.exit(main())
