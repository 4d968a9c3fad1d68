"""Each claim of the theory in a size that a test can run: a second or less."""

from collections.abc import Callable, Mapping
from typing import Any

from opd_theory.claim import Claim
from opd_theory.report import CLAIMS
from opd_theory.tree import make_tree

CLAIM: Mapping[str, Callable[..., Claim]] = {claim.__name__: claim for claim in CLAIMS}

# Claims that are not here are small as they are.
SIZES: Mapping[str, Mapping[str, Any]] = {
    "theorem_1": {"trees": (make_tree(3, 3), make_tree(3, 3, end=2, num_prompts=2)), "random_baselines": 2},
    "theorem_2": {"instances": 4, "horizon": 3},
    "objective_forms": {"instances": 6},
    "variance_order": {"instances": 12, "tree": make_tree(3, 4), "written": 1, "groups": 1, "batches": 300},
    "crossover_claim": {"horizons": (128,), "seeds": 1, "responses": 80_000},
    "reversal": {"instances": 30, "sharpnesses": (0.1, 4.0)},
    "growth": {"horizons": (3, 5, 7), "seeds": 3},
    "kl_baseline": {"instances": 200},
    "convergence": {"horizon": 4, "steps": 80, "seeds": 3},
    "theorem_3": {"aliased": 2, "tabular": 3, "starts": 1},
    "branch_law": {"horizons": (32,)},
    "top_k_tails": {"vocab": 64, "steps": 200, "sizes": (4, 8, 16)},
    "k_estimators": {"instances": 2},
    "several_teachers": {"instances": 2},
    "extrapolation": {"scales": (1.5, 0.5)},
    "staleness": {"steps": 60, "seeds": 4, "lags": (4,)},
    "credit": {"longest": 4},
    "comparison": {"pairs": ("a b ab / none", "a b / ab"), "steps": 60},
}


def small(name: str) -> Claim:
    return CLAIM[name](**SIZES.get(name, {}))
