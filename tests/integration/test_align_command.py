"""`opd align` and what `opd check` says of a teacher with another tokenizer."""

import json
from pathlib import Path

import pytest
from factories import byte_tokenizer, toy_recipe, write_toml
from templated import save_cross_tokenizer
from typer.testing import CliRunner
from zoo import toy_bpe

import opd
from opd.align import SAMPLE, as_plain, compare
from opd.cli import app


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders that hold tokenizers and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("student", byte_tokenizer()), ("teacher", toy_bpe(400))):
        tokenizer.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["align", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_both_sides_and_the_report(pair: tuple[str, str], tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat", encoding="utf-8")
    code, shown = run("--student", pair[0], "--teacher", pair[1], "--text", str(text))
    assert code == 0, shown
    assert "student  t|h|e ·|c|a|t ·|s|a|t" in shown
    assert "teacher  the ·cat ·sat" in shown
    assert "two tokenizers: 258 tokens against" in shown
    assert "0.0 % of 11 bytes in one-to-one chunks" in shown
    assert "0.0 % of tokens masked" in shown


def test_json_holds_every_chunk(pair: tuple[str, str]):
    code, shown = run("--student", pair[0], "--teacher", pair[1], "--json")
    assert code == 0
    found = json.loads(shown)
    [response] = found["responses"]
    assert "".join("".join(side["student"]) for side in response[:-1]).encode() != b""
    assert found["facts"]["bytes"] == len(SAMPLE.encode())
    assert found["shares"]["masked"] == 0.0
    assert found["failures"] == []


def test_one_tokenizer_says_so(pair: tuple[str, str]):
    found = compare(pair[0], pair[0])
    assert found.difference is None
    assert as_plain(found)["shares"]["one_to_one"] == 1.0
    assert all(side.masked is None and side.student == side.teacher for side in found.responses[0][:-1])


def test_rollouts_of_a_run(tmp_path: Path, pair: tuple[str, str]):
    opd.train(
        opd.parse_config(toy_recipe(tmp_path, steps=1, optimizer={"warmup_steps": 0}, evaluation={"num_prompts": 0}))
    )
    code, shown = run(
        "--student", str(tmp_path / "student"), "--teacher", pair[1], "--rollouts", str(tmp_path / "run"), "--json"
    )
    assert code == 0, shown
    assert json.loads(shown)["facts"]["turns"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no.txt"], "cannot read 'no.txt': No such file or directory"),
        (["--rollouts", "no-run"], "no-run"),
        (["--text", "a", "--rollouts", "b"], "give --text FILE or --rollouts RUN, not both"),
    ],
)
def test_bad_input_gets_one_line(pair: tuple[str, str], arguments: list[str], message: str):
    code, shown = run("--student", pair[0], "--teacher", pair[1], *arguments)
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown


def test_a_folder_without_a_tokenizer(pair: tuple[str, str], tmp_path: Path):
    code, shown = run("--student", str(tmp_path), "--teacher", pair[1])
    assert code == 2
    assert f"model '{tmp_path}' cannot be loaded" in shown


def test_a_text_that_is_no_text(pair: tuple[str, str], tmp_path: Path):
    (tmp_path / "b").write_bytes(b"ok \xff")
    code, shown = run("--student", pair[0], "--teacher", pair[1], "--text", str(tmp_path / "b"))
    assert code == 2
    assert "is no UTF-8 at byte 3" in shown


def test_check_shows_how_a_teacher_reads(tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"type": "immediate"})
    tree["teachers"]["odd"] = {"model": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(390))}
    result = CliRunner().invoke(app, ["check", write_toml(tmp_path / "recipe.toml", tree)])
    assert result.exit_code == 0, result.output
    assert "ok    teacher 'odd' reads the student's text: " in result.output
    assert "teacher 'odd' is not uniform" in result.output


def test_a_uniform_foreign_teacher_is_refused(tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"type": "immediate"})
    tree["teachers"]["odd"] = {"model": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(390), scale=0.0)}
    with pytest.raises(opd.OpdError, match="teacher 'odd' is not uniform"):
        opd.train(opd.parse_config(tree))
