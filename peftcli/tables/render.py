"""A table, and the formats it is written in: for the screen, markdown, LaTeX, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from peftcli.catalog import screen
from peftcli.errors import ConfigError, did_you_mean

PLUS_MINUS = "\u00b1"
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json"}


@dataclass(frozen=True)
class Cell:
    """What people read, and the numbers behind it; without arguments a missing one."""

    text: str = "-"
    value: float | int | str | None = None
    deviation: float | None = None  # sample standard deviation over seeds
    interval: tuple[float, float] | None = None  # 95 %, bootstrap over seeds
    seeds: int | None = None  # how many `value` comes from
    bold: bool = False


@dataclass(frozen=True)
class Column:
    """What people read above a column, and its name for machines, in whose values no unit is
    rounded away.
    """

    title: str
    key: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns with unique keys, and what must be said beneath."""

    title: str
    header: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # commands that fill cells
    failed: tuple[str, ...] = ()  # runs that ended badly, and why

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which stand to the right."""
        values = [row[column].value for row in self.rows]
        return any(isinstance(v, int | float) for v in values)

    @property
    def remarks(self) -> list[tuple[str, tuple[str, ...]]]:
        """What stands beneath, by its heading, empty ones left out."""
        listed = (("notes", self.notes), ("failed", self.failed), ("to fill", self.missing))
        return [(name, lines) for name, lines in listed if lines]


def selected(table: Table, words: Sequence[str]) -> Table:
    """The table with only these columns, in this order; all where none is named. Raises
    `ConfigError` where there is no such column.
    """
    keys = [column.key for column in table.header]
    for word in words:
        if word not in keys:
            raise ConfigError(
                f"--show {word}: no such column.{did_you_mean(word, keys)} All: {', '.join(keys)}."
            )
    kept = [keys.index(word) for word in words or keys]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, header=tuple(table.header[i] for i in kept), rows=rows)


def write(table: Table, format: str | None, output: Path | None) -> None:
    """Print a table, or write it to a file, whose name may say the format (.md .csv .tex .json).

    Raises `ConfigError` where the file's name does not say it or the file cannot be written.
    """
    if output is None:
        show(table, format or "rich")
        return
    format = format or SUFFIXES.get(output.suffix)
    if format is None:
        raise ConfigError(
            f"--output {output}: its ending is none of {', '.join(SUFFIXES)}; name a --format."
        )
    save(output, render(table, format))


def save(output: Path, text: str) -> None:
    """Write a file, with the folders that it needs."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--output {output}: cannot be written ({e.strerror}).") from None


def show(table: Table, format: str) -> None:
    """The table on standard output."""
    if format == "rich":
        screen().print(_rich(table))
        for name, lines in table.remarks:
            screen().print(Text(f"\n{name}", style="bold"))
            for line in lines:
                screen().print(Text(f"  {line}"), soft_wrap=True)
        return
    print(render(table, format), end="")
    if format == "csv":  # which has no place for words
        for name, lines in table.remarks:
            print(*(f"{name}: {line}" for line in lines), sep="\n", file=sys.stderr)


def render(table: Table, format: str) -> str:
    """The table as text: in markdown, csv, latex or json."""
    return RENDERERS[format](table)


def _rich(table: Table) -> RichTable:
    found = RichTable(box=None, padding=(0, 2, 0, 0), header_style="bold", title=Text(table.title))
    found.title_style, found.title_justify = "bold cyan", "left"
    for i, column in enumerate(table.header):
        found.add_column(Text(column.title), justify="right" if table.is_number(i) else "left")
    for row in table.rows:
        found.add_row(*(Text(cell.text, style="bold" if cell.bold else "") for cell in row))
    return found


def _markdown(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |\n"

    def text(cell: Cell) -> str:
        plain = _one_line(cell.text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
        return f"**{plain}**" if cell.bold else plain

    rules = ["---:" if table.is_number(i) else "---" for i in range(len(table.header))]
    written = line([text(Cell(column.title)) for column in table.header]) + line(rules)
    written += "".join(line([text(cell) for cell in row]) for row in table.rows)
    for name, lines in table.remarks:
        code = "`" if name == "to fill" else ""
        written += f"\n{name.capitalize()}:\n\n"
        written += "".join(f"- {code}{one}{code}\n" for one in map(_one_line, lines))
    return f"**{table.title}**\n\n{written}"


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    PLUS_MINUS: r"$\pm$",
}


def _latex(table: Table) -> str:
    """A tabular with the rules of booktabs."""

    def text(cell: Cell) -> str:
        plain = "".join(_LATEX.get(c, c) for c in _one_line(cell.text))
        return rf"\textbf{{{plain}}}" if cell.bold else plain

    def line(cells: Sequence[Cell]) -> str:
        return " & ".join(map(text, cells)) + r" \\"

    places = "".join("r" if table.is_number(i) else "l" for i in range(len(table.header)))
    lines = [rf"% {_one_line(table.title)}; \usepackage{{booktabs}}"]
    lines += [rf"\begin{{tabular}}{{{places}}}", r"\toprule"]
    lines += [line([Cell(column.title) for column in table.header]), r"\midrule"]
    lines += [*map(line, table.rows), r"\bottomrule", r"\end{tabular}"]
    lines += [f"% {name}: {_one_line(one)}" for name, some in table.remarks for one in some]
    return "\n".join(lines) + "\n"


def _csv(table: Table) -> str:
    """Full precision; beside a column of means one each of deviations and of numbers of seeds."""
    spread = [any(row[i].seeds is not None for row in table.rows) for i in range(len(table.header))]
    columns: list[tuple[str, Callable[[tuple[Cell, ...]], Any]]] = []
    for i, name in enumerate(column.key for column in table.header):
        columns.append((name, lambda row, i=i: row[i].value))
        if spread[i]:
            columns.append((f"{name} std", lambda row, i=i: row[i].deviation))
            columns.append((f"{name} seeds", lambda row, i=i: row[i].seeds))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([name for name, _ in columns])
    for row in table.rows:
        values = [value(row) for _, value in columns]
        writer.writerow(["-" if v is None else v for v in values])
    return out.getvalue()


def _json(table: Table) -> str:
    def data(cell: Cell) -> Any:
        if cell.seeds is None:
            return cell.value
        named = {"mean": cell.value, "std": cell.deviation, "seeds": cell.seeds}
        return named | {"interval_95": cell.interval, "text": cell.text}

    keys = [column.key for column in table.header]
    rows = [dict(zip(keys, map(data, row), strict=True)) for row in table.rows]
    about = {"notes": table.notes, "failed": table.failed, "missing": table.missing}
    return json.dumps({"title": table.title, "rows": rows, **about}, indent=2) + "\n"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


RENDERERS: dict[str, Callable[[Table], str]] = {
    "markdown": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
}
