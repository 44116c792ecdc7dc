"""The points of plots and reports: curves of runs, what a score costs, how it moves with a rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftcli.tables.cells import Plan, is_scored
from peftcli.tables.protocol import short, value
from peftcli.tables.render import Table
from peftcli.tables.runs import RunRecord
from peftcli.train.better import is_better

COSTS = {  # columns of a table that are better when lower, and their axes
    "num_trainable_params": "trainable parameters",
    "peak_memory_bytes": "peak memory, bytes",
    "train_seconds": "time, s",
}
RATE = "optimizer.lr"
Curve = list[tuple[int, float]]  # (step, value)


def curves(run: RunRecord) -> dict[str, Curve]:
    """The loss of each step and the metrics of each evaluation, by name (`loss`, `eval_accuracy`);
    what is not finite is left out.
    """
    found: dict[str, Curve] = {}
    for record in run.steps:
        for name, given in record.items():
            if name == "loss" or name.startswith("eval_"):
                if isinstance(given, int | float) and math.isfinite(given):
                    found.setdefault(name, []).append((record["step"], given))
    return found


@dataclass(frozen=True)
class Point:
    """A row of a table as a point: what it costs, what it reaches."""

    label: str
    cost: float
    score: float
    on_front: bool = False  # nothing is both cheaper and better


def points(table: Table, metric: str, cost: str) -> list[Point]:
    """The rows that have both numbers, by cost, with those of the Pareto front marked."""
    keys = [column.key for column in table.header]
    of_metric = [key for key in (metric, f"{metric}: all") if key in keys]
    if not of_metric:  # columns whose numbers do not go together
        return []
    found = []
    for row in table.rows:
        spent, reached = (row[keys.index(key)].value for key in (cost, of_metric[0]))
        if isinstance(spent, int | float) and isinstance(reached, int | float):
            found.append(Point(row[0].text, spent, reached))
    best: float | None = None
    marked = []
    sign = 1 if is_better(metric, 1.0, 0.0) else -1
    for point in sorted(found, key=lambda p: (p.cost, -sign * p.score)):
        on_front = best is None or is_better(metric, point.score, best)
        best = point.score if on_front else best
        marked.append(Point(point.label, point.cost, point.score, on_front))
    return marked


def sensitivity(runs: Iterable[RunRecord], plan: Plan) -> dict[str, list[tuple[float, float]]]:
    """By row, the mean of the metric over seeds at each learning rate that was tried: (rate, mean).
    Where a row has tuning seeds these alone count. Rows with one rate are left out.
    """
    scores: dict[str, dict[bool, dict[float, list[float]]]] = {}
    for run in runs:
        if is_scored(run, plan.metric) and isinstance(run.keys.get(RATE), int | float):
            label = ", ".join(short(value(run, key)) for key in plan.rows)
            by_rate = scores.setdefault(label, {}).setdefault(plan.tunes(run), {})
            by_rate.setdefault(run.keys[RATE], []).append(run.metrics[plan.metric])
    chosen = {label: kinds.get(True) or kinds[False] for label, kinds in scores.items()}
    return {
        label: [(rate, statistics.fmean(values)) for rate, values in sorted(by_rate.items())]
        for label, by_rate in chosen.items()
        if len(by_rate) > 1
    }


def thinned(curve: Sequence[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """At most `most` points of a curve, evenly spaced, the first and the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]
