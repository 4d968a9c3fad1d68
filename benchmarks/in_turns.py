"""Two programs on the same work, in turns: these machines are shared, so only ratios of neighbouring runs mean anything."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PEERS = Path(".venv-peers/bin/python")


def ask(command: Sequence[str]) -> dict[str, Any]:
    """Run a program to its end; returns the JSON object on its last line. Exits with what it said when it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(commands: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Each command's answers, one a round; every round runs them all, the order turned about from round to round."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(ask(commands[name]))
            print(f"round {number + 1} {name}: {json.dumps(found[name][-1])}", file=sys.stderr, flush=True)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """theirs / ours of each round: the median, and of several the least and the largest."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"


def require_peers() -> None:
    if not PEERS.exists():
        raise SystemExit(f"{PEERS} is missing; make it with: make peers")
