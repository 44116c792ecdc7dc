"""What a person sees: tables before, a progress bar during, results after. All on stderr; train.log
gets the same.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False)
log = logging.getLogger("peftcli")


class LogFile(logging.FileHandler):
    """train.log. A full disk ends it with one line; the training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say so once, and write no more."""
        log.removeHandler(self)
        console.print(Text(f"cannot write {self.baseFilename} any more", style="yellow"))


def log_to(path: Path) -> None:
    """Send every line of the log to `path` too, appending."""
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def renew() -> None:
    """Have a console of this process, which has other streams than the one that it was forked
    from.
    """
    global console
    console = Console(stderr=True, highlight=False)


def say(text: str, style: str = "") -> None:
    """One line for the person and for the log."""
    console.print(Text(text, style=style))
    log.info(text)


def facts(title: str, rows: Mapping[str, Any]) -> None:
    """A two-column block: what, and how much of it."""
    table = Table(
        show_header=False, box=None, padding=(0, 2, 0, 0), title=title, title_justify="left"
    )
    table.title_style = "bold cyan"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(str(value)))
        log.info("%s: %s: %s", title, key, value)
    console.print(table)
    console.print()


def grid(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table with a header; columns of numbers to the right."""
    table = Table(
        title=title, title_justify="left", header_style="dim", box=None, padding=(0, 2, 0, 0)
    )
    table.title_style = "bold cyan"
    for i, name in enumerate(header):
        numbers = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(number(v)) for v in row))
        log.info("%s: %s", title, "  ".join(number(v) for v in row))
    console.print(table)
    console.print()


def number(value: Any) -> str:
    """A number as people read it; everything else as it is."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds as 41 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def hidden_screen() -> LiveScreen:
    """The screen of a process that shows nothing, from now on."""
    console.quiet = True
    return LiveScreen()


class LiveScreen:
    """The loop's screen: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task: Any = None
        self.last_line = 0.0
        self.started = time.monotonic()
        self.first_step: float | None = (
            None  # seconds from the run's start to the end of its first step
        )

    @contextmanager
    def training(self, total: int, done: int) -> Iterator[None]:
        """Show the training's progress inside the block."""
        if not console.is_terminal or console.quiet:
            yield
            return
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=False,
        )
        with self.bar:
            self.task = self.bar.add_task("training", total=total, completed=done, numbers="")
            yield
        self.bar = None

    def step(self, done: int, total: int, record: dict[str, Any]) -> None:
        """Show a finished step."""
        numbers = (
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}"
            f"  {record['tokens_per_second']:,.0f} tokens/s  {size(record['peak_memory'])}"
        )
        if self.first_step is None:
            self.first_step = time.monotonic() - self.started
        log.info("step %d/%d  %s", done, total, numbers)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, numbers=numbers)
        elif (time.monotonic() - self.last_line > 10 or done == total) and not console.quiet:
            self.last_line = time.monotonic()
            print(f"step {done}/{total}  {numbers}", file=sys.stderr, flush=True)

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Any]:
        """A bar for `what`; yields the function that is told how many more are done."""
        if self.bar is not None:
            task = self.bar.add_task(what, total=total, numbers="")
            yield lambda n: self.bar.advance(task, n) if self.bar else None
            self.bar.remove_task(task)
        elif console.is_terminal and not console.quiet:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
            )
            with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda n: bar.advance(task, n)
        else:
            yield lambda n: None

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Show an evaluation's metrics."""
        listed = "  ".join(f"{k} {number(v)}" for k, v in values.items())
        say(f"evaluation at step {step}: {listed}", "green")

    def note(self, text: str) -> None:
        """Show a warning."""
        say(text, "yellow")
