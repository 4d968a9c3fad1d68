"""The student, its teachers and what they share, in one process (`opd.roles.Backend`)."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.batch import pack
from opd.config import Config
from opd.episodes.player import MakeEnvironment
from opd.errors import ModelError
from opd.local.cross_tokenizer import CrossTokenizerPolicy
from opd.local.export import export
from opd.local.learner import LocalLearner
from opd.local.sampler import LocalSampler, episode_player
from opd.local.teacher import LocalTeachers, Part, Policy, Target
from opd.metrics import Metrics, values
from opd.models.network import Network
from opd.models.packing_check import packed_gaps
from opd.objectives.vocabulary import SharedVocabularyIds, TeacherHead
from opd.records import ScoredRollout
from opd.remote.sampler import RemoteSampler
from opd.remote.teacher import LocalAndRemoteTeachers, RemoteTeacher, templates_of
from opd.roles import Alone, Limit, OtherTemplate, Teacher, TeacherFacts, smallest
from opd.text.teacher_prompt import same_template
from opd.text.template import clock_of
from opd.text.turn_end import turn_end


def distances_of(metrics: Metrics, teachers: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(reverse KL in nats per token, top-k overlap) of each teacher, from what the learner found."""
    found = values(metrics)
    return {t: (found[f"kl/token/{t}/mean"], found[f"student/topk_overlap/{t}/mean"]) for t in dict.fromkeys(teachers)}


def packing_of(policy: Policy, *, trains: bool) -> dict[str, float]:
    """How far packed passes of one model, adapter included, are from its plain ones; trains: its gradients too."""
    policy.network.activate(policy.adapter, trainable=trains)
    return packed_gaps(policy.network, gradients=trains)


@dataclass(frozen=True)
class LocalBackend:
    """The student, its teachers, and what they share, in one process (`opd.roles.Backend`).

    policies: every single model that scores, by name. targets: what each teacher key of a prompt stands for; in training
    `followed` takes its place, which has the reference of an extrapolation too. foreign: the teachers that have another
    tokenizer, and served: those behind a server, which are in neither. vocab_size: the number of ids that the student's head and
    those of its tokenizer have. templates: the teachers in process whose chat template renders otherwise than the student's.
    """

    config: Config
    student: Policy
    policies: Mapping[str, Policy]
    targets: Mapping[str, Target]
    followed: Mapping[str, Target]
    cross_tokenizer: Mapping[str, CrossTokenizerPolicy]
    remote: Mapping[str, RemoteTeacher]
    identities: Mapping[str, str]
    vocab_size: int
    make_environment: MakeEnvironment
    templates: Mapping[str, OtherTemplate]

    def close(self) -> None:
        """Drop the connections to servers."""
        for teacher in self.remote.values():
            teacher.client.close()

    def sampler(self, policy: Policy | None = None) -> LocalSampler:
        """A sampler of the student, or of a teacher when its policy is given."""
        policy = policy or self.student
        return LocalSampler(
            policy.network,
            adapter=policy.adapter,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            max_rows=self.config.sampling.max_rows,
            max_tokens=self.config.compute.max_tokens,
            player=episode_player(self.home(policy), self.config.episodes, self.make_environment),
        )

    def home(self, policy: Policy) -> Network:
        """The network whose chat template shows this policy its prompts: its own, or the student's where the recipe says so."""
        cross_tokenizer = any(
            f.network is policy.network and f.adapter == policy.adapter for f in self.cross_tokenizer.values()
        )
        own = cross_tokenizer or policy.prompts is not None or same_template(self.tokenizer, policy.network.tokenizer)
        return policy.network if own else self.student.network

    @property
    def tokenizer(self) -> Any:
        """The student's."""
        return self.student.network.tokenizer

    @property
    def student_context(self) -> Limit | None:
        """The longest sequence that the student takes."""
        return self.student.network.limit

    def facts(self) -> TeacherFacts:
        """What the teachers are, to those who check them."""
        return TeacherFacts(
            contexts=self._contexts(),
            vocab_size=self.vocab_size,
            cross_tokenizer={name: policy.network.vocab_size for name, policy in self.cross_tokenizer.items()},
            without_distributions=frozenset(self.cross_tokenizer.keys() | self.remote.keys()),
            unknown_tokenizers={name: teacher.unknown for name, teacher in self.remote.items()},
            notes=[note for network in self._networks() for note in network.notes],
            templates={**self.templates, **templates_of(self.remote)},
            turn_ends=self._turn_ends(),
            reads_clock=any(clock_of(network.tokenizer) for network in self._networks()),
        )

    def _networks(self) -> list[Network]:
        """Every set of weights, the student's first."""
        return list(dict.fromkeys([self.student.network, *(v.network for v in self.policies.values())]))

    def _turn_ends(self) -> dict[str, str]:
        """Models with a chat template, tokenizer and generation config that disagree on the end of a turn, and how."""
        found = {}
        for network in self._networks():
            with contextlib.suppress(ModelError):  # of a template that is not used
                end = turn_end(network.tokenizer, network.base.generation_config, who=network.source)
                if end.note:
                    found[network.source] = end.note
        return found

    def packing_errors(self) -> dict[str, dict[str, float]]:
        """Of the student and of each model that scores: how far its packed passes are from its plain ones."""
        spoken = {(self.student.network, self.student.adapter): "the student"}
        for name, policy in self.policies.items():
            who = f"teacher '{name}'" if name in self.config.teachers else name
            spoken.setdefault((policy.network, policy.adapter), who)
        found = {}
        for (network, adapter), who in spoken.items():
            trains = (network, adapter) == (self.student.network, self.student.adapter)
            found[who] = packing_of(Policy(network, adapter), trains=trains)
        return found

    def student_as_teacher(self) -> LocalTeachers:
        """The student as the teacher of every prompt."""
        target = (Part("student", self.student),)
        return self.scoring(dict.fromkeys(self.config.teachers, target), keep_hidden=False)

    def per_model(self, names: Collection[str]) -> LocalTeachers:
        """Models that score by themselves, whether a prompt names them or not."""
        return self.scoring({n: (Part(n, self.policies[n]),) for n in names}, keep_hidden=False)

    def single_models(self) -> Collection[str]:
        """Every model that scores the student's tokens in process."""
        return [name for name in self.policies if name not in self.cross_tokenizer]

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        """Of each teacher with distributions: the student's reverse KL in nats per token, and their top-k overlap."""
        batch, _ = pack(scored, logprob_floor=self.config.objective.teacher_logprob_floor)
        return distances_of(self.learner().distances(batch), batch.teachers)

    def export(self, folder: Path) -> None:
        """Write the student where a run keeps it."""
        export(self.student, folder)

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        """The prompts' own; followed: what training follows, which an extrapolation moves past them."""
        targets = self.followed if followed else self.targets
        here = self.scoring(targets, keep_hidden=keep_hidden, cross_tokenizer=self.cross_tokenizer)
        return LocalAndRemoteTeachers(here, self.remote) if self.remote else here

    def scoring(
        self,
        targets: Mapping[str, Target],
        *,
        keep_hidden: bool,
        cross_tokenizer: Mapping[str, CrossTokenizerPolicy] | None = None,
    ) -> LocalTeachers:
        """Teachers in process that score as `targets` say."""
        return LocalTeachers(
            targets,
            vocab_size=self.vocab_size,
            temperature=self.config.temperature,
            max_tokens=self.config.compute.max_tokens,
            keep_hidden=keep_hidden,
            cross_tokenizer=cross_tokenizer,
        )

    def alone(self, teacher: str) -> Alone | None:
        """What answers as a teacher does by itself; None for several at once, who are nobody."""
        if teacher in self.policies:
            policy = self.policies[teacher]
            return Alone(self.sampler(policy), policy.network.tokenizer)
        if teacher in self.remote:
            return Alone(self._remote_sampler(self.remote[teacher]), self.student.network.tokenizer)
        return None

    def _remote_sampler(self, teacher: RemoteTeacher) -> RemoteSampler:
        """A sampler of a served teacher, which is shown prompts as the student is."""
        return RemoteSampler(
            teacher.deployment,
            teacher.client,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context=None,
            player=episode_player(self.student.network, self.config.episodes, self.make_environment),
            protocol=teacher.protocol,
        )

    def _contexts(self) -> dict[str, Limit | None]:
        """The longest sequence that each target can score, None where nothing limits it."""
        limits = {n: smallest(p.policy.network.limit for p in target) for n, target in self.followed.items()}
        remote = {n: None if teacher.context is None else Limit(teacher.context) for n, teacher in self.remote.items()}
        return limits | remote

    def learner(self) -> LocalLearner:
        return LocalLearner(
            self.student.network,
            adapter=self.student.adapter,
            objective=self.config.objective,
            optimizer=self.config.optimizer,
            steps=self.config.steps * self.config.objective.epochs,
            heads=self._heads(),
            temperature=self.config.temperature,
            max_tokens=self.config.compute.max_tokens,
        )

    def _heads(self) -> dict[str, TeacherHead]:
        """Of every policy that can give distributions."""
        found = {
            n: TeacherHead(policy.network.head_weight())
            for n, policy in self.policies.items()
            if n not in self.cross_tokenizer
        }
        for name, policy in self.cross_tokenizer.items():
            if (cells := policy.cells) is not None:
                ours, theirs = cells.student[: self.vocab_size], cells.teacher[: policy.network.vocab_size]
                common = SharedVocabularyIds(torch.from_numpy(ours), torch.from_numpy(theirs), cells.num)
                found[name] = TeacherHead(policy.network.head_weight(), common)
        return found
