"""The learner in process: the student's trainable weights, their gradient and their optimizer."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.batch import Batch
from opd.config import ObjectiveConfig, OptimizerConfig
from opd.data.micro import MicroBatch, micro_batches
from opd.embedded.network import Network
from opd.errors import ScoreError
from opd.metrics import Max, Mean, Metrics, Sum, mean_of, merge
from opd.objectives.logprobs import token_logprobs
from opd.objectives.losses import exact_reverse_kl, ppo, reinforce
from opd.objectives.reduce import denominator


class EmbeddedLearner:
    """Minimises the exact reverse KL (type "exact"), a policy-gradient loss over `batch.advantages`, or their sum.

    Any split of a batch into packed passes gives the same gradient: denominators are those of the whole batch.
    """

    def __init__(
        self,
        network: Network,
        *,
        adapter: str | None,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        steps: int,
        teacher_heads: Mapping[str, Tensor],
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._network = network
        self._adapter = adapter
        self._objective = objective
        self._config = optimizer
        self._steps = steps
        self._heads = dict(teacher_heads)
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._num_updates = 0
        network.activate(adapter, trainable=True)
        self._parameters = {n: p for n, p in network.model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def forward_backward(self, batch: Batch) -> Metrics:
        """Add the gradient of the whole batch's loss, pass by pass."""
        self._network.activate(self._adapter, trainable=True)
        divisor = denominator(
            batch.padded(batch.loss_mask), self._objective.normalizer, constant=self._objective.constant
        )
        bounds = batch.offsets
        sequences = [batch.token_ids[a:b].numpy() for a, b in pairwise(bounds)]
        masks = [batch.loss_mask[a:b].numpy() for a, b in pairwise(bounds)]
        parts = [
            self._micro_step(batch, micro, divisor)
            for micro in micro_batches(sequences, masks, max_tokens=self._max_tokens)
        ]
        return merge(parts)

    def optim_step(self) -> Metrics:
        """Clip the gradient, step, advance the schedule, clear the gradient."""
        parameters = list(self._parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ScoreError(
                f"update {self._num_updates}: the gradient's norm is {float(norm)}; the weights were left as they are. "
                "Lower optimizer.lr, or use compute.dtype = 'float32'"
            )
        lr = learning_rate(self._config, self._num_updates, self._steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_updates += 1
        return {"optim/grad_norm/mean": mean_of([float(norm)]), "optim/lr/max": Max(lr)}

    def weights(self) -> Mapping[str, Tensor]:
        """The trainable weights by name, as they are in memory (not a copy)."""
        return self._parameters

    def state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        tensors = {f"student/{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value.detach()
        return tensors, {"num_updates": self._num_updates}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(tensors[f"student/{name}"])
        for name, p in self._parameters.items():
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"optimizer/{name}/{k}" in tensors]
            saved = {k: tensors[f"optimizer/{name}/{k}"].clone() for k in keys}
            # AdamW keeps its count on the CPU and the moments beside the parameter.
            self._optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in saved.items()}
        self._num_updates = int(values["num_updates"])

    def _micro_step(self, batch: Batch, micro: MicroBatch, divisor: float) -> Metrics:
        hidden = self._network.hidden_states(micro.tree)
        loss = hidden.sum() * 0.0
        metrics: Metrics = {"batch/packed_tokens/sum": Sum(len(micro.tree))}
        if self._objective.type == "exact":
            term, more = self._exact_term(batch, micro, hidden, divisor)
            loss, metrics = loss + term, metrics | more
        if batch.advantages is not None:
            term, more = self._policy_term(batch, micro, hidden, divisor)
            loss, metrics = loss + term, metrics | more
        if not torch.isfinite(loss):
            raise ScoreError(
                f"the loss is {float(loss.detach())} in a pass over rollouts {_names(batch, micro)}; the weights were left as they "
                "are. Check the student's and the teachers' weights (opd check)"
            )
        loss.backward()
        return metrics | {"loss/total/sum": Sum(float(loss.detach()))}

    def _exact_term(self, batch: Batch, micro: MicroBatch, hidden: Tensor, divisor: float) -> tuple[Tensor, Metrics]:
        """The reverse KL over the vocabulary at every visited state; a state that several samples share is done once."""
        assert batch.teacher_hidden is not None, "the exact objective needs teachers that give hidden states"
        teacher_hidden = np.concatenate([batch.teacher_hidden[m] for m in micro.members])
        teacher_of = np.array([batch.teachers[o] for o in micro.owners])
        loss = hidden.sum() * 0.0
        kl = np.zeros(len(micro.states))
        entropy, floored = np.zeros_like(kl), np.zeros_like(kl)
        for teacher in dict.fromkeys(teacher_of.tolist()):
            mine = np.flatnonzero(teacher_of == teacher)
            nodes, first, inverse, count = np.unique(
                micro.states[mine], return_index=True, return_inverse=True, return_counts=True
            )
            device = hidden.device
            term, *stats = exact_reverse_kl(
                hidden[torch.from_numpy(nodes).to(device)],
                self._head(),
                torch.from_numpy(teacher_hidden[mine[first]]).to(device, hidden.dtype),
                self._heads[teacher].to(device),
                torch.from_numpy(count / divisor).to(device, torch.float32),
                temperature=self._temperature,
                logprob_floor=self._objective.teacher_logprob_floor,
            )
            loss = loss + term
            for whole, part in zip((kl, entropy, floored), stats, strict=True):
                whole[mine] = part.double().cpu().numpy()[inverse]
        _refuse_nan(kl, batch, micro)
        metrics: Metrics = {
            "student/entropy/mean": mean_of(entropy),
            "teacher/floored_mass/mean": mean_of(floored),
        }
        return loss, metrics | _kl_metrics(kl, batch, micro)

    def _policy_term(self, batch: Batch, micro: MicroBatch, hidden: Tensor, divisor: float) -> tuple[Tensor, Metrics]:
        assert batch.advantages is not None
        device = hidden.device
        flat = torch.from_numpy(np.asarray(batch.offsets)[micro.owners] + micro.places)
        advantages = batch.advantages[flat].to(device)[None]
        targets = torch.from_numpy(micro.targets).to(device)
        states = hidden[torch.from_numpy(micro.states).to(device)]
        logprobs = token_logprobs(states, self._head(), targets, temperature=self._temperature)[None]
        mask = torch.ones_like(advantages, dtype=torch.bool)
        metrics: Metrics = {}
        old = batch.rollout_logprobs[flat].to(device)[None]
        if self._objective.loss == "ppo":
            low, high = self._objective.clip_low, self._objective.clip_high
            loss, clipped = ppo(logprobs, old, advantages, mask, low, high, divisor=divisor)
            metrics["loss/clipped/mean"] = Mean(float(clipped), mask.sum().item())
        else:
            loss = reinforce(logprobs, advantages, mask, divisor=divisor)
        metrics["student/nll/mean"] = Mean(-float(logprobs.detach().sum()), mask.sum().item())
        if self._objective.type != "exact":
            log_ratio = (batch.teacher_logprobs[flat] - batch.rollout_logprobs[flat]).double().numpy()
            _refuse_nan(log_ratio, batch, micro)
            metrics |= _kl_metrics(-log_ratio, batch, micro)
        return loss, metrics

    def _head(self) -> Tensor:
        """The student's head over the vocabulary that it shares with its teachers."""
        head = self._network.head_weight()
        sizes = [len(h) for h in self._heads.values()]
        return head[: min([len(head), *sizes])]


def learning_rate(config: OptimizerConfig, update: int, steps: int) -> float:
    """The rate of update 0, 1, ...: a linear warm-up to `lr`, then the schedule down to `final_lr_share * lr`.

    The last of `steps` updates still moves: the schedule would reach its end one update later.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (update - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)


def _kl_metrics(kl: np.ndarray, batch: Batch, micro: MicroBatch) -> Metrics:
    """Reverse KL per token and per sequence, over all and by teacher; `kl` [actions] in nats."""
    metrics: Metrics = {"kl/token/mean": mean_of(kl)}
    per_sequence = {m: float(kl[micro.owners == m].sum()) for m in micro.members}
    metrics["kl/sequence/mean"] = mean_of(per_sequence.values())
    for teacher in dict.fromkeys(batch.teachers[m] for m in micro.members):
        mine = np.array([batch.teachers[o] == teacher for o in micro.owners])
        metrics[f"kl/token/{teacher}/mean"] = mean_of(kl[mine])
    return metrics


def _refuse_nan(values: np.ndarray, batch: Batch, micro: MicroBatch) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        owner = int(micro.owners[index])
        raise ScoreError(
            f"rollout '{batch.rollout_ids[owner]}': the reverse KL at token {int(micro.places[index])} is "
            f"{values[index]}, expected a number; check the student and teacher '{batch.teachers[owner]}' (opd check)"
        )


def _names(batch: Batch, micro: MicroBatch) -> str:
    names = [f"'{batch.rollout_ids[m]}'" for m in micro.members]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
