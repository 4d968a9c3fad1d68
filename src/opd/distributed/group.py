"""The ranks of the learner as Ray actors, and the learner and the teachers that they form together."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from opd.batch import Batch, consecutive, split
from opd.config import Config
from opd.distributed.cluster import cause_of
from opd.distributed.rank import Rank, RankFacts, Saved, TeacherOf
from opd.errors import RunError, one_line
from opd.metrics import Metrics, merge
from opd.objective import divisor
from opd.records import Rollout, ScoredRollout


class RankGroup:
    """Calls every rank at once. When one fails or dies, all are ended, and the error names the one that failed."""

    def __init__(self, config: Config) -> None:
        """Starts the ranks, which begin to load; `build` waits for them."""
        cluster = config.cluster
        remote = ray.remote(Rank).options(num_cpus=cluster.cpus_per_rank, num_gpus=cluster.gpus_per_rank)
        self.size = cluster.learner_ranks
        self._actors: list[Any] = [remote.remote(config, rank, self.size, os.getcwd()) for rank in range(self.size)]
        self._order = threading.Lock()
        self._met = False
        self._error: BaseException | None = None
        self._loading = self._start("build", [()] * self.size)
        self._facts: RankFacts | None = None

    def build(self) -> None:
        """Wait until every rank has loaded its models. Raises the first error of a rank."""
        self._facts = self._wait(self._loading)[0]

    @property
    def facts(self) -> RankFacts:
        """What the ranks hold."""
        assert self._facts is not None, "build() comes first"
        return self._facts

    def packing_errors(self) -> dict[str, dict[str, float]]:
        """The packing errors at the first rank; none after the ranks have met, when no rank has whole weights."""
        if self._met:
            return {}
        return self._call("packing_errors", [()])[0]

    def meet(self) -> None:
        """Join the ranks to a process group and shard the weights, once."""
        if self._met:
            return
        [address] = self._call("free_address", [()])
        self._met = True
        self._call("meet", [(address,)] * self.size)

    def all(self, method: str, *args: Any) -> list[Any]:
        """Call every rank with the same arguments."""
        return self.each(method, [args] * self.size)

    def each(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call every rank with its own arguments, after the weights are sharded."""
        self.meet()
        return self._call(method, args)

    def weights(self) -> Any:
        """Ray's reference to the files of the student's folder, at the first rank; the other ranks take part in making them."""
        self.meet()
        with self._order:
            self._require_alive()
            made = [actor.files.options(num_returns=2).remote() for actor in self._actors]
        self._wait([done for done, _ in made])
        return made[0][1]

    def _call(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._wait(self._start(method, args))

    def _start(self, method: str, args: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call the first `len(args)` ranks, usually all."""
        with self._order:  # every rank gets the calls of several threads in the same order
            self._require_alive()
            return [getattr(actor, method).remote(*a) for actor, a in zip(self._actors[: len(args)], args, strict=True)]

    def _wait(self, refs: Sequence[Any]) -> list[Any]:
        pending, ready = list(refs), []
        try:
            while pending:
                ready, pending = ray.wait(pending, num_returns=1)
                ray.get(ready)
        except RayTaskError as error:
            raise self._end(cause_of(error)) from None
        except RayActorError as error:
            rank = next(i for i, ref in enumerate(refs) if ref in ready)
            raise self._end(
                RunError(f"learner rank {rank} of {self.size} died ({one_line(str(error))[:200]})")
            ) from None
        return ray.get(list(refs))

    def _end(self, error: BaseException) -> BaseException:
        """End all ranks; every later call raises the first error."""
        with self._order:
            self._error = self._error or error
        self.close()
        return self._error

    def _require_alive(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End every rank."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


class RankTeachers:
    """Teachers at the ranks; each rank scores its own part of the rollouts."""

    def __init__(self, group: RankGroup, teacher_of: TeacherOf) -> None:
        self._group = group
        self._teacher_of = teacher_of

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        sizes = [len(r.token_ids) for r in rollouts]
        bounds = consecutive(sizes, [r.id for r in rollouts], self._group.size)
        found = self._group.each("score", [(list(rollouts[a:b]), self._teacher_of) for a, b in bounds])
        scored = [item for part in found for item in part]
        # Ray returns copies; the rollouts stay the caller's
        return [replace(item, rollout=rollout) for item, rollout in zip(scored, rollouts, strict=True)]


class RankLearner:
    """The learner on several ranks (`opd.roles.Learner`): any number of them gives the same gradient."""

    def __init__(self, group: RankGroup, config: Config) -> None:
        self.group = group
        self._config = config
        self._changes = 0  # the student's version
        self._files: tuple[int, Any] = (-1, None)

    def score_student(self, batch: Batch) -> Batch:
        """The batch with the student's own log-probabilities, KLs and baselines."""
        found = self.group.each("score_student", [(part,) for part in split(batch, self.group.size)])
        names = dict.fromkeys(name for part in found for name in part)
        columns: dict[str, Any] = {n: torch.cat([part[n] for part in found if part]) for n in names}
        return replace(batch, **columns)

    def forward_backward(self, batch: Batch) -> Metrics:
        """Add the gradient of the whole batch's loss."""
        shared = divisor(self._config.objective, batch)
        return merge(self.group.each("forward_backward", [(part, shared) for part in split(batch, self.group.size)]))

    def optim_step(self) -> Metrics:
        """Clip, step, advance the schedule, clear the gradient."""
        found = self.group.all("optim_step")[0]
        self._changes += 1  # only now: calls in between get the student before the step
        return found

    def weights(self) -> Any:
        """Ray's reference to the files of the student's folder, which do not pass through this process."""
        return self.version()[1]

    def version(self) -> tuple[int, Any]:
        """The number of changes to the student, and its weights."""
        changes = self._changes
        if self._files[0] != changes:
            self._files = changes, self.group.weights()
        return self._files

    def save(self, folder: Path) -> Mapping[str, Any]:
        """Every rank writes its shards into a folder that all nodes share. Raises RunError where they do not share it."""
        saved: list[Saved] = self.group.all("save", str(folder.resolve()))
        here = {file.name for file in folder.iterdir()}
        for rank, found in enumerate(saved):
            if found.files - here:
                raise RunError(
                    f"learner rank {rank} on {found.node} wrote '{min(found.files - here)}' to '{folder.resolve()}', which is not "
                    "the folder here; put output on a disk that all nodes share"
                )
        return saved[0].values

    def load(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of any number of ranks."""
        self.group.all("load", str(folder.resolve()), dict(values))
        self._changes += 1
