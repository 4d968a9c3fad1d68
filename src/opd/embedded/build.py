"""From a configuration to the embedded parts: which weights are loaded once, and who speaks through them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.config import AlignmentConfig, ComputeConfig, Config, SftConfig
from opd.embedded.foreign import ForeignVoice
from opd.embedded.learner import EmbeddedLearner
from opd.embedded.loading import add_adapter, add_student_adapter, load_network, save_adapter_facts
from opd.embedded.network import Network
from opd.embedded.sampler import EmbeddedSampler, episode_player
from opd.embedded.teacher import EmbeddedTeachers, Part, Target, Voice
from opd.errors import ModelError
from opd.objectives.vocabulary import CommonCells, TeacherHead
from opd.roles import Sampler
from opd.served.facts import connect
from opd.served.sampler import ServedSampler
from opd.served.teacher import ServedTeacher
from opd.served.wire import Endpoint, Wire
from opd.tasks.episodes import MakeEnvironment, one_turn
from opd.text.cells import common_cells
from opd.text.reading import Reader
from opd.text.spelling import Writer
from opd.text.tokenizer import difference

_INITIAL = "student"  # objective.reference: the student as it was before the first step
_INITIAL_VOICE = "the initial student"


@dataclass(frozen=True)
class Alone:
    """Samples from a teacher, and the tokenizer of what it samples."""

    sampler: Sampler
    tokenizer: Any


@dataclass(frozen=True)
class Studio:
    """The student, its teachers, and what they share.

    voices: every single model that scores, by name. targets: what each teacher key of a prompt stands for; in training
    `followed` takes its place, which has the reference of an extrapolation too. foreign: the teachers that have another
    tokenizer, and served: those behind a server, which are in neither. vocab_size: the number of ids that the student's head and
    those of its tokenizer have.
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
            player=episode_player(voice.network, self.config.episodes, self.make_environment),
        )

    def teachers(self, *, keep_hidden: bool, targets: Mapping[str, Target] | None = None) -> EmbeddedTeachers:
        """Teachers that score as `targets` say; the prompts' own by default."""
        own = targets is None or targets is self.followed
        return EmbeddedTeachers(
            self.targets if targets is None else targets,
            vocab_size=self.vocab_size,
            temperature=self.config.temperature,
            max_tokens=self.config.compute.max_tokens,
            keep_hidden=keep_hidden,
            foreign=self.foreign if own else None,
            served=self.served if own else None,
        )

    def alone(self, teacher: str) -> "Alone | None":
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
            teacher.endpoint,
            teacher.wire,
            temperature=self.config.temperature,
            max_new_tokens=self.config.sampling.max_new_tokens,
            context=teacher.context,
            player=episode_player(self.student.network, self.config.episodes, self.make_environment),
        )

    def contexts(self) -> dict[str, int | None]:
        """The longest sequence that each target can score, None where nothing limits it."""
        limits = {n: [p.voice.network.max_context for p in target] for n, target in self.followed.items()}
        limits |= {n: [teacher.context] for n, teacher in self.served.items()}
        return {n: min((x for x in found if x is not None), default=None) for n, found in limits.items()}

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
                common = CommonCells(torch.from_numpy(cells.student), torch.from_numpy(cells.teacher), cells.num)
                found[name] = TeacherHead(voice.network.head_weight(), common)
        return found


def prepare(compute: ComputeConfig) -> None:
    """Process-wide settings of torch."""
    if compute.threads:
        torch.set_num_threads(compute.threads)


def build(config: Config, make_environment: MakeEnvironment = one_turn) -> Studio:
    """Load the student and every teacher, each set of weights once.

    Adapter teachers live on the student's own base while that base stays as it is (`trainable = "lora"`); when the whole
    student is trained they share one frozen copy. Raises ModelError when a teacher does not fit.
    """
    prepare(config.compute)
    network = load_network(config.student, config.compute)
    lora = config.trainable == "lora"
    if lora:
        add_student_adapter(network, config.lora, seed=config.seed)
    loaded: dict[str, Network] = {config.student: network} if lora else {}
    voices: dict[str, Voice] = {}
    for index, (name, teacher) in enumerate(config.teachers.items()):
        if teacher.weights is not None or teacher.url is not None:
            continue
        source = teacher.model or config.student
        if source not in loaded:
            loaded[source] = load_network(source, config.compute)
        home = loaded[source]
        # A name of our own: peft refuses some, and a teacher may be called "student".
        adapter = f"teacher{index}" if teacher.adapter is not None else None
        if teacher.adapter is not None and adapter is not None:
            add_adapter(home, teacher.adapter, teacher=name, name=adapter)
        voices[name] = Voice(home, adapter)
    if config.objective.reference == _INITIAL:
        if config.student not in loaded:
            loaded[config.student] = load_network(config.student, config.compute)
        # A fresh adapter changes nothing before the first step: its base is the student as it was.
        if config.lora.start is not None:
            add_adapter(loaded[config.student], config.lora.start, teacher=_INITIAL_VOICE, name="initial")
        voices[_INITIAL_VOICE] = Voice(loaded[config.student], None if config.lora.start is None else "initial")
    foreign = _foreign(config, network, voices)
    own = dict.fromkeys([network, *(voice.network for name, voice in voices.items() if name not in foreign)])
    vocab_size = min(n.vocab_size for n in own)
    needed = max(network.tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise ModelError(
            f"the tokenizer of '{config.student}' has {needed} ids, the smallest output head {vocab_size} rows"
        )
    for net in own:
        net.vocab_size = vocab_size
    identities = {name: _identity(config, name, voice) for name, voice in voices.items()}
    served = _connect(config, network)
    identities |= {name: f"served model '{teacher.endpoint.model}'" for name, teacher in served.items()}
    apart = foreign.keys() | served.keys()
    targets = {name: _target(config, name, voices) for name in config.teachers if name not in apart}
    followed = {name: _extrapolated(config, target, voices) for name, target in targets.items()}
    return Studio(
        config, Voice(network, "student" if lora else None), voices, targets, followed, foreign, served, identities,
        vocab_size, make_environment,
    )  # fmt: skip


def _connect(config: Config, student: Network) -> dict[str, ServedTeacher]:
    """The teachers behind servers, all asked who they are."""
    given = {name: teacher for name, teacher in config.teachers.items() if teacher.url is not None}
    if not given:
        return {}
    wire = Wire(config.served)
    found: dict[str, ServedTeacher] = {}
    try:
        for name, teacher in given.items():
            endpoint = Endpoint(f"teacher '{name}'", teacher.urls, teacher.served_model or "", teacher.api_key_env)
            found[name] = connect(name, endpoint, wire, student.tokenizer)
    finally:
        if len(found) < len(given):
            wire.close()
    return found


def _target(config: Config, name: str, voices: Mapping[str, Voice]) -> Target:
    """What a teacher key stands for: one voice, or several whose weights sum to one."""
    weights = config.teachers[name].weights or {name: 1.0}
    total = sum(weights.values())
    return tuple(Part(part, voices[part], weight / total) for part, weight in weights.items())


def _extrapolated(config: Config, target: Target, voices: Mapping[str, Voice]) -> Target:
    """lambda log q + (1 - lambda) log pi_ref: with lambda above 1 away from the reference, past the teacher."""
    share, reference = config.objective.extrapolation, config.objective.reference
    if reference is None:
        return target
    name = _INITIAL_VOICE if reference == _INITIAL else reference
    scaled = tuple(replace(part, weight=share * part.weight) for part in target)
    return (*scaled, Part(name, voices[name], 1.0 - share))


def build_student(config: SftConfig) -> Voice:
    """A student to fine-tune, without teachers."""
    prepare(config.compute)
    network = load_network(config.student, config.compute)
    if config.trainable == "lora":
        add_student_adapter(network, config.lora, seed=config.seed)
    return Voice(network, "student" if config.trainable == "lora" else None)


def export(voice: Voice, folder: Path, *, dtype: str = "float32") -> None:
    """Write the student as a standard PEFT adapter, or as a whole Hugging Face folder with its tokenizer."""
    network = voice.network
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if voice.adapter is None:
            network.base.to(getattr(torch, dtype)).save_pretrained(staging)  # type: ignore[call-arg]  # a decorator hides its signature
            network.tokenizer.save_pretrained(staging)
        else:
            assert isinstance(network.model, PeftModel)
            # peft puts an adapter of this name into a folder of this name
            network.model.save_pretrained(str(staging), selected_adapters=[voice.adapter], save_embedding_layers=False)
            for file in (staging / voice.adapter).iterdir():
                file.rename(staging / file.name)
            (staging / voice.adapter).rmdir()
            (staging / "README.md").unlink(missing_ok=True)  # an empty template of a model card
            _sort_lists(staging / "adapter_config.json")
            save_adapter_facts(staging, network)
        _cast(staging, getattr(torch, dtype))
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors writes files for their owner alone
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sort_lists(path: Path) -> None:
    """Write a JSON file's lists in order: peft keeps them as sets, whose order changes from process to process."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in plain.items()}
    path.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")


def _cast(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "adapter_model.safetensors"
    if path.exists():
        tensors: dict[str, Tensor] = {name: t.to(dtype).contiguous() for name, t in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def _foreign(config: Config, student: Network, voices: Mapping[str, Voice]) -> dict[str, ForeignVoice]:
    """The teachers that have another tokenizer. Raises ModelError where the recipe asks for what only one tokenizer gives."""
    found: dict[str, ForeignVoice] = {}
    writer = None
    for name, voice in voices.items():
        network = voice.network
        gap = None if network is student else difference(student.tokenizer, network.tokenizer)
        if gap is None:
            continue
        _require_text_alone(config, name, f"'{network.source}' has another tokenizer than '{student.source}' ({gap})")
        writer = writer or Writer(
            student.tokenizer, generation_config=student.base.generation_config, vocab_size=student.vocab_size
        )
        reader = Reader(
            network.tokenizer,
            name=name,
            generation_config=network.base.generation_config,
            vocab_size=network.vocab_size,
        )
        mask = config.alignment.non_canonical == "mask"
        _require_a_row_each(network)
        floor = config.objective.teacher_logprob_floor
        cells = None
        if config.objective.type == "support":
            tags = reader.counterparts(writer.table)
            cells = common_cells(writer.table, writer.end_ids, reader.table, reader.end_ids, tags)
        found[name] = ForeignVoice(
            network, voice.adapter, reader, writer, floor,
            mask_non_canonical=mask,
            cells=cells,
            own_syntax=config.episodes.tool_syntax if config.alignment.tool_calls == "own_syntax" else None,
        )  # fmt: skip
    if not found and config.alignment != AlignmentConfig():
        raise ModelError("[alignment] is for teachers with another tokenizer, and this recipe has none; drop it")
    return found


def _require_a_row_each(network: Network) -> None:
    needed = max(network.tokenizer.get_vocab().values()) + 1
    if needed > network.vocab_size:
        raise ModelError(
            f"the tokenizer of '{network.source}' has {needed} ids, its output head {network.vocab_size} rows"
        )


def _require_text_alone(config: Config, name: str, what: str) -> None:
    """A teacher of another tokenizer says how probable a text is, not which of the student's tokens comes next."""
    objective = config.objective
    if objective.tail_residual:
        raise ModelError(
            f"teacher '{name}': {what}, and objective.tail_residual needs one vocabulary's sampled token in the tail; drop it"
        )
    if objective.type == "support" and config.mask.format_errors != "off":
        raise ModelError(
            f"teacher '{name}': {what}, so part of type = 'support' is a sampled log ratio without a baseline, and "
            "mask.format_errors would reward errors; leave it at 'off', or write objective.type = 'immediate' with "
            "baseline = 'leave_one_out'"
        )
    if objective.needs_distributions and objective.type != "support":
        raise ModelError(
            f"teacher '{name}': {what}, and the objective needs its distribution over the student's tokens (type = "
            f"'{objective.type}', baseline = '{objective.baseline}'); write objective.type = 'immediate' or 'to_go' with "
            "baseline = 'none' or 'leave_one_out', which follow the text in chunks, or 'support', which also compares what the two "
            "vocabularies have in common"
        )
    if objective.reference == name or objective.extrapolation != 1.0:
        raise ModelError(f"teacher '{name}': {what}, so objective.extrapolation has no common tokens; leave it at 1.0")
    for mixture, teacher in config.teachers.items():
        if name in (teacher.weights or ()):
            raise ModelError(
                f"teacher '{name}': {what}, so it cannot be a part of teachers.{mixture}.weights, which mixes distributions "
                "token by token"
            )


def _identity(config: Config, name: str, voice: Voice) -> str:
    """What makes this teacher this teacher: its base's weights and its adapter's file."""
    adapter = config.lora.start if name == _INITIAL_VOICE else config.teachers[name].adapter
    base = voice.network.fingerprint()
    if adapter is None:
        return base
    digest = hashlib.sha256()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        path = Path(adapter) / file
        if path.exists():
            digest.update(path.read_bytes())
    return f"{base}+{digest.hexdigest()[:32]}"
