"""The teacher's log-probabilities that a student follows: the floor, and the mixture of several models."""

from collections.abc import Iterable

from torch import Tensor


def raised(logprobs: Tensor, floor: float) -> Tensor:
    """Log-probabilities, those below `floor` raised to it: a probability of zero costs a finite number of nats."""
    return logprobs.clamp(min=floor)


def target_logprobs(models: Iterable[tuple[Tensor, float]], floor: float) -> tuple[Tensor, Tensor | None]:
    """log q = sum_k w_k max(log q_k, floor), and where any model was below the floor (bool; None: nowhere).

    The floor acts on each model before its weight, never on the sum: an extrapolation may aim below it, and a token counts as
    floored only where a model is. Sampled tokens (`opd.batch.pack`) and whole vocabularies (`opd.objectives.vocabulary`) get their
    target here, so the log ratio of a sampled token is that of the same token in the vocabulary.

    Args: models: (log q_k, w_k), tensors of one shape, nats, at least one; the tensors are written over.
    """
    logq, below = None, None
    for logprobs, weight in models:
        # a CPU saves a pass by asking; an accelerator would have to wait for the answer
        if logprobs.device.type != "cpu" or (logprobs.numel() and bool(logprobs.amin() < floor)):
            low = logprobs < floor
            logprobs.clamp_(min=floor)
            below = low if below is None else below | low
        if weight != 1.0:
            logprobs.mul_(weight)
        logq = logprobs if logq is None else logq.add_(logprobs)
    assert logq is not None, "a target of no model"
    return logq, below
