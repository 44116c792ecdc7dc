"""`--dry-run`: a sweep's members, which are done, and what the others will take."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from peftcli import folders
from peftcli.screen import duration, grid, say
from peftcli.sweep.board import told
from peftcli.sweep.ledger import ENDED, Ledger, Member

# What changes a run's result but hardly its time.
SAME_TIME = ("seed", "optimizer.", "scheduler.", "dataset.seed")


def show(members: Sequence[Member], ledger: Ledger, jobs: int) -> None:
    """The members with their states, and the time that is left for `jobs` at once."""
    seconds_of = expected(members)
    rows = [
        (
            m.number,
            m.title,
            m.state,
            _written(m, seconds_of[m.id]),
            told(m, ledger) if m.state == "failed" else "",
        )
        for m in members
    ]
    grid("members", ("number", "overrides", "state", "time", "why"), rows)
    left = [seconds_of[m.id] for m in members if m.state not in ENDED]
    known = [seconds for seconds in left if seconds is not None]
    done = sum(m.state == "done" for m in members)
    say(f"{done} of {len(members)} members done, {len(left)} left")
    if known:
        unknown = (
            f", and {len(left) - len(known)} of unknown cost" if len(known) < len(left) else ""
        )
        at_once = f" by {jobs} at once" if jobs > 1 else ""
        say(f"about {duration(sum(known) / jobs)}{at_once}{unknown}")
    elif left:
        say("cost unknown: no member of the same kind has finished yet")
    where = "goes on in" if ledger.exists() else "would lie in"
    say(f"nothing was started; the sweep {where} {folders.shown(ledger.folder)}")


def expected(members: Sequence[Member]) -> dict[str, float | None]:
    """By id what a member took, or finished ones of its kind took on average; None: unknown."""
    took: dict[tuple[str, ...], list[float]] = {}
    for member in members:
        if member.state == "done" and member.seconds is not None:
            took.setdefault(kind(member), []).append(member.seconds)
    means = {words: mean(seconds) for words, seconds in took.items()}
    return {m.id: m.seconds if m.state == "done" else means.get(kind(m)) for m in members}


def kind(member: Member) -> tuple[str, ...]:
    """What of a member's words decides how long it takes."""
    return tuple(w for w in member.overrides if not w.lstrip("+").startswith(SAME_TIME))


def _written(member: Member, seconds: float | None) -> str:
    if seconds is None or member.state in ("failed", "pruned"):
        return "-" if member.state in ENDED else "unknown"
    return duration(seconds) if member.state == "done" else f"about {duration(seconds)}"
