"""The student, its teachers and what they share, in one process (`opd.roles.Studio`)."""

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
from opd.local.cross_tokenizer import ForeignVoice
from opd.local.export import export
from opd.local.learner import EmbeddedLearner
from opd.local.sampler import EmbeddedSampler, episode_player
from opd.local.teacher import EmbeddedTeachers, Part, Target, Voice
from opd.metrics import Metrics, values
from opd.models.network import Network
from opd.models.packing_check import packed_gaps
from opd.objectives.vocabulary import CommonCells, TeacherHead
from opd.records import ScoredRollout
from opd.remote.sampler import ServedSampler
from opd.remote.teacher import ServedTeacher, WithServed, templates_of
from opd.roles import Alone, Limit, OtherTemplate, Teacher, TeacherFacts, smallest
from opd.text.teacher_prompt import same_template
from opd.text.template import clock_of
from opd.text.turn_end import turn_end


def distances_of(metrics: Metrics, teachers: Sequence[str]) -> dict[str, tuple[float, float]]:
    """(reverse KL in nats per token, top-k overlap) of each teacher, from what the learner found."""
    found = values(metrics)
    return {t: (found[f"kl/token/{t}/mean"], found[f"student/topk_overlap/{t}/mean"]) for t in dict.fromkeys(teachers)}


def packing_of(voice: Voice, *, trains: bool) -> dict[str, float]:
    """How far packed passes of one model, adapter included, are from its plain ones; trains: its gradients too."""
    voice.network.activate(voice.adapter, trainable=trains)
    return packed_gaps(voice.network, gradients=trains)


@dataclass(frozen=True)
class EmbeddedStudio:
    """The student, its teachers, and what they share, in one process (`opd.roles.Studio`).

    voices: every single model that scores, by name. targets: what each teacher key of a prompt stands for; in training
    `followed` takes its place, which has the reference of an extrapolation too. foreign: the teachers that have another
    tokenizer, and served: those behind a server, which are in neither. vocab_size: the number of ids that the student's head and
    those of its tokenizer have. templates: the teachers in process whose chat template renders otherwise than the student's.
    """

    config: Config
    student: Voice
    voices: Mapping[str, Voice]
    targets: Mapping[str, Target]
    followed: Mapping[str, Target]
    foreign: Mapping[str, ForeignVoice]
    served: Mapping[str, ServedTeacher]
    identities: Mapping[str, str]
    vocab_size: int
    make_environment: MakeEnvironment
    templates: Mapping[str, OtherTemplate]

    def close(self) -> None:
        """Drop the connections to servers."""
        for teacher in self.served.values():
            teacher.wire.close()

    def sampler(self, voice: Voice | None = None) -> EmbeddedSampler:
        """A sampler of the student, or of a teacher when its voice is given."""
        voice = voice or self.student
        return EmbeddedSampler(
            voice.network,
            adapter=voice.adapter,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            max_rows=self.config.sampling.max_rows,
            max_tokens=self.config.compute.max_tokens,
            player=episode_player(self.home(voice), self.config.episodes, self.make_environment),
        )

    def home(self, voice: Voice) -> Network:
        """The network whose chat template shows this voice its prompts: its own, or the student's where the recipe says so."""
        foreign = any(f.network is voice.network and f.adapter == voice.adapter for f in self.foreign.values())
        own = foreign or voice.prompts is not None or same_template(self.tokenizer, voice.network.tokenizer)
        return voice.network if own else self.student.network

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
            foreign={name: voice.network.vocab_size for name, voice in self.foreign.items()},
            without_distributions=frozenset(self.foreign.keys() | self.served.keys()),
            unknown_tokenizers={name: teacher.unknown for name, teacher in self.served.items()},
            notes=[note for network in self._networks() for note in network.notes],
            templates={**self.templates, **templates_of(self.served)},
            turn_ends=self._turn_ends(),
            reads_clock=any(clock_of(network.tokenizer) for network in self._networks()),
        )

    def _networks(self) -> list[Network]:
        """Every set of weights, the student's first."""
        return list(dict.fromkeys([self.student.network, *(v.network for v in self.voices.values())]))

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
        for name, voice in self.voices.items():
            who = f"teacher '{name}'" if name in self.config.teachers else name
            spoken.setdefault((voice.network, voice.adapter), who)
        found = {}
        for (network, adapter), who in spoken.items():
            trains = (network, adapter) == (self.student.network, self.student.adapter)
            found[who] = packing_of(Voice(network, adapter), trains=trains)
        return found

    def itself(self) -> EmbeddedTeachers:
        """The student as the teacher of every prompt."""
        target = (Part("student", self.student),)
        return self.scoring(dict.fromkeys(self.config.teachers, target), keep_hidden=False)

    def each_alone(self, names: Collection[str]) -> EmbeddedTeachers:
        """Models that score by themselves, whether a prompt names them or not."""
        return self.scoring({n: (Part(n, self.voices[n]),) for n in names}, keep_hidden=False)

    def single_models(self) -> Collection[str]:
        """Every model that scores the student's tokens in process."""
        return [name for name in self.voices if name not in self.foreign]

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
        here = self.scoring(targets, keep_hidden=keep_hidden, foreign=self.foreign)
        return WithServed(here, self.served) if self.served else here

    def scoring(
        self,
        targets: Mapping[str, Target],
        *,
        keep_hidden: bool,
        foreign: Mapping[str, ForeignVoice] | None = None,
    ) -> EmbeddedTeachers:
        """Teachers in process that score as `targets` say."""
        return EmbeddedTeachers(
            targets,
            vocab_size=self.vocab_size,
            temperature=self.config.temperature,
            max_tokens=self.config.compute.max_tokens,
            keep_hidden=keep_hidden,
            foreign=foreign,
        )

    def alone(self, teacher: str) -> Alone | None:
        """What answers as a teacher does by itself; None for several at once, who are nobody."""
        if teacher in self.voices:
            voice = self.voices[teacher]
            return Alone(self.sampler(voice), voice.network.tokenizer)
        if teacher in self.served:
            return Alone(self._served_sampler(self.served[teacher]), self.student.network.tokenizer)
        return None

    def _served_sampler(self, teacher: ServedTeacher) -> ServedSampler:
        """A sampler of a served teacher, which is shown prompts as the student is."""
        return ServedSampler(
            teacher.model,
            teacher.wire,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context=None,
            player=episode_player(self.student.network, self.config.episodes, self.make_environment),
            form=teacher.form,
        )

    def _contexts(self) -> dict[str, Limit | None]:
        """The longest sequence that each target can score, None where nothing limits it."""
        limits = {n: smallest(p.voice.network.limit for p in target) for n, target in self.followed.items()}
        served = {n: None if teacher.context is None else Limit(teacher.context) for n, teacher in self.served.items()}
        return limits | served

    def learner(self) -> EmbeddedLearner:
        return EmbeddedLearner(
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
        """Of every voice that can give distributions."""
        found = {
            n: TeacherHead(voice.network.head_weight()) for n, voice in self.voices.items() if n not in self.foreign
        }
        for name, voice in self.foreign.items():
            if (cells := voice.cells) is not None:
                ours, theirs = cells.student[: self.vocab_size], cells.teacher[: voice.network.vocab_size]
                common = CommonCells(torch.from_numpy(ours), torch.from_numpy(theirs), cells.num)
                found[name] = TeacherHead(voice.network.head_weight(), common)
        return found
