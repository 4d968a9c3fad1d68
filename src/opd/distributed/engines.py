"""vLLM engines on the cluster, as Ray actors: those that sample from the student, and those of teachers."""

import contextlib
import os
import secrets
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from opd.config import Config
from opd.distributed.engine import Engine, EnginePlan, EngineState, Files
from opd.distributed.node import enter
from opd.errors import OpdError, RunError, one_line
from opd.remote.client import Endpoint

_AGAIN_S = 1.0
_STOP_S = 5.0  # for an engine to end in order; what starts still is ended by its keeper
_ASKED, _CHANGED = 0, 1  # what weights that take each other's place are at a time
STUDENT = "student"  # the name of the student's base at its engines


class _Place:
    """A place on a node, with its devices; the engines of several models may take turns there."""

    def __init__(self, plans: Sequence[EnginePlan], folder: str) -> None:
        self._folder = folder
        self._engines = [Engine(plan, ray.util.get_node_ip_address()) for plan in plans]

    def state(self, model: int) -> EngineState:
        """Of the engine of one model, awake; the others sleep."""
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


@dataclass(frozen=True)
class Booking:
    """What each place of a group of engines needs: how many there are, and the GPUs and CPUs of one."""

    places: int
    gpus: float
    cpus: float


class Places:
    """The places of engines that serve one model, or several in turns.

    An actor that dies with its node is made again by Ray where there is room; it is then found there.
    """

    def __init__(self, plans: Sequence[EnginePlan], booking: Booking) -> None:
        remote = ray.remote(_Place).options(
            num_cpus=booking.cpus, num_gpus=booking.gpus, max_restarts=-1, max_task_retries=0
        )
        self._actors: list[Any] = [remote.remote(list(plans), os.getcwd()) for _ in range(booking.places)]
        self._whose = [plan.who for plan in plans]
        self._started: dict[tuple[int, int], tuple[int, str]] = {}
        self._patience_s = max(plan.start_s for plan in plans)
        self._first: list[Any] | None = [
            actor.state.remote(0) for actor in self._actors
        ]  # they start; nobody waits yet

    def states(self, model: int = 0) -> list[EngineState]:
        """Of the engines of one model; those that were started again since are named on stderr."""
        first, self._first = self._first, None
        found: list[EngineState] = self._ask("state", model, asked=None if model else first)
        for place, state in enumerate(found):
            before, now = self._started.get((model, place)), (state.starts, state.url)
            if before not in (None, now):  # an actor that was made anew counts from 1, at another address
                who = f"engine {place + 1} of {len(found)} of {self._whose[model]}"
                print(f"warning: {who} ended, or answered no more, and was started again", file=sys.stderr)
            self._started[model, place] = now
        return found

    def load(self, place: int, name: str, files: Any) -> None:
        """Give one engine a version of the student; files: Ray's reference to them."""
        self._answer(place, self._actors[place].load.remote(name, files), "load", (name, files))

    def load_all(self, name: str, files: Any) -> None:
        """Give it to all; returns when each has acknowledged it."""
        self._ask("load", name, files)

    def _ask(self, method: str, *args: Any, asked: list[Any] | None = None) -> list[Any]:
        """Every place's answer to this, or to what was `asked`; one that died in between is asked again where it lives then."""
        refs = asked or [getattr(actor, method).remote(*args) for actor in self._actors]
        return [self._answer(index, ref, method, args) for index, ref in enumerate(refs)]

    def _answer(self, index: int, ref: Any, method: str, args: tuple[Any, ...]) -> Any:
        # until Ray has noticed that a node is gone, and has made the actor anew elsewhere
        end = time.monotonic() + self._patience_s
        while True:
            try:
                return ray.get(ref)
            except RayTaskError as error:
                if isinstance(error.cause, OpdError):
                    raise error.cause from None
                raise
            except RayActorError as error:
                if time.monotonic() > end:
                    who = f"engine {index + 1} of {len(self._actors)} of {' and '.join(self._whose)}"
                    raise RunError(f"{who} died and does not come back ({one_line(str(error))[:200]})") from None
                time.sleep(_AGAIN_S)
                ref = getattr(self._actors[index], method).remote(*args)

    def close(self) -> None:
        """End every engine: in order where it listens, else with its actor."""
        asked = [actor.stop.remote() for actor in self._actors]
        if asked:  # one that is gone, or starts still, keeps nobody from stopping in order
            ray.wait(asked, num_returns=len(asked), timeout=_STOP_S)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class StudentEngines:
    """The engines that sample from the student (`opd.remote.endpoints.RemoteModel`); they get its weights when they are asked for.

    Adapters stand beside each other, so who began with an older one goes on with it. Whole weights take each other's place: whoever
    uses the engines is waited for, and who comes meanwhile waits.
    """

    def __init__(self, config: Config, newest: Callable[[], tuple[int, Any]]) -> None:
        """newest: the student's version, and Ray's reference to the files of its folder; version 0 is what engines start with."""
        cluster = config.cluster
        whole = cluster.merge_adapter or config.trainable == "full"
        self._plan = EnginePlan(
            command=tuple(cluster.engine_command),
            model=config.student,
            name=STUDENT,
            args=(
                *_arguments(config, adapters=not whole),
                *_one_rope(config.student, cluster.engine_args),
                *_parallel(cluster.gpus_per_engine, cluster.engine_args),
                *cluster.engine_args,
            ),
            start_s=cluster.engine_start_s,
            holds="weights" if whole else "adapters",
            kept=1 if whole else _versions(config),
            secret=secrets.token_hex(16),
            dtype=config.compute.dtype,
        )
        self._places = Places([self._plan], booking_of_student(config))
        self._newest = newest
        self._held: deque[tuple[str, Any]] = deque(maxlen=self._plan.kept)
        self._version: int | None = None
        self._moving = threading.Lock()  # units of a step ask at once
        self._turns = Turns()
        self._now = Endpoint("the student's engine", ())

    def context(self) -> int | None:
        """The longest sequence that all of them take."""
        return self.again().context

    def newest(self) -> Endpoint:
        """The student as it is, once every engine has acknowledged it."""
        with self._moving:
            version, files = self._newest()
            if version != self._version:
                if self._held:
                    self._refreshed()  # an engine drops the version that it got first, so it gets them in order
                name = f"{STUDENT}-{version}"
                self._held.append((name, files))
                self._places.load_all(name, files)
                self._version = version
                return self._refreshed()
            return self._now if self._now.urls else self._refreshed()

    def again(self) -> Endpoint:
        """Where they are by now: one that died is started again, with the versions that are still asked for."""
        with self._moving:
            return self._refreshed()

    def using(self) -> AbstractContextManager[Any]:
        return self._turns.of(_ASKED) if self._plan.holds == "weights" else contextlib.nullcontext()

    def changing(self) -> AbstractContextManager[Any]:
        return self._turns.of(_CHANGED) if self._plan.holds == "weights" else contextlib.nullcontext()

    def close(self) -> None:
        """End every engine."""
        self._places.close()

    def _refreshed(self) -> Endpoint:
        states = self._places.states()
        for place, state in enumerate(states):
            for name, files in self._held:  # one on another node has none
                if name not in state.versions:
                    self._places.load(place, name, files)
        self._now = _endpoint("the student's engine", states, self._plan)
        if self._plan.holds == "adapters" and self._held:
            self._now = replace(self._now, model=self._held[-1][0])
        return self._now


class TeacherEngines:
    """The engines of one teachers' model (`opd.remote.endpoints.RemoteModel`)."""

    def __init__(self, plan: EnginePlan, places: Places, model: int, turns: "Turns") -> None:
        self._plan = plan
        self._places = places
        self._model = model
        self._turns = turns
        self._moving = threading.Lock()
        self._now: Endpoint | None = None

    def newest(self) -> Endpoint:
        """Where they were found when they last woke."""
        with self._moving:
            return self._now or self._refreshed()

    def again(self) -> Endpoint:
        with self._moving:
            return self._refreshed()

    @contextmanager
    def using(self) -> Iterator[None]:
        with self._turns.of(self._model) as changed:
            if changed:
                self.again()
            yield

    def changing(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def _refreshed(self) -> Endpoint:
        self._now = _endpoint(f"an engine of {self._plan.who}", self._places.states(self._model), self._plan)
        return self._now


class Turns:
    """Who is awake where several models share devices: any number of users of one, and nobody of another meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._awake: int | None = None
        self._users: Counter[int] = Counter()

    @contextmanager
    def of(self, model: int) -> Iterator[bool]:
        """Wait until nobody uses another model, then hold this one; whether it has to be woken."""
        with self._changed:
            self._changed.wait_for(lambda: not any(n for m, n in self._users.items() if m != model))
            self._users[model] += 1
            woken, self._awake = self._awake != model, model
        try:
            yield woken
        finally:
            with self._changed:
                self._users[model] -= 1
                self._changed.notify_all()


class TeachersOnCluster:
    """Every engine that teachers ask for: `models` says which model's engines a teacher is at."""

    def __init__(self, config: Config) -> None:
        started = {name: t for name, t in config.teachers.items() if t.engines is not None}
        plans: dict[str, EnginePlan] = {}
        for teacher in started.values():
            names = [name for name, other in started.items() if other.source == teacher.source]
            plans[teacher.source or ""] = EnginePlan(
                command=tuple(config.cluster.engine_command),
                model=teacher.model or config.student,
                adapter=teacher.adapter,
                name="teacher",
                args=(
                    *_common(config),
                    *_named_tokens(config),
                    *_sleep(config),
                    *_one_rope(teacher.model or config.student, teacher.engine_args),
                    *_parallel(teacher.gpus_per_engine, teacher.engine_args),
                    *teacher.engine_args,
                ),
                start_s=config.cluster.engine_start_s,
                sleeps=config.cluster.teachers_sleep,
                secret=secrets.token_hex(16),  # its own: one model's engine must not pass for another's
                dtype=config.compute.dtype,
                teachers=tuple(names),
            )
        self._groups: list[Places] = []
        engines: dict[str, TeacherEngines] = {}
        for models, booking in bookings_of_teachers(config):
            places = Places([plans[m] for m in models], booking)
            self._groups.append(places)
            turns = Turns()
            for index, model in enumerate(models):
                engines[model] = TeacherEngines(plans[model], places, index, turns)
        self.models = {name: engines[t.source or ""] for name, t in started.items()}

    def close(self) -> None:
        """End them all."""
        for places in self._groups:
            places.close()


def booking_of_student(config: Config) -> Booking:
    """What the engines of the student need."""
    cluster = config.cluster
    return Booking(cluster.engines, cluster.gpus_per_engine, cluster.cpus_per_engine)


def bookings_of_teachers(config: Config) -> list[tuple[list[str], Booking]]:
    """Which models share places, and what those need: each model has its own, but where teachers sleep all share."""
    found: dict[str, Booking] = {}
    for teacher in config.teachers.values():
        if teacher.engines is not None:
            found[teacher.source or ""] = Booking(
                teacher.engines, teacher.gpus_per_engine, config.cluster.cpus_per_engine
            )
    if config.cluster.teachers_sleep:
        return [(list(found), next(iter(found.values())))]
    return [([model], booking) for model, booking in found.items()]


def _endpoint(who: str, states: Sequence[EngineState], plan: EnginePlan) -> Endpoint:
    contexts = [s.context for s in states if s.context is not None]
    urls = tuple(s.url for s in states)
    return Endpoint(who, urls, plan.name, context=min(contexts, default=None), secret=plan.secret)


def _common(config: Config) -> list[str]:
    return ["--dtype", config.compute.dtype, "--generation-config", "vllm"]


def _named_tokens(config: Config) -> list[str]:
    """A server names so many of the likeliest tokens at each place, where more are needed than it would."""
    return ["--max-logprobs", str(config.objective.top_k)] if config.objective.type == "top_k" else []


def _parallel(gpus: int, given: Sequence[str]) -> list[str]:
    """An engine with several GPUs splits its model over them, unless the recipe says how."""
    if gpus < 2 or any(
        arg.startswith(("--tensor-p", "-tp", "--pipeline-p", "-pp", "--data-p", "-dp")) for arg in given
    ):
        return []
    return ["--tensor-parallel-size", str(gpus)]


def _one_rope(source: str, given: Sequence[str]) -> list[str]:
    """A server that takes sequences beyond the change of a 'longrope' uses the long factors for short ones too; ranks do not."""
    # not above: an actor that only watches a server imports this module, and needs no torch
    from opd.models.architecture import rope_limit_of

    limit = rope_limit_of(source)
    if limit is None or any(arg.startswith("--max-model-len") for arg in given):
        return []
    return ["--max-model-len", str(limit.tokens)]


def _sleep(config: Config) -> list[str]:
    return ["--enable-sleep-mode"] if config.cluster.teachers_sleep else []


def _arguments(config: Config, *, adapters: bool) -> list[str]:
    """What makes a server sample as the recipe says, from the full distribution, and give the log-probabilities of that."""
    found = _common(config)
    # after the temperature: those of the distribution that was sampled from
    found += ["--logprobs-mode", "processed_logprobs"] if config.temperature != 1.0 else []
    if adapters:
        found += ["--enable-lora", "--max-lora-rank", str(_rank(config.lora.rank))]
        found += ["--max-loras", str(_versions(config))]
    return found


def _versions(config: Config) -> int:
    """How many versions of the student are asked for at once: the newest, those that older steps began with, and one between."""
    return config.cluster.max_staleness + 2


def _rank(rank: int) -> int:
    """The smallest rank that vLLM serves and that holds this one."""
    return next(r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
