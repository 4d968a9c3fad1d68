"""Runs with a teacher behind a server: the same as in process; what is lost is counted, and too much of it stops them."""

import json
from pathlib import Path
from typing import Any

import pytest
from factories import toy_model, toy_recipe
from servers import serving, status

import opd
from opd.errors import StalledError
from opd.logging.run_folder import read_metrics
from opd.records import FailedScore

SECRET = "sk-a-secret-that-nobody-may-see"


def remote_recipe(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """A run of two teachers, one of them (that of the "odd" task) behind a server."""
    tree = toy_recipe(
        folder,
        objective={"type": "immediate"},
        remote={"timeout_s": 60, "attempts": 2, "first_wait_s": 0.01, "longest_wait_s": 0.02},
        evaluation={"num_prompts": 2},
        **changes,
    )
    tree["teachers"]["odd"] = {"url": url}
    return tree


def test_a_run_with_a_remote_teacher_is_that_with_the_same_teacher_in_process(tmp_path: Path):
    here = toy_recipe(tmp_path / "here", objective={"type": "immediate"}, evaluation={"num_prompts": 2})
    with serving(toy_model(2)) as server:
        there = remote_recipe(tmp_path / "there", server.url)
        results = [opd.train(opd.parse_config(tree)) for tree in (here, there)]
    ours, theirs = (read_metrics(result.run) for result in results)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss/total/sum", "optim/grad_norm/mean", "kl/token/mean", "kl/token/odd/mean"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
    by_teacher = {row.teacher: row for row in results[1].parity}
    assert by_teacher["odd"].expert is not None  # the server was asked for answers of its own
    assert by_teacher["odd"].after.sampled
    assert "~: estimated" in (results[1].run / "parity.md").read_text()


def test_lost_rollouts_are_counted_and_too_many_stop_a_run_that_goes_on_where_it_was(tmp_path: Path):
    calm = tmp_path / "calm"
    with serving(toy_model(2)) as server:
        tree = remote_recipe(tmp_path / "run", server.url, steps=5, checkpoint={"every": 100})
        whole = opd.train(opd.parse_config(tree | {"output": str(calm)})).run
        begun: list[int] = []

        def break_down(report: Any) -> None:
            begun.append(report.step)
            if report.step == 2:
                server.faults = lambda number: status(500)

        with pytest.raises(
            StalledError, match=r"step 3: 4 of 8 rollouts were lost \(teacher 'odd'.*answers 500.*--resume"
        ):
            opd.train(opd.parse_config(tree), callbacks=[break_down])
        assert begun == [1, 2]
        run = Path(tree["output"])
        server.faults = lambda number: status(503) if number % 16 == 0 else None
        assert opd.Trainer(run).resume().finished
    lines, wanted = read_metrics(run), read_metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for a, b in zip(lines, wanted, strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-6)
    trained = [[s.rollout.id for s in opd.read_rollouts(r, step)] for r in (run, whole) for step in range(1, 6)]
    assert trained[:5] == trained[5:]  # no prompt lost, none trained twice
    assert sum(line.get("remote/retried/sum", 0) for line in lines) > 0


def test_a_teacher_that_stays_silent_stops_the_run_below_the_fraction(tmp_path: Path):
    with serving(toy_model(2)) as server:
        tree = remote_recipe(tmp_path, server.url, steps=8)
        tree["remote"]["max_lost_fraction"] = 1.0

        def break_down(report: Any) -> None:
            server.faults = lambda number: status(500)

        with pytest.raises(StalledError, match="the last 3 steps lost every rollout of teacher 'odd'"):
            opd.train(opd.parse_config(tree), callbacks=[break_down])
    lines = read_metrics(Path(tree["output"]))
    assert [line.get("remote/lost/sum", 0) for line in lines] == [0, 4, 4, 4]
    assert [line.get("failed/odd/sum", 0) for line in lines] == [0, 4, 4, 4]
    lost = [s for s in opd.read_rollouts(tree["output"], 2) if isinstance(s.score, FailedScore)]
    assert len(lost) == 4
    assert all(s.score.lost and s.retries == 1 for s in lost if isinstance(s.score, FailedScore))


def test_another_model_under_the_same_address_is_refused_on_resume(tmp_path: Path):
    with serving(toy_model(2)) as server:
        tree = remote_recipe(tmp_path, server.url)
        run = opd.train(opd.parse_config(tree)).run
        server.name = "other"
        with pytest.raises(opd.errors.CheckError, match="teacher 'odd' is not what this run began with"):
            opd.Trainer(run).resume()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": {"type": "exact"}}, "needs whole distributions"),
        ({"temperature": 0.7}, "at temperature 1 only; got temperature = 0.7"),
        ({"warmup": {"steps": 2}}, "warmup.steps = 2 needs teachers in this process"),
        ({"teachers": {"odd": {"url": "http://name:word@host"}}}, "credentials"),
        ({"teachers": {"odd": {"url": "host:8000"}}}, "is no address of a server"),
        ({"teachers": {"odd": {"url": "http://host:port"}}}, "is no address of a server"),
        ({"teachers": {"odd": {"url": ["http://host:1", "http://host:70000"]}}}, "70000' is no address of a server"),
        ({"teachers": {"odd": {"url": []}}}, "names no server"),
        ({"teachers": {"odd": {"model": "x", "served_model": "y"}}}, "served_model works only with url"),
    ],
)
def test_a_recipe_that_needs_more_than_servers_give_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: Any, line: str
):
    tree = remote_recipe(tmp_path, "http://127.0.0.1:1")
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(opd.errors.ConfigError, match=line) as refused:
        opd.parse_config(tree)
    assert "word" not in str(refused.value)


def test_a_config_dump_holds_the_name_of_the_key_and_never_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOY_KEY", SECRET)
    with serving(toy_model(2), key=SECRET) as server:
        tree = remote_recipe(tmp_path, server.url, steps=2)
        tree["teachers"]["odd"]["api_key_env"] = "TOY_KEY"
        run = opd.train(opd.parse_config(tree)).run
    assert json.loads((run / "config.json").read_text())["teachers"]["odd"]["api_key_env"] == "TOY_KEY"
    for file in run.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
