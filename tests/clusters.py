"""Runs on a cluster of toys: where their parts go, and which of them live."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

ENGINE = [sys.executable, str(Path(__file__).with_name("toy_engine.py"))]


def cluster_of(**changes: Any) -> dict[str, Any]:
    """The table of a recipe with toy engines."""
    return {"engine_command": ENGINE, "engine_start_s": 60, "cpus_per_rank": 0, "cpus_per_engine": 0, **changes}


def processes(words: str) -> list[int]:
    """Those whose command has these words."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in command and int(place.name) != os.getpid():
            found.append(int(place.name))
    return found


def kill(words: str) -> None:
    victims = processes(words)
    assert victims, words
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
