"""`peft-train methods`: the list of all, chosen by traits. Also the tables of documentation.

What the list does not show is not read: no keys, no types, no YAML parser.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftcli import folders
from peftcli.traits import Traits, paper, traits

Wanted = Callable[[Traits], bool]


class Output(Console):
    """Standard output: what is shown here is the answer itself."""

    def on_broken_pipe(self) -> None:
        """Leave a reader that went away to `main`, where rich would exit with 1."""
        raise BrokenPipeError


def screen() -> Output:
    """Standard output; lines stay whole where it is no terminal."""
    return Output(highlight=False, width=None if sys.stdout.isatty() else 10_000)


def table(*header: str, rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """Columns without lines."""
    found = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left"
    )
    found.title_style = "bold cyan"
    for name in header:
        found.add_column(name, overflow="fold")
    for row in rows:
        found.add_row(*map(Text, row))
    return found


def methods(config_dirs: Sequence[Path], wanted: Wanted) -> int:
    """All methods whose traits are wanted."""
    found = folders.targets("method", config_dirs).items()
    listed = [(name, target) for name, target in found if wanted(traits(target))]
    rows = [(name, *_marks(traits(target)), first_line(target)) for name, target in listed]
    header = ("method", "family", "folds", "4/8 bit", "pre-pass", "published as", "what it is")
    screen().print(table(*header, rows=rows))
    screen().print(
        "\n[dim]peft-train methods NAME: equation and options; peft-train method=NAME trains.[/]"
    )
    return 0


def _marks(has: Traits) -> tuple[str, ...]:
    marks = (has.mergeable, has.quantisable, has.pre_pass)
    return has.family, *("yes" if mark else "-" for mark in marks), has.exports


def first_line(target: str) -> str:
    """What a method is, in the first line of its file."""
    return paper(target).partition("\n")[0]
