"""A sweep whose members are done at once: real claims, processes and signals, no training.

As a script it works on a sweep folder, as one of several that a test kills.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.cli import end_with_parent
from peftcli.settings import Sweep
from peftcli.sweep.board import Board
from peftcli.sweep.ledger import Ledger, Member
from peftcli.sweep.process import slots
from peftcli.sweep.work import Worker
from peftcli.train.folder import write_json


def planned(folder: Path, words: Sequence[str]) -> Ledger:
    """A sweep folder with a member for every word."""
    ledger = Ledger(folder)
    with ledger.locked():
        ledger.begin({"line": list(words)})
        for number, word in enumerate(words, 1):
            ledger.write(Member(f"{number:012x}", number, (word,)))
    return ledger


def body(run_dir: Path, parent: int) -> int:
    """Do what the member's word says: WORD=SECONDS[:EXIT_CODE]."""
    try:
        end_with_parent(parent)
        member = Ledger(run_dir.parents[1]).member(run_dir.name)
        assert member is not None
        seconds, _, code = member.overrides[0].partition("=")[2].partition(":")
        note(run_dir, "begun")
        time.sleep(float(seconds))
        if code:
            return int(code)
        note(run_dir, "done")
        write_json(
            run_dir / "result.json",
            {"train_info": {"metrics": {"after": {"accuracy": member.number}}}},
        )
    except KeyboardInterrupt:
        return 75
    return 0


def note(run_dir: Path, what: str) -> None:
    """Append a line that no kill can tear."""
    file = os.open(run_dir / "notes", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{what} {time.time()}\n".encode())
    os.close(file)


def notes(run_dir: Path, what: str) -> list[float]:
    """When what happened."""
    path = run_dir / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [float(line.split()[1]) for line in lines if line.startswith(what)]


def worker(ledger: Ledger, **settings: Any) -> Worker:
    """Works on the sweep in this process."""
    options = Sweep(**{"jobs": 1, **settings})
    total = len(ledger.members())
    return Worker(ledger, options, slots(options.jobs, []), Board(total), body=body)


if __name__ == "__main__":
    worker(Ledger(Path(sys.argv[1])), jobs=2).work()
