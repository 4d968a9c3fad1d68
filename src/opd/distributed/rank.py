"""One process of the learner (a rank): its shards of the student's weights and of those of teachers with whole distributions.

All ranks make the same calls in the same order, each with its own part of the rollouts: a sharded network runs only when all of
them call it (torch's FSDP2, layer by layer).
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from opd.batch import Batch, pack
from opd.config import Config
from opd.distributed.cluster import enter
from opd.errors import RunError, one_line
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.learner import LocalLearner
from opd.metrics import Metrics
from opd.models.architecture import decoder_layers
from opd.models.export import export, export_files
from opd.models.network import Network
from opd.records import Rollout, ScoredRollout
from opd.roles import Limit, PassGaps, Teacher, TeacherFacts

TeacherOf: TypeAlias = Callable[[LocalBackend], Teacher]
"""Which of a rank's teachers score, chosen from its backend."""


@dataclass(frozen=True)
class RankFacts:
    """Facts about the models that ranks hold, for the driver."""

    teachers: TeacherFacts
    identities: Mapping[str, str]
    model_names: tuple[str, ...]
    student_context: Limit | None


@dataclass(frozen=True)
class Saved:
    """The plain values of a checkpoint, the name of the rank's node, and the files of tensors that the rank sees in its folder."""

    values: Mapping[str, Any]
    node: str
    files: frozenset[str]


class Rank:
    """Builds the parts of a recipe as the local backend does, then shards their weights (`opd.distributed.backend.RankGroup`)."""

    _backend: LocalBackend  # from `build` on
    _learner: LocalLearner  # from `meet` on

    def __init__(self, config: Config, rank: int, world: int, folder: str) -> None:
        self._config = config
        self._rank = rank
        self._world = world
        self._folder = folder

    def build(self) -> RankFacts:
        """Load the models into main memory: only a shard of them goes to the device."""
        enter(self._folder)
        here = self._config.compute.model_copy(update={"device": "cpu"})
        self._backend = backend = build(self._config.model_copy(update={"compute": here}), remote=False)
        return RankFacts(
            teachers=backend.facts(),
            identities=backend.identities,
            model_names=tuple(backend.model_names()),
            student_context=backend.student_context,
        )

    def free_address(self) -> str:
        """HOST:PORT of this rank, free for the process group."""
        with socket.socket() as found:
            found.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

    def check_passes(self) -> dict[str, PassGaps]:
        return self._backend.check_passes()

    def meet(self, address: str) -> None:
        """Join the process group, and shard every network over its ranks."""
        device = "cuda" if torch.cuda.is_available() and self._config.compute.device in ("auto", "cuda") else "cpu"
        os.environ["LOCAL_RANK"] = "0"  # a rank sees only its own device
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

    def _stand_by(self, *, gradients: bool = False) -> dict[str, Any]:
        """Without rollouts, take part in the passes of the other ranks; returns no results."""
        with torch.set_grad_enabled(gradients):
            self._learner.stand_by()
        return {}

    def score(self, rollouts: Sequence[Rollout], teacher_of: TeacherOf) -> list[ScoredRollout]:
        return teacher_of(self._backend).score(rollouts)

    def distances(self, scored: Sequence[ScoredRollout]) -> Metrics:
        if not scored:
            return self._stand_by()
        batch, _ = pack(scored, logprob_floor=self._config.objective.teacher_logprob_floor)
        return self._learner.distances(batch)

    def score_student(self, batch: Batch | None) -> dict[str, Tensor]:
        """The columns that scoring adds to this rank's part of a batch."""
        if batch is None:
            return self._stand_by()
        found = self._learner.score_student(batch)
        names = ("student_logprobs", "reverse_kl", "best_baseline")
        return {name: column for name in names if (column := getattr(found, name)) is not None}

    def forward_backward(self, batch: Batch | None, shared: float) -> Metrics:
        if batch is None:
            return self._stand_by(gradients=True)
        return self._learner.forward_backward(batch, shared=shared)

    def optim_step(self) -> Metrics:
        return self._learner.optim_step()

    def files(self) -> tuple[bool, dict[str, np.ndarray]]:
        """True when it is done, and the files of the student's folder from the first rank; the other ranks only take part."""
        found = self._whole_weights()
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
        """Write the student from the first rank; the other ranks only take part."""
        found = self._whole_weights()
        if not self._rank:
            student = self._backend.student
            export(student.network, student.adapter, Path(folder), weights=found)

    def _whole_weights(self) -> dict[str, Tensor]:
        """The weights that go into the student's files, by name: those that train, or all; all ranks call this together."""
        student = self._backend.student
        weights = self._learner.weights() if student.adapter else dict(student.network.base.named_parameters())
        return {name: _full(weight) for name, weight in weights.items()}

    def save(self, folder: str) -> Saved:
        """Write this rank's shards of the weights and the optimizer's moments."""
        tensors, values = self._learner.state()
        writer = HuggingFaceStorageWriter(path=folder, save_distributed=True)
        with _one_line_of(folder, "write the checkpoint"):
            state_dict_saver.save(dict(tensors), storage_writer=writer)
        files = frozenset(path.name for path in Path(folder).glob("*.safetensors"))
        return Saved(values, socket.gethostname(), files)

    def load(self, folder: str, values: Mapping[str, Any]) -> None:
        """Read this rank's shards from a checkpoint of any number of ranks."""
        tensors = self._learner.blank_state(with_moments=bool(values["num_updates"]))
        with _one_line_of(folder, "read the checkpoint"):
            state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(path=folder))
        self._learner.load_state(tensors, values)


@contextmanager
def _one_line_of(folder: str, what: str) -> Iterator[None]:
    """Raise RunError for torch's long error about one rank."""
    try:
        yield
    except CheckpointException as error:  # a BaseException, which Ray would take for the end of this process
        rank, (why, _) = next(iter(error.failures.items()))
        raise RunError(
            f"learner rank {rank} cannot {what} '{folder}': {one_line(str(why))[:300]}; check the disk there"
        ) from None


def _full(tensor: Tensor) -> Tensor:
    """A whole tensor from its shards; all ranks call this together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


@dataclass(frozen=True, eq=False)
class ShardedWeights:
    """The weights of a sharded network (`opd.models.network.Shards`)."""

    network: Network
    mesh: DeviceMesh
    trainable: Sequence[nn.Parameter]
    tied: bool

    def most(self, count: int) -> int:
        found = torch.tensor(count, device=self.mesh.device_type)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return int(found)

    def head(self) -> Tensor:
        base = self.network.base
        module = base.get_input_embeddings() if self.tied else base.get_output_embeddings()
        weight = cast(Any, module).weight
        # the gradient is the sum over the ranks' tokens
        return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight

    def keep_trainable(self) -> None:
        for parameter in self.trainable:
            parameter.requires_grad_(True)


def shard(network: Network, mesh: DeviceMesh, trainable: list[str], *, compute_dtype: torch.dtype | None) -> None:
    """Shard a network's layers over the ranks of a mesh: each rank keeps a shard of every weight.

    trainable: the names of the parameters that train. Where all of them are in the layers, the weights outside (embeddings, head,
    last norm) stay whole on every rank: every token reads them, and they never change. Gradients are sums over ranks, not means,
    since losses are divided by counts of the whole batch. compute_dtype: the dtype in which layers compute, if not their own.
    """
    network.remember_fingerprint()
    backbone = cast(nn.Module, network.base.base_model)
    head, embeddings = cast(Any, network.base.get_output_embeddings()), cast(Any, network.base.get_input_embeddings())
    tied = head.weight is embeddings.weight
    layers = list(decoder_layers(network.base))
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = {p for p in network.base.parameters() if id(p) not in inside}
    names = set(trainable)
    moving = {id(p) for name, p in network.model.named_parameters() if name in names}
    whole = set() if any(id(p) in moving for p in outside) else outside
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for buffer in network.model.buffers():
        buffer.data = buffer.data.to(device)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Not resharded after the forward pass: the head reads the embeddings where the two are tied.
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=whole)
    if not tied and not whole:
        fully_shard(head, mesh=mesh, mp_policy=policy)
    elif tied and not whole:
        head.weight = embeddings.weight
    for module in network.model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    parameters = dict(network.model.named_parameters())
    network.shards = ShardedWeights(network, mesh, [parameters[name] for name in trainable], tied=tied)
