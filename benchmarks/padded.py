"""What padded passes cost beside packed ones, on one model that can make both (docs/results/packed-passes.md).

    .venv/bin/python benchmarks/padded.py models/smollm2-135m-instruct

Prompts of random tokens, four samples each: forward and backward over all of them, and 16 steps of sampling with prompts of one
length and of eight. Each round times both kinds.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from opd.config import ComputeConfig
from opd.models.attention import use_plans
from opd.models.loading import load_network
from opd.models.network import Network

SAMPLES, RESPONSE, STEPS = 4, 32, 16


def update(network: Network, prompts: Sequence[list[int]], rng: np.random.Generator) -> float:
    """Seconds of a pass forward and backward."""
    network.activate(None, trainable=True)
    sequences = [np.array([*p, *rng.integers(0, 1000, RESPONSE)]) for p in prompts for _ in range(SAMPLES)]
    masks = [np.arange(len(s)) >= len(s) - RESPONSE for s in sequences]
    began = time.perf_counter()
    for micro in network.synchronised_passes(sequences, masks, max_tokens=2048):
        network.hidden_states(micro.tree).square().mean().backward()
    network.base.zero_grad(set_to_none=True)
    return time.perf_counter() - began


@torch.no_grad()
def sample(network: Network, prompts: Sequence[list[int]]) -> float:
    """Seconds of `STEPS` tokens for every sample."""
    began = time.perf_counter()
    with network.merged(None):
        cache = network.new_cache()
        network.prefill(prompts, cache, max_tokens=2048)
        for row in range(len(prompts)):
            for _ in range(SAMPLES - 1):
                cache.copy(row)
        for _ in range(STEPS):
            network.logits(network.decode([5] * len(cache), cache))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    network = load_network(options.model, ComputeConfig(device="cpu"))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, length).tolist() for length in range(40, 72, 4)]
    print("round  kind    update  one length  eight lengths (s)")
    for number in range(options.rounds):
        for kind in ("packed", "padded"):
            network.padded_because = use_plans(network.base)
            if kind == "padded":
                network.pad("this is the comparison")
            times = update(network, prompts, rng), sample(network, [p[:40] for p in prompts]), sample(network, prompts)
            print(f"{number:5}  {kind}  {times[0]:6.2f}  {times[1]:10.2f}  {times[2]:13.2f}", flush=True)


if __name__ == "__main__":
    main()
