import os

import pytest
import torch
from jaxtyping import install_import_hook

# Every call of the mathematics, by a test or by training, has its shapes and dtypes checked.
install_import_hook("opd.objectives", "beartype.beartype")

# What several files of tests share asserts too.
pytest.register_assert_rewrite("benches", "call_texts", "call_turns", "factories", "games", "pairs", "runs")

# Nothing in the tests may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Many small tensors: one thread is many times faster than two."""
    torch.set_num_threads(1)
