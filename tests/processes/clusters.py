"""Runs on a cluster of toys: where their parts go, and which of them live."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

ENGINE = [sys.executable, str(Path(__file__).with_name("toy_engine.py"))]


def cluster_of(**changes: Any) -> dict[str, Any]:
    """The table of a recipe with toy engines."""
    return {"engine_command": ENGINE, "engine_start_s": 300, "cpus_per_rank": 0, "cpus_per_engine": 0, **changes}


def processes(words: str) -> list[int]:
    """Those whose command has these words, and that this worker of pytest started."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in command and int(place.name) != os.getpid() and _ours(int(place.name)):
            found.append(int(place.name))
    return found


def _ours(pid: int, ancestors: int = 3) -> bool:
    """Whether a process, or the one that started it, has the name of this worker of pytest in its environment.

    Ray writes the names of its actors over their environments, so that those of their parents are asked too.
    """
    name = os.environ.get("PYTEST_XDIST_WORKER")
    if name is None:
        return True
    try:
        place = Path(f"/proc/{pid}")
        if f"PYTEST_XDIST_TESTRUNUID={os.environ['PYTEST_XDIST_TESTRUNUID']}" in (text := _environment(place)):
            return f"PYTEST_XDIST_WORKER={name}" in text
        parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return ancestors > 0 and parent > 1 and _ours(parent, ancestors - 1)


def _environment(place: Path) -> list[str]:
    return (place / "environ").read_bytes().decode(errors="replace").split("\0")


def kill(words: str) -> None:
    victims = processes(words)
    assert victims, words
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
