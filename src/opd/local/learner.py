"""The learner in process: the student's trainable weights, their gradient and their optimizer."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from opd.batch import Batch
from opd.checkpoint import write_tensors
from opd.config import ObjectiveConfig, OptimizerConfig
from opd.errors import RunError, ScoreError
from opd.local.loss_terms import (
    Pass,
    agreement_metrics,
    integrated_term,
    policy_term,
    student_scores,
    vocabulary_settings,
)
from opd.metrics import Max, Metrics, Sum, mean_of, merge
from opd.models.network import Network
from opd.objective import divisor
from opd.objectives.vocabulary import TeacherHead
from opd.records import Rollout

_TENSORS = "tensors.safetensors"


class LocalLearner:
    """Minimises a divergence over the vocabulary, a policy-gradient loss over `batch.advantages`, or their sum.

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
        heads: Mapping[str, TeacherHead],
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._network = network
        self._adapter = adapter
        self._objective = objective
        self._config = optimizer
        self._steps = steps
        self._heads = dict(heads)
        self._how = vocabulary_settings(objective, temperature=temperature, softcap=network.softcap)
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

    @torch.no_grad()
    def score_student(self, batch: Batch) -> Batch:
        """The batch with `student_logprobs` and, where teachers gave distributions, `reverse_kl` and the baseline b*."""
        return self._scored(batch, lambda forward: {})[0]

    def _scored(self, batch: Batch, measure: Callable[[Pass], Metrics]) -> tuple[Batch, Metrics]:
        """(`score_student` of a batch, the metrics that `measure` finds in its passes)."""
        score_weighted = self._objective.baseline == "score_weighted"
        columns: dict[str, Tensor] = {}
        found: list[Metrics] = []
        for forward in self.passes(batch):
            for name, column in student_scores(forward, self._how, score_weighted=score_weighted).items():
                columns.setdefault(name, column.new_zeros(len(batch.token_ids)))[forward.flat] = column
            found.append(measure(forward))
        return replace(batch, **columns), merge(found)

    @torch.no_grad()
    def distances(self, batch: Batch) -> Metrics:
        """kl/token/TEACHER/mean and student/topk_overlap/TEACHER/mean of each teacher, and more."""
        scored, found = self._scored(batch, lambda forward: agreement_metrics(forward, self._how))
        kl = scored.reverse_kl
        assert kl is not None
        owners = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)
        compared = batch.scored if batch.compared is None else batch.scored & batch.compared
        for teacher in dict.fromkeys(batch.teachers):
            mine = torch.tensor([name == teacher for name in batch.teachers])[owners] & compared
            found[f"kl/token/{teacher}/mean"] = mean_of(kl[mine].tolist())
        return found

    def stand_by(self) -> None:
        """Without a batch, join the passes that the other ranks of a sharded network make."""
        self._network.activate(self._adapter, trainable=True)
        for _ in self._network.synchronised_passes([], [], max_tokens=self._max_tokens):
            raise AssertionError("unexpected micro-batch")

    def forward_backward(self, batch: Batch, *, shared: float | None = None) -> Metrics:
        """Add the gradient of the whole batch's loss, pass by pass.

        shared: the divisor of the larger batch, where this one is a part of it.
        """
        shared = divisor(self._objective, batch) if shared is None else shared
        found = []
        for forward in self.passes(batch, batch.used):
            loss, metrics = self.loss_of(forward, divisor=shared)
            loss.backward()
            found.append(metrics | {"loss/total/sum": Sum(float(loss.detach()))})
        return merge(found)

    def passes(self, batch: Batch, actions: Tensor | None = None) -> Iterator[Pass]:
        """The student's packed forward passes over the batch, in order; with gradients unless they are switched off.

        actions [tokens] bool: the actions to predict, by default `loss_mask`.
        """
        self._network.activate(self._adapter, trainable=True)
        sequences = [batch.token_ids[a:b].numpy() for a, b in pairwise(batch.offsets)]
        mask = batch.loss_mask if actions is None else actions
        masks = [mask[a:b].numpy() for a, b in pairwise(batch.offsets)]
        for micro in self._network.synchronised_passes(sequences, masks, max_tokens=self._max_tokens):
            hidden = self._network.hidden_states(micro.tree)
            yield Pass(batch, micro, hidden, self._head(), self._heads, self._network.softcap)

    def loss_of(self, forward: Pass, *, divisor: float) -> tuple[Tensor, Metrics]:
        """The part of the batch's loss that falls on one pass, divided by the whole batch's `divisor`, and its metrics."""
        loss = forward.hidden.sum() * 0.0
        metrics: Metrics = {"batch/packed_tokens/sum": Sum(len(forward.micro.tree))}
        if self._objective.integrated:
            term, more = integrated_term(forward, self._how, divisor=divisor, coef=self._objective.coef)
            loss, metrics = loss + term, metrics | more
        if forward.batch.advantages is not None:
            term, more = policy_term(forward, self._objective, temperature=self._temperature, divisor=divisor)
            loss, metrics = loss + term, metrics | more
        if not torch.isfinite(loss):
            raise ScoreError(
                f"the loss is {float(loss.detach())} in a pass over rollouts {_names(forward)}; the weights were left as they are. "
                "Check the student's and the teachers' weights (opd check)"
            )
        return loss, metrics

    def optim_step(self) -> Metrics:
        """Clip the gradient, step, advance the schedule, clear the gradient."""
        parameters = list(self._parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm)
        if not torch.isfinite(norm):
            raise ScoreError(
                f"update {self._num_updates}: the gradient's norm is {float(norm)}; the weights were left as they are. "
                "Begin a new run with a lower optimizer.lr, or with compute.dtype = 'float32'"
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

    def save(self, folder: Path) -> Mapping[str, Any]:
        """Write the trainable weights and the optimizer's moments into a folder; returns the plain values that go with them."""
        tensors, values = self.state()
        write_tensors(tensors, folder / _TENSORS)
        return values

    def load(self, folder: Path, values: Mapping[str, Any]) -> None:
        """Continue from the folder and the values of `save`."""
        self.load_state(load_file(folder / _TENSORS), values)

    def state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """(tensors, plain values) from which `load_state` continues bit for bit."""
        tensors = {f"student/{name}": p.detach() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            for key, value in self._optimizer.state.get(p, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value.detach()
        return tensors, {"num_updates": self._num_updates}

    def blank_state(self, *, with_moments: bool) -> dict[str, Tensor]:
        """Tensors of the shapes of `state`, to be read into; without moments as before the first update."""
        tensors = {f"student/{name}": torch.empty_like(p.detach()) for name, p in self._parameters.items()}
        for name, p in self._parameters.items() if with_moments else ():
            tensors[f"optimizer/{name}/step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"optimizer/{name}/{key}"] = torch.empty_like(p.detach())
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises RunError where the tensors do not fit the weights that train."""
        _require_same_weights({f"student/{name}": p for name, p in self._parameters.items()}, tensors)
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.copy_(tensors[f"student/{name}"])
        for name, p in self._parameters.items():
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"optimizer/{name}/{k}" in tensors]
            saved = {k: tensors[f"optimizer/{name}/{k}"].clone() for k in keys}
            # AdamW keeps its count on the CPU and the moments beside the parameter.
            self._optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in saved.items()}
        self._num_updates = int(values["num_updates"])

    def _head(self) -> Tensor:
        """The student's head over the vocabulary that it shares with its teachers."""
        head = self._network.head_weight()
        sizes = [len(h.rows) for h in self._heads.values() if h.cells is None]
        return head[: min([len(head), *sizes])]


def _require_same_weights(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise RunError where a checkpoint holds other weights than those that train, by name or by shape."""
    extra = {name for name in found if name.startswith("student/")} - wanted.keys()
    odd = sorted(extra | {n for n, p in wanted.items() if n not in found or found[n].shape != p.shape})
    if odd:
        raise RunError(
            f"the checkpoint belongs to another student: {len(odd)} weights differ in name or shape from the {len(wanted)} "
            f"trainable weights of this student, for example '{odd[0].removeprefix('student/')}'; resume with the same model and "
            "the same versions of transformers and peft as before"
        )


def read_weights(folder: Path, network: Network, adapter: str | None) -> None:
    """Give a student its trained weights from a checkpoint, which one process or the ranks of a cluster wrote."""
    network.activate(adapter, trainable=True)
    wanted = {f"student/{n}": p.detach() for n, p in network.model.named_parameters() if p.requires_grad}
    reader = HuggingFaceStorageReader(path=str(folder))  # reads a plain safetensors file as well as shards
    sizes = {name: getattr(saved, "size", ()) for name, saved in reader.read_metadata().state_dict_metadata.items()}
    _require_same_weights(wanted, {name: torch.empty(size, device="meta") for name, size in sizes.items()})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is meant
        state_dict_loader.load(dict(wanted), storage_reader=reader, no_dist=True)


def imitation_batch(rollouts: Sequence[Rollout]) -> Batch:
    """A batch for supervised fine-tuning on rollouts. All student turns in them are actions, whoever wrote them.

    Their advantages are 1, so that the policy-gradient loss is the negative log-likelihood.
    """
    mask = torch.from_numpy(np.concatenate([r.loss_mask for r in rollouts]))
    zeros = torch.zeros(len(mask))
    return Batch(
        rollout_ids=tuple(r.id for r in rollouts),
        teachers=tuple(r.prompt.teacher for r in rollouts),
        lengths=torch.tensor([len(r.token_ids) for r in rollouts]),
        group_ids=torch.arange(len(rollouts)),
        episodes=torch.arange(len(rollouts)),
        rewards=torch.full((len(rollouts),), float("nan")),
        token_ids=torch.from_numpy(np.concatenate([r.token_ids for r in rollouts]).astype(np.int64)),
        turns=torch.zeros(len(mask), dtype=torch.long),
        flagged=torch.zeros_like(mask),
        loss_mask=mask,
        distill_mask=mask,
        reward_mask=torch.zeros_like(mask),
        rollout_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=mask.float(),
    )


def learning_rate(config: OptimizerConfig, update: int, steps: int) -> float:
    """The rate of update 0, 1, ...: a linear warm-up to `lr`, then the schedule down to `final_lr_fraction * lr`.

    The last of `steps` updates still moves: the schedule would reach its end one update later.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (update - config.warmup_steps) / max(1, steps - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * left)


def _names(forward: Pass) -> str:
    names = [f"'{forward.batch.rollout_ids[m]}'" for m in forward.micro.members]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
