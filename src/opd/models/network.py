"""A causal language model, the LoRA adapters that live on it, and the forward pass that all parts use."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from opd.config import Quantization
from opd.errors import ModelError
from opd.models import padded
from opd.models.architecture import backbone, decoder_layers, length_limit, require_backbone, text_parameters
from opd.models.attention import Plan, TreePlan, use_own_attention, use_plans
from opd.models.head import head_shape
from opd.models.kv_cache import KVCache
from opd.models.linear import few_rows, merged
from opd.models.packing import MicroBatch, TokenTree, micro_batches, pack_trees
from opd.models.padded import PaddedCache
from opd.objectives.tiles import soft_capped
from opd.roles import Limit
from opd.text.tokenizer import described_token

# of four dimensions, so that transformers makes none: the plan replaces it
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
[(_, _ONE_TOKEN)] = pack_trees([[0]], max_tokens=1)


class Shards(Protocol):
    """The weights of a network that are sharded over several ranks."""

    def most(self, count: int) -> int:
        """The largest count of all ranks; a collective call."""
        ...

    def head(self) -> Tensor:
        """The whole output head [vocab, hidden], with its gradient where it trains."""
        ...

    def keep_trainable(self) -> None:
        """Let the trainable weights require gradients again, after an adapter was activated."""
        ...


class Network:
    """One set of weights in memory. Adapters are switched, not copied: N adapters cost one base.

    The student and every teacher that is an adapter on the student's base share one Network; `activate` chooses the adapter
    (None: the bare model).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, source: str, *, notes: Sequence[str] = ()) -> None:
        """notes: lines about how it was loaded that a user should know."""
        self.model: PreTrainedModel | PeftModel = model
        self.base = model
        self.tokenizer = tokenizer
        self.source = source
        self.notes = list(notes)
        self.quantization: Quantization | None = None  # with which it was loaded; None: as its files are
        self.shards: Shards | None = None
        self._fingerprint: str | None = None
        require_backbone(model, source=source)
        self.vocab_size = len(self._whole_head())
        # `hidden_states` and the cached passes multiply by the factor, so that everyone else sees a plain product
        self._scale, self.softcap = head_shape(model)
        self._has_bias = getattr(model.get_output_embeddings(), "bias", None) is not None
        embeddings = cast(Any, model.get_input_embeddings())
        # Nothing is padded here, and the pad token may be the one that ends a turn: torch would leave out its gradient.
        embeddings.padding_idx = None
        self.num_embeddings = int(embeddings.weight.shape[0])
        # Why passes have one padded row for each sequence (`opd.models.padded`); None: they are packed.
        self.padded_because = use_plans(model)
        self._active: tuple[str | None, bool] | None = None

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def limit(self) -> Limit | None:
        """The longest sequence that the forward pass is right for, and why; None where the model's config sets no limit."""
        return length_limit(self.base.config)

    @property
    def max_context(self) -> int | None:
        """The tokens of `limit`."""
        return None if self.limit is None else self.limit.tokens

    def pad(self, because: str) -> None:
        """Make padded passes from now on; because: the cause, for the user."""
        self.padded_because = because
        use_own_attention(self.base)

    def head_weight(self) -> Tensor:
        """The output head over the first `vocab_size` ids, [vocab, hidden]; the rows behind are padding, never used. A bias is its
        last column, for the last of the `hidden_states`, which is 1."""
        return self._whole_head()[: self.vocab_size]

    def logits(self, hidden: Tensor) -> Tensor:
        """The head's logits [rows, vocab] of a few hidden states [rows, hidden], without gradients."""
        logits = few_rows(self.head_weight(), None, hidden, together=False)
        return logits if self.softcap is None else soft_capped(logits, self.softcap)[0]

    @property
    def _tuner(self) -> Any:
        """PEFT's tuner, which switches adapters, once there are any."""
        return cast(PeftModel, self.model).base_model

    @property
    def _backbone(self) -> torch.nn.Module:
        return backbone(self.base)

    def _whole_head(self) -> Tensor:
        if self.shards is not None:
            if self._has_bias:
                raise ModelError(
                    f"model '{self.source}': its output head has a bias, which several ranks cannot share yet"
                )
            return self.shards.head()
        head = self.base.get_output_embeddings()
        if isinstance(head, torch.nn.Linear) and not head.weight.is_floating_point():
            raise ModelError(f"model '{self.source}': its output head is quantised, and objectives read it whole")
        if not isinstance(head, torch.nn.Linear):
            raise ModelError(
                f"model '{self.source}': needs a plain linear output head, got {type(head).__name__}; adapters that touch the head "
                "(target_modules, modules_to_save) are not supported"
            )
        return head.weight if head.bias is None else torch.cat([head.weight, head.bias[:, None]], dim=1)

    def for_head(self, hidden: Tensor) -> Tensor:
        """Final hidden states as `head_weight` takes them: times the head's factor, and a 1 for its bias."""
        hidden = hidden if self._scale == 1.0 else hidden * self._scale
        if not self._has_bias:
            return hidden
        return torch.cat([hidden, hidden.new_full((*hidden.shape[:-1], 1), self._scale)], dim=-1)

    def activate(self, adapter: str | None, *, trainable: bool = False) -> None:
        """Compute with this adapter from now on; trainable: whether its weights collect gradients."""
        if self._active == (adapter, trainable):
            return
        if isinstance(self.model, PeftModel):
            if adapter is None:
                self._tuner.disable_adapter_layers()
            else:
                if self._active is None or self._active[0] is None:
                    self._tuner.enable_adapter_layers()
                self._tuner.set_adapter(adapter, inference_mode=not trainable)
        else:
            assert adapter is None, f"{self.source} has no adapters, asked for {adapter!r}"
            for parameter in text_parameters(self.base):
                parameter.requires_grad_(trainable)
        if self.shards is not None:
            self.shards.keep_trainable()
        self._active = (adapter, trainable)

    def checkpoint_layers(self) -> None:
        """Activation checkpointing: from now on keep only the input of each layer for the gradient, and compute the layer again."""
        for layer in decoder_layers(self.base):
            # FSDP's hooks stay around the call of the module
            layer.forward = partial(checkpointed, layer.forward)

    def remember_fingerprint(self) -> None:
        """Keep the fingerprint: weights on several ranks cannot be read by one."""
        self._fingerprint = self.fingerprint()

    def synchronised_passes(
        self, sequences: Sequence[np.ndarray], loss_masks: Sequence[np.ndarray], *, max_tokens: int
    ) -> Iterator[MicroBatch]:
        """The passes over the sequences with an action, one after the other (`micro_batches`). All ranks of a sharded network make
        the same number: a rank with fewer micro-batches adds passes over one token, with a gradient of zero unless gradients are
        switched off."""
        padded = self.padded_because is not None
        micros = micro_batches(sequences, loss_masks, max_tokens=max_tokens, padded=padded)
        # asked before the first pass: each pass is a collective call too
        most = len(micros) if self.shards is None else self.shards.most(len(micros))
        yield from micros
        for _ in range(most - len(micros)):
            hidden = self.hidden_states(_ONE_TOKEN)
            if torch.is_grad_enabled() and hidden.requires_grad:
                ((hidden.sum() + self.head_weight()[0].sum()) * 0.0).backward()

    def hidden_states(self, tree: TokenTree) -> Tensor:
        """The final hidden states [nodes, hidden] of a packed tree, those that the head reads."""
        self._require_rows(tree.token_ids)
        if self.padded_because is not None:
            return self.for_head(padded.hidden_states(self._backbone, tree, self.device))
        plan = TreePlan(tree, device=self.device)
        return self._run(tree.token_ids[None], tree.positions[None], plan)[0]

    def _run(self, token_ids: np.ndarray, positions: np.ndarray | Tensor, plan: Plan) -> Tensor:
        """One pass over tokens [batch, tokens] that see what `plan` says: hidden states [batch, tokens, hidden]."""
        device = self.device
        output = self._backbone(
            input_ids=torch.from_numpy(token_ids).to(device),
            position_ids=torch.as_tensor(positions).to(device),
            attention_mask=_NO_MASK.to(device),
            use_cache=False,
            plan=plan,
        )
        return self.for_head(output.last_hidden_state)

    def _require_rows(self, token_ids: np.ndarray) -> None:
        """Raise ModelError for a token that the embeddings have no row for."""
        if token_ids.size and int(token_ids.max()) >= self.num_embeddings:
            raise ModelError(
                f"model '{self.source}': a sequence has token {described_token(self.tokenizer, int(token_ids.max()))}, and the "
                f"embeddings have {self.num_embeddings} rows; take it out of the text"
            )

    @contextmanager
    def merged(self, adapter: str | None) -> Iterator[None]:
        """Compute with this adapter in passes of few tokens without gradients: copies of the weights have its update added."""
        self.activate(adapter)
        with merged(self._backbone):
            yield

    def new_cache(self) -> KVCache | PaddedCache:
        """An empty cache for `prefill` and `decode`."""
        return KVCache(self.device) if self.padded_because is None else PaddedCache(self.device)

    def prefill(self, sequences: Sequence[Sequence[int]], cache: KVCache | PaddedCache, *, max_tokens: int) -> Tensor:
        """Add a row for each sequence to the cache, in passes of at most `max_tokens` tokens.

        Returns the hidden states [sequences, hidden] after the last token of each.
        """
        self._require_rows(np.array([max(s, default=0) for s in sequences]))
        if isinstance(cache, PaddedCache):
            return self.for_head(cache.prefill(self._backbone, sequences, max_tokens=max_tokens))
        found = []
        for _, tree in pack_trees(sequences, max_tokens=max_tokens):
            plan = TreePlan(tree, device=self.device, keep=True)
            hidden = self._run(tree.token_ids[None], tree.positions[None], plan)[0]
            cache.add(plan.kept or {}, tree.paths)
            found.append(hidden[torch.tensor([int(path[-1]) for path in tree.paths], device=self.device)])
        return torch.cat(found)

    def decode(self, token_ids: Sequence[int], cache: KVCache | PaddedCache) -> Tensor:
        """One more token for each row of the cache; returns the hidden states [rows, hidden] after it."""
        if isinstance(cache, PaddedCache):
            return self.for_head(cache.decode(self._backbone, token_ids))
        positions = cache.begin()
        return self._run(np.array(token_ids)[:, None], positions[:, None], cache)[:, 0]

    def fingerprint(self) -> str:
        """A hash of the bare model's shapes and of samples of its weights, equal in float32 and bfloat16; of a sharded network, as
        it was before."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256()
        for name, parameter in sorted(self.base.named_parameters()):
            if "lora_" in name:
                continue
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, math.ceil(len(flat) / 64))].to(torch.bfloat16).float().cpu()
            digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:32]


def checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One call of a layer that keeps only its inputs for the gradient."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # nothing is drawn in a layer
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
