"""Which point of a space is tried next: pure functions of what was tried, and of a seed.

Nothing is kept between calls and nothing depends on the order in which runs ended, so a search that
is killed goes on as it would have, and several workers that ask one after the other agree.

Random search: Bergstra, Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 2012.
TPE: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011, by Optuna.
Differential evolution: see `evolution`; MetaDE on a surrogate: see `surrogate`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

from peftcli.sweep.chance import draw
from peftcli.sweep.objective import Scores
from peftcli.sweep.space import Choices, Dimension, Point, Space, values_of

WITHOUT_END = 20  # trials of a space without end, where sweep.trials does not say
ATTEMPTS = 20  # draws of TPE that were all tried already, before a random point is taken
REPEATS = 100  # draws in a row of what was drawn, for each point, after which a space is empty
Tried = Mapping[Point, Scores | None]  # None: still running


def in_order(kind: str, space: Space, seed: int) -> Iterator[Point] | None:
    """All points in the order in which a grid or a random search tries them, each once; None where
    the order depends on results.
    """
    if kind == "grid":
        return space.points()
    return _random(space, seed) if kind == "random" else None


def how_many(space: Space, trials: int | None) -> int:
    """Points to try: what was asked for, as far as there are so many."""
    wanted = trials or space.size or WITHOUT_END
    return min(wanted, wanted if space.size is None else space.size)


def next_point(kind: str, space: Space, tried: Tried, seed: int) -> Point | None:
    """The point that a search asks for after those `tried`, one that is not among them; None where
    it waits for what runs, or there is no other point.
    """
    if kind == "metade":
        from peftcli.sweep import surrogate

        return surrogate.next_point(space, tried, seed) or _unseen(space, tried, seed)
    if kind == "de":
        from peftcli.sweep import evolution

        new = evolution.next_points(space, tried, seed)
        if not new and None in tried.values():
            return None
        return new[0] if new else _unseen(space, tried, seed)
    for attempt in range(ATTEMPTS):
        point = _tpe(space, tried, draw(seed, len(tried), attempt))
        if point not in tried:
            return point
    return _unseen(space, tried, seed)


def _unseen(space: Space, tried: Tried, seed: int) -> Point | None:
    """A random point where a search finds no new one; None where there is none."""
    order = _random(space, draw(seed, len(tried)))
    return next((point for point in order if point not in tried), None)


def _random(space: Space, seed: int) -> Iterator[Point]:
    """Draws without repetition, until there are none left or (an interval may hold few texts) only
    old ones come; the k-th does not depend on how many are wanted.
    """
    seen: set[Point] = set()
    patience = REPEATS * (space.size or 1)
    last = 0  # draw that brought something new
    for number in itertools.count():
        if len(seen) == space.size or number - last > patience:
            return
        stream = random.Random(draw(seed, number))
        point = space.at([stream.random() for _ in space.dimensions])
        if point not in seen:
            seen.add(point)
            last = number
            yield point


# -- Optuna ----------------------------------------------------------------------------------------
def _tpe(space: Space, tried: Tried, seed: int) -> Point:
    """What TPE asks for, the study rebuilt from the points in an order of chance: Optuna trusts the
    first of more than 25 less, and which were first depends on the workers.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = [scores for scores in tried.values() if scores]
    sampler = optuna.samplers.TPESampler(seed=seed)
    directions: Any = ["maximize"] * len(known[0] if known else (0,))
    study = optuna.create_study(sampler=sampler, directions=directions)
    distributions = {d.key: _distribution(d, optuna.distributions) for d in space.dimensions}
    for point in sorted(tried, key=lambda p: draw(*p)):
        study.add_trial(_trial(space, point, tried[point], distributions, optuna.trial))
    asked = study.ask(distributions).params
    return tuple(f"{d.key}={_as_text(d, asked[d.key])}" for d in space.dimensions)


def _distribution(dimension: Dimension, of: Any) -> Any:
    if isinstance(dimension, Choices):
        if dimension.is_ordered:
            return of.IntDistribution(0, dimension.size - 1)
        return of.CategoricalDistribution(dimension.values)
    make = of.IntDistribution if dimension.integer else of.FloatDistribution
    return make(dimension.low, dimension.high, log=dimension.log)


def _as_text(dimension: Dimension, value: Any) -> str:
    if isinstance(dimension, Choices):
        return dimension.values[value] if dimension.is_ordered else value
    return dimension.text(value)


def _as_value(dimension: Dimension, text: str) -> Any:
    if isinstance(dimension, Choices):
        return dimension.values.index(text) if dimension.is_ordered else text
    return int(text) if dimension.integer else float(text)


def _trial(
    space: Space,
    point: Point,
    scores: Scores | None,
    distributions: dict[str, Any],
    of: Any,
) -> Any:
    texts = values_of(point)
    params = {d.key: _as_value(d, texts[d.key]) for d in space.dimensions}
    given = {"params": params, "distributions": distributions}
    if scores is None:
        return of.create_trial(state=of.TrialState.RUNNING, **given)
    return of.create_trial(values=list(scores), **given)
