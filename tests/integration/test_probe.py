"""The probe: every estimator on a toy student and its teachers, through the learner that trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import toy_recipe, write_toml
from typer.testing import CliRunner

import opd
from opd.cli import app
from opd_theory import probe as probe_module
from opd_theory.probe import ESTIMATORS, Probe, probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def found(folder: Path) -> Probe:
    return probe(opd.parse_config(toy_recipe(folder)), num_prompts=6, samples=4, repeats=200)


def test_every_estimator_has_a_row_with_its_intervals(found: Probe):
    assert [row.estimator for row in found.rows] == list(ESTIMATORS)
    assert (found.prompts, found.samples) == (6, 4)
    assert found.kl_token > 0
    for row in found.rows:
        assert row.variance_interval[0] <= row.variance <= row.variance_interval[1]
        assert -1.0 <= row.cosine <= 1.0 + 1e-6
        assert row.cosine_interval[0] <= row.cosine_interval[1]


def test_the_reference_is_itself_and_larger_supports_come_nearer(found: Probe):
    rows = {row.estimator: row for row in found.rows}
    assert rows["exact"].cosine == pytest.approx(1.0, abs=1e-6)
    assert rows["exact"].mean_cosine == pytest.approx(1.0, abs=1e-6)
    top_k_tails = [rows[f"support, k = {k}"].cosine for k in (8, 16, 32, 64)]
    assert top_k_tails == sorted(top_k_tails)
    assert top_k_tails[-1] > 0.9


def test_the_exact_term_varies_least(found: Probe):
    rows = {row.estimator: row.variance for row in found.rows}
    assert rows["immediate"] == pytest.approx(1.0)
    assert rows["exact"] < 0.5
    assert rows["exact"] < rows["exact_to_go, discount 1"] < rows["to_go, discount 1"]


def test_products_of_different_prompts_alone_see_through_the_noise():
    generator = np.random.default_rng(0)
    signal, noise = generator.normal(size=400), generator.normal(size=(2, 50, 400))
    ours, theirs = signal + 3 * noise[0], signal + 3 * noise[1]
    pairs = [a @ b.T for a, b in ((ours, theirs), (ours, ours), (theirs, theirs))]
    whole = np.ones(50)
    assert probe_module._cosine(pairs, whole, apart=True) == pytest.approx(1.0, abs=0.05)
    assert probe_module._cosine(pairs, whole, apart=False) < 0.9


def test_a_sketch_keeps_inner_products(folder: Path):
    config = opd.parse_config(toy_recipe(folder))
    backend = probe_module.build(config)
    learner = backend.learner()
    sketch = probe_module._Sketch(learner)
    generator = torch.Generator().manual_seed(0)
    vectors, sketches = [], []
    for _ in range(2):
        for weight in learner.weights().values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        vectors.append(torch.cat([weight.grad.flatten() for weight in learner.weights().values()]).numpy())
        sketches.append(sketch.take(learner))
    exact = np.array([[a @ b for b in vectors] for a in vectors])
    kept = np.array([[a @ b for b in sketches] for a in sketches])
    assert np.abs(kept - exact).max() < 0.02 * exact[0, 0]
    assert all(weight.grad is None for weight in learner.weights().values())


def test_the_command_prints_the_table_and_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        probe_module, "ESTIMATORS", {n: ESTIMATORS[n] for n in ("exact", "immediate", "immediate + KL")}
    )
    recipe = write_toml(tmp_path / "recipe.toml", toy_recipe(tmp_path))
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["theory", "--probe", recipe, "--output", str(output), "seed=1"])
    assert result.exit_code == 0, result.output
    assert "| immediate + KL |" in result.output
    assert (output / "probe.md").read_text() in result.output
    assert len(json.loads((output / "probe.json").read_text())["rows"]) == 3


def test_overrides_without_a_recipe_are_refused(tmp_path: Path):
    result = CliRunner().invoke(app, ["theory", "steps=3", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "key=value pairs work only with --probe RECIPE" in result.output


def test_one_prompt_is_too_few(folder: Path):
    with pytest.raises(opd.OpdError, match="needs 2 or more"):
        probe(opd.parse_config(toy_recipe(folder)), num_prompts=1)
