"""What an engine's log says of why it ended."""

import os
import re
import shutil
import signal
import socket
import tempfile
from pathlib import Path

from opd.errors import one_line

# "ValueError: ...", a bare "AssertionError", "error: ..." of a command line, and the second line of pydantic's errors
_ERROR = re.compile(r"\b[\w.]*(?:Error|Exception)(?:: .*|$)|\berror: .*|\b(?:Value error|Assertion failed), .*")
# What is no reason: an error that somebody has dealt with, one that only points above, and what an interpreter says as it ends.
_NO_REASON = re.compile(r"\b(?:DEBUG|INFO|WARNING)\b|root cause above|Python is likely shutting down")
_SHOWN = 300


def lines_of(log: Path, began: int) -> list[str]:
    """What a log says from byte `began` on."""
    with log.open("rb") as text:
        text.seek(began)
        return [one_line(line) for line in text.read().decode(errors="replace").splitlines() if line.strip()]


def reason(log: Path, began: int, code: int) -> str:
    """Why an engine ended: the last error that its log names, or else the signal that ended it, or the last thing it said.

    code: as it was passed on by `opd.distributed.supervisor`, one byte.
    """
    lines = lines_of(log, began)
    errors = [found[0] for line in lines if not _NO_REASON.search(line) and (found := _ERROR.search(line))]
    if errors:
        return errors[-1][:_SHOWN]
    last = f"last it said: {lines[-1][:_SHOWN]}" if lines else "it said nothing"
    number = 256 - code
    if number not in set(signal.Signals):
        return last
    memory = ", as where main memory ends" if number == signal.SIGKILL else ""
    return f"{signal.Signals(number).name} ended it{memory}; {last}"


def keep(log: Path) -> str:
    """Put a log where it outlives its engine, and say where."""
    try:
        handle, place = tempfile.mkstemp(prefix="opd-engine-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log, place)
    except OSError as error:
        return f"its log could not be kept ({error.strerror})"
    return f"all that it said: {place} on {socket.gethostname()}"
