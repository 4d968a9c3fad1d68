"""One process of the learner: its part of the student's weights, and of those teachers that give whole distributions.

All ranks are asked the same questions in the same order, each about its own part of the rollouts: a sharded network answers only
when all of them call it.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from opd.batch import Batch, pack
from opd.config import Config
from opd.distributed.node import enter
from opd.distributed.sharding import shard
from opd.errors import RunError, one_line
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.learner import LocalLearner
from opd.metrics import Metrics
from opd.models.lora import export, export_files
from opd.records import Rollout, ScoredRollout
from opd.roles import Limit, Teacher, TeacherFacts

Who = Literal["teachers", "followed", "itself", "alone"]
"""Which teachers are asked: the prompts' own, what training follows, the student itself, single models."""


@dataclass(frozen=True)
class RankFacts:
    """What the driver needs to know of the models that ranks hold."""

    teachers: TeacherFacts
    identities: Mapping[str, str]
    model_names: tuple[str, ...]
    student_context: Limit | None


@dataclass(frozen=True)
class Saved:
    """The plain values that go with a checkpoint's tensors, and what a rank sees of them in its folder, on which node."""

    values: Mapping[str, Any]
    node: str
    files: frozenset[str]


class Rank:
    """Builds the parts of a recipe as one process does, then spreads their weights; see `opd.distributed.group`."""

    def __init__(self, config: Config, rank: int, world: int, folder: str) -> None:
        self._config = config
        self._rank = rank
        self._world = world
        self._folder = folder
        self._built: LocalBackend | None = None
        self._learner: LocalLearner | None = None

    def build(self) -> RankFacts:
        """Load the models, into main memory whatever the device: only a part of them goes there."""
        enter(self._folder)
        here = self._config.compute.model_copy(update={"device": "cpu"})
        self._built = backend = build(self._config.model_copy(update={"compute": here}), remote=False)
        return RankFacts(
            teachers=backend.facts(),
            identities=backend.identities,
            model_names=tuple(backend.model_names()),
            student_context=backend.student_context,
        )

    @property
    def _backend(self) -> LocalBackend:
        assert self._built is not None, "build() comes first"
        return self._built

    def free_port(self) -> int:
        """A port of this machine at which ranks can meet."""
        with socket.socket() as found:
            found.bind(("", 0))
            return int(found.getsockname()[1])

    def packing_errors(self) -> dict[str, dict[str, float]]:
        """As of the backend; asked before the weights are spread."""
        assert self._learner is None
        return self._backend.packing_errors()

    def meet(self, address: str) -> None:
        """Join the other ranks, and spread every network over all of them."""
        device = "cuda" if torch.cuda.is_available() and self._config.compute.device in ("auto", "cuda") else "cpu"
        os.environ["LOCAL_RANK"] = "0"  # each sees its own device alone
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{address}", rank=self._rank, world_size=self._world)
        mesh = init_device_mesh(device, (self._world,))
        backend = self._backend
        student = backend.student
        student.network.activate(student.adapter, trainable=True)
        trainable = [name for name, p in student.network.model.named_parameters() if p.requires_grad]
        half = torch.bfloat16 if self._config.cluster.mixed_precision else None
        for network in dict.fromkeys([student.network, *(policy.network for policy in backend.policies.values())]):
            shard(network, mesh, trainable if network is student.network else [], compute_dtype=half)
        self._learner = backend.learner()

    @property
    def _trained(self) -> LocalLearner:
        assert self._learner is not None, "meet() comes first"
        return self._learner

    def score(
        self, rollouts: Sequence[Rollout], who: Who, names: Sequence[str], keep_hidden: bool
    ) -> list[ScoredRollout]:
        """The scores of this rank's rollouts."""
        backend = self._backend
        teachers: Teacher
        if who == "itself":
            teachers = backend.student_as_teacher()
        elif who == "alone":
            teachers = backend.models_as_teachers(names)
        else:
            teachers = backend.teachers(keep_hidden=keep_hidden, followed=who == "followed")
        return teachers.score(rollouts)

    def distances(self, scored: Sequence[ScoredRollout]) -> Metrics:
        if not scored:
            with torch.no_grad():
                self._trained.stand_by()
            return {}
        batch, _ = pack(scored, logprob_floor=self._config.objective.teacher_logprob_floor)
        return self._trained.distances(batch)

    def score_student(self, batch: Batch | None) -> dict[str, Tensor]:
        """The columns that scoring adds to this rank's part of a batch."""
        if batch is None:
            with torch.no_grad():
                self._trained.stand_by()
            return {}
        found = self._trained.score_student(batch)
        names = ("student_logprobs", "reverse_kl", "best_baseline")
        return {name: column for name in names if (column := getattr(found, name)) is not None}

    def forward_backward(self, batch: Batch | None, shared: float) -> Metrics:
        if batch is None:
            self._trained.stand_by()
            return {}
        return self._trained.forward_backward(batch, shared=shared)

    def optim_step(self) -> Metrics:
        return self._trained.optim_step()

    def files(self) -> tuple[bool, dict[str, np.ndarray]]:
        """That it is done, and the student as the files of its folder; from the first rank, the others only help."""
        found = {name: _whole(p) for name, p in self._trained.weights().items()}
        if self._rank:
            return True, {}
        student = self._backend.student
        try:
            files = export_files(student.network, student.adapter, found)
        except OSError as error:
            raise RunError(
                f"learner rank 0 on {socket.gethostname()} cannot write the student for its engines: {error}; free space for "
                "temporary files there (or set TMPDIR)"
            ) from None
        return True, {name: np.frombuffer(content, dtype=np.uint8) for name, content in files.items()}

    def export(self, folder: str) -> None:
        """Write the student; the first rank does, the others only help."""
        found = {name: _whole(p) for name, p in self._trained.weights().items()}
        if not self._rank:
            student = self._backend.student
            export(student.network, student.adapter, Path(folder), weights=found)

    def save(self, folder: str) -> Saved:
        """Write this rank's part of the weights and moments."""
        tensors, values = self._trained.state()
        writer = HuggingFaceStorageWriter(path=folder, save_distributed=True)
        with _one_line_of(folder, "write the checkpoint"):
            state_dict_saver.save(dict(tensors), storage_writer=writer)
        files = frozenset(path.name for path in Path(folder).glob("*.safetensors"))
        return Saved(values, socket.gethostname(), files)

    def load(self, folder: str, values: Mapping[str, Any]) -> None:
        """Read this rank's part of what any number of ranks wrote."""
        tensors = self._trained.blank_state(with_moments=bool(values["num_updates"]))
        with _one_line_of(folder, "read the checkpoint"):
            state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(path=folder))
        self._trained.load_state(tensors, values)


@contextmanager
def _one_line_of(folder: str, what: str) -> Iterator[None]:
    """Raise RunError where torch says at length that one rank could not."""
    try:
        yield
    except CheckpointException as error:  # no Exception: Ray would take it for the end of this process
        rank, (why, _) = next(iter(error.failures.items()))
        raise RunError(
            f"learner rank {rank} cannot {what} '{folder}': {one_line(str(why))[:300]}; check the disk there"
        ) from None


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts lie; every rank has to ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
