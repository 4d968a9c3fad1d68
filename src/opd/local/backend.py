"""The student, its teachers and what they share, in one process (`opd.roles.Backend`)."""

import contextlib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from opd.batch import pack
from opd.config import Config
from opd.episodes.player import MakeEnvironment
from opd.errors import ModelError
from opd.local.learner import LocalLearner
from opd.local.sampler import LocalSampler, episode_player
from opd.local.teacher import CrossTokenizerPolicy, LocalTeachers, Part, Policy, Target
from opd.metrics import Metrics, values
from opd.models.export import export
from opd.models.network import Network
from opd.models.packing_check import settled_passes
from opd.objectives.vocabulary import SharedVocabularyIds, TeacherHead
from opd.records import ScoredRollout
from opd.remote.teacher import LocalAndRemoteTeachers, RemoteTeacher, identities_of, with_servers
from opd.roles import (
    INITIAL_STUDENT,
    Limit,
    OtherTemplate,
    OwnReading,
    PassGaps,
    StandaloneSampler,
    Teacher,
    TeacherFacts,
    smallest,
)
from opd.text.teacher_prompt import different_renderings, same_template
from opd.text.template import clock_of, turn_end, world_of
from opd.text.tokenizer import fingerprint


def distances_of(metrics: Metrics, teachers: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(reverse KL in nats per token, top-k overlap) of each teacher, from the learner's metrics."""
    found = values(metrics)
    return {t: (found[f"kl/token/{t}/mean"], found[f"student/topk_overlap/{t}/mean"]) for t in dict.fromkeys(teachers)}


def check_passes_of(policy: Policy, *, trains: bool) -> PassGaps:
    """How far the passes of one model, adapter included, are from its own; trains: its gradients too."""
    policy.network.activate(policy.adapter, trainable=trains)
    return settled_passes(policy.network, gradients=trains)


@dataclass(frozen=True)
class LocalBackend:
    """The student, its teachers, and what they share, in one process (`opd.roles.Backend`).

    policies: every model that scores, by name. targets: the target of each teacher; training takes `followed` instead, with the
    reference of an extrapolation. remote: teachers behind servers, which have neither.
    """

    config: Config
    student: Policy
    policies: Mapping[str, Policy | CrossTokenizerPolicy]
    targets: Mapping[str, Target]
    followed: Mapping[str, Target]
    remote: Mapping[str, RemoteTeacher]
    make_environment: MakeEnvironment

    def close(self) -> None:
        """Drop the connections to servers."""
        for teacher in self.remote.values():
            teacher.client.close()

    @property
    def cross_tokenizer(self) -> dict[str, CrossTokenizerPolicy]:
        """The policies with another tokenizer than the student's."""
        return {name: p for name, p in self.policies.items() if isinstance(p, CrossTokenizerPolicy)}

    @property
    def same_tokenizer(self) -> dict[str, Policy]:
        """The policies with the student's tokenizer."""
        return {name: p for name, p in self.policies.items() if isinstance(p, Policy)}

    def sampler(self, policy: Policy | CrossTokenizerPolicy | None = None) -> LocalSampler:
        """A sampler of the student, or of a teacher when its policy is given."""
        policy = policy or self.student
        return LocalSampler(
            policy.network,
            adapter=policy.adapter,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            max_rows=self.config.sampling.max_rows,
            max_tokens=self.config.compute.max_tokens,
            player=episode_player(self.chat_network(policy), self.config.episodes, self.make_environment),
        )

    def chat_network(self, policy: Policy | CrossTokenizerPolicy) -> Network:
        """The network whose chat template renders a policy's prompts: its own, or the student's where the recipe says so."""
        own = policy.prompts is not None or same_template(self.tokenizer, policy.network.tokenizer)
        return policy.network if own else self.student.network

    @property
    def vocab_size(self) -> int:
        """The number of ids that the heads of the student and of the teachers with its tokenizer share."""
        return self.student.network.vocab_size

    @property
    def tokenizer(self) -> Any:
        return self.student.network.tokenizer

    @property
    def student_context(self) -> Limit | None:
        return self.student.network.limit

    @property
    def identities(self) -> Mapping[str, str]:
        return self._identities

    @cached_property
    def _identities(self) -> dict[str, str]:
        named = {f"teacher '{name}'": self._identity(name, policy) for name, policy in self.policies.items()}
        named |= identities_of(self.remote)
        named["the student's tokenizer"] = fingerprint(self.tokenizer)
        for name, policy in self.policies.items():
            if policy.prompts is not None:
                tokenizer = policy.network.tokenizer
                named[f"the tokenizer of teacher '{name}'"] = fingerprint(tokenizer) + world_of(tokenizer)
        if self.config.trainable == "lora":
            named["the student's base"] = self.student.network.fingerprint()
        return named

    def _identity(self, name: str, policy: Policy | CrossTokenizerPolicy) -> str:
        """A hash of a teacher: of its base's weights and of its adapter's files."""
        adapter = self.config.lora.start if name == INITIAL_STUDENT else self.config.teachers[name].adapter
        base = policy.network.fingerprint()
        if adapter is None:
            return base
        digest = hashlib.sha256()
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            path = Path(adapter) / file
            if path.exists():
                digest.update(path.read_bytes())
        return f"{base}+{digest.hexdigest()[:32]}"

    def _templates(self) -> dict[str, OtherTemplate]:
        """The teachers with the student's vocabulary and another chat template."""
        found = {}
        for name, policy in self.same_tokenizer.items():
            apart = different_renderings(self.tokenizer, policy.network.tokenizer)
            if apart is not None and name in self.config.teachers:
                none = "" if policy.network.tokenizer.chat_template else "it has none"
                found[name] = OtherTemplate(policy.prompts is not None, apart.student, apart.teacher, unknown=none)
        return found

    def facts(self) -> TeacherFacts:
        facts = TeacherFacts(
            contexts=self._contexts(),
            vocab_size=self.vocab_size,
            cross_tokenizer={name: policy.network.vocab_size for name, policy in self.cross_tokenizer.items()},
            without_distributions=frozenset(self.cross_tokenizer),
            unknown_tokenizers={},
            notes=[note for network in self._networks() for note in network.notes],
            templates=self._templates(),
            turn_ends=self._turn_ends(),
            reads_clock=any(clock_of(network.tokenizer) for network in self._networks()),
            own_readings=self._own_readings(),
        )
        return with_servers(facts, self.remote)

    def _networks(self) -> list[Network]:
        """Every set of weights, the student's first."""
        return list(dict.fromkeys([self.student.network, *(policy.network for policy in self.policies.values())]))

    def _turn_ends(self) -> dict[str, str]:
        """Models with a chat template, tokenizer and generation config that disagree on the end of a turn, and how."""
        found = {}
        for network in self._networks():
            with contextlib.suppress(ModelError):  # of a template that is not used
                end = turn_end(network.tokenizer, network.base.generation_config, who=network.source)
                if end.note:
                    found[network.source] = end.note
        return found

    def models(self) -> dict[tuple[Network, str | None], str]:
        """Every model in process, adapter included, with the first name that it has for the user."""
        names: dict[tuple[Network, str | None], str] = {(self.student.network, self.student.adapter): "the student"}
        for name, policy in self.policies.items():
            who = f"teacher '{name}'" if name in self.config.teachers else name
            names.setdefault((policy.network, policy.adapter), who)
        return names

    def check_passes(self) -> dict[str, PassGaps]:
        names = self.models()
        found: dict[str, PassGaps] = {}
        for _ in range(2):  # where one of several adapters needs padded passes, the others on its base make them too
            for (network, adapter), who in names.items():
                if who not in found or found[who].padded_because != network.padded_because:
                    trains = (network, adapter) == (self.student.network, self.student.adapter)
                    found[who] = check_passes_of(Policy(network, adapter), trains=trains)
        return found

    def student_as_teacher(self) -> LocalTeachers:
        target = (Part("student", self.student),)
        return self.local_teachers(dict.fromkeys(self.config.teachers, target), keep_hidden=False)

    def models_as_teachers(self, names: Collection[str]) -> LocalTeachers:
        return self.local_teachers({n: (Part(n, self.same_tokenizer[n]),) for n in names}, keep_hidden=False)

    def model_names(self) -> Collection[str]:
        return list(self.same_tokenizer)

    def distances(self, scored: Sequence[ScoredRollout]) -> Mapping[str, tuple[float, float]]:
        batch, _ = pack(scored, logprob_floor=self.config.objective.teacher_logprob_floor)
        return distances_of(self.learner().distances(batch), batch.teachers)

    def export(self, folder: Path) -> None:
        export(self.student.network, self.student.adapter, folder)

    def teachers(self, *, keep_hidden: bool, followed: bool = False) -> Teacher:
        targets = self.followed if followed else self.targets
        here = self.local_teachers(targets, keep_hidden=keep_hidden)
        return LocalAndRemoteTeachers(here, self.remote) if self.remote else here

    def local_teachers(self, targets: Mapping[str, Target], *, keep_hidden: bool) -> LocalTeachers:
        """Teachers in process that score as `targets` say."""
        return LocalTeachers(
            targets,
            temperature=self.config.temperature,
            max_tokens=self.config.compute.max_tokens,
            keep_hidden=keep_hidden,
        )

    def standalone_sampler(self, teacher: str) -> StandaloneSampler | None:
        """A sampler of one teacher by itself; None for a mixture of teachers, which cannot generate."""
        if teacher in self.policies:
            policy = self.policies[teacher]
            return StandaloneSampler(self.sampler(policy), policy.network.tokenizer)
        if teacher in self.remote:
            # it reads prompts in the student's chat template
            player = episode_player(self.student.network, self.config.episodes, self.make_environment)
            return StandaloneSampler(self.remote[teacher].sampler(self.config, player), self.tokenizer)
        return None

    def _contexts(self) -> dict[str, Limit | None]:
        """The longest sequence that each target can score in the student's tokens; None where nothing limits it."""
        return {
            n: smallest(p.policy.network.limit for p in target if p.policy.prompts is None)
            for n, target in self.followed.items()
            if not isinstance(target, CrossTokenizerPolicy)
        }

    def _own_readings(self) -> dict[str, list[OwnReading]]:
        """The models with a chat template or tokens of their own. The length of a response in another tokenizer is unknown before
        it is sampled; it has at least its end."""
        found: dict[str, list[OwnReading]] = {}
        for name, target in self.followed.items():
            if isinstance(target, CrossTokenizerPolicy):
                policies, room = [target], 1
            else:
                policies, room = [part.policy for part in target], self.config.sampling.max_new_tokens
            for policy in policies:
                if policy.prompts is not None and policy.network.limit is not None:
                    reading = OwnReading(policy.prompts.length, policy.network.limit, room)
                    found.setdefault(name, []).append(reading)
        return found

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
        """The output head of every policy that can give distributions."""
        networks = {name: policy.network for name, policy in self.same_tokenizer.items()}
        found = {name: TeacherHead(own.head_weight(), softcap=own.softcap) for name, own in networks.items()}
        for name, policy in self.cross_tokenizer.items():
            if (shared := policy.shared_vocabulary) is not None:
                ours, theirs = shared.student[: self.vocab_size], shared.teacher[: policy.network.vocab_size]
                ids = SharedVocabularyIds(torch.from_numpy(ours), torch.from_numpy(theirs), shared.num)
                found[name] = TeacherHead(policy.network.head_weight(), ids, policy.network.softcap)
        return found
