"""Whatever is killed in a run on a cluster: it goes on, or it stops and goes on from there; every prompt is trained on once."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from clusters import cluster_of, kill, processes
from factories import toy_recipe, write_toml
from ray.cluster_utils import Cluster

import opd
from opd.errors import RunError
from opd.loop import StepReport

# They count and kill processes by their names, so nothing of their kind may run beside them.
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes in one machine, with a place for one rank or engine each, and one to spare."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=1)
    found.add_node(num_cpus=1)
    found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


def recipe(folder: Path, cluster: Cluster, **changes: Any) -> dict[str, Any]:
    places = {"address": cluster.address, "cpus_per_rank": 1, "cpus_per_engine": 1}
    tree = toy_recipe(folder, steps=5, evaluation={"num_prompts": 0}, checkpoint={"every": 1})
    tree |= {"backend": "ray", "cluster": cluster_of(**places) | changes}
    return tree


def after(step: int, what: Callable[[], None]) -> Callable[[StepReport], None]:
    """A callback that does something after one step."""
    return lambda report: what() if report.step == step else None


@pytest.fixture(scope="module")
def calm(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to."""
    return opd.train(opd.parse_config(recipe(tmp_path_factory.mktemp("calm"), cluster))).run


def assert_nothing_lost(run: Path, calm: Path) -> None:
    """Every step trained on the prompts that it would have trained on, and metrics and losses go on as they would have."""
    ours, wanted = opd.read_metrics(run), opd.read_metrics(calm)
    assert [line["step"] for line in ours] == [line["step"] for line in wanted] == [1, 2, 3, 4, 5]
    for a, b in zip(ours, wanted, strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-5), a["step"]
    for step in range(1, 6):
        trained = [
            [(s.rollout.id, s.rollout.token_ids.tolist()) for s in opd.read_rollouts(r, step)] for r in (run, calm)
        ]
        assert trained[0] == trained[1], step


NOTICE = "warning: engine 1 of 1 of the student ended or did not answer, and was restarted\n"


def test_a_killed_engine_is_started_again_and_the_run_goes_on(
    cluster: Cluster, calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = opd.train(
        opd.parse_config(recipe(tmp_path, cluster)), callbacks=[after(2, lambda: kill("toy_engine.py --model"))]
    ).run
    assert capsys.readouterr().err.count(NOTICE) == 1
    assert_nothing_lost(run, calm)


def test_a_killed_actor_of_an_engine_is_made_again_and_the_run_goes_on(
    cluster: Cluster, calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = opd.train(
        opd.parse_config(recipe(tmp_path, cluster)), callbacks=[after(2, lambda: kill("ray::EngineActor"))]
    ).run
    assert capsys.readouterr().err.count(NOTICE) == 1
    assert_nothing_lost(run, calm)
    assert not processes("toy_engine.py --model")  # nor did it leave its server behind


def test_a_killed_rank_ends_the_run_which_goes_on_later(cluster: Cluster, calm: Path, tmp_path: Path):
    tree = recipe(tmp_path, cluster)
    with pytest.raises(RunError, match=r"learner rank 0 of 1 died .*--resume"):
        opd.train(opd.parse_config(tree), callbacks=[after(2, lambda: kill("ray::Rank"))])
    assert opd.Trainer(tree["output"]).resume().finished
    assert_nothing_lost(Path(tree["output"]), calm)


def test_a_lost_node_takes_its_engine_along_and_the_run_goes_on(cluster: Cluster, calm: Path, tmp_path: Path):
    def lose_the_engines_node() -> None:
        actors = ray._private.state.actors().values()  # the public list needs a dashboard
        [place] = [
            a["Address"]["NodeID"] for a in actors if "EngineActor" in a["ActorClassName"] and a["State"] == "ALIVE"
        ]
        [node] = [n for n in cluster.list_all_nodes() if n.node_id == place]
        cluster.remove_node(node, allow_graceful=False)

    run = opd.train(opd.parse_config(recipe(tmp_path, cluster)), callbacks=[after(2, lose_the_engines_node)]).run
    assert_nothing_lost(run, calm)
    cluster.add_node(num_cpus=1)


def test_what_fits_no_node_is_refused_at_once(cluster: Cluster, tmp_path: Path):
    with pytest.raises(
        RunError,
        match=r"engines of the student need 2 CPUs each on one node, and no node of the cluster has more than 1",
    ):
        opd.train(opd.parse_config(recipe(tmp_path, cluster, cpus_per_engine=2)))


def test_a_killed_driver_leaves_nothing_running_and_its_run_goes_on(cluster: Cluster, calm: Path, tmp_path: Path):
    tree = recipe(tmp_path, cluster)
    command = [
        sys.executable,
        "-c",
        "from opd.cli import main; main()",
        "train",
        write_toml(tmp_path / "recipe.toml", tree),
    ]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = Path(tree["output"])
    while not (run / "checkpoints" / "step-000002").exists():
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    end = time.monotonic() + 120
    while processes("toy_engine.py --model") or processes("ray::Rank"):
        assert time.monotonic() < end, "something goes on without its driver"
        time.sleep(0.2)
    assert opd.Trainer(run).resume().finished
    assert_nothing_lost(run, calm)
