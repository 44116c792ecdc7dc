"""Ledgers without processes: members proposed, run by a function, and written down."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftcli.sweep.incumbent import propose
from peftcli.sweep.protocol import Study
from peftcli.sweep.space import Point, values_of

Run = Callable[[Mapping[str, str]], Mapping[str, float] | None]  # None: it fails


@dataclass
class Member:
    """A run of a sweep, as a ledger tells."""

    overrides: tuple[str, ...]
    state: str = "waiting"
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    foretold: float | None = None

    def run(self, objective: Run, seconds: float = 1.0) -> None:
        found = objective(values_of(self.overrides))
        self.state, self.seconds = ("failed" if found is None else "done"), seconds
        self.metrics = found or {}


def sweep(study: Study, folder: Path, objective: Run, most: int = 10_000) -> list[Member]:
    """Run a sweep to its end, one member at a time, or until `most` have run."""
    members: list[Member] = []
    go_on(study, folder, objective, members, most)
    return members


def go_on(
    study: Study, folder: Path, objective: Run, members: list[Member], most: int = 10_000
) -> None:
    """Run what is left of a sweep."""
    for _ in range(most):
        waiting = [m for m in members if m.state == "waiting"]
        if not waiting:
            members += [Member(overrides) for overrides in propose(study, folder, members)]
            waiting = [m for m in members if m.state == "waiting"]
        if not waiting:
            return
        waiting[0].run(objective)


def sweep_by_workers(
    study: Study, folder: Path, objective: Run, workers: int, seed: int
) -> list[Member]:
    """Run a sweep with several workers, whose runs end in an order of chance."""
    members: list[Member] = []
    stream = random.Random(seed)
    while True:
        running = [m for m in members if m.state == "running"]
        waiting = [m for m in members if m.state == "waiting"]
        if len(running) < workers and not waiting:
            members += [Member(overrides) for overrides in propose(study, folder, members)]
            waiting = [m for m in members if m.state == "waiting"]
        if len(running) < workers and waiting:
            waiting[0].state = "running"
        elif running:
            stream.choice(running).run(objective)
        else:
            return members


def names(members: list[Member]) -> list[Point]:
    return [m.overrides for m in members]
