"""Published tables: what a paper printed, as rows and columns of overrides that would run it.

One file a table, in `configs/table/` or in a user's `--config-dir`; every key is in the dataclasses
here, and a key that is not is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from peftcli import folders
from peftcli.config import Check
from peftcli.errors import ConfigError, did_you_mean
from peftcli.folders import shown
from peftcli.tables import render
from peftcli.tables.render import Cell, Table

SUITES = Path(__file__).with_name("suites.yaml")
Certainty = Literal["read", "recalled", "derived", "uncertain"]
_PRINTED = re.compile(r"(?P<whole>[\d,]+)(\.(?P<digits>\d+))?(?P<unit>[KMB%]?)")
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Source:
    """Where the numbers were printed."""

    title: str
    authors: str
    year: int
    table: str  # which of the paper's
    arxiv: str | None = None  # null: no paper printed it

    @property
    def line(self) -> str:
        """Who printed it, where."""
        paper = f"arXiv {self.arxiv}, " if self.arxiv else ""
        return f"{self.authors} {self.year}, {paper}{self.table}"


@dataclass(frozen=True)
class Column:
    """A data set with its metric, or the mean of other columns."""

    name: str
    split: str = ""  # what the paper measured on
    metric: str | None = "accuracy"  # of a run's result; null: none that we measure
    overrides: tuple[str, ...] = ()  # which data
    scale: float = 100.0  # printed number / a run's
    mean_of: tuple[str, ...] = ()  # other columns, in place of data
    collapsed_below: float | None = (
        None  # printed numbers under it are of runs that learned nothing
    )
    reason: str | None = None  # why no run fills it


@dataclass(frozen=True)
class Row:
    """A method at the paper's hyper-parameters, with what was printed of it."""

    name: str
    overrides: tuple[str, ...] | None  # null: no run of ours, for `reason`
    parameters: str | None = None  # as printed: 0.3M, 24K, 0.84%, "20,480"
    scores: dict[str, float] = field(default_factory=dict)  # by column
    columns: tuple[str, ...] = ()  # the only ones that it has; (): all
    head: tuple[int, ...] | None = None  # in place of the table's
    stored: bool = False  # printed is what is stored, once what only training needs is folded
    certainty: Certainty | None = None  # in place of the table's
    explains: str | None = None  # why the printed parameters differ from ours
    reason: str | None = None  # why there is no run, or no count
    remark: str | None = None  # anything else to know


@dataclass(frozen=True)
class Paper:
    """A published table. `head`: classes of the fresh heads that the printed parameters count, one
    a data set, of which the mean is taken; (): none is counted.
    """

    title: str
    source: Source
    certainty: Certainty  # of the printed numbers
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = ()
    suite: str | None = None  # columns of suites.yaml, before the table's own
    overrides: tuple[str, ...] = ()  # of every cell
    head: tuple[int, ...] = ()
    share_of: Literal["base", "all"] = "all"  # what a printed percentage is of; all: with adapter
    seeds: tuple[int, ...] = (0,)
    notes: str = ""

    def column(self, name: str) -> Column:
        """The column of that name."""
        return next(c for c in self.columns if c.name == name)

    def words(self, row: Row, column: Column | None = None) -> tuple[str, ...] | None:
        """The overrides of a cell, or of a row; None where no run makes it."""
        if row.overrides is None:
            return None
        if column is None:
            return (*self.overrides, *row.overrides)
        if (
            column.metric is None
            or column.mean_of
            or column.name not in (row.columns or [column.name])
        ):
            return None
        return (*self.overrides, *row.overrides, *column.overrides)


def names(config_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """Every table's file by its name."""
    return folders.choices("table", config_dirs)


def read(name: str, config_dirs: Iterable[Path] = ()) -> Paper:
    """The table of that name. Raises `ConfigError` where there is none, or where its file says what
    no table has.
    """
    found = names(config_dirs)
    if name not in found:
        given = f"no table {name!r}.{did_you_mean(name, found)}" if name else "+table takes a name."
        raise ConfigError(f"{given} All: {', '.join(sorted(found))}.")
    path = found[name]
    try:
        values = yaml.safe_load(folders.text_of(path))
    except yaml.YAMLError as e:
        raise ConfigError(f"{shown(path)}: is no YAML ({e}).") from None
    try:
        return _typed(values)
    except ConfigError as e:
        raise ConfigError(f"{shown(path)}: {e}") from None


def _typed(values: Any) -> Paper:
    if not isinstance(values, dict):
        raise ConfigError("holds no mapping of keys.")
    check = Check({}, [])
    check.keys("", Paper, values)
    if isinstance(values["source"], dict):
        check.keys("source", Source, values["source"])
    if suite := values.get("suite"):
        values["columns"] = [*_suite(suite), *values.get("columns", ())]
    paper: Paper = check.values("", Paper, values)
    _same_names(paper)
    for row in paper.rows:
        if row.parameters and not _PRINTED.fullmatch(row.parameters):
            raise ConfigError(f"parameters={row.parameters}: takes 0.3M, 24K, 0.84% or 20,480.")
        if row.overrides is None and not row.reason:
            raise ConfigError(f"row {row.name!r}: without overrides it needs a reason.")
    for column in paper.columns:
        if column.metric is None and not column.reason:
            raise ConfigError(f"column {column.name!r}: without a metric it needs a reason.")
    return paper


def _same_names(paper: Paper) -> None:
    """Refuse a row or column that is named and not there, and two of one name."""
    columns = [column.name for column in paper.columns]
    for kind, given in (("row", [r.name for r in paper.rows]), ("column", columns)):
        if twice := {name for name in given if given.count(name) > 1}:
            raise ConfigError(f"two {kind}s are named {min(twice)!r}.")
        if listed := [name for name in given if "," in name]:
            raise ConfigError(
                f"{kind} {listed[0]!r}: names have no commas, which part them in lists."
            )
    asked = [name for c in paper.columns for name in c.mean_of]
    asked += [name for row in paper.rows for name in (*row.scores, *row.columns)]
    for name in asked:
        if name not in columns:
            raise ConfigError(
                f"no column {name!r}.{did_you_mean(name, columns)} Columns: {', '.join(columns)}."
            )


def _suite(name: str) -> list[dict[str, Any]]:
    suites = _suites()
    if name not in suites:
        raise ConfigError(f"suite={name}: is none of {', '.join(suites)}.")
    return suites[name]


@cache
def _suites() -> dict[str, list[dict[str, Any]]]:
    return yaml.safe_load(SUITES.read_text(encoding="utf-8"))


# -- Numbers as they are printed -------------------------------------------------------------------
def as_printed(count: float, base: int, like: str) -> str:
    """`count` in the unit and with the digits of `like`; of a percentage, `base` is the whole."""
    match = _PRINTED.fullmatch(like)
    assert match is not None, like
    value = 100 * count / base if match["unit"] == "%" else count / _UNITS[match["unit"]]
    comma = "," if "," in like else ""
    return f"{value:{comma}.{len(match['digits'] or '')}f}{match['unit']}"


# -- What a command line asks for ------------------------------------------------------------------
@dataclass(frozen=True)
class Asked:
    """A table by its name, and which of its rows and columns; (): all."""

    name: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    def of(self, paper: Paper) -> Paper:
        """The table with these rows and columns alone. Raises `ConfigError` for a name that it does
        not have.
        """
        for key, chosen, of in (
            ("rows", self.rows, paper.rows),
            ("columns", self.columns, paper.columns),
        ):
            there = [each.name for each in of]
            for name in chosen:
                if name not in there:
                    hint = did_you_mean(name, there)
                    raise ConfigError(f"table.{key}: no {name!r}.{hint} All: {', '.join(there)}.")
        rows = tuple(r for r in paper.rows if r.name in (self.rows or [r.name]))
        columns = tuple(c for c in paper.columns if c.name in (self.columns or [c.name]))
        return dataclasses.replace(paper, rows=rows, columns=columns)


def asked_of(words: Sequence[str]) -> tuple[Asked, list[str]]:
    """What `+table=NAME`, `table.rows=[...]` and `table.columns=[...]` ask for, and the words that
    are none of these.
    """
    said = {key_of(w): w.partition("=")[2] for w in words if key_of(w).split(".")[0] == "table"}
    for key in said:
        if key not in ("table", "table.rows", "table.columns"):
            raise ConfigError(f"{key}: of a table there are table.rows and table.columns.")
    chosen = {key: _listed(said.get(f"table.{key}", "")) for key in ("rows", "columns")}
    rest = [word for word in words if key_of(word) not in said]
    return Asked(said.get("table", ""), **chosen), rest


def _listed(text: str) -> tuple[str, ...]:
    """`[a, b]` or `a,b`."""
    text = text.strip()
    inside = text[1:-1] if text.startswith("[") else text
    return tuple(word.strip() for word in inside.split(",") if word.strip())


def listed(config_dirs: Sequence[Path] = ()) -> Table:
    """All tables, one a row."""
    papers = {name: read(name, config_dirs) for name in sorted(names(config_dirs))}
    texts = [(name, paper.title, paper.source.line) for name, paper in papers.items()]
    return Table(
        "published tables: peft-train table +table=NAME",
        tuple(render.Column(key, key) for key in ("name", "what", "source")),
        tuple(tuple(Cell(text, text) for text in line) for line in texts),
    )


# -- Cells as runs ---------------------------------------------------------------------------------
def cells(paper: Paper, extra: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The overrides of every run that the table is made of: rows x columns x seeds, but for cells
    that no run fills. `extra` is put over each.

    Raises `ConfigError` where nothing is left to run.
    """
    seeds = () if any(key_of(word) == "seed" for word in extra) else paper.seeds
    made = [
        over((*words, *seed), extra)
        for row in paper.rows
        for column in paper.columns
        if (words := paper.words(row, column)) is not None
        for seed in [(f"seed={s}",) for s in seeds] or [()]
    ]
    if not made:
        why = dict.fromkeys(each.reason for each in (*paper.columns, *paper.rows) if each.reason)
        raise ConfigError(f"no cell of this table can be run here: {'; '.join(map(str, why))}.")
    return made


def over(words: Sequence[str], extra: Sequence[str]) -> tuple[str, ...]:
    """`words` with `extra` put over them: what sets the same key, or a key of a group that is
    chosen anew, goes.
    """
    keys = [key_of(word) for word in extra]
    kept = [w for w in words if not any(f"{key_of(w)}.".startswith(f"{key}.") for key in keys)]
    return (*kept, *extra)


def key_of(word: str) -> str:
    """The key of an override, without Hydra's signs."""
    return word.lstrip("+~").partition("=")[0]


def is_run_of(words: Sequence[str], given: Sequence[str]) -> bool:
    """Whether a run that was started with the overrides `given` fills the cell of `words`: it has
    all of them, and no further ones of the method.
    """
    wanted, here = ({word.lstrip("+") for word in some} for some in (words, given))
    return wanted <= here and not any(key_of(word).startswith("method") for word in here - wanted)


def mean(column: Column, scores: Mapping[str, float]) -> float | None:
    """The mean of a column's others; None unless all are there."""
    found = [scores[name] for name in column.mean_of if name in scores]
    return sum(found) / len(found) if found and len(found) == len(column.mean_of) else None
