"""`peft-train table +table=NAME`: what a paper printed beside what is counted and measured here.

Parameters are counted now, on models without weights; scores come from runs.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftcli import config, hydra_app
from peftcli.build import empty_host
from peftcli.core.graft import is_own
from peftcli.settings import Run
from peftcli.sweep.line import Composer
from peftcli.tables import render
from peftcli.tables.paper import Paper, Row, as_printed, is_run_of, key_of, mean, over
from peftcli.tables.render import PLUS_MINUS, Cell, Table
from peftcli.tables.runs import RunRecord


@dataclass(frozen=True)
class Count:
    """What trains, and what a percentage of it is of; with several heads the mean over them."""

    parameters: float
    whole: int

    def agrees(self, printed: str) -> bool:
        """Whether the printed digits are those of this count."""
        return as_printed(self.parameters, self.whole, printed) == printed


def count(run: Run, paper: Paper, row: Row) -> Count:
    """What trains in a row, counted as its paper does, on a model without weights."""
    heads = paper.head if row.head is None else row.head
    counts = {classes: _count(run, paper, row, classes) for classes in set(heads) or {None}}
    trained = statistics.fmean(counts[classes].parameters for classes in heads or [None])
    return Count(trained, next(iter(counts.values())).whole)


def _count(run: Run, paper: Paper, row: Row, classes: int | None) -> Count:
    host, _ = empty_host(run, classes)
    host.add(run.method)
    if row.stored:
        run.method.finish(host)
    added = sum(p.numel() for name, p in host.model.named_parameters() if is_own(name))
    trained, everything = host.num_parameters()
    return Count(trained, everything - added if paper.share_of == "base" else everything)


# -- Measured --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    """Scores of a cell over seeds, in the paper's unit, from runs that are done."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def text(self) -> str:
        """For people."""
        spread = "" if self.deviation is None else f"{PLUS_MINUS}{self.deviation:.2f}"
        return f"{self.mean:.2f}{spread} ({len(self.scores)})"


def measured(
    paper: Paper, row: Row, runs: Sequence[RunRecord], extra: Sequence[str] = ()
) -> dict[str, Measured]:
    """A row's scores by column, from those of the runs that were started with its cells' words.

    A mean of columns is taken over the seeds that all of them have.
    """
    by_seed: dict[str, dict[Any, float]] = {}
    for column in paper.columns:
        words = paper.words(row, column)
        if words is None or column.metric is None:
            continue
        wanted = over(words, extra)
        found = {
            run.seed: run.metrics[column.metric] * column.scale
            for run in runs
            if run.state == "done"
            and column.metric in run.metrics
            and is_run_of(wanted, words_of(run))
        }
        by_seed[column.name] = found
    for column in paper.columns:
        if column.mean_of:
            of = [by_seed.get(name, {}) for name in column.mean_of]
            seeds = set(of[0]).intersection(*of[1:])
            each = {s: {n: by_seed[n][s] for n in column.mean_of} for s in seeds}
            by_seed[column.name] = {s: m for s in each if (m := mean(column, each[s])) is not None}
    return {name: Measured(tuple(found.values())) for name, found in by_seed.items() if found}


def words_of(run: RunRecord) -> tuple[str, ...]:
    """The overrides that a run was started with: a member's own, and what its line gives to all."""
    own = run.overrides
    kept = Path(run.folder, ".hydra", "overrides.yaml")
    if not own and kept.is_file():
        own = tuple(map(str, yaml.safe_load(kept.read_text(encoding="utf-8")) or ()))
    keys = {key_of(word) for word in own}
    line = run.sweep.line if run.sweep else ()
    return (*own, *(word for word in line if key_of(word) not in keys))


# -- The table -------------------------------------------------------------------------------------
def make_table(
    name: str,
    paper: Paper,
    runs: Sequence[RunRecord] = (),
    extra: Sequence[str] = (),
    config_dirs: Sequence[Path] = (),
    *,
    wide: bool = False,
) -> Table:
    """Printed beside here; `wide` gives each a column of its own. `extra` are words that the runs
    were started with beside the table's.
    """
    composer, notes, rows = Composer(config_dirs), [], []
    for row in paper.rows:
        counted = (
            None
            if row.overrides is None or row.reason
            else count(run_of(composer, paper, row), paper, row)
        )
        found = measured(paper, row, runs, extra)
        notes += _notes(paper, row, counted, found)
        line = [Cell(row.name, row.name), *_parameters(row, counted, wide)]
        for column in paper.columns:
            line += _score(row.scores.get(column.name), found.get(column.name), wide)
        certainty = row.certainty or paper.certainty
        rows.append((*line, Cell(certainty, certainty)))
    return Table(
        f"{paper.title}{'' if wide else ': printed | here'} ({paper.source.line})",
        _header(paper, wide),
        tuple(rows),
        (*notes, *_of_columns(paper), *([paper.notes] if paper.notes else [])),
        _commands(name, paper, extra),
    )


def run_of(composer: Composer, paper: Paper, row: Row) -> Run:
    """The run that a row's words make, checked."""
    words = hydra_app.normalised(paper.words(row) or (), composer.config_dirs)
    _, cfg = composer.member(words)
    return config.typed(cfg, composer.config_dirs)


def _header(paper: Paper, wide: bool) -> tuple[render.Column, ...]:
    parts = [" printed", " here"] if wide else [""]
    between = ["parameters", *(c.name for c in paper.columns)]
    titles = ["method", *(f"{name}{part}" for name in between for part in parts), "printed is"]
    return tuple(render.Column(title, title) for title in titles)


def _parameters(row: Row, counted: Count | None, wide: bool) -> list[Cell]:
    printed = Cell(row.parameters, row.parameters) if row.parameters else Cell()
    here = Cell()
    if counted is not None:
        here = Cell(f"{counted.parameters:,.0f}", round(counted.parameters))
    return _side_by_side(printed, here, wide)


def _score(printed: float | None, found: Measured | None, wide: bool) -> list[Cell]:
    left = Cell() if printed is None else Cell(str(printed), printed)
    right = Cell()
    if found is not None:
        right = Cell(found.text, found.mean, found.deviation, seeds=len(found.scores))
    return _side_by_side(left, right, wide)


def _side_by_side(printed: Cell, here: Cell, wide: bool) -> list[Cell]:
    if wide:
        return [printed, here]
    if printed.value is here.value is None:
        return [Cell()]
    return [Cell(f"{printed.text} | {here.text}", here.value)]


def _notes(
    paper: Paper, row: Row, counted: Count | None, found: Mapping[str, Measured]
) -> list[str]:
    """What must be said of a row."""
    said = []
    if counted is not None and row.parameters and not counted.agrees(row.parameters):
        here = as_printed(counted.parameters, counted.whole, row.parameters)
        why = row.explains or "not explained"
        said.append(f"{row.name}: printed {row.parameters}, here {here}: {why}")
    said += [f"{row.name}: {text}" for text in (row.reason, row.remark) if text]
    for column in paper.columns:
        if (limit := column.collapsed_below) is None:
            continue
        printed, here = row.scores.get(column.name, math.inf), found.get(column.name)
        of = {"printed": printed, **({"measured": min(here.scores)} if here else {})}
        said += [
            f"{row.name}: {column.name} {score:g} ({which}) is of a collapsed run"
            for which, score in of.items()
            if score < limit
        ]
    return said


def _of_columns(paper: Paper) -> list[str]:
    """Why no run fills a column, once for each reason."""
    names: dict[str, list[str]] = {}
    for column in paper.columns:
        if column.reason:
            names.setdefault(column.reason, []).append(column.name)
    return [f"{', '.join(columns)}: {reason}" for reason, columns in names.items()]


def _commands(name: str, paper: Paper, extra: Sequence[str]) -> tuple[str, ...]:
    """The command that runs what runs can fill."""
    runnable = any(paper.words(row, column) for row in paper.rows for column in paper.columns)
    words = ["peft-train", "-m", f"+table={name}", *extra]
    return (shlex.join(words),) if runnable else ()
