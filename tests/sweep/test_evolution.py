"""Differential evolution: its operators, and that it replays."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest

from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import evolution as de
from peftcli.sweep.evolution import Strategy
from peftcli.sweep.protocol import Study
from peftcli.sweep.space import parse
from tests.sweep.ledgers import go_on, names, sweep, sweep_by_workers

SPACE = parse(["x=interval(-5.0,5.0)", "y=interval(-5.0,5.0)", "z=interval(-5.0,5.0)"])
CURRENT_TO_BEST = Strategy(0.5, 0.9, de.CURRENT, de.BEST, 1, de.BINOMIAL)
RAND_1_BIN = Strategy(0.5, 0.9, de.RAND, de.RAND, 1, de.BINOMIAL)


class Picks(random.Random):
    """A stream whose samples are as they stand."""

    def sample(self, population: list, k: int) -> list:  # type: ignore[override]
        return population[:k]


def test_worked_mutants() -> None:
    best, rand, a, b = [0.0, 2.0], [9.0, 9.0], [3.0, 0.0], [1.0, 1.0]
    X, fitness = [[1.0, 1.0], rand, a, b, best], [1, 0, 0, 0, 5]
    assert de.mutant(X, fitness, 0, CURRENT_TO_BEST, Picks()) == [1.5, 1.0]
    best_1 = Strategy(0.5, 0.9, de.BEST, de.BEST, 1, de.BINOMIAL)
    assert de.mutant(X, fitness, 0, best_1, Picks()) == [1.0, 1.5]


def test_crossovers_at_their_ends() -> None:
    x, v = [0.0] * 6, [1.0] * 6
    for stream in map(random.Random, range(20)):
        for rate, arithmetic, run in ((0.0, x, 1), (1.0, v, 6)):
            kinds = [Strategy(0.5, rate, 0, 0, 1, kind) for kind in range(3)]
            binomial, exponential, between = (de.crossed(x, v, s, stream) for s in kinds)
            assert between == arithmetic
            assert sum(binomial) == sum(exponential) == run
    assert de.run_of(4, 6, 1.0, random.Random(0)) == set(range(6))

    class Thrice(random.Random):
        """Goes on twice, then ends."""

        def random(self) -> float:
            self.calls = getattr(self, "calls", 0) + 1
            return 0.0 if self.calls < 3 else 1.0

    assert de.run_of(4, 6, 0.5, Thrice()) == {4, 5, 0}


def test_strategies_are_decoded_by_their_floors() -> None:
    assert Strategy.decode([0.5, 0.9, 3.99, 1.0, 4.99, 2.99]) == Strategy(0.5, 0.9, 3, 1, 4, 2)
    assert Strategy.decode([0.5, 0.9, 4, 4, 5, 3]) == Strategy(0.5, 0.9, 3, 3, 4, 2)
    drawn = [Strategy.draw(random.Random(i), 6) for i in range(200)]
    assert {s.num_differences for s in drawn} == {1, 2}


@pytest.mark.parametrize(("strategy", "below"), [(RAND_1_BIN, 1e-5), (CURRENT_TO_BEST, 1e-9)])
def test_the_sphere_is_solved_and_the_best_never_gets_worse(
    strategy: Strategy, below: float
) -> None:
    def sphere(x: list[float]) -> float:
        return -sum((10 * c - 5) ** 2 for c in x)

    ends = []
    for seed in range(20):
        stream = random.Random(seed)
        X = [[stream.random() for _ in range(3)] for _ in range(20)]
        fitness = [sphere(x) for x in X]
        for _ in range(50):
            before = max(fitness)
            for i, u in enumerate(de.trial_vectors(X, fitness, [strategy] * 20, stream)):
                assert all(0 <= c <= 1 for c in u)
                if sphere(u) > fitness[i]:
                    X[i], fitness[i] = u, sphere(u)
            assert max(fitness) >= before
        ends.append(-max(fitness))
    assert statistics.median(ends) < below


def study(**given: object) -> Study:
    return Study(Sweep(**{"search": "de", "metric": "loss", "trials": 40, **given}), SPACE)


def sphere(given: Mapping[str, str]) -> dict[str, float]:
    return {"loss": sum(float(given[k]) ** 2 for k in "xyz")}


def test_a_search_that_was_killed_proposes_the_same_generation(tmp_path: Path) -> None:
    whole = sweep(study(), tmp_path, sphere)
    assert len(set(names(whole))) == len(whole) == 40
    for killed_after in (3, 10, 27):
        members = sweep(study(), tmp_path, sphere, most=killed_after)
        go_on(study(), tmp_path, sphere, members)
        assert names(members) == names(whole)


def test_workers_make_the_same_evolution(tmp_path: Path) -> None:
    whole = sweep(study(), tmp_path, sphere)
    members = sweep_by_workers(study(), tmp_path, sphere, 3, 0)
    assert set(names(members)) == set(names(whole))


def test_it_is_better_than_random(tmp_path: Path) -> None:
    def end(kind: str, seed: int) -> float:
        members = sweep(study(search=kind, search_seed=seed, trials=60), tmp_path, sphere)
        return math.log(min(m.metrics["loss"] for m in members))

    gains = [end("random", seed) - end("de", seed) for seed in range(6)]
    assert statistics.mean(gains) > 0


def test_a_small_space_is_tried_to_its_end_and_one_metric_is_needed(tmp_path: Path) -> None:
    small = parse(["x=1,2,3", "y=1,2"])
    given = Sweep(search="de", metric="loss", trials=50)
    members = sweep(Study(given, small), tmp_path, lambda g: {"loss": float(g["x"])})
    assert len(set(names(members))) == len(members) == 6
    with pytest.raises(ConfigError, match="one metric"):
        study(metric=("loss", "accuracy"))
