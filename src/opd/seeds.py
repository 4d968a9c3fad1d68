"""Seeds that belong to a place in a run, and to nothing else."""

import hashlib

import torch


def generator_of(*parts: int | str) -> torch.Generator:
    """A generator for one purpose, such as (run's seed, "sample", step).

    The parts are hashed: torch reads only the low 32 bits of a seed, so sums and products of parts would coincide.
    """
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
