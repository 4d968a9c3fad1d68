"""A network whose weights lie on several ranks: torch's FSDP2, layer by layer."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from opd.models.architecture import decoder_layers
from opd.models.network import Network


class ShardedWeights:
    """How a network speaks once `shard` has spread it (`opd.models.network.Shards`)."""

    def __init__(self, network: Network, mesh: DeviceMesh, trainable: list[nn.Parameter], *, tied: bool) -> None:
        self._network = network
        self._mesh = mesh
        self._trainable = trainable
        self._tied = tied

    def most(self, count: int) -> int:
        found = torch.tensor(count, device=self._mesh.device_type)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._mesh.get_group())
        return int(found)

    def head(self) -> Tensor:
        base = self._network.base
        module = base.get_input_embeddings() if self._tied else base.get_output_embeddings()
        weight = cast(Any, module).weight
        # every rank adds what its own tokens make of the gradient
        return weight.full_tensor(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight

    def keep_trainable(self) -> None:
        for parameter in self._trainable:
            parameter.requires_grad_(True)


def shard(network: Network, mesh: DeviceMesh, trainable: list[str], *, compute_dtype: torch.dtype | None) -> None:
    """Spread a network's layers over the ranks of a mesh, each rank keeping its part of every weight.

    trainable: the names of the parameters that train. Where none of them is outside the layers, what is outside (embeddings, head,
    last norm) stays whole on every rank: it is read at every token, and never changes. Gradients are sums over ranks, not means:
    losses are divided by what the whole batch counts. compute_dtype: in which the layers compute, where that is not their own.
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
