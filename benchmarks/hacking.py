"""Reward hacking on a real model, with and without safeguards: curves and a table (docs/concepts/safeguards.md).

    python benchmarks/hacking.py --output runs/hacking                       # four arms, three seeds
    python benchmarks/hacking.py --output runs/hacking --seeds 0 --arms none both

Runs that are finished are not run again, and interrupted ones are continued.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import opd
from opd.metrics import wilson_interval

MASK = ["mask.format_errors=trajectory"]
OUTCOME = ["reward.coef=6.0"]
ARMS: Mapping[str, Sequence[str]] = {
    "none": [],
    "mask": MASK,
    "reward": [*OUTCOME, "reward.format_error=0.0"],
    "both": [*MASK, *OUTCOME],
    "exact": ["objective.discount=0.0"],  # at discount 0 the exact immediate term
}
LAST = 5  # steps at the end of a run that its row of the table is the mean of
PANELS = (
    ("kl/sequence/mean", "OPD reward: - reverse KL of an episode, nats", -1.0),
    ("reward/mean", "reward: mean reward", 1.0),
    ("format/errors/mean", "share of episodes with a format error", 1.0),
)


def run(recipe: str, folder: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The metrics of one arm's run, started, continued or read back."""
    config = opd.load_config(recipe, [*overrides, f"output={folder}"])
    lines = opd.read_metrics(folder)
    if not lines or lines[-1]["step"] < config.steps:
        opd.Trainer(folder).resume() if folder.exists() else opd.train(config)
    return opd.read_metrics(folder)


def row(arm: str, runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Start and end of an arm: means over seeds, the lowest and the highest of them in brackets."""

    def cell(name: str, sign: float, part: slice) -> str:
        values = [sign * float(np.mean([line[name] for line in lines[part] if name in line])) for lines in runs]
        spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}"

    cells = [f"{cell(name, sign, slice(0, 1))} -> {cell(name, sign, slice(-LAST, None))}" for name, _, sign in PANELS]
    return f"| {arm} | " + " | ".join(cells) + " |"


def draw(found: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.2))
    for axis, (name, title, sign) in zip(axes, PANELS, strict=True):
        for number, (arm, runs) in enumerate(found.items()):
            curves = [[sign * line.get(name, np.nan) for line in lines] for lines in runs]
            steps = range(1, min(map(len, curves)) + 1)
            color = f"C{number}"
            for curve in curves:
                axis.plot(steps, curve[: len(steps)], color=color, alpha=0.25, linewidth=0.8)
            # a step in which every episode was masked makes no update and has no KL
            mean = np.ma.masked_invalid([curve[: len(steps)] for curve in curves]).mean(axis=0)
            axis.plot(steps, mean, color=color, label=arm)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/hacking.toml")
    parser.add_argument("--output", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["none", "mask", "reward", "both"])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe for every arm"
    )
    given = parser.parse_args()
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in given.seeds:
        for arm in given.arms:
            folder = given.output / f"{arm}-{seed}"
            lines = run(given.recipe, folder, [*ARMS[arm], f"seed={seed}", *given.set])
            found.setdefault(arm, []).append(lines)
    head = ["| safeguards | OPD reward | reward | format errors |", "|---|---|---|---|"]
    table = "\n".join([*head, *(row(arm, runs) for arm, runs in found.items())])
    (given.output / "hacking.md").write_text(table + "\n", encoding="utf-8")
    (given.output / "hacking.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, given.output / "hacking.png")
    print(table)
    num = sum(line["batch/rollouts/sum"] for line in found[given.arms[0]][0][-LAST:])
    low, high = wilson_interval(int(num / 2), int(num))
    print(
        f"First step -> mean of the last {LAST}; one run's share has a 95 % interval of at most +-{(high - low) / 2:.2f}."
    )
    print(f"Curves: {given.output / 'hacking.png'}")


if __name__ == "__main__":
    main()
