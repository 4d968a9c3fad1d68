"""The curves of a run as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import RunError, describe_error
from opd.logging.run_folder import RunFolder, explain_io, read_metrics


def draw_run(folder: RunFolder) -> None:
    """Draw curves.png of a run folder; raises RunError with one line on failure."""
    path = folder.path / "curves.png"
    with explain_io(path):
        try:
            draw_curves(read_metrics(folder.path), path, title=str(folder.path))
        except OSError:
            raise
        except Exception as error:  # of a font or a backend
            raise RunError(
                f"cannot draw '{path}': {describe_error(error)}; metrics.jsonl holds the numbers; check matplotlib"
            ) from error


def draw_curves(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw reverse KL, likelihood, reward, gradient norm and seconds a step as one PNG; without such metrics, no file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for line in metrics for name in line})
    curves = {
        "reverse KL, nats per token": [n for n in names if n.startswith("kl/token/")],
        "negative log-likelihood, nats per token": [n for n in names if n == "student/nll/mean"],
        "reward (mean reward of the samples)": [n for n in names if n.startswith("reward/")],
        "gradient norm before clipping": [n for n in names if n == "optim/grad_norm/mean"],
    }
    shown = {title: chosen for title, chosen in curves.items() if chosen}
    phases = [n for n in (f"time/{p}_s/sum" for p in ("sample", "score", "update", "wait")) if n in names]
    panels = len(shown) + bool(phases)
    if not panels:
        return
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5.5 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (name, chosen) in zip(axes, shown.items(), strict=False):
        _lines(axis, metrics, chosen, name, log="KL" in name or "norm" in name or "likelihood" in name)
    if phases:
        axis = axes[len(shown)]
        steps = [line["step"] for line in metrics]
        seconds = [[line.get(p, 0.0) for line in metrics] for p in phases]
        axis.stackplot(steps, seconds, labels=[p.split("/")[1].removesuffix("_s") for p in phases], alpha=0.8)
        axis.set_title("seconds per step")
        axis.legend(fontsize=8)
    for axis in axes[:panels]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format="png")


def _lines(
    axis: Any, metrics: Sequence[Mapping[str, Any]], names: Sequence[str], title: str, *, log: bool = False
) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in metrics if name in line]
        label = "/".join(part for part in name.split("/")[1:-1] if part != "token") or "all"
        axis.plot([s for s, _ in points], [v for _, v in points], label=label, linewidth=1.2)
    axis.set_title(title)
    if log and any(line.get(n, 0) > 0 for line in metrics for n in names):
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=8)
