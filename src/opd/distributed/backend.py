"""The parts of a run on a Ray cluster (`opd.roles.Backend`): ranks that learn, engines that sample, teachers at either."""

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from opd.batch import Batch, consecutive, split
from opd.config import Config
from opd.distributed.cluster import cause_of, join
from opd.distributed.engines import StudentEngines, start_teachers
from opd.distributed.rank import Rank, RankFacts, Saved, TeacherOf
from opd.episodes.player import EpisodePlayer, MakeEnvironment
from opd.errors import RunError, one_line
from opd.local.backend import distances_of
from opd.metrics import Metrics, merge
from opd.models.loading import gguf_folder, load_tokenizer
from opd.models.lora import adapter_config
from opd.objective import divisor
from opd.records import Rollout, ScoredRollout
from opd.remote.client import Client
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import (
    LocalAndRemoteTeachers,
    RemoteTeacher,
    connect_all,
    connect_started,
    identities_of,
    with_servers,
)
from opd.roles import Limit, PassGaps, Sampler, StandaloneSampler, Teacher, TeacherFacts, smallest
from opd.text.chat import Chat
from opd.text.template import freeze, require_variables, set_variables, turn_end


class RankGroup:
    """Calls every rank at once. When one fails or dies, all are ended, and the error names the one that failed."""

    def __init__(self, config: Config) -> None:
        """Starts the ranks, which begin to load; `facts` waits for them."""
        cluster = config.cluster
        remote = ray.remote(Rank).options(num_cpus=cluster.cpus_per_rank, num_gpus=cluster.gpus_per_rank)
        self.size = cluster.learner_ranks
        self._actors: list[Any] = [remote.remote(config, rank, self.size, os.getcwd()) for rank in range(self.size)]
        self._order = threading.Lock()
        self._met = False
        self._error: BaseException | None = None
        self._loading = self._start("build", [()] * self.size)

    @cached_property
    def facts(self) -> RankFacts:
        """What the ranks hold, once every rank has loaded its models. Raises the first error of a rank."""
        return self._wait(self._loading)[0]

    def check_passes(self) -> dict[str, PassGaps]:
        """The packing errors at the first rank; none after the ranks have met, when no rank has whole weights."""
        if self._met:
            return {}
        return self._call("check_passes", [()])[0]

    def meet(self) -> None:
        """Join the ranks to a process group and shard the weights, once."""
        if self._met:
            return
        [address] = self._call("free_address", [()])
        self._met = True
        self._call("meet", [(address,)] * self.size)

    def all(self, method: str, *args: Any) -> list[Any]:
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
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


@dataclass(frozen=True)
class RankTeachers:
    """Teachers at the ranks; each rank scores its own part of the rollouts."""

    group: RankGroup
    teacher_of: TeacherOf

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Each rollout with its own teacher's score, in the order given."""
        sizes = [len(r.token_ids) for r in rollouts]
        bounds = consecutive(sizes, [r.id for r in rollouts], self.group.size)
        found = self.group.each("score", [(list(rollouts[a:b]), self.teacher_of) for a, b in bounds])
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
        found = self.group.each("score_student", [(part,) for part in split(batch, self.group.size)])
        names = dict.fromkeys(name for part in found for name in part)
        columns: dict[str, Any] = {n: torch.cat([part[n] for part in found if part]) for n in names}
        return replace(batch, **columns)

    def forward_backward(self, batch: Batch) -> Metrics:
        shared = divisor(self._config.objective, batch)
        return merge(self.group.each("forward_backward", [(part, shared) for part in split(batch, self.group.size)]))

    def optim_step(self) -> Metrics:
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


def build(config: Config, make_environment: MakeEnvironment) -> "RayBackend":
    """Start the ranks and the engines on the recipe's cluster, and connect the teachers behind servers."""
    if Path(config.student).suffix == ".gguf":
        config = config.model_copy(update={"student": str(gguf_folder(Path(config.student)))})
    for name, teacher in config.teachers.items():
        if teacher.adapter is not None:  # fails before a cluster starts
            adapter_config(teacher.adapter, f"adapter '{teacher.adapter}' (teacher '{name}')")
    loaded = load_tokenizer(config.student)
    variables = config.chat.template_args
    require_variables(loaded.tokenizer, variables, key="chat.template_args", source=config.student)
    set_variables(loaded.tokenizer, variables)
    if config.template_time is not None:
        freeze(loaded.tokenizer, config.template_time)
    # raises where no token ends a turn
    turn_end(loaded.tokenizer, loaded.generation_config, who=f"model '{config.student}'")
    with ExitStack() as started:
        join(config)
        started.callback(ray.shutdown)
        client = Client(config.remote)
        started.callback(client.close)
        remote = connect_all(config, loaded.tokenizer, client)
        teachers = start_teachers(config, started)  # they start while the ranks load
        group = RankGroup(config)
        started.callback(group.close)
        learner = RankLearner(group, config)
        engines = StudentEngines(config, learner.version)
        started.callback(engines.close)
        rows = group.facts.teachers.vocab_size
        remote |= connect_started(config, loaded.tokenizer, client, teachers)
        chat = Chat(loaded.tokenizer, rows=rows, generation_config=loaded.generation_config)
        player = EpisodePlayer(chat, config.episodes, end_ids=chat.end.ids, make_environment=make_environment)
        return RayBackend(config, loaded.tokenizer, player, client, remote, engines, learner, started.pop_all())


@dataclass(frozen=True)
class RayBackend:
    """The student on several ranks, its engines, and the teachers (`opd.roles.Backend`).

    remote: the teachers behind servers, engines of this run included; ranks hold the other teachers. started: closes everything
    that this run started.
    """

    config: Config
    tokenizer: Any
    player: EpisodePlayer
    client: Client
    remote: Mapping[str, RemoteTeacher]
    engines: StudentEngines
    rank_learner: RankLearner
    started: ExitStack

    @property
    def _group(self) -> RankGroup:
        return self.rank_learner.group

    @property
    def student_context(self) -> Limit | None:
        context = self.engines.context()
        return smallest((self._group.facts.student_context, None if context is None else Limit(context)))

    @property
    def identities(self) -> Mapping[str, str]:
        return {**self._group.facts.identities, **identities_of(self.remote)}

    def facts(self) -> TeacherFacts:
        return with_servers(self._group.facts.teachers, self.remote)

    def sampler(self) -> Sampler:
        limit = self._group.facts.student_context
        return RemoteSampler(
            self.engines,
            self.client,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context=None if limit is None else limit.tokens,
            player=self.player,
        )

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        ranks = RankTeachers(self._group, lambda rank: rank.teachers(keep_hidden=keep_hidden, followed=followed))
        return LocalAndRemoteTeachers(ranks, self.remote) if self.remote else ranks

    def student_as_teacher(self) -> Teacher:
        return RankTeachers(self._group, lambda rank: rank.student_as_teacher())

    def models_as_teachers(self, names: Collection[str]) -> Teacher:
        return RankTeachers(self._group, lambda rank: rank.models_as_teachers(list(names)))

    def model_names(self) -> Collection[str]:
        return self._group.facts.model_names

    def standalone_sampler(self, teacher: str) -> StandaloneSampler | None:
        """A sampler of a teacher behind a server; None for a teacher at the ranks, which do not sample."""
        if teacher not in self.remote:
            return None
        return StandaloneSampler(self.remote[teacher].sampler(self.config, self.player), self.tokenizer)

    def learner(self) -> RankLearner:
        """The learner on all ranks, which shard their weights at its first call."""
        return self.rank_learner

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        bounds = consecutive(
            [len(s.rollout.token_ids) for s in scored], [s.rollout.id for s in scored], self._group.size
        )
        found = self._group.each("distances", [(list(scored[a:b]),) for a, b in bounds])
        return distances_of(merge(found), [s.score.teacher for s in scored])

    def check_passes(self) -> Mapping[str, PassGaps]:
        return self._group.check_passes()

    def export(self, folder: Path) -> None:
        self._group.all("export", str(folder.resolve()))

    def close(self) -> None:
        self.started.close()
