"""How far quantised models are from the whole ones: what a person wants to know before a run, and no run needs."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from opd.checks.notices import Finding
from opd.config import ComputeConfig
from opd.local.backend import LocalBackend
from opd.models.loading import load_network
from opd.models.network import Network
from opd.models.packing import TokenTree, pack_trees
from opd.objectives.tiles import soft_capped
from opd.records import Prompt
from opd.roles import Backend
from opd.text.chat import Chat

_PROMPTS = 8
_SPARE = 1.2  # of the memory of the whole model, for its passes


def quantised_findings(backend: Backend, prompts: Sequence[Prompt], *, max_tokens: int) -> list[Finding]:
    """The reverse KL between each model that the recipe quantises and the whole one, in nats per token of some prompts."""
    networks: dict[Network, str] = {}
    for (network, _), who in backend.models().items() if isinstance(backend, LocalBackend) else ():
        networks.setdefault(network, who)
    found = []
    for network, who in networks.items():
        if network.quantization is None:
            continue
        title = f"weights in fewer bits ({who})"
        needed, free = _SPARE * _whole_bytes(network), _free_bytes(network.device)
        if needed > free:
            gib = f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            detail = f"{network.quantization}; not compared with the whole model, which needs {gib}"
            found.append(Finding(title, True, detail))
            continue
        kl, count = _kl(network, prompts[:_PROMPTS], max_tokens)
        detail = f"{network.quantization}: {kl:.3f} nats per token from the whole model (reverse KL over {count} prompt tokens)"
        found.append(Finding(title, True, detail))
    return found


def _kl(network: Network, prompts: Sequence[Prompt], max_tokens: int) -> tuple[float, int]:
    """The mean reverse KL to the whole model over the tokens of prompts, and how many these are."""
    dtype = "bfloat16" if network.base.dtype == torch.bfloat16 else "float32"
    whole = load_network(network.source, ComputeConfig(device=str(network.device), dtype=dtype))
    if network.padded_because is not None:
        whole.pad(network.padded_because)
    network.activate(None)
    chat = Chat(network.tokenizer, rows=network.vocab_size)
    total, count = 0.0, 0
    padded = network.padded_because is not None
    for _, tree in pack_trees([chat.encode_prompt(p) for p in prompts], max_tokens=max_tokens, padded=padded):
        with torch.no_grad():
            mine, theirs = (_logprobs(n, tree, network.vocab_size) for n in (network, whole))
            total += float((mine.exp() * (mine - theirs)).sum())
        count += len(tree)
    return total / max(1, count), count


def _logprobs(network: Network, tree: TokenTree, size: int) -> Tensor:
    """Of the first `size` ids at every node of a tree, [nodes, size] float32."""
    logits = network.hidden_states(tree) @ network.head_weight()[:size].T
    return torch.log_softmax(soft_capped(logits, network.softcap)[0].float(), -1)


def _whole_bytes(network: Network) -> int:
    return network.base.num_parameters() * (2 if network.base.dtype == torch.bfloat16 else 4)


def _free_bytes(device: torch.device) -> int:
    """The free memory of a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available  # free pages alone would leave out the cache of files just read
