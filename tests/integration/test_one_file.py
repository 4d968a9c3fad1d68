"""The example that hides nothing and the library are the same algorithm."""

import importlib.util
import json
from pathlib import Path

import pytest
from factories import save_toy, write_prompts

import opd

STEPS = 10


def _one_file():
    path = Path(__file__).parents[2] / "examples" / "opd_in_one_file.py"
    spec = importlib.util.spec_from_file_location("opd_in_one_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _expert(folder, student, prompts, seed):
    """A toy adapter whose policy differs from the base's."""
    tree = {
        "student": student,
        "output": str(folder),
        "steps": 12,
        "seed": seed,
        "batch_size": 4,
        "lora": {"rank": 4, "alpha": 8},
        "tasks": {"t": {"type": "file", "path": prompts, "teacher": "t"}},
        "optimizer": {"lr": 3e-2, "warmup_steps": 1},
        "evaluation": {"num_prompts": 0},
        "compute": {"threads": 1, "device": "cpu"},
    }
    opd.sft(opd.parse_config(tree, kind=opd.SftConfig))
    return str(folder / "student")


def test_the_one_file_example_gives_the_librarys_first_ten_steps(tmp_path):
    student = save_toy(tmp_path / "student")
    files = {name: write_prompts(tmp_path / f"{name}.jsonl", count) for name, count in (("a", 9), ("b", 14))}
    experts = {
        name: _expert(tmp_path / f"expert_{name}", student, path, i) for i, (name, path) in enumerate(files.items())
    }
    tree = {
        "student": student,
        "output": str(tmp_path / "run"),
        "steps": STEPS,
        "seed": 3,
        "temperature": 0.8,
        "lora": {"rank": 4, "alpha": 8},
        "teachers": {name: {"adapter": folder} for name, folder in experts.items()},
        "tasks": {name: {"type": "file", "path": path, "teacher": name} for name, path in files.items()},
        "sampling": {"prompts_per_step": 5, "group_size": 2, "max_new_tokens": 6},
        "optimizer": {"lr": 1e-2, "schedule": "linear", "warmup_steps": 2},
        "evaluation": {"num_prompts": 0},
        "compute": {"threads": 1, "device": "cpu", "max_tokens": 64},
    }
    opd.train(opd.parse_config(tree))
    library = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    one_file = _one_file()
    args = one_file.parse(
        [
            *("--model", student, "--steps", str(STEPS), "--prompts-per-step", "5", "--group-size", "2"),
            *("--max-new-tokens", "6", "--temperature", "0.8", "--rank", "4", "--alpha", "8"),
            *("--lr", "1e-2", "--warmup", "2", "--seed", "3"),
            *(part for name, folder in experts.items() for part in ("--teacher", f"{name}={folder}")),
            *(part for name, path in files.items() for part in ("--task", f"{name}={path}")),
        ]
    )
    history = one_file.distill(args)

    assert len(history) == len(library) == STEPS
    assert history[-1]["kl"] != pytest.approx(history[0]["kl"], rel=1e-2)  # ten steps that move
    for ours, theirs in zip(library, history, strict=True):
        assert ours["kl/token/mean"] == pytest.approx(theirs["kl"], rel=1e-4)
        assert ours["optim/grad_norm/mean"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
