"""From runs to the cells of a table: which belong together, which values of tuned keys are best,
which seeds are reported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import ConfigError, did_you_mean
from peftcli.suggest import nearest_keys
from peftcli.tables.protocol import is_tuned, same, value
from peftcli.tables.runs import RunRecord
from peftcli.tables.statistics import Aggregate, aggregate
from peftcli.train.better import is_better

Place = tuple[Any, ...]  # values of the row keys, or of the column keys


@dataclass(frozen=True)
class Plan:
    """What a table is asked for."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    metric: str
    tuning_seeds: frozenset[int] = frozenset()
    test_seeds: frozenset[int] = frozenset()  # reported; empty: all that did not tune
    how: Aggregate = "mean"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of rows and columns."""
        return self.rows + self.columns

    def tunes(self, run: RunRecord) -> bool:
        """Whether a run's seed only chooses."""
        return run.seed in self.tuning_seeds

    def reports(self, run: RunRecord) -> bool:
        """Whether a run's seed is reported."""
        return not self.tunes(run) and (not self.test_seeds or run.seed in self.test_seeds)


@dataclass(frozen=True)
class Cell:
    """The runs of one row and column, divided by the values of what was tuned there."""

    row: Place
    column: Place
    chosen: Mapping[str, Any]  # the best values of the tuned keys
    tried: int  # how many combinations of such values there are
    runs: tuple[RunRecord, ...]  # of the best values: done, reported, by seed
    tuning: tuple[RunRecord, ...]  # of the best values: done, on tuning seeds
    waiting: tuple[RunRecord, ...]  # of any values: not done

    def values(self, metric: str) -> dict[int | None, float]:
        """The metric of each reported seed."""
        return {run.seed: run.metrics[metric] for run in self.runs}


def is_scored(run: RunRecord, metric: str) -> bool:
    """Whether a run ended with a finite number in this metric."""
    return run.state == "done" and math.isfinite(run.metrics.get(metric, math.nan))


# -- Keys ------------------------------------------------------------------------------------------
def known_key(word: str, runs: Sequence[RunRecord]) -> str:
    """The key that a word means: itself, or the only one that ends in it (`lr`: optimizer.lr).

    Raises `ConfigError` with near ones where there is none.
    """
    known = dict.fromkeys(key for run in runs for key in run.keys)
    if word in known or any(value(run, word) is not None for run in runs):
        return word
    named = [key for key in known if key.rpartition(".")[2] == word]
    if len(named) == 1:
        return named[0]
    near = named or nearest_keys(word, list(known))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ConfigError(f"no key {word!r} in these runs.{hint}")


def known_metric(word: str | None, runs: Iterable[RunRecord]) -> str:
    """The metric of a table: the one asked for, else the one by which all runs tell their best
    step.
    """
    done = [run for run in runs if run.metrics]
    measured = sorted({name for run in done for name in run.metrics})
    if word is not None:
        if done and word not in measured:
            raise ConfigError(
                f"--metric {word}: no run has it.{did_you_mean(word, measured)}"
                f" They have {', '.join(measured)}."
            )
        return word
    told = {run.train_info["metrics"].get("best", {}).get("metric", "loss") for run in done}
    if len(told) > 1:
        raise ConfigError(
            f"the runs have no common metric ({', '.join(sorted(told))} tell their best steps): "
            f"name one of {', '.join(measured)} in --metric."
        )
    return told.pop() if told else "loss"


def tuned_keys(runs: Iterable[RunRecord], keys: Collection[str]) -> list[str]:
    """Keys beside `keys` that vary inside a cell. Those that vary only as the choice of their group
    does (method.r with the method) are left to the group's word.
    """
    cells: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        where = same([value(run, key) for key in keys])
        for key, given in run.keys.items():
            if is_tuned(key) and key not in keys:
                group = key.partition(".")[0]
                inside = where if key == group else where + same(run.keys.get(group))
                cells.setdefault(inside, {}).setdefault(key, set()).add(same(given))
    varying = {key for cell in cells.values() for key, found in cell.items() if len(found) > 1}
    return sorted(varying)


# -- Cells -----------------------------------------------------------------------------------------
def make_cells(runs: Sequence[RunRecord], plan: Plan, tuned: Sequence[str]) -> list[Cell]:
    """A cell for every row and column that any run is in."""
    divided: dict[str, list[RunRecord]] = {}
    for run in runs:
        divided.setdefault(same([value(run, key) for key in plan.keys]), []).append(run)
    return [_cell(members, plan, tuned) for members in divided.values()]


def _cell(members: Sequence[RunRecord], plan: Plan, tuned: Sequence[str]) -> Cell:
    tries: dict[str, list[RunRecord]] = {}
    for run in sorted(members, key=lambda run: order(tuple(run.keys.get(k) for k in tuned))):
        tries.setdefault(same([run.keys.get(key) for key in tuned]), []).append(run)
    best = _best(list(tries.values()), plan)
    of_best = sorted(best, key=lambda run: order((run.seed,)))
    scored = [run for run in of_best if is_scored(run, plan.metric)]
    first = members[0]
    return Cell(
        row=tuple(value(first, key) for key in plan.rows),
        column=tuple(value(first, key) for key in plan.columns),
        chosen={key: best[0].keys.get(key) for key in tuned},
        tried=len(tries),
        runs=tuple(run for run in scored if plan.reports(run)),
        tuning=tuple(run for run in scored if plan.tunes(run)),
        waiting=tuple(run for run in members if not is_scored(run, plan.metric)),
    )


def _best(tries: Sequence[list[RunRecord]], plan: Plan) -> list[RunRecord]:
    """The combination of values with the best mean over the seeds that choose: the tuning seeds
    where a cell has any, else all. Only those compete that have all these seeds and none failed;
    where that is none, those with the most seeds. Among equals the first that is reported, which a
    search has chosen.
    """
    tuning = any(plan.tunes(run) for runs in tries for run in runs)

    def scores(runs: Sequence[RunRecord]) -> dict[int | None, float]:
        counted = [run for run in runs if is_scored(run, plan.metric)]
        return {r.seed: r.metrics[plan.metric] for r in counted if plan.tunes(r) or not tuning}

    scored = [(runs, list(scores(runs).values())) for runs in tries]
    most = max(len(found) for _, found in scored)
    if most == 0:
        return tries[0]
    competing = [(aggregate(found, "mean"), runs) for runs, found in scored if len(found) == most]
    competing.sort(key=lambda one: not any(map(plan.reports, one[1])))
    best = competing[0]
    for one in competing[1:]:
        best = one if is_better(plan.metric, one[0], best[0]) else best
    return best[1]


def order(values: Iterable[Any]) -> list[tuple[int, float, str]]:
    """A key that sorts numbers by size, before words."""
    return [
        (0, float(v), "") if isinstance(v, int | float) else (1, 0.0, json.dumps(v, default=str))
        for v in values
    ]


# -- Doubles ---------------------------------------------------------------------------------------
def without_doubles(
    runs: Sequence[RunRecord], plan: Plan, tuned: Sequence[str]
) -> tuple[list[RunRecord], list[RunRecord]]:
    """Of several runs with the same seed and values the newest done one, and what was left out: a
    seed counts once.
    """
    kept: dict[str, RunRecord] = {}
    left = []
    for run in sorted(runs, key=_age):
        same_run = same([value(run, key) for key in (*plan.keys, *tuned, "seed")])
        if same_run in kept:
            left.append(kept[same_run])
        kept[same_run] = run
    return sorted(kept.values(), key=lambda run: run.folder), left


def _age(run: RunRecord) -> tuple[bool, str]:
    return run.state == "done", run.result.get("run_info", {}).get("created_at", "")
