"""The table of a paper from runs: a metric over seeds by rows and columns, what it took, how tuned
values were chosen, and what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from peftcli.errors import ConfigError
from peftcli.tables import missing, protocol
from peftcli.tables.cells import (
    Plan,
    known_key,
    known_metric,
    make_cells,
    tuned_keys,
    without_doubles,
)
from peftcli.tables.columns import bold_best, make_columns, make_rows, paired_columns
from peftcli.tables.notes import notes
from peftcli.tables.protocol import Difference
from peftcli.tables.render import Table
from peftcli.tables.runs import RunRecord
from peftcli.tables.statistics import Aggregate


@dataclass(frozen=True)
class Asked:
    """A table as it is asked for; keys and the metric in the user's words."""

    rows: tuple[str, ...] = ("method",)
    columns: tuple[str, ...] = ()
    metric: str | None = None
    how: Aggregate = "mean"
    paired: str | None = None  # the row that the others are compared with
    tuning_seeds: tuple[int, ...] = ()
    test_seeds: tuple[int, ...] = ()
    show_differences: bool = False


def table_of(runs: Sequence[RunRecord], plan: Plan, paired: str | None = None) -> Table:
    """The table of a plan; `paired`: the row that the others are compared with."""
    tuned = tuned_keys(runs, plan.keys)
    kept, doubles = without_doubles(runs, plan, tuned)
    cells = make_cells(kept, plan, tuned)
    rows = make_rows(cells, plan)
    columns = make_columns(rows, plan, tuned)
    if paired is not None:
        columns += paired_columns(paired, rows, plan)
    made = [[make(row) for row in rows] for _, make in columns]
    made = [
        bold_best(cells, plan.metric) if column.key.startswith(plan.metric) else cells
        for (column, _), cells in zip(columns, made, strict=True)
    ]
    return Table(
        title=f"{plan.metric} by {', '.join(plan.keys)}",
        header=tuple(column for column, _ in columns),
        rows=tuple(zip(*made, strict=True)),
        notes=tuple(notes(kept, cells, doubles, plan, tuned, paired)),
        missing=tuple(missing.commands(cells, plan)),
        failed=tuple(missing.failures(kept, plan.metric)),
    )


def plan_of(runs: Sequence[RunRecord], asked: Asked) -> Plan:
    """What the user's words mean for these runs, with a row key for each difference of the protocol
    that is to be shown.

    Raises `ConfigError` where a key, the metric or a row is unknown, seeds overlap, or the runs'
    protocols differ and the table does not show it.
    """
    plan = _in_keys(runs, asked)
    hidden = list(_hidden(runs, plan))
    if not asked.show_differences:
        protocol.refuse(hidden)
    more = dict.fromkeys(one.key for one in hidden)
    return replace(plan, rows=(*plan.rows, *more))


def _in_keys(runs: Sequence[RunRecord], asked: Asked) -> Plan:
    """The plan in the runs' own keys. Seeds that are not given are those of the runs' sweeps, where
    these told them apart.
    """
    sweeps = {run.sweep.folder: run.sweep for run in runs if run.sweep is not None}.values()
    tuning = {*asked.tuning_seeds} or {seed for s in sweeps for seed in s.tuning_seeds}
    test = {*asked.test_seeds} or {seed for s in sweeps for seed in s.test_seeds}
    if tuning & test:
        raise ConfigError(
            f"seeds {sorted(tuning & test)} are both tuning and test seeds: what chose a value "
            "cannot be reported."
        )
    rows, columns = (
        [known_key(word, runs) for word in some] for some in (asked.rows, asked.columns)
    )
    if len({*rows, *columns}) < len(rows) + len(columns):
        raise ConfigError("--rows and --columns: each key can stand there once.")
    return Plan(
        rows=tuple(rows),
        columns=tuple(columns),
        metric=known_metric(asked.metric, runs),
        tuning_seeds=frozenset(tuning),
        test_seeds=frozenset(test),
        how=asked.how,
    )


def _hidden(runs: Sequence[RunRecord], plan: Plan) -> Iterator[Difference]:
    """What reported runs differ in among themselves, and tuning runs among themselves: a tuning
    split is other data by right.
    """
    yield from protocol.differences(filter(plan.reports, runs), plan.keys)
    yield from protocol.differences(filter(plan.tunes, runs), plan.keys)
