"""Figures from many runs, each as PNG and SVG: curves, rates, costs. matplotlib draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import ConfigError
from peftcli.tables.cells import Plan
from peftcli.tables.protocol import short, value
from peftcli.tables.render import Table
from peftcli.tables.runs import RunRecord
from peftcli.tables.series import COSTS, RATE, curves, points, sensitivity
from peftcli.train.better import HIGHER_IS_BETTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = {
    "num_trainable_params": "parameters",
    "peak_memory_bytes": "memory",
    "train_seconds": "time",
}
LEGEND = 12  # entries that fit inside a figure


def write_plots(runs: Sequence[RunRecord], table: Table, plan: Plan, folder: Path) -> list[Path]:
    """Write the figures that the runs have numbers for, and return their files.

    Raises `ConfigError` where matplotlib is missing or the folder cannot be written.
    """
    figures: dict[str, Callable[[Axes], None]] = {}
    groups = [(short(value(run, plan.rows[0])), curves(run)) for run in runs]
    # a metric that was measured only at the end is no curve
    for name in sorted({n for _, found in groups for n, curve in found.items() if len(curve) > 1}):
        lines = [(group, found[name]) for group, found in groups if name in found]
        figures[name] = lambda axes, name=name, lines=lines: _curves(axes, name, lines)
    if by_rate := sensitivity(runs, plan):
        figures[RATE] = lambda axes: _rates(axes, plan.metric, by_rate)
    for cost, axis in COSTS.items():
        if found := points(table, plan.metric, cost):
            figures[f"{plan.metric}_{FILES[cost]}"] = lambda axes, axis=axis, found=found: _costs(
                axes, plan.metric, axis, found
            )
    return [path for name, draw in figures.items() for path in _save(folder, name, draw)]


def _save(folder: Path, name: str, draw: Callable[[Axes], None]) -> list[Path]:
    """One figure in both formats, the same bytes each time."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "peft-train plot needs matplotlib: pip install 'peftcli[plots]'. "
            "`peft-train report` draws in the browser, without it."
        ) from None
    with mpl.rc_context(
        {"svg.hashsalt": "peftcli", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        draw(figure.add_subplot())
        paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(paths[0], dpi=150)
            figure.savefig(paths[1], metadata={"Date": None})
        except OSError as e:
            raise ConfigError(f"--output {folder}: cannot be written ({e.strerror}).") from None
    return paths


def _curves(axes: Axes, name: str, lines: Sequence[tuple[str, Any]]) -> None:
    """One line a run, one colour a group."""
    colours = _colours(group for group, _ in lines)
    for group, curve in lines:
        axes.plot(*zip(*curve, strict=True), color=colours[group], linewidth=0.8, alpha=0.8)
    for group, colour in colours.items():
        axes.plot([], [], color=colour, label=group)
    axes.set(xlabel="step", ylabel=name)
    _legend(axes, len(colours))


def _rates(axes: Axes, metric: str, by_rate: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    colours = _colours(by_rate)
    for label, found in by_rate.items():
        rates, means = zip(*found, strict=True)
        axes.plot(rates, _in_units(metric, means), marker="o", label=label, color=colours[label])
    axes.set(xscale="log", xlabel=RATE, ylabel=_axis(metric))
    _legend(axes, len(by_rate))


def _costs(axes: Axes, metric: str, axis: str, found: Sequence[Any]) -> None:
    """Labelled points and the Pareto front."""
    scores = _in_units(metric, [point.score for point in found])
    places = list(zip((point.cost for point in found), scores, strict=True))
    front = [place for place, point in zip(places, found, strict=True) if point.on_front]
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", linewidth=1, zorder=1)
    axes.scatter(*zip(*places, strict=True), s=18, zorder=2)
    for place, point in zip(places, found, strict=True):
        axes.annotate(point.label, place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    costs = [point.cost for point in found]
    if min(costs) > 0 and max(costs) > 30 * min(costs):
        axes.set_xscale("log")
    axes.set(xlabel=axis, ylabel=_axis(metric))


def _axis(metric: str) -> str:
    return f"{metric}, %" if metric in HIGHER_IS_BETTER else metric


def _in_units(metric: str, values: Sequence[float]) -> list[float]:
    return [100 * v for v in values] if metric in HIGHER_IS_BETTER else list(values)


def _colours(groups: Iterable[str]) -> dict[str, Any]:
    """A colour a group, in the order of first sight."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(groups))
    return {name: colormaps["turbo"]((i + 0.5) / len(names)) for i, name in enumerate(names)}


def _legend(axes: Axes, count: int) -> None:
    """Inside the figure where it fits, else beside it."""
    if count <= LEGEND:
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
