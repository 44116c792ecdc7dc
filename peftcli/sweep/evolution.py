"""Differential evolution with a strategy for every individual, replayed from what was tried.

    v = b_l + F (b_r - b_l) + F sum_{j <= n} (a_j - c_j)        a_j, c_j: distinct others
    u = cross(x_i, v; CR), clipped to the box; u takes the place of x_i where it is better

The parameterised operators of M. Chen, C. Feng, R. Cheng, "MetaDE: Evolving Differential Evolution
by Differential Evolution", IEEE Trans. Evolutionary Computation 2025, arXiv 2502.10470: b_l and b_r
are a random individual, the best, one of the best twentieth or the individual itself; the crossover
is binomial, exponential or arithmetic. Its outer evolution of strategies needs millions of
evaluations; here, where one is a training run, an individual keeps the strategy that has served it
and draws another one time in ten (J. Brest et al., "Self-Adapting Control Parameters in
Differential Evolution", IEEE Trans. Evolutionary Computation 2006: tau = 0.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from peftcli.sweep.objective import Scores
from peftcli.sweep.space import Point, Space

Vector = list[float]
RAND, BEST, PBEST, CURRENT = range(4)  # base vectors
BINOMIAL, EXPONENTIAL, ARITHMETIC = range(3)  # crossovers
BOUNDS = (1.0, 1.0, 4.0, 4.0, 5.0, 3.0)  # upper ones of F, CR, b_l, b_r, n, crossover
ELITE = 0.05  # part of the population that `PBEST` draws from
ANEW = 0.1  # how often an individual draws another strategy
POPULATION = 10
GENERATIONS = 200  # replayed at most: in a small space they may bring nothing new


@dataclass(frozen=True)
class Strategy:
    """How an individual makes its trial vectors."""

    F: float
    CR: float
    left: int
    right: int
    num_differences: int  # 1..4
    crossover: int

    @classmethod
    def decode(cls, theta: Sequence[float]) -> Strategy:
        """The strategy of six numbers below `BOUNDS`; whole ones by their floor."""
        F, CR, *whole = (min(t, b) for t, b in zip(theta, BOUNDS, strict=True))
        left, right, n, crossover = (
            min(int(w), int(b) - 1) for w, b in zip(whole, BOUNDS[2:], strict=True)
        )
        return cls(F, CR, left, right, n, crossover)

    @classmethod
    def draw(cls, stream: Random, size: int) -> Strategy:
        """Any strategy that a population of this size allows: 2 n + 1 others are needed."""
        most = min(4, (size - 2) // 2)
        theta = [stream.random() * b for b in BOUNDS]
        theta[4] = 1.0 + stream.random() * most
        return cls.decode(theta)


def mutant(X: Sequence[Vector], fitness: Sequence, i: int, s: Strategy, stream: Random) -> Vector:
    """v for individual `i` of the population X (N, D); larger fitness is better."""
    others = stream.sample([j for j in range(len(X)) if j != i], 2 * s.num_differences + 1)
    ranked = sorted(range(len(X)), key=lambda j: fitness[j], reverse=True)
    elite = ranked[: max(1, int(ELITE * len(X)))]
    bases = {RAND: others[0], BEST: ranked[0], PBEST: stream.choice(elite), CURRENT: i}
    left, right = X[bases[s.left]], X[bases[s.right]]
    pairs = list(zip(others[1::2], others[2::2], strict=True))
    return [
        a + s.F * (b - a) + s.F * sum(X[p][d] - X[q][d] for p, q in pairs)
        for d, (a, b) in enumerate(zip(left, right, strict=True))
    ]


def crossed(x: Vector, v: Vector, s: Strategy, stream: Random) -> Vector:
    """u: coordinates of v in x, one at least; or a point between the two."""
    D = len(x)
    if s.crossover == ARITHMETIC:
        return [a + s.CR * (b - a) for a, b in zip(x, v, strict=True)]
    first = stream.randrange(D)
    if s.crossover == BINOMIAL:
        taken = {d for d in range(D) if stream.random() < s.CR} | {first}
    else:
        taken = run_of(first, D, s.CR, stream)
    return [v[d] if d in taken else x[d] for d in range(D)]


def run_of(first: int, D: int, CR: float, stream: Random) -> set[int]:
    """A cyclic run of L coordinates from `first`: P(L >= k) = CR^(k - 1), 1 <= L <= D."""
    L = 1
    while L < D and stream.random() < CR:
        L += 1
    return {(first + k) % D for k in range(L)}


def trial_vectors(
    X: Sequence[Vector], fitness: Sequence, strategies: Sequence[Strategy], stream: Random
) -> list[Vector]:
    """One u for each individual, in the unit cube."""
    return [
        [min(max(c, 0.0), 1.0) for c in crossed(x, mutant(X, fitness, i, s, stream), s, stream)]
        for i, (x, s) in enumerate(zip(X, strategies, strict=True))
    ]


def next_points(space: Space, tried: Mapping[Point, Scores | None], seed: int) -> list[Point]:
    """What is untried of the newest generation that these results make; nothing while it runs, or
    where `GENERATIONS` brought nothing new.
    """
    X, strategies = start(space, seed)
    points = [space.at(x) for x in X]
    if new := [p for p in points if p not in tried]:
        return new
    for generation in range(1, GENERATIONS):
        fitness = [tried[p] for p in points]
        stream = Random(f"{seed}/{generation}")
        fresh = [Strategy.draw(stream, len(X)) if stream.random() < ANEW else s for s in strategies]
        if None in fitness:
            break
        U = trial_vectors(X, fitness, fresh, stream)
        made = [space.at(u) for u in U]
        if new := [p for p in made if p not in tried]:
            return new
        for i, point in enumerate(made):
            score, old = tried[point], fitness[i]
            if score is None or old is None:
                return []
            if score > old:
                X[i], points[i], strategies[i] = U[i], point, fresh[i]
    return []


def start(space: Space, seed: int) -> tuple[list[Vector], list[Strategy]]:
    """The first generation: one individual in each of `POPULATION` parts of every dimension (a
    Latin hypercube).
    """
    stream = Random(f"{seed}/start")
    columns = []
    for _ in space.dimensions:
        parts = list(range(POPULATION))
        stream.shuffle(parts)
        columns.append([(part + stream.random()) / POPULATION for part in parts])
    X = [list(row) for row in zip(*columns, strict=True)]
    return X, [Strategy.draw(stream, POPULATION) for _ in X]
