"""What a table lacks, and the commands that would fill it."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from peftcli import folders
from peftcli.tables.cells import Cell, Plan, is_scored
from peftcli.tables.protocol import explains, is_protocol, is_tuned, same
from peftcli.tables.runs import RunRecord
from peftcli.written import defaults, override


def failures(runs: Iterable[RunRecord], metric: str) -> list[str]:
    """The runs that ended without a number, and why."""
    lines = []
    for run in runs:
        if run.state in ("failed", "pruned"):
            lines.append(f"{_called(run)}: {run.reason or run.state}")
        elif run.state == "done" and not is_scored(run, metric):
            has = ", ".join(run.metrics) or "no metric"
            finite = "is not finite" if metric in run.metrics else f"is not there, only {has}"
            lines.append(f"{_called(run)}: {metric} {finite}")
    return sorted(lines)


def _called(run: RunRecord) -> str:
    """A run by what it was asked for, and its folder."""
    return f"{' '.join(run.overrides)} ({run.name})" if run.overrides else run.name


def commands(cells: Sequence[Cell], plan: Plan) -> list[str]:
    """One command for each run that a cell waits for, or for all those of one sweep."""
    grid = {(same(cell.row), same(cell.column)): cell for cell in cells}
    wanted = {run.seed for cell in cells for run in cell.runs}
    waiting = [run for cell in cells for run in cell.waiting if run.state != "pruned"]
    wanted |= {run.seed for run in waiting if plan.reports(run)}
    found: dict[str, None] = {}
    for row, column in itertools.product(*map(dict.fromkeys, zip(*grid, strict=True))):
        cell = grid.get((row, column))
        found |= dict.fromkeys(_to_finish(cell) if cell else ())
        there = {run.seed for run in (*cell.runs, *cell.waiting)} if cell else set()
        of_row = [c for (r, _), c in grid.items() if r == row]
        of_column = [c for (_, c_), c in grid.items() if c_ == column]
        at = dict(zip(plan.keys, (*of_row[0].row, *of_column[0].column), strict=True))
        wanted_here = {at["seed"]} if "seed" in at else wanted
        for seed in sorted(seed for seed in wanted_here - there if seed is not None):
            found |= dict.fromkeys(_to_start(cell, of_row, of_column, seed, plan))
    return list(found)


def _to_finish(cell: Cell) -> Iterator[str]:
    """What takes up the runs that are there; those that are done and have no number, and those
    that a sweep gave up for good, are not taken up.
    """
    for run in cell.waiting:
        if run.state in ("done", "pruned"):
            continue
        if run.sweep is None:
            yield _line(run.name)
        else:
            again = ["--retry-failed"] if run.state == "failed" else []
            yield _line("-m", *run.sweep.line, *again)


def _to_start(
    cell: Cell | None, of_row: Sequence[Cell], of_column: Sequence[Cell], seed: int, plan: Plan
) -> Iterator[str]:
    """What runs one seed of a row in a column: another seed of it; else a run that has the protocol
    of the place, which the column has or else the row, with the best values that go there.
    """
    if cell is not None and cell.runs:
        yield _from(cell.runs[0], {"seed": seed})
        return
    there, other, kept, copied = of_column, of_row, plan.columns, plan.rows
    if any(map(explains, plan.rows)) and not any(map(explains, plan.columns)):
        there, other, kept, copied = other, there, copied, kept
    base, like = _best_known(there), _best_known([cell] if cell else other)
    if base is not None and like is not None:
        yield _from(base, {**_changes(base.keys, like.keys, copied, kept), "seed": seed})


def _best_known(cells: Sequence[Cell]) -> RunRecord | None:
    """A run of these cells whose configuration is known: a reported one before others."""
    runs = [r for kind in ("runs", "tuning", "waiting") for c in cells for r in getattr(c, kind)]
    return next((run for run in runs if "run_dir" in run.keys), None)


def _changes(
    base: Mapping[str, Any], like: Mapping[str, Any], copied: Sequence[str], kept: Sequence[str]
) -> dict[str, Any]:
    """What makes a run such as `like` of `base`: the tuned keys that differ, of another method what
    is not its default, the keys in `copied`, and what else of their groups is protocol; nothing
    that is in `kept`.
    """
    groups = {key.partition(".")[0] for key in copied if explains(key)}
    usual, changes = dict(base), {}
    if base["method"] != like["method"] and "method" not in kept:
        changes["method"] = like["method"]
        of_method = defaults("method", str(like["method._target_"]))
        usual |= {f"method.{key}": given for key, given in of_method.items()}
    for key, given in like.items():
        group, dot, _ = key.partition(".")
        moves = is_tuned(key) or key in copied or (is_protocol(key) and group in groups)
        if dot and moves and not {key, group} & set(kept) and usual.get(key) != given:
            changes[key] = given
    return changes


def _from(run: RunRecord, changes: Mapping[str, Any]) -> str:
    """The run of a folder again, changed, in a folder beside it."""
    words = [override(key, given) for key, given in changes.items()]
    parts = [f"{'' if k == 'method' else k.rpartition('.')[2]}{v}" for k, v in changes.items()]
    shown = [re.sub(r"[^\w.+-]", "", part) for part in parts]
    beside = run.sweep.folder if run.sweep else run.folder
    return _line(run.name, *words, f"run_dir={folders.shown(beside.parent / '-'.join(shown))}")


def _line(*words: str) -> str:
    return shlex.join(("peft-train", *words))
