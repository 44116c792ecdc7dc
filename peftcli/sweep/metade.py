"""MetaDE: differential evolution of the strategies of differential evolutions.

M. Chen, C. Feng, R. Cheng, "MetaDE: Evolving Differential Evolution by Differential Evolution",
IEEE Trans. Evolutionary Computation 2025, arXiv 2502.10470.

    theta* = argmin_theta  best(DE_theta on f)        theta = (F, CR, b_l, b_r, n, crossover)

The outer evolution is rand/1/bin with F = 0.5 and CR = 0.9. A theta is worth the best value that an
inner evolution with it finds from a fresh population; all of them run at once as one array. The
inner evolutions of the last generation take `POWER_UP` times the steps. It works because every
evaluation of a strategy is an attempt at f, too: the answer is the best point ever seen, and luck
in a theta's worth does no harm. It needs a cheap f: 10^4 to 10^8 evaluations.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from peftcli.sweep.evolution import (
    RAND_1_BIN,
    Array,
    Function,
    Strategies,
    generation,
    trial_vectors,
)

POWER_UP = 5  # the last generation's inner evolutions are so much longer


class Budget(NamedTuple):
    """How much is evaluated; the paper has 100 thetas and 100 individuals."""

    thetas: int = 100  # at least 4
    generations: int = 50
    individuals: int = 100  # of each inner evolution, at least 4
    steps: int = 100  # of each inner evolution

    @property
    def evaluations(self) -> int:
        """Of f."""
        steps = self.steps * (self.generations - 1 + POWER_UP)
        return self.thetas * self.individuals * (steps + self.generations)


class Found(NamedTuple):
    """The best point ever seen, and the strategy that found it."""

    x: Array  # (D,) in the unit cube
    value: float
    strategy: Strategies
    trace: list[float]  # the best value after every generation


def solve(
    f: Function, D: int, s: Strategies, N: int, steps: int, rng: Generator
) -> tuple[Array, Array]:
    """The best point (T, D), and its value (T,), that each of T strategies finds from a fresh
    population of N; the fields of `s` are (T, 1).
    """
    X = rng.random((len(s.F), N, D))
    y = f(X)
    for _ in range(steps):
        X, y = generation(f, X, y, s, rng)
    best = np.arange(len(y)), y.argmin(1)
    return X[best], y[best]


def minimise(f: Function, D: int, budget: Budget, rng: Generator) -> Found:
    """The least value of f on the unit cube of D dimensions that this budget finds."""
    T, N = budget.thetas, budget.individuals
    U = thetas = rng.random((1, T, 6))
    worth = np.full((1, T), np.inf)
    best_x, best, strategy, trace = np.empty(D), np.inf, RAND_1_BIN, []
    for number in range(1, budget.generations + 1):
        steps = budget.steps * (POWER_UP if number == budget.generations else 1)
        s = Strategies.at(U[0][:, None], N)
        x, y = solve(f, D, s, N, steps, rng)
        if y.min() < best:
            first = int(y.argmin())
            best_x, best = x[first], float(y[first])
            strategy = Strategies(*(field[first, 0] for field in s))
        trace.append(best)
        better = y < worth
        thetas, worth = np.where(better[..., None], U, thetas), np.where(better, y, worth)
        U = trial_vectors(thetas, worth, RAND_1_BIN, rng)
    return Found(best_x, best, strategy, trace)
