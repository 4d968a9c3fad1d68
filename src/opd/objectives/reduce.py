"""Normalisers: what the sum over tokens is divided by."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Normalizer: TypeAlias = Literal["trajectory", "token", "constant"]


def denominator(
    mask: Bool[Tensor, "batch tokens"], normalizer: Normalizer = "trajectory", *, constant: float | None = None
) -> float:
    """What a loss over the tokens of `mask` is divided by; at least 1, so an all-masked batch has loss 0.

    "trajectory": the number of rows with an action. The only one whose gradient estimates that of V without bias
        (equation 6: sum over tokens, mean over trajectories).
    "token": the number of actions. Weighs long responses like short ones per token; biased when lengths vary.
    "constant": the number given, whatever the batch holds; unbiased for V up to that factor.

    Args: mask [batch, tokens] bool. Compute it over the whole batch before the batch is split.
    """
    if normalizer == "trajectory":
        return max(1.0, float(mask.any(dim=-1).sum()))
    if normalizer == "token":
        return max(1.0, float(mask.sum()))
    if constant is None or constant <= 0:
        raise ValueError(f"normalizer 'constant' needs a positive constant, got {constant}")
    return float(constant)


def masked(values: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """`values` on the mask and exactly 0 off it, also where they are inf or nan there."""
    return torch.where(mask, values, torch.zeros_like(values))


MaskScope: TypeAlias = Literal["trajectory", "suffix", "turn", "span"]


def without_errors(
    flagged: Bool[Tensor, "batch tokens"], turns: Int[Tensor, "batch tokens"], scope: MaskScope
) -> Bool[Tensor, "batch tokens"]:
    """What is kept of trajectories in which format errors were found.

    "trajectory": nothing of a trajectory with an error. "suffix": what stands before its first error. "turn": the turns without
    one. "span": all tokens but the errors' own.

    Args: one row is a trajectory, all parts of it: flagged [batch, tokens]; turns [batch, tokens] which turn of its row a token
    belongs to.
    """
    if scope == "span":
        return ~flagged
    if scope == "turn":
        errors = torch.zeros_like(turns).scatter_add(1, turns, flagged.to(turns.dtype))
        return errors.gather(1, turns) == 0
    if scope == "trajectory":
        return ~flagged.any(-1, keepdim=True).expand_as(flagged)
    return ~(flagged.cumsum(-1) > 0)
