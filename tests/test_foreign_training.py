"""A student learns from a teacher with another tokenizer: the same loop as ever, on toys."""

from pathlib import Path

from factories import toy_recipe
from test_foreign_teacher import save_foreign
from zoo import toy_ascii

import opd


def test_the_reverse_kl_per_byte_falls(tmp_path: Path):
    merges = [(a, b) for a in "aeiou" for b in "nrst"]
    tree = toy_recipe(
        tmp_path,
        steps=60,
        objective={"type": "immediate", "baseline": "leave_one_out"},
        sampling={"prompts_per_step": 4, "group_size": 8, "max_new_tokens": 8},
        optimizer={"lr": 5e-3, "warmup_steps": 1, "schedule": "constant"},
        evaluation={"num_prompts": 0},
        checkpoint={"every": 60},
    )
    tree["student"] = save_foreign(tmp_path / "ascii", toy_ascii(), seed=4)
    tree["teachers"] = {"even": {"model": save_foreign(tmp_path / "merged", toy_ascii(*merges), seed=5)}}
    tree["tasks"]["second"]["teacher"] = "even"
    found: list[float] = []
    opd.train(opd.parse_config(tree), on_step=lambda report: found.append(report.values["kl/byte/mean"]))
    first, last = sum(found[:10]) / 10, sum(found[-20:]) / 20
    assert last < 0.88 * first, (first, last)  # 3.96 and 3.31 nats a byte when this was written
