"""How near a step comes to the machine: scoring and updating to its matrix rate, sampling to its roofline.

    .venv/bin/python benchmarks/roofline.py

The machine's rates are measured here, before and after each of opd's times: multiplying two square matrices, and reading a tensor
too large for any cache. Operations are those that the model cannot do without, two for each product of a weight with a token, on
the tokens that are left once prefixes are shared: in the frozen base forward and backward to its inputs, in the adapters
to both sides, attention over a token's own ancestors, the head at each distinct state. Padding, masked tiles, norms and Python do
not count.

Sampling's roofline is, for each token of a response, the longer of reading all weights once and multiplying them at the
matrix rate.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from work import opd_parts

from opd.loop import Components, train_step
from opd.models.network import Network
from opd.models.packing import micro_batches
from opd.records import ScoredRollout

SIZE = 3072  # of the square matrices
READ = 2**28  # floats


@dataclass(frozen=True)
class Rates:
    """What the machine can do: multiplications and additions a second, bytes read a second."""

    matrix: float
    memory: float


@dataclass(frozen=True)
class Work:
    """What one packed pass over a step's rollouts consists of."""

    tokens: int
    seen: int  # keys that the tokens look at, together
    states: int  # distinct states that the head is read for


def seconds(run: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    """The median time of a call, once warm."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def machine(device: torch.device, dtype: torch.dtype) -> Rates:
    size = SIZE if device.type == "cpu" else 4 * SIZE
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)
    whole = torch.ones(READ, device=device)
    return Rates(
        matrix=2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device),
        memory=4 * READ / seconds(whole.sum, device),
    )


def beside(device: torch.device, dtype: torch.dtype, run: Callable[[], float]) -> tuple[float, Rates]:
    """A time that `run` tells, and the machine's rates around it."""
    before = machine(device, dtype)
    took = run()
    after = machine(device, dtype)
    return took, Rates((before.matrix + after.matrix) / 2, (before.memory + after.memory) / 2)


def weights(network: Network) -> tuple[int, int]:
    """Weights of the layers below the head that multiply tokens: of the base, of one adapter."""
    named = [
        (n, p) for n, p in network.base.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    adapter = sum(p.numel() for n, p in named if "lora_" in n and ".student." in n)
    return sum(p.numel() for n, p in named if "lora_" not in n), adapter


def work(scored: Sequence[ScoredRollout], max_tokens: int) -> Work:
    rollouts = [item.rollout for item in scored]
    passes = list(
        micro_batches([r.token_ids for r in rollouts], [r.loss_mask for r in rollouts], max_tokens=max_tokens)
    )
    return Work(
        tokens=sum(len(p.tree) for p in passes),
        seen=sum(int((p.tree.positions + 1).sum()) for p in passes),
        states=sum(len(np.unique(p.states)) for p in passes),
    )


def operations(network: Network, done: Work) -> tuple[float, float]:
    """Of scoring, of updating."""
    base, adapter = weights(network)
    config = network.base.config.get_text_config()
    head = 2.0 * network.head_weight().numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * width
    forward = 2.0 * (base + adapter) * done.tokens + attention * done.seen
    backward = (2.0 * base + 4.0 * adapter) * done.tokens + 2 * attention * done.seen
    # the student's logits, the teacher's, and the gradient to the hidden states
    return forward + head * done.states, forward + backward + 3 * head * done.states


def training(shape: str, tokens: int, steps: int, overrides: list[str]) -> str:
    config, backend, _, parts = opd_parts(shape, tokens, steps + 1, overrides, endless=True)
    network = backend.student.network
    train_step(config, parts, 1)
    times, counted = np.zeros(2), np.zeros(2)

    def run() -> float:
        for step in range(2, steps + 2):
            report = train_step(config, parts, step)
            times[:] += [report.values["time/score_s/sum"], report.values["time/update_s/sum"]]
            counted[:] += operations(network, work(report.scored, config.compute.max_tokens))
        return float(times.sum())

    took, rates = beside(network.device, network.base.dtype, run)
    shares = [*(counted / times / rates.matrix), counted.sum() / took / rates.matrix]
    return (
        f"| {shape} x {tokens} | {times[0] / steps:.2f} | {times[1] / steps:.2f} | {rates.matrix / 1e9:.0f} | "
        + " | ".join(f"{share:.0%}" for share in shares)
        + " |"
    )


def sampling(rows: int, tokens: int, overrides: list[str]) -> str:
    shape = [f"sampling.prompts_per_step={rows}", f"sampling.max_rows={rows}", *overrides]
    _, backend, _, parts = opd_parts("32x1", tokens, 1, shape, endless=True)
    network = backend.student.network
    base, _ = weights(network)
    every = base + network.head_weight().numel()
    prompts = parts.stream.next(rows)
    prefilled = []
    took, rates = beside(
        network.device, network.base.dtype, lambda: _timed(parts, prompts, prefilled, network, repeats=3)
    )
    a_token = max(2 * every * rows / rates.matrix, network.base.dtype.itemsize * every / rates.memory)
    least = tokens * a_token + 2 * base * prefilled[0] / rates.matrix
    return (
        f"| {rows} | {took / tokens * 1e3:.0f} | {rates.matrix / 1e9:.0f} | {rates.memory / 1e9:.0f} | "
        f"{least / tokens * 1e3:.0f} | {least / took:.0%} |"
    )


def _timed(parts: Components, prompts: Sequence[Any], prefilled: list[int], network: Network, *, repeats: int) -> float:
    """The median time of sampling one response a prompt; `prefilled` gets the number of distinct prompt tokens."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        rollouts = parts.sampler.sample(prompts, num_samples=1, seed=(0, "sample", repeat))
        times.append(time.perf_counter() - start)
    paths = {tuple(r.token_ids[: k + 1]) for r in rollouts for k in range(len(r.token_ids) - r.num_actions)}
    prefilled.append(len(paths))
    return float(np.median(times[1:]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[12, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of opd")
    options = parser.parse_args(arguments)
    print(
        "| batch | score, s | update, s | matrix rate, GFLOPS | score | update | both |\n|---|---|---|---|---|---|---|"
    )
    for length in options.lengths:
        for _ in range(options.rounds):
            print(training("8x4", length, options.steps, options.set), flush=True)
    print(
        "\n| rows | ms a token of all rows, prompts included | matrix rate, GFLOPS | memory, GB/s | roofline, ms | reached |\n"
        "|---|---|---|---|---|---|"
    )
    for rows in options.rows:
        for _ in range(options.rounds):
            print(sampling(rows, 32, options.set), flush=True)


if __name__ == "__main__":
    main()
