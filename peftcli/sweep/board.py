"""What a person sees of a sweep: a line for everything that happens, below them what runs now."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.live import Live
from rich.table import Table
from rich.text import Text

from peftcli import folders, screen
from peftcli.screen import duration, number, say
from peftcli.sweep.ledger import COUNTED, ENDED, Ledger, Member, metrics
from peftcli.sweep.process import OUTPUT, Running

REFRESH = 0.5  # seconds between two pictures on a terminal
LINES = 30.0  # seconds between two lines of a running member, elsewhere


class Board:
    """The screen of a process that works on a sweep."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.live: Live | None = None
        self.drawn = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show what runs, inside the block."""
        if not screen.console.is_terminal:
            yield
            return
        # drawn by hand: a thread that draws would forbid forking
        with Live(console=screen.console, auto_refresh=False, transient=True) as self.live:
            yield
        self.live = None

    def refresh(self, running: Sequence[Running]) -> None:
        """Draw again what runs, now and then."""
        if time.monotonic() - self.drawn < (LINES if self.live is None else REFRESH):
            return
        self.drawn = time.monotonic()
        if self.live is not None:
            self.live.update(_table(running, self.total), refresh=True)
            return
        for one in running:
            print(f"  {one.member.title}: {last_line(one.folder)}", file=screen.console.file)

    def started(self, member: Member, goes_on: bool) -> None:
        """A member has begun."""
        say(f"{self._place(member)} {'goes on' if goes_on else 'begins'}: {member.title}", "cyan")

    def ended(self, member: Member, ledger: Ledger) -> None:
        """A member has ended, and how."""
        took = f"in {duration(member.seconds or 0.0)}"
        if member.state == "done":
            say(f"{self._place(member)} done {took}: {member.title}  {_measured(member, ledger)}")
        elif member.state == "failed":
            say(f"{self._place(member)} failed: {member.title}: {told(member, ledger)}", "red")
        else:
            why = f": {member.reason}" if member.reason else ""
            say(f"{self._place(member)} {member.state}: {member.title}{why}", "yellow")

    def lost(self, member: Member) -> None:
        """Another process has taken a member over."""
        say(f"{self._place(member)} was taken over by another process: {member.title}", "yellow")

    def _place(self, member: Member) -> str:
        self.total = max(self.total, member.number)  # a search adds members
        width = len(str(self.total))
        return f"[{member.number:>{width}}/{self.total}]"


def report(members: Sequence[Member], ledger: Ledger) -> None:
    """How many are done, and what failed or is left, by name."""
    done = sum(m.state == "done" for m in members)
    failed = [m for m in members if m.state == "failed"]
    pruned = sum(m.state == "pruned" for m in members)
    left = sum(m.state not in ENDED for m in members)
    others = [(len(failed), "failed"), (pruned, "pruned"), (left, "left")]
    said = ", ".join(f"{n} {what}" for n, what in others if n)
    say(
        f"{done} of {len(members)} members done{f', {said}' if said else ''}: "
        f"{folders.shown(ledger.folder)}",
        "green" if done == len(members) else "yellow",
    )
    for member in failed:
        say(f"  failed: {member.title}: {told(member, ledger)}", "red")
    if any(member.attempts for member in failed):
        say("  the same line with --retry-failed runs them again", "red")
    if left:
        say("  the same line goes on with what is left", "yellow")


def told(member: Member, ledger: Ledger) -> str:
    """Why a member failed, its exit code, and where to read more."""
    run_dir = ledger.run_dir(member.id)
    read = f"; see {folders.shown(run_dir / OUTPUT)}" if (run_dir / OUTPUT).exists() else ""
    reason = str(member.reason).removeprefix(f"{member.title}: ")
    return f"{reason} (exit code {member.exit_code}){read}"


def _measured(member: Member, ledger: Ledger) -> str:
    values = metrics(ledger.run_dir(member.id))
    return "  ".join(f"{k} {number(v)}" for k, v in values.items() if k not in COUNTED)


def _table(running: Sequence[Running], total: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for one in running:
        time_ = duration(one.seconds)
        table.add_row(
            Text(f"[{one.member.number}/{total}] {one.member.title}", style="cyan"),
            Text(time_, style="dim"),
            Text(last_line(one.folder)),
        )
    return table


def last_line(folder: Path) -> str:
    """The newest line of a run's log, without its time."""
    try:
        with open(folder / "train.log", "rb") as f:
            f.seek(-min(os.fstat(f.fileno()).st_size, 1000), os.SEEK_END)
            lines = f.read().decode("utf-8", errors="replace").strip().splitlines()
    except FileNotFoundError:
        return "starting"
    return lines[-1].split(" ", 2)[-1] if lines else "starting"
