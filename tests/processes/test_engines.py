"""Engines that a run starts: they serve the latest student, teachers take turns on them, and they leave nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2
import numpy as np
import pytest
from clusters import ENGINE, cluster_of, kill, processes
from factories import save_adapter, save_toy, toy_recipe

import opd
from opd.batch import Batch
from opd.config import Config
from opd.distributed.engine import Engine, EnginePlan, EngineState
from opd.distributed.engines import GroupLock, StudentEngines
from opd.errors import ModelError, RunError
from opd.logging.run_folder import read_metrics
from opd.objective import compute_advantages
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import _weights_of

# They count and kill processes by their names, so nothing of their kind may run beside them.
pytestmark = pytest.mark.processes

SUPERVISOR = "opd.distributed.supervisor"


def recipe(folder: Path, *, cluster: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    tree = toy_recipe(folder, steps=4, evaluation={"num_prompts": 0}, **changes)
    return tree | {"backend": "ray", "cluster": cluster_of(**(cluster or {}))}


def sampled(run: Path, steps: int) -> list[list[int]]:
    return [s.rollout.token_ids.tolist() for step in range(1, steps + 1) for s in opd.read_rollouts(run, step)]


def gaps_of(tree: dict[str, Any]) -> tuple[Path, list[float]]:
    """A run, and of each step how far the log-probabilities of its engines are from the student's own."""
    gaps: list[float] = []

    def keep(config: Config, batch: Batch) -> Batch:
        assert batch.student_logprobs is not None
        gaps.append(float((batch.student_logprobs - batch.rollout_logprobs)[batch.loss_mask].abs().max()))
        return compute_advantages(config, batch)

    with patch("opd.loop.compute_advantages", keep):
        run = opd.train(opd.parse_config(tree)).run
    return run, gaps


def test_engines_with_the_adapter_merged_sample_what_engines_with_adapters_do(tmp_path: Path):
    found = []
    for merged in (False, True):
        folder = tmp_path / str(merged)
        tree = recipe(
            folder,
            cluster={"merge_adapter": merged, "engines": 2},
            objective={"type": "immediate", "correction": {"type": "truncate"}},
        )
        tree["lora"]["start"] = save_adapter(folder / "start", tree["student"], 7)
        run, gaps = gaps_of(tree)
        assert len(gaps) == 4
        assert max(gaps) < 1e-3
        found.append(sampled(run, 4))
    assert found[0] == found[1]


def test_a_whole_student_goes_to_its_engines_after_every_update(tmp_path: Path):
    tree = recipe(
        tmp_path,
        cluster={"learner_ranks": 2},
        trainable="full",
        objective={"type": "immediate", "correction": {"type": "truncate"}},
        optimizer={"lr": 3e-3},
    )
    run, gaps = gaps_of(tree)
    assert len(gaps) == 4
    assert max(gaps) < 1e-3
    lines = read_metrics(run)
    assert lines[3]["kl/token/mean"] != lines[0]["kl/token/mean"]


def with_engines(folder: Path, **cluster: Any) -> dict[str, Any]:
    tree = recipe(folder, cluster=cluster, objective={"type": "top_k", "top_k": 8})
    for teacher in tree["teachers"].values():
        teacher |= {"engines": 1, "gpus_per_engine": int(cluster.get("teachers_sleep", False))}
    return tree


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes this machine for one with a GPU, which models can share."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')


def test_teachers_of_one_model_are_at_one_engine_and_say_what_servers_of_it_do(tmp_path: Path):
    tree = with_engines(tmp_path)
    tree["teachers"]["odd"]["model"] = tree["teachers"]["even"]["model"]
    seen: list[int] = []

    def count(report: Any) -> None:
        seen.append(
            len([p for p in processes(f"--model {tree['teachers']['odd']['model']}") if SUPERVISOR not in said(p)])
        )

    run = opd.train(opd.parse_config(tree), callbacks=[count]).run
    assert seen == [1] * 4
    one = save_toy(tmp_path / "one", 1)
    alone = with_engines(tmp_path / "alone")
    alone["teachers"] = {name: {"model": one, "engines": 2} for name in ("even", "odd")}
    for a, b in zip(read_metrics(run), read_metrics(opd.train(opd.parse_config(alone)).run), strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-6)
        assert "remote/lost/sum" not in a


def said(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return SUPERVISOR


def test_a_teachers_adapter_at_an_engine_says_what_it_says_at_the_ranks(tmp_path: Path):
    lines = []
    for engines in (None, 1):
        tree = recipe(tmp_path / str(engines), objective={"type": "immediate"}, trainable="full")
        odd = {"adapter": save_adapter(tmp_path / str(engines) / "adapter", tree["student"], 5)}
        tree["teachers"]["odd"] = odd if engines is None else {**odd, "engines": engines}
        lines.append(read_metrics(opd.train(opd.parse_config(tree)).run))
    for inside, engine in zip(*lines, strict=True):
        assert engine["loss/total/sum"] == pytest.approx(inside["loss/total/sum"], rel=1e-4)
        assert "remote/lost/sum" not in engine


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Runs whose teachers each have a place of their own, and that nothing happens to; True: prompts go all together, as they do
    where models take turns, not each its own way."""
    found = {}
    for together in (False, True):
        with patch("opd.run._per_prompt", lambda _, together=together: not together):
            tree = with_engines(tmp_path_factory.mktemp("apart"))
            found[together] = opd.train(opd.parse_config(tree)).run
    return found


def assert_the_same(run: Path, calm: Path) -> None:
    ours, wanted = read_metrics(run), read_metrics(calm)
    for a, b in zip(ours, wanted, strict=True):
        assert a["loss/total/sum"] == pytest.approx(b["loss/total/sum"], rel=1e-6)
        assert "remote/lost/sum" not in a


def test_models_that_share_devices_take_turns_and_score_the_same(apart: dict[bool, Path], tmp_path: Path):
    run = opd.train(opd.parse_config(with_engines(tmp_path, teachers_sleep=True))).run
    assert_the_same(run, apart[True])
    lines = [*read_metrics(run), *read_metrics(apart[True])]
    assert not [name for line in lines for name in line if name.startswith(("remote/", "failed/"))]


@pytest.mark.parametrize("sleep", [False, True], ids=["apart", "in turns"])
def test_a_killed_engine_of_a_teacher_is_restarted(apart: dict[bool, Path], tmp_path: Path, sleep: bool):
    tree = with_engines(tmp_path, teachers_sleep=sleep)
    tree["remote"] = {"attempts": 1, "first_wait_s": 0}

    def strike(report: Any) -> None:
        if report.step == 2:
            kill(f"toy_engine.py --model {tree['teachers']['odd']['model']}")

    assert_the_same(opd.train(opd.parse_config(tree), callbacks=[strike]).run, apart[sleep])


def test_two_groups_never_hold_the_lock_at_once():
    lock = GroupLock()
    entered = threading.Event()

    def wait() -> bool:
        with lock.hold(1) as woken:
            entered.set()
            return woken

    with ThreadPoolExecutor(1) as pool:
        with lock.hold(0) as first:
            other = pool.submit(wait)
            with lock.hold(0) as second:
                assert (first, second) == (True, False)
            assert not entered.wait(0.3)
        assert other.result(timeout=60)
    with lock.hold(0) as again:
        assert again


class OneEngine:
    """Stands in for a pool of engines."""

    def __init__(self, *_: Any) -> None:
        self.loaded: list[str] = []

    def states(self) -> list[EngineState]:
        return [EngineState("http://127.0.0.1:1", 64, tuple(self.loaded))]

    def load_all(self, name: str, files: Any) -> None:
        time.sleep(0.2)
        self.loaded.append(name)


class Playing:
    """A player that takes a while, and says what the engines held before and behind."""

    def __init__(self) -> None:
        self.started = threading.Event()

    def play(self, rows: Any, take: Any, *, version: int) -> Any:
        before = list(self.pool.loaded)
        self.started.set()
        time.sleep(0.3)
        return version, before, list(self.pool.loaded)

    pool: Any = None


def test_an_update_of_whole_weights_waits_for_requests_and_requests_wait_for_it(tmp_path: Path):
    versions = iter([(0, None), (1, None)])
    with patch("opd.distributed.engines.EnginePool", OneEngine):
        engines = StudentEngines(
            opd.parse_config(recipe(tmp_path, cluster={"merge_adapter": True})), lambda: next(versions)
        )
    playing = Playing()
    playing.pool = engines._pool
    sampler = RemoteSampler(engines, None, temperature=1.0, max_new_tokens=4, context=None, player=playing)  # type: ignore[arg-type]
    sampler.load_weights(None, policy_version=0)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(sampler.sample, [], num_samples=1, seed=(0,))
        playing.started.wait()
        change = pool.submit(sampler.load_weights, None, policy_version=1)
        second = pool.submit(sampler.sample, [], num_samples=1, seed=(1,))
        change.result()
        third = pool.submit(sampler.sample, [], num_samples=1, seed=(2,))
    old = (0, ["student-0"], ["student-0"])
    new = (1, ["student-0", "student-1"], ["student-0", "student-1"])
    found: list[Any] = [asked.result() for asked in (first, second, third)]
    assert found in ([old, old, new], [old, new, new])


def test_an_actor_that_only_watches_a_server_imports_no_torch():
    code = (
        "import sys, opd.distributed.engines; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def files_of(folder: str) -> dict[str, np.ndarray]:
    return {f.name: np.frombuffer(f.read_bytes(), dtype=np.uint8) for f in Path(folder).iterdir()}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # what the engine is asked passes by
    base = save_toy(tmp_path / "base", 0)
    plan = EnginePlan(tuple(ENGINE), base, "student", (), 300, loads="weights", api_key="a key")
    found = Engine(plan, "127.0.0.1")
    yield found
    found.stop()


def test_an_engine_refuses_requests_without_its_key(engine: Engine):
    url = engine.state().url
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"{url}/v1/models").status_code == 401
        assert client.get(f"{url}/v1/models", headers={"Authorization": "Bearer a key"}).status_code == 200


def test_a_version_is_loaded_once_and_survives_a_restart(engine: Engine, tmp_path: Path):
    files = files_of(save_toy(tmp_path / "newer", 3))
    engine.load("student-1", files)
    state = engine.state()
    assert (state.versions, state.context) == (("student-1",), 256)
    engine.load("student-1", {})  # it has it
    kill("toy_engine.py")
    wait_for(lambda: not processes("toy_engine.py"))
    back = engine.state()
    assert (back.versions, back.context) == (state.versions, state.context)
    [running] = [p for p in processes("toy_engine.py --model") if SUPERVISOR not in said(p)]
    assert "/student-1 " in said(running)  # from its first answer on it is that version


def test_an_adapter_of_another_base_is_refused_at_its_engine(tmp_path: Path):
    base = save_toy(tmp_path / "base", 0)
    adapter = Path(save_adapter(tmp_path / "adapter", base, 5))
    (adapter / "opd.json").write_text(json.dumps({"base": "another", "base_fingerprint": "0"}))
    engine = Engine(EnginePlan(tuple(ENGINE), base, "teacher", (), 300, adapter=str(adapter)), "127.0.0.1")
    with pytest.raises(ModelError, match=r"was made on another base \('another'"):
        engine.state()
    engine.stop()


def test_a_server_that_does_not_answer_is_restarted(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("opd.distributed.engine._HEALTH_CHECKS", 1)
    first = engine.state()
    [hung] = [p for p in processes("toy_engine.py --model") if SUPERVISOR not in said(p)]
    os.kill(hung, signal.SIGSTOP)
    assert engine.state().versions == first.versions
    assert hung not in processes("toy_engine.py --model")


@pytest.mark.parametrize("loads", ["weights", "adapters"])
def test_a_server_that_dies_while_it_is_given_weights_gets_them_when_it_is_back(tmp_path: Path, loads: Any):
    base = save_toy(tmp_path / "base", 0)
    engine = Engine(EnginePlan(tuple(ENGINE), base, "student", (), 300, loads=loads, api_key="a key"), "127.0.0.1")
    adapters = [files_of(save_adapter(tmp_path / str(seed), base, seed)) for seed in (1, 2)]
    ask = engine._ask

    def dies(path: str, body: Any = None, **options: Any) -> Any:
        if path.startswith(("/collective_rpc", "/v1/unload_lora_adapter")) and not died:
            died.append(path)
            kill("toy_engine.py --model")
        return ask(path, body, **options)

    died: list[str] = []
    try:
        if loads == "adapters":
            engine.load("student-1", adapters[0])
        with patch.object(engine, "_ask", dies):
            engine.load("student-2", adapters[1])
        assert len(died) == 1
        assert engine.state().versions == ("student-2",)
    finally:
        engine.stop()


def test_a_teachers_folder_with_other_weights_is_another_teacher(tmp_path: Path):
    folder = Path(save_toy(tmp_path / "model", 0))
    before = _weights_of(str(folder))
    assert _weights_of(str(folder)) == before
    save_toy(folder, 1)
    assert _weights_of(str(folder)) != before
    assert _weights_of("owner/name") == "owner/name"


def test_a_full_disk_at_an_engine_is_one_line(engine: Engine, tmp_path: Path):
    engine.state()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with (
        patch.object(Path, "write_bytes", full),
        pytest.raises(RunError, match=r"cannot write the student.*No space left"),
    ):
        engine.load("student-1", files_of(save_toy(tmp_path / "newer", 3)))


@pytest.mark.parametrize("when", ["at its end", "while engines start"])
def test_a_run_leaves_no_folder_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # short: Ray puts sockets there, too
    monkeypatch.setenv("TMPDIR", str(place))
    tree = recipe(tmp_path)
    if when == "at its end":
        seen: list[Path] = []
        opd.train(opd.parse_config(tree), callbacks=[lambda _: seen.extend(place.glob("opd-engine-*"))])
        assert seen
    else:
        tree["cluster"]["engine_args"] = ["--slow"]
        tree["teachers"]["even"]["adapter"] = tree["teachers"]["even"].pop(
            "model"
        )  # no adapter there: ranks cannot load
        with pytest.raises(opd.errors.ModelError, match="even"):
            opd.train(opd.parse_config(tree))
    wait_for(lambda: not processes("toy_engine.py") and not list(place.glob("opd-engine-*")))
    shutil.rmtree(place)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_error_while_parts_are_made_ends_everything_that_was_started(tmp_path: Path):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no parts")

    with patch("opd.run.make_components", broken), pytest.raises(RuntimeError, match="no parts"):
        opd.train(opd.parse_config(recipe(tmp_path)))
    wait_for(lambda: not processes("toy_engine.py"))
