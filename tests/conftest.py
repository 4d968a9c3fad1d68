import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# Every call of the mathematics, by a test or by training, has its shapes and dtypes checked.
install_import_hook("opd.objectives", "beartype.beartype")

# What several files of tests share asserts too.
pytest.register_assert_rewrite("benches", "call_texts", "call_turns", "factories", "games", "pairs", "toy_runs")

# Laws are tried on the same examples each time, however slow the machine; `pytest --hypothesis-profile=search` draws others.
_PATIENT: Any = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("fixed", derandomize=True, **_PATIENT)
hypothesis.settings.register_profile("search", **_PATIENT)
hypothesis.settings.load_profile("fixed")

# Nothing in the tests may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _no_pictures() -> Iterator[None]:
    """The picture of its curves is half of a toy run's time; `with_pictures` of toy_runs.py draws it."""

    def note(metrics: Any, path: Path, *, title: str) -> None:
        path.write_text(f"no curves of {title}", encoding="utf-8")

    with patch("opd.logging.writers.draw_curves", note):
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Many small tensors: one thread is many times faster than two."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    random.seed(0)
    torch.manual_seed(0)
