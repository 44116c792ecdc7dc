"""Runs that will not be the best, told by their evaluations so far: fixed rules, pure functions.

`median`: the best value so far is worse than the median of what the finished runs had reached by
that step (D. Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017,
section 3.1, with best values in the place of running means, as in Optuna).

`predict`: a regression on the finished runs (see `foretelling`) foretells the value at the end from
the values so far and the run's place in the space; the run is hopeless when it stays behind the
best with probability 0.99, its residuals being Gaussian (B. Baker, O. Gupta, R. Raskar, N. Naik,
"Accelerating Neural Architecture Search using Performance Prediction", ICLR workshop 2018, arXiv
1705.10823). Of the paper's features the number of parameters is left out: within a cell it follows
from what is swept, and a run says it at its end. A search is told what was foretold.

Every tenth run is a control that is never stopped. Runs on test seeds are never stopped either.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from peftcli.settings import Sweep
from peftcli.sweep import foretelling
from peftcli.sweep.objective import Objective

CONTROLS = 10  # one run in so many is not stopped
CERTAIN = 0.99  # Delta of the paper: 0.95 or 0.99
TO_PREDICT = 20  # finished runs at least; the paper's main tables have 100
Curve = Mapping[int, float]  # optimizer step -> value; larger is better


@dataclass(frozen=True)
class Seen:
    """What is seen of a run: its evaluations after its start, and its place in the space."""

    curve: Curve
    traits: tuple[float, ...] = ()  # as numbers, of one length in a cell

    @property
    def end(self) -> float:
        """Its last value."""
        return self.curve[max(self.curve)]


class Stop(NamedTuple):
    """Why a run is to be stopped, in one line, and what its end is worth to a search, where that
    was foretold: larger is better.
    """

    reason: str
    foretold: float | None = None


def hopeless(
    sweep: Sweep, goal: Objective, overrides: Sequence[str], run: Seen, finished: Sequence[Seen]
) -> Stop | None:
    """Why a run is to be stopped; None: it goes on, as a control does in any case."""
    return None if is_control(overrides) else judged(sweep, goal, run, finished)


def judged(
    sweep: Sweep,
    goal: Objective,
    run: Seen,
    finished: Sequence[Seen],
    tuned_on: Sequence[Seen] = (),
) -> Stop | None:
    """What the rule says of a run; None: it may be the best.

    `finished`: the runs of the same cell that came to their end, whose steps are all as many.
    `tuned_on`: those that the regression's parameters are chosen on; default: `finished`.
    """
    curve = run.curve
    least = max(sweep.prune_after, TO_PREDICT) if sweep.prune == "predict" else sweep.prune_after
    if sweep.prune == "none" or not curve:
        return None
    step, total = max(curve), max((max(other.curve, default=0) for other in finished), default=0)
    whole, also = (
        [o for o in runs if max(o.curve, default=0) == total and curve.keys() <= o.curve.keys()]
        for runs in (finished, tuned_on)
    )
    if len(whole) < least or not sweep.prune_from * total <= step < total:
        return None
    if sweep.prune == "median":
        return _behind_median(goal, curve, [other.curve for other in whole])
    return _behind_prediction(sweep.prune_model, goal, run, whole, also)


def is_control(overrides: Sequence[str]) -> bool:
    """Whether a run goes to its end whatever its curve, by a hash of what it is."""
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).digest()
    return int.from_bytes(digest[:4]) % CONTROLS == 0


def wrong_stops(
    sweep: Sweep, goal: Objective, runs: Mapping[tuple[str, ...], Seen]
) -> tuple[int, int, int]:
    """Of finished runs: controls, those that the rule would have stopped by what the others came
    to, and those of these that ended as the best of all.
    """
    best = max((run.end for run in runs.values() if run.curve), default=0.0)
    controls = {name: run for name, run in runs.items() if run.curve and is_control(name)}
    stopped = []
    for name, run in controls.items():
        others = [other for known, other in runs.items() if known != name]
        steps = sorted(run.curve)
        parts = ({s: run.curve[s] for s in steps[:n]} for n in range(1, len(steps)))
        told = (judged(sweep, goal, Seen(p, run.traits), others, [*runs.values()]) for p in parts)
        if any(told):
            stopped.append(run)
    return len(controls), len(stopped), sum(run.end == best for run in stopped)


def _behind_median(goal: Objective, curve: Curve, finished: Sequence[Curve]) -> Stop | None:
    """By its best value so far and the median of the others' best by that step."""
    step, best = max(curve), max(curve.values())
    middle = statistics.median(max(v for s, v in c.items() if s <= step) for c in finished)
    if best >= middle:
        return None
    of_them = f"the median of {len(finished)} runs is {_shown(goal, middle)}"
    return Stop(f"hopeless: {goal.names[0]} {_shown(goal, best)} by step {step}, {of_them}")


def _behind_prediction(
    model: str, goal: Objective, run: Seen, finished: Sequence[Seen], tuned_on: Sequence[Seen]
) -> Stop | None:
    """By the end that is foretold, which is all but surely behind the best of the others."""
    steps = sorted(run.curve)

    def row(seen: Seen) -> foretelling.Row:
        return foretelling.features([seen.curve[s] for s in steps], seen.traits)

    def runs(seen: Sequence[Seen]) -> foretelling.Runs:
        return foretelling.Runs(tuple(map(row, seen)), tuple(other.end for other in seen))

    found = foretelling.fitted(model, runs(finished), runs(tuned_on) if tuned_on else None)
    if found is None:
        return None
    value, best = found.f(row(run)), max(other.end for other in finished)
    if chance_of_less(best, value, found.deviation) < CERTAIN:
        return None
    foretold = f"{_shown(goal, value)} +- {found.deviation:.2g} foretold at step {steps[-1]}"
    of_them = f"the best of {len(finished)} runs has {_shown(goal, best)}"
    return Stop(f"hopeless: {goal.names[0]} {foretold}, {of_them}", value)


def _shown(goal: Objective, value: float) -> str:
    """A value as the metric that it came from."""
    return f"{goal.signs[0] * value:.4g}"


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
