"""docs/reference/models.md, and the architectures on it that have no test of their own."""

import re
from pathlib import Path

import pytest
import torch
from architectures import OTHERS, OTHERS_PADDED, network_of, options_of
from models_page import row, toys

from opd.config import LoraConfig
from opd.models.lora import add_student_adapter
from opd.models.packing_check import PACKED_WITHIN, settled_passes

# the model's own decoding, a step of its Mamba layers, is this far from its own pass over all tokens
OWN_STEP = {"nemotron_h": 2e-4}
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [*OTHERS, *OTHERS_PADDED])
def test_passes_equal_the_models_own_with_an_adapter_and_gradients(kind: str, dtype: torch.dtype):
    network = network_of(kind, options_of(kind), dtype)
    add_student_adapter(network, LoraConfig(rank=4), seed=0)
    network.activate("student", trainable=True)
    gaps, because = settled_passes(network, gradients=True)
    step = gaps["grown rows"]
    assert step < OWN_STEP.get(kind, PACKED_WITHIN / 20), gaps
    assert max(gap for probe, gap in gaps.items() if probe != "grown rows") < PACKED_WITHIN / 20, gaps
    assert list(gaps)[-1] == "gradients"
    assert (because is not None) == (kind in OTHERS_PADDED), because


def rows() -> dict[str, list[str]]:
    """The cells of the page by model type."""
    lines = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    return {cells[0].split("`")[1]: cells for cells in lines}


def test_the_page_lists_every_architecture_that_is_tried_and_its_figures_are_small():
    assert list(rows()) == list(toys())
    for kind, (_, passes, *figures) in rows().items():
        assert len(figures) == 4, kind
        assert re.match("packed$|padded: ", passes), kind
        assert max(map(float, figures)) < OWN_STEP.get(kind, 1e-4), kind


@pytest.mark.parametrize("kind", ["mistral", "lfm2", "gemma3", "mamba2"])
def test_a_row_of_the_page_is_what_is_found_now(kind: str):
    name, passes, *figures = row(kind, toys()[kind])
    assert [name, passes] == rows()[kind][:2]
    assert max(map(float, figures)) < 1e-4
