"""Runs that keep their scores on disk: which of them share scores, and that none notices but by the clock."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import byte_tokenizer, plain_logprobs, prompt, rollout, save_adapter, save_toy, toy_model, toy_recipe
from servers import serving, status

import opd
from opd.local.build import build
from opd.logging.run_folder import read_metrics
from opd.score_cache import identities, probe


def kept_recipe(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """A run that keeps its scores beside it. One token a response: by the time that prompts come again, some responses do."""
    tree = toy_recipe(folder, evaluation={"num_prompts": 0}, **changes)
    tree["output"] = str(folder / run)
    tree["sampling"] = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 2}
    tree["compute"] = tree["compute"] | {"score_cache_folder": str(folder / "kept"), "threads": 1, "device": "cpu"}
    return tree


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["loss/total/sum"], line["optim/grad_norm/mean"]) for line in read_metrics(run)]


def hits(run: Path) -> list[float]:
    return [line["batch/cached/sum"] for line in read_metrics(run)]


def test_a_second_run_calls_no_teacher_and_follows_the_same_numbers_to_the_bit(tmp_path: Path):
    one, two = (opd.train(opd.parse_config(kept_recipe(tmp_path, name))).run for name in ("one", "two"))
    assert hits(one)[0] < 16
    assert hits(two) == [16.0] * 4
    assert losses(one) == losses(two)


def test_a_resumed_run_finds_its_scores_and_gives_the_same_losses(tmp_path: Path):
    whole = opd.train(opd.parse_config(kept_recipe(tmp_path / "a", "run", steps=6))).run
    tree = kept_recipe(tmp_path / "b", "run", steps=6)

    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 5:
            raise Stop

    with pytest.raises(Stop):
        opd.train(opd.parse_config(tree), callbacks=[stop])
    shutil.rmtree(Path(tree["output"]) / "checkpoints" / "step-000005")  # as if the run had been killed there
    opd.Trainer(tree["output"]).resume()  # from step 4: the fifth is done again
    assert hits(Path(tree["output"]))[4] == 16.0
    assert hits(whole)[4] < 16.0
    assert losses(Path(tree["output"])) == losses(whole)


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"seed": 5}, True),
        ({"optimizer": {"lr": 1e-3}}, True),
        ({"temperature": 0.9}, False),
        ({"objective": {"type": "immediate"}}, False),
        ({"compute": {"dtype": "bfloat16"}}, False),
        ({"objective": {"extrapolation": 1.5, "reference": "student"}}, False),
    ],
)
def test_runs_share_the_scores_that_would_be_the_same(
    change: dict[str, Any], shared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By what the two keep under: equal folders are equal identities."""
    for number, changes in enumerate(({}, change)):
        tree = kept_recipe(tmp_path, f"run{number}", steps=2, **changes)
        opd.train(opd.parse_config(tree))
    found = list((tmp_path / "kept").glob("*/teacher.json"))
    assert len(found) == (2 if shared else 4)  # two teachers a run
    assert "has changed since its scores" not in capsys.readouterr().out  # the probe is not what told them apart


def test_other_weights_in_process_are_another_teacher(tmp_path: Path):
    tree = kept_recipe(tmp_path, "one", steps=2)
    opd.train(opd.parse_config(tree))
    save_toy(tmp_path / "even", 9)
    tree["output"] = str(tmp_path / "two")
    opd.train(opd.parse_config(tree))
    found = [json.loads(path.read_text())["identity"]["name"] for path in (tmp_path / "kept").glob("*/teacher.json")]
    assert sorted(found) == ["even", "even", "odd"]


def test_another_model_under_a_servers_old_name_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving(toy_model(2)) as server:
        tree = kept_recipe(tmp_path, "one", objective={"type": "immediate"})
        tree["teachers"]["odd"] = {"url": server.url}
        runs = []
        for name, seed in (("one", 2), ("same", 2), ("other", 3), ("back", 2)):
            server.model = toy_model(seed)
            tree["output"] = str(tmp_path / name)
            capsys.readouterr()
            runs.append(opd.train(opd.parse_config(tree)).run)
            warned = "teacher 'odd' has changed since its scores" in capsys.readouterr().out
            assert warned == (name == "other")
    assert hits(runs[0])[0] == 0.0
    assert hits(runs[1]) == hits(runs[3]) == [16.0] * 4
    assert 0 < hits(runs[2])[0] < 16.0  # the other teacher's
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[3]) != losses(runs[2])


def test_a_server_that_fails_the_probe_costs_its_kept_scores_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    remote = {"timeout_s": 60, "attempts": 1, "first_wait_s": 0.0, "longest_wait_s": 0.0}
    with serving(toy_model(2)) as server:
        tree = kept_recipe(tmp_path, "one", objective={"type": "immediate"}, remote=remote)
        tree["teachers"]["odd"] = {"url": server.url}
        text = byte_tokenizer()(opd.text.tokenizer.PROBE, add_special_tokens=False).input_ids
        server.faults = lambda number: status(500) if server.asked[number]["prompt"] == text else None
        run = opd.train(opd.parse_config(tree)).run
    said = capsys.readouterr().out
    assert said.count("scores of teacher 'odd' are not cached") == 1
    assert len(list((tmp_path / "kept").glob("*/teacher.json"))) == 1
    assert not any(line.get("remote/lost/sum") for line in read_metrics(run))


def backend_of(tree: Mapping[str, Any]) -> tuple[Any, Any]:
    config = opd.parse_config(dict(tree))
    return config, build(config)


def test_an_identity_names_every_model_of_a_mixture_and_what_it_is_moved_from(tmp_path: Path):
    tree = toy_recipe(tmp_path, objective={"extrapolation": 1.5, "reference": "student"})
    adapter = save_adapter(tmp_path / "adapter", tree["student"], 4)
    tree["teachers"] |= {"both": {"weights": {"even": 1, "odd": 3}}, "light": {"adapter": adapter}}
    found = identities(*backend_of(tree))
    assert found["both"]["models"] == {
        "even": [1.0, *found["even"]["models"]["even"][1:]],
        "odd": [3.0, *found["odd"]["models"]["odd"][1:]],
    }
    base = found["light"]["reference"][2]
    assert found["light"]["models"]["light"][1].startswith(f"{base}+")
    tree["teachers"]["both"]["weights"]["odd"] = 2
    assert identities(*backend_of(tree))["both"] != found["both"]


def test_the_probe_calls_teachers_that_weights_do_not_identify(tmp_path: Path):
    _, backend = backend_of(toy_recipe(tmp_path))
    found = probe(
        backend.teachers(keep_hidden=False), ("even", "odd"), known={"odd"}, tokenizer=backend.tokenizer
    )  # fmt: skip
    ids = backend.tokenizer(opd.text.tokenizer.PROBE, add_special_tokens=False).input_ids
    wanted = plain_logprobs(toy_model(1), rollout(ids, 1, prompt=prompt()))
    np.testing.assert_allclose(found["even"], wanted, atol=1e-4)
    assert isinstance(found["odd"], np.ndarray)
    assert found["odd"].size == 0
