"""vLLM engines on the cluster, as Ray actors: the student's, which sample, and those of teachers, which score."""

import contextlib
import os
import secrets
import sys
import threading
import time
from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from opd.config import Config
from opd.distributed.cluster import Placement, cause_of, enter, student_placement, teacher_placements
from opd.distributed.engine import Engine, EnginePlan, EngineState, Files
from opd.errors import RunError, one_line
from opd.remote.client import Deployment, Endpoint

_RETRY_S = 1.0
_STOP_S = 5.0  # for an engine to stop in order; an engine that still starts is killed
_REQUESTS, _UPDATE = 0, 1  # the groups of the lock where weights replace each other
STUDENT = "student"  # the name of the student's base at its engines


class EngineActor:
    """A Ray actor: the engine of a model, or the engines of several models that take turns on the actor's devices."""

    def __init__(self, plans: Sequence[EnginePlan], folder: str) -> None:
        self._folder = folder
        self._engines = [Engine(plan, ray.util.get_node_ip_address()) for plan in plans]

    def state(self, model: int) -> EngineState:
        """The state of one model's engine, awake; the others sleep."""
        enter(self._folder)
        for other, engine in enumerate(self._engines):
            if other != model:
                engine.sleep()
        return self._engines[model].state()

    def load(self, name: str, files: Files) -> None:
        self._engines[0].load(name, files)

    def stop(self) -> None:
        for engine in self._engines:
            engine.stop()


class EnginePool:
    """The actors that serve one model, or several in turns. Ray makes an actor again, elsewhere, when its node dies."""

    def __init__(self, plans: Sequence[EnginePlan], placement: Placement) -> None:
        remote = ray.remote(EngineActor).options(
            num_cpus=placement.cpus, num_gpus=placement.gpus, max_restarts=-1, max_task_retries=0
        )
        self._actors: list[Any] = [remote.remote(list(plans), os.getcwd()) for _ in range(placement.actors)]
        self._whose = [plan.who for plan in plans]
        self._started: dict[tuple[int, int], tuple[int, str]] = {}
        self._patience_s = max(plan.start_s for plan in plans)
        # the first model's engines start now, and the first `states` waits for them
        self._starting: list[Any] | None = [actor.state.remote(0) for actor in self._actors]

    def states(self, model: int = 0) -> list[EngineState]:
        """The states of one model's engines. Warns on stderr about engines that have restarted."""
        starting, self._starting = self._starting, None
        found: list[EngineState] = self._call_all("state", model, refs=None if model else starting)
        for index, state in enumerate(found):
            before, now = self._started.get((model, index)), (state.starts, state.url)
            if before not in (None, now):  # a new actor counts its starts from 1 again, at another address
                who = f"engine {index + 1} of {len(found)} of {self._whose[model]}"
                print(f"warning: {who} ended or did not answer, and was restarted", file=sys.stderr)
            self._started[model, index] = now
        return found

    def load(self, index: int, name: str, files: Any) -> None:
        """Load a version of the student at one engine; files: Ray's reference to them."""
        self._wait(index, self._actors[index].load.remote(name, files), "load", (name, files))

    def load_all(self, name: str, files: Any) -> None:
        """Load a version at all engines; returns when each has acknowledged it."""
        self._call_all("load", name, files)

    def _call_all(self, method: str, *args: Any, refs: list[Any] | None = None) -> list[Any]:
        refs = refs or [getattr(actor, method).remote(*args) for actor in self._actors]
        return [self._wait(index, ref, method, args) for index, ref in enumerate(refs)]

    def _wait(self, index: int, ref: Any, method: str, args: tuple[Any, ...]) -> Any:
        """The result of a call. Where the actor dies meanwhile, the call is repeated at the actor that Ray makes in its place."""
        end = time.monotonic() + self._patience_s
        while True:
            try:
                return ray.get(ref)
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayActorError as error:
                if time.monotonic() > end:
                    who = f"engine {index + 1} of {len(self._actors)} of {' and '.join(self._whose)}"
                    raise RunError(f"{who} died and does not come back ({one_line(str(error))[:200]})") from None
                time.sleep(_RETRY_S)
                ref = getattr(self._actors[index], method).remote(*args)

    def close(self) -> None:
        """Stop every engine in order where that is quick, else kill its actor."""
        stopping = [actor.stop.remote() for actor in self._actors]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class GroupLock:
    """Group mutual exclusion: any number of holders of one group at once, and none of another group."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last: int | None = None
        self._holders: Counter[int] = Counter()

    @contextmanager
    def hold(self, group: int) -> Iterator[bool]:
        """Wait until no other group holds the lock, then hold it; yields whether another group held it last."""
        with self._changed:
            self._changed.wait_for(lambda: not any(n for g, n in self._holders.items() if g != group))
            self._holders[group] += 1
            switched, self._last = self._last != group, group
        try:
            yield switched
        finally:
            with self._changed:
                self._holders[group] -= 1
                self._changed.notify_all()


class _Engines(Deployment):
    """The engines of one model."""

    def __init__(self, plan: EnginePlan, pool: EnginePool) -> None:
        self._plan = plan
        self._pool = pool
        self._moving = threading.Lock()  # several threads sample
        self._now: Endpoint | None = None

    def latest(self) -> Endpoint:
        with self._moving:
            return self._now or self._refreshed()

    def relocate(self) -> Endpoint:
        """Where the engines are now. An engine that died is restarted with the versions that are in use."""
        with self._moving:
            return self._refreshed()

    @abstractmethod
    def _refreshed(self) -> Endpoint: ...

    def _endpoint(self, who: str, states: Sequence[EngineState]) -> Endpoint:
        contexts = [s.context for s in states if s.context is not None]
        urls = tuple(s.url for s in states)
        return Endpoint(who, urls, self._plan.name, context=min(contexts, default=None), api_key=self._plan.api_key)


class StudentEngines(_Engines):
    """The engines that sample from the student; `latest` loads its weights there.

    Adapters of several versions are served side by side, so episodes that began with an older one continue with it. Whole
    weights replace each other: an update waits for the requests in flight, and later requests wait for the update.
    """

    def __init__(self, config: Config, version: Callable[[], tuple[int, Any]]) -> None:
        """version: the student's version, and Ray's reference to the files of its folder; engines start with version 0."""
        plan = student_plan(config)
        super().__init__(plan, EnginePool([plan], student_placement(config)))
        self._newest = version
        self._loaded: deque[tuple[str, Any]] = deque(maxlen=self._plan.max_versions)
        self._version: int | None = None
        self._lock = GroupLock()

    def context(self) -> int | None:
        """The longest sequence that all engines take, in tokens."""
        return self.relocate().context

    def latest(self) -> Endpoint:
        """The student's latest weights, when every engine has loaded them."""
        with self._moving:
            version, files = self._newest()
            if version != self._version:
                if self._loaded:
                    self._refreshed()  # a restarted engine loads versions in order, since it unloads its first one first
                name = f"{STUDENT}-{version}"
                self._loaded.append((name, files))
                self._pool.load_all(name, files)
                self._version = version
                return self._refreshed()
            return self._now or self._refreshed()

    def in_use(self) -> AbstractContextManager[Any]:
        return self._locked(_REQUESTS)

    def updating(self) -> AbstractContextManager[Any]:
        return self._locked(_UPDATE)

    def _locked(self, group: int) -> AbstractContextManager[Any]:
        return self._lock.hold(group) if self._plan.loads == "weights" else contextlib.nullcontext()

    def close(self) -> None:
        self._pool.close()

    def _refreshed(self) -> Endpoint:
        states = self._pool.states()
        for index, state in enumerate(states):
            for name, files in self._loaded:  # an engine on a new node holds none
                if name not in state.versions:
                    self._pool.load(index, name, files)
        self._now = self._endpoint("the student's engine", states)
        if self._plan.loads == "adapters" and self._loaded:
            self._now = replace(self._now, model=self._loaded[-1][0])
        return self._now


class TeacherEngines(_Engines):
    """The engines of one teacher model, number `model` of its pool."""

    def __init__(self, plan: EnginePlan, pool: EnginePool, model: int, lock: GroupLock) -> None:
        super().__init__(plan, pool)
        self._model = model
        self._lock = lock

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with self._lock.hold(self._model) as switched:
            if switched:
                self.relocate()  # wakes the model
            yield

    def _refreshed(self) -> Endpoint:
        self._now = self._endpoint(f"an engine of {self._plan.who}", self._pool.states(self._model))
        return self._now


def start_teachers(config: Config, started: ExitStack) -> dict[str, TeacherEngines]:
    """Start the engines of all teachers, which `started` closes; by teacher, the engines of its model."""
    engines: dict[str, TeacherEngines] = {}
    for models, placement in teacher_placements(config):
        plans = [teacher_plan(config, model) for model in models]
        pool, lock = EnginePool(plans, placement), GroupLock()
        started.callback(pool.close)
        for index, model in enumerate(models):
            engines[model] = TeacherEngines(plans[index], pool, index, lock)
    return {name: engines[t.source or ""] for name, t in config.teachers.items() if t.engines is not None}


def student_plan(config: Config) -> EnginePlan:
    """How the student's engines are started: they sample from the full distribution, and return its log-probabilities."""
    cluster = config.cluster
    whole = cluster.merge_adapter or config.trainable == "full"
    # the versions in use: the latest, those that older steps began with, and one between
    versions = cluster.max_staleness + 2
    # log-probabilities after the temperature
    own = ["--logprobs-mode", "processed_logprobs"] if config.temperature != 1.0 else []
    if not whole:
        own += ["--enable-lora", "--max-lora-rank", str(_vllm_rank(config.lora.rank)), "--max-loras", str(versions)]
    return EnginePlan(
        command=tuple(cluster.engine_command),
        model=config.student,
        name=STUDENT,
        args=_args(config, config.student, own, cluster.gpus_per_engine, cluster.engine_args),
        start_s=cluster.engine_start_s,
        loads="weights" if whole else "adapters",
        max_versions=1 if whole else versions,
        api_key=secrets.token_hex(16),
        dtype=config.compute.dtype,
    )


def teacher_plan(config: Config, source: str) -> EnginePlan:
    """How the engines of one teacher model are started, by its source. Teachers of one source have equal arguments."""
    names = tuple(name for name, t in config.teachers.items() if t.engines is not None and t.source == source)
    teacher = config.teachers[names[-1]]
    model = teacher.model or config.student
    own = ["--max-logprobs", str(config.objective.top_k)] if config.objective.type == "top_k" else []
    own += ["--enable-sleep-mode"] if config.cluster.teachers_sleep else []
    return EnginePlan(
        command=tuple(config.cluster.engine_command),
        model=model,
        adapter=teacher.adapter,
        name="teacher",
        args=_args(config, model, own, teacher.gpus_per_engine, teacher.engine_args),
        start_s=config.cluster.engine_start_s,
        sleeps=config.cluster.teachers_sleep,
        api_key=secrets.token_hex(16),  # a key for each model, so that a request cannot reach another model's engine
        dtype=config.compute.dtype,
        teachers=names,
    )


def _args(config: Config, model: str, own: Sequence[str], gpus: int, given: Sequence[str]) -> tuple[str, ...]:
    """The arguments of an engine; own: those of its role; given: the recipe's, which come last and win."""
    common = ("--dtype", config.compute.dtype, "--generation-config", "vllm")
    return (*common, *own, *_max_model_len(model, given), *_tensor_parallel(gpus, given), *given)


def _tensor_parallel(gpus: int, given: Sequence[str]) -> list[str]:
    """An engine with several GPUs splits its model over them, unless the recipe says how."""
    if gpus < 2 or any(
        arg.startswith(("--tensor-p", "-tp", "--pipeline-p", "-pp", "--data-p", "-dp")) for arg in given
    ):
        return []
    return ["--tensor-parallel-size", str(gpus)]


def _max_model_len(model: str, given: Sequence[str]) -> list[str]:
    """With a 'longrope', the length at which its factors change: vLLM uses the long factors for short sequences too where it takes
    longer ones, and ranks do not."""
    # imported here: an actor that only watches a server needs no torch
    from opd.models.architecture import rope_limit_of

    limit = rope_limit_of(model)
    if limit is None or any(arg.startswith("--max-model-len") for arg in given):
        return []
    return ["--max-model-len", str(limit.tokens)]


def _vllm_rank(rank: int) -> int:
    """The smallest LoRA rank of vLLM that holds this one."""
    return next(r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
