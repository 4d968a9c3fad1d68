"""The parts of a run on a Ray cluster (`opd.roles.Backend`): ranks that learn, engines that sample, teachers at either."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from opd.batch import consecutive
from opd.config import Config
from opd.distributed.cluster import join
from opd.distributed.engines import AllTeacherEngines, StudentEngines
from opd.distributed.group import RankGroup, RankLearner, RankTeachers
from opd.episodes.player import EpisodePlayer, MakeEnvironment
from opd.local.backend import distances_of
from opd.metrics import merge
from opd.models.loading import gguf_folder, load_tokenizer
from opd.models.lora import adapter_config
from opd.records import ScoredRollout
from opd.remote.client import Client, Deployment
from opd.remote.discovery import connect_all, connect_started
from opd.remote.protocol import ServerProtocol
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import LocalAndRemoteTeachers, RemoteTeacher, identities_of, templates_of
from opd.roles import Limit, Sampler, StandaloneSampler, Teacher, TeacherFacts, smallest
from opd.text.chat import Chat
from opd.text.template import freeze, turn_end


def build(config: Config, make_environment: MakeEnvironment) -> "RayBackend":
    """Start the ranks and the engines on the recipe's cluster, and connect the teachers behind servers."""
    if Path(config.student).suffix == ".gguf":
        config = config.model_copy(update={"student": str(gguf_folder(Path(config.student)))})
    for name, teacher in config.teachers.items():
        if teacher.adapter is not None:  # fails before a cluster starts
            adapter_config(teacher.adapter, f"adapter '{teacher.adapter}' (teacher '{name}')")
    loaded = load_tokenizer(config.student)
    if config.template_time is not None:
        freeze(loaded.tokenizer, config.template_time)
    turn_end(
        loaded.tokenizer, loaded.generation_config, who=f"model '{config.student}'"
    )  # raises where nothing ends one
    with ExitStack() as started:
        join(config)
        started.callback(ray.shutdown)
        client = Client(config.remote)
        started.callback(client.close)
        remote = connect_all(config, loaded.tokenizer, client)
        teachers = AllTeacherEngines(config)  # they start while the ranks load
        started.callback(teachers.close)
        group = RankGroup(config)
        started.callback(group.close)
        learner = RankLearner(group, config)
        engines = StudentEngines(config, learner.version)
        started.callback(engines.close)
        group.build()
        remote |= connect_started(config, loaded.tokenizer, client, teachers.deployments)
        rows = group.facts.teachers.vocab_size
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
        """The longest sequence that the student takes, at its ranks and engines."""
        context = self.engines.context()
        return smallest((self._group.facts.student_context, None if context is None else Limit(context)))

    @property
    def identities(self) -> Mapping[str, str]:
        """What must not change during a run."""
        return {**self._group.facts.identities, **identities_of(self.remote)}

    def facts(self) -> TeacherFacts:
        """What the teachers are."""
        inside = self._group.facts.teachers
        return replace(
            inside,
            contexts={
                **inside.contexts,
                **{n: None if t.context is None else Limit(t.context) for n, t in self.remote.items()},
            },
            without_distributions=inside.without_distributions | self.remote.keys(),
            unknown_tokenizers={n: t.unknown for n, t in self.remote.items()},
            templates={**inside.templates, **templates_of(self.remote)},
        )

    def sampler(self) -> Sampler:
        """A sampler of the student at its engines."""
        limit = self._group.facts.student_context
        return self._sampler_of(self.engines, None if limit is None else limit.tokens)

    def _sampler_of(
        self, deployment: Deployment, context: int | None = None, protocol: ServerProtocol | None = None
    ) -> RemoteSampler:
        return RemoteSampler(
            deployment,
            self.client,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context=context,
            player=self.player,
            protocol=protocol,
        )

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        """The prompts' own teachers; followed: the targets that training follows."""
        ranks = RankTeachers(self._group, lambda rank: rank.teachers(keep_hidden=keep_hidden, followed=followed))
        return LocalAndRemoteTeachers(ranks, self.remote) if self.remote else ranks

    def student_as_teacher(self) -> Teacher:
        """The student as the teacher of every prompt."""
        return RankTeachers(self._group, lambda rank: rank.student_as_teacher())

    def models_as_teachers(self, names: Collection[str]) -> Teacher:
        """Single models."""
        return RankTeachers(self._group, lambda rank: rank.models_as_teachers(list(names)))

    def model_names(self) -> Collection[str]:
        """Every model that scores the student's tokens at the ranks."""
        return self._group.facts.model_names

    def standalone_sampler(self, teacher: str) -> StandaloneSampler | None:
        """A sampler of a teacher behind a server; None for a teacher at the ranks, which do not sample."""
        if teacher not in self.remote:
            return None
        found = self.remote[teacher]
        return StandaloneSampler(self._sampler_of(found.deployment, protocol=found.protocol), self.tokenizer)

    def learner(self) -> RankLearner:
        """The learner on all ranks, which shard their weights at its first call."""
        return self.rank_learner

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        """Of each teacher with distributions: the student's reverse KL in nats per token, and their top-k overlap."""
        bounds = consecutive(
            [len(s.rollout.token_ids) for s in scored], [s.rollout.id for s in scored], self._group.size
        )
        found = self._group.each("distances", [(list(scored[a:b]),) for a, b in bounds])
        return distances_of(merge(found), [s.score.teacher for s in scored])

    def packing_errors(self) -> Mapping[str, Mapping[str, float]]:
        """Of each model, before its weights are sharded."""
        return self._group.packing_errors()

    def export(self, folder: Path) -> None:
        """Write the student."""
        self._group.all("export", str(folder.resolve()))

    def close(self) -> None:
        """End everything that this run started, and leave the cluster."""
        self.started.close()
