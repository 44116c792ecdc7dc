"""MetaDE: on functions with known minima, and on a surrogate of runs."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.random import default_rng

from peftcli.settings import Sweep
from peftcli.sweep import metade, surrogate
from peftcli.sweep.encoding import encoded
from peftcli.sweep.evolution import Array
from peftcli.sweep.metade import Budget
from peftcli.sweep.protocol import Study
from peftcli.sweep.space import Space, parse
from tests.sweep.ledgers import names, sweep, sweep_by_workers
from tests.sweep.test_search import BRANIN, branin

SCRIPT = Path(__file__).parents[2] / "scripts" / "metade.py"
MIXED = parse(
    ["lr=tag(log,interval(1e-4,1e-1))", "r=2,4,8", "act=relu,gelu,tanh", "n=int(interval(1,4))"]
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metade_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evaluations_are_as_many_as_a_budget_says_and_the_best_seen_is_the_answer() -> None:
    budget, seen = Budget(thetas=6, generations=3, individuals=8, steps=4), []

    def f(U: Array) -> Array:
        values = ((U - 0.3) ** 2).sum(-1)
        seen.extend(values.ravel().tolist())
        return values

    found = metade.minimise(f, 2, budget, default_rng(0))
    assert len(seen) == budget.evaluations == 6 * 8 * (3 + 4 + 4 + 20)
    assert found.value == min(seen) == found.trace[-1]
    assert found.value == pytest.approx(((found.x - 0.3) ** 2).sum())
    assert found.trace == sorted(found.trace, reverse=True)


def test_the_script_says_what_it_found(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    small = "--dim 3 --thetas 6 --generations 2 --individuals 10 --steps 10".split()
    assert script.main(["sphere", "ackley", *small]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "3,720 evaluations in 3 dimensions"
    assert [line.split()[0] for line in lines[1:]] == ["sphere", "ackley"]
    with pytest.raises(SystemExit):
        script.main(["spehre"])


@pytest.mark.parametrize(("name", "below"), [("rastrigin", 2.0), ("sphere", 1e-10)])
def test_it_is_better_than_plain_evolutions_of_as_many_evaluations(
    name: str, below: float, script: ModuleType
) -> None:
    """In ten dimensions, by medians over seeds."""
    D, budget = 10, Budget(thetas=10, generations=6, individuals=20, steps=60)
    f = script.shifted(script.FUNCTIONS[name], D, 0)
    ends = [metade.minimise(f, D, budget, default_rng(seed)).value for seed in range(3)]
    by_plain = script.plain(f, D, 20, budget.evaluations, default_rng(0), runs=5)
    assert statistics.median(ends) < min(below, statistics.median(by_plain))


# -- on a surrogate --------------------------------------------------------------------------------
def study(space: Space = BRANIN, **given: object) -> Study:
    return Study(Sweep(**{"search": "metade", "metric": "loss", "trials": 20, **given}), space)


def test_a_surrogate_sees_what_is_run() -> None:
    U = np.array([[0.5, 0.1, 0.5, 0.30], [0.5, 0.3, 0.6, 0.49], [0.5, 0.4, 0.9, 0.51]])
    rows = encoded(MIXED, U)
    assert rows.shape == (3, 1 + 1 + 3 + 1)
    assert rows[0].tolist() == rows[1].tolist()  # r=2 act=gelu n=2
    assert rows[2, 1] == 0.5
    assert rows[2, 5] == pytest.approx(0.625)  # n=3, the third of four
    assert np.linalg.norm(rows[0, 2:5] - rows[2, 2:5]) == pytest.approx(1.0)
    for u in U.tolist():
        again = encoded(MIXED, np.array(MIXED.position(MIXED.at(u))))
        assert again == pytest.approx(encoded(MIXED, np.array(u)), abs=1e-4)


def test_it_is_better_than_random_on_a_known_function(tmp_path: Path) -> None:
    def regret(kind: str, seed: int) -> float:
        members = sweep(study(search=kind, trials=20, search_seed=seed), tmp_path, branin)
        assert len(set(names(members))) == len(members) == 20
        return min(m.metrics["loss"] for m in members) - 0.397887

    by_metade = [regret("metade", seed) for seed in range(3)]
    by_chance = [regret("random", seed) for seed in range(3)]
    assert statistics.median(by_metade) < 0.3 * statistics.median(by_chance)


def test_choices_and_failures_are_learned_and_a_diverged_loss_does_no_harm(tmp_path: Path) -> None:
    def run(g: Mapping[str, str]) -> dict[str, float] | None:
        if g["act"] == "tanh":
            return None
        loss = abs(np.log10(float(g["lr"])) + 2) + (g["act"] == "relu") + float(g["n"]) / 8
        return {"loss": 1e6 if float(g["lr"]) > 0.05 else float(loss)}

    members = sweep(study(MIXED, trials=20), tmp_path, run)
    later = members[12:]
    assert sum(m.state == "failed" for m in later) <= 3
    best = min(members, key=lambda m: m.metrics.get("loss", np.inf))
    assert {"act=gelu", "n=1"} <= set(best.overrides)


def test_workers_share_it_and_try_different_points(tmp_path: Path) -> None:
    members = sweep_by_workers(study(trials=13), tmp_path, branin, 3, 0)
    assert len(set(names(members))) == len(members) == 13
    running = {m.overrides: (-m.metrics["loss"],) for m in members} | {("x=1", "y=2"): None}
    first = surrogate.next_point(BRANIN, running, 0)
    assert first is not None
    assert surrogate.next_point(BRANIN, {**running, first: None}, 0) != first
