"""A student learns from a teacher with another tokenizer: the same loop as ever, on toys."""

import signal
from pathlib import Path

import pytest
from factories import toy_recipe
from templated import save_cross_tokenizer
from zoo import toy_ascii

import opd
from opd.data.tasks import make_tasks
from opd.errors import CheckError
from opd.evaluate import evaluate
from opd.local.build import build
from opd.records import ChunkScore
from opd.rewards.judge import Judge


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
    tree["student"] = save_cross_tokenizer(tmp_path / "ascii", toy_ascii(), seed=4)
    tree["teachers"] = {"even": {"model": save_cross_tokenizer(tmp_path / "merged", toy_ascii(*merges), seed=5)}}
    tree["tasks"]["second"]["teacher"] = "even"
    found: list[float] = []
    opd.train(opd.parse_config(tree), callbacks=[lambda report: found.append(report.values["kl/byte/mean"])])
    first, last = sum(found[:10]) / 10, sum(found[-20:]) / 20
    assert last < 0.88 * first, (first, last)  # 3.96 and 3.31 nats a byte when this was written


def test_the_parity_table_has_the_kl_of_a_foreign_teacher(tmp_path: Path):
    """What `evaluate` says of sampled chunks, added up by hand."""
    tree = toy_recipe(tmp_path, steps=1, objective={"type": "immediate"}, evaluation={"num_prompts": 3})
    tree["optimizer"] = {"lr": 1e-3, "warmup_steps": 0}
    tree["student"] = save_cross_tokenizer(tmp_path / "ascii", toy_ascii(), seed=4)
    tree["teachers"] = {"even": {"model": save_cross_tokenizer(tmp_path / "merged", toy_ascii(("a", "b")), seed=5)}}
    tree["tasks"]["second"]["teacher"] = "even"
    config = opd.parse_config(tree)
    backend = build(config)
    prompts = [p for task in make_tasks(config.tasks).values() for p in task.prompts("train")][:3]
    teachers = backend.teachers(keep_hidden=True)
    judge = Judge(lambda prompt, response: None)
    cell = evaluate(backend.sampler(), prompts, judge, teachers=teachers, reverse_kl=lambda scored: [])
    total = size = 0.0
    responses = backend.sampler().sample(prompts, num_samples=1, seed=(0, "evaluate"))
    for item in teachers.score(responses):
        assert isinstance(item.score, ChunkScore)
        for token, (chunk, logprob) in enumerate(zip(item.score.chunks, item.score.logprobs, strict=True)):
            if chunk >= 0:
                total += float(item.rollout.rollout_logprobs[token]) - float(logprob)
        size += item.score.num_bytes
    assert cell.kl_byte == pytest.approx(total / size, rel=1e-5)
    assert cell.kl_sequence == pytest.approx(total / 3, rel=1e-5)
    result = opd.train(config)
    assert all(row.after.kl_byte is not None for row in result.parity)
    assert "a byte" in (Path(config.output) / "parity.md").read_text()


def test_a_changed_template_of_a_teacher_is_refused_on_resume(tmp_path: Path):
    tree = toy_recipe(tmp_path, steps=4, objective={"type": "immediate"}, evaluation={"num_prompts": 0})
    tree["student"] = save_cross_tokenizer(tmp_path / "ascii", toy_ascii(), seed=4)
    tree["teachers"] = {"even": {"model": save_cross_tokenizer(tmp_path / "merged", toy_ascii(("a", "b")), seed=5)}}
    tree["tasks"]["second"]["teacher"] = "even"
    stop = signal.SIGINT
    result = opd.train(opd.parse_config(tree), callbacks=[lambda r: signal.raise_signal(stop) if r.step == 2 else None])
    assert not result.finished
    template = tmp_path / "merged" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(CheckError, match="the tokenizer of teacher 'even' is not what this run began with"):
        opd.Trainer(result.run).resume()
