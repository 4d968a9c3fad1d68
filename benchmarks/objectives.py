"""Section 2.4 on a real model: objectives side by side, the same numbers of samples, the best of one grid of rates for each.

    .venv/bin/python benchmarks/objectives.py --output runs/objectives

Every objective is trained on the demo's two tasks from the same prompts: each rate of the grid with seed 0, then the best
rate with the other seeds. What is compared is the reverse KL per sequence on held-out prompts, over the whole vocabulary,
and the accuracy. A run that is there already is not done again, so a stopped benchmark goes on where it was.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import opd

OBJECTIVES: Mapping[str, list[str]] = {
    "immediate": ["objective.type=immediate"],
    "to_go": ["objective.type=to_go", "objective.discount=1.0"],
    "exact": ["objective.type=exact"],
    "exact_to_go": [
        "objective.type=exact_to_go",
        "objective.discount=0.9",
        "objective.baseline=leave_one_out",
    ],
    "top_k": ["objective.type=top_k", "objective.top_k=32"],
}
COMMON = (
    "sampling.prompts_per_step=8",
    "sampling.group_size=4",
    "evaluation.before_prompts=0",
    "checkpoint.every=1000",
    "checkpoint.keep=1",
    "logging.samples_every=0",
)


def run(name: str, rate: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training run, or what it left: held-out KL per sequence and accuracy (means over tasks), and the curve."""
    folder = Path(options.output) / f"{name}-{rate:g}-{seed}"
    overrides = [
        *COMMON, *OBJECTIVES[name], f"optimizer.lr={rate}", f"seed={seed}", f"output={folder}",
        f"steps={options.steps}", f"evaluation.num_prompts={options.prompts}",
    ]  # fmt: skip
    config = opd.load_config(options.recipe, overrides)
    if folder.exists() and json.loads((folder / "config.json").read_text()) != config.model_dump(mode="json"):
        raise SystemExit(f"{folder} was run with other settings; remove it, or choose another --output")
    if not (folder / "parity.json").exists():
        if folder.exists():
            opd.Trainer(folder).resume()
        else:
            opd.train(config)
    rows = json.loads((folder / "parity.json").read_text())
    after = [row["student_after"] for row in rows if row["split"] == "held_out"]
    trained = [row["student_after"] for row in rows if row["split"] == "train"]
    return {
        "objective": name,
        "rate": rate,
        "seed": seed,
        "kl_sequence_train": sum(cell["kl_sequence"] for cell in trained) / len(trained),
        "kl_sequence": sum(cell["kl_sequence"] for cell in after) / len(after),
        "accuracy": sum(cell["accuracy"] for cell in after) / len(after),
        "curve": [line["kl/token/mean"] for line in opd.read_metrics(folder)],
    }


def table(results: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| objective | rate | KL per sequence, seeds | mean | accuracy, seeds | mean |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        kls, accuracies = ([r[key] for r in runs] for key in ("kl_sequence", "accuracy"))
        lines.append(
            f"| `{name}` | {runs[0]['rate']:g} | {', '.join(f'{kl:.2f}' for kl in kls)} | {sum(kls) / len(kls):.2f} | "
            f"{', '.join(f'{100 * a:.0f} %' for a in accuracies)} | {100 * sum(accuracies) / len(accuracies):.0f} % |"
        )
    return "\n".join(lines)


def draw(results: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, runs in results.items():
        curves = [r["curve"] for r in runs]
        mean = [sum(step) / len(step) for step in zip(*curves, strict=True)]
        smooth = [sum(mean[max(0, i - 2) : i + 3]) / len(mean[max(0, i - 2) : i + 3]) for i in range(len(mean))]
        axis.semilogy(range(1, len(mean) + 1), smooth, label=f"{name} (rate {runs[0]['rate']:g})")
    axis.set_xlabel("step")
    axis.set_ylabel("reverse KL, nats per token (mean of seeds, over 5 steps)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="recipes/merge.toml")
    parser.add_argument("--output", default="runs/objectives")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=64, help="evaluation prompts of each task and split")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    grid: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for name in OBJECTIVES:
        first, *others = options.seeds
        grid[name] = [run(name, rate, first, options) for rate in options.rates]
        # chosen on training prompts, reported on held-out ones
        best = min(
            grid[name], key=lambda r: r["kl_sequence_train"] if math.isfinite(r["kl_sequence_train"]) else math.inf
        )
        chosen[name] = [best, *(run(name, best["rate"], seed, options) for seed in others)]
        output = Path(options.output)
        (output / "objectives.json").write_text(json.dumps({"grid": grid, "chosen": chosen}, indent=1) + "\n")
        (output / "objectives.md").write_text(table(chosen) + "\n")
        draw(chosen, output / "objectives.png")
        print(table(chosen), flush=True)


if __name__ == "__main__":
    main()
