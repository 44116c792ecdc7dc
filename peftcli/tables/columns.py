"""The columns of a table: what each shows of a row."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftcli.errors import ConfigError, did_you_mean
from peftcli.screen import duration, number, size
from peftcli.tables import statistics
from peftcli.tables.cells import Cell, Place, Plan, order
from peftcli.tables.protocol import same, short
from peftcli.tables.render import PLUS_MINUS, Column
from peftcli.tables.render import Cell as Shown
from peftcli.tables.runs import RunRecord
from peftcli.train.better import HIGHER_IS_BETTER, is_better

Make = Callable[["Row"], Shown]
Columns = list[tuple[Column, Make]]


@dataclass(frozen=True)
class Row:
    """The cells of one row by their columns' places."""

    place: Place
    cells: Mapping[str, Cell]

    @property
    def runs(self) -> list[RunRecord]:
        """The reported runs of all cells."""
        return [run for cell in self.cells.values() for run in cell.runs]

    def score(self, plan: Plan) -> float | None:
        """One number over all cells that have one."""
        values = [v for cell in self.cells.values() for v in cell.values(plan.metric).values()]
        return statistics.aggregate(values, plan.how) if values else None


def make_rows(cells: Sequence[Cell], plan: Plan) -> list[Row]:
    """Rows in order: by their values where these are numbers, else the best first."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(same(cell.row), []).append(cell)
    rows = [Row(some[0].row, {same(c.column): c for c in some}) for some in grouped.values()]
    rows.sort(key=lambda row: order(row.place))
    if all(isinstance(row.place[0], int | float) for row in rows):
        return rows
    sign = -1.0 if is_better(plan.metric, 1.0, 0.0) else 1.0

    def best_first(row: Row) -> tuple[bool, float]:
        score = row.score(plan)
        return score is None, 0.0 if score is None else sign * score

    return sorted(rows, key=best_first)


def make_columns(rows: Sequence[Row], plan: Plan, tuned: Sequence[str]) -> Columns:
    """All columns in their order."""
    columns: Columns = [(Column(key, key), _place(i)) for i, key in enumerate(plan.rows)]
    columns += _of_metric(rows, plan)
    columns += [(Column(key, key), _chosen(key)) for key in tuned]
    if tuned:
        columns.append((Column("tried", "tried"), _over_cells(lambda cell: cell.tried, number)))
    if any(cell.tuning for row in rows for cell in row.cells.values()):
        columns.append((Column("tuning gap", "tuning_gap"), _gap(plan)))
    columns.append((Column("seeds", "seeds"), _seeds))
    return columns + _costs()


# -- The metric ------------------------------------------------------------------------------------
def metric_text(metric: str, value: float) -> str:
    """A metric as papers print it: those that are fractions in per cent."""
    return f"{100 * value:.1f}" if metric in HIGHER_IS_BETTER else number(value)


def _of_metric(rows: Sequence[Row], plan: Plan) -> Columns:
    """One column a place; of several also one over all."""
    places = {key: cell.column for row in rows for key, cell in row.cells.items()}
    in_order = sorted(places, key=lambda key: order(places[key]))
    unit = ", %" if plan.metric in HIGHER_IS_BETTER else ""
    if not plan.columns:
        return [(Column(plan.metric + unit, plan.metric), _metric(in_order, plan))]
    columns: Columns = []
    for key in in_order:
        name = ", ".join(short(v) for v in places[key])
        columns.append((Column(name + unit, f"{plan.metric}: {name}"), _metric([key], plan)))
    if len(in_order) > 1:
        columns.append((Column("all" + unit, f"{plan.metric}: all"), _metric(in_order, plan)))
    return columns


def _metric(keys: Sequence[str], plan: Plan) -> Make:
    """The seeds of the cells of these places together; missing where one of them is."""

    def make(row: Row) -> Shown:
        cells = [row.cells[key] for key in keys if key in row.cells]
        found = [list(cell.values(plan.metric).values()) for cell in cells]
        if len(found) < len(keys) or not all(found):
            return Shown()
        values = [value for some in found for value in some]
        return measured(plan.metric, values, plan.how)

    return make


def measured(metric: str, values: Sequence[float], how: statistics.Aggregate = "mean") -> Shown:
    """A cell of a metric's values over seeds."""
    value, spread = statistics.aggregate(values, how), statistics.deviation(values)
    interval = statistics.interval(values, how)
    text = metric_text(metric, value)
    if how == "iqm" and interval is not None:
        text += f" [{', '.join(metric_text(metric, end) for end in interval)}]"
    elif spread is not None:
        text += f" {PLUS_MINUS} {metric_text(metric, spread)}"
    return Shown(text, value, spread, interval, len(values))


def bold_best(cells: Sequence[Shown], metric: str) -> list[Shown]:
    """The same cells, the best one bold where its interval overlaps no other's."""
    known = [cell for cell in cells if cell.value is not None]
    if len(known) < 2 or any(cell.interval is None for cell in known):
        return list(cells)
    sign = 1 if is_better(metric, 1.0, 0.0) else -1
    best = max(known, key=lambda cell: sign * _number(cell))

    low, high = best.interval or (0.0, 0.0)

    def apart(cell: Shown) -> bool:
        return cell.interval is not None and (cell.interval[1] < low or high < cell.interval[0])

    if all(cell is best or apart(cell) for cell in known):
        return [replace(cell, bold=cell is best) for cell in cells]
    return list(cells)


def _number(cell: Shown) -> float:
    assert isinstance(cell.value, int | float)
    return cell.value


# -- Paired ----------------------------------------------------------------------------------------
def paired_columns(word: str, rows: Sequence[Row], plan: Plan) -> Columns:
    """How far each row is above the row called `word`, on the same columns and seeds."""
    names = {short(row.place[0]): row for row in rows}
    if word not in names:
        raise ConfigError(
            f"--paired {word}: no such row.{did_you_mean(word, names)} Rows: {', '.join(names)}."
        )
    base = names[word]

    def compared(row: Row) -> statistics.Paired | None:
        pairs = [
            (mine[seed], theirs[seed])
            for key in row.cells.keys() & base.cells.keys()
            if (mine := row.cells[key].values(plan.metric)) is not None
            and (theirs := base.cells[key].values(plan.metric)) is not None
            for seed in mine.keys() & theirs.keys()
        ]
        return None if row is base or not pairs else statistics.paired(*zip(*pairs, strict=True))

    def difference(row: Row) -> Shown:
        if (found := compared(row)) is None:
            return Shown()
        ends = found.interval or ()
        text = _signed(plan.metric, found.difference)
        text += f" [{', '.join(_signed(plan.metric, end) for end in ends)}]" if ends else ""
        return Shown(text, found.difference, None, found.interval, found.pairs)

    def p(row: Row) -> Shown:
        found = compared(row)
        return Shown() if found is None else Shown(f"{found.p:.2g}", found.p)

    def pairs(row: Row) -> Shown:
        found = compared(row)
        return Shown() if found is None else Shown(str(found.pairs), found.pairs)

    title = f"- {word}"
    return [
        (Column(f"{title} [95 %]", f"minus {word}"), difference),
        (Column("p", "p"), p),
        (Column("pairs", "pairs"), pairs),
    ]


def _signed(metric: str, value: float) -> str:
    text = metric_text(metric, value)
    return text if text.startswith("-") else f"+{text}"


# -- What it took ----------------------------------------------------------------------------------
def _costs() -> Columns:
    def train(name: str) -> Callable[[RunRecord], float | None]:
        return lambda run: run.train_info.get(name)

    return [
        (Column("trainable", "num_trainable_params"), _same(train("num_trainable_params"), number)),
        (Column("adapter", "adapter_bytes"), _same(train("file_size"), size)),
        (Column("optimizer", "optimizer_bytes"), _same(train("optimizer_bytes"), size)),
        (Column("peak memory", "peak_memory_bytes"), _over_runs(train("peak_memory"), max, size)),
        (Column("time", "train_seconds"), _over_runs(train("train_time"), plain.fmean, duration)),
        (
            Column("tokens/s", "tokens_per_second"),
            _over_runs(train("tokens_per_second"), plain.fmean, lambda v: f"{v:,.0f}"),
        ),
    ]


def _over_runs(
    of: Callable[[RunRecord], float | None],
    together: Callable[[Iterable[float]], float],
    text: Callable[[Any], str],
) -> Make:
    """One number for all reported runs of a row."""

    def make(row: Row) -> Shown:
        values = [v for run in row.runs if (v := of(run)) is not None]
        return Shown(text(together(values)), together(values)) if values else Shown()

    return make


def _same(of: Callable[[RunRecord], float | None], text: Callable[[Any], str]) -> Make:
    """What the reported runs of a row share; smallest .. largest where they do not."""
    return lambda row: span([v for run in row.runs if (v := of(run)) is not None], text)


def _over_cells(of: Callable[[Cell], int], text: Callable[[Any], str]) -> Make:
    return lambda row: span([of(cell) for cell in row.cells.values()], text)


def _seeds(row: Row) -> Shown:
    return span([len(cell.runs) for cell in row.cells.values() if cell.runs], number)


def span(values: Sequence[float], text: Callable[[Any], str]) -> Shown:
    """One number where all are equal; else smallest .. largest, and their mean for machines."""
    if not values:
        return Shown()
    low, high = min(values), max(values)
    words = text(low) if text(low) == text(high) else f"{text(low)} .. {text(high)}"
    return Shown(words, low if low == high else plain.fmean(values))


# -- What was chosen -------------------------------------------------------------------------------
def _place(i: int) -> Make:
    def make(row: Row) -> Shown:
        value = row.place[i]
        return Shown(short(value), value if isinstance(value, int | float | str) else short(value))

    return make


def _chosen(key: str) -> Make:
    """The best values of a tuned key, one where all cells of the row share it."""

    def make(row: Row) -> Shown:
        values = {same(c.chosen[key]): c.chosen[key] for c in row.cells.values()}
        if len(values) == 1:
            value = next(iter(values.values()))
            return Shown(short(value), value if isinstance(value, int | float) else short(value))
        text = ", ".join(map(short, values.values()))
        return Shown(text, text)

    return make


def _gap(plan: Plan) -> Make:
    """How much better the best values look on the seeds that chose them."""

    sign = 1 if is_better(plan.metric, 1.0, 0.0) else -1

    def make(row: Row) -> Shown:
        gaps = [
            sign * plain.fmean(run.metrics[plan.metric] for run in cell.tuning)
            - sign * plain.fmean(cell.values(plan.metric).values())
            for cell in row.cells.values()
            if cell.tuning and cell.runs
        ]
        return span(gaps, lambda gap: _signed(plan.metric, gap))

    return make
