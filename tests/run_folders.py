"""What a run has left in its folder, to read and to compare with another's."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from opd import checkpoint


def lines_of(run: Path) -> list[str]:
    """metrics.jsonl line by line, without what a clock measured."""
    found = []
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = {key: value for key, value in json.loads(text).items() if not key.startswith("time/")}
        found.append(json.dumps(line))
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_result(run: Path, reference: Path) -> None:
    """Metrics bit for bit, the student byte for byte, every rollout, the newest checkpoint and the parity table."""
    ours, theirs = lines_of(run), lines_of(reference)
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        assert a == b, f"metrics.jsonl, line {number}"
    assert files_of(run / "student") == files_of(reference / "student")
    assert files_of(run / "rollouts") == files_of(reference / "rollouts")
    assert (run / "parity.json").read_bytes() == (reference / "parity.json").read_bytes()
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert files_of(newest) == files_of(reference / "checkpoints" / newest.name)
    assert not [p for p in run.rglob("*") if "partial" in p.name]


def checkpoints(run: Path) -> list[str]:
    return [p.name for p in checkpoint.list_checkpoints(run / "checkpoints")]


def newest(run: Path) -> tuple[Any, Any]:
    found = checkpoint.load_newest(run / "checkpoints", warn=pytest.fail)
    assert found is not None
    return load_file(found.path / "tensors.safetensors"), found.state
