"""Ten steps of toy runs: their losses and gradient norms, which a change that claims no numerical effect leaves as they are.

The responses are part of the record: another rounding now and then draws another token, and all that follows is another run.
`python tests/golden.py` writes tests/golden.json anew: after a change that is meant to change it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from factories import save_adapter, toy_recipe

import opd
from opd.episodes.player import Taken
from opd.local.backend import LocalBackend
from opd.local.build import build
from opd.local.sampler import LocalSampler

FILE = Path(__file__).with_suffix(".json")
KEYS = ("loss/total/sum", "optim/grad_norm/mean")
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"objective": {"type": "exact"}},
    "exact_full": {"objective": {"type": "exact"}, "trainable": "full"},
    "immediate": {"objective": {"type": "immediate", "baseline": "leave_one_out"}},
    "to_go_ppo": {"objective": {"type": "to_go", "discount": 0.9, "loss": "ppo", "epochs": 2}},
    "top_k": {"objective": {"type": "top_k", "top_k": 8}},
}


def wide(*args: Any, **kwargs: Any) -> LocalBackend:
    """The parts of a run with weights in float64: those of float32 are rounded otherwise on another kind of processor, and ten
    steps of Adam make 1e-6 of it."""
    backend = build(*args, **kwargs)
    for network in dict.fromkeys([backend.student.network, *(policy.network for policy in backend.policies.values())]):
        network.base.double()
    return backend


def curves(name: str, folder: Path) -> dict[str, list[float]]:
    """The curves of one run, in a folder that is empty."""
    sampling = {"prompts_per_step": 4, "group_size": 3, "max_new_tokens": 12}
    # a low rate: at a high one the rounding of the first steps grows in the later ones
    optimizer = {"lr": 1e-3, "warmup_steps": 1}
    compute = {"max_tokens": 96, "threads": 1}
    changes = {"steps": 10, "sampling": sampling, "optimizer": optimizer, "compute": compute, **RUNS[name]}
    tree = toy_recipe(folder, evaluation={"num_prompts": 0}, **changes)
    tree["teachers"]["odd"] = {"adapter": save_adapter(folder / "adapter", tree["student"], 5)}
    with patch("opd.run.local.build", wide):
        lines = opd.read_metrics(opd.train(opd.parse_config(tree)).run)
    return {key: [line[key] for line in lines] for key in KEYS}


@contextmanager
def recorded(calls: list[Any]) -> Iterator[None]:
    """Append to `calls` what every call of a sampler returned."""
    plain = LocalSampler._take_turns

    def take_turns(self: LocalSampler, *args: Any) -> list[Taken]:
        found = plain(self, *args)
        calls.append([[t.token_ids, t.logprobs, t.finish] for t in found])
        return found

    with patch.object(LocalSampler, "_take_turns", take_turns):
        yield


@contextmanager
def replayed(calls: list[Any]) -> Iterator[None]:
    """Let samplers return what was recorded, in order."""
    waiting = iter(calls)
    with patch.object(LocalSampler, "_take_turns", lambda *_: [Taken(*turn) for turn in next(waiting)]):
        yield


if __name__ == "__main__":
    written = {}
    for run in RUNS:
        responses: list[Any] = []
        with tempfile.TemporaryDirectory() as place, recorded(responses):
            written[run] = {"curves": curves(run, Path(place)), "responses": responses}
    FILE.write_text(json.dumps(written) + "\n", encoding="utf-8")
