"""The real model and the experts that ship with the examples: what the demo starts from is true."""

from dataclasses import replace
from pathlib import Path

import pytest

import opd
from opd.checks.startup import run_checks
from opd.data.tasks import make_tasks, read_tasks
from opd.evaluate import evaluate, pick
from opd.local.build import build
from opd.rewards.judge import Judge

MODEL = Path("models/smollm2-135m-instruct")


@pytest.fixture(scope="module")
def backend():
    assert MODEL.is_dir(), "run `make model`"
    return build(opd.load_config("recipes/merge.toml", ["compute.threads=2"]))


@pytest.mark.real
def test_the_base_fails_both_tasks_and_each_expert_solves_its_own(backend):
    for name, task in make_tasks(backend.config.tasks).items():
        prompts = pick(task.prompts("held_out"), 48, seed=1)
        base = evaluate(backend.sampler(), prompts, Judge(task.reward))
        expert = evaluate(backend.sampler(backend.policies[name]), prompts, Judge(task.reward))
        assert base.correct is not None
        assert expert.correct is not None
        assert base.accuracy < 0.10
        # Half a dozen below the 90 % that 256 prompts show: 48 prompts leave that much to chance.
        assert expert.accuracy > 0.83


@pytest.mark.real
def test_every_start_up_check_passes_on_the_demos_recipe(backend):
    task_data = read_tasks(backend.config, None)
    few = {name: {split: chosen[:20] for split, chosen in splits.items()} for name, splits in task_data.prompts.items()}
    findings = run_checks(backend.config, backend, replace(task_data, prompts=few))
    assert len(findings) >= 7
    assert [f.name for f in findings if not f.passed] == []
