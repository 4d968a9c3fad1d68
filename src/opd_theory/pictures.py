"""The pictures of the claims: one PNG each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd_theory.claim import Claim
from opd_theory.gradient_claims import discount_frontier


def draw(claims: Mapping[str, Claim], folder: Path) -> list[Path]:
    """Draw what the claims at hand have figures for; returns the files."""
    panels: dict[str, tuple[str, Callable[[Any, Mapping[str, Any]], None]]] = {
        "variance": ("3", _variance),
        "crossover": ("3b", _crossover),
        "growth": ("4", _growth),
        "convergence": ("6", _convergence),
        "stationary": ("7", _stationary),
        "branch": ("8", _branch),
        "supports": ("9", _supports),
    }
    files = [
        _picture(folder / f"{name}.png", lambda axis, n=number, f=painter: f(axis, claims[n].figures))
        for name, (number, painter) in panels.items()
        if number in claims
    ]
    if "2" in claims:
        files.append(_picture(folder / "frontier.png", lambda axis: _frontier(axis, discount_frontier())))
    return files


def _picture(path: Path, paint: Callable[[Any], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    paint(axis)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
    return path


def _plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """These ticks on a logarithmic axis, as plain numbers, and no others."""
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _variance(axis: Any, figures: Mapping[str, Any]) -> None:
    names = sorted(figures["ratios"], key=lambda name: figures["medians"][name])
    axis.boxplot([figures["ratios"][name] for name in names], orientation="horizontal", whis=(5, 95), showfliers=False)
    axis.set_yticks(range(1, len(names) + 1), names)
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis, (0.2, 0.5, 1, 2, 5, 10))
    axis.axvline(1.0, color="grey", linewidth=1)
    axis.set_xlabel("gradient variance of one response, immediate = 1")
    axis.set_title("variance by estimator, 100 random trees (whiskers 5-95 %)")


def _crossover(axis: Any, figures: Mapping[str, Any]) -> None:
    for style, (kl, found) in zip(("--", "-"), figures.items(), strict=False):
        for color, discount in zip(("C0", "C1", "C2"), ("1", "0.97", "0.9"), strict=True):
            ratios = found[f"exact + KL-to-go, discount {discount}, leave one out, per step"]
            axis.plot(found["horizon"], ratios, style, color=color, label=f"discount {discount}, {kl} nats a token")
        axis.plot(found["horizon"], found["exact"], style, color="black", label=f"exact (biased), {kl} nats a token")
    axis.axhline(1.0, color="grey", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain_ticks(axis.xaxis, next(iter(figures.values()))["horizon"])
    _plain_ticks(axis.yaxis, (0.2, 0.5, 1, 2))
    axis.set_xlabel("horizon")
    axis.set_ylabel("gradient variance, immediate = 1")
    axis.set_title("exact + KL-to-go, leave one out over 4 samples")
    axis.legend(fontsize=8)


def _growth(axis: Any, figures: Mapping[str, Any]) -> None:
    for name, slope in figures["slopes"].items():
        axis.loglog(figures["horizons"], figures["variances"][name], "o-", label=f"{name}: slope {slope:.2f}")
    _plain_ticks(axis.xaxis, figures["horizons"])
    axis.set_xlabel("horizon")
    axis.set_ylabel("gradient variance")
    axis.set_title("growth with the horizon (states that depend on the step alone)")
    axis.legend()


def _convergence(axis: Any, figures: Mapping[str, Any]) -> None:
    for name, curve in figures["curves"].items():
        steps = np.minimum(np.arange(len(curve)) * figures["every"], figures["steps"])
        axis.semilogy(steps, curve, label=f"{name} (rate {figures['rates'][name]:g})")
    axis.set_xlabel("step (4 samples each)")
    axis.set_ylabel("sequence KL, mean of 8 seeds")
    axis.set_title("convergence, each at its best rate")
    axis.legend()


def _stationary(axis: Any, figures: Mapping[str, Any]) -> None:
    width = 0.4
    for offset, name in ((-width / 2, "immediate"), (width / 2, "discount 0.9")):
        places = np.arange(len(figures[name])) + offset
        axis.bar(places, 100 * np.asarray(figures[name]), width, label=name)
    axis.set_xlabel("instance with shared rows")
    axis.set_ylabel("sequence KL above the optimum, %")
    axis.set_title("where the immediate log ratio comes to rest (in a table: at the optimum)")
    axis.legend()


def _branch(axis: Any, figures: Mapping[str, Any]) -> None:
    cases = figures["cases"]
    labels = [f"T {case['horizon']}\ndiscount {case['discount']:g}" for case in cases]
    axis.bar(range(len(cases)), [case["ascent"] for case in cases], label="where ascent ends")
    axis.plot(range(len(cases)), [case["law"] for case in cases], "k_", markersize=24, label="law")
    axis.axhline(0.05, color="grey", linewidth=1, label="the teacher's")
    axis.set_xticks(range(len(cases)), labels)
    axis.set_ylabel("probability of the branch")
    axis.set_title("a branch that costs nothing, beside one of 0.087 nats a step")
    axis.legend()


def _supports(axis: Any, figures: Mapping[str, Any]) -> None:
    names = list(figures["final"])
    axis.barh(range(len(names)), list(figures["final"].values()))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(figures["start"], color="grey", linewidth=1, label="start")
    axis.set_xscale("log")
    axis.set_xlabel("full reverse KL after training, nats")
    axis.set_title("top-k supports on one state")
    axis.legend()


def _frontier(axis: Any, figures: Mapping[str, Any]) -> None:
    for name in ("log-ratio-to-go", "KL-to-go", "exact + KL-to-go"):
        biases, variances = figures[f"{name}: squared bias"], figures[f"{name}: variance"]
        axis.plot(biases, variances, "o-", label=name)
        for discount, x, y in zip(figures["discount"], biases, variances, strict=True):
            axis.annotate(f"{discount:g}", (x, y), fontsize=7, textcoords="offset points", xytext=(3, 3))
    axis.set_yscale("log")
    axis.set_xlabel("squared bias / |grad V|^2")
    axis.set_ylabel("variance of one response / |grad V|^2")
    axis.set_title("bias and variance over the discount (without baseline)")
    axis.legend()
