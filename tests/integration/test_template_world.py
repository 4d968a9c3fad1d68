"""What a chat template reads of the world stands still for a whole run: the clock, and what it draws at random."""

import random
import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import prompt, sft_recipe, toy_recipe
from templated import CHATTY, CLOCK, TERSE, ending, save_cross_tokenizer, save_templated, templated
from zoo import toy_bpe

import opd
from opd.config import SftConfig
from opd.errors import ConfigError
from opd.local.build import build, build_student
from opd.logging.run_folder import RunFolder, read_metrics, read_rollouts
from opd.score_cache import identities
from opd.text.chat import Chat
from opd.text.template import clock_of, freeze

PLAIN = ending("<|im_end|>\n")
MOMENT = datetime(2026, 11, 30, 12, 0, 0, 125)
WORLDS = {
    "the time": CLOCK + PLAIN,
    "a date that a variable may replace": (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%S %f') %}{% endif %}{{ date_string }}\n" + PLAIN
    ),
    "the time within a macro": "{% macro now() %}{{ strftime_now('%X.%f') }}{% endmacro %}{{ now() }}\n" + PLAIN,
    "a choice": "{{ range(90000) | random }}\n" + PLAIN,
    "several choices": "{% for m in messages %}{{ 'abcdefghijklmnop' | list | random }}{% endfor %}\n" + PLAIN,
    "made-up words": "{{ lipsum(n=1, html=false) }}\n" + PLAIN,
}  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
def test_a_conversation_is_rendered_alike_whenever_it_is_rendered(name: str):
    texts = set()
    for _ in range(3):
        tokenizer = templated(WORLDS[name])
        freeze(tokenizer, MOMENT)
        texts.add(tuple(Chat(tokenizer).encode_prompt(prompt())))
        time.sleep(0.002)
    assert len(texts) == 1


def test_the_moment_is_the_one_that_was_given_and_the_world_goes_on_behind_it():
    tokenizer = templated("{{ strftime_now('%d %b %Y %H:%M:%S.%f') }} {{ range(10) | random }}")
    freeze(tokenizer, MOMENT)
    random.seed(7)
    expected = [random.random() for _ in range(2)]
    random.seed(7)
    first = random.random()
    [text] = {tokenizer.decode(Chat(tokenizer).encode_prompt(prompt())) for _ in range(2)}
    assert text.startswith("30 Nov 2026 12:00:00.000125 ")
    assert [first, random.random()] == expected  # nobody else's draws are moved


def test_only_templates_that_read_the_clock_have_one():
    for name, template in WORLDS.items():
        tokenizer = templated(template)
        freeze(tokenizer, MOMENT)
        assert bool(clock_of(tokenizer)) == ("strftime_now" in template), name


def recipe(folder: Path, student: str, teacher: str, **changes: Any) -> dict[str, Any]:
    teachers = {name: {"model": teacher} for name in ("even", "odd")}
    changes = {"optimizer": {"schedule": "constant", "lr": 1e-2}} | changes
    return toy_recipe(folder, student=student, teachers=teachers, **changes)


def prompts_of(run: Path) -> set[tuple[int, ...]]:
    """The first tokens of every rollout: what a template says before the conversation."""
    return {tuple(s.rollout.token_ids[:45].tolist()) for s in read_rollouts(run)}


def test_a_resumed_run_is_the_run_that_was_never_stopped_with_a_clock_in_both_templates(tmp_path: Path):
    student = save_templated(tmp_path / "mine", templated(CLOCK + PLAIN))
    teacher = save_templated(tmp_path / "theirs", templated(CLOCK + TERSE), 1)
    config = opd.parse_config(recipe(tmp_path, student, teacher, steps=2))
    opd.train(config)
    kept = RunFolder.open(tmp_path / "run").config()
    assert kept.template_time is not None
    assert abs((datetime.now() - kept.template_time).total_seconds()) < 300
    time.sleep(0.002)
    opd.Trainer(tmp_path / "run").resume(["steps=4"])
    assert len(prompts_of(tmp_path / "run")) == 1
    tree = recipe(tmp_path, student, teacher, steps=4, template_time=kept.template_time, output=str(tmp_path / "whole"))
    opd.train(opd.parse_config(tree))
    ours, whole = ([{k: v for k, v in m.items() if k.startswith(("kl/", "loss/", "student/"))} for m in read_metrics(tmp_path / n)]
                   for n in ("run", "whole"))  # fmt: skip
    assert ours == whole


def test_an_evaluation_of_a_run_reads_the_clock_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    student = save_templated(tmp_path / "mine", templated(CLOCK + PLAIN))
    opd.train(opd.parse_config(recipe(tmp_path, student, student, steps=2)))
    first = (tmp_path / "run" / "parity.json").read_text()
    time.sleep(0.002)
    opd.Trainer(tmp_path / "run").evaluate()
    assert (tmp_path / "run" / "parity.json").read_text() == first


def test_the_clock_of_a_run_does_not_change_when_it_goes_on(tmp_path: Path):
    student = save_templated(tmp_path / "mine", templated(CLOCK + PLAIN))
    opd.train(opd.parse_config(recipe(tmp_path, student, student, steps=2)))
    with pytest.raises(ConfigError, match=r"template_time = .*: a run that continues keeps what it learns from"):
        opd.Trainer(tmp_path / "run").resume(["template_time=2020-01-01T00:00:00"])


def test_a_run_without_a_clock_keeps_no_moment(tmp_path: Path):
    config = opd.parse_config(toy_recipe(tmp_path, steps=2))
    opd.train(config)
    assert RunFolder.open(tmp_path / "run").config() == config


def test_a_recipe_names_the_moment_as_toml_has_it(tmp_path: Path):
    tree = toy_recipe(tmp_path)
    for given in ("2026-11-30T12:00:00", datetime(2026, 11, 30, 12)):
        assert opd.parse_config(tree | {"template_time": given}).template_time == datetime(2026, 11, 30, 12)
    with pytest.raises(ConfigError, match="template_time = 'noon'"):
        opd.parse_config(tree | {"template_time": "noon"})


def test_a_teacher_of_another_tokenizer_reads_the_clock_of_the_run(tmp_path: Path):
    theirs = save_cross_tokenizer(tmp_path / "theirs", toy_bpe(300, template=CLOCK + PLAIN))
    student = save_templated(tmp_path / "mine", templated(PLAIN))
    found = []
    for _ in range(2):
        tree = recipe(tmp_path, student, theirs, template_time=MOMENT, objective={"type": "immediate"})
        backend = build(opd.parse_config(tree))
        items = backend.sampler().sample([prompt(teacher="even")], num_samples=2, seed=(1,))
        found.append([s.score.logprobs for s in backend.teachers(keep_hidden=False).score(items)])
        rendering = backend.cross_tokenizer["even"].teacher_side.render([{"role": "user", "content": "x"}])
        assert "30 November 2026 12:00:00.000125" in rendering.text
        time.sleep(0.01)
    np.testing.assert_array_equal(found[0], found[1])


def test_kept_scores_are_of_the_moment_that_the_teachers_template_read(tmp_path: Path):
    for name, theirs in {
        "own prompts": save_templated(tmp_path / "own", templated(CLOCK + CHATTY)),
        "another tokenizer": save_cross_tokenizer(tmp_path / "foreign", toy_bpe(300, template=CLOCK + PLAIN)),
    }.items():
        student = save_templated(tmp_path / "mine", templated(PLAIN))
        ids = []
        for moment in (MOMENT, MOMENT, datetime(2020, 1, 1)):
            tree = recipe(tmp_path, student, theirs, template_time=moment, objective={"type": "immediate"})
            config = opd.parse_config(tree)
            ids.append(identities(config, build(config))["even"])
        assert ids[0] == ids[1], name
        assert ids[0] != ids[2], name


def test_fine_tuning_reads_one_moment(tmp_path: Path):
    source = save_templated(tmp_path / "mine", templated(CLOCK + PLAIN))
    tasks = {"answers": {"type": "file", "path": str(tmp_path / "x"), "teacher": "-"}}
    config = SftConfig(student=source, output=str(tmp_path / "out"), tasks=tasks, compute={"device": "cpu"})  # type: ignore[arg-type]
    tokenizer = build_student(config).network.tokenizer
    first = Chat(tokenizer).encode_prompt(prompt())
    time.sleep(0.01)
    assert Chat(tokenizer).encode_prompt(prompt()) == first
    shutil.rmtree(tmp_path / "mine")


def test_a_moment_that_no_template_reads_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = opd.parse_config(toy_recipe(tmp_path, steps=2, template_time=MOMENT, objective={"type": "immediate"}))
    assert any(
        "template_time = " in f.detail and "no chat template reads the clock" in f.detail
        for f in opd.Trainer(config).check()
    )
    student = save_templated(tmp_path / "reads", templated(CLOCK + PLAIN))
    assert not any(
        "template_time" in f.detail for f in opd.Trainer(config.model_copy(update={"student": student})).check()
    )
    tasks = {"answers": {"type": "file", "path": str(tmp_path / "first.jsonl"), "teacher": "-"}}
    tree = sft_recipe(tmp_path / "sft", config.student, template_time=MOMENT, steps=2, tasks=tasks)
    opd.sft(SftConfig(**tree))
    assert "warning: no effect: template_time = " in capsys.readouterr().out
