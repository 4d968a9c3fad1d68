"""Random episodes and random recipes for the dense reference, drawn from a seed."""

import random
from typing import Any

import numpy as np
import torch
from dense_records import Row
from torch import Tensor

VOCAB = 258

# name -> (what trains, objective.extrapolation, objective.reference)
WORLDS: dict[str, tuple[str, float, str | None]] = {
    "lora": ("lora", 1.0, None),
    "full": ("full", 1.0, None),
    "past the student": ("lora", 3.0, "student"),
    "past a teacher": ("full", 1.5, "odd"),
    "halfway": ("lora", 0.5, "student"),
}


def sampled_rows(rng: random.Random, *, teachers: list[str], flags: float, lost: float) -> list[Row]:
    """Episodes of one to three parts, with turns, observations, format errors, missing scores and missing rewards."""
    found: list[Row] = []
    for p, teacher in enumerate(teachers):
        opening = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 3)))
        for sample in range(rng.randint(1, 3)):
            reward = None if rng.random() < 0.15 else rng.choice([0.0, 0.5, 1.0])
            failed = rng.random() < 0.04
            for part in range(rng.choice([1, 1, 2, 3])):
                tokens, actions, turns = list(opening), [], []
                tokens += [rng.randrange(VOCAB) for _ in range(rng.randint(0, 2))] if part else []
                for turn in range(rng.choice([1, 1, 2])):
                    tokens += [rng.randrange(VOCAB) for _ in range(rng.randint(1, 2))] if turn else []
                    start, size = len(tokens), rng.randint(1, 4)
                    tokens += [rng.choice([7, 8, rng.randrange(VOCAB)]) for _ in range(size)]
                    actions += range(start, start + size)
                    turns.append((start, start + size))
                spans = []
                if rng.random() < flags:
                    at = rng.choice(actions)
                    spans = [(at, at + rng.randint(1, 2))]
                kind = "none" if rng.random() < lost else "whole"
                found.append(
                    Row(f"p{p}", teacher, sample, part, tuple(tokens), tuple(actions), tuple(turns), tuple(spans), reward,
                        (), kind, failed)
                )  # fmt: skip
    return found


def draw(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """(the world, how scores come, a recipe's tables that a configuration may accept)."""
    objective = _term(rng)
    kind, baseline = objective["type"], objective.get("baseline")
    if objective.get("tail_residual"):
        objective |= {"loss": rng.choice(["reinforce", "ppo"])}
    else:
        objective |= _correction(rng) | _loss(rng)
    reward: dict[str, Any] = {"coef": rng.choice([0.0, 0.0, 0.7, 2.0])}
    if reward["coef"]:
        reward["baseline"] = rng.choice(["leave_one_out", "group_mean", "grpo", "none"])
        reward["format_error"] = rng.choice([-1.0, -0.3])
    world = rng.choice(["lora", "lora", "full", "full", "past the student", "past a teacher", "halfway"])
    if WORLDS[world][1] != 1.0:
        objective |= {"extrapolation": WORLDS[world][1], "reference": WORLDS[world][2]}
    scores = "whole"
    distributions = kind in ("exact", "exact_to_go", "kl_to_go") or baseline in ("kl", "score_weighted")
    if not distributions and not objective.get("tail_residual") and world in ("lora", "full"):
        scores = rng.choice(["whole", "named"] if kind == "top_k" else ["whole", "sampled", "chunks"])
    return (
        world,
        scores,
        {
            "objective": objective,
            "reward": reward,
            "mask": {"format_errors": rng.choice(["off", "off", "trajectory", "suffix", "turn", "span"])},
            "temperature": rng.choice([1.0, 0.8, 1.4]),
            "compute": {"threads": 1, "device": "cpu", "max_tokens": rng.choice([1, 40, 10_000])},
            "alignment": {"credit": rng.choice(["causal", "full"]) if scores == "chunks" else "causal"},
        },
    )


def _term(rng: random.Random) -> dict[str, Any]:
    kinds = ["exact", "exact", "top_k", "immediate", "immediate", "to_go", "kl_to_go", "exact_to_go", "exact_to_go"]
    found: dict[str, Any] = {"type": rng.choice(kinds), "coef": rng.choice([1.0, 1.0, 1.0, 0.5, 0.0])}
    match found["type"]:
        case "exact":
            found["divergence"] = rng.choice(["reverse_kl", "reverse_kl", "forward_kl", "jsd", "jsd"])
            if found["divergence"] == "jsd":
                found["jsd_beta"] = rng.choice([0.2, 0.5, 0.7])
        case "top_k":
            found |= {"top_k": rng.choice([1, 3, 16, 300]), "tail_residual": rng.random() < 0.4}
        case "exact_to_go":
            found["baseline"] = "leave_one_out"
        case _:
            found["baseline"] = rng.choice(["none", "leave_one_out", "leave_one_out", "kl", "score_weighted"])
    if found["type"].endswith("to_go"):
        found["discount"] = rng.choice([0.0, 0.6, 0.9, 1.0, 1.0])
    found["normalizer"] = rng.choice(["trajectory", "trajectory", "token", "constant"])
    if found["normalizer"] == "constant":
        found["constant"] = 3.5
    return found | {"teacher_logprob_floor": rng.choice([-50.0, -50.0, -5.0, -7.0])}


def _correction(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(["none", "none", "truncate", "reject"])
    found: dict[str, Any] = {"type": kind}
    if kind != "none":
        found["level"] = rng.choice(["token", "geometric", "sequence"])
    if kind == "truncate":
        found["cap"] = rng.choice([1.1, 2.0])
    if kind == "reject":
        found |= {"low": rng.choice([0.5, 0.9]), "high": rng.choice([1.2, 2.0])}
    return {"correction": found}


def _loss(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.65:
        return {"loss": "reinforce"}
    clips = {"clip_low": rng.choice([0.1, 0.2]), "clip_high": rng.choice([0.05, 0.3])}
    return {"loss": "ppo", "clip_dual": rng.choice([None, 1.2, 3.0]), "epochs": rng.choice([1, 2]), **clips}


def sampled(rng: random.Random, row: Row, logits: Tensor, temperature: float, noise: float) -> tuple[float, ...]:
    """Log-probabilities of another policy than the student, by so much; float32, as a sampler gives them."""
    logp = torch.log_softmax(logits.detach() / temperature, -1).gather(-1, row.targets[:, None])[:, 0]
    return tuple(float(np.float32(x + rng.gauss(0.0, noise))) for x in logp.tolist())


def in_chunks(rng: random.Random, row: Row) -> tuple[int, ...]:
    """Neighbouring actions of a turn in chunks; a few are in none."""
    found: list[int] = []
    number = 0
    for start, end in row.turns:
        left = end - start
        while left:
            size = min(left, rng.randint(1, 3))
            lost = rng.random() < 0.15
            found += [-1 if lost else number] * size
            number += not lost
            left -= size
    return tuple(found)


def chunk_logprobs(rng: random.Random, row: Row) -> list[float]:
    """The teacher's log-probability of each chunk at its last action, 0 elsewhere."""
    found = [0.0] * len(row.chunks)
    for k, chunk in enumerate(row.chunks):
        if chunk >= 0 and row.chunks[k + 1 : k + 2] != (chunk,):
            found[k] = float(np.float32(-rng.uniform(1.0, 9.0)))
    return found
