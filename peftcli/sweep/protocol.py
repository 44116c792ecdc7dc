"""Tuning that reports test numbers: which runs a sweep makes next, given those it has made.

A *setting* is a point of the space; a *cell* is one value of what is compared (a method, a model),
with a search and a budget of its own. With `sweep.tuning_seeds` a setting runs on these and counts
by its mean, a failure as the worst that there is. With `sweep.test_seeds` each cell's best setting
is frozen and runs on these, on examples that no tuning run has seen; only those runs are reported.
These are the other half of the held-out ones, or of other data: with `sweep.report_on` settings are
tuned on one task and reported on another (S. Cha, K. Cho, "Hyperparameters in Continual Learning: A
Reality Check", 2024, arXiv 2403.09066).
T. Eimer, M. Lindauer, R. Raileanu, "Hyperparameters in Reinforcement Learning and How To Tune
Them", ICML 2023, arXiv 2306.01324.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peftcli import written
from peftcli.errors import ConfigError, did_you_mean
from peftcli.settings import Sweep
from peftcli.sweep import extras, objective, search, seeds
from peftcli.sweep.ledger import Trial
from peftcli.sweep.objective import Objective
from peftcli.sweep.results import Results, Seed
from peftcli.sweep.space import Point, Space, values_of

LR = "optimizer.lr"
SEED = "seed"
PART = "dataset.eval_part"  # which half of the held-out examples is evaluated


@dataclass(frozen=True)
class Cell:
    """One of the things that are compared, and the space that is searched for it."""

    fixed: Point
    space: Space

    @property
    def name(self) -> str:
        """As people read it."""
        return " ".join(self.fixed) or "all"


@dataclass(frozen=True)
class Study:
    """A sweep's space, search and protocol: everything but what has been run."""

    sweep: Sweep
    space: Space
    family_of: Callable[[str], str] = str  # a method's name -> its family

    def __post_init__(self) -> None:
        check(self.sweep, self.space)

    # -- what is compared --------------------------------------------------------------------------
    @cached_property
    def cells(self) -> list[Cell]:
        """Every combination of the values compared, with its space; learning rates are scaled."""
        apart = self.space.apart(self.sweep.compare)
        return [Cell(fixed, space.scaled(LR, self._lr_factor(fixed))) for fixed, space in apart]

    def _lr_factor(self, fixed: Point) -> float:
        method = values_of(fixed).get("method", "")
        scale = self.sweep.lr_scale
        return scale.get(method) or scale.get(self.family_of(method), 1.0)

    @property
    def seeds(self) -> tuple[Seed, ...]:
        """Those that a setting is tuned on."""
        return self.sweep.tuning_seeds or (None,)

    @property
    def is_reported(self) -> bool:
        """Whether there is a second stage, on the test seeds."""
        return bool(self.sweep.test_seeds)

    def member(self, settings: Sequence[str], seed: Seed, *, test: bool = False) -> Point:
        """The overrides of one run."""
        given = () if seed is None else (f"{SEED}={seed}",)
        return (*settings, *given, *self._data(test))

    def _data(self, test: bool) -> Point:
        """The overrides that keep the examples of the two stages apart."""
        if not self.is_reported:
            return ()
        if self.sweep.report_on:
            words = tuple(written.override(key, v) for key, v in self.sweep.report_on.items())
            return words if test else ()
        return (f"{PART}={'report' if test else 'tuning'}",)

    def cell_of(self, overrides: Sequence[str]) -> Cell | None:
        """The cell that a tuning run belongs to; None for other runs."""
        if int(values_of(overrides).get(SEED, -1)) in self.sweep.test_seeds:
            return None
        return next((cell for cell in self.cells if set(cell.fixed) <= set(overrides)), None)

    # -- what was run ------------------------------------------------------------------------------
    def objective(self, trials: Iterable[Trial]) -> Objective:
        """The objective, by what the runs have measured so far."""
        measured = {name for t in trials if t.state == "done" for name in t.metrics}
        return objective.objective(self.sweep, measured)

    def tuned(self, trials: Sequence[Trial]) -> list[Results]:
        """The results of every cell's tuning runs.

        Raises:
            ConfigError: a tuning run evaluated the examples that are kept for the report.
        """
        goal, found = self.objective(trials), [Results() for _ in self.cells]
        for trial in trials:
            given = values_of(trial.overrides)
            seed = int(given.get(SEED, -1)) if self.sweep.tuning_seeds else None
            if seed not in self.seeds:
                continue
            own, words = set(self._data(test=False)), set(trial.overrides)
            if own - words or words & set(self._data(test=True)):
                raise ConfigError(
                    f"{' '.join(trial.overrides)}: a tuning run must not see the examples that "
                    "are kept for the report."
                )
            cell = self.cell_of(trial.overrides)
            point = cell.space.point_in(given) if cell else None
            if cell is not None and point is not None:
                found[self.cells.index(cell)].note(point, seed, trial, goal)
        return found

    # -- what to run -------------------------------------------------------------------------------
    def to_tune(self, found: Sequence[Results]) -> list[Point]:
        """Tuning runs that are still to be made; none of them is there already."""
        return [
            self.member((*cell.fixed, *point), seed)
            for cell, results in zip(self.cells, found, strict=True)
            for point, seed in self._of_cell(cell, results)
            if seed not in results.seeds(point)
        ]

    def to_test(self, settings: Iterable[Sequence[str]], trials: Sequence[Trial]) -> list[Point]:
        """Runs of frozen settings on the test seeds that are still to be made."""
        there = {frozenset(trial.overrides) for trial in trials}
        pairs = itertools.product(settings, self.sweep.test_seeds)
        runs = [self.member(setting, seed, test=True) for setting, seed in pairs]
        return [run for run in runs if frozenset(run) not in there]

    def _of_cell(self, cell: Cell, results: Results) -> seeds.Runs:
        """(setting, seed) that a cell allows by now, of settings tried and of new ones."""
        tried, count = results.points, self.num_settings(cell)
        is_full = len(tried) >= count or self.is_spent(results)
        rule, own = self.sweep.seed_order, self.sweep.search_seed  # the same draws for all cells
        order = search.in_order(self.sweep.search, cell.space, own)
        if order is not None and not self.has_budget:
            points = list(itertools.islice(order, int(count)))
            return seeds.allowed(rule, points, results, self.seeds, is_full)
        runs = seeds.allowed(rule, tried, results, self.seeds, is_full)
        if is_full or results.waiting or any(s not in results.seeds(p) for p, s in runs):
            return runs  # one new setting at a time, and only when no worker has anything to do
        if order is not None:
            new = next((p for p in order if p not in results.tried), None)
        else:
            new = search.next_point(self.sweep.search, cell.space, results.tried, own)
        return seeds.allowed(rule, [new], results, self.seeds, is_full) if new else []

    # -- budgets -----------------------------------------------------------------------------------
    @property
    def has_budget(self) -> bool:
        """Whether something other than the number of settings ends the search."""
        return self.sweep.budget_seconds is not None or self.sweep.budget_tokens is not None

    def num_settings(self, cell: Cell) -> float:
        """How many settings a cell tries at most."""
        if self.sweep.trials is None and cell.space.size is None and self.has_budget:
            return math.inf
        return search.how_many(cell.space, self.sweep.trials)

    def is_spent(self, results: Results) -> bool:
        """Whether a cell has used its seconds or tokens."""
        seconds, tokens = self.sweep.budget_seconds, self.sweep.budget_tokens
        return (seconds is not None and results.seconds >= seconds) or (
            tokens is not None and results.tokens >= tokens
        )

    @property
    def budget(self) -> dict[str, Any]:
        """What every cell may spend."""
        counts = {self.num_settings(cell) for cell in self.cells}
        return {
            "settings": "no limit" if math.inf in counts else sorted(map(int, counts)),
            "tuning_seeds": len(self.seeds),
            "seed_order": self.sweep.seed_order,
            "seconds": self.sweep.budget_seconds or "no limit",
            "tokens": self.sweep.budget_tokens or "no limit",
        }

    def require_equal_budgets(self, found: Sequence[Results]) -> None:
        """Refuse to compare cells of which one was searched less than another.

        Raises:
            ConfigError: numbers of settings differ, and not because a budget was spent.
        """
        counts = [len(results.points) for results in found]
        most = max(counts, default=0)
        pairs = list(zip(self.cells, found, strict=True))
        short = [c.name for c, r in pairs if len(r.points) < most and not self.is_spent(r)]
        if short:
            listed = ", ".join(f"{c.name}: {len(r.points)}" for c, r in pairs)
            raise ConfigError(
                f"the budgets are not equal, so nothing is compared. Settings tried: {listed}. "
                f"Give {', '.join(short)} as many values to try as the others."
            )

    @property
    def digest(self) -> str:
        """Hash of everything that chooses an incumbent: space, search, budget, seeds, metric."""
        chosen = (self.sweep.search, self.sweep.search_seed, self.sweep.metric)
        told = [self.space.describe(), self.budget, self.seeds, chosen, self.sweep.lr_scale]
        return written.digest([*told, *self.sweep.report_on.items()])


def check(sweep: Sweep, space: Space) -> None:
    """Refuse a protocol that would not report a test number, and keys that contradict each other.

    Raises:
        ConfigError: with the keys and what to change.
    """
    keys = {key.lstrip("+") for key in space.keys}
    _check_seeds(sweep, keys)
    _check_search(sweep, space, keys)
    objective.objective(sweep, ())
    extras.check(sweep)
    if not isinstance(sweep.metric, str) and sweep.seed_order != "all":
        raise ConfigError(f"sweep.seed_order={sweep.seed_order}: needs one metric, not several.")
    if sweep.lr_scale and not {LR, "method"} <= keys:
        raise ConfigError(
            f"sweep.lr_scale: scales the {LR} of each method; sweep both, or leave it out."
        )
    if sweep.lr_scale and "method" not in sweep.compare:
        raise ConfigError("sweep.lr_scale: needs method in sweep.compare.")


def _check_seeds(sweep: Sweep, keys: set[str]) -> None:
    tuning, test = sweep.tuning_seeds, sweep.test_seeds
    if both := sorted(set(tuning) & set(test)):
        raise ConfigError(
            f"sweep.test_seeds={list(test)}: {both} are in sweep.tuning_seeds={list(tuning)}, too. "
            "What was tuned on a seed cannot be tested on it; choose others."
        )
    for name, given in (("tuning_seeds", tuning), ("test_seeds", test)):
        if len(set(given)) < len(given):
            raise ConfigError(f"sweep.{name}={list(given)}: a seed is given twice.")
    if test and not tuning:
        raise ConfigError(f"sweep.test_seeds={list(test)}: give sweep.tuning_seeds, too.")
    if sweep.report_on and not test:
        raise ConfigError("sweep.report_on: is for the runs on sweep.test_seeds; give these, too.")
    if sweep.report_on and not any(key.split(".")[0] == "dataset" for key in sweep.report_on):
        raise ConfigError("sweep.report_on: names no other data, as in {dataset.path: tweets}.")
    if both := sorted(sweep.report_on.keys() & keys):
        raise ConfigError(f"sweep.report_on: {', '.join(both)} is swept; it goes in one place.")
    if SEED in keys and (tuning or sweep.search != "grid"):
        raise ConfigError(
            "seed: is not searched over. Leave it out and give sweep.tuning_seeds=[0,1,2]."
        )
    if PART in keys:
        raise ConfigError(f"{PART}: is set where sweep.test_seeds are given; leave it out.")
    if len(tuning) < 2 and sweep.seed_order != "all":
        raise ConfigError(f"sweep.seed_order={sweep.seed_order}: needs several tuning_seeds.")


def _check_search(sweep: Sweep, space: Space, keys: set[str]) -> None:
    unknown = set(sweep.compare) - keys - set(Sweep().compare)
    if unknown:
        raise ConfigError(
            f"sweep.compare: {', '.join(sorted(unknown))} is not swept."
            f"{did_you_mean(min(unknown), keys)}"
        )
    if sweep.search in ("de", "metade") and not isinstance(sweep.metric, str):
        raise ConfigError(f"sweep.search={sweep.search}: needs one metric; optuna takes several.")
    if sweep.search == "grid":
        next(space.points(), None)  # has values to list
        if sweep.trials:
            raise ConfigError("sweep.trials: a grid tries everything; set sweep.search=random.")
    elif not keys - set(sweep.compare):
        raise ConfigError(
            f"sweep.search={sweep.search}: there is nothing to search; sweep a key, as in "
            f"'{LR}=tag(log,interval(1e-5,1e-2))'."
        )
