"""A run on a Ray cluster is the run in one process: the same losses, the same weights, whatever the number of ranks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import golden
import pytest
from factories import save_adapter, toy_recipe

import opd
from opd.report.run_folder import read_metrics
from opd.served.sampler import ServedSampler
from opd.tasks.episodes import Taken

ENGINE = [sys.executable, str(Path(__file__).with_name("toy_engine.py"))]


def cluster_of(**changes: Any) -> dict[str, Any]:
    return {"engine_command": ENGINE, "engine_start_s": 60, "cpus_per_rank": 0, "cpus_per_engine": 0, **changes}


@contextmanager
def replayed(calls: list[Any]) -> Iterator[None]:
    """Let engines' samplers return what was recorded, in order."""
    waiting = iter(calls)
    with patch.object(ServedSampler, "_take_turns", lambda *_, **__: [Taken(*turn) for turn in next(waiting)]):
        yield


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    tree = toy_recipe(
        folder,
        steps=10,
        sampling={"prompts_per_step": 4, "group_size": 3, "max_new_tokens": 12},
        optimizer={"lr": 1e-3, "warmup_steps": 1},
        compute={"max_tokens": 96, "threads": 1},
        evaluation={"num_prompts": 0},
        **changes,
    )
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    return tree


OBJECTIVES = {
    "exact": {"objective": {"type": "exact"}},
    "exact to go": {"objective": {"type": "exact_to_go", "discount": 0.5, "baseline": "leave_one_out"}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_steps_are_those_of_one_process(name: str, tmp_path: Path):
    calls: list[Any] = []
    with golden.recorded(calls):
        here = opd.train(opd.parse_config(recipe(tmp_path, **OBJECTIVES[name]))).run
    found = {}
    for ranks in (1, 2):
        tree = recipe(tmp_path / str(ranks), **OBJECTIVES[name])
        tree |= {"mode": "distributed", "cluster": cluster_of(learner_ranks=ranks)}
        with replayed(calls):
            found[ranks] = read_metrics(opd.train(opd.parse_config(tree)).run)
    for plain, one, two in zip(read_metrics(here), found[1], found[2], strict=True):
        for key in ("loss/total/sum", "optim/grad_norm/mean", "kl/token/mean"):
            assert one[key] == pytest.approx(plain[key], rel=1e-5), (plain["step"], key)
            assert two[key] == pytest.approx(one[key], rel=1e-6), (plain["step"], key)
        assert plain.keys() == two.keys()
