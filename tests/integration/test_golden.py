"""What a change that claims no numerical effect leaves as it is."""

import json
from pathlib import Path

import golden
import pytest


@pytest.mark.parametrize("name", golden.RUNS)
def test_ten_steps_have_the_losses_and_gradient_norms_that_they_had(name: str, tmp_path: Path):
    before = json.loads(golden.FILE.read_text(encoding="utf-8"))[name]
    with golden.replayed(before["responses"]):
        now = golden.curves(name, tmp_path)
    for key in golden.KEYS:
        assert len(now[key]) == 10
        assert now[key] == pytest.approx(before["curves"][key], rel=1e-6, abs=1e-6)
