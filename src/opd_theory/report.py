"""Run the claims, and show them: a table, JSON, pictures."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from opd_theory import (
    byte_claims,
    cell_claims,
    gradient_claims,
    hack_claims,
    horizon,
    law_claims,
    mask_claims,
    objective_claims,
    order_claims,
    top_k_claims,
    training_claims,
)
from opd_theory.claim import Claim
from opd_theory.pictures import draw

CLAIMS: tuple[Callable[[], Claim], ...] = (
    gradient_claims.theorem_1,
    objective_claims.objective_forms,
    gradient_claims.theorem_2,
    gradient_claims.variance_order,
    horizon.crossover_claim,
    order_claims.reversal,
    gradient_claims.growth,
    gradient_claims.kl_baseline,
    training_claims.convergence,
    training_claims.theorem_3,
    law_claims.branch_law,
    top_k_claims.top_k_tails,
    top_k_claims.biased_head,
    top_k_claims.k_estimators,
    mask_claims.mask_law,
    mask_claims.tilt_law,
    law_claims.several_teachers,
    law_claims.extrapolation,
    training_claims.staleness,
    byte_claims.reading,
    byte_claims.credit,
    cell_claims.comparison,
    hack_claims.quick_answer,
    hack_claims.attractor,
    hack_claims.loop,
    hack_claims.early_end,
    hack_claims.parser_exploit,
)


def run_claims() -> Iterator[tuple[Claim, float]]:
    """Each claim with the seconds that it took, in order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small tensors: a second thread only waits
    try:
        for claim in CLAIMS:
            start = time.perf_counter()
            found = claim()
            yield found, time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)


def claim_line(claim: Claim) -> str:
    """One claim as plain lines; of one that fails, which of its parts are false."""
    false = [name for name, true in claim.parts.items() if not true]
    return (
        f"{'holds' if claim.holds else 'FAILS'}  {claim.number:>3}  {claim.title} ({claim.source})\n"
        f"            expected: {claim.expected}\n            measured: {claim.measured}"
        + (f"\n            false: {'; '.join(false)}" if false else "")
    )


def write_report(claims: Sequence[Claim], folder: Path) -> list[Path]:
    """claims.json, claims.md and the pictures; returns the files written. What was there under these names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "claims.json"
    plain.write_text(json.dumps([asdict(claim) for claim in claims], indent=1) + "\n", encoding="utf-8")
    table = folder / "claims.md"
    head = ["| claim | | source | expected | measured | verdict |", "|---|---|---|---|---|---|"]
    rows = [
        f"| {c.number} | {c.title} | {c.source} | {_cell(c.expected)} | {_cell(c.measured)} | {'holds' if c.holds else 'fails'} |"
        for c in claims
    ]
    table.write_text("\n".join(head + rows) + "\n", encoding="utf-8")
    return [plain, table, *draw({claim.number: claim for claim in claims}, folder)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
