"""The Ray cluster of a run: joining it, the resources that each part needs, and errors of its actors."""

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError

from opd.config import Config
from opd.errors import OpdError, RunError, one_line


@dataclass(frozen=True)
class Placement:
    """The resources of a group of actors: how many actors there are, and the GPUs and CPUs of each."""

    actors: int
    gpus: float
    cpus: float


def student_placement(config: Config) -> Placement:
    cluster = config.cluster
    return Placement(cluster.engines, cluster.gpus_per_engine, cluster.cpus_per_engine)


def teacher_placements(config: Config) -> list[tuple[list[str], Placement]]:
    """The models that share actors, and the resources of those. Each model has actors of its own, unless teachers sleep: then all
    share."""
    found: dict[str, Placement] = {}
    for teacher in config.teachers.values():
        if teacher.engines is not None:
            found[teacher.source or ""] = Placement(
                teacher.engines, teacher.gpus_per_engine, config.cluster.cpus_per_engine
            )
    if config.cluster.teachers_sleep:
        return [(list(found), next(iter(found.values())))]
    return [([model], placement) for model, placement in found.items()]


def join(config: Config) -> None:
    """Join the recipe's cluster, or start one on this machine. Raises RunError, also where the cluster has too few resources."""
    address = config.cluster.address
    # "local" starts a new cluster, even where another one runs on this machine
    here: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        if address is not None and address != "auto":
            # Ray itself waits for minutes where nothing listens
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"cluster.address = '{address}': {one_line(str(error))[:200]}; start Ray there ('ray start --head'), or leave address "
            "out for one on this machine"
        ) from None
    try:
        _require_resources(config)
    except BaseException:
        ray.shutdown()
        raise


def _require_resources(config: Config) -> None:
    """Raise RunError where the cluster has less than the recipe asks for. Ray would wait silently."""
    cluster = config.cluster
    ranks = Placement(cluster.learner_ranks, cluster.gpus_per_rank, cluster.cpus_per_rank)
    placements = {"ranks": ranks, "engines of the student": student_placement(config)}
    placements |= {f"engines of {' and '.join(models)}": found for models, found in teacher_placements(config)}
    available = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind in ("CPU", "GPU"):
        each = {who: p.cpus if kind == "CPU" else p.gpus for who, p in placements.items()}
        largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        needed, there = sum(p.actors * each[who] for who, p in placements.items()), available.get(kind, 0.0)
        if needed > there:
            asked = ", ".join(f"{p.actors} {who} with {each[who]:g}" for who, p in placements.items() if each[who])
            parts = " (fractions are possible)" if kind == "CPU" else ""
            raise RunError(
                f"the cluster has {there:g} {kind}s, and {asked} need {needed:g}; lower cluster.learner_ranks, cluster.engines, "
                f"cluster.{kind.lower()}s_per_rank or {kind.lower()}s_per_engine{parts}, or add nodes"
            )
        for who, one in each.items():
            if one > largest:
                raise RunError(
                    f"{who} need {one:g} {kind}s each on one node, and no node of the cluster has more than {largest:g}; ask for "
                    "less, or add such nodes"
                )


def enter(folder: str) -> None:
    """Let an actor resolve the recipe's paths from the driver's folder. Raises RunError on a node without that folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise RunError(
            f"{socket.gethostname()} cannot enter '{folder}', where this run was started ({error.strerror}); start it in a folder "
            "that all nodes share"
        ) from None


def cause_of(error: RayTaskError) -> Exception:
    """The error that an actor raised for the user, or else Ray's own with the actor's traceback."""
    return error.cause if isinstance(error.cause, OpdError) else error
