"""Runs that will not be the best, told by their evaluations so far: fixed rules, pure functions.

`median`: the best value so far is worse than the median of what the finished runs had reached by
that step (D. Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017,
section 3.1, with best values in the place of running means, as in Optuna).

`predict`: a linear regression on the finished runs foretells the value at the end from the values
so far and their first and second differences; the run is hopeless when it stays behind the best
with probability 0.99, its residuals being Gaussian with the deviation of leave-one-out errors
(B. Baker, O. Gupta, R. Raskar, N. Naik, "Accelerating Neural Architecture Search using Performance
Prediction", ICLR workshop 2018, arXiv 1705.10823; of its regressors ordinary least squares, by the
pseudo-inverse, since the differences are linear in the values).

Every tenth run is a control that is never stopped. Runs on test seeds are never stopped either.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist

from peftcli.settings import Sweep
from peftcli.sweep.objective import Objective

CONTROLS = 10  # one run in so many is not stopped
CERTAIN = 0.99  # Delta of the paper: 0.95 or 0.99
TO_PREDICT = 20  # finished runs at least; the paper's main tables have 100
Curve = Mapping[int, float]  # optimizer step -> value; larger is better


def hopeless(
    sweep: Sweep, goal: Objective, overrides: Sequence[str], curve: Curve, finished: Sequence[Curve]
) -> str | None:
    """Why a run is to be stopped, in one line; None: it goes on, as a control does in any case."""
    return None if is_control(overrides) else judged(sweep, goal, curve, finished)


def judged(sweep: Sweep, goal: Objective, curve: Curve, finished: Sequence[Curve]) -> str | None:
    """What the rule says of a curve, in one line; None: it may be the best.

    `curve`: its evaluations after its start. `finished`: those of runs of the same cell that
    came to their end, whose steps are all as many.
    """
    least = max(sweep.prune_after, TO_PREDICT) if sweep.prune == "predict" else sweep.prune_after
    if sweep.prune == "none" or not curve:
        return None
    step, total = max(curve), max((max(c) for c in finished if c), default=0)
    whole = [c for c in finished if c and max(c) == total and curve.keys() <= c.keys()]
    if len(whole) < least or not sweep.prune_from * total <= step < total:
        return None
    behind = _behind_median if sweep.prune == "median" else _behind_prediction
    found = behind(curve, whole)
    if found is None:
        return None
    value, other = (f"{goal.signs[0] * v:.4g}" for v in found)
    here = f"hopeless: {goal.names[0]} {value}"
    if sweep.prune == "median":
        return f"{here} by step {step}, the median of {len(whole)} runs is {other}"
    return f"{here} foretold at step {step}, the best of {len(whole)} runs has {other}"


def is_control(overrides: Sequence[str]) -> bool:
    """Whether a run goes to its end whatever its curve, by a hash of what it is."""
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).digest()
    return int.from_bytes(digest[:4]) % CONTROLS == 0


def wrong_stops(
    sweep: Sweep, goal: Objective, curves: Mapping[tuple[str, ...], Curve]
) -> tuple[int, int, int]:
    """Of finished runs: controls, those that the rule would have stopped by what the others came
    to, and those of these that ended as the best of all.
    """
    best = max((c[max(c)] for c in curves.values() if c), default=0.0)
    controls = {name: c for name, c in curves.items() if c and is_control(name)}
    stopped = []
    for name, curve in controls.items():
        others = [c for other, c in curves.items() if other != name]
        parts = [{s: curve[s] for s in sorted(curve)[:n]} for n in range(1, len(curve))]
        if any(judged(sweep, goal, part, others) for part in parts):
            stopped.append(curve)
    return len(controls), len(stopped), sum(c[max(c)] == best for c in stopped)


def _behind_median(curve: Curve, finished: Sequence[Curve]) -> tuple[float, float] | None:
    """(best so far, the median of the others' best by that step) of a run that is behind."""
    step, best = max(curve), max(curve.values())
    middle = statistics.median(max(v for s, v in c.items() if s <= step) for c in finished)
    return (best, middle) if best < middle else None


def _behind_prediction(curve: Curve, finished: Sequence[Curve]) -> tuple[float, float] | None:
    """(value foretold, the best of the others) of a run that is all but surely behind."""
    steps, final = sorted(curve), [c[max(c)] for c in finished]
    rows = [features([c[s] for s in steps]) for c in finished]
    found = predict(rows, final, features([curve[s] for s in steps]))
    if found is None or chance_of_less(max(final), *found) < CERTAIN:
        return None
    return found[0], max(final)


# -- the regression --------------------------------------------------------------------------------
def features(values: Sequence[float]) -> list[float]:
    """Values, their first and their second differences: 3 tau - 3 numbers of tau >= 2 values."""
    first = [b - a for a, b in pairwise(values)]
    second = [b - a for a, b in pairwise(first)]
    return [*values, *first, *second]


def predict(
    rows: Sequence[Sequence[float]], final: Sequence[float], row: Sequence[float]
) -> tuple[float, float] | None:
    """(value at the end, deviation of leave-one-out errors) of the run with the features `row`, by
    least squares of `final` on the standardised `rows`; None where runs are too few to tell errors.
    """
    import numpy as np

    X, y = np.asarray(rows, float), np.asarray(final, float)
    middle, width = X.mean(0), X.std(0)
    width[width == 0] = 1.0  # what is the same in all runs tells nothing
    X = np.hstack([np.ones((len(X), 1)), (X - middle) / width])
    inverse = np.linalg.pinv(X, rcond=1e-10)
    leverage = np.einsum("ij,ji->i", X, inverse)
    if leverage.max() > 1 - 1e-6:
        return None
    errors = (y - X @ (inverse @ y)) / (1 - leverage)
    x = np.concatenate([[1.0], (np.asarray(row, float) - middle) / width])
    return float(x @ inverse @ y), float(np.sqrt(np.mean(errors**2)))


def chance_of_less(best: float, predicted: float, deviation: float) -> float:
    """P(y <= best) of a Gaussian."""
    if deviation == 0.0:
        return float(predicted <= best)
    return NormalDist(predicted, deviation).cdf(best)


# -- curves ----------------------------------------------------------------------------------------
def read_curve(run_dir: Path, goal: Objective) -> dict[int, float]:
    """A run's evaluations after its start, by step, of the (first) metric that counts."""
    path = run_dir / "metrics.jsonl"
    curve: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line that is being written
        measured = {k.removeprefix("eval_"): v for k, v in record.items() if k[:5] == "eval_"}
        scores = goal.scores(measured)
        if scores and record["step"] > 0:
            curve[record["step"]] = scores[0]
    return curve
