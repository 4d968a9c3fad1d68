"""The vLLM engines that sample from the student, as Ray actors, and their weights."""

import contextlib
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from opd.config import Config
from opd.distributed.engine import Engine, EnginePlan
from opd.errors import OpdError, RunError, one_line
from opd.served.wire import Endpoint

_AGAIN_S = 1.0
BASE = "student"  # the name of the student's base at its engines


class _EngineActor(Engine):
    """An engine at the address of its node; what it started ends with it."""

    def __init__(self, plan: EnginePlan, folder: str) -> None:
        os.chdir(folder)  # where the recipe's paths begin, on every node
        super().__init__(plan, ray.util.get_node_ip_address())


class Engines:
    """All engines of the student: where they are, and which version each has acknowledged.

    An actor that dies with its node is made again by Ray where there is room; `endpoint` then finds it, and gives it the student.
    """

    def __init__(self, config: Config) -> None:
        cluster = config.cluster
        plan = EnginePlan(
            command=tuple(cluster.engine_command),
            model=config.student,
            name=BASE,
            args=(*_arguments(config), *cluster.engine_args),
            start_s=cluster.engine_start_s,
            kept=_versions(config),
        )
        remote = ray.remote(_EngineActor).options(
            num_cpus=cluster.cpus_per_engine,
            num_gpus=cluster.gpus_per_engine,
            max_restarts=-1,
            max_task_retries=0,
        )
        self._actors: list[Any] = [remote.remote(plan, os.getcwd()) for _ in range(cluster.engines)]
        self._starting = [actor.address.remote() for actor in self._actors]  # nobody waits yet
        self._patience_s = cluster.engine_start_s
        self._versions: deque[tuple[str, Any]] = deque(maxlen=plan.kept)
        self._endpoint = Endpoint("the student's engine", ())

    def load(self, files: Mapping[str, bytes], *, version: int) -> None:
        """Give every engine the student as it is now; returns when all have acknowledged it."""
        self._versions.append((f"{BASE}-{version}", ray.put(dict(files))))
        self._refresh()

    @property
    def where(self) -> Endpoint:
        """Where the student is served, as they last said."""
        return self._endpoint

    def endpoint(self) -> Endpoint:
        """Where the student is served, under the name of the version that every engine has; one that died is started again."""
        self._refresh()
        return self._endpoint

    def close(self) -> None:
        """End every engine."""
        for actor in self._actors:
            with contextlib.suppress(RayActorError, RayTaskError, GetTimeoutError):  # it is gone
                ray.get(actor.stop.remote(), timeout=30)
            ray.kill(actor)
        self._actors = []

    def _refresh(self) -> None:
        urls = self._ask("address")
        for name, files in self._versions:  # those that an engine has cost nothing; one on another node has none
            self._ask("load", name, files)
        model = self._versions[-1][0] if self._versions else BASE
        self._endpoint = replace(self._endpoint, urls=tuple(urls), model=model)

    def _ask(self, method: str, *args: Any) -> list[Any]:
        """Every engine's answer; one that died in between is asked again where it lives then."""
        refs = [getattr(actor, method).remote(*args) for actor in self._actors]
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
                    who = f"engine {index} of {len(self._actors)}"
                    raise RunError(
                        f"{who} died and does not come back ({one_line(str(error))[:200]}); continue with 'opd train --resume'"
                    ) from None
                time.sleep(_AGAIN_S)
                ref = getattr(self._actors[index], method).remote(*args)


def _arguments(config: Config) -> list[str]:
    """What makes a server sample as the recipe says, from the full distribution, and give the log-probabilities of that."""
    found = ["--dtype", config.compute.dtype, "--generation-config", "vllm"]
    # after the temperature: those of the distribution that was sampled from
    found += ["--logprobs-mode", "processed_logprobs"] if config.temperature != 1.0 else []
    if config.trainable == "lora":
        found += [
            "--enable-lora",
            "--max-lora-rank",
            str(_rank(config.lora.rank)),
            "--max-loras",
            str(_versions(config)),
        ]
    return found


def _versions(config: Config) -> int:
    """How many versions of the student are asked for at once: the newest, those that older steps began with, and one between."""
    return config.cluster.max_staleness + 2


def _rank(rank: int) -> int:
    """The smallest rank that vLLM serves and that holds this one."""
    return next(r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
