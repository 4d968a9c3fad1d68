"""A run on a Ray cluster is the run in one process: the same losses, the same weights, whatever the number of ranks."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import golden
import pytest
import torch
from clusters import cluster_of, processes
from factories import save_adapter, toy_recipe
from safetensors.torch import load_file
from templated import save_cross_tokenizer
from zoo import toy_ascii

import opd
from opd.checkpoint import list_checkpoints
from opd.distributed.backend import RankLearner
from opd.distributed.rank import Saved
from opd.episodes.player import Taken
from opd.logging.run_folder import read_metrics
from opd.objective import compute_advantages
from opd.remote.sampler import RemoteSampler

# They count and kill processes by their names, so nothing of their kind may run beside them.
pytestmark = pytest.mark.processes


@contextmanager
def replayed(calls: list[Any]) -> Iterator[None]:
    """Let engines' samplers return what was recorded, in order."""
    waiting = iter(calls)
    with patch.object(RemoteSampler, "_take_turns", lambda *_, **__: [Taken(*turn) for turn in next(waiting)]):
        yield


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    tree = toy_recipe(
        folder,
        steps=10,
        sampling={"prompts_per_step": 4, "group_size": 3, "max_new_tokens": 12},
        optimizer={"lr": 1e-3, "warmup_steps": 1},
        compute={"max_tokens": 96, "threads": 1},
        evaluation={"num_prompts": 0},
        **changes,
    )
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    return tree


OBJECTIVES = {
    "exact": {"objective": {"type": "exact"}},
    "exact to go": {"objective": {"type": "exact_to_go", "discount": 0.5, "baseline": "leave_one_out"}},
    "the whole student": {"objective": {"type": "immediate"}, "trainable": "full"},
}


def with_a_cross_tokenizer_teacher(folder: Path) -> dict[str, Any]:
    """A teacher with another tokenizer, compared on what both have in common, beside one with the student's."""
    tree = recipe(folder, objective={"type": "top_k"})
    tree["student"] = save_cross_tokenizer(folder / "ascii", toy_ascii(), seed=4)
    tree["teachers"]["even"] = {"model": save_cross_tokenizer(folder / "same", toy_ascii(), seed=6)}
    merges = [(a, b) for a in "aeiou" for b in "nrst"]
    tree["teachers"]["odd"] = {"model": save_cross_tokenizer(folder / "merged", toy_ascii(*merges), seed=5)}
    return tree


RECIPES = {name: partial(recipe, **changes) for name, changes in OBJECTIVES.items()}
RECIPES["another tokenizer"] = with_a_cross_tokenizer_teacher


@pytest.mark.parametrize("name", RECIPES)
def test_ten_steps_are_those_of_one_process(name: str, tmp_path: Path):
    calls: list[Any] = []
    with golden.recorded(calls):
        here = opd.train(opd.parse_config(RECIPES[name](tmp_path))).run
    found = {}
    for ranks in (1, 2):
        tree = RECIPES[name](tmp_path / str(ranks))
        tree |= {"backend": "ray", "cluster": cluster_of(learner_ranks=ranks)}
        with replayed(calls):
            found[ranks] = read_metrics(opd.train(opd.parse_config(tree)).run)
    for plain, one, two in zip(read_metrics(here), found[1], found[2], strict=True):
        for key in ("loss/total/sum", "optim/grad_norm/mean", "kl/token/mean"):
            assert one[key] == pytest.approx(plain[key], rel=1e-5), (plain["step"], key)
            assert two[key] == pytest.approx(one[key], rel=1e-6), (plain["step"], key)
        assert plain.keys() == two.keys()


def sampled_recipe(folder: Path, **cluster: Any) -> dict[str, Any]:
    tree = toy_recipe(folder, steps=6, evaluation={"num_prompts": 0}, checkpoint={"every": 1})
    return tree | {"backend": "ray", "cluster": cluster_of(**cluster)}


def prompts_of(run: Path, step: int) -> list[str]:
    return [s.rollout.id for s in opd.read_rollouts(run, step)]


def test_steps_ahead_are_at_most_so_stale_and_visit_every_prompt_once(tmp_path: Path):
    here = opd.train(opd.parse_config(sampled_recipe(tmp_path / "now"))).run
    tree = sampled_recipe(tmp_path / "ahead", max_staleness=2)

    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):  # while the next steps are on their way
        opd.train(opd.parse_config(tree), callbacks=[stop])
    run = opd.Trainer(tree["output"]).resume().run
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        assert prompts_of(run, step) == prompts_of(here, step)
        for item in opd.read_rollouts(run, step):
            assert 0 <= step - 1 - item.rollout.policy_version <= 2
    assert max(line["staleness/max"] for line in lines) >= 1
    assert all("staleness/max" not in line for line in read_metrics(here))


def test_rollouts_on_an_older_student_are_compared_with_the_student_as_it_is(tmp_path: Path):
    tree = sampled_recipe(tmp_path, max_staleness=1) | {"objective": {"type": "immediate"}}
    seen = []

    def keep(config: Any, batch: Any) -> Any:
        seen.append(batch)
        return compute_advantages(config, batch)

    with patch("opd.loop.compute_advantages", keep):
        opd.train(opd.parse_config(tree))
    assert len(seen) == 6
    gaps = [float((b.student_logprobs - b.rollout_logprobs)[b.loss_mask].abs().max()) for b in seen]
    assert gaps[0] < 1e-3  # nothing is stale in the first step
    assert max(gaps) > 1e-2


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        (
            {"engine_args": ["--fail"]},
            r"engine of the student ended while it started: ValueError: no such device; its whole log: /.*opd-engine-.*\.log ",
        ),
        ({"engine_command": ["no-such-program"]}, r"cluster.engine_command = 'no-such-program' was not found on"),
        ({"gpus_per_rank": 1}, r"the cluster has 0 GPUs, and 1 ranks with 1 need 1; lower"),
        ({"address": "127.0.0.1:1"}, r"cluster.address = '127.0.0.1:1': .*start Ray there"),
    ],
    ids=["fails", "no command", "no room", "no cluster"],
)
def test_what_cannot_start_is_one_line_and_leaves_nothing(tmp_path: Path, cluster: dict[str, Any], line: str):
    tree = sampled_recipe(tmp_path, **cluster)
    with pytest.raises(opd.errors.RunError, match=line):
        opd.train(opd.parse_config(tree))
    assert not Path(tree["output"]).exists()


def test_an_adapter_that_is_not_there_is_named_before_a_cluster_starts(tmp_path: Path):
    tree = sampled_recipe(tmp_path)
    tree["teachers"]["even"] = {"adapter": str(tmp_path / "nowhere"), "engines": 1}
    tree["objective"] = {"type": "immediate", "top_k": 32}
    with (
        patch("ray.init", side_effect=AssertionError("a cluster")),
        pytest.raises(opd.errors.ModelError, match=r"nowhere' \(teacher 'even'\) has no adapter_config.json"),
    ):
        opd.train(opd.parse_config(tree))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to."""
    return opd.train(opd.parse_config(sampled_recipe(tmp_path_factory.mktemp("whole"), learner_ranks=2))).run


def test_a_student_of_two_ranks_is_exported_without_a_cluster(whole: Path, tmp_path: Path):
    opd.Trainer(whole).export(tmp_path / "student")
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (tmp_path / "student" / name).read_bytes() == (whole / "student" / name).read_bytes()


def test_a_checkpoint_of_two_ranks_goes_on_with_one(whole: Path, tmp_path: Path):
    tree = sampled_recipe(tmp_path, learner_ranks=2)

    def stop(report: Any) -> None:
        if report.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opd.train(opd.parse_config(tree), callbacks=[stop])
    run = Path(tree["output"])
    assert opd.Trainer(run).resume(["cluster.learner_ranks=1"]).finished
    assert json.loads((run / "config.json").read_text())["cluster"]["learner_ranks"] == 1
    for a, b in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-5)


def test_a_full_disk_at_a_rank_keeps_the_earlier_checkpoint_and_the_run_goes_on_later(whole: Path, tmp_path: Path):
    tree = sampled_recipe(tmp_path, learner_ranks=2)

    def fill(report: Any) -> None:
        if report.step == 2:
            for pid in processes("ray::Rank"):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, 100))  # bytes; no file of a rank grows past them

    with pytest.raises(
        opd.errors.RunError, match=r"learner rank \d cannot write the checkpoint '.*File too large.*--resume"
    ):
        opd.train(opd.parse_config(tree), callbacks=[fill])
    run = Path(tree["output"])
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-000001"]
    assert not list(run.rglob("*partial*"))
    assert opd.Trainer(run).resume().finished
    for a, b in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-5)


def test_ranks_that_see_another_disk_cannot_save(tmp_path: Path):
    (tmp_path / "shard-00001.safetensors").touch()

    class Apart:
        size = 2

        def all(self, *_: Any) -> list[Saved]:
            return [Saved({}, f"node{n}", frozenset({f"shard-0000{n}.safetensors"})) for n in (1, 2)]

    learner = RankLearner(Apart(), opd.parse_config(toy_recipe(tmp_path)))  # type: ignore[arg-type]
    with pytest.raises(opd.errors.RunError, match=r"learner rank 1 on node2 wrote 'shard-00002.*all nodes share"):
        learner.save(tmp_path)


def test_mixed_precision_rounds_the_passes_and_not_the_weights(tmp_path: Path):
    lines = []
    for mixed in (False, True):
        tree = sampled_recipe(tmp_path / str(mixed), learner_ranks=2, mixed_precision=mixed)
        tree["teachers"]["odd"] = {"adapter": save_adapter(tmp_path / str(mixed) / "adapter", tree["student"], 5)}
        run = opd.train(opd.parse_config(tree | {"steps": 2})).run
        lines.append(read_metrics(run)[0])
        weights = load_file(run / "student" / "adapter_model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}
    plain, mixed_line = lines
    assert mixed_line["loss/total/sum"] != plain["loss/total/sum"]
    assert mixed_line["loss/total/sum"] == pytest.approx(plain["loss/total/sum"], rel=0.02)
    assert mixed_line["optim/grad_norm/mean"] == pytest.approx(plain["optim/grad_norm/mean"], rel=0.05)
