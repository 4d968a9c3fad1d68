"""The picture of a run's curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Reverse KL and outcome by teacher or task, gradient norm, and seconds a step by phase, as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    names = sorted({name for line in metrics for name in line})
    kl = [n for n in names if n.startswith("kl/token/")]
    outcome = [n for n in names if n.startswith("outcome/")]
    _lines(axes[0, 0], metrics, kl, "reverse KL, nats per token", log=True)
    _lines(axes[0, 1], metrics, outcome, "outcome (mean reward of the samples)")
    _lines(axes[1, 0], metrics, ["optim/grad_norm/mean"], "gradient norm before clipping", log=True)
    phases = [f"time/{p}_s/sum" for p in ("sample", "score", "update", "wait")]
    steps = [line["step"] for line in metrics]
    present = [p for p in phases if p in names]
    axes[1, 1].stackplot(steps, [[line.get(p, 0.0) for line in metrics] for p in present], labels=present, alpha=0.8)
    axes[1, 1].set_title("seconds per step")
    axes[1, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")


def _lines(
    axis: Any, metrics: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, *, log: bool = False
) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        label = "/".join(name.split("/")[1:-1]) or "all"
        axis.plot([s for s, _ in points], [v for _, v in points], label=label, linewidth=1.2)
    axis.set_title(title)
    if log and any(line.get(n, 0) > 0 for line in metrics for n in names):
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=8)
