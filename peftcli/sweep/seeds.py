"""How many tuning seeds a setting gets: all, more on every rung, or while it is in the race.

Fixed rules, functions of the results alone. The numbers are ours; rungs are successive halving over
seeds (K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
Optimization", AISTATS 2016), the race is in the spirit of F-Race (M. Birattari et al., GECCO 2002).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from peftcli.sweep.objective import Scores
from peftcli.sweep.results import Results, Seed
from peftcli.sweep.space import Point

RUNGS = (1, 3, 5)  # tuning seeds of each rung; the last rung has all
ERRORS = 2.0  # standard errors behind the best at which a race drops a setting
Runs = list[tuple[Point, Seed]]


def allowed(
    rule: str, points: Sequence[Point], results: Results, seeds: Sequence[Seed], is_full: bool
) -> Runs:
    """Every (setting, seed) that the rule allows by now, whether it was run or not.

    `is_full`: no further settings will come.
    """
    if rule == "all":
        return list(itertools.product(points, seeds))
    if rule == "rungs":
        return _on_rungs(points, results, seeds, is_full)
    best = results.ended(results.best[0]) if results.best else []
    return [(p, s) for p in points for s in seeds[: _raced(results.ended(p), best, len(seeds))]]


def _raced(ended: Sequence[Scores | None], best: Sequence[Scores | None], most: int) -> int:
    """How many seeds a setting gets: one more than have ended, until it is out of the race."""
    if None in ended or is_behind(ended, best):
        return len(ended)
    return min(len(ended) + 1, most)


def is_behind(scores: Sequence[Scores | None], best: Sequence[Scores | None]) -> bool:
    """Whether the mean of `scores` is worse than that of `best` by two standard errors of their
    difference; never by fewer than two runs each, of which there is no error.
    """
    mine, theirs = ([s[0] for s in group if s] for group in (scores, best))
    if min(len(mine), len(theirs)) < 2:
        return False
    error = math.sqrt(sum(statistics.variance(group) / len(group) for group in (mine, theirs)))
    return statistics.fmean(mine) < statistics.fmean(theirs) - ERRORS * error


def _on_rungs(
    points: Sequence[Point], results: Results, seeds: Sequence[Seed], is_full: bool
) -> Runs:
    """One seed for all, three for the better half, five for the better half of those, and so on; a
    rung begins when the one below has ended.
    """
    runs: dict[tuple[Point, Seed], None] = {}  # in order, each once
    left = list(points)
    for size in (*(n for n in RUNGS if n < len(seeds)), len(seeds)):
        runs |= dict.fromkeys(itertools.product(left, seeds[:size]))
        ended = all(len(results.ended(p)) >= size or not _is_alive(results, p) for p in left)
        if not (ended and is_full):
            break
        ranks = {p: _rank(results, p) for p in left}
        left = sorted(left, key=lambda p: (ranks[p], p), reverse=True)[: (len(left) + 1) // 2]
        left = [p for p in left if _is_alive(results, p)]
    return list(runs)


def _is_alive(results: Results, point: Point) -> bool:
    return None not in results.ended(point)


def _rank(results: Results, point: Point) -> Scores:
    return results.mean(point) or (-math.inf,)
