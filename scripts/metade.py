"""MetaDE on functions with known minima, beside plain differential evolution.

    python scripts/metade.py [FUNCTION ...] [--dim 10] [--seed 0] [--thetas 20] [--generations 10]
                             [--individuals 20] [--steps 50]

For each function (sphere, rastrigin, ackley, rosenbrock; default: all) the best value of MetaDE,
those of rand/1/bin (F = 0.5, CR = 0.9) with as many individuals as its inner evolutions have and
with 100, each with as many evaluations, and the strategy that MetaDE found. The minimum of each is
0, at a point drawn from the seed. The paper has 100 thetas and 100 individuals.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from peftcli.sweep import metade
from peftcli.sweep.evolution import RAND_1_BIN, Array, Function, Strategies

BASES = ("rand", "best", "pbest", "current")
CROSSOVERS = ("binomial", "exponential", "arithmetic")
PAPER = 100  # individuals
DEFAULTS = {"dim": 10, "seed": 0, "thetas": 20, "generations": 10, "individuals": 20, "steps": 50}
LEAST = {"dim": 1, "seed": 0, "thetas": 4, "generations": 1, "individuals": 4, "steps": 1}


def sphere(z: Array) -> Array:
    """sum z^2"""
    return (z**2).sum(-1)


def rastrigin(z: Array) -> Array:
    """Many valleys on a grid of width 1."""
    return (z**2 - 10 * np.cos(2 * np.pi * z) + 10).sum(-1)


def ackley(z: Array) -> Array:
    """A funnel in a plain of small valleys."""
    rough = np.exp(np.cos(2 * np.pi * z).mean(-1))
    return 20 - 20 * np.exp(-0.2 * np.sqrt((z**2).mean(-1))) + np.e - rough


def rosenbrock(z: Array) -> Array:
    """A bent valley."""
    x = z + 1
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


FUNCTIONS = {f.__name__: f for f in (sphere, rastrigin, ackley, rosenbrock)}


def shifted(f: Function, D: int, seed: int) -> Function:
    """f on [-5, 5]^D from the unit cube, its minimum moved to a point of chance."""
    middle = np.random.default_rng(seed).uniform(-2.5, 2.5, D)
    return lambda U: f(10 * U - 5 - middle)


def plain(
    f: Function, D: int, N: int, evaluations: int, rng: np.random.Generator, runs: int = 1
) -> list[float]:
    """The least value that each of some rand/1/bin finds with so many evaluations."""
    s = Strategies(*(np.full((runs, 1), field) for field in RAND_1_BIN))
    return metade.solve(f, D, s, N, evaluations // N - 1, rng)[1].tolist()


def row(name: str, D: int, budget: metade.Budget, seed: int) -> list[str]:
    """What is printed of one function."""
    f = shifted(FUNCTIONS[name], D, seed)
    found = metade.minimise(f, D, budget, np.random.default_rng(seed))
    others = [
        plain(f, D, N, budget.evaluations, np.random.default_rng(seed))[0]
        for N in (budget.individuals, PAPER)
    ]
    return [name, *(f"{value:.2g}" for value in (found.value, *others)), in_words(found.strategy)]


def main(words: Sequence[str] | None = None) -> int:
    """Print a line for each function."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("functions", nargs="*", metavar="FUNCTION", help=", ".join(FUNCTIONS))
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(words)
    if unknown := set(args.functions) - FUNCTIONS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(FUNCTIONS)}")
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    budget = metade.Budget(args.thetas, args.generations, args.individuals, args.steps)
    print(f"{budget.evaluations:,} evaluations in {args.dim} dimensions")
    columns = ("", "MetaDE", f"rand/1/bin of {budget.individuals}", f"of {PAPER}", "strategy")
    rows = (row(name, args.dim, budget, args.seed) for name in args.functions or FUNCTIONS)
    for cells in itertools.chain([columns], rows):
        print("{:<11}{:<10}{:<18}{:<10}{}".format(*cells))
    return 0


def in_words(s: Strategies) -> str:
    """As the field writes it: base, or base-to-base, differences, crossover."""
    left, right = BASES[int(s.left)], BASES[int(s.right)]
    base = left if left == right else f"{left}-to-{right}"
    crossover = CROSSOVERS[int(s.crossover)]
    return f"{base}/{int(s.num_differences)}/{crossover} F {s.F:.2f} CR {s.CR:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
