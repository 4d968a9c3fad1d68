"""The parts of a run on a Ray cluster (`opd.roles.Studio`): ranks that learn, engines that sample, teachers here and there."""

import logging
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from opd.batch import consecutive
from opd.config import Config
from opd.distributed.engines import Engines
from opd.distributed.group import RankGroup, RankLearner, RankTeachers
from opd.embedded.build import connect_all
from opd.embedded.loading import LoadedTokenizer, gguf_folder, load_tokenizer
from opd.embedded.studio import distances_of
from opd.errors import RunError, one_line
from opd.metrics import merge
from opd.records import Prompt, ScoredRollout
from opd.roles import Alone, Sampler, Teacher, TeacherFacts
from opd.served.sampler import ServedSampler
from opd.served.teacher import ServedTeacher, WithServed
from opd.served.wire import Endpoint, Wire
from opd.tasks.episodes import EpisodePlayer, MakeEnvironment
from opd.text.chat import Chat
from opd.text.tokenizer import end_token_ids


def build(config: Config, make_environment: MakeEnvironment) -> "DistributedStudio":
    """Start the ranks and the engines on the cluster that the recipe names, and connect the teachers behind servers."""
    if Path(config.student).suffix == ".gguf":
        config = config.model_copy(update={"student": str(gguf_folder(Path(config.student)))})
    loaded = load_tokenizer(config.student)
    _join(config)
    try:
        _require_room(config)
        served = connect_all(config, loaded.tokenizer)
        try:
            return DistributedStudio(config, make_environment, loaded, served)
        except BaseException:
            for teacher in served.values():
                teacher.wire.close()
            raise
    except BaseException:
        ray.shutdown()
        raise


class DistributedStudio:
    """The student on several ranks, and engines that sample from it as it is."""

    def __init__(
        self,
        config: Config,
        make_environment: MakeEnvironment,
        loaded: LoadedTokenizer,
        served: Mapping[str, ServedTeacher],
    ) -> None:
        self._config = config
        self._served = served
        self.tokenizer: Any = loaded.tokenizer
        ends = end_token_ids(loaded.tokenizer, loaded.generation_config)
        self._player = EpisodePlayer(
            Chat(loaded.tokenizer), config.episodes, end_ids=ends, make_environment=make_environment
        )
        self._wire = Wire(config.served)
        self._engines = Engines(config)  # they start while the ranks load
        self._group = RankGroup(config)
        self._learner = RankLearner(self._group, config)
        self._moving = threading.Lock()  # units of a step ask at once
        self._given = -1  # how often the student had changed when the engines got it

    @property
    def student_context(self) -> int | None:
        """The longest sequence that the student takes."""
        return self._group.facts.student_context

    @property
    def identities(self) -> Mapping[str, str]:
        """What must not change under a run."""
        served = {f"teacher '{n}'": f"served model '{t.endpoint.model}'" for n, t in self._served.items()}
        return {**self._group.facts.identities, **served}

    def facts(self) -> TeacherFacts:
        """What the teachers are."""
        inside = self._group.facts.teachers
        return replace(
            inside,
            contexts={**inside.contexts, **{n: t.context for n, t in self._served.items()}},
            without_distributions=inside.without_distributions | self._served.keys(),
            unknown_tokenizers={n: t.unknown for n, t in self._served.items()},
        )

    def sampler(self) -> Sampler:
        """Of the student as it is, at its engines."""
        return self._served_sampler(self._locate, self._wire)

    def _served_sampler(self, locate: Any, wire: Wire, context: int | None = None) -> ServedSampler:
        limits = [c for c in (context, self.student_context) if c is not None]
        return ServedSampler(
            locate,
            wire,
            temperature=self._config.temperature,
            max_new_tokens=self._config.sampling.max_new_tokens,
            context=min(limits, default=None),
            player=self._player,
        )

    def _locate(self) -> Endpoint:
        """Where the student is, as it is now."""
        with self._moving:
            if self._given != self._learner.changes:
                self._given = self._learner.changes
                self._engines.load(self._learner.weights(), version=self._given)
                return self._engines.where
            return self._engines.endpoint()

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        """The prompts' own; followed: what training follows."""
        inside = RankTeachers(self._group, "followed" if followed else "teachers", keep_hidden=keep_hidden)
        return WithServed(inside, self._served) if self._served else inside

    def itself(self) -> Teacher:
        """The student as the teacher of every prompt."""
        return RankTeachers(self._group, "itself", keep_hidden=False)

    def each_alone(self, names: Collection[str]) -> Teacher:
        """Single models."""
        return RankTeachers(self._group, "alone", keep_hidden=False, names=list(names))

    def single_models(self) -> Collection[str]:
        """Every model that scores the student's tokens at the ranks."""
        return self._group.facts.single_models

    def alone(self, teacher: str) -> Alone | None:
        """A teacher behind a server can be asked for answers; what ranks hold cannot."""
        if teacher not in self._served:
            return None
        found = self._served[teacher]
        return Alone(self._served_sampler(lambda: found.endpoint, found.wire, found.context), self.tokenizer)

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

    def packing_errors(self, probes: Sequence[Prompt]) -> Mapping[str, float]:
        """Of each set of weights, before they are spread."""
        return self._group.packing_errors(probes)

    def export(self, folder: Path) -> None:
        """Write the student."""
        self._group.all("export", str(folder.resolve()))

    def close(self) -> None:
        """End all that was started, and leave the cluster."""
        self._wire.close()
        for teacher in self._served.values():
            teacher.wire.close()
        self._engines.close()
        self._group.close()
        ray.shutdown()


def _require_room(config: Config) -> None:
    """Raise RunError where the cluster has less than the recipe asks for: Ray would wait for it without a word."""
    c = config.cluster
    found = ray.cluster_resources()
    for kind, rank, engine in (
        ("CPU", c.cpus_per_rank, c.cpus_per_engine),
        ("GPU", c.gpus_per_rank, c.gpus_per_engine),
    ):
        needed, there = c.learner_ranks * rank + c.engines * engine, found.get(kind, 0.0)
        if needed > there:
            asked = f"{c.learner_ranks} ranks with {rank:g} and {c.engines} engines with {engine:g}"
            raise RunError(
                f"the cluster has {there:g} {kind}s, and {asked} need {needed:g}; lower cluster.learner_ranks, cluster.engines or "
                f"their {kind.lower()}s, or add nodes"
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
