"""Differential evolution, many populations at once, with a strategy for each of their individuals.

    v = b_l + F (b_r - b_l) + F sum_{j <= n} (a_j - c_j)        a_j, c_j: distinct others
    u = cross(x, v; CR), clipped to the box; u takes the place of x where it is better

The parameterised operators of M. Chen, C. Feng, R. Cheng, "MetaDE: Evolving Differential Evolution
by Differential Evolution", IEEE Trans. Evolutionary Computation 2025, arXiv 2502.10470: b_l and b_r
are a random individual, the best, one of the best twentieth or the individual itself; the crossover
is binomial, exponential or arithmetic. Unlike in its code the start is evaluated, u must be
strictly better, and the a_j, c_j exclude x. Everything lies in the unit cube and is minimised;
`metade` evolves strategies with these operators.

`next_points` is one population whose evaluations are training runs (`sweep.search=de`), too dear
for an evolution of strategies: an individual keeps the one that has served it and draws another one
time in ten (J. Brest et al., "Self-Adapting Control Parameters in Differential Evolution", IEEE
Trans. Evolutionary Computation 2006: tau = 0.1).

Axes: P populations, N individuals, D coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from peftcli.sweep import chance
from peftcli.sweep.objective import Scores
from peftcli.sweep.space import Point, Space

Array = np.ndarray
Function = Callable[[Array], Array]  # (..., D) in the unit cube -> (...), smaller is better
RAND, BEST, PBEST, CURRENT = range(4)  # base vectors
BINOMIAL, EXPONENTIAL, ARITHMETIC = range(3)  # crossovers
LOW = np.array((0.0, 0.0, 0.0, 0.0, 1.0, 0.0))  # ends of F, CR, b_l, b_r, n, crossover
HIGH = np.array((1.0, 1.0, 4.0, 4.0, 5.0, 3.0))  # these of the whole ones are not reached
ELITE = 0.05  # part of a population that `PBEST` draws from
ANEW = 0.1  # how often an individual of `next_points` draws another strategy
POPULATION = 10
GENERATIONS = 200  # replayed at most: in a small space they may bring nothing new


class Strategies(NamedTuple):
    """How individuals make their trial vectors: arrays that broadcast to (P, N)."""

    F: Array
    CR: Array
    left: Array
    right: Array
    num_differences: Array  # 1..4
    crossover: Array

    @classmethod
    def decode(cls, thetas: Array) -> Strategies:
        """The strategies of six numbers each, (..., 6), below `HIGH`; whole ones by their floor."""
        thetas = np.minimum(thetas, HIGH)
        whole = np.minimum(thetas[..., 2:].astype(int), HIGH[2:].astype(int) - 1)
        return cls(thetas[..., 0], thetas[..., 1], *np.moveaxis(whole, -1, 0))

    @classmethod
    def at(cls, u: Array, N: int) -> Strategies:
        """Those at points (..., 6) of the unit cube that is all which populations of N allow: 2 n
        + 1 others are needed.
        """
        high = HIGH.copy()
        high[4] = LOW[4] + min(4, (N - 2) // 2)
        return cls.decode(LOW + np.minimum(u, 1.0 - 1e-5) * (high - LOW))


RAND_1_BIN = Strategies.decode(np.array((0.5, 0.9, RAND, RAND, 1, BINOMIAL)))


def distinct_others(P: int, N: int, count: int, rng: Generator) -> Array:
    """(P, N, count): for every individual, distinct ones of its population without itself."""
    assert count < N, f"{count} others of {N} individuals"
    keys = rng.random((P, N, N))
    keys[:, np.arange(N), np.arange(N)] = 2.0
    return keys.argsort(-1)[..., :count]


def mutants(X: Array, y: Array, s: Strategies, rng: Generator) -> Array:
    """v (P, N, D) for every individual of X (P, N, D), whose values are y (P, N)."""
    P, N, _ = X.shape
    most = int(s.num_differences.max())
    others = distinct_others(P, N, 2 * most + 1, rng)
    ranked = y.argsort(1, kind="stable")
    elite = ranked[:, : max(1, int(ELITE * N))]
    chosen = (rng.random((P, N)) * elite.shape[1]).astype(int)
    pbest = np.take_along_axis(elite, chosen, 1)
    bases = np.broadcast_arrays(others[..., 0], ranked[:, :1], pbest, np.arange(N))
    left, right = (_rows(X, np.choose(which, bases)) for which in (s.left, s.right))
    differences = _rows(X, others[..., 1::2]) - _rows(X, others[..., 2::2])  # (P, N, most, D)
    counted = np.arange(most) < s.num_differences[..., None]
    total = (differences * counted[..., None]).sum(2)
    F = s.F[..., None]
    return left + F * (right - left) + F * total


def _rows(X: Array, index: Array) -> Array:
    """Individuals of X (P, N, D) by their numbers (P, ...) in their population."""
    return X[np.arange(len(X)).reshape(-1, *[1] * (index.ndim - 1)), index]


def crossed(X: Array, V: Array, s: Strategies, rng: Generator) -> Array:
    """u (P, N, D): coordinates of v in x, one at least; or a point between the two."""
    P, N, D = X.shape
    CR, kind = s.CR[..., None], s.crossover[..., None]
    first = (rng.random((P, N, 1)) * D).astype(int)
    draws = rng.random((P, N, D))
    behind = (np.arange(D) - first) % D  # places after the first, around the end
    binomial = (draws < CR) | (behind == 0)
    exponential = behind < run_lengths(draws[..., 1:], CR)
    taken = np.where(kind == BINOMIAL, binomial, exponential)
    return np.where(kind == ARITHMETIC, X + CR * (V - X), np.where(taken, V, X))


def run_lengths(draws: Array, CR: Array) -> Array:
    """L (..., 1) of uniform draws (..., D - 1): P(L >= k) = CR^(k - 1), 1 <= L <= D."""
    return 1 + np.cumprod(draws < CR, axis=-1).sum(-1, keepdims=True)


def trial_vectors(X: Array, y: Array, s: Strategies, rng: Generator) -> Array:
    """One u for each individual, in the unit cube."""
    return crossed(X, mutants(X, y, s, rng), s, rng).clip(0.0, 1.0)


def generation(
    f: Function, X: Array, y: Array, s: Strategies, rng: Generator
) -> tuple[Array, Array]:
    """The populations and their values after each individual met its trial vector."""
    U = trial_vectors(X, y, s, rng)
    values = f(U)
    better = values < y
    return np.where(better[..., None], U, X), np.where(better, values, y)


def latin_hypercube(N: int, D: int, rng: Generator) -> Array:
    """(N, D): one point in each of N equal parts of every dimension."""
    parts = rng.permuted(np.tile(np.arange(N), (D, 1)), axis=1).T
    return (parts + rng.random((N, D))) / N


def start(space: Space, seed: int) -> list[Point]:
    """What a search begins with, where it has no results to go by."""
    rng = chance.stream(seed, "start")
    return points_at(space, latin_hypercube(POPULATION, len(space.dimensions), rng))


def points_at(space: Space, U: Array) -> list[Point]:
    """The points at positions (N, D)."""
    return [space.at(u) for u in U.tolist()]  # plain numbers: they become text


def next_points(space: Space, tried: Mapping[Point, Scores | None], seed: int) -> list[Point]:
    """What is untried of the newest generation that these results make; nothing while it runs, or
    where `GENERATIONS` brought nothing new.
    """
    N, D = POPULATION, len(space.dimensions)
    U = X = latin_hypercube(N, D, chance.stream(seed, "start"))[None]
    fresh = thetas = chance.stream(seed, "strategies").random((1, N, 6))
    y = np.full((1, N), np.inf)
    for number in range(1, GENERATIONS):
        points = points_at(space, U[0])
        if new := [p for p in points if p not in tried]:
            return new
        scores = [tried[p] for p in points]
        if None in scores:
            break
        values = np.array([[-s[0] for s in scores if s]])
        better = (values < y)[..., None]
        X, thetas = np.where(better, U, X), np.where(better, fresh, thetas)
        y = np.minimum(values, y)
        rng = chance.stream(seed, number)
        fresh = np.where(rng.random((1, N, 1)) < ANEW, rng.random((1, N, 6)), thetas)
        U = trial_vectors(X, y, Strategies.at(fresh, N), rng)
    return []
