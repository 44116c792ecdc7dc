"""Differential evolution: its operators, and that it replays."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator, default_rng

from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import evolution as de
from peftcli.sweep.evolution import RAND_1_BIN, Array, Strategies
from peftcli.sweep.protocol import Study
from peftcli.sweep.space import parse
from tests.sweep.ledgers import go_on, names, sweep, sweep_by_workers

SPACE = parse(["x=interval(-5.0,5.0)", "y=interval(-5.0,5.0)", "z=interval(-5.0,5.0)"])


def strategy(*theta: float) -> Strategies:
    return Strategies.decode(np.array(theta))


CURRENT_TO_BEST = strategy(0.5, 0.9, de.CURRENT, de.BEST, 1, de.BINOMIAL)
BEST_1 = strategy(0.5, 0.9, de.BEST, de.BEST, 1, de.BINOMIAL)


class InOrder(Generator):
    """A stream whose draws rise along the last axis: others come in the order of their numbers."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self, size: tuple[int, ...]) -> Array:  # type: ignore[override]
        return np.broadcast_to(np.arange(size[-1]) / size[-1], size).copy()


def sphere(U: Array) -> Array:
    """On [-5, 5]^D."""
    return ((10 * U - 5) ** 2).sum(-1)


def test_worked_mutants() -> None:
    x, rand, a, b, best = [1.0, 1.0], [9.0, 9.0], [3.0, 0.0], [1.0, 1.0], [0.0, 2.0]
    X, y = np.array([[x, rand, a, b, best]]), np.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    rand_1 = strategy(0.5, 0.9, de.RAND, de.RAND, 1, de.BINOMIAL)
    rand_to_best = strategy(0.5, 0.9, de.RAND, de.PBEST, 1, de.BINOMIAL)
    for s, v in (
        (CURRENT_TO_BEST, [1.5, 1.0]),
        (BEST_1, [1.0, 1.5]),
        (rand_1, [10.0, 8.5]),
        (rand_to_best, [5.5, 5.0]),
    ):
        assert de.mutants(X, y, s, InOrder())[0, 0].tolist() == v


def test_every_difference_counts_and_no_more() -> None:
    X = np.arange(11.0)[None, :, None] ** 2  # individuals 0..10, others of 0 in order: 1, 2, ...
    y = np.zeros((1, 11))
    thetas = np.array([[[1.0, 1.0, de.CURRENT, de.CURRENT, n, 0] for n in (1, 2, 3, 4)]])
    mixed = Strategies.decode(np.concatenate([thetas, thetas, thetas], 1)[:, :11])
    V = de.mutants(X, y, mixed, InOrder())
    assert V[0, 0, 0] == 2**2 - 3**2
    assert V[0, 1, 0] == 1 + (2**2 - 3**2) + (4**2 - 5**2)
    four = de.mutants(X, y, strategy(1.0, 1.0, de.CURRENT, de.CURRENT, 4, 0), InOrder())
    assert four[0, 0, 0] == -(5 + 9 + 13 + 17)


def test_others_are_distinct_and_never_the_individual_itself() -> None:
    others = de.distinct_others(50, 11, 9, default_rng(0))
    assert all(len({i, *row}) == 10 for P in others.tolist() for i, row in enumerate(P))
    assert {int(j) for j in others[:, 3].ravel()} == set(range(11)) - {3}


def test_the_elite_is_the_best_twentieth_and_one_at_least() -> None:
    pbest = strategy(0.0, 1.0, de.PBEST, de.PBEST, 1, de.BINOMIAL)
    for N, elite in ((10, 1), (59, 2), (100, 5)):
        X, y = np.arange(float(N))[None, :, None], np.arange(float(N))[None]
        drawn = {float(v) for k in range(9) for v in de.mutants(X, y, pbest, default_rng(k)).flat}
        assert drawn == set(range(elite))


def test_crossovers_at_their_ends() -> None:
    x, v = np.zeros((4, 5, 6)), np.ones((4, 5, 6))
    for rate, arithmetic, length in ((0.0, 0.0, 1), (1.0, 1.0, 6)):
        made = [de.crossed(x, v, strategy(0.5, rate, 0, 0, 1, k), default_rng(3)) for k in range(3)]
        binomial, exponential, between = made
        assert (between == arithmetic).all()
        assert (binomial.sum(-1) == length).all()
        assert (exponential.sum(-1) == length).all()


def test_an_exponential_crossover_takes_a_run_around_the_end() -> None:
    class FromFour(InOrder):
        """The run starts at 4 and goes on twice."""

        def random(self, size: tuple[int, ...]) -> Array:
            drawn = [4 / 6] if size[-1] == 1 else [0.9, 0.0, 0.0, 0.9, 0.0, 0.0]
            return np.broadcast_to(np.array(drawn), size).copy()

    s = strategy(0.5, 0.5, 0, 0, 1, de.EXPONENTIAL)
    u = de.crossed(np.zeros((1, 1, 6)), np.ones((1, 1, 6)), s, FromFour())
    assert u[0, 0].nonzero()[0].tolist() == [0, 4, 5]
    draws = default_rng(0).random((20_000, 5))
    lengths = de.run_lengths(draws, np.array(0.6))
    for k in range(1, 7):  # the shares have a deviation of 0.0035 at most
        assert (lengths >= k).mean() == pytest.approx(0.6 ** (k - 1), abs=0.02)


def test_strategies_are_decoded_by_their_floors() -> None:
    assert tuple(map(float, strategy(0.5, 0.9, 3.99, 1.0, 4.99, 2.99))) == (0.5, 0.9, 3, 1, 4, 2)
    assert tuple(map(float, strategy(0.5, 0.9, 4, 4, 5, 3))) == (0.5, 0.9, 3, 3, 4, 2)
    drawn = Strategies.at(default_rng(0).random((200, 6)), 6)
    assert set(drawn.num_differences.tolist()) == {1, 2}
    for N, most in ((4, 1), (10, 4), (100, 4)):
        assert Strategies.at(np.ones(6), N).num_differences == most


@pytest.mark.parametrize(("s", "below"), [(RAND_1_BIN, 1e-5), (CURRENT_TO_BEST, 1e-9)])
def test_the_sphere_is_solved_and_the_best_never_gets_worse(s: Strategies, below: float) -> None:
    rng = default_rng(0)
    X = rng.random((20, 20, 3))
    y = sphere(X)
    for _ in range(50):
        before = y
        X, y = de.generation(sphere, X, y, s, rng)
        assert (y <= before).all()
        assert ((X >= 0) & (X <= 1)).all()
    assert statistics.median(y.min(1)) < below


def test_populations_of_other_strategies_stay_in_the_box() -> None:
    rng = default_rng(1)
    X = rng.random((40, 12, 2))
    y = sphere(X)
    s = Strategies.at(rng.random((40, 1, 6)), 12)
    for _ in range(10):
        U = de.trial_vectors(X, y, s, rng)
        assert ((U >= 0) & (U <= 1)).all()
        X, y = de.generation(sphere, X, y, s, rng)


def study(**given: object) -> Study:
    return Study(Sweep(**{"search": "de", "metric": "loss", "trials": 40, **given}), SPACE)


def loss(given: Mapping[str, str]) -> dict[str, float]:
    return {"loss": sum(float(given[k]) ** 2 for k in "xyz")}


def test_a_search_that_was_killed_proposes_the_same_generation(tmp_path: Path) -> None:
    whole = sweep(study(), tmp_path, loss)
    assert len(set(names(whole))) == len(whole) == 40
    for killed_after in (3, 10, 27):
        members = sweep(study(), tmp_path, loss, most=killed_after)
        go_on(study(), tmp_path, loss, members)
        assert names(members) == names(whole)


def test_workers_make_the_same_evolution(tmp_path: Path) -> None:
    whole = sweep(study(), tmp_path, loss)
    members = sweep_by_workers(study(), tmp_path, loss, 3, 0)
    assert set(names(members)) == set(names(whole))


def test_it_is_better_than_random(tmp_path: Path) -> None:
    def end(kind: str, seed: int) -> float:
        members = sweep(study(search=kind, search_seed=seed, trials=60), tmp_path, loss)
        return math.log(min(m.metrics["loss"] for m in members))

    gains = [end("random", seed) - end("de", seed) for seed in range(6)]
    assert statistics.mean(gains) > 0


@pytest.mark.parametrize("kind", ["de", "metade"])
def test_a_small_space_is_tried_to_its_end_and_one_metric_is_needed(
    kind: str, tmp_path: Path
) -> None:
    small = parse(["x=1,2,3", "y=1,2"])
    given = Sweep(search=kind, metric="loss", trials=50)  # type: ignore[arg-type]
    members = sweep(Study(given, small), tmp_path, lambda g: {"loss": float(g["x"])})
    assert len(set(names(members))) == len(members) == 6
    with pytest.raises(ConfigError, match="one metric"):
        study(search=kind, metric=("loss", "accuracy"))
