"""What the tuning runs of a sweep came to, setting by setting."""

from __future__ import annotations

from dataclasses import dataclass, field

from peftcli.sweep import objective
from peftcli.sweep.ledger import ENDED, Trial
from peftcli.sweep.objective import Objective, Scores
from peftcli.sweep.space import Point

Seed = int | None  # None: whatever the configuration says


@dataclass
class Results:
    """What the tuning runs of one cell came to."""

    scores: dict[Point, dict[Seed, Scores | None]] = field(default_factory=dict)  # None: failed
    foretold: dict[Point, list[Scores]] = field(default_factory=dict)  # of runs that were stopped
    pending: dict[Point, set[Seed]] = field(default_factory=dict)
    waiting: int = 0
    seconds: float = 0.0
    tokens: float = 0.0

    def note(self, point: Point, seed: Seed, trial: Trial, goal: Objective) -> None:
        """Take in one run of a setting."""
        if trial.state not in ENDED:
            self.pending.setdefault(point, set()).add(seed)
            self.waiting += trial.state != "running"
            return
        scores = goal.scores(trial.metrics) if trial.state == "done" else None
        self.scores.setdefault(point, {})[seed] = scores
        if trial.foretold is not None and len(goal.names) == 1:
            self.foretold.setdefault(point, []).append((trial.foretold,))
        self.seconds += trial.seconds or 0.0
        self.tokens += trial.metrics.get("tokens", 0.0)

    def seeds(self, point: Point) -> set[Seed]:
        """The seeds that a setting was given so far."""
        return {*self.scores.get(point, {}), *self.pending.get(point, set())}

    @property
    def points(self) -> list[Point]:
        """All settings that were tried, in an order of their own."""
        return sorted({*self.scores, *self.pending})

    def ended(self, point: Point) -> list[Scores | None]:
        """The scores of a setting by seed, as far as they are there."""
        return list(self.scores.get(point, {}).values())

    def mean(self, point: Point) -> Scores | None:
        """The mean over the seeds that ended; None where one failed, or none ended."""
        ended = self.ended(point)
        good = [scores for scores in ended if scores is not None]
        return objective.mean(good) if good and len(good) == len(ended) else None

    @property
    def best(self) -> list[Point]:
        """The best setting among those of most seeds; of several metrics, the Pareto front."""
        means = {p: m for p in self.points if (m := self.mean(p))}
        most = max((len(self.ended(p)) for p in means), default=0)
        full = {p: m for p, m in means.items() if len(self.ended(p)) == most}
        if all(len(m) == 1 for m in full.values()):
            return [max(full, key=full.__getitem__)] if full else []
        front = [p for p in full if not any(objective.dominates(m, full[p]) for m in full.values())]
        return sorted(front, key=full.__getitem__, reverse=True)

    @property
    def tried(self) -> dict[Point, Scores | None]:
        """Every setting with what a search is told of it; None: some of its runs have not ended.

        A stopped run counts with what was foretold for it. A setting that has one is none of
        `best`: those were measured.
        """
        told = {p: self._told(p) for p in self.points}
        known = [scores for scores in told.values() if scores]
        worst = tuple(map(min, zip(*known, strict=True))) if known else None
        return {p: None if self.pending.get(p) else told[p] or worst or (0.0,) for p in told}

    def _told(self, point: Point) -> Scores | None:
        """The mean over the seeds that ended, or were foretold to; None where one failed."""
        ended = self.ended(point)
        good = [s for s in ended if s is not None] + self.foretold.get(point, [])
        return objective.mean(good) if good and len(good) == len(ended) else None
