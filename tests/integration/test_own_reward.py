"""A run with a reward function of the user's own: it cannot be continued or evaluated with another."""

from pathlib import Path

import pytest
from factories import toy_recipe, write_toml
from typer.testing import CliRunner

import opd
from opd.cli import app
from opd.errors import ModelError, RunError


def always(prompt: object, response: str) -> float:
    return 1.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    return opd.train(opd.parse_config(toy_recipe(folder, steps=2)), reward=always).run


def test_it_is_asked_for_again(run: Path):
    table = (run / "parity.md").read_text()
    for continued in (opd.Trainer.resume, opd.Trainer.evaluate):
        with pytest.raises(RunError, match=r"was started with reward from Python"):
            continued(opd.Trainer(run))
    result = CliRunner().invoke(app, ["eval", str(run)])
    assert result.exit_code == 2
    assert "opd.Trainer(" in result.output
    assert (run / "parity.md").read_text() == table


def test_with_it_the_table_is_the_same(run: Path):
    table = (run / "parity.md").read_text()
    rows = opd.Trainer(run, reward=always).evaluate()
    assert all(row.after.accuracy == 1.0 for row in rows)
    assert (run / "parity.md").read_text() == table


def test_without_evaluation_prompts_there_is_nothing_to_evaluate(tmp_path: Path):
    result = opd.train(opd.parse_config(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0})))
    with pytest.raises(
        RunError, match=r"set how many prompts of each task and split to evaluate, such as evaluation.num_prompts=128"
    ):
        opd.Trainer(result.run).evaluate()


def test_alignment_without_another_tokenizer_is_refused(tmp_path: Path):
    tree = toy_recipe(tmp_path, alignment={"credit": "full"})
    result = CliRunner().invoke(app, ["check", write_toml(tmp_path / "recipe.toml", tree)])
    assert result.exit_code == 2
    assert "[alignment] has no effect, because no teacher has another tokenizer" in result.output
    with pytest.raises(ModelError):
        opd.train(opd.parse_config(tree))


class Done:
    async def reset(self) -> tuple[()]:
        return ()

    async def step(self, message: object) -> opd.Step:
        return opd.Step(done=True)


def test_each_callable_is_asked_for_again(tmp_path: Path):
    def environment(prompt: object) -> Done:
        return Done()

    config = opd.parse_config(toy_recipe(tmp_path, steps=2, evaluation={"num_prompts": 0}))
    run = opd.train(config, reward=always, environment=environment).run
    with pytest.raises(
        RunError, match=r"was started with environment from Python.*opd.Trainer\(.*, environment=\.\.\.\)"
    ):
        opd.Trainer(run, reward=always).resume()
    with pytest.raises(RunError, match=r"with reward, environment from Python"):
        opd.Trainer(run).resume()
    assert opd.Trainer(run, reward=always, environment=environment).resume().finished
