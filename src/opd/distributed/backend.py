"""The parts of a run on a Ray cluster (`opd.roles.Backend`): ranks that learn, engines that sample, teachers here and there."""

import logging
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from opd.batch import consecutive
from opd.config import Config
from opd.distributed.engines import (
    Booking,
    StudentEngines,
    TeachersOnCluster,
    booking_of_student,
    bookings_of_teachers,
)
from opd.distributed.group import RankGroup, RankLearner, RankTeachers
from opd.episodes.player import EpisodePlayer, MakeEnvironment
from opd.errors import RunError, one_line
from opd.local.backend import distances_of
from opd.metrics import merge
from opd.models.loading import gguf_folder, load_tokenizer
from opd.models.lora import adapter_config
from opd.records import ScoredRollout
from opd.remote.client import Client
from opd.remote.discovery import connect_all, connect_started
from opd.remote.endpoints import RemoteModel
from opd.remote.protocol import Form
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import RemoteTeacher, WithRemote, identities_of, templates_of
from opd.remote.vllm import VLLM
from opd.roles import Limit, Sampler, StandaloneSampler, Teacher, TeacherFacts, smallest
from opd.text.chat import Chat
from opd.text.template import freeze
from opd.text.turn_end import turn_end


def build(config: Config, make_environment: MakeEnvironment) -> "RayBackend":
    """Start the ranks and the engines on the cluster that the recipe names, and connect the teachers behind servers."""
    if Path(config.student).suffix == ".gguf":
        config = config.model_copy(update={"student": str(gguf_folder(Path(config.student)))})
    for name, teacher in config.teachers.items():
        if teacher.adapter is not None:  # what can be seen here need not wait for a cluster
            adapter_config(teacher.adapter, f"adapter '{teacher.adapter}' (teacher '{name}')")
    loaded = load_tokenizer(config.student)
    if config.template_time is not None:
        freeze(loaded.tokenizer, config.template_time)
    turn_end(
        loaded.tokenizer, loaded.generation_config, who=f"model '{config.student}'"
    )  # raises where nothing ends one
    with ExitStack() as started:
        _join(config)
        started.callback(ray.shutdown)
        _require_room(config)
        client = Client(config.remote)
        started.callback(client.close)
        remote = connect_all(config, loaded.tokenizer, client)
        teachers = TeachersOnCluster(config)  # they start while the ranks load
        started.callback(teachers.close)
        group = RankGroup(config)
        started.callback(group.close)
        learner = RankLearner(group, config)
        engines = StudentEngines(config, learner.version)
        started.callback(engines.close)
        group.build()
        remote |= connect_started(config, loaded.tokenizer, client, teachers.models)
        rows = group.facts.teachers.vocab_size
        chat = Chat(loaded.tokenizer, rows=rows, generation_config=loaded.generation_config)
        player = EpisodePlayer(chat, config.episodes, end_ids=chat.end.ids, make_environment=make_environment)
        return RayBackend(config, loaded.tokenizer, player, client, remote, engines, learner, started.pop_all())


class RayBackend:
    """The student on several ranks, and engines that sample from it as it is; started: what ends with it."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        player: EpisodePlayer,
        client: Client,
        remote: Mapping[str, RemoteTeacher],
        engines: StudentEngines,
        learner: RankLearner,
        started: ExitStack,
    ) -> None:
        self._config = config
        self.tokenizer: Any = tokenizer
        self._player = player
        self._client = client
        self._remote = remote
        self._engines = engines
        self._learner = learner
        self._group = learner.group
        self._started = started

    @property
    def student_context(self) -> Limit | None:
        """The longest sequence that the student takes, at ranks and engines."""
        context = self._engines.context()
        return smallest((self._group.facts.student_context, None if context is None else Limit(context)))

    @property
    def identities(self) -> Mapping[str, str]:
        """What must not change under a run."""
        return {**self._group.facts.identities, **identities_of(self._remote)}

    def facts(self) -> TeacherFacts:
        """What the teachers are."""
        inside = self._group.facts.teachers
        return replace(
            inside,
            contexts={
                **inside.contexts,
                **{n: None if t.context is None else Limit(t.context) for n, t in self._remote.items()},
            },
            without_distributions=inside.without_distributions | self._remote.keys(),
            unknown_tokenizers={n: t.unknown for n, t in self._remote.items()},
            templates={**inside.templates, **templates_of(self._remote)},
        )

    def sampler(self) -> Sampler:
        """Of the student as it is, at its engines."""
        limit = self._group.facts.student_context
        return self._sampler_of(self._engines, None if limit is None else limit.tokens)

    def _sampler_of(self, model: RemoteModel, context: int | None = None, form: Form = VLLM) -> RemoteSampler:
        return RemoteSampler(
            model,
            self._client,
            temperature=self._config.temperature,
            max_new_tokens=self._config.sampling.max_new_tokens,
            context=context,
            player=self._player,
            form=form,
        )

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        """The prompts' own; followed: what training follows."""
        inside = RankTeachers(self._group, "followed" if followed else "teachers", keep_hidden=keep_hidden)
        return WithRemote(inside, self._remote) if self._remote else inside

    def student_as_teacher(self) -> Teacher:
        """The student as the teacher of every prompt."""
        return RankTeachers(self._group, "itself", keep_hidden=False)

    def models_as_teachers(self, names: Collection[str]) -> Teacher:
        """Single models."""
        return RankTeachers(self._group, "alone", keep_hidden=False, names=list(names))

    def model_names(self) -> Collection[str]:
        """Every model that scores the student's tokens at the ranks."""
        return self._group.facts.model_names

    def standalone_sampler(self, teacher: str) -> StandaloneSampler | None:
        """A teacher behind a server can be asked for answers; what ranks hold cannot."""
        if teacher not in self._remote:
            return None
        found = self._remote[teacher]
        return StandaloneSampler(self._sampler_of(found.model, form=found.form), self.tokenizer)

    def learner(self) -> RankLearner:
        """All ranks together; they meet when they are first asked."""
        return self._learner

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        """Of each teacher with distributions: the student's reverse KL in nats per token, and their top-k overlap."""
        bounds = consecutive(
            [len(s.rollout.token_ids) for s in scored], [s.rollout.id for s in scored], self._group.size
        )
        found = self._group.each("distances", [(list(scored[a:b]),) for a, b in bounds])
        return distances_of(merge(found), [s.score.teacher for s in scored])

    def packing_errors(self) -> Mapping[str, Mapping[str, float]]:
        """Of each model, before its weights are spread."""
        return self._group.packing_errors()

    def export(self, folder: Path) -> None:
        """Write the student."""
        self._group.all("export", str(folder.resolve()))

    def close(self) -> None:
        """End all that was started, and leave the cluster."""
        self._started.close()


def _require_room(config: Config) -> None:
    """Raise RunError where the cluster has less than the recipe asks for: Ray would wait for it without a word."""
    cluster = config.cluster
    ranks = Booking(cluster.learner_ranks, cluster.gpus_per_rank, cluster.cpus_per_rank)
    booked = {"ranks": ranks, "engines of the student": booking_of_student(config)}
    booked |= {f"engines of {' and '.join(models)}": booking for models, booking in bookings_of_teachers(config)}
    found = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind in ("CPU", "GPU"):
        each = {who: b.cpus if kind == "CPU" else b.gpus for who, b in booked.items()}
        largest = max((node.get(kind, 0.0) for node in nodes), default=0.0)
        needed, there = sum(b.places * each[who] for who, b in booked.items()), found.get(kind, 0.0)
        if needed > there:
            asked = ", ".join(f"{b.places} {who} with {each[who]:g}" for who, b in booked.items() if each[who])
            parts = " (parts of one are possible)" if kind == "CPU" else ""
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


def _require_reachable(address: str) -> None:
    """Raise RunError where nothing listens at an address; Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10):
            return
    except (OSError, ValueError) as error:
        raise RunError(
            f"cluster.address = '{address}': {error}; start Ray there ('ray start --head'), or leave address out for one on this "
            "machine"
        ) from None


def _join(config: Config) -> None:
    """Join the recipe's cluster, or start one on this machine."""
    address = config.cluster.address
    # "local" begins one of its own, whatever else runs on this machine
    here: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    if address is not None and address != "auto":
        _require_reachable(address)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(
            f"cluster.address = '{address}': {one_line(str(error))[:200]}; start Ray there ('ray start --head'), or leave address "
            "out for one on this machine"
        ) from None
