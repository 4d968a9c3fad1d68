"""Drawing tokens by inversion: one uniform number decides a token, so draws can be repeated."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 256  # tokens


def invert(
    logits: Float[Tensor, "rows vocab"], owners: Int[Tensor, " samples"], uniforms: Float[Tensor, " samples"]
) -> tuple[list[int], list[float]]:
    """For each sample the token at which the distribution function of its row, softmax(logits), first exceeds its uniform number
    in [0, 1), and the token's log-probability.

    logits float32 [rows, vocab]; owners [samples]: each sample's row; uniforms float64 [samples]. Sums are float64: in float32 the
    rounding of a sum over a vocabulary would move the probabilities of rare tokens. A token of probability 0 is never drawn.
    """
    top = logits.amax(-1, keepdim=True)
    # `out`, because logits may lie column by column, and sums along them are faster row by row
    weights = torch.sub(logits, top, out=torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)).exp_()
    vocab = weights.shape[-1]
    blocks = F.pad(weights, (0, -vocab % _BLOCK)).view(len(weights), -1, _BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    owners, uniforms = owners.to(cdf.device), uniforms.to(cdf.device)
    mine = cdf[owners]
    mark = uniforms * mine[:, -1]
    block = _first_above(mine, mark)
    before = torch.where(block > 0, mine.gather(-1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inner = blocks[owners, block].double().cumsum(-1)
    tokens = (block * _BLOCK + _first_above(inner, mark - before)).clamp(max=vocab - 1)
    logprobs = logits[owners, tokens] - top[owners, 0] - mine[:, -1].log()
    return tokens.tolist(), logprobs.float().tolist()


def _first_above(cdf: Tensor, marks: Tensor) -> Tensor:
    """The first place of each row [rows, places] at which it exceeds its mark [rows]; where rounding leaves none, the last
    place that adds to it."""
    found = torch.searchsorted(cdf, marks[:, None], right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    # of a nan every comparison is false: any place will do, and the log-probability tells
    return torch.minimum(found, last).clamp(max=cdf.shape[-1] - 1)[:, 0]
