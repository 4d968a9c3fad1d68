"""Wall-clock to the same held-out reverse KL, beside TRL's DistillationTrainer, each at the best learning rate of one grid.

    make peers && .venv/bin/python benchmarks/same_kl.py

Both make `--steps` steps at every rate (work.py; responses end by themselves here, at most `--tokens`) and keep their adapters on
the way; that time does not count. Every adapter is then measured in the same way: the student samples on held-out prompts with
the same random numbers, and the exact reverse KL is averaged over the states that it visits. The mark is the larger of the two
programs' lowest measurements. The time to it lies on the line between the logarithms of neighbouring measurements, and of the
rates the one counts that is there first.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from in_turns import ask, require_peers
from safetensors.torch import load_file
from work import SHAPES, opd_parts, trl_command


def ours(options: argparse.Namespace, rate: float, folder: Path) -> dict[str, Any]:
    """A run of opd in this process: its adapters, and the seconds of training to each."""
    from opd.loop import train_step
    from opd.models.export import export

    settings = [f"optimizer.lr={rate}", f"seed={options.seed}", *options.set]
    config, backend, _, parts = opd_parts(options.shape, options.tokens, options.steps, settings, endless=False)
    kept, seconds = [], 0.0
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        train_step(config, parts, step)
        seconds += time.perf_counter() - start
        if step % options.every == 0:
            export(backend.student.network, backend.student.adapter, folder / f"step-{step}")
            kept.append({"step": step, "seconds": seconds, "adapter": str(folder / f"step-{step}")})
    return {"kept": kept}


class Measure:
    """The exact reverse KL, nats a token, of adapters over the base on the same held-out prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.config, self.backend, task_data, self.parts = opd_parts(
            options.shape, options.tokens, 1, [], endless=False
        )
        self.prompts = task_data.prompts["letters"]["held_out"][: options.held_out]

    def __call__(self, adapter: str) -> tuple[float, float]:
        """(the mean over tokens, its standard error from the responses)."""
        from opd.batch import pack
        from opd.loop import score_usable

        self._load(Path(adapter) / "adapter_model.safetensors")
        sampled = self.parts.judge(self.parts.sampler.sample(self.prompts, num_samples=1, seed=(0, "held out")))
        scored = score_usable(self.parts.teachers, sampled)
        floor = self.config.objective.teacher_logprob_floor
        batch, _ = pack(scored, logprob_floor=floor, unscored=False)
        kl = self.parts.learner.score_student(batch).reverse_kl
        assert kl is not None
        owners = torch.repeat_interleave(torch.arange(len(batch)), batch.lengths)[batch.loss_mask]
        mine = kl[batch.loss_mask].double()
        mean = float(mine.mean())
        gaps = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, owners, mine - mean)
        return mean, float(gaps.square().sum().sqrt()) / len(mine)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        found = load_file(path)
        weights = self.parts.learner.weights()
        assert len(found) == len(weights), f"{path} has {len(found)} tensors, the student {len(weights)}"
        for name, parameter in weights.items():
            parameter.copy_(found[name.replace(f".{self.backend.student.adapter}.", ".")])


def time_to(mark: float, kept: list[dict[str, Any]]) -> float:
    """Seconds until the reverse KL first is at `mark`; those of the first measurement where it is there already, infinite when it
    never is."""
    if kept[0]["kl"] <= mark:
        return float(kept[0]["seconds"])
    for before, after in pairwise(kept):
        if after["kl"] <= mark < before["kl"]:
            share = math.log(before["kl"] / mark) / math.log(before["kl"] / after["kl"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8x4", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=4, metavar="STEPS")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--held-out", type=int, default=128, metavar="PROMPTS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of opd")
    parser.add_argument("--alone", metavar="FOLDER", help="one run of opd, at the first rate, as JSON")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(ours(options, options.rates[0], Path(options.alone))))
        return
    require_peers()
    same = ["--shape", options.shape, "--tokens", options.tokens, "--steps", options.steps, "--every", options.every]
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for rate in options.rates:
            mine, theirs = Path(folder) / f"opd-{rate}", Path(folder) / f"trl-{rate}"
            alone = [*same, "--rates", rate, "--seed", options.seed, "--alone", mine, "--set", *options.set]
            runs["opd", rate] = ask([sys.executable, __file__, *map(str, alone)])["kept"]
            keep = ["--lr", rate, "--seed", options.seed, "--keep-every", options.every, "--keep-in", theirs]
            runs["trl", rate] = ask(trl_command(options.shape, options.tokens, options.steps, *keep))["kept"]
        measure = Measure(options)
        print("| run | rate | step | seconds | reverse KL, nats a token |\n|---|---|---|---|---|")
        for (name, rate), kept in runs.items():
            for one in kept:
                one["kl"], error = measure(one["adapter"])
                print(
                    f"| {name} | {rate:g} | {one['step']} | {one['seconds']:.1f} | {one['kl']:.4f} ± {error:.4f} |",
                    flush=True,
                )
    lowest = {
        name: min(one["kl"] for (who, _), kept in runs.items() if who == name for one in kept) for name, _ in runs
    }
    mark = max(lowest.values())
    (mine, my_rate), (theirs, their_rate) = (
        min((time_to(mark, kept), rate) for (who, rate), kept in runs.items() if who == name) for name in ("opd", "trl")
    )
    print(
        f"to {mark:.4f} nats a token: opd {mine:.1f} s (rate {my_rate:g}), TRL {theirs:.1f} s (rate {their_rate:g}), "
        f"opd / TRL {mine / theirs:.2f}"
    )


if __name__ == "__main__":
    main()
